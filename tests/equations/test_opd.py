"""Do the estimators of opd.py follow the KL between student and teachers?

Proven here: each estimator's value and gradient on one transition by an independent route; their mean gradients on a
linear-Gaussian flow whose exact gradients are known (`tests/helpers/linear_gaussian.py`): `literal` is noise around
zero, `analytic`, `released` and `sampled` have the gradient at fixed states, the `path` forms that of whole
trajectories; planted bugs fail the same oracles; backward inside the rollout is backward afterwards.
"""

import math

import pytest
import torch

import opd
from kl import gaussian_kl
from sde import log_prob, rollout, sde_mean, time_grid
from tests.helpers import linear_gaussian

T_, DT, SIGMA = 0.5, 0.25, 0.8
STD = SIGMA * DT**0.5  # 0.4
WEIGHT = 0.3403125  # w(0.5) = 0.125 (0.8 * 0.5 / 1 + 1 / 0.8)^2 = 0.125 * 1.65^2
WEIGHTS = {"kl": WEIGHT, "kl_dt": WEIGHT / 4, "uniform": 1, "dt": 0.25, "ode": 0.03125}  # dt^2/2 = 1/32
RATIO = ("literal", "released", "sampled", "path", "sampled_path")  # the estimators that have a ratio
EVERY = pytest.mark.parametrize("estimator", opd.ESTIMATORS)
SHAPE = (3, 2, 5)  # B, and D = 10


