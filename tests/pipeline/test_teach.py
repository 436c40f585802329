"""The teachers (train.py): gradients against autograd on a model of the test's own, what a ratio is before the first
update, what each strategy of guidance asks of the model, and DiffusionNFT by hand.
"""

import math
import re

import pytest
import torch

import grpo
import nft
import train
from data.pictures import sources_of
from harness import rollout
from harness.run import Run
from models import flow
from models.tiny import load_tiny
from rewards import RewardError
from tests.helpers.runs import TASKS, close, flat, metrics, stored, with_adapter
from tiny import drawings as tiny

GRPO = ["--stage", "grpo", "--task", "text", "--rewards", "quality=1"]
T2I = ["--stage", "grpo", "--task", "t2i", "--rewards", "quality=1"]
EDIT = ["--task", "edit", "--rewards", "identity=0.5,quality=0.5"]
NFT = ["--stage", "nft", "--task", "t2i", "--rewards", "quality=1"]


# ---------------------------------------------------------------------------------------------------------------- GRPO
def test_the_gradient_of_grpo_is_the_policy_gradient_by_autograd(go, spy, updates, world):
    """At ratio 1 the clip is silent: -mean_b A_b grad log pi, with F Eq. 5-6 and Q Eq. 4 written out here."""
    rollouts, rows, start = spy(rollout, "roll_out"), spy(rollout, "rows_of"), world.teachers["text"]
    go("run", *GRPO, "--init", str(start))
    (part, images), student = rollouts[0].result, with_adapter(world, start)
    trained, scores = list(student.trainable().values()), tiny.quality(images).double().reshape(3, 2)
    assert scores.std() > 1e-4, "or the gradient below is zero on both sides"
    advantage_B = ((scores - scores.mean(1, keepdim=True)) / scores.std(correction=0)).flatten().float()
    cond = student.encode([row.prompt.text for row in rows[0].result])
    loss, dt = 0.0, 1 / 3
    for step, t in zip(part.path[:2], (1.0, 2 / 3)):
        sigma = 0.7 * math.sqrt(t / (1 - t if t < 1 else dt))
        v = student.velocity(step.x, t, cond)
        mean = step.x - (v + sigma**2 / (2 * t) * (step.x + (1 - t) * v)) * dt
        log_prob_B = -((step.x_next - mean) ** 2 / (2 * sigma**2 * dt)).mean((1, 2, 3))
        loss = loss - (advantage_B * log_prob_B).mean() / 2
    expected = flat(torch.autograd.grad(loss, trained))
    assert expected.norm() > 1e-6
    assert close(flat(updates[0].grads), expected, 1e-3 * expected.abs().max())


def test_the_first_ratio_is_exactly_one_and_only_the_first(go, spy):
    """Each update has its own prompts; the second one's were drawn by an older policy. In micro-batches, too."""
    losses, lines = spy(grpo, "policy_loss"), []
    for size, sizes in (("0", [4] * 4), ("3", [3, 3, 1, 1, 3, 3, 1, 1])):
        flags = [*GRPO, "--prompts-per-step", "4", "--updates", "2", "--warmup", "0", "--micro-batch", size]
        lines.append(metrics(go(f"of{size}", *flags))[0])
        equal = [torch.equal(call.args[0].mean, call.args[1]) for call in losses]
        half = len(equal) // 2
        assert equal == [True] * half + [False] * half, "bit for bit"
        assert [len(call.args[1]) for call in losses] == sizes
        losses.clear()
    assert lines[0]["ratio_std"] > 0 and lines[1] == pytest.approx(lines[0], rel=1e-3, abs=1e-6)


OPD = ["--stage", "opd", "--estimator", "sampled", "--updates", "2", "--prompts-per-step", "6", "--micro-batch", "4"]
GUARDED = [*GRPO, "--guard", "--log-prob", "sum", "--beta", "0.1"]


