"""Oracles for the settings: where each value comes from, who reads it, and which mistakes are refused in one line."""

import json
import math
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

import settings as S
from harness import cli

ROOT = Path(__file__).resolve().parents[2]
FLOW, QWEN = "--preset flow-opd", "--preset qwen-rl"
SIZES = ["512x520", "0x512", "8", "512x8192", "x", "512x", "512x512x3", "1e3", "-512", "\u0665\u0661\u0662"]


def parse(line="", **more):
    """A command line in the tiny world, which runs every stage, unless it names a preset itself."""
    words = line.split() if isinstance(line, str) else list(line)
    return cli.parse(words if "--preset" in words else ["--preset", "tiny", *words], **more)[0]


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
    monkeypatch.setattr(cli, "PRESETS", {"tiny": preset, "flow-opd": {"": {}, "opd": {"lr": 0.25}}})
    file = config(tmp_path, {"rank": 33, "alpha": 3.5, "stage": "grpo"})
    s = parse([*file, "--alpha", "4.5"])
    assert (s.grad_norm, s.warmup, s.lr, s.rank, s.alpha) == (S.Settings.grad_norm, 9, 0.2, 33, 4.5)
    assert parse("--stage sft").lr == 0.125, "a stage without an entry has the preset's own values"
    s, _ = cli.parse([])
    assert (s.preset, s.stage, s.lr, s.seed, s.name) == ("flow-opd", "opd", 0.25, 0, "flow-opd-opd")
    s, given = cli.parse([*config(tmp_path, {"preset": "tiny", "lr": 1}), "--rank", "8"])
    assert (s.preset, s.lr, s.rank, s.seed) == ("tiny", 1.0, 8, 4), "a config may choose the preset, too"
    assert {k: given[k] for k in given if k != "config"} == {"preset": "tiny", "lr": 1.0, "rank": 8}


def test_every_preset_resolves_for_every_stage_and_sets_what_the_stage_reads():
    assert set(S.PRESETS) == set(S.FIELDS["preset"].metadata["choices"])
    for preset, stages in S.PRESETS.items():
        for stage in S.READERS:
            if (stage == "pretrain" and preset not in S.ASSETS) or stage == "reward":
                continue
            s = cli.resolve({"preset": preset, "stage": stage})
            for name, value in {**stages[""], **stages.get(stage, {})}.items():
                assert getattr(s, name) == value and type(getattr(s, name)) is S.FIELDS[name].type, (stage, name)
            for name in stages.get(stage, {}):
                assert stage in S.FIELDS[name].metadata["stages"], (preset, stage, name)


def test_the_defaults_are_those_of_flow_opd_appendix_a():
    """Worked from F App. A and the Flow-GRPO line it builds on, for eight ranks; nothing here is read from a preset."""
    expected = {
        "resolution": "512", "num_steps": 10, "eval_steps": 40, "cfg": 4.5, "noise_level": 0.7, "group_size": 24,
        "kernel": "sde", "advantage_std": "group", "advantage_clip": 5.0, "clip": 1e-4, "log_prob": "mean",
        "lr": 3e-4, "weight_decay": 1e-4, "grad_norm": 1.0, "ema_decay": 0.9, "ema_every": 8, "warmup": 0,
        "mar": 0.02, "beta": 0.04, "updates": 2, "rank": 32, "alpha": 64.0, "parameters": "lora",
        "precision": "bfloat16", "train_steps": "all", "estimator": "analytic", "weight": "kl", "states": "sde",
        "model": "stabilityai/stable-diffusion-3.5-medium", "tasks": "composition,text,quality",
        "rewards": "", "combine": "sum", "overlap": False, "on_reward_failure": "stop",
    }  # fmt: skip
    grpo, opd = cli.parse(["--stage", "grpo"])[0], cli.parse([])[0]
    assert {name: getattr(grpo, name) for name in expected} == expected
    assert {name: getattr(opd, name) for name in expected} == expected | {"lr": 1e-4, "updates": 1}
    assert S.window_of(grpo) == S.window_of(opd) == (0, 9), "the last of ten steps is not trained"
    assert 8 * grpo.prompts_per_step == 48 and 8 * grpo.prompts_per_step // grpo.updates == 24, "groups: epoch, update"
    assert 8 * opd.prompts_per_step == 24, "an OPD step is one such update"
    assert opd.teachers == {
        "composition": "jieliu/SD3.5M-FlowGRPO-GenEval",
        "text": "jieliu/SD3.5M-FlowGRPO-Text",
        "quality": "jieliu/SD3.5M-FlowGRPO-PickScore",
    }, "F App. A: Flow-GRPO's official checkpoints"
    assert opd.anchor == "CostaliyA/SD3.5M-FlowGRPO-Deqa-Mix", "F 6.1: the DeQA teacher belongs to no task"
    assert not any("tiny" in str(value) for value in asdict(opd).values())


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
        assert (s.guidance, s.estimator, s.weight, s.states, s.mar) == ("teacher", "velocity", "uniform", "ode", 0.0)
        assert set(s.teachers) == {"t2i", "edit"} and s.cfg > 1
        table = parse(f"--preset {preset}", prog="eval.py")
        assert (S.student_cfg(table), S.teacher_cfg(table)) == (1.0, s.cfg), "the table draws as the student learnt"
    assert parse("--preset qwen-rl --stage grpo").num_steps == 40 and not parse(QWEN).cfg_rescale
    assert parse(QWEN).model == "Qwen/Qwen-Image-2.1"


