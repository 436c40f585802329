"""Oracles for the settings: whence each value comes, that none is dead, one line for every mistake."""

import ast
import json
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError, asdict, fields, replace
from pathlib import Path

import pytest

import settings as S

ROOT = Path(__file__).resolve().parents[2]
FIELDS = {f.name: f for f in fields(S.Settings)}
FREE = ["--stage", "grpo", "--parameters", "full", "--name", "given"]  # here any one other field may change alone
FLOW, QWEN = "--preset flow-opd", "--preset qwen-rl"


def flag(name):
    return "--" + name.replace("_", "-")


def tiny(line):
    """A command line in the tiny world, which runs every stage, unless it names a preset itself."""
    words = line.split() if isinstance(line, str) else list(line)
    return words if "--preset" in words else ["--preset", "tiny", *words]


def parse(line, **more):
    return S.parse(tiny(line), **more)[0]


def refusal(line, **more):
    """The message of the SettingsError that a command line gives; it is one line."""
    with pytest.raises(S.SettingsError) as error:
        parse(line, **more)
    assert "\n" not in str(error.value)
    return str(error.value)


def config(tmp_path, values):
    file = tmp_path / "given.json"
    file.write_text(values if isinstance(values, str) else json.dumps(values))
    return ["--config", str(file)]


# ------------------------------------------------------------------------------------------------- precedence
def test_defaults_yield_to_the_preset_to_its_stage_to_the_config_to_the_flags(tmp_path, monkeypatch):
    preset = {"": {"lr": 0.125, "warmup": 9, "seed": 4}, "grpo": {"lr": 0.2, "rank": 22, "alpha": 2.5}}
    monkeypatch.setattr(S, "PRESETS", {"tiny": preset, "flow-opd": {"": {}, "opd": {"lr": 0.25}}})
    file = config(tmp_path, {"rank": 33, "alpha": 3.5, "stage": "grpo"})
    s = parse([*file, "--alpha", "4.5"])
    assert (s.batch_size, s.warmup, s.lr, s.rank, s.alpha) == (FIELDS["batch_size"].default, 9, 0.2, 33, 4.5)
    assert parse([*file, "--stage", "merge"]).lr == 0.125, "a stage without an entry has the preset's own values"
    s, _ = S.parse([])
    assert (s.preset, s.stage, s.lr, s.seed) == ("flow-opd", "opd", 0.25, 0), "the defaults name preset and stage"
    s, _ = S.parse(config(tmp_path, {"preset": "tiny"}))
    assert (s.preset, s.lr, s.seed) == ("tiny", 0.125, 4), "a config may choose the preset, too"


def test_the_shipped_presets_change_real_fields_and_every_stage_of_them_resolves():
    assert set(S.PRESETS) == set(FIELDS["preset"].metadata["choices"])
    for preset, stages in S.PRESETS.items():
        assert set(stages) <= {"", *S.STAGES}
        for stage in S.STAGES:
            if preset in ("flow-opd", "qwen-rl") and stage == "pretrain":
                continue  # refused, see below
            s = parse(["--preset", preset, "--stage", stage])
            for name, value in {**stages[""], **stages.get(stage, {})}.items():
                assert getattr(s, name) == value and type(getattr(s, name)) is FIELDS[name].type, (stage, name)


