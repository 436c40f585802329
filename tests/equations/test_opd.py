"""Do the estimators of opd.py follow the KL between student and teachers?

Proven here: each estimator's value and gradient on one transition by an independent route; and, on a linear-Gaussian
flow whose exact gradients are known (`tests/helpers/linear_gaussian.py`), that the mean gradient of an estimator plus
lambda MAR is that of the equations' sums, divided by D, under every setting that is accepted. `literal` is noise around
zero, `analytic`, `released` and `sampled` have the gradient at fixed states, the `path` forms that of whole
trajectories. Planted bugs, and settings that are refused, fail the same oracle.
"""

from itertools import product

import pytest
import torch

import opd
from kl import gaussian_kl
from sde import Transition, log_prob, rollout, sde_mean
from tests.helpers import linear_gaussian as flow

T_, DT, SIGMA = 0.5, 0.25, 0.8
STD = SIGMA * DT**0.5  # 0.4
WEIGHT = 0.3403125  # w(0.5) = 0.125 (0.8 * 0.5 / 1 + 1 / 0.8)^2 = 0.125 * 1.65^2
WEIGHTS = {"kl": WEIGHT, "kl_dt": WEIGHT / 4, "uniform": 1, "dt": 0.25, "ode": 0.03125}  # dt^2/2 = 1/32
EVERY = pytest.mark.parametrize("estimator", opd.ESTIMATORS)
SHAPE, D = (3, 2, 5), 10  # B = 3