def test_a_run_without_a_name_is_named_after_preset_stage_and_task():
    assert parse().name == "tiny-opd" and parse(f"{FLOW} --stage sft").name == "flow-opd-sft"
    assert parse("--stage grpo").name == "tiny-grpo" and parse("--stage nft --task text").name == "tiny-nft-text"
    assert parse("--name mine").name == "mine"
    assert parse(prog="eval.py").name == "eval" and parse("--name mine", prog="eval.py").name == "mine"


def test_a_stage_of_a_plan_takes_what_was_given_and_the_plans_own_word():
    _, given = cli.parse("--preset tiny --stage all --name plan --lr 0.5 --seed 7 --merge-method ties".split())
    s = cli.for_stage(given, "grpo", task="text", model="base", name="plan-grpo-text")
    assert (s.stage, s.task, s.model, s.lr, s.seed, s.name) == ("grpo", "text", "base", 0.5, 7, "plan-grpo-text")
    assert s.merge_method == S.Settings.merge_method, "that is for another part"
    assert s.steps == S.PRESETS["tiny"]["grpo"]["steps"], "the stage's own preset"
    s = cli.for_stage(given, "merge", seed=8)
    assert (s.merge_method, s.seed, s.name) == ("ties", 8, "tiny-merge")


# ------------------------------------------------------------------------------------------- every field a flag
def test_the_help_shows_the_flags_of_a_stage_with_the_values_it_would_have(capsys):
    def shown(line, prog="train.py"):
        with pytest.raises(SystemExit) as stop:
            cli.parse([*line.split(), "--help"], prog)
        assert stop.value.code == 0
        return " ".join(capsys.readouterr().out.split())

    opd, grpo, table = shown(""), shown("--preset tiny --stage grpo"), shown("--preset tiny-qwen", "eval.py")
    for text, s in ((opd, parse(FLOW)), (grpo, parse("--stage grpo"))):
        found, flags = set(re.findall(r" (--[a-z-]+)", text)), {n: "--" + n.replace("_", "-") for n in S.FIELDS}
        assert {flags[name] for name in S.read_by(s)} <= found, "also those that another flag would give a meaning to:"
        assert "--clip" in found and "clip" not in S.read_by(parse(FLOW))
        others = {flags[n] for n, f in S.FIELDS.items() if s.stage not in f.metadata["stages"]} - {"--weight"}
        assert not found & others and ("--precision" in found) == (s.preset == "flow-opd")
    assert "[0.0001]" in opd and "composition=jieliu/SD3.5M-FlowGRPO-GenEval" in opd and "[0.0007]" in grpo
    assert "--compare" in table and "--stage" not in table and "--lr" not in table
    whole = shown("--preset tiny --stage all")
    assert "[pretrain 6000, grpo 150, sft 100, opd 200]" in whole and "LoRA rank r of a new adapter [16]" in whole
    for group in ("what to run:", "where it runs:", "rollout:", "objective:"):
        assert group in opd


