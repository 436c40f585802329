"""Oracles for whole runs: the same bits after any interruption, one model on several ranks, cold starts by hand, every
stage on Stable Diffusion 3.5's own classes, and one line for every user's error.
"""

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch

import eval as evaluation
import opd
import rewards
import train
from data import files as data
from harness import distil, report, rollout
from harness import load as student
from harness import run as runtime
from harness.run import Run
from models import load as models
from models import lora as adapters
from models import sd3
from scorers import panel as scoring
from tests.conftest import (
    QWEN_TASKS,
    SMALL,
    SMALL2,
    TASKS,
    close,
    flat,
    metrics,
    same,
    save_random_adapter,
    stored,
    the_one_line,
    weights,
    with_adapter,
)
from tiny import edits as tiny_edit

ROOT = Path(__file__).resolve().parents[2]
GRPO = ["--stage", "grpo", "--task", "text", "--rewards", "quality=1"]


EVERY_STAGE = {
    "pretrain": ["--stage", "pretrain"],
    "grpo": [*GRPO, "--micro-batch", "4"],
    "nft": ["--stage", "nft", *GRPO[2:], "--micro-batch", "4"],
    "sft": ["--stage", "sft"],
    "opd": ["--stage", "opd"],
    "opd, all parameters": ["--stage", "opd", "--parameters", "full"],
}


@pytest.fixture
def small_pretraining(monkeypatch):
    real = models.new_tiny
    monkeypatch.setattr(models, "new_tiny", lambda seed, **more: real(seed, width=32, layers=1, **more))


# --------------------------------------------------------------------------------- interruption, resume, several ranks
@pytest.mark.parametrize("stage", EVERY_STAGE)
def test_an_interrupted_run_ends_with_the_bits_of_an_uninterrupted_one(
    go, monkeypatch, capsys, small_pretraining, stage
):
    flags = [*EVERY_STAGE[stage], "--steps", "4", "--save-every", "2"]
    whole, real = go("whole", *flags), Run.log

    def interrupted(run, *found):
        real(run, *found)
        if run.step == 2:  # the third step is done and logged, but not saved
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", interrupted)
        go("cut", *flags, code=130)
    assert "interrupted: repeat the command to continue" in capsys.readouterr().err
    cut = go("cut", *flags)
    assert "cut: continues from" in capsys.readouterr().err
    state = stored(whole)
    assert state["step"] == 4 and set(state["updates"].values()) == {4.0}
    assert same(stored(cut), state), "weights, averaged weights, optimizer, step"
    assert [line["step"] for line in metrics(cut)] == [1, 2, 3, 4]
    assert metrics(cut) == metrics(whole)
    last, other = adapters.last_checkpoint(whole), adapters.last_checkpoint(cut)
    for file in last.rglob("*.safetensors"):
        assert same(safetensors.torch.load_file(file), safetensors.torch.load_file(other / file.relative_to(last)))
    assert (weights(whole) != weights(whole, "average")).any(), "the average is not the weights"


@pytest.mark.parametrize(
    "stage, owner, part, call, saved",
    [("opd", distil, "distil_part", 7, 2), ("grpo", rollout, "conditions", 7, 2), ("sft", Run, "update", 3, 3)],
    ids=["opd", "grpo", "sft"],
)
def test_sigterm_within_a_step_ends_in_good_order_and_with_the_same_bits(
    go, monkeypatch, capsys, stage, owner, part, call, saved
):
    """In the first of three micro-batches of the third step; what it has added to the gradient is thrown away.

    sft, whose steps are short, finishes its step.
    """
    flags = [*EVERY_STAGE[stage], "--steps", "4", "--save-every", "9", "--micro-batch", "2"]
    whole, real, calls = go("whole", *flags), getattr(owner, part), count(1)

    def told(*args):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, part, told)
        cut = go("cut", *flags)
    assert next(calls) == call + 1, "nothing is begun after the signal"
    assert f"cut: stopped by SIGTERM, {cut}/checkpoints/step-00000{saved} saved; repeat" in capsys.readouterr().err
    assert stored(cut)["step"] == saved and not (cut / "report.md").exists(), "and nothing is evaluated"
    go("cut", *flags)
    assert same(stored(cut), stored(whole)) and metrics(cut) == metrics(whole) and (cut / "report.md").exists()