def test_the_defaults_are_those_of_flow_opd_appendix_a():
    """Worked from F App. A and the Flow-GRPO line it builds on, for eight ranks; nothing here is read from a preset."""
    expected = {
        "resolution": 512, "num_steps": 10, "eval_steps": 40, "cfg": 4.5, "noise_level": 0.7, "group_size": 24,
        "kernel": "sde", "advantage_std": "group", "advantage_clip": 5.0, "clip": 1e-4, "log_prob": "mean",
        "lr": 3e-4, "weight_decay": 1e-4, "grad_norm": 1.0, "ema_decay": 0.9, "ema_every": 8, "warmup": 0,
        "mar": 0.02, "beta": 0.04, "updates": 2, "rank": 32, "alpha": 64.0, "parameters": "lora",
        "precision": "bfloat16", "train_steps": "all", "estimator": "analytic", "weight": "kl", "states": "sde",
        "model": "stabilityai/stable-diffusion-3.5-medium", "tasks": "composition,text,quality", "anchor": "quality",
        "rewards": "", "combine": "sum", "overlap": False, "on_reward_failure": "stop",
    }  # fmt: skip
    grpo, opd = S.parse(["--stage", "grpo"])[0], S.parse([])[0]
    assert {name: getattr(grpo, name) for name in expected} == expected
    assert {name: getattr(opd, name) for name in expected} == expected | {"lr": 1e-4}
    assert all(FIELDS[name].default == value for name, value in expected.items()), "the dataclass says the same"
    assert S.window_of(grpo) == S.window_of(opd) == (0, 9), "the last of ten steps is not trained"
    assert 8 * grpo.prompts_per_step == 48 and 8 * grpo.prompts_per_step // grpo.updates == 24, (
        "groups an epoch, update"
    )
    assert 8 * opd.prompts_per_step == 24, "an OPD step is one such update"
    assert opd.teachers == {
        "composition": "jieliu/SD3.5M-FlowGRPO-GenEval",
        "text": "CostaliyA/SD3.5M-FlowGRPO-OCR-3240",
        "quality": "CostaliyA/SD3.5M-FlowGRPO-Deqa-Mix",
    }


def test_the_defaults_are_the_flow_opd_presets_and_nothing_of_the_tiny_world():
    s, _ = S.parse([])
    assert s == parse(FLOW) and (s.preset, s.stage, s.name) == ("flow-opd", "opd", "flow-opd-opd")
    assert not S.is_tiny(s) and S.is_tiny(parse(""))
    assert not any("tiny" in str(value) for value in asdict(s).values())


def test_a_stage_of_a_plan_keeps_what_the_user_chose_but_not_its_stage_and_name():
    _, chosen = S.parse(tiny("--stage all --name plan --lr 0.5 --seed 7"))
    s = S.for_stage(chosen, "grpo", task="text", model="base")
    assert (s.stage, s.task, s.model, s.lr, s.seed) == ("grpo", "text", "base", 0.5, 7)
    assert (s.preset, s.name) == ("tiny", "tiny-grpo-text")
    assert s.steps == S.PRESETS["tiny"]["grpo"]["steps"], "the stage's own preset"
    assert S.for_stage(chosen, "merge", name="plan-merge", seed=8).seed == 8, "the plan has the last word"


def test_a_run_without_a_name_is_named_after_preset_stage_and_task():
    assert parse("").name == "tiny-opd"
    assert parse("--stage grpo").name == "tiny-grpo"
    assert parse("--stage grpo --task text").name == "tiny-grpo-text"
    assert parse("--stage sft --task text").name == "tiny-sft", "only grpo has a task"
    assert parse("--stage curate --task text").name == "tiny-curate"
    assert parse("--name mine").name == "mine"
    assert parse(f"{FLOW} --stage sft").name == "flow-opd-sft"


def test_a_curation_draws_as_grpo_does_and_ends_without_an_evaluation():
    for preset, count in (("flow-opd", 2000), ("tiny", 240)):
        grpo, curate = (asdict(parse(f"--preset {preset} --stage {stage}")) for stage in ("grpo", "curate"))
        changed = {name for name in FIELDS if grpo[name] != curate[name]}
        assert changed <= {"stage", "name", "steps", "lr", "train_prompts", "eval_prompts"}
        assert (curate["train_prompts"], curate["eval_prompts"], curate["threshold"]) == (count, 0, 0.05)


def test_an_evaluation_has_its_own_name_and_no_anchor_unless_asked():
    s = parse("", prog="eval.py")
    assert (s.name, s.mar) == ("eval", 0.0) and parse("").mar > 0
    assert S.parse([], prog="eval.py")[0].name == "eval"
    s = parse("--name mine --mar 0.5", prog="eval.py")
    assert (s.name, s.mar) == ("mine", 0.5)


def test_what_was_chosen_is_returned_beside_what_was_resolved(tmp_path):
    _, chosen = S.parse([*config(tmp_path, {"rank": 8, "lr": 1}), "--lr", "0.5"])
    assert chosen.pop("config").endswith("given.json") and chosen == {"rank": 8, "lr": 0.5}