@pytest.mark.parametrize("stage", [GRPO, GUARDED, OPD], ids=["grpo", "guard", "opd"])
def test_a_first_ratio_that_is_not_exactly_one_is_one_line(go, monkeypatch, capsys, stage):
    """A planted kernel: a forward with gradients has other numbers than one without."""
    flags, real = [*stage, "--steps", "3", "--warmup", "0", "--lr", "0.01"], flow.FlowModel._forward
    go("exact", *flags)
    assert "ratio" not in capsys.readouterr().err
    other = lambda *args: real(*args) * (1 + 1e-3 * torch.is_grad_enabled())  # noqa: E731
    monkeypatch.setattr(flow.FlowModel, "_forward", other)
    go("other", *flags)
    assert capsys.readouterr().err.count("warning: step 1: the first policy ratio is ") == 1


def test_ten_steps_of_equal_rewards_are_one_line(go, monkeypatch, capsys):
    monkeypatch.setitem(tiny.SCORERS, "quality", lambda images, prompts: [0.5] * len(images))
    go("run", *GRPO, "--steps", "11", "--num-steps", "2", "--window", "0:1", "--train-count", "1")
    assert re.findall(r"warning: step (\d+): for 10 steps", capsys.readouterr().err) == ["10"]


def test_grpo_mix_visits_its_tasks_three_to_one_to_one_each_with_its_own_reward(go, spy):
    """F App. A."""
    rows = spy(rollout, "rows_of")
    lines = metrics(go("run", "--stage", "grpo", "--task", "mix", "--steps", "6"))
    tasks = [{row.prompt.task for row in call.result} for call in rows]
    assert tasks == [{"composition"}, {"composition"}, {"composition"}, {"text"}, {"quality"}, {"composition"}]
    asked = [{key.removeprefix("reward/") for key in line if key.startswith("reward/")} for line in lines]
    assert asked == [{"task"}] * 4 + [{"quality", "preference"}, {"task"}], "what is not asked has no number"
    blend = lines[4]
    assert blend["reward"] == pytest.approx(0.4 * blend["reward/quality"] + 0.6 * blend["reward/preference"], rel=1e-4)


def test_joint_mixing_has_every_task_in_every_step(go2, spy):
    rows = spy(rollout, "rows_of")
    lines = metrics(go2("joint", "--stage", "grpo", "--task", "mix", "--mix", "joint", "--steps", "2"))
    assert [[row.prompt.task for row in call.result] for call in rows] == [["t2i"] * 4 + ["edit"] * 4] * 2
    assert all({"reward/identity", "reward/quality"} <= set(line) for line in lines)


def test_each_teacher_trains_on_the_prompts_of_its_task(go, spy, tmp_path):
    """Without --task, a teacher for each task in turn."""
    rows = spy(rollout, "rows_of")
    go("all", "--stage", "grpo")
    assert sorted(p.name for p in tmp_path.glob("all*")) == [f"all-{t}" for t in sorted(TASKS)]
    assert [[row.prompt.task for row in call.result] for call in rows] == [[task] * 6 for task in TASKS]


@pytest.mark.parametrize("stage", ["grpo", "nft"])
@pytest.mark.parametrize("micro_batch", ["0", "3"])
def test_a_lost_group_pulls_nothing_and_no_mean_counts_it(go, monkeypatch, updates, capsys, world, stage, micro_batch):
    """The groups' gradients, KL to the base included, are g1 + g2 + g3 over 3. Each is lost once: the others' mean is
    half their sum, and the three runs together have 3 times the whole gradient."""
    lost, real, drawn = [], tiny.SCORERS["quality"], []

    def score(images, prompts):
        drawn.extend(p.text for p in prompts)
        if any(p.text in lost for p in prompts):
            raise RewardError("no score")
        return real(images, prompts)

    monkeypatch.setitem(tiny.SCORERS, "quality", score)
    flags = [*GRPO, "--stage", stage, "--beta", "0.5", "--advantage-std", "none", "--on-reward-failure", "drop"]
    flags += ["--micro-batch", micro_batch, "--init", str(world.teachers["text"])]
    lines = [metrics(go("whole", *flags))[0]]
    for text in dict.fromkeys(drawn[:6]):
        lost[:] = [text]
        lines.append(metrics(go(f"without-{len(updates)}", *flags))[0])
    whole, *others = (flat(update.grads) for update in updates)
    assert len(others) == 3 and close(sum(others) / 3, whole, 1e-4 * whole.abs().max())
    assert all((other - whole).norm() > 1e-2 * whole.norm() for other in others)
    key = "kl" if stage == "grpo" else "distance"
    assert sum(line[key] for line in lines[1:]) / 3 == pytest.approx(lines[0][key], rel=1e-4) and lines[0][key] > 0