# Imports once, then forks: real processes, which a real SIGKILL ends, or which make up a real group of two ranks.
FORKS = """
import json, math, os, random, signal, socket, sys, time, traceback
from pathlib import Path
sys.path.insert(0, {root!r})
import torch
import torch.utils.tensorboard
import settings, train
from data import files as data
from harness import ranks, report
from harness import run as runtime
from models import lora as adapters
report.plot_metrics, report.save_samples = lambda folder: [], lambda *args: None
given, out = json.loads(sys.argv[1]), Path(sys.argv[2])

def fork(log, work):
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.dup2(os.open(out / (log + ".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)

def joined(pid, log):
    assert os.waitpid(pid, 0)[1] == 0, (out / (log + ".log")).read_text()

# ------------------------------------------------ two ranks, with what each saw written down
def rank_of_two(rank, port):
    torchruns = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2, MASTER_PORT=port)
    os.environ.update({{k: str(v) for k, v in torchruns.items()}}, MASTER_ADDR="localhost")
    seen = {{"prompts": [], "metrics": []}}
    prompt_batch, log, save = data.prompt_batch, runtime.Run.log, runtime.Run.save

    def spied_batch(*args):
        batch = prompt_batch(*args)
        seen["prompts"].append([p.text for p in batch])
        return batch

    def spied_log(run, metrics, *histograms):
        seen["metrics"].append(dict(metrics))
        return log(run, metrics, *histograms)

    def spied_save(run):
        save(run)
        state = {{name: p.detach() for name, p in run.weights.parameters.items()}}
        torch.save(state, out / f"{{run.s.name}}-{{rank}}.pt")

    data.prompt_batch, runtime.Run.log, runtime.Run.save = spied_batch, spied_log, spied_save
    ranks.start(settings.resolve({{"preset": "tiny", "device": "cpu", "threads": 1}}))
    tensors = [torch.full((2, 3), 4.0 * rank), torch.tensor([5.0 + rank]), torch.ones(4)]
    ranks.average(tensors, most=7)
    seen["mean"] = [t.tolist() for t in tensors]
    lone, nobodys = [math.nan, 3.0][rank], math.nan
    seen["numbers"] = ranks.average_numbers({{"a": 0.1 + rank, "b": -rank, "c": lone, "d": nobodys}})
    seen["any"] = [ranks.any_rank(rank == other) for other in (0, 1, 2)]
    for flags in given["ranks"]:
        assert train.main([*flags, "--out", str(out)]) == 0
    (out / f"rank{{rank}}.json").write_text(json.dumps(seen))
    return 0

with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
for rank, pid in enumerate([fork(f"rank{{rank}}", lambda: rank_of_two(rank, port)) for rank in (0, 1)]):
    joined(pid, f"rank{{rank}}")

# ------------------------------------------------------------- one rank, killed again and again
def start(name):
    return fork(name, lambda: train.main([*given["killed"], "--out", str(out), "--name", name]))

began = time.time()
joined(start("whole"), "whole")
wall, rng, kills = time.time() - began, random.Random(0), 0
for attempt in range(40):
    before, began = adapters.last_checkpoint(out / "killed"), time.time()
    pid = start("killed")
    delay = rng.random() * wall / 2
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        new = adapters.last_checkpoint(out / "killed") != before
        if done or (new if attempt < 4 else time.time() - began > delay):
            break
        time.sleep(0.0005)
    if done:
        assert status == 0, (out / "killed.log").read_text()
        break
    time.sleep(rng.random() * 0.03)
    os.kill(pid, signal.SIGKILL)
    killed = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    kills += killed
    if not killed:
        break
joined(start("killed"), "killed")
print(kills)
"""


@pytest.fixture(scope="module")
def forked(world, tmp_path_factory):
    """The folder of what FORKS did, and how often it killed."""
    out = tmp_path_factory.mktemp("forked")
    # --no-decay: the cosine's length is --steps, and one of these runs ends early by it.
    opd_run, grpo_run = [[*world.flags, "--no-decay", "--name", n, *EVERY_STAGE[n]] for n in ("opd", "grpo")]
    two = [
        [*opd_run, "--steps", "4"],
        [*opd_run, "--name", "cut", "--steps", "2"],
        [*opd_run, "--name", "cut", "--steps", "4"],
        [*grpo_run, "--steps", "2"],
    ]
    given = {"ranks": two, "killed": [*world.flags, "--steps", "16", "--save-every", "1"]}
    command = [sys.executable, "-c", FORKS.format(root=str(ROOT)), json.dumps(given), str(out)]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    return SimpleNamespace(out=out, kills=int(result.stdout.split()[-1]))


def test_a_run_killed_at_random_instants_ends_with_the_bits_of_one_that_was_left_alone(forked):
    assert forked.kills >= 4, "the first four attempts die right after a checkpoint"
    whole, killed = forked.out / "whole", forked.out / "killed"
    assert stored(whole)["step"] == 16 and same(stored(killed), stored(whole))
    assert metrics(killed) == metrics(whole) and len(metrics(whole)) == 16
    names = sorted(p.name for p in (killed / "checkpoints").iterdir())
    assert names == ["step-000015", "step-000016"], "nothing half-written is left"


def test_two_ranks_train_one_model_on_their_own_data_and_resume_exactly(forked):
    zero, one = (json.loads((forked.out / f"rank{r}.json").read_text()) for r in (0, 1))
    assert zero["mean"] == one["mean"] == [[[2.0] * 3] * 2, [5.5], [1.0] * 4]
    expected = {"a": 0.6, "b": -0.5, "c": 3.0, "d": math.nan}
    assert zero["numbers"] == pytest.approx(expected, nan_ok=True) == one["numbers"]
    assert zero["any"] == one["any"] == [True, True, False]
    assert len(zero["prompts"]) > 20
    for a, b in zip(zero["prompts"], one["prompts"], strict=True):
        assert not set(a) & set(b), "two ranks never share a prompt of one step"
    for name in ("opd", "cut", "grpo"):
        first, second = (torch.load(forked.out / f"{name}-{r}.pt") for r in (0, 1))
        assert same(first, second), "one model"
        state = stored(forked.out / name)
        assert same(first, {key: state[f"weights.{key}"] for key in first}) and first
    assert same(stored(forked.out / "cut"), stored(forked.out / "opd"))
    logged = metrics(forked.out / "opd", drop=("seconds", "step"))
    assert len(logged) == 4
    for line, a, b in zip(logged, zero["metrics"], one["metrics"]):
        assert all(value == pytest.approx((a[k] + b[k]) / 2, rel=1e-5) for k, value in line.items())
        assert a["gap"] != b["gap"] and a["grad_norm"] == b["grad_norm"], "the norm is that of the mean gradient"


