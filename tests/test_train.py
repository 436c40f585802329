"""Oracles for the stages: gradients against autograd on a model of the test's own, who labels which row, what a
ratio is before the first update, the same bits after any interruption, and one line for every user's error.
"""

import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from conftest import SMALL, TASKS, same, save_random_adapter

import eval as evaluation
import grpo
import models
import opd
import runtime
import settings
import tiny
import train
from runtime import Run

ROOT = Path(__file__).resolve().parents[1]
EVERY_STAGE = {"pretrain": [], "grpo": ["--task", "text", "--rewards", "quality=1"], "sft": [], "opd": []}


@pytest.fixture
def no_pictures(monkeypatch):
    """Grids and curves take longer than such small runs do; test_the_whole_pipeline draws them."""
    monkeypatch.setattr(runtime, "plot_metrics", lambda folder: [])
    monkeypatch.setattr(evaluation, "save_samples", lambda *args: None)


@pytest.fixture
def go(world, tmp_path, no_pictures):
    """go(NAME, flags...): one call of train.py on the small world -> the run's folder."""

    def go(name, *flags, code=0):
        assert train.main([*world.flags, "--out", str(tmp_path), "--name", name, "--steps", "1", *flags]) == code
        return tmp_path / name

    return go


@pytest.fixture
def spy(monkeypatch):
    """spy(owner, name): the calls of a function from now on, each with `args` and `result`."""

    def spy(owner, name):
        calls, real = [], getattr(owner, name)

        def wrapped(*args, **kwargs):
            result = real(*args, **kwargs)
            calls.append(SimpleNamespace(args=args, kwargs=kwargs, result=result))
            return result

        monkeypatch.setattr(owner, name, wrapped)
        return calls

    return spy


@pytest.fixture
def updates(monkeypatch):
    """What every optimizer update found: the weights before it, and their gradients."""
    found, real = [], Run.update

    def update(run):
        weights = [p.detach().clone() for p in run.parameters]
        found.append(SimpleNamespace(weights=weights, grads=[p.grad.clone() for p in run.parameters]))
        return real(run)

    monkeypatch.setattr(Run, "update", update)
    return found


@pytest.fixture
def small_pretraining(monkeypatch):
    real = models.new_tiny
    monkeypatch.setattr(models, "new_tiny", lambda seed: real(seed, width=32, layers=1))


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def training(folder):
    return torch.load(runtime.last_checkpoint(folder) / "training.pt", weights_only=True)


def weights(folder):
    return flat(training(folder)["weights"])


def metrics(folder, drop=("seconds",)):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in drop} for line in lines]


def with_adapter(world, folder):
    """A model of the test's own that runs as one adapter (and could train it)."""
    model = models.load_tiny(world.base)
    state, config = models.load_adapter(folder, model)
    model.add_adapter(models.STUDENT, config, state)
    return model


def close(a, b, tolerance=1e-5):
    return torch.allclose(a, b, rtol=float(tolerance), atol=float(tolerance))


# --------------------------------------------------------------------------- interruption, resume, several ranks
@pytest.mark.parametrize("stage", EVERY_STAGE)
def test_an_interrupted_run_ends_with_the_bits_of_an_uninterrupted_one(
    go, monkeypatch, capsys, small_pretraining, stage
):
    flags = ["--stage", stage, *EVERY_STAGE[stage], "--steps", "4", "--save-every", "2"]
    whole, real = go("whole", *flags), Run.log

    def interrupted(run, found):
        real(run, found)
        if run.step == 2:  # the third step is done and logged, but not saved
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", interrupted)
        go("cut", *flags, code=130)
    assert "interrupted: repeat the command to continue" in capsys.readouterr().err
    cut = go("cut", *flags)
    assert "cut: continues from" in capsys.readouterr().err
    state = training(whole)
    assert state["step"] == 4 and state["optimizer"][0]["state"][0]["step"] == 4
    assert same(training(cut), state), "weights, averaged weights, optimizer, step"
    assert [line["step"] for line in metrics(cut)] == [1, 2, 3, 4]
    assert metrics(cut) == metrics(whole)
    for file in runtime.last_checkpoint(whole).rglob("*.safetensors"):
        other = runtime.last_checkpoint(cut) / file.relative_to(runtime.last_checkpoint(whole))
        assert same(safetensors.torch.load_file(file), safetensors.torch.load_file(other))
    moved = flat(state["weights"]) != flat(state["average"])
    assert moved.any(), "the average is not the weights"


