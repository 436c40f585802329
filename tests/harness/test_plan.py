"""Oracles for --dry-run: counts by hand and by real runs, what is missing, and that it only looks."""

import json
import time

import huggingface_hub
import pytest

import settings
import train
from harness import cli, counting, plan, ranks
from harness.counting import forwards
from models import hub


def parse(line, prog="train.py"):
    return cli.parse(line.split() if isinstance(line, str) else line, prog)[0]


def counted(s):
    """{(who, with gradient?): (forwards, rows)} of a step."""
    found = forwards(s, train.LOOPS.get(s.stage))
    return {(who, gradient): tuple(count[:2]) for (moment, who, gradient), count in found.items() if moment == "step"}


# ------------------------------------------------------------------------------------------------------- forwards
STEPS = [  # by hand: F App. A's 3 x 24 trajectories are 3 micro-batches of 24, guidance doubles their rows
    # the first 9 of 10 steps train. An anchor answers for every row; if it is a teacher, that one is not asked again
    ("--stage opd --drawn-states 0",
     {("student", True): (27, 1296), ("teachers", False): (27, 1296), ("anchor", False): (27, 1296)}),
    ("--stage opd --drawn-states 0 --anchor quality", {("student", True): (27, 1296), ("teachers", False): (45, 2160)}),
    ("--stage opd --drawn-states 0 --anchor-every 4",
     {("student", True): (27, 1296), ("teachers", False): (27, 1296), ("anchor", False): (27, 324)}),
    # a path estimator walks to the last trained state first
    ("--stage opd --estimator path --mar 0",
     {("student", True): (27, 1296), ("student", False): (27, 1296), ("teachers", False): (27, 1296)}),
    # two updates of 72: the rows of both are walked and labelled first
    ("--stage opd --drawn-states 0 --estimator sampled --mar 0 --prompts-per-step 6 --updates 2",
     {("student", True): (54, 2592), ("student", False): (54, 2592), ("teachers", False): (54, 2592)}),
    # 6 x 24 trajectories in two updates of 72; beta asks the base at every trained state
    ("--stage grpo --task text",
     {("student", True): (54, 2592), ("student", False): (60, 2880), ("base", False): (54, 2592)}),
    ("--stage nft --task text",
     {("student", True): (60, 2880), ("old policy", False): (120, 5760), ("base", False): (60, 2880)}),
    ("--stage curate", {("student", False): (60, 2880)}),
    # Q's 8 samples in two micro-batches of 4, teachers guided and the student not: every one of 40 ODE steps
    ("--preset qwen-rl --stage opd --drawn-states 0", {("student", True): (80, 320), ("teachers", False): (80, 640)}),
    # hybrid guidance asks for the two branches one after the other: 12 micro-batches of 4, 40 steps, 8 of 16 trained
    ("--preset qwen-rl --stage grpo --task t2i", {("student", True): (96, 384), ("student", False): (960, 3840)}),
    ("--preset qwen-rl --stage nft --task mix",
     {("student", True): (96, 384), ("old policy", False): (1056, 4224), ("base", False): (96, 384)}),
    # micro-batches never span two updates: each update's 10 rows are 4 + 4 + 2
    ("--stage grpo --task text --prompts-per-step 6 --group-size 5 --updates 3 --micro-batch 4 --beta 0 --cfg 1",
     {("student", True): (81, 270), ("student", False): (90, 300)}),
    # 4 drawings and 3 edits: 2 + 2 | 2 + 1
    ("--preset tiny-qwen --stage pretrain --batch-size 7 --micro-batch 2", {("student", True): (4, 7)}),
]  # fmt: skip


@pytest.mark.parametrize(("line", "expected"), STEPS, ids=[line for line, _ in STEPS])
def test_the_forwards_of_a_step_are_those_of_arithmetic(line, expected):
    assert counted(parse(line)) == expected


RUNS = [
    ("go", "--stage opd"),
    ("go", "--stage opd --estimator sampled --drawn-states 1 --prompts-per-step 6 --updates 2"),
    ("go", "--stage opd --cfg 2 --mar 0"), ("go", "--stage sft --cfg 2 --micro-batch 2"), ("go", "--stage pretrain"),
    ("go", "--stage grpo --task text --beta 0.1 --updates 3 --micro-batch 2"),
    ("go", "--stage nft --task mix --mix joint --beta 0.1 --cfg 2 --guidance both"),
    ("go2", "--stage grpo --task mix --cfg 2 --guidance rollout"), ("go2", "--stage nft --task edit"),
    ("go2", "--stage opd --guidance teacher --micro-batch 3"), ("real", "--stage opd --micro-batch 4"),
    ("real2", "--stage grpo --task edit --rewards jpeg=1 --prompts edit=MIXED --micro-batch 0 --eval-prompts 0"),
]  # fmt: skip