def test_training_stays_off_the_network_and_says_nothing_but_progress(go, monkeypatch, recwarn, capsys):
    def forbidden(*address):
        raise AssertionError(f"a connection to {address}")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, forbidden)
    go("run", "--steps", "2", "--save-every", "1", "--eval-prompts", "2")
    assert [str(w.message) for w in recwarn] == [], "no warning stands between a user and an error"
    assert re.fullmatch(r"(\s*run: [^\r\n]*)+\s*", capsys.readouterr().err)


def test_a_repeated_merge_follows_teachers_that_changed_on_disk(world, tmp_path, no_pictures):
    for task in TASKS:
        shutil.copytree(world.teachers[task], tmp_path / task)
    teachers = ["--teachers", *(f"{task}={tmp_path / task}" for task in TASKS)]
    command = [*SMALL, "--model", str(world.base), "--stage", "merge", "--name", "m", "--out", str(tmp_path), *teachers]
    merged = []
    for source in ("text", "quality"):
        shutil.rmtree(tmp_path / "text")
        shutil.copytree(world.teachers[source], tmp_path / "text")
        assert train.main(command) == 0
        file = tmp_path / "m" / "checkpoints" / "step-000000" / "adapter_model.safetensors"
        merged.append(safetensors.torch.load_file(file))
    assert not same(*merged)


# --------------------------------------------------------------------------------------------------------- cold starts
def test_micro_batches_of_flow_matching_change_neither_noise_nor_gradient(go, spy, updates):
    calls, found = spy(train, "flow_matching"), []
    for size in (0, 2, 3):
        go(f"of{size}", "--stage", "sft", "--micro-batch", str(size), "--batch-size", "7")
        times = torch.cat([call.args[2] for call in calls])
        found.append((times, sum(call.result for call in calls), flat(updates[-1].grads)))
        calls.clear()
    times, loss, gradient = found[0]
    assert len(times) == 7 and gradient.norm() > 0
    for other_times, other_loss, other in found[1:]:
        assert torch.equal(other_times, times), "the same times"
        assert close(other, gradient, 1e-6) and other_loss == pytest.approx(loss, rel=1e-5)


def test_sft_learns_the_pictures_of_each_tasks_own_teacher(go, spy, world):
    drawn, sampled = spy(rollout, "draw"), spy(train, "flow_matching")
    go("run", "--stage", "sft")
    calls = list(drawn)
    for call, task in zip(calls, TASKS, strict=True):
        prompts, s, seed, cfg = call.args[1:]
        assert len(prompts) == 2 and {p.task for p in prompts} == {task}
        teacher = with_adapter(world, world.teachers[task])
        assert cfg == 1.0 and close(call.result, rollout.draw(teacher, prompts, s, seed, cfg))
    conds = {task: teacher.encode([p.text for p in call.args[1]]) for task, call in zip(TASKS, calls, strict=True)}
    assert sum(len(call.args[1]) for call in sampled) == 3, "the batch, task by task"
    for call in sampled:
        _, x0, _, cond, _, of = call.args
        (task,) = {t for t, d in zip(TASKS, calls, strict=True) if any(torch.equal(x0[0], one) for one in d.result)}
        latents = drawn[TASKS.index(task)].result
        assert of == 3 and x0.shape[1:] == (3, 24, 24)
        for row, tokens in zip(x0, cond.tokens, strict=True):  # the latents themselves, each with its own prompt
            (place,) = [i for i, one in enumerate(latents) if torch.equal(row, one)]
            assert torch.equal(tokens, conds[task].tokens[place])


def test_merging_gives_the_mean_of_the_teachers_updates(go, world):
    def update(folder):
        state, config = models.load_tiny(world.base).read_adapter(folder)
        names = sorted(key.removesuffix(".lora_A.weight") for key in state if "lora_A" in key)
        scale = config.lora_alpha / config.r
        return {n: scale * state[f"{n}.lora_B.weight"] @ state[f"{n}.lora_A.weight"] for n in names}

    merged = update(go("merged", "--stage", "merge", "--merge-method", "cat") / "checkpoints/step-000000")
    teachers = [update(folder) for folder in world.teachers.values()]
    for name, found in merged.items():
        assert close(found, sum(t[name] for t in teachers) / 3)
    again = update(go("svd", "--stage", "merge", "--merge-method", "svd") / "checkpoints/step-000000")
    assert not close(again[name], merged[name]), "svd goes back to the teachers' rank"


