"""Oracles for the distillation: gradients against autograd on a model of the test's own, who labels which row with how
much guidance, and who is asked for what.
"""

import math
from itertools import combinations

import pytest
import torch

import eval as evaluation
import opd
from harness import distil, rollout
from models import sd3
from scorers import ocr
from scorers import panel as scoring
from tests.conftest import close, flat, metrics, same, weights, with_adapter
from tiny import drawings as tiny


# --------------------------------------------------------------------------------------- labels, gradients, estimators
def test_the_gradient_of_opd_is_eq_9_plus_lambda_eq_12_by_autograd(go, spy, updates, world):
    """Over samples and trained steps a mean; the states, targets and first weights are those that the run had."""
    learnt, rows, start = spy(distil, "learn"), spy(rollout, "rows_of"), world.teachers["text"]
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
    [[], ["--cfg", "2"], ["--estimator", "path"], ["--parameters", "full"]],
    ids=["plain", "guided", "stored", "all parameters"],
)
def test_each_row_is_labelled_by_the_teacher_of_its_task_and_all_by_the_anchor(go, spy, world, flags):
    learnt, drawn = spy(distil, "learn"), spy(rollout, "rows_of")
    go("run", "--anchor", "text", *flags)
    rows, cfg = [row.prompt for row in drawn[0].result], 2.0 if "--cfg" in flags else 1.0
    assert [p.task for p in rows] == ["composition"] * 2 + ["text"] * 2 + ["quality"] * 2
    for task, folder in world.teachers.items():
        teacher = with_adapter(world, folder)
        mine = [i for i, p in enumerate(rows) if p.task == task]
        cond, uncond = rollout.conditions(teacher, rows, cfg)
        for call in learnt:
            step, v_target, v_anchor = call.args[1], call.args[3], call.args[4]
            with torch.no_grad():
                v = teacher.velocity(step.x, step.t, cond, uncond, cfg)
            assert close(v_target[mine], v[mine], 1e-4)
            assert close(v_anchor, v, 1e-4) == (task == "text")


def test_opd_is_on_policy_the_states_are_the_students_own(go, spy, world):
    learnt, rows, start = spy(distil, "learn"), spy(rollout, "rows_of"), world.teachers["text"]
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


def test_one_pass_and_a_stored_trajectory_give_one_gradient(go, updates, monkeypatch):
    # The same forward at the same states; only the moment of backward differs.
    runs = []
    for name, single in (("single", distil.opd.NEEDS_FUTURE), ("stored", ("analytic",))):
        monkeypatch.setattr(distil.opd, "NEEDS_FUTURE", single)
        runs.append(go(name, "--steps", "2"))
    for one, two in ((updates[0], updates[2]), (updates[1], updates[3])):
        assert flat(one.grads).norm() > 0
        assert close(flat(one.grads), flat(two.grads), 1e-5 * flat(one.grads).abs().max())
    assert close(weights(runs[0]), weights(runs[1]))


def test_every_estimator_trains_the_student_in_its_own_way(go, spy, updates):
    found, learnt = {}, spy(distil, "learn")
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
    learnt = spy(distil, "learn")
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


# ---------------------------------------------------------------------------------------------- on SD3.5's own classes
def test_sd35s_rows_are_labelled_by_their_own_teacher_whatever_its_kind(real, sd35, stock, spy):
    """Stock diffusers and PEFT read each teacher and compute the two branches of guidance; F Eq. 7 and 12."""
    from diffusers import SD3Transformer2DModel
    from peft import PeftModel

    learnt, drawn = spy(distil, "learn"), spy(rollout, "rows_of")
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

    for owner, name in ((sd3.SD35Model, "decode"), (sd3.AutoencoderKL, "from_pretrained")):
        watched(owner, name)
    for owner, name in ((scoring, "build"), (ocr, "score_jpeg")):
        watched(owner, name)
    real("scored", "--steps", "2", "--rewards", "jpeg=1")
    names = [name for name, _ in events]
    assert names.count("decode") == 3 and names.count("from_pretrained") == names.count("build") == 1
    assert names.count("score_jpeg") == 1 + 3, "the self-test, and a test prompt a task"
    assert {steps for _, steps in events} == {2}, "the evaluation's: after the last step"
    events.clear()
    real("unscored", "--steps", "2", "--eval-prompts", "0")
    assert not events and len(updates) == 4