def randn(seed, *shape):
    return torch.randn(shape or SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def transition(seed=0, **changes):
    """(visit, v): random numbers, v a leaf, the action drawn from the student."""
    v, v_target, x = randn(seed + 1).requires_grad_(), randn(seed + 2), randn(seed + 3)
    mean = sde_mean(x, v.detach(), T_, DT, SIGMA)
    step = Transition(2, T_, T_ - DT, DT, SIGMA, x, v.detach(), mean, STD, mean + STD * randn(seed + 4))
    return opd.Visit(step, v_target, future=randn(seed + 5, 3))._replace(**changes), v


def grad_of(loss, v):
    return torch.autograd.grad(loss.sum(), v, retain_graph=True)[0]


# ------------------------------------------------------------------------------------------- who teaches what
def test_route_gives_every_row_to_the_expert_of_its_task_exactly_once():
    experts = {"text": "ocr", "composition": "geneval", "counting": "geneval"}
    rows = opd.route(["composition", "text", "counting", "text", "composition"], experts)
    assert {name: own.tolist() for name, own in rows.items()} == {"geneval": [0, 2, 4], "ocr": [1, 3]}
    with pytest.raises(ValueError, match="edit"):
        opd.route(["text", "edit"], experts)


def test_target_velocity_fills_each_row_from_its_own_expert():
    x, t = randn(1, 5, 2, 3), torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5], dtype=torch.float64)
    calls = []

    def velocity(expert, rows, x_rows, t_rows):
        calls.append((expert, rows.tolist()))
        assert torch.equal(x_rows, x[rows])
        return {"a": 10, "b": 100}[expert] * x_rows + t_rows.view(-1, 1, 1)

    rows = {"a": torch.tensor([4, 0]), "b": torch.tensor([1, 2, 3])}
    factor = torch.tensor([10, 100, 100, 100, 10]).view(-1, 1, 1)
    got = opd.target_velocity(rows, velocity, x.requires_grad_(), t)
    torch.testing.assert_close(got, (factor * x + t.view(-1, 1, 1)).detach())
    assert not got.requires_grad
    assert calls == [("a", [4, 0]), ("b", [1, 2, 3])]  # one call an expert
    for scalar in (0.7, torch.tensor(0.7)):
        got = opd.target_velocity(rows, lambda expert, rows, x, t: x * t, x, scalar)
        torch.testing.assert_close(got, 0.7 * x, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("rows", [{}, {"a": [0, 1]}, {"a": [0, 1], "b": [1, 2]}, {"a": [0, 1, 2, 3]}])
def test_rows_that_miss_or_repeat_a_sample_and_answers_of_another_shape_are_refused(rows):
    rows = {name: torch.tensor(own) for name, own in rows.items()}
    with pytest.raises(ValueError, match="exactly one expert"):
        opd.target_velocity(rows, lambda expert, rows, x, t: x, randn(0), 0.5)
    rows = {"a": torch.tensor([1]), "b": torch.tensor([0, 2])}
    with pytest.raises(ValueError, match="shapes differ"):
        opd.target_velocity(rows, lambda expert, rows, x, t: x[:1], randn(0), 0.5)


# ---------------------------------------------------------------------------- one line, several weights, by hand
def gaps():
    """Gaps (1, 2) and (0, 2): squared norms 5 and 4."""
    v, target = torch.tensor([[1.0, 3.0], [2.0, 0.0]]).double(), torch.tensor([[0.0, 1.0], [2.0, 2.0]]).double()
    return v.requires_grad_(), target.requires_grad_()


def test_velocity_matching_by_hand():
    v, teacher = gaps()
    assert opd.velocity_matching(v, teacher).tolist() == [5, 4]
    assert opd.velocity_matching(v, teacher, "mean").tolist() == [2.5, 2]
    opd.velocity_matching(v, teacher).sum().backward()
    assert teacher.grad is None and v.grad.tolist() == [[2, 4], [0, -4]]  # 2 (v - v*)


@pytest.mark.parametrize("name", WEIGHTS)
def test_dense_reward_by_hand(name):
    v, target = gaps()
    reward = opd.dense_reward(v, target, T_, DT, SIGMA, weight=name)
    torch.testing.assert_close(reward, -WEIGHTS[name] * torch.tensor([5.0, 4.0]).double())
    assert not reward.requires_grad
    torch.testing.assert_close(opd.dense_reward(v, target, T_, DT, SIGMA, "mean", name), reward / 2)


@pytest.mark.parametrize("name", WEIGHTS)
def test_mar_penalty_is_the_weighted_gap_with_a_gradient_to_the_student_only(name):
    v, anchor = gaps()
    penalty = opd.mar_penalty(v, anchor, T_, DT, SIGMA, weight=name)
    torch.testing.assert_close(penalty, WEIGHTS[name] * torch.tensor([5.0, 4.0]).double())
    penalty.sum().backward()
    assert anchor.grad is None
    torch.testing.assert_close(v.grad, 2 * WEIGHTS[name] * torch.tensor([[1.0, 2.0], [0.0, -2.0]]).double())


def test_a_weight_of_another_name_and_a_kl_without_noise_are_refused():
    for name, sigma in (("true", SIGMA), ("kl", 0.0), ("kl_dt", 0.0)):
        with pytest.raises(ValueError):
            opd.time_weight(name, T_, DT, sigma)


def test_sampled_reward_by_hand():
    # a = 1, mean_target = 0, mean_old = 3, std = 2: [-(1)^2 + (1-3)^2] / (2 * 4) = 3/8; the second dimension,
    # with a = 0, -1, 0: [-1 + 0] / 8 = -1/8. The constants of the two densities cancel. D = 2: (3/8 - 1/8) / 2 = 1/8
    # At t = 1 with dt = 1 and x = 0 the mean of the action is -v.
    action, target, old = (torch.tensor([row]).double() for row in ([1, 0.0], [0, -1.0], [3, 0.0]))
    at = opd.Visit(Transition(0, 1.0, 0.0, 1.0, 2.0, torch.zeros(1, 2), -old, old, 2.0, action), -target)
    torch.testing.assert_close(opd.sampled_reward(at), torch.tensor([0.125]).double())
    # w = dt/2 / sigma^2 = 1/8 at t = 1: with the weight 1 it is eight times as much
    torch.testing.assert_close(opd.sampled_reward(at._replace(weight="uniform")), torch.tensor([1.0]).double())


def test_reward_to_go_by_hand():
    steps = torch.tensor([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]])  # T = 3, B = 2
    assert opd.reward_to_go(steps).tolist() == [[7, 70], [6, 60], [4, 40]]
    assert opd.reward_to_go(steps, inclusive=False).tolist() == [[6, 60], [4, 40], [0, 0]]
    assert opd.reward_to_go(steps.bfloat16()).dtype == torch.float32