# ------------------------------------------------------------------ which guidance, and where (Q 4.1)
@pytest.fixture
def asked(forwards, monkeypatch):
    """{"rollout", "objective"}: the forwards that each makes."""
    found = {"rollout": [], "objective": []}

    def phase(name, real):
        def call(*args):
            forwards.clear()
            result = real(*args)
            found[name] += forwards
            return result

        return call

    monkeypatch.setattr(rollout, "roll_out", phase("rollout", rollout.roll_out))
    for name in ("update_policy", "update_forward"):
        monkeypatch.setattr(train, name, phase("objective", getattr(train, name)))
    return found


@pytest.mark.parametrize("stage", ["grpo", "nft"])
@pytest.mark.parametrize("guidance", ["both", "rollout", "neither"])
def test_each_strategy_asks_the_empty_prompt_where_it_should_and_nowhere_else(go2, asked, stage, guidance):
    """Eight rows, three steps of sampling, two trained times; the KL to the base is asked as the objective is."""
    line = metrics(go2("run", *T2I, "--stage", stage, "--guidance", guidance, "--beta", "0.1"))[0]
    drawn, trained = asked["rollout"], asked["objective"]
    shapes = [(len(call.empty), int(call.empty.sum())) for call in drawn]
    # Under the hybrid in two forwards of eight rows: the objective's have eight, and its first ratio must be 1.
    per_step = {"both": [(16, 8)], "rollout": [(8, 0), (8, 8)], "neither": [(8, 0)]}[guidance]
    expected = (16, 8) if guidance == "both" else (8, 0)
    v_old = [expected] * 2 if stage == "nft" else []  # of the policy that draws, at the trained times
    assert shapes == per_step * 3 + v_old and not any(call.grad for call in drawn)
    assert [(call.who, call.grad) for call in trained] == [("student", True), (None, False)] * 2
    assert all((len(call.empty), int(call.empty.sum())) == expected for call in trained)
    for call in trained:
        if call.grad:
            lengths = call.out.grad.flatten(1).norm(dim=1)
            assert lengths[~call.empty].max() > 0
            assert not call.empty.any() or lengths[call.empty].max() > 0, "both branches are moved"
    if stage == "grpo":
        assert (line["ratio_mean"], line["ratio_std"], line["kl"]) == (1.0, 0.0, 0.0)


def velocity_of(student, rows, cfg):
    """v(x, t) with guidance, written out: two forwards, each row with its own source picture."""
    images = [sources_of(row.prompt) for row in rows]
    cond, empty = student.encode([row.prompt.text for row in rows], images), student.encode([""] * len(rows), images)

    def v(x, t, c=cfg):
        toward = student.velocity(x, t, cond)
        return toward if c == 1 else student.velocity(x, t, empty) + c * (toward - student.velocity(x, t, empty))

    return v