# Imports once, then forks a child for every attempt: a real process that a real SIGKILL ends.
KILLER = """
import json, os, random, signal, sys, time, traceback
from pathlib import Path
sys.path.insert(0, {root!r})
import torch.utils.tensorboard
import eval as evaluation, runtime, train
runtime.plot_metrics, evaluation.save_samples = lambda folder: [], lambda *args: None
flags, out = json.loads(sys.argv[1]), Path(sys.argv[2])

def start(name):
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.dup2(os.open(out / (name + ".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        code = train.main([*flags, "--out", str(out), "--name", name])
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)

began = time.time()
assert os.waitpid(start("whole"), 0)[1] == 0
wall, rng, kills = time.time() - began, random.Random(0), 0
for attempt in range(40):
    before, began = runtime.last_checkpoint(out / "killed"), time.time()
    pid = start("killed")
    delay = rng.random() * wall / 2
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        new = runtime.last_checkpoint(out / "killed") != before
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
assert os.waitpid(start("killed"), 0)[1] == 0
print(kills)
"""


def test_training_stays_off_the_network_and_says_nothing_but_progress(go, monkeypatch, recwarn, capsys):
    def forbidden(*address):
        raise AssertionError(f"a connection to {address}")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, forbidden)
    go("run", "--steps", "2", "--save-every", "1")
    assert [str(w.message) for w in recwarn] == [], "no warning stands between a user and an error"
    assert re.fullmatch(r"(\s*run: [^\r\n]*)+\s*", capsys.readouterr().err)


def test_a_run_killed_at_random_instants_ends_with_the_bits_of_one_that_was_left_alone(world, tmp_path):
    flags = [*world.flags, "--steps", "24", "--save-every", "1"]
    code = KILLER.format(root=str(ROOT))
    command = [sys.executable, "-c", code, json.dumps(flags), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[-1]) >= 4, "the first four attempts die right after a checkpoint"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert training(whole)["step"] == 24 and same(training(killed), training(whole))
    assert metrics(killed) == metrics(whole) and len(metrics(whole)) == 24
    names = sorted(p.name for p in (killed / "checkpoints").iterdir())
    assert names == ["step-000023", "step-000024"], "nothing half-written is left"


# Under torchrun: the script itself, with what each rank saw written down.
RANKS = """
import json, runpy, sys
from pathlib import Path
sys.path.insert(0, {root!r})
import torch
import data, eval as evaluation, runtime
runtime.plot_metrics, evaluation.save_samples = lambda folder: [], lambda *args: None
out, (rank, world) = Path(sys.argv[2]), runtime.start(1)
seen = {{"prompts": [], "metrics": []}}
prompt_batch, log, save = data.prompt_batch, runtime.Run.log, runtime.Run.save

def spied_batch(*args):
    batch = prompt_batch(*args)
    seen["prompts"].append([p.text for p in batch])
    return batch

def spied_log(run, metrics):
    seen["metrics"].append(dict(metrics))
    log(run, metrics)

def spied_save(run):
    save(run)
    torch.save([p.detach() for p in run.parameters], out / f"{{run.s.name}}-{{rank}}.pt")

data.prompt_batch, runtime.Run.log, runtime.Run.save = spied_batch, spied_log, spied_save
tensors = [torch.full((2, 3), 4.0 * rank), torch.tensor([5.0 + rank])]
runtime.average(tensors)
seen["mean"] = [t.tolist() for t in tensors]
seen["numbers"] = runtime.average_numbers({{"a": 0.1 + rank, "b": -rank}})
for flags in json.loads(sys.argv[1]):
    sys.argv = ["train.py", *flags, "--out", str(out)]
    try:
        runpy.run_path({root!r} + "/train.py", run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
(out / f"rank{{rank}}.json").write_text(json.dumps(seen))
"""