# ---------------------------------------------------------------------------- one transition, every estimator
@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_values_and_gradients_on_policy(reduce, weight):
    # Independent route: gaussian_kl and log_prob of the means. On-policy rho = 1, so that the values are the rewards'.
    at, v = transition(reduce=reduce, weight=weight)
    x, action = at.step.x, at.step.x_next
    mean, mean_target = sde_mean(x, v, T_, DT, SIGMA), sde_mean(x, at.v_target, T_, DT, SIGMA)
    kl = gaussian_kl(mean, mean_target, STD) * WEIGHTS[weight] / WEIGHT / D
    score = log_prob(action, mean, STD, "sum")
    reward = (log_prob(action, mean_target, STD, "sum") - score).detach() * WEIGHTS[weight] / WEIGHT / D
    by_kl, by_score, wide = grad_of(kl, v), grad_of(score, v), (3, 1, 1)
    by_root = by_score / D if reduce == "mean" else by_score  # the released code's rho
    expected = {
        "literal": (kl, kl.view(wide) * by_score),
        "released": (kl, kl.view(wide) * by_root + by_kl),
        "analytic": (kl, by_kl),
        "sampled": (-reward, -reward.view(wide) * by_score),
        "path": (kl + at.future, by_kl + at.future.view(wide) * by_score),
        "sampled_path": (-at.future, -at.future.view(wide) * by_score),
        "velocity": ((v - at.v_target).square().sum((1, 2)) / D, 2 * (v - at.v_target) / D),
    }
    assert expected.keys() == opd.ESTIMATORS.keys()
    for name, (value, gradient) in expected.items():
        loss, stats = opd.ESTIMATORS[name](at, v)
        torch.testing.assert_close(loss, value, msg=name)
        torch.testing.assert_close(grad_of(loss, v), gradient.detach(), msg=name)
        assert stats.keys() == (set() if name in ("analytic", "velocity") else {"off", "off_sq", "clip_fraction"})
        assert not any(value.any() for value in stats.values()), "the ratio is exactly 1"


@pytest.mark.parametrize("weight", ["kl", "kl_dt", "uniform"])
def test_futures_are_the_later_kls_and_this_and_later_log_ratios(weight):
    visits, vs = zip(*(transition(seed, weight=weight) for seed in (0, 10, 20)))
    kls = [WEIGHTS[weight] * (v - at.v_target).square().mean((1, 2)) for at, v in zip(visits, vs)]
    found = {name: [at.future for at in opd.credited(name, visits)] for name in opd.ESTIMATORS}
    torch.testing.assert_close(found["path"], [kls[1] + kls[2], kls[2], 0 * kls[2]])
    ratios = [opd.sampled_reward(at) for at in visits]
    torch.testing.assert_close(found["sampled_path"], [sum(ratios[n:]) for n in range(3)])
    assert opd.credited("analytic", visits) == list(visits), "the others do not look at it"


def test_off_policy_the_ratio_reweights_the_credit_and_clipping_takes_the_pessimistic_branch():
    rho, credit = torch.tensor([2.0, 2.0, 0.5]).double(), torch.tensor([3.0, -3.0, 3.0]).double()
    at, v = transition(future=credit)
    # The old mean is c times as far from the action: (c^2 - 1) ||a - mu||^2 / (2 std^2) = log rho
    action, away = at.step.x_next, at.step.x_next - at.step.mean
    c = (1 + 2 * STD**2 * rho.log() / away.square().sum((1, 2))).sqrt()
    at = at._replace(step=at.step._replace(mean=action - c.view(3, 1, 1) * away))
    kl, reward, mean_target = opd.kl_t(at, v), opd.sampled_reward(at), sde_mean(at.step.x, at.v_target, T_, DT, SIGMA)
    expected = log_prob(action, mean_target, STD, "mean") - log_prob(action, at.step.mean, STD, "mean")
    torch.testing.assert_close(reward, expected)  # it is against the *old* policy
    for name, value in {"literal": rho * kl, "released": rho * kl, "sampled": -rho * reward, "analytic": kl,
                        "path": kl + rho * credit, "sampled_path": -rho * credit}.items():  # fmt: skip
        torch.testing.assert_close(opd.ESTIMATORS[name](at, v)[0], value, msg=name)
    # The D-th root of rho, D times as steep: A + D (rho^(1/D) - 1) A
    root = 1 + D * (rho ** (1 / D) - 1)
    torch.testing.assert_close(opd.sampled_path(at._replace(reduce="mean"), v)[0], -root * credit)
    # eps = 0.2: min(6, 3.6) = 3.6; min(-6, -3.6) = -6; min(1.5, 2.4) = 1.5
    at = at._replace(clip=0.2)
    loss, stats = opd.sampled_path(at, v)
    torch.testing.assert_close(loss, torch.tensor([-3.6, 6.0, -1.5]).double())
    for key, value in {"off": [1, 1, -0.5], "off_sq": [1, 1, 0.25], "clip_fraction": [1, 0, 0]}.items():
        assert stats[key].tolist() == pytest.approx(value)
    moved = grad_of(loss, v).flatten(1).norm(dim=1)
    assert moved[0] == 0 and moved[1] > 0 and moved[2] > 0
    # costs, credit -future: min(-6, -3.6) = -6; min(6, 3.6) = 3.6; min(-1.5, -2.4) = -2.4; the loss is the negative
    torch.testing.assert_close(opd.path(at, v)[0] - kl, torch.tensor([6.0, -3.6, 2.4]).double())
    # KL > 0 is always a negative credit: rho = 2 stays, rho = 1/2 is cut at 0.8
    for estimator in (opd.literal, opd.released):
        torch.testing.assert_close(estimator(at, v)[0], kl * torch.tensor([2.0, 2.0, 0.8]))
    torch.testing.assert_close(opd.sampled(at, v)[0], -torch.minimum(rho * reward, rho.clamp(0.8, 1.2) * reward))
    # the clip belongs to the reduction: rho^(1/D) = 1.07 and 0.93 are within 0.2
    assert not opd.sampled_path(at._replace(reduce="mean"), v)[1]["clip_fraction"].any()
    # the reward is clamped at +-1: credits 1, -1, 1
    loss = opd.sampled_path(at._replace(credit_clip=1.0), v)[0]
    torch.testing.assert_close(loss, torch.tensor([-1.2, 2.0, -0.5]).double())
    loss = opd.released(at._replace(credit_clip=1e-6), v)[0]
    assert grad_of(loss + opd.literal(at._replace(credit_clip=1e-6), v)[0], v).abs().max() < 1e-4, "nor the reward's"