@pytest.mark.parametrize(("start", "line"), RUNS, ids=[" ".join(run) for run in RUNS])
def test_what_is_counted_is_what_a_real_run_computes(start, line, forwards, request, monkeypatch):
    planned, real, computed = {}, cli.parse, forwards

    def parse(argv, prog="train.py"):
        s, given = real(argv, prog)
        for (_, who, gradient), count in counting.forwards(s, train.LOOPS[s.stage]).items():
            name = {"old policy": "student", "": "student", "base": None}.get(who, who)
            sums = planned.setdefault((name, gradient), [0, 0])
            sums[0], sums[1] = sums[0] + count[0], sums[1] + count[1]
        computed.clear()
        return s, given

    monkeypatch.setattr(cli, "parse", parse)
    mixed = str(request.getfixturevalue("qwen").root / "mixed.jsonl") if "MIXED" in line else ""
    request.getfixturevalue(start)("run", *line.replace("MIXED", mixed).split())
    if "pretrain" in line:  # there is no expert to choose
        planned = {(None, gradient): count for (_, gradient), count in planned.items()}
    observed = {}
    for call in computed:
        who = "teachers" if (call.who or "").startswith("teacher:") else call.who
        sums = observed.setdefault((who, call.grad), [0, 0])
        sums[0], sums[1] = sums[0] + 1, sums[1] + len(call.x)
    assert observed == planned and planned


def test_the_forwards_of_qwen_image_2_1_keep_what_does_not_depend_on_the_state():
    """Two micro-batches of four rows: of their 40 steps the first one is whole, and where the student learns."""
    base = plan.base_of(parse("--preset qwen-rl"))
    found = forwards(parse("--preset qwen-rl --drawn-states 0 --eval-prompts 0"), train.distil, base)
    assert found["step", "student", True] == [80, 320, 0]
    assert found["step", "teachers", False] == [160, 640, 2 * 2 * 39 * 4], "both branches of guidance"
    s = parse("--preset qwen-rl --stage grpo --task t2i --eval-prompts 0 --train-steps first")  # 8 of 40 are learnt
    found = forwards(s, train.LOOPS["grpo"], base)
    assert found["step", "student", True] == [96, 384, 0]
    assert found["step", "student", False] == [960, 3840, 48 * (39 + 31)], "with the prompt, and without"
    kept = plan.kept_bytes(s, base)  # keys and values of 32 blocks x 4096, text and a source, 4 rows, two branches
    assert kept == 2 * 2 * 32 * 4096 * (512 + 32 * 32) * 4 * 2


def test_ranks_share_what_is_drawn_and_have_steps_of_their_own(monkeypatch):
    s = parse("--stage opd --drawn-states 0 --eval-prompts 3 --micro-batch 3")
    alone = forwards(s, train.distil)
    monkeypatch.setattr(ranks, "rank_and_world", lambda: (1, 2))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    shared = forwards(s, train.distil)
    assert {k: v for k, v in alone.items() if k[0] == "step"} == {k: v for k, v in shared.items() if k[0] == "step"}
    assert alone["end", "", False][1] == 9 * 40 * 2 and shared["end", "", False][1] == 6 * 40 * 2  # 2 of 3 parts


# ---------------------------------------------------------------------------------------- parameters and memory
@pytest.mark.parametrize(
    ("line", "whole", "trained"),
    [  # published sizes; a LoRA of rank r on a W x W projection has 2 r W numbers
        ("", 2_243_171_520, 2 * 32 * 1536 * (24 * 8 - 1)),  # SD3's last block has no to_add_out
        ("--preset qwen-rl --model Qwen/Qwen-Image-Edit", 20_430_401_088, 2 * 64 * 3072 * (60 * 8 - 1)),  # as above
        ("--preset qwen-rl", 7_115_124_736, 32 * 64 * (4 * 2 * 4096 + 3 * (4096 + 12288))),  # attention, MLP
        ("--parameters full", 2_243_171_520, 2_243_171_520),
    ],
)
def test_parameters_of_the_published_models(line, whole, trained):
    s = parse(line)
    base = plan.base_of(s)
    assert plan.numbers(base.transformer.parameters()) == whole and plan.trained_numbers(s, base) == trained


def test_memory_by_hand():
    """A base of 1000 numbers and 30 in buffers, a student of 100: 2 or 4 bytes a frozen number, 20 or 24 a trained one;
    of two full teachers one is on the accelerator, and the anchor beside it."""
    lora = parse(f"--anchor owner/a --init {__file__}")
    full = {"teacher quality", "teacher composition", "anchor", "init"}
    assert plan.memory(lora, 1000, 30, 100, full) == {"base": 2060, "student": 2000, "full teachers": 4120}
    fully = parse("--parameters full --precision float32 --mar 0")
    experts = {f"teacher {task}" for task in settings.FLOW_TASKS}
    assert plan.memory(fully, 1000, 30, 1000, experts) == {"student": 20_120, "full teachers": 4120}
    nft = parse("--stage nft --task text --beta 0.1")
    assert plan.memory(nft, 1000, 0, 100, set()) == {"base": 2000, "student": 2400}