def test_settings_are_frozen_and_share_no_dictionary():
    s, other = parse(""), parse("")
    with pytest.raises(FrozenInstanceError):
        s.lr = 1.0
    s.teachers["text"] = "changed"
    assert other.teachers == parse("").teachers != s.teachers


# ----------------------------------------------------------------------------------------- every field a flag
def another(f):
    """(arguments that set field `f` to something that is not its default, the value they should give)."""
    default = getattr(parse(FREE), f.name)
    if f.type is bool:
        return ["--no-" + f.name.replace("_", "-") if default else flag(f.name)], not default
    if f.type is dict:
        return [flag(f.name), "text=a/b=c", "quality=d"], {"text": "a/b=c", "quality": "d"}
    if f.type is str:
        words = {"window": "1:3", "rewards": "ocr=2,jpeg=0.5", "tasks": "text"}
        choices = reversed(f.metadata.get("choices", ()))
        value = next((c for c in choices if c not in (default, "velocity")), words.get(f.name, "x"))
    else:
        value = default + 1 if f.type is int else abs(default - 0.03125)  # exact in binary; no bound is passed
    return [flag(f.name), str(value)], value


@pytest.mark.parametrize("name", [n for n in FIELDS if n not in ("config", "preset", "stage", "name")])
def test_every_field_is_a_flag_that_sets_it_and_nothing_else(name):
    arguments, value = another(FIELDS[name])
    before, after = asdict(parse(FREE)), asdict(parse(FREE + arguments))
    assert before[name] != value
    assert after == before | {name: value} and type(after[name]) is FIELDS[name].type


def test_a_repeated_dictionary_flag_adds_up_and_replaces_the_default():
    s = parse([*FREE, "--teachers", "text=a", "--teachers", "quality=b"])
    assert s.teachers == {"text": "a", "quality": "b"}