def test_equal_velocities_give_zero_loss_and_no_direct_gradient():
    at, v = transition()
    at = at._replace(v_target=v.detach().clone())
    for name in ("literal", "released", "analytic", "sampled", "velocity"):
        loss, _ = opd.ESTIMATORS[name](at, v)
        torch.testing.assert_close(loss, torch.zeros(3).double())
        assert grad_of(loss, v).abs().max() < 1e-12


@EVERY
def test_gradients_reach_the_student_and_nothing_else(estimator):
    at, v = transition()
    others = [tensor.requires_grad_() for tensor in (*at.step, *at[1:]) if isinstance(tensor, torch.Tensor)]
    assert len(others) == 6
    student, *rest = torch.autograd.grad(opd.ESTIMATORS[estimator](at, v)[0].sum(), [v, *others], allow_unused=True)
    assert student.abs().max() > 0 and all(gradient is None for gradient in rest)


# ------------------------------------------------------------ mean gradients, on a flow where they are known exactly
# T^2 of 2D = 16 parameters is chi-squared: mean 16, std sqrt(32) = 5.7. 50 is the 99.998 % point (1 in 40,000).
CHANCE, COUNT, LAMBDA = 50, 10_000, 0.7
MOVED = tuple(x + 0.05 * y for x, y in zip(flow.STUDENT, flow.offset(5)))  # after an update on other trajectories


@pytest.fixture(scope="module")
def walks():
    """Trajectories whose noisy steps are all six, or the first four."""
    return {stop: flow.walk(COUNT, torch.Generator().manual_seed(stop), 0, stop) for stop in (6, 4)}


def test_the_exact_gradient_of_whole_trajectories_is_that_of_a_simulated_kl():
    # Second route to the reference itself: E[sum_t w_t ||dv||^2] by simulation at theta +- h with common noise.
    h, count, theta = 1e-3, 20_000, torch.cat(flow.STUDENT)

    def simulated(theta, weight, start, stop, trained):
        k, b = theta.view(2, -1)
        generator = torch.Generator().manual_seed(5)
        x = torch.randn(count, len(k), generator=generator, dtype=torch.float64)
        grid = [1 - n / flow.STEPS for n in range(flow.STEPS + 1)]
        student = lambda x, t: flow.teacher(x, t) + k * x + b  # noqa: E731
        path = list(rollout(student, x, grid, flow.LEVEL, window=(start, stop), generator=generator))
        path = [path[n] for n in trained or range(start, stop)]
        return sum(opd.time_weight(weight, s.t, s.dt, s.sigma) * (k * s.x + b).square().sum(1) for s in path)

    for weight, start, stop, trained in (("kl", 0, 6, ()), ("uniform", 1, 5, (2, 4))):
        exact = flow.exact_gradients(weight, start, stop, trained=trained)["whole"]
        for i in (0, 3, 11):
            nudge = torch.zeros_like(theta)
            nudge[i] = h
            up, down = (simulated(theta + sign * nudge, weight, start, stop, trained) for sign in (1, -1))
            slopes = (up - down) / (2 * h)  # (count,)
            assert abs(slopes.mean() - exact[i]) < 5 * slopes.std() / count**0.5 + 1e-4


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("estimator", flow.FOLLOWS)
def test_every_estimator_beside_mar_follows_its_exact_gradient_under_every_setting(walks, estimator, weight):
    """The gradient of estimator + lambda MAR has the direction, and the balance of its parts, of the true sums."""
    own = flow.FOLLOWS[estimator]
    for stop, (theta, reduce) in product((6, 4), ((flow.STUDENT, "sum"), (flow.STUDENT, "mean"), (MOVED, "sum"))):
        found = flow.trajectory_gradients(walks[stop], estimator, None, LAMBDA, theta, weight=weight, reduce=reduce)
        exact = flow.exact_gradients(weight, 0, stop, new=theta)
        t2 = {name: flow.distance(found, (exact[name] + LAMBDA * exact["mar"]) / flow.DIMS) for name in exact}
        assert t2[own] < CHANCE, (stop, theta is MOVED, reduce, t2)
        others = {"zero", "direct", "path"} - {own.removeprefix("old ")}
        assert min(t2[name] for name in others) > 2 * CHANCE, (stop, theta is MOVED, reduce, t2)
        assert flow.distance(found, exact[own] / flow.DIMS + LAMBDA * exact["mar"]) > 2 * CHANCE, "MAR is not over D"


