"""Oracles for the stages: gradients against autograd on a model of the test's own, who labels which row, what a
ratio is before the first update, noise that belongs to a row, the same bits after any interruption, every stage on
Stable Diffusion 3.5's own classes, and one line for every user's error.
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
from itertools import combinations, count
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from conftest import SMALL, TASKS, metrics, same, save_random_adapter, stored

import adapters
import data
import eval as evaluation
import flow
import grpo
import models
import opd
import report
import rewards
import runtime
import scoring
import settings
import tiny
import train
from runtime import Run

ROOT = Path(__file__).resolve().parents[1]
GRPO = ["--stage", "grpo", "--task", "text", "--rewards", "quality=1"]
EVERY_STAGE = {
    "pretrain": ["--stage", "pretrain"],
    "grpo": [*GRPO, "--micro-batch", "4"],
    "sft": ["--stage", "sft"],
    "opd": ["--stage", "opd"],
    "opd, all parameters": ["--stage", "opd", "--parameters", "full"],
}


@pytest.fixture
def small_pretraining(monkeypatch):
    real = models.new_tiny
    monkeypatch.setattr(models, "new_tiny", lambda seed, device: real(seed, width=32, layers=1, device=device))


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def weights(folder, kind="weights"):
    return flat([value for key, value in sorted(stored(folder).items()) if key.startswith(f"{kind}.")])


def with_adapter(world, folder):
    """A model of the test's own that runs as one adapter (and could train it)."""
    model = models.load_tiny(world.base)
    state, config = model.read_adapter(folder)
    model.add_adapter(flow.STUDENT, config, state)
    return model


def close(a, b, tolerance=1e-5):
    return torch.allclose(a, b, rtol=float(tolerance), atol=float(tolerance))


# --------------------------------------------------------------------------- interruption, resume, several ranks
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
    "stage, part, call, saved",
    [("opd", "distil_part", 7, 2), ("grpo", "guided", 7, 2), ("sft", "flow_matching", 3, 3)],
)
def test_sigterm_within_a_step_ends_in_good_order_and_with_the_same_bits(
    go, monkeypatch, capsys, stage, part, call, saved
):
    """In the first of three micro-batches of the third step; what it has added to the gradient is thrown away.

    sft, whose steps are short, finishes its step.
    """
    flags = [*EVERY_STAGE[stage], "--steps", "4", "--save-every", "9", "--micro-batch", "2"]
    whole, real, calls = go("whole", *flags), getattr(train, part), count(1)

    def told(*args):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, part, told)
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
import adapters, data, ranks, report, runtime, settings, train
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
        state = {{name: p.detach() for name, p in run.parameters.items()}}
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


# ----------------------------------------------------------------------------------------- distillation (opd)
def test_the_gradient_of_opd_is_eq_9_plus_lambda_eq_12_by_autograd(go, spy, updates, world):
    """Over samples and trained steps a mean; the states, targets and first weights are those that the run had."""
    learnt, rows, start = spy(train, "learn"), spy(train, "rows_of"), world.teachers["text"]
    go("run", "--mar", "0.5", "--init", str(start))
    student = with_adapter(world, start)
    trained = list(student.trainable().values())
    assert same([p.data for p in trained], updates[0].weights), "--init is where it starts"
    cond = student.encode([row.prompt.text for row in rows[0].result])
    loss, dt = 0.0, 1 / 3  # the grid is 1, 2/3, 1/3, 0
    for call, t in zip(learnt, (1.0, 2 / 3), strict=True):
        step, v_target, v_anchor = call.args[1], call.args[3], call.args[4]
        sigma = 0.7 * math.sqrt(t / (1 - t if t < 1 else dt))
        weight = dt / 2 * (sigma * (1 - t) / (2 * t) + 1 / sigma) ** 2
        v = student.velocity(step.x, t, cond)
        gap_B = ((v - v_target) ** 2).sum((1, 2, 3)) + 0.5 * ((v - v_anchor) ** 2).sum((1, 2, 3))
        loss = loss + weight * gap_B.mean() / 2
    expected = flat(torch.autograd.grad(loss, trained))
    assert expected.norm() > 1e-3
    assert close(flat(updates[0].grads), expected, 1e-4 * expected.abs().max())