def test_the_help_names_every_flag_with_its_text_and_default(capsys):
    with pytest.raises(SystemExit) as stop:
        S.parse(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for name, f in FIELDS.items():
        assert len(f.metadata["help"]) > 10
        # argparse breaks lines at hyphens, and the join above leaves a blank there
        text = re.escape(" ".join(f.metadata["help"].split())).replace(r"\-", r"\-\s?")
        assert flag(name) in shown and re.search(text, shown), name
    assert "(default: 0.9)" in shown and "composition=jieliu/SD3.5M-FlowGRPO-GenEval" in shown


def test_every_number_has_a_lower_bound_that_its_default_keeps():
    for f in fields(S.Settings):
        if f.type in (int, float):
            assert f.default >= f.metadata["low"], f.name
            assert f.default <= f.metadata.get("high", f.default), f.name
            assert type(f.default) is f.type, f.name
        assert f.type is not str or f.default in f.metadata.get("choices", (f.default,)), f.name


# --------------------------------------------------------------------------------------------- no dead option
def attribute_reads(tree):
    """Names x read as `s.x`, `settings.x` or `run.s.x` in a syntax tree."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value
            if getattr(owner, "id", None) in ("s", "settings") or getattr(owner, "attr", None) == "s":
                yield node.attr


def test_every_field_is_read_by_the_program():
    """A field counts as read outside settings.py, or in one of its helpers that is called from outside. What only
    --dry-run tells of is not done: plan.py and cost.py do not count.
    """
    sources = {f.name: ast.parse(f.read_text()) for f in ROOT.glob("*.py") if f.name not in ("plan.py", "cost.py")}
    used = {n.id for name, tree in sources.items() if name != "settings.py"
            for n in ast.walk(tree) if isinstance(n, ast.Name)}  # fmt: skip
    outside = {name for file, tree in sources.items() if file != "settings.py" for name in attribute_reads(tree)}
    for node in sources["settings.py"].body:
        helper = isinstance(node, ast.FunctionDef) and node.name not in ("parse", "resolve", "check", "for_stage")
        if helper and node.name in used | outside:
            outside |= set(attribute_reads(node))
    # Consumed while the others are resolved (the precedence test above).
    assert set(FIELDS) - outside == {"config"}


def test_the_scan_for_dead_options_sees_reads_and_only_reads():
    tree = ast.parse("s.lr + run.s.rank + settings.clip + other.steps\ns.seed = 1\nf(lr=2)")
    assert set(attribute_reads(tree)) == {"lr", "rank", "clip", "s"} - {"s"}


def test_importing_and_parsing_needs_nothing_but_the_standard_library():
    code = (
        "import sys; before = set(sys.modules); import settings; settings.parse([]); "
        "new = {m.split('.')[0] for m in set(sys.modules) - before} - {'settings', 'presets'}; "
        "print(sorted(new - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


# ----------------------------------------------------------------------------------------------- the refusals
REFUSED = [
    # the command line itself
    ("--stepz 5", r"^unknown flag --stepz; did you mean --steps\?$"),
    ("--grop-size=4", r"^unknown flag --grop-size=4; did you mean --group-size\?$"),
    ("--lr 1e-3 --qqqqqq 1", r"^unknown flag --qqqqqq; see --help$"),
    ("--estim analytic", r"^unknown flag --estim; did you mean --estimator\?$"),  # no silent abbreviations
    ("stray", r"^unknown flag stray; see --help$"),
    ("--steps x", r"^--steps: invalid int value: 'x'$"),
    ("--steps 1.5", r"^--steps: invalid int value: '1\.5'$"),
    ("--steps", r"^--steps: expected one argument$"),
    ("--lr fast", r"^--lr: invalid float value: 'fast'$"),
    ("--resume=yes", r"^--resume/--no-resume: ignored explicit 'yes'$"),
    ("--overlap=1", r"^--overlap/--no-overlap: ignored explicit '1'$"),
    # values
    ("--stage train", r"^--stage train: choose from pretrain, curate, grpo, nft, sft, merge, opd, all$"),
    ("--preset big", r"^--preset big: choose from flow-opd, tiny, qwen-rl, tiny-qwen$"),
    ("--device gpu", r"^--device gpu: choose from auto, cuda, cpu$"),
    ("--precision float16", r"^--precision float16: choose from bfloat16, float32$"),
    ("--parallel zero", r"^--parallel zero: choose from ddp, fsdp, hsdp$"),
    ("--parameters some", r"^--parameters some: choose from lora, full$"),
    ("--task words", r"^--task words: choose from composition, text, quality, t2i, edit, mix$"),
    ("--estimator kl", r"^--estimator kl: choose from literal, released, analytic"),
    ("--combine product", r"^--combine product: choose from sum, normalised$"),
    ("--on-reward-failure zero", r"^--on-reward-failure zero: choose from stop, drop$"),
    ("--threshold -0.1", r"^--threshold -0\.1: must be at least 0\.0$"),
    ("--threshold nan", r"^--threshold nan: must be at least 0\.0$"),
    ("--lr nan", r"^--lr nan: must be at least 0\.0$"),
    ("--lr -1", r"^--lr -1\.0: must be at least 0\.0$"),
    ("--steps -1", r"^--steps -1: must be at least 0$"),
    ("--micro-batch -1", r"^--micro-batch -1: must be at least 0$"),
    ("--timeout 0", r"^--timeout 0\.0: must be at least 0\.1$"),
    ("--resolution 15", r"^--resolution 15: must be at least 16$"),
    ("--text-length 0", r"^--text-length 0: must be at least 1$"),
    ("--rank 0", r"^--rank 0: must be at least 1$"),
    ("--ema-decay 1.5", r"^--ema-decay 1\.5: must be at most 1\.0$"),
    ("--caption-dropout 1.01", r"^--caption-dropout 1\.01: must be at most 1\.0$"),
    ("--name a/b", r"^--name a/b: must be a plain folder name$"),
    ("--name ..", r"^--name \.\.: must be a plain folder name$"),
    ("--name .", r"^--name \.: must be a plain folder name$"),
    ("--compare v1.0=x", r"^--compare v1\.0=\.\.\.: give it a name of its own, without dots and slashes$"),
    ("--compare base=x", r"^--compare base=\.\.\.: give it a name of its own"),
    ("--compare a/b=x", r"^--compare a/b=\.\.\.: give it a name of its own"),
    # small languages
    ("--window 3", r"^--window 3: write it as START:STOP, e\.g\. 0:5$"),
    ("--window a:b", r"^--window a:b: write it as START:STOP"),
    ("--window 0:1:2", r"^--window 0:1:2: write it as START:STOP"),
    ("--window 4:2", r"^--window 4:2: needs 0 <= START <= STOP$"),
    ("--window=-1:3", r"^--window -1:3: needs 0 <= START <= STOP$"),
    ("--teachers text", r"^--teachers text: write it as TASK=PATH, TASK one of composition, text, quality, t2i, edit$"),
    ("--prompts text=a b.txt", r"^--prompts b\.txt: write it as TASK=PATH"),
    ("--teachers words=x", r"^task 'words': choose from composition, text, quality, t2i, edit$"),
    ("--prompts poem=x", r"^task 'poem': choose from composition, text, quality, t2i, edit$"),
    ("--tasks text,poem", r"^task 'poem': choose from composition, text, quality, t2i, edit$"),
    ("--tasks ,", r"^--tasks ,: name at least one of composition, text, quality, t2i, edit$"),
    ("--stage opd --prompts-per-step 2", r"^--prompts-per-step 2: 3 tasks need one prompt each$"),
    # combinations
    *(
        (f"--stage {stage} --group-size 1", r"^--group-size 1: a group of one has no advantage and no range; use at le")
        for stage in ("grpo", "curate")
    ),
    ("--stage curate --kernel cps --window 0:6", r"^--kernel cps has no noise in the last step: let --window stop at"),
    ("--stage curate --parallel fsdp", r"^--parallel fsdp shards full parameters: add --parameters full, or use ddp$"),
    ("--stage grpo --noise-level 0", r"^--stage grpo needs noise: widen --window and set --noise-level"),
    ("--stage grpo --window 2:2", r"^--stage grpo needs noise"),
    ("--stage grpo --window 6:9 --num-steps 6", r"^--stage grpo needs noise"),
    ("--noise-level 0", r"^--states sde needs noise"),
    ("--estimator path --window 0:0", r"^--states sde needs noise"),
    ("--kernel cps", r"^--stage opd knows the KL of the SDE kernel only \(F Eq\. 9\): use --kernel sde$"),
    (
        "--stage grpo --kernel cps --beta 0.1",
        r"^--beta is the SDE kernel's KL .* use --kernel sde or --beta 0",
    ),
    ("--estimator velocity --weight dt", r"^--estimator velocity is analytic with --weight uniform --states ode"),
    ("--estimator velocity --states sde", r"^--estimator velocity is analytic with --weight uniform --states ode"),
    ("--states ode", r"^--weight kl is infinite without noise"),
    ("--states ode --weight kl_dt", r"^--weight kl_dt is infinite without noise"),
    ("--states ode --weight dt --estimator sampled", r"^--estimator sampled needs the density of an SDE step"),
    ("--estimator released --weight uniform", r"^--estimator released rewards with the KL"),
    ("--stage grpo --prompts-per-step 7 --updates 2", r"^--updates 2 must divide --prompts-per-step 7$"),
    ("--teachers text=x", r"^task 'composition' has no teacher: give --teachers composition=PATH, or leave"),
    ("--stage sft --tasks text --teachers quality=x", r"^task 'text' has no teacher"),
    ("--stage grpo --kernel cps --window 0:6", r"^--kernel cps has no noise in the last step: let --window stop at 5$"),
    ("--stage nft --group-size 1", r"^--group-size 1: a group of one has no advantage and no range; use at"),
    ("--stage nft --prompts-per-step 7 --updates 2", r"^--updates 2 must divide --prompts-per-step 7$"),
    ("--stage nft --interpolation 0", r"^--interpolation 0\.0: must be at least 1e-06$"),
    ("--mix shares", r"^--mix shares: choose from turns, joint$"),
    ("--guidance half", r"^--guidance half: choose from both, rollout, teacher, neither$"),
    ("--source-resolution -1", r"^--source-resolution -1: must be at least 0$"),
    *(
        (f"--stage {stage} --guidance teacher", rf"^--guidance teacher: --stage {stage} knows both, rollout, neither$")
        for stage in ("grpo", "nft", "curate")
    ),
    ("--guidance rollout", r"^--guidance rollout: --stage opd knows both, teacher, neither$"),
    *(
        (f"{QWEN} --stage {stage} --task mix --prompts-per-step 1", r"^--prompts-per-step 1: 2 tasks need one prompt e")
        for stage in ("grpo", "nft")
    ),
    (f"{QWEN} --prompts-per-step 1", r"^--prompts-per-step 1: 2 tasks need one prompt each$"),
    (f"{QWEN} --teachers t2i=x", r"^task 'edit' has no teacher: give --teachers edit=PATH, or leave it out"),
    (f"{QWEN} --stage pretrain", r"^--stage pretrain makes the tiny world's base: add --preset tiny"),
    (f"{QWEN} --stage opd --estimator analytic --window 0:0", r"^--states sde needs noise"),
    (f"{QWEN} --stage grpo --window 3:3", r"^--stage grpo needs noise"),
    (f"{QWEN} --stage all --guidance rollout", r"^--guidance rollout: --stage opd knows both, teacher, neither$"),
    ("--stage grpo --kernel cps --noise-level 1.5", r"^--noise-level 1\.5: must be at most 1 with --kernel cps$"),
    ("--parallel fsdp", r"^--parallel fsdp shards full parameters: add --parameters full, or use ddp$"),
    ("--stage merge --parameters full", r"^--stage merge merges LoRA teachers: use --parameters lora$"),
    (
        "--stage pretrain --parameters full --parallel fsdp",
        r"^--stage pretrain knows --parallel ddp only: nothing there is too large for a rank$",
    ),
    # Stable Diffusion 3.5
    (f"{FLOW} --resolution 520", r"^--resolution 520: must be a multiple of 16 \(VAE 8 x patch 2\)$"),
    (f"{FLOW} --stage pretrain", r"^--stage pretrain makes the tiny world's base: add --preset tiny$"),
    (f"{FLOW} --parallel hsdp", r"^--parallel hsdp shards full parameters: add --parameters full, or use ddp$"),
    (f"{FLOW} --stage merge --parameters full", r"^--stage merge merges LoRA teachers: use --parameters lora$"),
    (f"{FLOW} --stage grpo --updates 4", r"^--updates 4 must divide --prompts-per-step 6$"),
    (f"{FLOW} --stage grpo --kernel cps", r"^--beta is the SDE kernel's KL"),
    (f"{FLOW} --window 9:9", r"^--states sde needs noise"),
    # what a later part of --stage all would refuse
    ("--stage all --group-size 1", r"^--group-size 1: a group of one"),
    ("--stage all --kernel cps", r"^--stage opd knows the KL of the SDE kernel only"),
    ("--stage all --parallel fsdp --parameters full", r"^--stage pretrain knows --parallel ddp only"),
    (f"{FLOW} --stage all --parameters full", r"^--stage merge merges LoRA teachers"),
    (f"{FLOW} --stage all --teachers text=x", r"^task 'composition' has no teacher"),
    (f"{FLOW} --stage all --prompts-per-step 2", r"^--prompts-per-step 2: 3 tasks need one prompt each$"),
]


@pytest.mark.parametrize(("line", "message"), REFUSED, ids=[line for line, _ in REFUSED])
def test_what_cannot_work_is_refused_in_one_line(line, message):
    assert re.search(message, refusal(line))


CONFIGS = [
    ({"lrr": 1.0}, r"no setting 'lrr'; did you mean 'lr'\?$"),
    ({"qqqqqq": 1.0}, r"no setting 'qqqqqq'$"),
    ({"group-size": 4}, r"no setting 'group-size'; did you mean 'group_size'\?$"),
    ({"lr": "fast"}, r"lr must be a float, not 'fast'$"),
    ({"lr": True}, r"lr must be a float, not True$"),
    ({"steps": 1.5}, r"steps must be a int, not 1\.5$"),
    ({"steps": True}, r"steps must be a int, not True$"),
    ({"resume": 1}, r"resume must be a bool, not 1$"),
    ({"teachers": ["text=x"]}, r"teachers must be a dict, not \['text=x'\]$"),
    ({"teachers": {"text": 3}}, r"teachers must map names to paths, not \{'text': 3\}$"),
    ({"name": None}, r"name must be a str, not None$"),
    ([1], r"must be one JSON object of settings$"),
    ('{"lr": 1', r"not JSON \(.*column"),
]


@pytest.mark.parametrize(("values", "message"), CONFIGS, ids=[str(values) for values, _ in CONFIGS])
def test_a_config_that_cannot_work_is_refused_by_file(tmp_path, values, message):
    arguments = config(tmp_path, values)
    assert re.search(f"^--config {re.escape(arguments[1])}: .*{message}", refusal(arguments))


def test_a_config_is_checked_like_flags_and_must_exist(tmp_path):
    assert refusal(config(tmp_path, '{"lr": NaN}')) == "--lr nan: must be at least 0.0"
    assert refusal(config(tmp_path, {"stage": "merge", "teachers": {}})) == (
        "--stage merge needs --teachers TASK=PATH, at least one"
    )
    missing = str(tmp_path / "no.json")
    assert refusal(["--config", missing]) == f"--config {missing}: No such file or directory"
    assert refusal(["--config", str(tmp_path)]) == f"--config {tmp_path}: Is a directory"
    (tmp_path / "bad.json").write_bytes(b'{"name": "\xff"}')
    assert "not JSON" in refusal(["--config", str(tmp_path / "bad.json")])


def test_a_config_may_write_a_whole_float_as_an_integer(tmp_path):
    s = parse(config(tmp_path, {"lr": 1, "resume": False, "teachers": {t: "x" for t in S.TASKS}}))
    assert (s.lr, type(s.lr), s.resume, s.teachers["text"]) == (1.0, float, False, "x")


def test_a_resolved_configuration_is_a_config_that_gives_itself(tmp_path):
    s = parse("--stage grpo --task text --lr 0.25 --prompts text=a.txt --no-resume")
    assert replace(parse(config(tmp_path, asdict(s))), config="") == s


@pytest.mark.parametrize(
    "line",
    [
        "--estimator velocity --noise-level 0 --window 2:2",  # the ODE needs no noise
        "--states ode --weight ode --noise-level 0",  # DiffusionOPD
        "--weight dt",  # Q Eq. 18's weight on F's states
        "--estimator path --weight kl_dt",
        "--tasks text --teachers text=x",
        "--stage grpo --kernel cps",
        "--stage grpo --group-size 2",
        "--group-size 1",  # only GRPO compares within a group
        "--stage pretrain --window 0:0",
        "--stage grpo --prompts-per-step 8 --updates 2",
        "--prompts-per-step 7 --updates 2",  # only GRPO shares a rollout among updates
        "--steps 0",
        "--ema-decay 1",
        "--rewards anything=1",  # what it means is for recipe.py to say
        "--stage curate --noise-level 0 --window 0:0",  # noise alone makes the samples of a prompt differ
        "--stage curate --kernel cps --prompts-per-step 7 --updates 2",
        "--stage curate --teachers text=x",
        "--stage curate --threshold 0 --overlap --combine normalised --on-reward-failure drop",
        "--resolution 24",  # the tiny world's pictures have 24 pixels
        "--stage grpo --kernel cps --noise-level 1",
        "--prompts auto=mine.jsonl text=signs.txt",
        "--stage all",
        "--stage all --tasks text",
        "--parameters full --parallel hsdp",
        FLOW,
        f"{FLOW} --stage all",
        f"{FLOW} --stage all --group-size 1",  # there is no GRPO among its parts
        f"{FLOW} --stage merge",
        f"{FLOW} --stage sft --parameters full --parallel fsdp",
        f"{FLOW} --resolution 1024",
        f"{FLOW} --stage grpo",
        f"{FLOW} --stage curate",
        f"{FLOW} --stage grpo --kernel cps --beta 0",
        "--stage nft --noise-level 0 --window 0:0",  # the forward process needs no noisy sampler
        "--stage nft --kernel cps --beta 1",  # and its distance to the base is no KL
        "--stage pretrain --guidance rollout",  # guides nothing
        "--stage sft --guidance rollout",
        "--preset tiny-qwen --stage grpo --task mix --mix turns --prompts-per-step 1",
        "--preset tiny-qwen --stage all",
        QWEN,
        f"{QWEN} --stage all",
        f"{QWEN} --stage nft --task edit",
        f"{QWEN} --stage grpo --task mix --prompts-per-step 2",
        f"{QWEN} --tasks t2i --teachers t2i=x --prompts-per-step 1",
    ],
)
def test_what_can_work_is_let_through(line):
    parse(line)


# ---------------------------------------------------------------------------------------- the small languages
def test_the_window_is_cut_at_the_number_of_steps():
    assert S.window_of(parse("--window 1:4 --num-steps 6")) == (1, 4)
    assert S.window_of(parse("--window 1:9 --num-steps 6")) == (1, 6)


def test_tasks_are_a_comma_separated_list():
    assert S.task_list(parse("")) == ["composition", "text", "quality"] == list(S.FLOW_TASKS)
    assert S.task_list(parse("--tasks quality,,text")) == ["quality", "text"]


# ------------------------------------------------------------------------------------ whose guidance, which tasks
SCALES = [  # guidance, stage -> (the student's pictures, the teachers', the objective)
    ("both", "grpo", (3.0, 3.0, 3.0)),
    ("rollout", "grpo", (3.0, 3.0, 1.0)),
    ("neither", "grpo", (1.0, 1.0, 1.0)),
    ("rollout", "nft", (3.0, 3.0, 1.0)),
    ("both", "opd", (3.0, 3.0, 3.0)),
    ("teacher", "opd", (1.0, 3.0, 1.0)),
    ("neither", "opd", (1.0, 1.0, 1.0)),
]


@pytest.mark.parametrize(("guidance", "stage", "scales"), SCALES)
def test_each_strategy_guides_whom_it_names(guidance, stage, scales):
    for cfg in (3.0, 1.0):
        s = parse(f"--stage {stage} --guidance {guidance} --cfg {cfg}")
        expected = scales if cfg == 3.0 else (1.0, 1.0, 1.0)
        assert (S.student_cfg(s), S.teacher_cfg(s), S.trained_cfg(s)) == expected


def test_the_qwen_presets_are_qs_methods():
    """Q 4.1-4.3, read from the paper: a 40-step sampler, hybrid guidance, mostly noisy steps, normalised rewards; then
    velocities of guided teachers into a student without guidance. The tiny preset has the same methods."""
    for preset in ("qwen-rl", "tiny-qwen"):
        for stage in ("grpo", "nft"):
            s = parse(f"--preset {preset} --stage {stage}")
            found = (s.guidance, s.combine, s.mix, s.train_steps, s.updates, S.task_list(s))
            assert found == ("rollout", "normalised", "joint", "random", 1, ["t2i", "edit"])
            assert S.window_of(s)[1] < s.num_steps and s.cfg > 1 and s.train_count < s.num_steps
        s = parse(f"--preset {preset}")
        assert (s.guidance, s.estimator, s.mar, s.train_steps) == ("teacher", "velocity", 0.0, "all")
        assert set(s.teachers) == {"t2i", "edit"} and s.cfg > 1
    assert s.preset == "tiny-qwen" and parse("--preset qwen-rl --stage grpo").num_steps == 40
    assert parse("--preset qwen-rl").model.startswith("Qwen/Qwen-Image-Edit") and parse("--preset qwen-rl").cfg_rescale


def test_only_edits_that_have_pictures_are_evaluated():
    assert S.test_tasks(parse(QWEN)) == ["t2i"]
    for prompts in ("edit=e.jsonl", "auto=a.jsonl"):
        assert S.test_tasks(parse(f"{QWEN} --prompts {prompts}")) == ["t2i", "edit"]
    assert S.test_tasks(parse(f"{QWEN} --prompts t2i=a.txt")) == ["t2i"]
    assert S.test_tasks(parse(f"{QWEN} --tasks edit --prompts edit=e.jsonl")) == ["edit"]
    assert S.test_tasks(parse("--preset tiny-qwen")) == ["t2i", "edit"], "the tiny world draws its own"
    assert S.test_tasks(parse("")) == ["composition", "text", "quality"]


def test_a_plans_parts_follow_the_paper_of_its_tasks():
    assert S.parts_of(parse("--stage all")) == ("pretrain", "grpo", "merge", "sft", "opd")
    assert S.parts_of(parse(f"{FLOW} --stage all")) == ("merge", "sft", "opd")
    assert S.parts_of(parse("--preset tiny-qwen --stage all")) == ("pretrain", "grpo", "opd")
    assert S.parts_of(parse(f"{QWEN} --stage all")) == ("grpo", "opd")
    assert S.parts_of(parse(f"{QWEN} --stage all --tasks t2i --teachers t2i=x")) == ("grpo", "opd")