def test_the_averaged_ratio_is_no_importance_weight_off_policy(walks):
    """DEVIATION (released log-prob): exp of a mean is the D-th root of rho; off-policy the gradient is not exact."""
    exact = flow.exact_gradients(new=MOVED)["old direct"] / flow.DIMS
    for reduce, exactly in (("sum", True), ("mean", False)):
        t2 = flow.distance(flow.trajectory_gradients(walks[6], "sampled", theta=MOVED, reduce=reduce), exact)
        assert t2 < CHANCE if exactly else t2 > 2 * CHANCE, (reduce, t2)


@pytest.mark.parametrize("estimator", opd.NEEDS_FUTURE)
def test_path_estimators_are_exact_for_the_first_steps_and_biased_for_what_is_refused(estimator):
    """A deterministic step that carries theta before the noisy ones, and noisy steps that are left out."""
    for start, trained, accepted in ((0, (0, 1, 2), True), (2, (), False), (0, (1, 3, 5), False)):
        walk = flow.walk(2 * COUNT, torch.Generator().manual_seed(1), start, 6, trained)
        exact = flow.exact_gradients("uniform", start, 6, trained=trained)["whole"] / flow.DIMS
        t2 = flow.distance(flow.trajectory_gradients(walk, estimator, weight="uniform"), exact)
        assert t2 < CHANCE if accepted else t2 > 2 * CHANCE, (start, trained, t2)


def test_analytic_needs_tens_of_times_fewer_trajectories_than_sampled(walks):
    std = {e: flow.trajectory_gradients(walks[6], e).var(0).sum() ** 0.5 for e in flow.FOLLOWS}
    assert 5 < std["sampled"] / std["analytic"] < 9  # 25 to 80 times fewer for the same standard error
    assert std["analytic"] < min(value for name, value in std.items() if name != "analytic") / 4


PLANTED = {
    "lost detach": ("literal", opd.released, {}),
    "kept detach": ("released", opd.literal, {}),
    "wrong sign": ("sampled", lambda at, v: (-opd.sampled(at, v)[0], {}), {}),
    "wrong sign of the future": ("path", lambda at, v: opd.path(at._replace(future=-at.future), v), {}),
    "no future": ("path", opd.analytic, {}),
    "dropped dt": ("analytic", lambda at, v: (opd.analytic(at, v)[0] / at.step.dt, {}), {}),
    "averaged ratio without D": ("sampled", lambda at, v: opd.surrogate(at, v, opd.sampled_reward(at)),
                                 {"reduce": "mean"}),
    "reward without the weight": ("sampled", lambda at, v: opd.sampled(at._replace(weight="kl"), v),
                                  {"weight": "uniform"}),
    "sum for MAR's mean": ("analytic", lambda at, v: (D * opd.analytic(at, v)[0], {}), {}),
}  # fmt: skip


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_fail_the_same_oracle(walks, bug):
    estimator, broken, more = PLANTED[bug]
    exact = flow.exact_gradients(more.get("weight", "kl"))
    target = (exact[flow.FOLLOWS[estimator]] + LAMBDA * exact["mar"]) / flow.DIMS
    assert flow.distance(flow.trajectory_gradients(walks[6], estimator, broken, LAMBDA, **more), target) > 3 * CHANCE