# ------------------------------------------------------------------------------------------ what is there, what is not
def test_the_longest_plan_fits_a_screen(monkeypatch):
    monkeypatch.setattr(plan, "download_sizes", lambda wanted: {})
    text, _ = plan.describe(parse("--preset qwen-rl --stage grpo"), train.LOOPS)
    assert len(text.splitlines()) <= 24 and max(map(len, text.splitlines())) < 200, text


def dry(*flags, code=0):
    assert train.main([*flags, "--dry-run"]) == code


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--model", "./no/model"], "./no/model"), (["--teachers", "text=./no/teacher"], "./no/teacher"),
        (["--anchor", "./no/anchor"], "./no/anchor"), (["--init", "./no/init"], "./no/init"),
        (["--prompts", "text=./no/prompts.txt"], "no/prompts.txt"),
        (["--stage", "all", "--prompts", "text=./no/prompts.txt"], "no/prompts.txt"),
        (["--stage", "grpo", "--prompts", "quality=./no/prompts.txt"], "no/prompts.txt"),  # its third teacher's
        (["--stage", "grpo", "--task", "text", "--rewards", "./no/rewards.json"], "no/rewards.json"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named_and_ends_with_code_2(flags, named, capsys):
    others = ["quality=assets/tiny/teacher-quality", "composition=assets/tiny/base"]
    dry("--preset", "tiny", *flags, *(others if flags[0] == "--teachers" else []), code=2)
    shown = capsys.readouterr()
    assert named in shown.out + shown.err


def test_a_package_of_an_extra_is_missing_if_it_is_not_installed(monkeypatch, capsys):
    monkeypatch.setattr(plan.metadata, "distributions", lambda name: [])
    dry("--stage", "grpo", "--task", "text", "--rewards", "ocr=1", "--model", "assets/tiny/base", code=2)
    assert "rapidocr" in capsys.readouterr().out
    dry("--preset", "tiny", "--wandb", code=2)
    assert "pip install -e '.[wandb]'" in capsys.readouterr().out


@pytest.mark.parametrize("state", ["hangs", "fails", "offline"])
def test_what_the_hub_has_is_no_fault_and_an_answer_is_not_waited_for_long(state, monkeypatch, capsys):
    asked, wait = [], {"hangs": 60, "fails": 0, "offline": 60}[state]

    def model_info(*_, **__):
        asked.append(time.sleep(wait))
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", state == "offline")
    began = time.monotonic()
    sizes = plan.download_sizes({"owner/a": ["*"], "owner/b": ["*"]}, seconds=1.0)
    assert sizes == {} and len(asked) == (state == "fails") and time.monotonic() - began < 10
    dry("--stage", "merge")
    assert "stable-diffusion-3.5-medium: downloaded when the run starts, of unknown size" in capsys.readouterr().out


def test_sizes_of_a_download_are_those_of_the_files_that_would_be_read(monkeypatch, capsys):
    def model_info(_, repo, **__):
        files = {"adapter_config.json": 1 << 20, "adapter_model.safetensors": 1 << 30, "flax_model.msgpack": 1 << 40}
        siblings = [{"rfilename": name, "size": size} for name, size in files.items()]
        return huggingface_hub.hf_api.ModelInfo(id=repo, siblings=siblings)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    dry("--stage", "merge")
    out = capsys.readouterr().out
    assert "GenEval: downloaded when the run starts, 1.00 GiB" in out


def test_a_run_of_that_name_is_new_or_goes_on_or_is_refused(go, world, capsys):
    folder = go("run", "--stage", "opd", "--save-every", "1")
    flags = [*world.flags[:2], "--model", str(world.base), "--out", str(folder.parent), "--stage", "opd"]
    same = json.loads((folder / "config.json").read_text())
    file = folder.parent / "same.json"
    file.write_text(json.dumps(same))
    capsys.readouterr()
    before = {f: f.stat().st_mtime_ns for f in folder.rglob("*")}
    dry("--config", str(file))
    assert "run: is there and will be continued from step-000001" in capsys.readouterr().out
    dry("--config", str(file), "--lr", "0.5", code=2)
    assert "was made with --lr" in capsys.readouterr().out
    dry(*flags, "--name", "other")
    assert "other: new" in capsys.readouterr().out
    assert before == {f: f.stat().st_mtime_ns for f in folder.rglob("*")} and not (folder.parent / "other").exists()


def test_a_plan_reads_no_weights(monkeypatch):
    def fail(*_, **__):
        pytest.fail("weights were read")

    for owner, name in ((hub, "read_transformer"), (hub, "read_part"), (plan.load, "base_model")):
        monkeypatch.setattr(owner, name, fail)
    dry("--preset", "tiny")
    dry("--preset", "tiny-qwen", "--stage", "grpo")