# --------------------------------------------------------------------------------------------------------- whole plans
def test_the_whole_pipeline_runs_from_nothing_and_a_second_call_trains_nothing(
    tmp_path, monkeypatch, small_pretraining, updates, capsys
):
    flags = [*SMALL, "--stage", "all", "--out", str(tmp_path), "--name", "all", "--steps", "2"]
    assert train.main(flags) == 0
    out = capsys.readouterr().out
    rows = [line.split(" | ")[0].removeprefix("| ") for line in out.splitlines() if line.startswith("| ")]
    shown = ["base", *(f"teacher {t}" for t in TASKS), "merged", "sft", "opd student"]
    assert rows == ["model", *shown], "the table of the plan"
    parts = ["pretrain", *(f"grpo-{t}" for t in TASKS), "sft", "merge", "opd"]
    for part in parts:
        folder = tmp_path / f"all-{part}"
        assert (folder / "report.md").is_file() and adapters.last_checkpoint(folder)
        assert (folder / "samples/curves.png").is_file() == (part != "merge")
    text = (tmp_path / "all/report.md").read_text()
    assert text.count("![") == len(shown) * 3, "every model's pictures of every task"
    config = json.loads((tmp_path / "all-opd/config.json").read_text())
    assert config["init"] == str(tmp_path / "all-merge"), "distillation starts from the merged teachers"
    assert config["teachers"] == {t: str(tmp_path / f"all-grpo-{t}") for t in TASKS}
    assert config["model"] == str(tmp_path / "all-pretrain")
    trained = len(updates)
    assert trained == 2 * 6, "seven stages, one of which does not train"
    monkeypatch.setattr(report, "plot_metrics", lambda folder: [])
    monkeypatch.setattr(report, "save_grid", lambda *args: None)
    assert train.main(flags) == 0
    assert len(updates) == trained and capsys.readouterr().out == out, "the same table from the same checkpoints"


def test_qs_pipeline_trains_its_own_teachers_and_distils_them(
    tmp_path, monkeypatch, small_pretraining, updates, capsys
):
    """pretrain, a GRPO teacher a task, OPD, the table: no cold start, and a student that draws without guidance."""
    flags = [*SMALL2, "--stage", "all", "--out", str(tmp_path), "--name", "all", "--steps", "2"]
    cfgs, real = [], evaluation.evaluate
    monkeypatch.setattr(report, "plot_metrics", lambda folder: [])
    monkeypatch.setattr(evaluation, "evaluate", lambda *args: cfgs.append(args[3]) or real(*args))
    assert train.main(flags) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    columns = "t2i, t2i alignment, t2i aesthetic, edit, edit instruction, edit identity, average".split(", ")
    assert table[0] == f"| model | {' | '.join(columns)} |"
    assert [line.split(" | ")[0] for line in table] == ["| model", *map("| {}".format, QWEN_SHOWN)]
    parts = ["all", "all-grpo-edit", "all-grpo-t2i", "all-opd", "all-pretrain"]
    assert sorted(p.name for p in tmp_path.iterdir()) == parts and len(updates) == 2 * 4
    config = json.loads((tmp_path / "all-opd/config.json").read_text())
    assert config["teachers"] == {t: str(tmp_path / f"all-grpo-{t}") for t in QWEN_TASKS} and config["init"] == ""
    assert config["model"] == str(tmp_path / "all-pretrain")
    # Of the parts: the base of "both", teachers of Q 4.1's hybrid, the student of Q 4.3; then the table's four.
    assert cfgs == [2.0, 2.0, 2.0, 1.0] + [2.0, 2.0, 2.0, 1.0]
    assert (tmp_path / "all/samples/opd-student-edit.png").is_file()


QWEN_SHOWN = ("base", "teacher t2i", "teacher edit", "opd student")
TINY_QWEN_STAGES = {
    "curate": ["--stage", "curate", "--threshold", "0", "--train-prompts", "4"],
    "grpo": ["--stage", "grpo"],
    "grpo, mixed": ["--stage", "grpo", "--task", "mix", "--micro-batch", "3", "--overlap"],
    "nft": ["--stage", "nft"],
    "nft, mixed": ["--stage", "nft", "--task", "mix", "--parameters", "full", "--micro-batch", "3"],
    "sft": ["--stage", "sft", "--batch-size", "7", "--micro-batch", "2"],
    "merge": ["--stage", "merge"],
    "opd": ["--stage", "opd", "--micro-batch", "3"],
    "opd, all parameters": ["--stage", "opd", "--parameters", "full", "--mar", "0.1", "--anchor", "edit"],
}


@pytest.mark.parametrize("stage", TINY_QWEN_STAGES)
def test_every_stage_runs_in_the_tiny_qwen_world(go2, tmp_path, updates, stage):
    """With the preset's own rewards; stages of one task train a teacher for each of Q's two."""
    folder = go2("run", *TINY_QWEN_STAGES[stage], "--steps", "2")
    if stage == "curate":
        kept = {p.parent.name: p.read_text().count("\n") for p in (folder / "prompts").rglob("train*.*")}
        assert set(kept) == set(QWEN_TASKS) and not updates
        line = json.loads((folder / "prompts/edit/train_metadata.jsonl").read_text().splitlines()[0])
        assert line["image"].startswith(data.PNG_URI) and line["t2i_prompt"] and "keep" in line
        return
    folders = [tmp_path / f"run-{task}" for task in QWEN_TASKS] if stage in ("grpo", "nft") else [folder]
    assert len(updates) == {"merge": 0}.get(stage, 2 * len(folders))
    for one in folders:
        assert adapters.last_checkpoint(one).name == ("step-000000" if stage == "merge" else "step-000002")
        for line in metrics(one) if stage != "merge" else ():
            assert all(math.isfinite(value) for value in line.values())
            if stage in ("grpo, mixed", "nft, mixed"):
                assert {"reward/instruction", "reward/identity", "reward/preference", "reward/quality"} <= set(line)
        assert stage.startswith("nft") == any(key.startswith("old.") for key in stored(one) if stage != "merge")
    assert all(flat(update.grads).norm() > 0 for update in updates)