def randn(seed, *shape):
    return torch.randn(shape or SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def transition(seed=0, **changes):
    """(visit, v): random numbers, v a leaf, the action drawn from the student."""
    v, v_target, x = randn(seed + 1).requires_grad_(), randn(seed + 2), randn(seed + 3)
    x_next = sde_mean(x, v.detach(), T_, DT, SIGMA) + STD * randn(seed + 4)
    return opd.Visit(x, x_next, T_, DT, SIGMA, v_target, future=randn(seed + 5, 3))._replace(**changes), v


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
            opd.weight(name, T_, DT, sigma)


def visit_of_means(x_next, mean_target, mean_old, std):
    """At t = 1 with dt = 1 and x = 0 the mean of the action is -v."""
    return opd.Visit(torch.zeros_like(mean_old), x_next, 1.0, 1.0, std, -mean_target), -mean_old


def test_sampled_reward_by_hand():
    # a = 1, mean_target = 0, mean_old = 3, std = 2: [-(1)^2 + (1-3)^2] / (2 * 4) = 3/8; the second dimension,
    # with a = 0, -1, 0: [-1 + 0] / 8 = -1/8. The constants of the two densities cancel.
    at, v = visit_of_means(*(torch.tensor([row]).double() for row in ([1, 0.0], [0, -1.0], [3, 0.0])), 2.0)
    assert not opd.sampled_reward(at, v.requires_grad_()).requires_grad
    torch.testing.assert_close(opd.sampled_reward(at, v), torch.tensor([0.25]).double())
    torch.testing.assert_close(opd.sampled_reward(at._replace(reduce="mean"), v), torch.tensor([0.125]).double())


def test_the_mean_of_the_sampled_reward_is_minus_the_kl():
    mean_target, mean_old, count, std = randn(1, 1, 4), randn(2, 1, 4), 40_000, 0.9
    actions = mean_old + std * randn(3, count, 4)
    at, v = visit_of_means(actions, mean_target.expand(count, 4), mean_old.expand(count, 4), std)
    kl = gaussian_kl(mean_old, mean_target, std)
    # Var of the log-ratio of two Gaussians of one covariance is 2 KL: five standard errors
    assert abs(opd.sampled_reward(at, v).mean() + kl).item() < 5 * math.sqrt(2 * kl.item() / count)


def test_reward_to_go_by_hand():
    steps = torch.tensor([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]])  # T = 3, B = 2
    assert opd.reward_to_go(steps).tolist() == [[7, 70], [6, 60], [4, 40]]
    assert opd.reward_to_go(steps, inclusive=False).tolist() == [[6, 60], [4, 40], [0, 0]]
    assert opd.reward_to_go(steps.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("weight", ["kl", "kl_dt"])
def test_futures_are_the_later_kls_and_this_and_later_log_ratios(weight):
    visits, vs = zip(*(transition(seed, weight=weight) for seed in (0, 10, 20)))
    kls = [WEIGHTS[weight] * (v - at.v_target).square().sum((1, 2)) for at, v in zip(visits, vs)]
    torch.testing.assert_close(opd.futures("path", visits, vs), [kls[1] + kls[2], kls[2], 0 * kls[2]])
    ratios = [opd.sampled_reward(at, v) for at, v in zip(visits, vs)]
    torch.testing.assert_close(opd.futures("sampled_path", visits, vs), [sum(ratios[n:]) for n in range(3)])
    assert opd.futures("analytic", visits, vs) == [None] * 3
    assert not any(f.requires_grad for name in opd.NEEDS_FUTURE for f in opd.futures(name, visits, vs))


# ---------------------------------------------------------------------------- one transition, every estimator
def test_the_estimators_are_the_documented_ones_and_their_defaults_the_true_kl_on_policy_and_unclipped():
    assert list(opd.ESTIMATORS) == ["literal", "released", "analytic", "sampled", "path", "sampled_path", "velocity"]
    at, v = transition()
    explicit = at._replace(log_prob_old=None, clip=None, reduce="sum", weight="kl")
    for estimator in opd.ESTIMATORS.values():
        assert torch.equal(estimator(at, v), estimator(explicit, v))


@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_values_and_gradients_on_policy(reduce, weight):
    # Independent route: gaussian_kl and log_prob of the means. On-policy rho = 1, so that the values are the rewards'.
    at, v = transition(reduce=reduce, weight=weight)
    mean, mean_target = sde_mean(at.x, v, T_, DT, SIGMA), sde_mean(at.x, at.v_target, T_, DT, SIGMA)
    kl = gaussian_kl(mean, mean_target, STD, reduce) * WEIGHTS[weight] / WEIGHT
    score = log_prob(at.x_next, mean, STD, reduce)
    reward = (log_prob(at.x_next, mean_target, STD, reduce) - score).detach()
    dims, wide = 10 if reduce == "mean" else 1, (3, 1, 1)
    by_kl, by_score = grad_of(kl, v), grad_of(score, v)
    expected = {
        "literal": (kl, kl.view(wide) * by_score),
        "released": (kl, kl.view(wide) * by_score + by_kl),
        "analytic": (kl, by_kl),
        "sampled": (-reward, -reward.view(wide) * by_score),
        "path": (kl + dims * at.future, by_kl + dims * at.future.view(wide) * by_score),
        "sampled_path": (-at.future, -at.future.view(wide) * by_score),
        "velocity": ((v - at.v_target).square().sum((1, 2)) / dims, 2 * (v - at.v_target) / dims),
    }
    for name, (value, gradient) in expected.items():
        loss = opd.ESTIMATORS[name](at, v)
        torch.testing.assert_close(loss, value, msg=name)
        torch.testing.assert_close(grad_of(loss, v), gradient.detach(), msg=name)


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_the_first_ratio_is_exactly_one(reduce):
    # -rho * future with future = 1 is -rho; exactly -1, also where the old log-prob is given and equal
    at, v = transition(reduce=reduce, future=torch.ones(3).double())
    assert opd.sampled_path(at, v).tolist() == [-1, -1, -1]
    old = log_prob(at.x_next, sde_mean(at.x, v, T_, DT, SIGMA), STD, reduce)
    loss = opd.sampled_path(at._replace(log_prob_old=old), v)
    assert loss.tolist() == [-1, -1, -1]
    assert grad_of(loss, v).abs().max() > 0  # log_prob_old is detached: the ratio has its gradient


def test_off_policy_the_ratio_reweights_the_credit_and_clipping_takes_the_pessimistic_branch():
    rho, credit = torch.tensor([2.0, 2.0, 0.5]).double(), torch.tensor([3.0, -3.0, 3.0]).double()
    at, v = transition(future=credit)
    new = log_prob(at.x_next, sde_mean(at.x, v, T_, DT, SIGMA), STD, "sum").detach()
    at = at._replace(log_prob_old=new - rho.log())
    mean_target = sde_mean(at.x, at.v_target, T_, DT, SIGMA)
    reward = log_prob(at.x_next, mean_target, STD, "sum") - at.log_prob_old  # against the *old* policy
    kl, future = opd.analytic(at, v), at.future
    for name, value in {"literal": rho * kl, "released": rho * kl, "sampled": -rho * reward, "analytic": kl,
                        "path": kl + rho * future, "sampled_path": -rho * future}.items():  # fmt: skip
        torch.testing.assert_close(opd.ESTIMATORS[name](at, v), value, msg=name)
    # eps = 0.2: min(6, 3.6) = 3.6; min(-6, -3.6) = -6; min(1.5, 2.4) = 1.5
    at = at._replace(clip=0.2)
    loss = opd.sampled_path(at, v)
    torch.testing.assert_close(loss, torch.tensor([-3.6, 6.0, -1.5]).double())
    moved = grad_of(loss, v).flatten(1).norm(dim=1)
    assert moved[0] == 0 and moved[1] > 0 and moved[2] > 0
    # costs, credit -future: min(-6, -3.6) = -6; min(6, 3.6) = 3.6; min(-1.5, -2.4) = -2.4; the loss is the negative
    torch.testing.assert_close(opd.path(at, v) - kl, torch.tensor([6.0, -3.6, 2.4]).double())
    # KL > 0 is always a negative credit: rho = 2 stays, rho = 1/2 is cut at 0.8
    for estimator in (opd.literal, opd.released):
        torch.testing.assert_close(estimator(at, v), kl * torch.tensor([2.0, 2.0, 0.8]))
    torch.testing.assert_close(opd.sampled(at, v), -torch.minimum(rho * reward, rho.clamp(0.8, 1.2) * reward))


def test_reduce_mean_is_the_path_gradient_divided_by_d_and_not_a_mixture():
    # Without the factor D the credit would shrink by D^2 where the KL shrinks by D, and `path` would turn into
    # `analytic` at 65,536 dimensions.
    at, v = transition()
    mean = opd.path(at._replace(future=at.future / 10, reduce="mean"), v)
    torch.testing.assert_close(grad_of(mean, v), grad_of(opd.path(at, v), v) / 10)


def test_equal_velocities_give_zero_loss_and_no_direct_gradient():
    at, v = transition()
    at = at._replace(v_target=v.detach().clone())
    for name in ("literal", "released", "analytic", "sampled", "velocity"):
        loss = opd.ESTIMATORS[name](at, v)
        torch.testing.assert_close(loss, torch.zeros(3).double())
        assert grad_of(loss, v).abs().max() < 1e-12


@EVERY
def test_gradients_reach_the_student_and_nothing_else(estimator):
    at, v = transition(log_prob_old=randn(9, 3))
    others = [tensor.requires_grad_() for tensor in at if isinstance(tensor, torch.Tensor)]
    assert len(others) == 5
    student, *rest = torch.autograd.grad(opd.ESTIMATORS[estimator](at, v).sum(), [v, *others], allow_unused=True)
    assert student.abs().max() > 0 and all(gradient is None for gradient in rest)


# ----------------------------------------------------------------------------- independence, shapes, precision
# -------------------------------------------------------------------------- a nonlinear student, in one pass
def make_student(seed):
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3)).double()
    return net, lambda x, t: net(torch.cat([x, torch.full_like(x[:, :1], t)], dim=1))