@pytest.mark.parametrize(
    "flags",
    [[], ["--cfg", "2"], ["--no-single-pass"], ["--parameters", "full"]],
    ids=["plain", "guided", "stored", "all parameters"],
)
def test_each_row_is_labelled_by_the_teacher_of_its_task_and_all_by_the_anchor(go, spy, world, flags):
    learnt, drawn = spy(train, "learn"), spy(train, "rows_of")
    go("run", "--anchor", "text", *flags)
    rows, cfg = [row.prompt for row in drawn[0].result], 2.0 if "--cfg" in flags else 1.0
    assert [p.task for p in rows] == ["composition"] * 2 + ["text"] * 2 + ["quality"] * 2
    for task, folder in world.teachers.items():
        teacher = with_adapter(world, folder)
        mine = [i for i, p in enumerate(rows) if p.task == task]
        cond, uncond = evaluation.conditions(teacher, [p.text for p in rows], cfg)
        for call in learnt:
            step, v_target, v_anchor = call.args[1], call.args[3], call.args[4]
            with torch.no_grad():
                v = teacher.velocity(step.x, step.t, cond, uncond, cfg)
            assert close(v_target[mine], v[mine], 1e-4)
            assert close(v_anchor, v, 1e-4) == (task == "text")


def test_opd_is_on_policy_the_states_are_the_students_own(go, spy, world):
    learnt, rows, start = spy(train, "learn"), spy(train, "rows_of"), world.teachers["text"]
    go("run", "--init", str(start))
    first, second = (call.args[1] for call in learnt)
    student = with_adapter(world, start)
    cond = student.encode([row.prompt.text for row in rows[0].result])
    for step in (first, second):
        assert close(step.v.detach(), student.velocity(step.x, step.t, cond).detach())
    assert torch.equal(first.x_next, second.x)
    learnt.clear()
    go("other", "--init", str(world.teachers["quality"]))
    assert torch.equal(learnt[0].args[1].x, first.x), "the same noise"
    assert not close(learnt[1].args[1].x, second.x, 1e-3), "another student, other states"


def test_one_pass_and_a_stored_trajectory_give_one_gradient(go, updates):
    # The same forward at the same states; only the moment of backward differs.
    runs = [go(f"run{flag}", flag, "--steps", "2") for flag in ("--single-pass", "--no-single-pass")]
    for one, two in ((updates[0], updates[2]), (updates[1], updates[3])):
        assert flat(one.grads).norm() > 0
        assert close(flat(one.grads), flat(two.grads), 1e-5 * flat(one.grads).abs().max())
    assert close(weights(runs[0]), weights(runs[1]))


def test_every_estimator_trains_the_student_in_its_own_way(go, spy, updates):
    found, learnt = {}, spy(train, "learn")
    for estimator in opd.ESTIMATORS:
        folder = go(estimator, "--estimator", estimator, "--log-prob", "sum")
        found[estimator] = flat(updates[-1].grads)
        assert not torch.equal(weights(folder), flat(updates[-1].weights)), estimator
        sigmas = [call.args[1].sigma for call in learnt]
        assert len(sigmas) == 2 and all((sigma == 0) == (estimator == "velocity") for sigma in sigmas)
        keys = {"step", "loss", "gap", "mar", "grad_norm"} | ({"kl"} if estimator != "velocity" else set())
        assert set(metrics(folder)[0]) == keys
        learnt.clear()
    for a, b in combinations(found, 2):
        assert not close(found[a], found[b], 1e-3 * found[a].abs().max()), f"{a} and {b} are one"