def test_a_curated_edit_trains_with_the_picture_it_was_kept_for(go2, spy):
    kept = go2("kept", "--stage", "curate", "--tasks", "edit", "--threshold", "0", "--train-prompts", "4")
    rows = spy(rollout, "rows_of")
    go2("next", "--stage", "grpo", "--task", "edit", "--prompts", f"edit={kept / 'prompts/edit'}")
    originals = {p.text: p.metadata["image"] for p in tiny_edit.make_prompts("edit", "train", 4)}
    trained = {row.prompt.text: row.prompt.metadata["image"] for row in rows[0].result}
    assert trained.items() <= originals.items() and trained


def test_grpo_without_a_task_trains_the_three_teachers_in_turn(go, tmp_path):
    go("all", "--stage", "grpo")
    assert sorted(p.name for p in tmp_path.glob("all*")) == [f"all-{t}" for t in sorted(TASKS)]


def test_a_dry_run_prints_its_settings_and_touches_nothing(go, tmp_path, capsys):
    go("run", "--dry-run", "--model", "/nowhere", "--lr", "0.25")
    out = capsys.readouterr().out
    printed, end = json.JSONDecoder().raw_decode(out)
    assert printed["lr"] == 0.25 and printed["stage"] == "opd" and not list(tmp_path.iterdir())
    assert "1 of composition, 1 of text, 1 of quality" in out[end:], "and what they amount to"


# ----------------------------------------------------------------------- every stage on Stable Diffusion 3.5's classes
REAL_STAGES = {
    "grpo": ["--stage", "grpo", "--task", "text", "--rewards", "jpeg=1", "--advantage-std", "batch"],
    "grpo, all parameters": [
        *("--stage", "grpo", "--task", "mix", "--rewards", "jpeg=1", "--parameters", "full", "--updates", "3"),
    ],
    "sft": ["--stage", "sft"],
    "opd": ["--stage", "opd"],
    "opd, path": ["--stage", "opd", "--estimator", "path", "--anchor", "text"],
    "opd, velocity": ["--stage", "opd", "--estimator", "velocity", "--micro-batch", "4"],
    "opd, bfloat16": ["--stage", "opd", "--precision", "bfloat16"],
    "opd, all parameters": ["--stage", "opd", "--parameters", "full"],
}


@pytest.mark.parametrize("stage", REAL_STAGES)
def test_every_stage_trains_sd35_with_teachers_of_every_kind(real, updates, stage):
    folder = real("run", *REAL_STAGES[stage], "--steps", "2", "--lr", "0.01", "--eval-prompts", "0")
    start, end = flat(updates[0].weights), weights(folder)
    assert end.dtype == torch.float32 and all(flat(update.grads).norm() > 0 for update in updates)
    lines = metrics(folder)
    assert len(lines) == 2 and all(math.isfinite(value) for line in lines for value in line.values())
    checkpoint = adapters.last_checkpoint(folder)
    assert {p.suffix for p in checkpoint.rglob("*") if p.is_file()} == {".safetensors", ".json", ".md"}
    whole = "--parameters" in REAL_STAGES[stage]
    assert adapters.kind(checkpoint) == ("full" if whole else "peft") and len(start) == len(end)
    assert (checkpoint / adapters.LORA_FILE).exists() != whole, "in diffusers' layout too"
    assert (folder / "report.md").read_text().startswith("# run\n")


def test_sd35s_gradient_does_not_depend_on_how_it_is_computed(real, updates):
    """Micro-batches of every size, blocks computed again in backward or kept."""
    flags = ["--stage", "opd", "--mar", "0.5", "--eval-prompts", "0"]
    variants = (["--micro-batch", "3"], ["--micro-batch", "0"], ["--micro-batch", "1"], ["--no-gradient-checkpointing"])
    for number, variant in enumerate(variants):
        real(f"run{number}", *flags, *variant)
    first, *others = (flat(update.grads) for update in updates)
    assert first.norm() > 0
    for other in others:
        assert (other - first).abs().max() < 1e-6 * first.abs().max()


def test_each_prompt_is_encoded_once_and_a_continued_run_encodes_what_is_left(real, monkeypatch, spy):
    opened, encoded, read = [], [], sd3._read_text_encoders

    def counted(*args):
        pipe = read(*args)
        real = pipe.encode_prompt

        def encode_prompt(prompt, *more, **kwargs):
            encoded.append(prompt)
            return real(prompt, *more, **kwargs)

        pipe.encode_prompt = encode_prompt
        opened.append(pipe)
        return pipe

    monkeypatch.setattr(sd3, "_read_text_encoders", counted)
    rows, flags = spy(rollout, "rows_of"), ["--steps", "3", "--save-every", "1", "--window", "0:1", "--mar", "0"]

    def steps(first):  # prompts of the steps that this process did
        return [{row.prompt.text for row in call.result} for call in rows[first:]]

    def spent():
        found = (len(opened), len(encoded), set(encoded))
        opened.clear()
        encoded.clear()
        return found

    whole = real("whole", *flags)
    each = steps(0)
    trained = set().union(*each)
    count, calls, texts = spent()
    assert count == 1 and calls == len(texts), "the encoders are read once, and nothing is encoded twice"
    assert texts > trained | {""} and len(trained) == 9 and len(texts) == 9 + 1 + 3, "and a test prompt a task"
    log = Run.log

    def interrupted(run, *found):
        log(run, *found)
        if run.step == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", interrupted)
        cut = real("cut", *flags, code=130)
    assert spent() == (1, len(texts), texts)
    rows.clear()
    real("cut", *flags)
    assert steps(0) == each[1:]
    assert spent() == (1, len(texts) - 3, texts - each[0]), "no more than what is left"
    assert same(stored(cut), stored(whole)), "and that is enough for the same bits"
    real("sft", "--stage", "sft")
    count, calls, texts = spent()
    assert count == 1 and calls == len(texts) == 6 + 1 + 3, "sft draws two pictures a task"