@pytest.mark.parametrize("estimator", [name for name in opd.ESTIMATORS if name not in opd.NEEDS_FUTURE])
def test_backward_inside_the_rollout_equals_the_stored_trajectory(estimator):
    (net, student), (_, teacher) = make_student(0), make_student(1)
    level, x0, ts = 0.0 if estimator == "velocity" else 0.7, randn(2, 7, 3), time_grid(5, shift=3.0)

    def loss(step, v):
        at = opd.Visit(step.x, step.x_next, step.t, step.dt, step.sigma, teacher(step.x, step.t))
        return opd.ESTIMATORS[estimator](at, v).mean() / 5

    for step in rollout(student, x0, ts, level, generator=torch.Generator().manual_seed(3)):
        loss(step, step.v).backward()  # the rollout's own forward carries the gradient; its graph is freed at once
    single = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    with torch.no_grad():
        stored = list(rollout(student, x0, ts, level, generator=torch.Generator().manual_seed(3)))
    sum(loss(step, student(step.x, step.t)) for step in stored).backward()
    for one, two in zip(single, [p.grad for p in net.parameters()]):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-6)


# -------------------------------------------------------- the estimator table, on a flow with exact gradients
# T^2 of 2D = 16 parameters is chi-squared: mean 16, std sqrt(32) = 5.7. 45 is the 99.99 % point (1 in 7,000).
CHANCE = 45