def test_velocity_trains_every_step_of_the_ode(go, spy):
    learnt = spy(train, "learn")
    go("run", "--estimator", "velocity", "--train-steps", "all")
    assert [(call.args[1].index, call.args[1].sigma) for call in learnt] == [(0, 0.0), (1, 0.0), (2, 0.0)]
    assert [call.args[6] for call in learnt] == [1 / 18] * 3, "the mean is over three steps of six rows"


def test_anchor_regularisation_adds_lambda_times_its_own_gradient(go, updates, world):
    start = ["--init", str(world.teachers["text"])]
    for mar in ("0", "1", "3"):
        go(f"mar{mar}", "--mar", mar, *start)
    none, one, three = (flat(update.grads) for update in updates)
    assert (one - none).norm() > 1e-2 * none.norm()
    assert close(three - none, 3 * (one - none), 1e-4 * three.abs().max()), "linear in lambda"
    go("path", "--mar", "1", *start, "--anchor", str(world.teachers["quality"]))
    assert close(flat(updates[3].grads), one, 1e-5 * one.abs().max()), "the default anchor, now by its path"
    go("other", "--mar", "1", *start, "--anchor", str(world.teachers["text"]))
    # The student is that anchor: zero gap, zero gradient.
    assert close(flat(updates[4].grads), none, 1e-5 * none.abs().max())


def test_without_regularisation_no_anchor_is_read(go, tmp_path, capsys):
    go("off", "--mar", "0", "--anchor", str(tmp_path / "nowhere"))
    capsys.readouterr()
    go("on", "--mar", "0.02", "--anchor", str(tmp_path / "nowhere"), code=2)
    assert "nowhere: no such file or folder; give a path or a Hub id" in capsys.readouterr().err


def test_distillation_never_asks_for_a_reward(go, monkeypatch):
    def forbidden(*_):
        raise AssertionError("a reward was computed")

    real = evaluation.evaluate
    monkeypatch.setattr(scoring, "build", forbidden)
    # The scorers belong to the evaluation at the end alone.
    scorers = dict(tiny.SCORERS)
    monkeypatch.setattr(tiny, "SCORERS", {name: forbidden for name in scorers})

    def evaluate(*args):
        monkeypatch.setattr(tiny, "SCORERS", scorers)
        return real(*args)

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    folder = go("run", "--steps", "2", "--eval-prompts", "2")
    assert "average" in (folder / "report.md").read_text()


# ------------------------------------------------------------------------------------------------ teachers (grpo)
def test_the_gradient_of_grpo_is_the_policy_gradient_by_autograd(go, spy, updates, world):
    """At ratio 1 the clip is silent: -mean_b A_b grad log pi, with F Eq. 5-6 and Q Eq. 4 written out here."""
    rollouts, rows, start = spy(train, "roll_out"), spy(train, "rows_of"), world.teachers["text"]
    go("run", *GRPO, "--init", str(start))
    ((part,), images), student = rollouts[0].result, with_adapter(world, start)
    trained, scores = list(student.trainable().values()), tiny.quality(images).double().reshape(3, 2)
    assert scores.std() > 1e-4, "or the gradient below is zero on both sides"
    advantage_B = ((scores - scores.mean(1, keepdim=True)) / scores.std(correction=0)).flatten().float()
    cond = student.encode([row.prompt.text for row in rows[0].result])
    loss, dt = 0.0, 1 / 3
    for step, t in zip(part["path"][:2], (1.0, 2 / 3)):
        sigma = 0.7 * math.sqrt(t / (1 - t if t < 1 else dt))
        v = student.velocity(step.x, t, cond)
        mean = step.x - (v + sigma**2 / (2 * t) * (step.x + (1 - t) * v)) * dt
        log_prob_B = -((step.x_next - mean) ** 2 / (2 * sigma**2 * dt)).mean((1, 2, 3))
        loss = loss - (advantage_B * log_prob_B).mean() / 2
    expected = flat(torch.autograd.grad(loss, trained))
    assert expected.norm() > 1e-6
    assert close(flat(updates[0].grads), expected, 1e-3 * expected.abs().max())