def test_what_is_exported_draws_in_the_stock_pipeline_what_eval_draws(real, sd35, stock, spy):
    import sde

    drawn = spy(rollout, "draw")
    folder = real("run", "--lr", "0.05", "--steps", "2", "--eval-prompts", "2")

    def draw(prompts, seed):
        sources = [torch.Generator().manual_seed(data.seed_for("draw", seed, row)) for row in (0, 1)]
        noise = sde.standard_normal((2, 16, 8, 8), sources)
        return stock(
            [p.text for p in prompts], num_inference_steps=2, guidance_scale=4.5, height=64, width=64, latents=noise,
            max_sequence_length=16, output_type="latent",
        ).images  # fmt: skip

    assert len(drawn) == 3 and {call.args[4] for call in drawn} == {4.5}
    calls = [(call.args[1], call.args[3], call.result) for call in drawn]
    assert not any(close(draw(prompts, seed), latents, 1e-2) for prompts, seed, latents in calls), "the base does not"
    stock.load_lora_weights(adapters.last_checkpoint(folder))
    for prompts, seed, latents in calls:
        torch.testing.assert_close(draw(prompts, seed), latents, rtol=0, atol=1e-5)


def test_a_whole_student_is_exported_as_a_transformer_that_another_run_starts_from(real, updates):
    from diffusers import SD3Transformer2DModel

    folder = real("run", "--parameters", "full", "--lr", "0.01")
    exported = SD3Transformer2DModel.from_pretrained(adapters.last_checkpoint(folder) / "transformer")
    average = {name: p.detach() for name, p in exported.named_parameters()}
    state = stored(folder)
    assert same(average, {name: state[f"average.{name}"] for name in average})
    assert not same(average, {name: state[f"weights.{name}"] for name in average})
    real("next", "--parameters", "full", "--init", str(folder))
    assert same(updates[1].weights, list(average.values())), "a full checkpoint as a cold start"


def test_the_whole_pipeline_on_sd35_merges_distils_and_compares(real, sd35, capsys):
    flags = ["--stage", "all", "--teachers", f"quality={sd35.lora}", "--rewards", "jpeg=1"]
    folder = real("all", *flags)
    out = capsys.readouterr().out
    rows = [line.split(" | ")[0].removeprefix("| ") for line in out.splitlines() if line.startswith("| ")]
    assert rows == ["model", "base", *(f"teacher {t}" for t in TASKS), "merged", "sft", "opd student"]
    assert json.loads((folder.parent / "all-opd/config.json").read_text())["init"] == str(folder.parent / "all-merge")
    parts = sorted(p.name for p in folder.parent.iterdir())
    assert parts == ["all", "all-merge", "all-opd", "all-sft"], "base and teachers are published"
    real("dark", *flags, "--eval-prompts", "0")
    assert not (folder.parent / "dark").exists() and (folder.parent / "dark-opd/checkpoints").is_dir()


def test_teachers_that_cannot_be_merged_end_the_pipeline_before_it_trains(real, updates, capsys):
    folder = real("all", "--stage", "all", code=2)
    assert re.search(r"teacher-quality: a full checkpoint; --stage merge merges LoRA teachers", capsys.readouterr().err)
    assert not updates and not (folder.parent / "all-sft").exists()


# ------------------------------------------------------------- every stage on Qwen-Image-Edit's own classes
REAL_QWEN = {
    "grpo, t2i": ["--stage", "grpo", "--task", "t2i", "--rewards", "jpeg=1", "--advantage-std", "batch"],
    "grpo, edit": ["--stage", "grpo", "--task", "edit", "--rewards", "FILE", "--guidance", "both"],
    "grpo, mixed": ["--stage", "grpo", "--task", "mix", "--rewards", "jpeg=1", "--source-resolution", "32"],
    "nft, edit": ["--stage", "nft", "--task", "edit", "--rewards", "FILE"],
    "nft, all parameters": ["--stage", "nft", "--task", "mix", "--rewards", "jpeg=1", "--parameters", "full"],
    "sft": ["--stage", "sft"],
    "opd": ["--stage", "opd", "--prompts-per-step", "2"],
    "opd, all parameters": ["--stage", "opd", "--parameters", "full", "--estimator", "analytic"],
}


