"""The distillation (train.py): gradients against autograd on a model of the test's own, who labels which row with how
much guidance, and what is never asked for.
"""

import math

import pytest
import torch

import opd
import train
from data.pictures import sources_of
from harness import rollout
from models import sd3
from scorers import panel as scoring
from tests.helpers.runs import TASKS, close, flat, metrics, same, save_random_adapter, with_adapter


@pytest.fixture
def visits(monkeypatch):
    """visits(): (visit, the student's v) of every transition since the last call."""
    calls, real = [], train.visits

    def recorded(*args):
        return (((calls.append(found), found)[1] for found in part) for part in real(*args))

    def visits():
        found = list(calls)
        calls.clear()
        return found

    monkeypatch.setattr(train, "visits", recorded)
    return visits


# --------------------------------------------------------------------------------------- labels, gradients, estimators
def test_one_pass_and_a_stored_trajectory_give_one_gradient(go, updates, monkeypatch):
    """The same forward at the same states; only the moment of backward differs."""
    for estimator in (name for name in opd.ESTIMATORS if name not in opd.NEEDS_FUTURE):
        for stored in (opd.NEEDS_FUTURE, (estimator,)):
            with monkeypatch.context() as patch:
                patch.setattr(opd, "NEEDS_FUTURE", stored)
                go(f"{estimator}-{len(stored)}", "--estimator", estimator)
        one, two = (flat(update.grads) for update in updates[-2:])
        assert one.norm() > 0 and close(one, two, 1e-5 * one.abs().max()), estimator


@pytest.mark.parametrize("flags", [[], ["--states", "ode", "--weight", "dt"], ["--estimator", "released"]])
def test_the_mean_gradient_over_the_draws_of_states_is_that_of_all_states(go, updates, world, monkeypatch, flags):
    """Each state alone with its weight 1 / (S p_n), times p_n, summed over the S states."""
    flags = ["--mar", "0.3", "--init", str(world.teachers["text"]), *flags]
    go("all", *flags)
    expected, S = flat(updates[-1].grads), 3 if "ode" in flags else 2
    p_S, total = torch.tensor([0.5, 0.2, 0.3][:S]).double() / sum([0.5, 0.2, 0.3][:S]), 0.0
    for n, p in enumerate(p_S.tolist()):
        u = p_S[:n].sum() + p / 2  # this place of the cumulated p is in state n
        monkeypatch.setattr(opd, "state_probabilities", lambda size_S: p_S)
        monkeypatch.setattr(torch, "rand", lambda *_, u=u, **__: u)
        go(f"only-{n}", *flags, "--drawn-states", "1")
        total = total + p * flat(updates[-1].grads)
    assert expected.norm() > 0 and close(total, expected, 1e-5 * expected.abs().max())


def test_the_mean_gradient_over_whom_the_anchor_is_asked_about_is_that_of_all(go, updates, world, monkeypatch):
    """F Eq. 12 with each of three neighbours in turn as the one that counts three times."""
    flags, real, total = ["--mar", "0.3", "--init", str(world.teachers["text"])], rollout.seed_for, 0.0
    go("all", *flags)
    expected = flat(updates[-1].grads)
    for chosen in range(3):
        monkeypatch.setattr(rollout, "seed_for", lambda *what, n=chosen: n if what[0] == "anchor" else real(*what))
        go(f"only-{chosen}", *flags, "--anchor-every", "3")
        assert not close(flat(updates[-1].grads), expected, 1e-3 * expected.abs().max())
        total = total + flat(updates[-1].grads) / 3
    assert close(total, expected, 1e-5 * expected.abs().max())