@pytest.mark.parametrize("kernel", ["sde", "cps"])
def test_the_first_ratio_is_exactly_one_and_only_the_first(go, spy, kernel):
    losses = spy(grpo, "policy_loss")
    flags = [*GRPO, "--prompts-per-step", "4", "--kernel", kernel, "--warmup", "0"]
    one = go("one", *flags)
    line = metrics(one)[0]
    assert (line["ratio_mean"], line["ratio_std"], line["clip_fraction"]) == (1.0, 0.0, 0.0)
    assert len(losses) == 2 and all(torch.equal(call.args[0], call.args[1]) for call in losses), "bit for bit"
    losses.clear()
    two = go("two", *flags, "--updates", "2")
    equal = [torch.equal(call.args[0], call.args[1]) for call in losses]
    assert equal == [True, True, False, False], "each update has its own prompts, the second an older policy"
    assert all(len(call.args[0]) == 4 for call in losses), "half the prompts, two samples each"
    assert metrics(two)[0]["ratio_std"] > 0
    losses.clear()
    cut = go("cut", *flags, "--updates", "2", "--micro-batch", "3")
    equal = [(len(call.args[0]), torch.equal(call.args[0], call.args[1])) for call in losses]
    assert equal == [(3, True)] * 2 + [(1, True)] * 2 + [(3, False)] * 2 + [(1, False)] * 2, "in micro-batches too"
    assert metrics(cut)[0] == pytest.approx(metrics(two)[0], rel=1e-3, abs=1e-6)


def test_guard_and_kl_and_kernel_each_change_what_is_learnt(go, updates):
    plain = [*GRPO, "--steps", "2", "--warmup", "0", "--lr", "0.01"]
    variants = {"none": [], "guard": ["--guard"], "kl": ["--beta", "0.1"], "cps": ["--kernel", "cps"]}
    learnt = {name: weights(go(name, *plain, *flags)) for name, flags in variants.items()}
    for a, b in combinations(learnt, 2):
        assert not torch.equal(learnt[a], learnt[b]), f"{a} and {b} are one"
    grads = dict(zip(variants, (flat(update.grads) for update in updates[::2]), strict=True))
    assert torch.equal(grads["kl"], grads["none"]), "at its start the student is the base: no KL, no gradient of it"
    assert not torch.equal(flat(updates[5].grads), flat(updates[1].grads)), "from the second step on there is"


def test_grpo_mix_visits_its_tasks_three_to_one_to_one(go, spy):
    rows = spy(train, "rows_of")
    lines = metrics(go("run", "--stage", "grpo", "--task", "mix", "--steps", "6"))
    tasks = [{row.prompt.task for row in call.result} for call in rows]
    assert tasks == [{"composition"}, {"composition"}, {"composition"}, {"text"}, {"quality"}, {"composition"}]
    # Each task with the reward of its own teacher (F App. A).
    asked = [{key.removeprefix("reward/") for key in line if key.startswith("reward/")} for line in lines]
    assert asked == [{"task"}] * 4 + [{"quality", "preference"}, {"task"}], "what is not asked has no number"
    blend = lines[4]
    assert blend["reward"] == pytest.approx(0.4 * blend["reward/quality"] + 0.6 * blend["reward/preference"], rel=1e-4)
    assert all(line["reward"] == line["reward/task"] for line in lines[:4])


def test_each_teacher_trains_on_the_prompts_of_its_task(go, spy):
    rows = spy(train, "rows_of")
    for task in TASKS:
        go(task, "--stage", "grpo", "--task", task)
    assert [[row.prompt.task for row in call.result] for call in rows] == [[task] * 6 for task in TASKS]