@pytest.mark.parametrize("more", [[], EDIT], ids=["t2i", "edit"])
def test_the_gradient_of_the_hybrid_is_the_guided_policys_over_the_scale_by_autograd(go2, spy, updates, world2, more):
    """The guided walk is repeated here, F Eq. 5-6 written out, from the rows' own seeds; guidance scale 3."""
    rows, asked, task = spy(rollout, "rows_of"), spy(train, "update_policy"), "edit" if more else "t2i"
    start = world2.teachers[task]
    go2("run", *T2I, *more, "--guidance", "rollout", "--cfg", "3", "--init", str(start))
    student, (drawn,) = with_adapter(world2, start), [call.result for call in rows]
    (part,), advantage_B = asked[0].args[1], asked[0].args[2].flatten()
    assert {row.prompt.task for row in drawn} == {task} and advantage_B.abs().max() > 0.1
    trained, noise = list(student.trainable().values()), [row.generator() for row in drawn]
    v = velocity_of(student, drawn, 3.0)
    x, loss, dt = torch.stack([torch.randn(3, 24, 24, generator=g) for g in noise]), 0.0, 1 / 3
    for n, t in ((0, 1.0), (1, 2 / 3)):
        assert close(part.path[n].x, x, 1e-4), "the states are those that guidance led to"
        sigma = 0.7 * math.sqrt(t / (1 - t if t < 1 else dt))
        with torch.no_grad():
            held = v(x, t) - 3 * v(x, t, 1)  # (1 - w) v_uncond
        mean = x - (u := held + 3 * v(x, t, 1)) * dt - sigma**2 / (2 * t) * (x + (1 - t) * u) * dt
        eps = torch.stack([torch.randn(3, 24, 24, generator=g) for g in noise])
        x = mean.detach() + sigma * math.sqrt(dt) * eps
        log_prob_B = -((x - mean) ** 2 / (2 * sigma**2 * dt)).mean((1, 2, 3))
        loss = loss - (advantage_B * log_prob_B).mean() / 2
    expected = flat(torch.autograd.grad(loss, trained)) / 3
    assert expected.norm() > 1e-6
    assert close(flat(updates[0].grads), expected, 1e-3 * expected.abs().max())


# ------------------------------------------------------------------------------- DiffusionNFT (Q Eq. 7-9)
@pytest.mark.parametrize("guidance, more", [("rollout", []), ("both", []), ("rollout", EDIT)])
def test_the_gradient_of_nft_is_q_eq_8_by_autograd(go2, spy, updates, world2, guidance, more):
    """From the rows' seeds alone: the guided ODE, the noise of each time, r of the advantages, the loss."""
    rows, asked, task = spy(rollout, "rows_of"), spy(train, "update_forward"), "edit" if more else "t2i"
    start, beta = world2.teachers[task], 0.25
    flags = ["--guidance", guidance, "--interpolation", str(beta), "--beta", "0.3", "--init", str(start)]
    flags += ["--group-size", "3"]
    line = metrics(go2("run", *NFT, *more, *flags))[0]
    student, drawn, advantage_B = with_adapter(world2, start), rows[0].result, asked[0].args[2].flatten()
    trained, noise = list(student.trainable().values()), [row.generator() for row in drawn]
    v = velocity_of(student, drawn, 2.0)
    x = torch.stack([torch.randn(3, 24, 24, generator=g) for g in noise])
    with torch.no_grad():
        for t in (1.0, 2 / 3, 1 / 3):
            x = x - v(x, t) / 3
    assert close(asked[0].args[1][0].x0, x, 1e-4), "Q draws with the ODE, and with guidance"
    assert more or ((advantage_B.abs() > 1).any() and (advantage_B.abs() < 1).any()), "r saturates for some"
    r, cfg, distance, fit = (advantage_B.clamp(-1, 1) + 1) / 2, 2 if guidance == "both" else 1, 0.0, 0.0
    v_base = velocity_of(load_tiny(world2.base), drawn, 2.0)
    eps = {t: torch.stack([torch.randn(3, 24, 24, generator=g) for g in noise]) for t in (1.0, 2 / 3)}
    for t, e in eps.items():
        at = (1 - t) * x + t * e
        now, target = v(at, t, cfg), e - x
        old = now.detach()
        good = ((beta * now + (1 - beta) * old - target) ** 2).mean((1, 2, 3))
        bad = (((1 + beta) * old - beta * now - target) ** 2).mean((1, 2, 3))
        away = ((now - v_base(at, t, cfg).detach()) ** 2).mean((1, 2, 3))
        fit, distance = fit + (r * good + (1 - r) * bad).mean() / 2, distance + away.mean() / 2
    expected = flat(torch.autograd.grad(fit + 0.3 * distance, trained))
    assert expected.norm() > 1e-4
    assert close(flat(updates[0].grads), expected, 1e-3 * expected.abs().max())
    assert line["loss"] == pytest.approx(fit.item(), rel=1e-4) and line["moved"] == 0.0
    assert line["distance"] == pytest.approx(distance.item(), rel=1e-4) and line["distance"] > 1e-4