# ---------------------------------------------------------------- guided teachers, a student without (Q 4.3)
@pytest.mark.parametrize("flags", [[], ["--micro-batch", "3"], ["--estimator", "path"]],
                         ids=["ode", "micro-batches", "sde, stored"])  # fmt: skip
@pytest.mark.parametrize("guidance", ["teacher", "both", "neither"])
def test_teachers_and_student_are_each_guided_as_asked(go2, forwards, spy, guidance, flags):
    learnt = spy(distil, "learn")
    go2("run", "--stage", "opd", "--guidance", guidance, *flags)
    shares = {}
    for call in forwards:
        shares.setdefault(call.who, set()).add((float(call.empty.float().mean()), call.grad))
    of_student, of_teachers = {"teacher": (0.0, 0.5), "both": (0.5, 0.5), "neither": (0.0, 0.0)}[guidance]
    trained = {(of_student, True)}
    # Nothing is computed with a gradient that is not trained on: the walk of a stored trajectory, and its last step.
    walked = {(of_student, False)} if flags[-1:] == ["path"] else set()
    assert shares["student"] in (trained | walked, trained | {(of_student, False)})
    assert shares["teacher:t2i"] == shares["teacher:edit"] == {(of_teachers, False)}
    assert set(shares) == {"student", "teacher:t2i", "teacher:edit"} and learnt


@pytest.mark.parametrize("guidance", ["teacher", "both"])
def test_a_mixed_batch_learns_each_task_from_its_own_guided_teacher(go2, spy, updates, world2, guidance):
    """Q Eq. 14 by autograd: t2i rows and edits, each with its own picture, against teachers whose guidance is written
    out here."""
    learnt, drawn, start = spy(distil, "learn"), spy(rollout, "rows_of"), world2.teachers["edit"]
    go2("run", "--stage", "opd", "--guidance", guidance, "--cfg", "3", "--init", str(start))
    rows = [row.prompt for row in drawn[0].result]
    assert [p.task for p in rows] == ["t2i"] * 4 + ["edit"] * 4
    student, loss, seen = with_adapter(world2, start), 0.0, 0

    def velocity(model, some, x, t, cfg):
        images = rollout.sources(some)
        v = model.velocity(x, t, model.encode([p.text for p in some], images))
        if cfg == 1:
            return v
        return v + (cfg - 1) * (v - model.velocity(x, t, model.encode([""] * len(some), images)))

    for call in learnt:
        step, v_target, weight = call.args[1], call.args[3], call.args[6]
        task = "t2i" if seen < len(learnt) / 2 else "edit"
        some, seen = [p for p in rows if p.task == task], seen + 1
        teacher = with_adapter(world2, world2.teachers[task])
        other = with_adapter(world2, world2.teachers["edit" if task == "t2i" else "t2i"])
        with torch.no_grad():
            expected = velocity(teacher, some, step.x, step.t, 3)
            assert close(v_target, expected, 1e-4 * expected.abs().max())
            for wrong in (velocity(teacher, some, step.x, step.t, 1), velocity(other, some, step.x, step.t, 3)):
                assert not close(wrong, expected, 1e-2), "or nothing is shown"
        v = velocity(student, some, step.x, step.t, 3 if guidance == "both" else 1)
        assert close(step.v.detach(), v.detach(), 1e-4 * v.detach().abs().max())
        loss = loss + ((v - v_target) ** 2).mean((1, 2, 3)).sum() * weight
    assert weight == pytest.approx(1 / (8 * len(learnt) / 2))
    expected = flat(torch.autograd.grad(loss, list(student.trainable().values())))
    assert close(flat(updates[0].grads), expected, 1e-3 * expected.abs().max()) and expected.norm() > 1e-2