@pytest.fixture(scope="module")
def table():
    return {row["estimator"]: row for row in linear_gaussian.estimator_table(100_000, seed=0)}


def test_the_exact_path_gradient_is_that_of_a_simulated_kl():
    # Second route to the reference itself: E[sum_t KL_t] by simulation at theta +- h with common noise.
    exact, h, count = linear_gaussian.exact_gradients()["path"], 1e-3, 20_000
    theta = torch.cat(linear_gaussian.student_offset())

    def kl_of_paths(theta):
        k, b = theta.view(2, -1)
        generator = torch.Generator().manual_seed(5)

        def student(x, t):
            slope, shift = linear_gaussian.teacher_coefficients(t)
            return slope * x + shift + k * x + b

        x = torch.randn(count, len(k), generator=generator, dtype=torch.float64)
        grid = [1 - n / linear_gaussian.STEPS for n in range(linear_gaussian.STEPS + 1)]
        path = rollout(student, x, grid, linear_gaussian.LEVEL, generator=generator)
        return sum(opd.weight("kl", s.t, s.dt, s.sigma) * (k * s.x + b).square().sum(1) for s in path)

    for i in (0, 3, 11):
        nudge = torch.zeros_like(theta)
        nudge[i] = h
        slopes = (kl_of_paths(theta + nudge) - kl_of_paths(theta - nudge)) / (2 * h)  # (count,)
        assert abs(slopes.mean() - exact[i]) < 5 * slopes.std() / count**0.5 + 1e-4


def test_literal_has_zero_mean_gradient(table):
    # ERRATUM of F Eq. 10-11: T^2 against zero is what chance gives; against the direct gradient it is not.
    assert table["literal"]["t2_zero"] < CHANCE < 10 * CHANCE < table["literal"]["t2_direct"]
    assert table["literal"]["t2_path"] > 10 * CHANCE


@pytest.mark.parametrize("estimator", ["released", "analytic", "sampled"])
def test_released_analytic_and_sampled_are_unbiased_for_the_direct_gradient(table, estimator):
    row = table[estimator]
    assert row["t2_direct"] < CHANCE < 10 * CHANCE < min(row["t2_zero"], row["t2_path"])
    assert row["cos_direct"] > 0.99


@pytest.mark.parametrize("estimator", opd.NEEDS_FUTURE)
def test_the_path_estimators_are_unbiased_for_the_kl_of_whole_trajectories(table, estimator):
    row = table[estimator]
    assert row["t2_path"] < CHANCE < 10 * CHANCE < min(row["t2_zero"], row["t2_direct"])
    assert row["cos_path"] > 0.99


def test_analytic_needs_tens_of_times_fewer_trajectories_than_sampled(table):
    # 25 to 80 times fewer trajectories for the same standard error
    assert 5 < table["sampled"]["std"] / table["analytic"]["std"] < 9
    assert table["analytic"]["std"] < min(table[name]["std"] for name in RATIO) / 4


@pytest.mark.parametrize(
    "estimator, target, broken",
    [
        ("literal", "zero", opd.released),  # the detach is lost
        ("released", "direct", opd.literal),  # the detach is kept
        ("sampled", "direct", lambda at, v: -opd.sampled(at, v)),
        ("path", "path", lambda at, v: opd.path(at._replace(future=-at.future), v)),
        ("path", "path", opd.analytic),  # no future
        ("analytic", "direct", lambda at, v: opd.analytic(at, v) / at.dt),
    ],
    ids=["lost detach", "kept detach", "wrong sign", "wrong sign of the future", "no future", "dropped dt"],
)
def test_planted_bugs_fail_the_same_oracles(estimator, target, broken):
    (row,) = linear_gaussian.estimator_table(20_000, 0, (estimator,), {estimator: broken})
    assert row["t2_" + target] > 5 * CHANCE