def test_a_repeated_merge_follows_teachers_that_changed_on_disk(world, tmp_path, no_pictures):
    for task in TASKS:
        shutil.copytree(world.teachers[task], tmp_path / task)
    teachers = ["--teachers", *(f"{task}={tmp_path / task}" for task in TASKS)]
    command = ["--model", str(world.base), *SMALL, "--stage", "merge", "--name", "m", "--out", str(tmp_path), *teachers]
    merged = []
    for source in ("text", "quality"):
        shutil.rmtree(tmp_path / "text")
        shutil.copytree(world.teachers[source], tmp_path / "text")
        assert train.main(command) == 0
        file = tmp_path / "m" / "checkpoints" / "step-000000" / "adapter_model.safetensors"
        merged.append(safetensors.torch.load_file(file))
    assert not same(*merged)


def test_two_ranks_train_one_model_on_their_own_data_and_resume_exactly(world, tmp_path):
    # --no-decay: the cosine's length is --steps, and this test ends one run early by it.
    opd_run, grpo_run = [[*world.flags, "--no-decay", "--name", n, "--stage", n] for n in ("opd", "grpo")]
    plan = [
        [*opd_run, "--steps", "4"],
        [*opd_run, "--name", "cut", "--steps", "2"],
        [*opd_run, "--name", "cut", "--steps", "4"],
        [*grpo_run, *EVERY_STAGE["grpo"], "--steps", "2"],
    ]
    (tmp_path / "ranks.py").write_text(RANKS.format(root=str(ROOT)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(tmp_path / "ranks.py"), json.dumps(plan), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    zero, one = (json.loads((tmp_path / f"rank{r}.json").read_text()) for r in (0, 1))
    assert zero["mean"] == one["mean"] == [[[2.0] * 3] * 2, [5.5]]
    assert zero["numbers"] == one["numbers"] == pytest.approx({"a": 0.6, "b": -0.5})
    for a, b in zip(zero["prompts"], one["prompts"], strict=True):
        assert not set(a) & set(b), "two ranks never share a prompt of one step"
    for name in ("opd", "cut", "grpo"):
        first, second = (torch.load(tmp_path / f"{name}-{r}.pt") for r in (0, 1))
        assert same(first, second), "one model"
        assert same(first, training(tmp_path / name)["weights"])
    assert same(training(tmp_path / "cut"), training(tmp_path / "opd"))
    logged = metrics(tmp_path / "opd", drop=("seconds", "step"))
    assert len(logged) == 4
    for line, a, b in zip(logged, zero["metrics"], one["metrics"]):
        assert all(value == pytest.approx((a[k] + b[k]) / 2, rel=1e-5) for k, value in line.items())
        assert a["gap"] != b["gap"] and a["grad_norm"] == b["grad_norm"], "the norm is that of the mean gradient"


# ----------------------------------------------------------------------------------------- distillation (opd)
def test_the_gradient_of_opd_is_eq_9_plus_lambda_eq_12_by_autograd(go, spy, updates, world):
    """Over samples and trained steps a mean; the states, targets and first weights are those that the run had."""
    learnt, batches, start = spy(train, "learn"), spy(train, "mixed_batch"), world.teachers["text"]
    go("run", "--mar", "0.5", "--init", str(start))
    student = with_adapter(world, start)
    assert same([p.data for p in student.trainable()], updates[0].weights), "--init is where it starts"
    cond = student.encode([p.text for p in train.repeat(batches[0].result, 2)])
    loss, dt = 0.0, 1 / 3  # the grid is 1, 2/3, 1/3, 0
    for call, t in zip(learnt, (1.0, 2 / 3), strict=True):
        step, v_target, v_anchor = call.args[1], call.args[3], call.args[4]
        sigma = 0.7 * math.sqrt(t / (1 - t if t < 1 else dt))
        weight = dt / 2 * (sigma * (1 - t) / (2 * t) + 1 / sigma) ** 2
        v = student.velocity(step.x, t, cond)
        gap_B = ((v - v_target) ** 2).sum((1, 2, 3)) + 0.5 * ((v - v_anchor) ** 2).sum((1, 2, 3))
        loss = loss + weight * gap_B.mean() / 2
    expected = flat(torch.autograd.grad(loss, student.trainable()))
    assert expected.norm() > 1e-3
    assert close(flat(updates[0].grads), expected, 1e-4 * expected.abs().max())


@pytest.mark.parametrize("flags", [[], ["--cfg", "2"], ["--no-single-pass"]], ids=["plain", "guided", "stored"])
def test_each_row_is_labelled_by_the_teacher_of_its_task_and_all_by_the_anchor(go, spy, world, flags):
    learnt, batches = spy(train, "learn"), spy(train, "mixed_batch")
    go("run", "--anchor", "text", *flags)
    rows, cfg = train.repeat(batches[0].result, 2), float((flags[1:] or ["1"])[0])
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
    learnt, start = spy(train, "learn"), world.teachers["text"]
    batches = spy(train, "mixed_batch")
    go("run", "--init", str(start))
    first, second = (call.args[1] for call in learnt)
    student = with_adapter(world, start)
    cond = student.encode([p.text for p in train.repeat(batches[0].result, 2)])
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
    assert [call.args[6] for call in learnt] == [3, 3, 3], "the mean is over the three"


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
    assert "nowhere/adapter_config.json: missing" in capsys.readouterr().err


def test_distillation_never_asks_for_a_reward(go, monkeypatch):
    def forbidden(*_):
        raise AssertionError("a reward was computed")

    real = evaluation.evaluate
    monkeypatch.setattr(tiny, "reward", forbidden)
    # The scorers belong to the evaluation at the end alone.
    scorers = dict(tiny.SCORERS)
    monkeypatch.setattr(tiny, "SCORERS", {name: forbidden for name in scorers})

    def evaluate(*args):
        monkeypatch.setattr(tiny, "SCORERS", scorers)
        return real(*args)

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    go("run", "--steps", "2")


# ------------------------------------------------------------------------------------------------ teachers (grpo)
def test_the_gradient_of_grpo_is_the_policy_gradient_by_autograd(go, spy, updates, world):
    """At ratio 1 the clip is silent: -mean_b A_b grad log pi, with F Eq. 5-6 and Q Eq. 4 written out here."""
    chunks, batches = spy(train, "rollout_group"), spy(train, "mixed_batch")
    start = world.teachers["text"]
    go("run", "--stage", "grpo", *EVERY_STAGE["grpo"], "--init", str(start))
    chunk, student = chunks[0].result, with_adapter(world, start)
    rewards = chunk["rewards"]
    assert rewards.shape == (3, 2) and rewards.std() > 1e-4, "or the gradient below is zero on both sides"
    advantage_B = ((rewards - rewards.mean(1, keepdim=True)) / rewards.std(correction=0)).flatten().float()
    cond = student.encode([p.text for p in train.repeat(batches[0].result, 2)])
    loss, dt = 0.0, 1 / 3
    for step, t in zip(chunk["path"][:2], (1.0, 2 / 3)):
        sigma = 0.7 * math.sqrt(t / (1 - t if t < 1 else dt))
        v = student.velocity(step.x, t, cond)
        mean = step.x - (v + sigma**2 / (2 * t) * (step.x + (1 - t) * v)) * dt
        log_prob_B = -((step.x_next - mean) ** 2 / (2 * sigma**2 * dt)).mean((1, 2, 3))
        loss = loss - (advantage_B * log_prob_B).mean() / 2
    expected = flat(torch.autograd.grad(loss, student.trainable()))
    assert expected.norm() > 1e-6
    assert close(flat(updates[0].grads), expected, 1e-3 * expected.abs().max())


@pytest.mark.parametrize("kernel", ["sde", "cps"])
def test_the_first_ratio_is_exactly_one_and_only_the_first(go, spy, kernel):
    losses = spy(grpo, "policy_loss")
    flags = ["--stage", "grpo", *EVERY_STAGE["grpo"], "--prompts-per-step", "4", "--kernel", kernel, "--warmup", "0"]
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


def test_guard_and_kl_and_kernel_each_change_what_is_learnt(go, updates):
    plain = ["--stage", "grpo", *EVERY_STAGE["grpo"], "--steps", "2", "--warmup", "0", "--lr", "0.01"]
    variants = {"none": [], "guard": ["--guard"], "kl": ["--beta", "0.1"], "cps": ["--kernel", "cps"]}
    learnt = {name: weights(go(name, *plain, *flags)) for name, flags in variants.items()}
    for a, b in combinations(learnt, 2):
        assert not torch.equal(learnt[a], learnt[b]), f"{a} and {b} are one"
    grads = dict(zip(variants, (flat(update.grads) for update in updates[::2]), strict=True))
    assert torch.equal(grads["kl"], grads["none"]), "at its start the student is the base: no KL, no gradient of it"
    assert not torch.equal(flat(updates[5].grads), flat(updates[1].grads)), "from the second step on there is"


def test_grpo_mix_visits_its_tasks_three_to_one_to_one(go, spy):
    batches, rewards = spy(train, "mixed_batch"), spy(tiny, "reward")
    go("run", "--stage", "grpo", "--task", "mix", "--steps", "6")
    tasks = [{p.task for p in call.result} for call in batches]
    assert tasks == [{"composition"}, {"composition"}, {"composition"}, {"text"}, {"quality"}, {"composition"}]
    # Each task with the reward of its own teacher (F App. A).
    own, blend = {"task": 1.0}, {"quality": 0.4, "preference": 0.6}
    assert [call.args[2] for call in rewards] == [own, own, own, own, blend, own]


def test_each_teacher_trains_on_the_prompts_of_its_task(go, spy):
    batches = spy(train, "mixed_batch")
    for task in TASKS:
        go(task, "--stage", "grpo", "--task", task)
    assert [[p.task for p in call.result] for call in batches] == [[task] * 3 for task in TASKS]


def test_a_batch_is_shared_evenly_and_the_first_tasks_take_the_rest():
    prompts = {task: tiny.make_prompts(task, "train", 8) for task in TASKS}
    run = SimpleNamespace(s=settings.Settings(), step=0, rank=0, world=1)
    for count, sizes in ((5, [2, 2, 1]), (3, [1, 1, 1]), (2, [1, 1, 0]), (1, [1, 0, 0])):
        drawn = [p.task for p in train.mixed_batch(run, prompts, count)]
        assert [drawn.count(task) for task in TASKS] == sizes
    a, b = prompts["text"][:2]
    assert train.repeat([a, b], 3) == [a, a, a, b, b, b], "a group's rows side by side"


def test_the_trained_steps_lie_in_the_stochastic_window():
    def steps(seed=0, **changes):
        generator = torch.Generator().manual_seed(seed)
        run = SimpleNamespace(s=settings.Settings(num_steps=6, **changes), generator=lambda *_: generator)
        return train.trained_steps(run)

    assert steps(window="2:5", train_steps="all") == [2, 3, 4]
    assert steps(window="2:5", train_steps="first", train_count=2) == [2, 3]
    assert steps(window="2:5", train_steps="first", train_count=9) == [2, 3, 4], "not more than there are"
    drawn = {tuple(steps(seed, window="1:5", train_steps="random", train_count=2)) for seed in range(200)}
    assert drawn == set(combinations((1, 2, 3, 4), 2)), "every pair of the window comes, and no other"
    assert steps(window="2:5", train_steps="all", estimator="velocity") == [0, 1, 2, 3, 4, 5]
    assert steps(window="2:5", train_steps="all", estimator="velocity", stage="grpo", task="text") == [2, 3, 4]


# -------------------------------------------------------------------------------------------------- cold starts
def test_sft_learns_the_pictures_of_each_tasks_own_teacher(go, spy, world):
    drawn, sampled = spy(evaluation, "draw"), spy(train, "flow_matching")
    go("run", "--stage", "sft")
    for call, task in zip(drawn, TASKS):  # the calls after these three are the evaluation's
        prompts, (steps, cfg, seed) = call.args[1], call.args[2:5]
        assert len(prompts) == 2 and {p.task for p in prompts} == {task}
        teacher = with_adapter(world, world.teachers[task])
        assert close(call.result, evaluation.draw(teacher, prompts, steps, cfg, seed))
    images = torch.cat([call.result for call in drawn[:3]])
    x0 = sampled[0].args[1]
    assert x0.shape == (3, 3, 24, 24)
    assert all(any(close(row, image * 2 - 1) for image in images) for row in x0), "as latents in [-1, 1]"


def test_merging_gives_the_mean_of_the_teachers_updates(go, world):
    def update(folder):
        state, config = models.load_adapter(folder, models.load_tiny(world.base))
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
    tmp_path, small_pretraining, updates, capsys
):
    flags = ["--stage", "all", "--out", str(tmp_path), "--name", "all", "--steps", "2", *SMALL]
    assert train.main(flags) == 0
    out = capsys.readouterr().out
    rows = [line.split(" | ")[0].removeprefix("| ") for line in out.splitlines() if line.startswith("| ")]
    shown = ["base", *(f"teacher {t}" for t in TASKS), "sft", "merged", "opd student"]
    assert rows == ["model", *shown], "the table of the plan"
    parts = ["pretrain", *(f"grpo-{t}" for t in TASKS), "sft", "merge", "opd"]
    for part in parts:
        folder = tmp_path / f"all-{part}"
        assert (folder / "report.md").is_file() and runtime.last_checkpoint(folder)
        assert (folder / "samples/curves.png").is_file() == (part != "merge")
    report = (tmp_path / "all/report.md").read_text()
    assert report.count("![") == len(shown) * 3, "every model's pictures of every task"
    config = json.loads((tmp_path / "all-opd/config.json").read_text())
    assert config["init"] == str(tmp_path / "all-merge"), "distillation starts from the merged teachers"
    assert config["teachers"] == {t: str(tmp_path / f"all-grpo-{t}") for t in TASKS}
    assert config["model"] == str(tmp_path / "all-pretrain")
    count = len(updates)
    assert count == 2 * 6  # seven stages, one of which does not train
    assert train.main(flags) == 0
    assert len(updates) == count and capsys.readouterr().out == out, "the same table from the same checkpoints"


def test_grpo_without_a_task_trains_the_three_teachers_in_turn(go, tmp_path):
    go("all", "--stage", "grpo")
    assert sorted(p.name for p in tmp_path.glob("all*")) == [f"all-{t}" for t in sorted(TASKS)]


def test_a_dry_run_prints_its_settings_and_touches_nothing(go, tmp_path, capsys):
    go("run", "--dry-run", "--model", "/nowhere", "--lr", "0.25")
    out = capsys.readouterr().out
    printed, end = json.JSONDecoder().raw_decode(out)
    assert printed["lr"] == 0.25 and printed["stage"] == "opd" and not list(tmp_path.iterdir())
    assert "3 prompts x 2 = 6 trajectories" in out[end:], "and what they amount to"


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
    models.save_tiny(models.new_tiny(1, width=32, layers=1), tmp_path / "other")
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
        r"adapter_model\.safetensors: not a readable adapter",
    ),
    "no teacher": (lambda w, d: ["--teachers", f"text={d / 'no'}"], r"no/adapter_config\.json: missing"),
    "no base": (lambda w, d: ["--model", str(d / "no")], r"no/transformer/config\.json: missing.*--stage pretrain"),
    "broken base": (
        lambda w, d: [
            "--model",
            str(Path(cut(shutil.copytree(w.base, d / "b") / "transformer/diffusion_pytorch_model.safetensors")).parent),
        ],
        r"b: not a readable base checkpoint \(transformer/diffusion_pytorch_model\.safetensors: ",
    ),
    "no cold start": (lambda w, d: ["--init", str(d / "no")], r"no/adapter_config\.json: missing"),
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
    assert runtime.last_checkpoint(folder) is None


def test_a_broken_checkpoint_and_a_taken_name_say_what_to_do(go, capsys):
    folder = go("run")
    capsys.readouterr()
    go("run", "--lr", "0.5", code=2)
    assert "was made with --lr 0.003, not 0.5: give another --name, or --no-resume" in the_one_line(capsys)
    cut(folder / "checkpoints/step-000001/training.pt")
    go("run", "--steps", "2", code=2)
    assert re.search(r"step-000001/training\.pt: cannot resume from it .*--no-resume", the_one_line(capsys))
    go("run", "--steps", "2", "--no-resume")
    assert training(folder)["step"] == 2