def test_the_trained_steps_lie_in_the_stochastic_window():
    def steps(seed=0, **changes):
        generator = torch.Generator().manual_seed(seed)
        s = settings.resolve({"preset": "tiny", "num_steps": 6, **changes})
        return train.trained_steps(SimpleNamespace(s=s, generator=lambda *_: generator))

    assert steps(window="2:5", train_steps="all") == [2, 3, 4]
    assert steps(window="2:5", train_steps="first", train_count=2) == [2, 3]
    assert steps(window="2:5", train_steps="first", train_count=9) == [2, 3, 4], "not more than there are"
    drawn = {tuple(steps(seed, window="1:5", train_steps="random", train_count=2)) for seed in range(200)}
    assert drawn == set(combinations((1, 2, 3, 4), 2)), "every pair of the window comes, and no other"
    assert steps(window="2:5", train_steps="all", estimator="velocity") == [0, 1, 2, 3, 4, 5]
    assert steps(window="2:5", train_steps="all", estimator="velocity", stage="grpo", task="text") == [2, 3, 4]


# ------------------------------------------------------------------------------- rows, micro-batches and ranks
def share(rank=0, world=1, step=0, **changes):
    """The rows of one rank's step, as train.rows_of draws them from twelve prompts a task."""
    s = settings.resolve({"preset": "tiny", "prompts_per_step": 3, "group_size": 2, **changes})
    prompts = {task: tiny.make_prompts(task, "train", 12) for task in TASKS}
    run = SimpleNamespace(s=s, rank=rank, world=world)
    return train.rows_of(run, prompts if s.stage != "grpo" or s.task == "mix" else {s.task: prompts[s.task]}, step)


def test_a_batch_is_shared_evenly_and_the_first_tasks_take_the_rest():
    for size, sizes in ((5, [2, 2, 1]), (3, [1, 1, 1]), (2, [1, 1, 0]), (1, [1, 0, 0])):
        tasks = [row.prompt.task for row in share(stage="sft", prompts_per_step=size)]
        assert [tasks.count(task) for task in TASKS] == [2 * n for n in sizes]
        assert tasks == sorted(tasks, key=TASKS.index), "task by task: a micro-batch mostly has one teacher"
    rows = share(group_size=3)
    assert [row.prompt for row in rows[::3]] == [row.prompt for row in rows[2::3]], "a group's rows side by side"
    assert len({row.seed for row in rows}) == 9, "and each with noise of its own"


@pytest.mark.parametrize("changes", [{}, {"stage": "grpo", "task": "text"}, {"stage": "grpo", "task": "mix"}])
@pytest.mark.parametrize("step", [0, 4])
def test_two_ranks_with_half_the_prompts_draw_together_what_one_draws(changes, step):
    changes = {"updates": 1, **changes}
    alone = share(step=step, prompts_per_step=6, **changes)
    halves = [share(rank, 2, step, prompts_per_step=3, **changes) for rank in (0, 1)]
    assert len(alone) == len(set(alone_ := [(row.prompt.text, row.seed) for row in alone])) == 12
    both = [(row.prompt.text, row.seed) for half in halves for row in half]
    assert sorted(both) == sorted(alone_)
    assert not {text for text, _ in both[:6]} & {text for text, _ in both[6:]}, "a prompt's group lives on one rank"


def test_the_noise_of_a_row_is_named_by_what_it_is_for_and_by_nothing_else():
    base = share()
    seeds = {row.seed for row in base}
    for other in ({"step": 1}, {"seed": 1}, {"stage": "grpo", "task": "text", "updates": 1}):
        drawn = {row.seed for row in share(**other)}
        assert len(drawn) == 6 and not drawn & seeds
        seeds |= drawn
    expected = [data.seed_for("row", 0, "opd", "", 0, task, 0, g) for task in TASKS for g in (0, 1)]
    assert [row.seed for row in base] == expected
    same_rows = share(micro_batch=2, num_steps=3, window="0:2", lr=0.5, cfg=3.0, rank=0)
    assert same_rows == base
    a, b = (row.source() for row in base[:2])
    again = base[0].source()
    assert torch.equal(x := torch.randn(3, generator=a), torch.randn(3, generator=again)), "fresh each time"
    assert not torch.equal(x, torch.randn(3, generator=b))