def test_every_number_has_finite_bounds_that_its_default_keeps_and_what_lies_beyond_is_refused():
    for name, f in S.FIELDS.items():
        if f.type in (int, float):
            low, high = f.metadata["low"], f.metadata["high"]
            assert -math.inf < low <= f.default <= high < math.inf, name
            beyond = (low - 1, 10 * high, 10**400) if f.type is int else (low - 1e-9, 10 * high, math.inf, math.nan)
            for value in beyond:  # before anything else is asked of it
                with pytest.raises(S.SettingsError, match=f"^--{name.replace('_', '-')} .* from {low} to {high}"):
                    cli.resolve({"preset": "tiny", "stage": "opd", name: value})
            assert type(f.default) is f.type, name
        assert f.type is not str or f.default in f.metadata.get("choices", (f.default,)), name


def test_help_and_a_wrong_flag_need_nothing_but_the_standard_library():
    code = (
        "import sys; before = set(sys.modules); from harness import cli; import settings; cli.parse([]); "
        "new = {m.split('.')[0] for m in set(sys.modules) - before} - {'settings', 'harness', 'data'}; "
        "print(sorted(new - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


# ------------------------------------------------------------------------------------------- who reads what, observed
READS = {  # for each stage runs whose conditions, together, reach every line that reads a setting
    "pretrain": [""], "merge": [""], "sft": ["", "--parameters full"], "curate": ["", "--init TEACHER"],
    "grpo": ["--task mix", "--task text --parameters full --beta 0.1"],
    "nft": ["--task mix", "--task text --parameters full"], "opd": ["--mar 0.1", "--parameters full"], "reward": [""],
    "eval": [""],
}  # fmt: skip
NAMES = {"preset", "stage", "name", "task", "config", "dry_run"}  # they say which run it is, and seed its noise
UNUSED = {"merge": {"keep"}, "curate": {"rank", "alpha"}}  # one checkpoint; a LoRA that does not train is zero


@pytest.mark.parametrize("stage", READS)
def test_a_stage_reads_nothing_that_its_settings_do_not_say(stage, go, world, tmp_path, monkeypatch):
    import eval as evaluation
    import train
    from tests.helpers.runs import command

    found, resolve = set(), cli.resolve

    class Recorder(S.Settings):
        def __getattribute__(self, name):
            caller = sys._getframe(1)
            asking = caller.f_code.co_qualname.startswith(("read_by", "unread"))
            copied = asking or caller.f_globals["__name__"] == "dataclasses"
            if name in S.FIELDS and not copied:
                found.add(name)
            return super().__getattribute__(name)

    def started(work):
        return lambda *given: (before.update(found), found.clear(), work(*given))[-1]

    before, read = set(), set()
    monkeypatch.setattr(cli, "resolve", lambda given: Recorder(**asdict(resolve(given))))
    monkeypatch.setattr(train, "run_stage", started(train.run_stage))  # what is read before is for the command line
    monkeypatch.setattr(evaluation, "compare", started(evaluation.compare))
    for number, more in enumerate(READS[stage]):
        more = more.replace("TEACHER", str(world.teachers["text"])).split()
        if stage == "eval":
            argv = command(world.flags, "--out", str(tmp_path), *more, stage="eval")
            assert evaluation.main([*argv, "--compare", f"one={world.teachers['text']}"]) == 0
        elif stage in ("curate", "reward"):
            go(f"run{number}", "--stage", stage, *more)
        else:
            go(f"run{number}", "--stage", stage, "--eval-prompts", "2", *more)
        read |= found
    said = {name for name, f in S.FIELDS.items() if stage in f.metadata["stages"]}
    assert read - said - NAMES - UNUSED.get(stage, set()) == set(), "what is said acts: tests/pipeline/test_flags.py"


# ----------------------------------------------------------------------------------------------- the refusals
REFUSED = [  # the flag or word that the message names first, then a command line
    # the command line itself, and values
    ("--stepz", "--stepz 5"), ("--estim", "--estim analytic"), ("stray", "stray"), ("--steps", "--steps 1.5"),
    ("--steps", "--steps"), ("--resume", "--resume=yes"), ("--teachers", "--teachers text"),
    ("--stage", "--stage train"), ("--stage", "--stage eval"), ("--preset", "--preset big"),
    ("--device", "--device gpu"), ("--steps", "--steps 1e9"), ("--anchor", "--tasks text --teachers text=x"),
    ("--name", ["--name", "a\nb"]), ("--name", ["--name", "x" * 300]), ("--out", ["--out", "y" * 300 + "/z"]),
    ("--name", "--name a/b"), ("--name", "--name .."), ("--resolution", f"{FLOW} --resolution 520"),
    *(("--resolution", f"{FLOW} --resolution {size}") for size in SIZES),
    ("--source-resolution", "--preset qwen-rl --source-resolution 16"),
    ("--window", "--window 3"), ("--window", "--window a:b"), ("--window", "--window 4:2"),
    ("--window", "--window=-1:3"), ("task 'words'", "--teachers words=x"), ("task 'poem'", "--prompts poem=x"),
    ("task 'poem'", "--tasks text,poem"), ("task ','", "--tasks ,"), ("task 't2i'", "--tasks t2i"),
    ("task 'edit'", "--stage grpo --task edit"), ("task 'text'", "--preset tiny-qwen --stage nft --task text"),
    # what would be trained on nothing, or never
    ("--prompts-per-step", "--stage opd --prompts-per-step 2"),
    ("--prompts-per-step", f"{QWEN} --stage nft --task mix --prompts-per-step 1"),
    *(("--group-size", f"--stage {stage} --group-size 1") for stage in ("grpo", "nft", "curate")),
    *(("--updates", f"--stage {stage} --prompts-per-step 7 --updates 2") for stage in ("grpo", "nft", "opd")),
    *((f"--stage {line.split()[1]}", line) for line in (
        "--stage grpo --noise-level 0", "--stage grpo --window 2:2", "--stage grpo --window 6:9 --num-steps 6",
        "--stage opd --noise-level 0", "--stage opd --estimator path --window 0:0")),
    ("task 'composition'", "--teachers text=x"), ("task 'text'", "--stage sft --tasks text --teachers quality=x"),
    ("--stage pretrain", f"{QWEN} --stage pretrain"),
    ("--stage reward", f"{FLOW} --stage reward"),
    ("--objective", "--stage reward --objective pairwise --batch-size 5"),
    # what no equation covers
    ("--kernel", "--stage curate --kernel cps --window 0:6"), ("--kernel", "--stage grpo --kernel cps --window 0:6"),
    ("--kernel", "--stage grpo --kernel cps --noise-level 1.5"), ("--guard", "--stage grpo --guard --kernel cps"),
    ("--stage opd", "--noise-level 1e-9"), ("--tasks", "--tasks text,composition,text"), ("--alpha", "--alpha 0"),
    ("--grad-norm", "--grad-norm 0"), ("--advantage-clip", "--stage grpo --advantage-clip 0"),
    *(("--estimator velocity", f"--estimator velocity {more}") for more in ("--weight dt", "--states sde")),
    *(("--weight", f"--states ode --weight {weight}") for weight in ("kl", "kl_dt")),
    ("--estimator sampled", "--states ode --weight dt --estimator sampled"),
    ("--clip", "--estimator sampled --clip 0.1"),
    ("--clip", "--updates 2 --clip 0.1"), ("--log-prob", "--estimator path --log-prob sum"),
    ("--log-prob", "--updates 2 --log-prob sum"), ("--advantage-clip", "--updates 2 --advantage-clip 1"),
    *((f"--estimator {path}", f"--estimator {path} --window 1:5") for path in ("path", "sampled_path")),
    ("--drawn-states", "--estimator path --drawn-states 1"), ("--train-steps", "--stage opd --train-steps first"),
    *(("--guidance", f"--preset tiny-qwen --stage {stage} --guidance {value}") for stage, value in (
        ("grpo", "teacher"), ("nft", "teacher"), ("opd", "rollout"), ("sft", "rollout"), ("curate", "rollout"),
        ("pretrain", "teacher"), ("merge", "rollout"))),
    ("--parallel", "--parallel fsdp"),
    # what a later part of --stage all would refuse
    ("--group-size", "--stage all --group-size 1"), ("--stage all", "--stage all --parameters full"),
    ("task 'composition'", f"{FLOW} --stage all --teachers text=x"),
    ("--guidance", f"{QWEN} --stage all --guidance rollout"),
]  # fmt: skip


@pytest.mark.parametrize(("named", "line"), REFUSED, ids=[str(line)[:60] for _, line in REFUSED])
def test_what_cannot_work_is_refused_in_one_line_that_names_it(named, line):
    assert refusal(line).removeprefix("unknown flag ").startswith(named)


@pytest.mark.parametrize("name", ["v1.0", "base", "teacher text", "a/b", ""])
def test_a_student_to_compare_has_a_name_that_is_a_file_and_a_row(name):
    assert refusal(["--compare", f"{name}=x"], prog="eval.py").startswith(f"--compare {name}=")
    assert refusal("--stage opd", prog="eval.py").startswith("--stage opd")


CONFIGS = [
    ({"group-size": 4}, "group_size"), ({"lr": "fast"}, "lr"), ({"lr": True}, "lr"), ({"steps": 1.5}, "steps"),
    ({"steps": True}, "steps"), ({"resume": 1}, "resume"), ({"teachers": ["text=x"]}, "teachers"),
    ({"teachers": {"text": 3}}, "teachers"), ({"name": None}, "name"), ([1], "object"), ('{"lr": 1', "JSON"),
    ('{"a":' * 100_000, "JSON"), ('{"lr": NaN}', "NaN"), ('{"lr": 1e999}', "1e999"),
    ('{"lr": 1' + "0" * 999 + "}", "lr"),
    ('{"steps": 1' + "0" * 5000 + "}", "JSON"), ('{"name": 3}', "name"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "named"), CONFIGS, ids=[str(values)[:30] for values, _ in CONFIGS])
def test_a_config_that_cannot_work_is_refused_by_file(tmp_path, values, named):
    arguments = config(tmp_path, values)
    message = refusal(arguments)
    assert message.startswith(f"--config {arguments[1]}:") and named in message


def test_a_config_is_checked_like_flags_and_must_be_there(tmp_path):
    assert cli.parse(config(tmp_path, '\ufeff{"lr": 3e-4}'))[0].lr == 3e-4, "a byte-order mark"
    for path in (tmp_path / "no.json", tmp_path):
        assert refusal(["--config", str(path)]).startswith(f"--config {path}:0: ")
    s = parse(config(tmp_path, {"lr": 1, "resume": False, "teachers": {t: "x" for t in S.FLOW_TASKS}}))
    assert (s.lr, type(s.lr), s.resume, s.teachers["text"]) == (1.0, float, False, "x")


def test_a_size_is_one_side_or_two_and_a_number_in_a_config(tmp_path):
    for given, size in (("768", (768, 768)), ("768x512", (768, 512)), ("16x4096", (16, 4096))):
        assert S.size_of(parse(f"{FLOW} --resolution {given}".split())) == size
    assert S.size_of(parse([*FLOW.split(), *config(tmp_path, {"resolution": 640})])) == (640, 640)


def test_what_a_stage_reads_is_a_config_that_gives_the_same_settings(tmp_path):
    for line in ("--stage grpo --task text --lr 0.25 --prompts text=a.txt --no-resume", QWEN):
        s = parse(line)
        again = parse(["--preset", s.preset, *config(tmp_path, S.read_by(s) | {"config": ""})])
        assert S.read_by(again) | {"config": ""} == S.read_by(s)


ALLOWED = [  # each is next to one that is refused
    "--states ode --weight ode",  # DiffusionOPD
    "--weight dt", "--estimator path --weight dt",  # Q Eq. 18's weight on F's states
    "--estimator sampled --window 1:5 --drawn-states 2", "--drawn-states 9",
    "--estimator released --log-prob sum --advantage-clip 1",
    "--estimator path --updates 2 --clip 0.1 --log-prob sum", "--updates 2",
    "--group-size 1",  # only GRPO, NFT and curation compare within a group
    "--stage curate --noise-level 0",  # the first noise alone makes the samples of a prompt differ
    "--stage grpo --kernel cps --noise-level 1", "--stage grpo --prompts-per-step 8 --updates 2",
    f"{FLOW} --stage grpo --kernel cps --beta 0", "--stage nft --beta 1", "--steps 0",
    "--tasks text --teachers text=x --anchor text", f"{QWEN} --tasks t2i --teachers t2i=x --prompts-per-step 1",
    "--preset tiny-qwen --stage grpo --task mix --mix turns --prompts-per-step 1",
    "--prompts auto=mine.jsonl text=signs.txt", f"{FLOW} --stage sft --parameters full --parallel fsdp",
    "--stage all --tasks text", f"{FLOW} --stage all", "--preset tiny-qwen --stage all", f"{QWEN} --stage all",
]  # fmt: skip


@pytest.mark.parametrize("line", ALLOWED)
def test_what_can_work_is_let_through(line):
    parse(line)


# ------------------------------------------------------------------------------------------- what follows from them
def test_the_window_is_cut_at_the_number_of_steps():
    assert S.window_of(parse("--window 1:4 --num-steps 6")) == (1, 4)
    assert S.window_of(parse("--window 1:9 --num-steps 6")) == (1, 6)


SCALES = [  # guidance, stage -> (the student's pictures, the teachers', the objective)
    ("both", "grpo", (3.0, 3.0, 3.0)), ("rollout", "grpo", (3.0, 3.0, 1.0)), ("neither", "grpo", (1.0, 1.0, 1.0)),
    ("rollout", "nft", (3.0, 3.0, 1.0)), ("both", "opd", (3.0, 3.0, 3.0)), ("teacher", "opd", (1.0, 3.0, 1.0)),
    ("neither", "opd", (1.0, 1.0, 1.0)),
]  # fmt: skip


@pytest.mark.parametrize(("guidance", "stage", "scales"), SCALES)
def test_each_strategy_guides_whom_it_names(guidance, stage, scales):
    for cfg in (3.0, 1.0):
        s = cli.resolve({"preset": "tiny", "stage": stage, "guidance": guidance, "cfg": cfg})
        expected = scales if cfg == 3.0 else (1.0, 1.0, 1.0)
        assert (S.student_cfg(s), S.teacher_cfg(s), S.trained_cfg(s)) == expected


def test_only_edits_that_have_pictures_are_evaluated():
    assert S.test_tasks(parse(QWEN)) == S.test_tasks(parse(f"{QWEN} --prompts t2i=a.txt")) == ["t2i"]
    for prompts in ("edit=e.jsonl", "auto=a.jsonl"):
        assert S.test_tasks(parse(f"{QWEN} --prompts {prompts}")) == ["t2i", "edit"]
    assert S.test_tasks(parse("--preset tiny-qwen")) == ["t2i", "edit"], "the tiny world draws its own"
    assert S.task_list(parse("--tasks quality,,text")) == ["quality", "text"]


def test_a_plans_parts_follow_the_paper_of_its_tasks():
    assert S.parts_of(parse("--stage all")) == ("pretrain", "grpo", "merge", "sft", "opd")
    assert S.parts_of(parse(f"{FLOW} --stage all")) == ("merge", "sft", "opd")
    assert S.parts_of(parse("--preset tiny-qwen --stage all")) == ("pretrain", "grpo", "opd")
    assert S.parts_of(parse(f"{QWEN} --stage all --tasks t2i")) == ("grpo", "opd")


def test_a_comparison_that_names_the_base_is_the_whole_list():
    flags = f"{FLOW} --compare base teacher.text=T student=S"
    s = parse(flags, prog="eval.py")
    assert (s.teachers, s.compare) == ({"text": "T"}, {"student": "S"})
    s = parse(f"{FLOW} --compare student=S", prog="eval.py")
    assert len(s.teachers) == 3 and s.compare == {"student": "S"}, "without it base and teachers are joined"