def test_the_old_policy_draws_and_follows_by_its_schedule(go2, monkeypatch):
    """old <- d old + (1 - d) new with d = 0 at first, then 0.001 a step; here 1/4, 3/4, 1/2, so that it shows."""
    students, draws, schedule, update, drawing = [], [], [0.25, 0.75, 0.5], Run.update, rollout.roll_out
    monkeypatch.setattr(nft, "old_policy_decay", lambda step: schedule[step])

    def now(model):
        return {name: p.detach().clone() for name, p in model.trainable().items()}

    monkeypatch.setattr(Run, "update", lambda run: students.append(now(run.model)) or update(run))
    monkeypatch.setattr(rollout, "roll_out", lambda model, *args: draws.append(now(model)) or drawing(model, *args))
    folder = go2("run", *NFT, "--steps", "3", "--warmup", "0", "--lr", "0.01")
    state = stored(folder)
    students.append({name: state[f"weights.{name}"] for name in students[0]})
    old = students[0]
    for step, decay in enumerate(schedule):
        assert all(close(draws[step][name], old[name], 1e-6) for name in old)
        moved = max((draws[step][name] - students[step][name]).abs().max() for name in old)
        assert moved == 0 if step == 0 else moved > 1e-3, "from the second step on it is not the student that draws"
        old = {name: decay * old[name] + (1 - decay) * students[step + 1][name] for name in old}
    assert all(close(state[f"old.{name}"], old[name], 1e-6) for name in old) and len(old) > 10
    assert metrics(folder)[2]["moved"] > 0 == metrics(folder)[0]["moved"]


@pytest.mark.parametrize("updates_a_step", [1, 2])
@pytest.mark.parametrize("overlap", ["--no-overlap", "--overlap"])
def test_v_old_is_of_the_policy_that_drew_the_picture(go2, spy, monkeypatch, overlap, updates_a_step):
    """Drawn ahead or not, at the first and the second update of a step: asked again of the weights that drew."""
    monkeypatch.setattr(nft, "old_policy_decay", lambda step: 0.3)
    held, drawing = [], rollout.roll_out

    def roll_out(model, *args):
        held.append({name: p.detach().clone() for name, p in model.trainable().items()})
        return drawing(model, *args)

    monkeypatch.setattr(rollout, "roll_out", roll_out)
    learnt, flags = spy(train, "update_forward"), [*NFT, "--steps", "4", "--save-every", "9", "--micro-batch", "3"]
    go2("run", *flags, overlap, "--updates", str(updates_a_step), "--warmup", "0", "--lr", "0.01")
    parts = [(call.args[0].model, part) for call in learnt for part in call.args[1]]
    assert len(parts) == len(held) == 4 * {1: 3, 2: 4}[updates_a_step]
    for (model, part), numbers in zip(parts, held, strict=True):
        for name, p in model.trainable().items():
            p.data.copy_(numbers[name])
        for at in part.path:
            with torch.no_grad():
                assert torch.equal(part.velocity(at.x, at.t), at.v_old)
    moved = [any(not torch.equal(a[name], b[name]) for name in a) for a, b in zip(held, held[1:])]
    assert sum(moved) == (2 if overlap == "--overlap" else 3), "it moves between steps and not within one"