@pytest.mark.parametrize("stage", REAL_QWEN)
def test_every_stage_trains_qwen_image_edit_on_both_tasks(real2, monkeypatch, updates, stage):
    """Its own VAE, text encoder and templates, from disk; an edit's scorer gets the source of each picture."""
    seen = []

    def score(images, prompts, sources):
        assert len(sources) == len(images) and all(p.task == "edit" for p in prompts)
        seen.extend(zip(prompts, sources, strict=True))
        return [float(1 - (image - source).abs().mean()) for image, source in zip(images, sources, strict=True)]

    flags = REAL_QWEN[stage]
    if "FILE" in flags:
        like = rewards.Scorer("like", score, 0.0, 1.0)
        panel = scoring.Panel([like], {"edit": {"like": 1.0}})
        monkeypatch.setattr(scoring, "build", lambda *_: panel)
        flags = ["jpeg=1" if flag == "FILE" else flag for flag in flags]
    folder = real2("run", *flags, "--steps", "2", "--lr", "0.01", "--eval-prompts", "0")
    lines = metrics(folder)
    assert len(lines) == 2 and all(math.isfinite(value) for line in lines for value in line.values())
    assert len(updates) == 2 and all(flat(update.grads).norm() > 0 for update in updates)
    checkpoint, whole = adapters.last_checkpoint(folder), "--parameters" in flags
    assert adapters.kind(checkpoint) == ("full" if whole else "peft")
    assert (checkpoint / adapters.LORA_FILE).exists() != whole, "in diffusers' layout too"
    if "grpo" in stage:
        assert (lines[0]["ratio_mean"], lines[0]["ratio_std"]) == (1.0, 0.0)
    assert bool(seen) == ("edit" in stage)
    for prompt, source in seen:
        expected = torch.from_numpy(data.source_image(prompt).copy()).permute(2, 0, 1) / 255
        assert torch.equal(source, expected)


def test_qwens_plan_ends_in_an_evaluation_of_both_tasks(real2, qwen, capsys):
    """--stage all: teachers by GRPO, then OPD; a run without pictures to edit evaluates and plans what there is."""
    folder = real2("all", "--stage", "all", "--rewards", "jpeg=1")
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert table[0] == "| model | t2i jpeg | edit jpeg |"
    assert [line.split(" | ")[0] for line in table[1:]] == [f"| {name}" for name in QWEN_SHOWN]
    assert sorted(p.name for p in folder.parent.iterdir()) == ["all", "all-grpo-edit", "all-grpo-t2i", "all-opd"]
    flags = ["--stage", "grpo", "--task", "t2i", "--rewards", "jpeg=1", "--tasks", "t2i,edit"]
    drawn = qwen.flags[: qwen.flags.index("--prompts")]
    where = ["--out", str(folder.parent), "--name", "drawn", "--steps", "1"]
    assert train.main([*drawn, *where, *flags, "--prompts", f"t2i={qwen.prompts['t2i']}"]) == 0
    assert "t2i jpeg" in (out := capsys.readouterr().out) and "edit jpeg" not in out


# ------------------------------------------------------------------------------------------ one line for every mistake
def write(path, text):
    path.write_text(text)
    return str(path)


def copy_teacher(world, tmp_path, **changes):
    folder = Path(shutil.copytree(world.teachers["text"], tmp_path / "teacher"))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    return folder


def cut(file):
    file.write_bytes(file.read_bytes()[:100])
    return str(file.parent)


def other_base(world, tmp_path):
    model = models.new_tiny(1, width=32, layers=1)
    model.save_full(tmp_path / "other", model.transformer.state_dict())
    save_random_adapter(tmp_path / "other", tmp_path / "stranger", seed=0)
    return ["--teachers", f"text={tmp_path / 'stranger'}"]


GOOD = '{"tag": "colors", "include": [{"class": "circle", "count": 1}], "prompt": "a photo of a red circle"}\n'