def test_states_are_drawn_by_what_they_taught_before(go, spy, world):
    """The second step's p is of the first one's squared gradients, here told from the visits: w(t)^2 gap."""
    asked, told = spy(opd, "state_probabilities"), spy(opd, "state_size_sq")
    go("run", "--drawn-states", "2", "--steps", "2", "--init", str(world.teachers["text"]))
    first, second = (call.args[0] for call in asked)
    assert first.tolist() == [0, 0], "nothing is known yet"
    mean = {n: [] for n in range(2)}
    for call in told[: sum(1 for _ in told) // 2]:
        at, v = call.args
        w = opd.kl_weight(at.step.t, at.step.dt, at.step.sigma)
        mean[at.step.index].append(w**2 * ((v.detach() - at.v_target) ** 2).mean((1, 2, 3)))
    for n, found in mean.items():
        assert second[n].item() == pytest.approx(torch.cat(found).mean().sqrt().item(), rel=1e-5)
    go("one", "--drawn-states", "1", "--steps", "2", "--init", str(world.teachers["text"]))
    assert asked[-1].args[0].isfinite().all(), "a row counts where it learns, and nowhere else"


def test_one_old_policy_draws_the_states_of_all_updates(go, spy):
    told = spy(opd, "state_size_sq")
    for lr in ("0", "0.1"):  # without and with a move of the student between the updates
        go(f"lr {lr}", "--updates", "2", "--prompts-per-step", "6", "--steps", "1", "--lr", lr)
    states = [call.args[0].step.x for call in told]
    still, moved = states[: len(states) // 2], states[len(states) // 2 :]
    assert len(still) > 2 and all(map(torch.equal, still, moved))


def test_the_clip_fraction_of_drawn_states_is_a_fraction(go, monkeypatch):
    """Where every ratio is clipped it is 1, though the weights of the second step's states do not sum to 1."""
    real = opd.ratio_terms
    monkeypatch.setattr(opd, "ratio_terms", lambda *of: real(*of) | {"clip_fraction": torch.ones_like(of[0])})
    lines = metrics(go("run", "--estimator", "sampled", "--drawn-states", "1", "--steps", "2"))
    assert [line["clip_fraction"] for line in lines] == [1, 1]


RATIO = [name for name in opd.ESTIMATORS if name not in ("analytic", "velocity")]


@pytest.mark.parametrize(
    ("estimator", "reduce", "clip"),
    [*((name, *more) for name in RATIO for more in (("sum", 0.02), ("mean", 1e-5))), ("analytic", "", 0)],
)
def test_two_updates_learn_from_one_old_policy_with_f_eq_11s_ratio_clip_and_clamp(
    go, spy, visits, updates, world, tmp_path, capsys, estimator, reduce, clip
):
    """Each update against autograd of F Eq. 11-12, written out here, at its own weights, on its own share of the rows.

    The mean over rows and trained transitions; the grid is 1, 2/3, 1/3, 0.
    """
    drawn, start, most = spy(rollout, "rows_of"), tmp_path / "start", 0.004
    save_random_adapter(world.base, start, seed=9)  # no teacher's: no credit is zero, whose sign would be rounding's
    more = ["--clip", str(clip), "--log-prob", reduce, "--advantage-clip", str(most)] if reduce else []
    flags = ["--prompts-per-step", "6", "--updates", "2", "--warmup", "0", "--mar", "0.5", "--init", str(start)]
    line = metrics(go("run", *flags, "--estimator", estimator, *more))[0]
    assert "warning" not in capsys.readouterr().err
    old, student, found, dt, cut = with_adapter(world, start), with_adapter(world, start), visits(), 1 / 3, []
    trained, rows = list(student.trainable().values()), drawn[0].result
    assert same([p.data for p in trained], updates[0].weights), "--init is where it starts"
    assert len(updates) == 2 and not same(*(update.weights for update in updates))
    for number, update in enumerate(updates):
        some = rows[6 * number : 6 * number + 6]
        assert {row.prompt.task for row in some} == set(TASKS), "each update has every task"
        cond = student.encode([row.prompt.text for row in some])
        for p, value in zip(trained, update.weights, strict=True):
            p.data.copy_(value)
        gaps, rewards, rhos, now, mar = [], [], [], [], 0.0
        for (at, v_run), t in zip(found[2 * number : 2 * number + 2], (1.0, 2 / 3), strict=True):
            x, action, sigma = at.step.x, at.step.x_next, 0.7 * math.sqrt(t / (1 - t if t < 1 else dt))
            with torch.no_grad():
                v_old = old.velocity(x, t, cond)
            v = student.velocity(x, t, cond)
            assert close(at.step.v, v_old) and close(v_run.detach(), v.detach())

            def away(v, x=x, t=t, sigma=sigma, action=action):  # ||a - mu||^2 / (2 sigma^2 dt), number by number
                return (action - x + (v + sigma**2 / (2 * t) * (x + (1 - t) * v)) * dt) ** 2 / (2 * sigma**2 * dt)

            w = dt / 2 * (sigma * (1 - t) / (2 * t) + 1 / sigma) ** 2
            gaps.append(w * ((v_old - at.v_target) ** 2).mean((1, 2, 3)))
            now.append(w * ((v - at.v_target) ** 2).mean((1, 2, 3)))
            mar = mar + 0.5 * w * ((v - at.v_anchor) ** 2).mean() / 2  # F Eq. 12, over two transitions
            rewards.append((away(v_old) - away(at.v_target)).mean((1, 2, 3)))
            rho = (away(v_old) - away(v)).flatten(1)
            rhos.append((rho.mean(1) if reduce == "mean" else rho.sum(1)).exp())
        loss, size = mar, x[0].numel()
        for n in range(2):
            credit = {
                "literal": -now[n].detach(), "released": -now[n], "sampled": rewards[n], "analytic": -now[n],
                "path": -sum(gaps[n + 1 :], 0 * now[n].detach()), "sampled_path": sum(rewards[n:]),
            }[estimator]  # fmt: skip
            A = credit.clamp(-most, most)
            objective = torch.minimum(rhos[n] * A, rhos[n].clamp(1 - clip, 1 + clip) * A)
            cut.append((rhos[n] * A > objective).float().mean().item())
            objective = objective * (size if reduce == "mean" and estimator != "released" else 1)
            loss = loss + {"analytic": now[n], "path": now[n] - objective}.get(estimator, -objective).mean() / 2
        expected = flat(torch.autograd.grad(loss, trained))
        assert expected.norm() > 0 and close(flat(update.grads), expected, 2e-3 * expected.abs().max())
        if reduce:
            assert number == 1 or all((rho == 1).all() for rho in rhos), "at first the ratio is 1"
    if reduce:
        assert line["clip_fraction"] == pytest.approx(sum(cut) / 4, abs=1e-5) and line["ratio_std"] > 0
        assert estimator == "path" or 0 < line["clip_fraction"] < 1


def test_every_estimator_logs_its_terms_on_states_of_its_own_kind(go, visits):
    for estimator in opd.ESTIMATORS:
        keys = {"step", "loss", "gap", "mar", "grad_norm"} | ({"kl"} if estimator != "velocity" else set())
        keys |= {"ratio_mean", "ratio_std", "clip_fraction"} if estimator in RATIO else set()
        assert metrics(go(estimator, "--estimator", estimator))[0].keys() == keys
        (one, _), (two, _), *_ = visits()
        assert torch.equal(one.step.x_next, two.step.x)
        assert (one.step.sigma == two.step.sigma == 0) == (estimator == "velocity")


def test_each_weight_scales_every_state_by_its_own_formula(go, visits):
    """Of F Eq. 9's line under each weight, the MAR term too: both are ||dv||^2 times the same number."""
    dt = 1 / 3

    def kl_dt(t):
        sigma = 0.7 * math.sqrt(t / (1 - t if t < 1 else dt))
        return dt * dt / 2 * (sigma * (1 - t) / (2 * t) + 1 / sigma) ** 2

    of_ode = {"uniform": lambda t: 1.0, "dt": lambda t: dt, "ode": lambda t: dt**2 / 2}
    for name, expected in {**of_ode, "kl_dt": kl_dt}.items():
        states = "ode" if name in of_ode else "sde"
        flags = ["--weight", name, "--states", states]
        line = metrics(go(name, *flags))[0]
        asked = visits()
        loss = sum(expected(at.step.t) * (v - at.v_target).square().mean() for at, v in asked) / len(asked)
        mar = sum(expected(at.step.t) * (v - at.v_anchor).square().mean() for at, v in asked) / len(asked)
        assert len(asked) == (3 if states == "ode" else 2), "of the ODE every step trains, of the SDE the window's"
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert line["mar"] == pytest.approx(mar.item(), rel=1e-4)
        gap = sum((v - at.v_target).square().mean() for at, v in asked) / len(asked)
        assert line["gap"] == pytest.approx(gap.item(), rel=1e-4)
        assert states == "ode" or line["kl"] == pytest.approx(line["loss"] / dt, rel=1e-4), "in nats per dimension"


# ---------------------------------------------------------------------------------------------- on SD3.5's own classes
def test_sd35s_rows_are_labelled_by_their_own_teacher_whatever_its_kind(real, sd35, stock, spy, visits):
    """Stock diffusers and PEFT read each teacher and compute the two branches of guidance; F Eq. 7 and 12."""
    from diffusers import SD3Transformer2DModel
    from peft import PeftModel

    drawn = spy(rollout, "rows_of")
    real("run")
    rows, asked = drawn[0].result, visits()
    assert len(asked) == 3 * 2, "a micro-batch a task, for the full teacher is alone on the device; two trained steps"
    texts = [row.prompt.text for row in rows]
    with torch.no_grad():
        v, empty, pooled, no_pooled = stock.encode_prompt(texts, None, None, max_sequence_length=16)

    def velocity(transformer, x, t, i):
        def branch(tokens, pooled):
            return transformer(x, tokens, pooled, torch.full((2,), t * 1000), return_dict=False)[0]

        with torch.no_grad():
            away, toward = branch(empty[i], no_pooled[i]), branch(v[i], pooled[i])
        return away + 4.5 * (toward - away)

    def fresh():
        return SD3Transformer2DModel.from_pretrained(sd35.base / "transformer")

    whole = SD3Transformer2DModel.from_pretrained(sd35.teachers["quality"] / "transformer")
    stock.load_lora_weights(sd35.teachers["text"])
    composition = PeftModel.from_pretrained(fresh(), sd35.teachers["composition"])
    teachers, base = {"composition": composition, "text": stock.transformer, "quality": whole}, fresh()
    for number, (at, v_student) in enumerate(asked):
        i, x, t = slice(number // 2 * 2, number // 2 * 2 + 2), at.step.x, at.step.t
        assert close(v_student.detach(), velocity(base, x, t, i), 1e-4), "the student begins as the base"
        assert close(at.v_anchor, velocity(whole, x, t, i), 1e-4), "the anchor answers for every row"
        for row, task in enumerate([row.prompt.task for row in rows[i]]):
            for name in TASKS:
                expected = velocity(teachers[name], x, t, i)[row]
                assert close(at.v_target[row], expected, 1e-4) == (name == task), (name, task)


def test_sd35_is_distilled_without_a_vae_and_without_a_reward(real, spy, updates):
    """The evaluation alone decodes and scores, after the last step."""
    decoded, built, kept = spy(sd3.SD35Model, "decode"), spy(scoring, "build"), spy(sd3.SD35Model, "keep")
    real("unscored", "--eval-prompts", "0", "--micro-batch", "0", "--drawn-states", "2")
    assert not decoded and not built and len(updates) == 1
    names = [{*call.args[1]} - {"", "teacher:quality"} for call in kept]  # which is the anchor, too
    assert max(map(len, names)) == 1, "the others take turns"
    assert set.union(*names) == {"teacher:composition", "teacher:text"}
    real("scored", "--rewards", "jpeg=1")
    drawn = sum(len(call.args[1]) for call in decoded)
    assert drawn == 2 * 3 and len(built) == 1, "a test prompt a task, of the base and of the student"


# ---------------------------------------------------------------- guided teachers, a student without (Q 4.3)
@pytest.mark.parametrize("guidance", ["teacher", "both"])
def test_a_mixed_batch_learns_each_task_from_its_own_guided_teacher(go2, spy, visits, updates, world2, guidance):
    """Q Eq. 14 by autograd: t2i rows and edits, each with its own picture, against teachers whose guidance is written
    out here."""
    drawn, start = spy(rollout, "rows_of"), world2.teachers["edit"]
    go2("run", "--stage", "opd", "--guidance", guidance, "--cfg", "3", "--init", str(start))
    rows = [row.prompt for row in drawn[0].result]
    assert [p.task for p in rows] == ["t2i"] * 4 + ["edit"] * 4
    student, loss, asked = with_adapter(world2, start), 0.0, visits()

    def velocity(model, some, x, t, cfg):
        images = [sources_of(p) for p in some]
        v = model.velocity(x, t, model.encode([p.text for p in some], images))
        if cfg == 1:
            return v
        return v + (cfg - 1) * (v - model.velocity(x, t, model.encode([""] * len(some), images)))

    for number, (at, v_run) in enumerate(asked):
        task, x, t = "t2i" if number < len(asked) / 2 else "edit", at.step.x, at.step.t
        some = [p for p in rows if p.task == task]
        teacher = with_adapter(world2, world2.teachers[task])
        other = with_adapter(world2, world2.teachers["edit" if task == "t2i" else "t2i"])
        with torch.no_grad():
            expected = velocity(teacher, some, x, t, 3)
            assert close(at.v_target, expected, 1e-4 * expected.abs().max())
            for wrong in (velocity(teacher, some, x, t, 1), velocity(other, some, x, t, 3)):
                assert not close(wrong, expected, 1e-2), "or nothing is shown"
        v = velocity(student, some, x, t, 3 if guidance == "both" else 1)
        assert close(v_run.detach(), v.detach(), 1e-4 * v.detach().abs().max())
        loss = loss + ((v - at.v_target) ** 2).mean((1, 2, 3)).sum() / (8 * len(asked) / 2)
    expected = flat(torch.autograd.grad(loss, list(student.trainable().values())))
    assert close(flat(updates[0].grads), expected, 1e-3 * expected.abs().max()) and expected.norm() > 1e-2