def states(calls):
    """x and x_next of all rows, in their order, at each trained step: {index: (x, x_next)}."""
    steps = {call.args[1].index: [] for call in calls}
    for call in calls:
        steps[call.args[1].index].append(call.args[1])
    return {n: (torch.cat([p.x for p in parts]), torch.cat([p.x_next for p in parts])) for n, parts in steps.items()}


@pytest.mark.parametrize(
    "flags",
    [EVERY_STAGE["opd"], ["--no-single-pass"], ["--estimator", "path"], ["--cfg", "2"], [*GRPO, "--beta", "0.1"]],
    ids=["opd", "stored", "path", "guided", "grpo"],
)
def test_micro_batches_change_neither_the_noise_nor_the_gradient(go, spy, updates, world, flags):
    calls, found = spy(train, "policy_step" if flags[:2] == GRPO[:2] else "learn"), []
    for size in (0, 1, 4, 6):
        folder = go(f"of{size}", *flags, "--micro-batch", str(size), "--init", str(world.teachers["text"]))
        found.append((states(calls), flat(updates[-1].grads), metrics(folder)[0]))
        assert len(calls) == 2 * -(-6 // (size or 6)), "two trained steps"
        calls.clear()
    whole, gradient, line = found[0]
    assert gradient.norm() > 0
    for path, grads, metric in found[1:]:
        assert torch.equal(path[0][0], whole[0][0]), "the noise that a trajectory begins with, to the bit"
        for n in whole:
            assert close(path[n][0], whole[n][0]) and close(path[n][1], whole[n][1]), "and along it"
        assert (grads - gradient).abs().max() < 2e-6 * gradient.abs().max(), "float32's rounding, no more"
        assert metric == pytest.approx(line, rel=1e-3, abs=1e-6)


def test_micro_batches_of_flow_matching_change_neither_noise_nor_gradient(go, spy, updates):
    calls, grads = spy(train, "flow_matching"), []
    for size in (0, 2, 3):
        go(f"of{size}", "--stage", "sft", "--micro-batch", str(size))
        grads.append(flat(updates[-1].grads))
    for call, gradient in zip(calls, grads, strict=True):
        assert torch.equal(call.args[2], calls[0].args[2]), "the same times"
        assert close(gradient, grads[0], 1e-6) and gradient.norm() > 0
        assert call.result == pytest.approx(calls[0].result, rel=1e-5)


# -------------------------------------------------------------------------------------------------- cold starts
def test_sft_learns_the_pictures_of_each_tasks_own_teacher(go, spy, world):
    drawn, sampled = spy(evaluation, "draw"), spy(train, "flow_matching")
    go("run", "--stage", "sft")
    calls = list(drawn)
    for call, task in zip(calls, TASKS, strict=True):
        prompts, s, seed = call.args[1:4]
        assert len(prompts) == 2 and {p.task for p in prompts} == {task}
        teacher = with_adapter(world, world.teachers[task])
        assert close(call.result, evaluation.draw(teacher, prompts, s, seed))
    latents = torch.cat([call.result for call in calls])
    x0 = sampled[0].args[1]
    assert x0.shape == (3, 3, 24, 24)
    assert all(any(torch.equal(row, one) for one in latents) for row in x0), "the latents themselves"


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


# -------------------------------------------------------------------------------------------------- whole plans
def test_the_whole_pipeline_runs_from_nothing_and_a_second_call_trains_nothing(
    tmp_path, monkeypatch, small_pretraining, updates, capsys
):
    flags = [*SMALL, "--stage", "all", "--out", str(tmp_path), "--name", "all", "--steps", "2"]
    assert train.main(flags) == 0
    out = capsys.readouterr().out
    rows = [line.split(" | ")[0].removeprefix("| ") for line in out.splitlines() if line.startswith("| ")]
    shown = ["base", *(f"teacher {t}" for t in TASKS), "sft", "merged", "opd student"]
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


def test_grpo_without_a_task_trains_the_three_teachers_in_turn(go, tmp_path):
    go("all", "--stage", "grpo")
    assert sorted(p.name for p in tmp_path.glob("all*")) == [f"all-{t}" for t in sorted(TASKS)]


def test_a_dry_run_prints_its_settings_and_touches_nothing(go, tmp_path, capsys):
    go("run", "--dry-run", "--model", "/nowhere", "--lr", "0.25")
    out = capsys.readouterr().out
    printed, end = json.JSONDecoder().raw_decode(out)
    assert printed["lr"] == 0.25 and printed["stage"] == "opd" and not list(tmp_path.iterdir())
    assert "1 of composition, 1 of text, 1 of quality" in out[end:], "and what they amount to"


# ------------------------------------------------------------------- every stage on Stable Diffusion 3.5's classes
@pytest.fixture
def stock(sd35):
    """The stock pipeline of the base, as a user loads it."""
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(sd35.base)
    pipe.set_progress_bar_config(disable=True)
    return pipe


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


def test_sd35s_rows_are_labelled_by_their_own_teacher_whatever_its_kind(real, sd35, stock, spy):
    """Stock diffusers and PEFT read each teacher and compute the two branches of guidance; F Eq. 7 and 12."""
    from diffusers import SD3Transformer2DModel
    from peft import PeftModel

    learnt, drawn = spy(train, "learn"), spy(train, "rows_of")
    real("run")
    rows, calls = drawn[0].result, [call.args[1:5] for call in learnt]
    assert len(calls) == 2 * 2, "two micro-batches of three rows, two trained steps"
    texts = [row.prompt.text for row in rows]
    with torch.no_grad():
        v, empty, pooled, no_pooled = stock.encode_prompt(texts, None, None, max_sequence_length=16)

    def velocity(transformer, x, t, i):
        def branch(tokens, pooled):
            at = torch.full((3,), t * 1000)
            return transformer(x, tokens, pooled, at, return_dict=False)[0]

        with torch.no_grad():
            away, toward = branch(empty[i], no_pooled[i]), branch(v[i], pooled[i])
        return away + 4.5 * (toward - away)

    def fresh():
        return SD3Transformer2DModel.from_pretrained(sd35.base / "transformer")

    whole = SD3Transformer2DModel.from_pretrained(sd35.teachers["quality"] / "transformer")
    stock.load_lora_weights(sd35.teachers["text"])
    teachers = {
        "composition": PeftModel.from_pretrained(fresh(), sd35.teachers["composition"]),
        "text": stock.transformer,
        "quality": whole,
    }
    base = fresh()
    for number, (step, v_student, v_target, v_anchor) in enumerate(calls):
        i = slice(0, 3) if number < 2 else slice(3, 6)
        assert close(v_student.detach(), velocity(base, step.x, step.t, i), 1e-4), "the student begins as the base"
        assert close(v_anchor, velocity(whole, step.x, step.t, i), 1e-4), "the anchor answers for every row"
        for row, task in enumerate([row.prompt.task for row in rows[i]]):
            for name, teacher in teachers.items():
                expected = velocity(teacher, step.x, step.t, i)[row]
                assert close(v_target[row], expected, 1e-4) == (name == task), (name, task)


def test_sd35_is_distilled_without_a_vae_and_without_a_reward(real, monkeypatch, updates):
    events = []

    def watched(owner, name):
        real = getattr(owner, name)

        def call(*args, **kwargs):
            events.append((name, len(updates)))
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    for owner, name in ((models.SD35Model, "decode"), (models.AutoencoderKL, "from_pretrained")):
        watched(owner, name)
    for owner, name in ((scoring, "build"), (rewards, "score_jpeg")):
        watched(owner, name)
    real("scored", "--steps", "2", "--rewards", "jpeg=1")
    names = [name for name, _ in events]
    assert names.count("decode") == 3 and names.count("from_pretrained") == names.count("build") == 1
    assert names.count("score_jpeg") == 1 + 3, "the self-test, and a test prompt a task"
    assert {steps for _, steps in events} == {2}, "the evaluation's: after the last step"
    events.clear()
    real("unscored", "--steps", "2", "--eval-prompts", "0")
    assert not events and len(updates) == 4


def test_each_prompt_is_encoded_once_and_a_continued_run_encodes_what_is_left(real, monkeypatch, spy):
    opened, encoded, read = [], [], models._read_text_encoders

    def counted(*args):
        pipe = read(*args)
        real = pipe.encode_prompt

        def encode_prompt(prompt, *more, **kwargs):
            encoded.append(prompt)
            return real(prompt, *more, **kwargs)

        pipe.encode_prompt = encode_prompt
        opened.append(pipe)
        return pipe

    monkeypatch.setattr(models, "_read_text_encoders", counted)
    rows, flags = spy(train, "rows_of"), ["--steps", "3", "--save-every", "1", "--window", "0:1", "--mar", "0"]

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

    drawn = spy(evaluation, "draw")
    folder = real("run", "--lr", "0.05", "--steps", "2", "--eval-prompts", "2")

    def draw(prompts, seed):
        sources = [torch.Generator().manual_seed(data.seed_for("draw", seed, row)) for row in (0, 1)]
        noise = sde.standard_normal((2, 16, 8, 8), sources)
        return stock(
            [p.text for p in prompts], num_inference_steps=2, guidance_scale=4.5, height=64, width=64, latents=noise,
            max_sequence_length=16, output_type="latent",
        ).images  # fmt: skip

    assert len(drawn) == 3
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
    assert rows == ["model", "base", *(f"teacher {t}" for t in TASKS), "sft", "merged", "opd student"]
    assert json.loads((folder.parent / "all-opd/config.json").read_text())["init"] == str(folder.parent / "all-merge")
    parts = sorted(p.name for p in folder.parent.iterdir())
    assert parts == ["all", "all-merge", "all-opd", "all-sft"], "base and teachers are published"
    real("dark", *flags, "--eval-prompts", "0")
    assert not (folder.parent / "dark").exists() and (folder.parent / "dark-opd/checkpoints").is_dir()


def test_teachers_that_cannot_be_merged_end_the_pipeline_before_it_trains(real, updates, capsys):
    folder = real("all", "--stage", "all", code=2)
    assert re.search(r"teacher-quality: a full checkpoint; --stage merge merges LoRA teachers", capsys.readouterr().err)
    assert not updates and not (folder.parent / "all-sft").exists()


# ------------------------------------------------------------------------------------- one line for every mistake
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


def the_one_line(capsys):
    """What a user reads: a single line that begins "error:", and no stack."""
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    return err


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
    monkeypatch.setattr(evaluation, "locate_all", lambda s: pytest.fail("nothing may be fetched"))
    assert train.main(["--train-prompts", "12", "--out", str(tmp_path)]) == 2
    assert "run `python train.py --preset tiny --stage opd` here" in the_one_line(capsys)


def test_wandb_without_its_package_is_refused_before_anything_is_loaded(go, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runtime, "find_spec", lambda name: None)
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("nothing may be loaded"))
    for stage in ("opd", "all"):
        go("run", "--stage", stage, "--wandb", code=2)
        assert re.match(r"error: --wandb needs the extra 'wandb': pip install .*\[wandb\]'$", the_one_line(capsys))
    assert not list(tmp_path.iterdir())


def test_a_reward_that_is_not_a_number_ends_the_run_before_it_reaches_the_weights(go, monkeypatch, capsys, updates):
    monkeypatch.setitem(tiny.SCORERS, "quality", lambda images, prompts: [0.5] * (len(images) - 1) + [math.nan])
    go("run", "--stage", "grpo", "--task", "quality", "--rewards", "quality=1", code=2)
    last = re.split(r"[\r\n]+", capsys.readouterr().err.strip())[-1]
    assert re.match(r"error: scorer 'quality': nan is not finite, for the prompt '.+'$", last)
    assert not updates


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