# What went wrong -> (the flags that make it so, what the one line says).
MISTAKES = {
    "unknown flag": (lambda w, d: ["--grup-size", "4"], r"unknown flag --grup-size; did you mean --group-size\?"),
    "unknown value": (lambda w, d: ["--estimator", "magic"], r"--estimator magic: choose from literal, released"),
    "not a number": (lambda w, d: ["--lr", "fast"], r"--lr.*invalid float value: 'fast'"),
    "no prompt file": (lambda w, d: ["--prompts", f"text={d / 'no.txt'}"], r"no\.txt:0: cannot be read"),
    "broken prompt file": (
        lambda w, d: ["--prompts", "composition=" + write(d / "bad.jsonl", GOOD + "{oops\n")],
        r"bad\.jsonl:2: malformed JSON",
    ),
    "unknown word": (
        lambda w, d: ["--prompts", "quality=" + write(d / "w.txt", "a circle\n\na beautiful picture of a dragon\n")],
        r"w\.txt:3: the tiny world has no word 'dragon'; its vocabulary is: a photo",
    ),
    "unscorable prompt": (
        lambda w, d: ["--prompts", "composition=" + write(d / "w.txt", "a photo of a circle\n")],
        r"w\.txt:1: composition is scored by GenEval metadata; .* \.jsonl",
    ),
    "adapter of another rank": (
        lambda w, d: ["--teachers", f"text={copy_teacher(w, d, r=8)}"],
        r"lora_A\.weight is \(4, 32\), and .*base needs \(8, 32\)",
    ),
    "adapter of another base": (other_base, r"stranger/adapter_model\.safetensors: trained on another base \("),
    "broken adapter": (
        lambda w, d: ["--teachers", "text=" + cut(copy_teacher(w, d) / "adapter_model.safetensors")],
        r"adapter_model\.safetensors: not a readable safetensors file \(",
    ),
    "no teacher": (
        lambda w, d: ["--teachers", f"text={d / 'no'}"],
        r"/no: no such file or folder; give a path or a Hub id",
    ),
    "no base": (lambda w, d: ["--model", str(d / "no")], r"/no: no such file or folder; give a path or a Hub id"),
    "a folder that is no base": (
        lambda w, d: ["--model", str(w.teachers["text"])],
        r"teacher-text/text_encoder/model\.safetensors: missing.*--stage pretrain",
    ),
    "a base of SD3.5 in the tiny world": (
        lambda w, d: ["--model", str(write(d / "model_index.json", "{}")).removesuffix("/model_index.json")],
        r": a diffusers pipeline, not a base of the tiny world: leave --preset tiny out",
    ),
    "a full checkpoint where a LoRA starts": (
        lambda w, d: ["--init", str(w.base)],
        r"base: a full checkpoint: add --parameters full",
    ),
    "a full checkpoint to be merged": (
        lambda w, d: ["--stage", "merge", "--teachers", f"text={w.base}"],
        r"base: a full checkpoint; --stage merge merges LoRA teachers",
    ),
    "broken base": (
        lambda w, d: [
            "--model",
            str(Path(cut(shutil.copytree(w.base, d / "b") / "transformer/diffusion_pytorch_model.safetensors")).parent),
        ],
        r"b/transformer: not a readable transformer \(",
    ),
    "no cold start": (lambda w, d: ["--init", str(d / "no")], r"/no: no such file or folder; give a path or a Hub id"),
    "rewards for other prompts": (
        lambda w, d: [*GRPO[:4], "--rewards", write(d / "r.json", '{"weights": {"quality": {"quality": 1}}}')],
        r"tiny train text:1: no weights for the category 'text', and no 'default' ones",
    ),
    "no such reward": (
        lambda w, d: [*GRPO[:4], "--rewards", "geneval=0.8,pikscore=0.2"],
        r"--rewards pikscore=0\.2: no reward 'pikscore'; did you mean 'pickscore'\?",
    ),
    "a reward that needs a server": (
        lambda w, d: [*GRPO[:4], "--rewards", "judge"],
        r"--rewards judge: judge needs rubric, model, endpoints: write them to a \.json file",
    ),
    "cps without noise": (
        lambda w, d: ["--stage", "grpo", "--task", "text", "--kernel", "cps", "--window", "0:3"],
        r"--kernel cps has no noise in the last step: let --window stop at 2",
    ),
    "cps with too much noise": (
        lambda w, d: ["--stage", "grpo", "--task", "text", "--kernel", "cps", "--noise-level", "1.5"],
        r"--noise-level 1\.5: must be at most 1 with --kernel cps",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_that_names_it_and_exit_code_2(go, world, tmp_path, capsys, mistake):
    flags, expected = MISTAKES[mistake]
    go("run", *flags(world, tmp_path), code=2)
    assert re.search(expected, the_one_line(capsys))


def test_no_teacher_at_all_is_refused(world, tmp_path, capsys):
    config = write(tmp_path / "c.json", '{"teachers": {}}')
    assert train.main(["--stage", "opd", "--config", config]) == 2
    assert "--stage opd needs --teachers TASK=PATH, at least one" in the_one_line(capsys)


def test_sd35_without_an_accelerator_is_refused_before_anything_is_fetched(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(student, "locate_all", lambda s: pytest.fail("nothing may be fetched"))
    assert train.main(["--train-prompts", "12", "--out", str(tmp_path)]) == 2
    assert "run `python train.py --preset tiny --stage opd` here" in the_one_line(capsys)


def test_wandb_without_its_package_is_refused_before_anything_is_loaded(go, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runtime, "find_spec", lambda name: None)
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("nothing may be loaded"))
    for stage in ("opd", "all"):
        go("run", "--stage", stage, "--wandb", code=2)
        assert re.match(r"error: --wandb needs the extra 'wandb': pip install .*\[wandb\]'$", the_one_line(capsys))
    assert not list(tmp_path.iterdir())


def test_a_run_that_explodes_says_so(go, monkeypatch, capsys):
    monkeypatch.setattr(opd, "velocity_kl", lambda v, *_: (v * math.nan).mean((1, 2, 3)))
    folder = go("run", code=2)
    last = re.split(r"[\r\n]+", capsys.readouterr().err.strip())[-1]
    assert last.startswith("error: step 0: the gradient's norm is nan")
    assert adapters.last_checkpoint(folder) is None


def test_a_broken_checkpoint_and_a_taken_name_say_what_to_do(go, capsys):
    folder = go("run")
    capsys.readouterr()
    go("run", "--lr", "0.5", code=2)
    assert "was made with --lr 0.003, not 0.5: give another --name, or --no-resume" in the_one_line(capsys)
    (shard,) = (folder / "checkpoints/step-000001/training").iterdir()
    cut(shard)
    go("run", "--steps", "2", code=2)
    assert re.search(r"step-000001/training: cannot resume from it .*--no-resume", the_one_line(capsys))
    go("run", "--steps", "2", "--no-resume")
    assert stored(folder)["step"] == 2
