"""Oracles for opd.py: worked numbers, autograd, the exact gradients of a linear-Gaussian flow, planted bugs."""

import math
import sys

import pytest
import torch

import opd
from kl import gaussian_kl, kl_weight
from sde import log_prob, rollout, sde_mean, time_grid
from tests.helpers import linear_gaussian

T_, DT, SIGMA = 0.5, 0.25, 0.8
STD = SIGMA * DT**0.5  # 0.4
# w(0.5) = 0.125 (0.8 * 0.5 / 1 + 1 / 0.8)^2 = 0.125 * 1.65^2
WEIGHT = 0.3403125
RATIO = ("literal", "released", "sampled", "path", "sampled_path")  # the estimators that have a ratio
SHAPE = (3, 2, 5)  # B, and D = 10


def randn(seed, *shape):
    return torch.randn(shape or SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def opd_loss(name, *, v_student, scale="true", **step):
    step = {"log_prob_old": None, "future": None} | step
    weight = {"true": "kl", "released": "kl_dt"}.get(scale, scale)
    return opd.ESTIMATORS[name](opd.Visit(**step, weight=weight), v_student)


def transition(seed=0, **changes):
    """Random arguments of opd_loss; the action is drawn from the student, v_student is a leaf."""
    v, v_target, x = randn(seed + 1), randn(seed + 2), randn(seed + 3)
    x_next = sde_mean(x, v, T_, DT, SIGMA) + STD * randn(seed + 4)
    arguments = {"v_student": v.requires_grad_(), "v_target": v_target, "t": T_, "dt": DT, "sigma": SIGMA}
    return arguments | {"x": x, "x_next": x_next, "future": randn(seed + 5, 3)} | changes


def grad_of(loss, v):
    return torch.autograd.grad(loss.sum(), v, retain_graph=True)[0]


# ------------------------------------------------------------------------------------------------ the routing
def test_route_gives_every_row_to_the_expert_of_its_task_exactly_once():
    experts = {"text": "ocr", "composition": "geneval", "counting": "geneval"}
    rows = opd.route(["composition", "text", "counting", "text", "composition"], experts)
    assert {name: own.tolist() for name, own in rows.items()} == {"geneval": [0, 2, 4], "ocr": [1, 3]}
    assert list(rows) == ["geneval", "ocr"] and all(own.dtype == torch.int64 for own in rows.values())
    assert opd.route([], experts) == {}
    with pytest.raises(ValueError, match=r"no expert for task 'edit'; there are experts for \['composition', 'count"):
        opd.route(["text", "edit"], experts)


def test_target_velocity_fills_each_row_from_its_own_expert():
    x, t = randn(1, 5, 2, 3), torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5], dtype=torch.float64)
    calls = []

    def velocity(expert, rows, x_rows, t_rows):
        calls.append((expert, rows.tolist()))
        assert torch.equal(x_rows, x[rows])
        return {"a": 10, "b": 100}[expert] * x_rows + t_rows.view(-1, 1, 1)

    rows = {"a": torch.tensor([4, 0]), "b": torch.tensor([1, 2, 3])}
    got = opd.target_velocity(rows, velocity, x, t)
    factor = torch.tensor([10, 100, 100, 100, 10]).view(-1, 1, 1)
    torch.testing.assert_close(got, factor * x + t.view(-1, 1, 1))
    assert calls == [("a", [4, 0]), ("b", [1, 2, 3])]  # one call an expert
    for scalar in (0.7, torch.tensor(0.7)):
        got = opd.target_velocity(rows, lambda expert, rows, x, t: x * t, x, scalar)
        torch.testing.assert_close(got, 0.7 * x, atol=1e-7, rtol=1e-6)


def test_target_velocity_has_no_gradient_and_float32_at_least():
    teacher = torch.nn.Linear(4, 4).bfloat16()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    got = opd.target_velocity({"a": torch.arange(3)}, lambda expert, rows, x, t: teacher(x), x, 0.5)
    assert got.dtype == torch.float32 and not got.requires_grad
    torch.testing.assert_close(got, teacher(x).float())
    assert opd.target_velocity({"a": torch.arange(3)}, lambda e, r, x, t: x, x.double(), 0.5).dtype == torch.float64


@pytest.mark.parametrize("rows", [{}, {"a": [0, 1]}, {"a": [0, 1], "b": [1, 2]}, {"a": [0, 1, 2, 3]}])
def test_target_velocity_refuses_rows_that_miss_or_repeat_a_sample(rows):
    rows = {name: torch.tensor(own) for name, own in rows.items()}
    with pytest.raises(ValueError, match="every one of the 3 samples needs exactly one expert"):
        opd.target_velocity(rows, lambda expert, rows, x, t: x, randn(0), 0.5)


def test_target_velocity_refuses_an_answer_of_another_shape():
    with pytest.raises(ValueError, match="shapes differ"):
        rows = {"a": torch.tensor([1]), "b": torch.tensor([0, 2])}
        opd.target_velocity(rows, lambda expert, rows, x, t: x[:1], randn(0), 0.5)


# ------------------------------------------------------------------------------------ rewards, worked by hand
def test_dense_reward_by_hand():
    # gaps (1, 2) and (0, 2): -0.3403125 * 5 = -1.7015625, -0.3403125 * 4 = -1.36125
    v, v_target = torch.tensor([[1.0, 3.0], [2.0, 0.0]]).double(), torch.tensor([[0.0, 1.0], [2.0, 2.0]]).double()
    v.requires_grad_()
    reward = opd.dense_reward(v, v_target, T_, DT, SIGMA)
    torch.testing.assert_close(reward, torch.tensor([-1.7015625, -1.36125]).double())
    assert not reward.requires_grad
    torch.testing.assert_close(opd.dense_reward(v, v_target, T_, DT, SIGMA, "mean"), reward / 2)
    torch.testing.assert_close(opd.dense_reward(v, v_target, T_, DT, SIGMA, weight="kl_dt"), reward * DT)


def visit_with_means(x_next, mean_target, mean_old, std):
    """At t = 1 with dt = 1 and sigma = std, mu = x - v - sigma^2 x/2: velocities that give the two means."""
    x = torch.zeros_like(mean_old)
    return opd.Visit(x, x_next, 1.0, 1.0, std, -mean_target), -mean_old


def test_sampled_reward_by_hand():
    # a = 1, mean_target = 0, mean_old = 3, std = 2: [-(1)^2 + (1-3)^2] / (2 * 4) = 3/8; the second dimension,
    # with a = 0, -1, 0: [-1 + 0] / 8 = -1/8. The constants of the two densities cancel.
    at, v = visit_with_means(*(torch.tensor([row]).double() for row in ([1, 0.0], [0, -1.0], [3, 0.0])), 2.0)
    reward = opd.sampled_reward(at, v.requires_grad_())
    torch.testing.assert_close(reward, torch.tensor([0.25]).double())
    assert not reward.requires_grad
    torch.testing.assert_close(opd.sampled_reward(at._replace(reduce="mean"), v), reward / 2)


def test_the_mean_of_the_sampled_reward_is_minus_the_kl():
    mean_target, mean_old = randn(1, 1, 4), randn(2, 1, 4)
    count, std = 40_000, 0.9
    actions = mean_old + std * randn(3, count, 4)
    rewards = opd.sampled_reward(
        *visit_with_means(actions, mean_target.expand(count, 4), mean_old.expand(count, 4), std)
    )
    kl = gaussian_kl(mean_old, mean_target, std)
    # Var of the log-ratio of two Gaussians of one covariance is 2 KL: five standard errors
    assert abs(rewards.mean() + kl).item() < 5 * math.sqrt(2 * kl.item() / count)


def test_reward_to_go_by_hand():
    steps = torch.tensor([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]])  # T = 3, B = 2
    assert opd.reward_to_go(steps).tolist() == [[7, 70], [6, 60], [4, 40]]
    assert opd.reward_to_go(steps, inclusive=False).tolist() == [[6, 60], [4, 40], [0, 0]]
    assert opd.reward_to_go(steps.bfloat16()).dtype == torch.float32
    assert opd.reward_to_go(steps[:1], inclusive=False).tolist() == [[0, 0]]


def test_velocity_matching_by_hand():
    v, teacher = torch.tensor([[1.0, 3.0], [2.0, 0.0]]).requires_grad_(), torch.tensor([[0.0, 1.0], [2.0, 2.0]])
    assert opd.velocity_matching(v, teacher.requires_grad_()).tolist() == [5, 4]
    assert opd.velocity_matching(v, teacher, "mean").tolist() == [2.5, 2]
    opd.velocity_matching(v, teacher).sum().backward()
    assert teacher.grad is None and v.grad.tolist() == [[2, 4], [0, -4]]  # 2 (v - v*)
    assert opd.velocity_matching(v.bfloat16(), teacher.bfloat16()).dtype == torch.float32
    with pytest.raises(ValueError, match=r"v_student \(2, 2\), v_teacher \(2,\)"):
        opd.velocity_matching(v, teacher[:, 0])


def test_mar_penalty_is_the_weighted_gap_with_a_gradient_to_the_student_only():
    v, anchor = torch.tensor([[1.0, 3.0], [2.0, 0.0]]).double(), torch.tensor([[0.0, 1.0], [2.0, 2.0]]).double()
    v.requires_grad_(), anchor.requires_grad_()
    penalty = opd.mar_penalty(v, anchor, T_, DT, SIGMA)
    torch.testing.assert_close(penalty, torch.tensor([1.7015625, 1.36125]).double())
    penalty.sum().backward()
    assert anchor.grad is None
    torch.testing.assert_close(v.grad, 2 * WEIGHT * torch.tensor([[1.0, 2.0], [0.0, -2.0]]).double())
    torch.testing.assert_close(opd.mar_penalty(v, anchor, T_, DT, SIGMA, "mean"), penalty / 2)
    torch.testing.assert_close(opd.mar_penalty(v, anchor, T_, DT, SIGMA, weight="kl_dt"), penalty * DT)


# ---------------------------------------------------------------------------- one transition, every estimator
@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("scale", ["true", "released"])
def test_values_and_gradients_on_policy(reduce, scale):
    # Independent route: gaussian_kl and log_prob of the means. On-policy rho = 1, so that the
    # values are the rewards'.
    step = transition(reduce=reduce, scale=scale)
    v, target, x, x_next, future = (step[name] for name in ("v_student", "v_target", "x", "x_next", "future"))
    mean, mean_target = sde_mean(x, v, T_, DT, SIGMA), sde_mean(x, target, T_, DT, SIGMA)
    kl = gaussian_kl(mean, mean_target, STD, reduce) * (DT if scale == "released" else 1)
    score = log_prob(x_next, mean, STD, reduce)
    reward = (log_prob(x_next, mean_target, STD, reduce) - score).detach()
    dims = 10 if reduce == "mean" else 1
    wide = (3, 1, 1)
    by_kl, by_score = grad_of(kl, v), grad_of(score, v)
    expected = {
        "literal": (kl, kl.view(wide) * by_score),
        "released": (kl, kl.view(wide) * by_score + by_kl),
        "analytic": (kl, by_kl),
        "sampled": (-reward, -reward.view(wide) * by_score),
        "path": (kl + dims * future, by_kl + dims * future.view(wide) * by_score),
        "sampled_path": (-future, -future.view(wide) * by_score),
        "velocity": ((v - target).square().flatten(1).sum(1) / dims, 2 * (v - target) / dims),
    }
    assert set(expected) == set(opd.ESTIMATORS)
    for name, (value, gradient) in expected.items():
        loss = opd_loss(name, **step)
        assert loss.shape == (3,)
        torch.testing.assert_close(loss, value, msg=name)
        torch.testing.assert_close(grad_of(loss, v), gradient.detach(), msg=name)


def test_defaults_are_on_policy_unclipped_sum_and_the_true_kl():
    step = transition()
    explicit = {"log_prob_old": None, "clip": None, "reduce": "sum", "scale": "true"}
    for name in opd.ESTIMATORS:
        assert torch.equal(opd_loss(name, **step), opd_loss(name, **step, **explicit))
    gap = (step["v_student"] - step["v_target"]).square().sum((1, 2))
    torch.testing.assert_close(opd_loss("analytic", **step), WEIGHT * gap)
    assert kl_weight(T_, DT, SIGMA) == pytest.approx(WEIGHT)


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_the_first_ratio_is_exactly_one(reduce):
    step = transition(reduce=reduce)
    # -rho * future with future = 1 is -rho; exactly -1, also where the old log-prob is given and equal
    one = torch.ones(3, dtype=torch.float64)
    assert opd_loss("sampled_path", **step | {"future": one}).tolist() == [-1, -1, -1]
    old = log_prob(step["x_next"], sde_mean(step["x"], step["v_student"], T_, DT, SIGMA), STD, reduce)
    loss = opd_loss("sampled_path", **step | {"future": one, "log_prob_old": old})
    assert loss.tolist() == [-1, -1, -1]
    assert grad_of(loss, step["v_student"]).abs().max() > 0  # log_prob_old is detached: the ratio has its gradient


def test_off_policy_the_ratio_reweights_the_credit_by_hand():
    # log_prob_old = log_prob - log 2: rho = 2 everywhere
    step = transition()
    v, future = step["v_student"], step["future"]
    mean, mean_target = (sde_mean(step["x"], u, T_, DT, SIGMA) for u in (v, step["v_target"]))
    new = log_prob(step["x_next"], mean, STD, "sum")
    step["log_prob_old"] = (new - math.log(2)).detach()
    kl = opd_loss("analytic", **step)
    reward = log_prob(step["x_next"], mean_target, STD, "sum") - step["log_prob_old"]  # against the *old* policy
    for name, value in {"literal": 2 * kl, "released": 2 * kl, "sampled": -2 * reward, "path": kl + 2 * future,
                        "sampled_path": -2 * future, "analytic": kl}.items():  # fmt: skip
        torch.testing.assert_close(opd_loss(name, **step), value, msg=name)


def test_reduce_mean_is_the_path_gradient_divided_by_d_and_not_a_mixture():
    # Without the factor D the credit would shrink by D^2 where the KL shrinks by D, and `path` would turn
    # into `analytic` at 65,536 dimensions.
    step = transition()
    total = grad_of(opd_loss("path", **step), step["v_student"])
    mean = opd_loss("path", **step | {"future": step["future"] / 10}, reduce="mean")
    torch.testing.assert_close(grad_of(mean, step["v_student"]), total / 10)


def test_clipping_takes_the_pessimistic_branch_and_cuts_its_gradient():
    step = transition(future=torch.tensor([3.0, -3.0, 3.0]).double(), clip=0.2)
    new = log_prob(step["x_next"], sde_mean(step["x"], step["v_student"], T_, DT, SIGMA), STD, "sum").detach()
    # rho = 2, 2, 1/2 and credits 3, -3, 3: min(6, 3.6) = 3.6; min(-6, -3.6) = -6; min(1.5, 2.4) = 1.5
    step["log_prob_old"] = new - torch.tensor([2.0, 2.0, 0.5]).double().log()
    loss = opd_loss("sampled_path", **step)
    torch.testing.assert_close(loss, torch.tensor([-3.6, 6.0, -1.5]).double())
    moved = grad_of(loss, step["v_student"]).flatten(1).norm(dim=1)
    assert moved[0] == 0 and moved[1] > 0 and moved[2] > 0
    # costs, credit -future: min(-6, -3.6) = -6; min(6, 3.6) = 3.6; min(-1.5, -2.4) = -2.4; the loss adds
    # the negative
    extra = opd_loss("path", **step) - opd_loss("analytic", **step)
    torch.testing.assert_close(extra, torch.tensor([6.0, -3.6, 2.4]).double())
    # KL > 0 is always a negative credit: rho = 2 stays, rho = 1/2 is cut at 0.8
    kl = opd_loss("analytic", **step)
    for name in ("literal", "released"):
        torch.testing.assert_close(opd_loss(name, **step), kl * torch.tensor([2.0, 2.0, 0.8]))
    at = opd.Visit(step["x"], step["x_next"], T_, DT, SIGMA, step["v_target"])
    reward = opd.sampled_reward(at, step["v_student"])
    reward = reward + torch.tensor([2.0, 2.0, 0.5]).log()
    rho = torch.tensor([2.0, 2.0, 0.5])
    expected = -torch.minimum(rho * reward, rho.clamp(0.8, 1.2) * reward)
    torch.testing.assert_close(opd_loss("sampled", **step), expected, check_dtype=False, atol=1e-6, rtol=1e-6)


def test_equal_velocities_give_zero_loss_and_no_direct_gradient():
    step = transition()
    step["v_target"] = step["v_student"].detach().clone()
    for name in ("literal", "released", "analytic", "sampled", "velocity"):
        loss = opd_loss(name, **step)
        torch.testing.assert_close(loss, torch.zeros(3).double())
        assert grad_of(loss, step["v_student"]).abs().max() < 1e-12


# --------------------------------------------------------------------------------------- independence, shapes
@pytest.mark.parametrize("estimator", opd.ESTIMATORS)
def test_sample_i_does_not_move_the_loss_of_sample_j(estimator):
    step, other = transition(), transition(seed=50)
    times = {"t": torch.tensor([0.5, 0.3, 0.9]), "dt": torch.tensor([0.25, 0.1, 0.2]),
             "sigma": torch.tensor([0.8, 0.5, 0.7])}  # fmt: skip
    step |= times
    before = opd_loss(estimator, **step)
    changed = dict(step)
    for name, tensor in step.items():
        if name not in times:
            changed[name] = torch.cat([tensor[:1], other[name][1:2], tensor[2:]])  # another sample 1
    changed["log_prob_old"] = None
    after = opd_loss(estimator, **changed)
    assert torch.equal(before[[0, 2]], after[[0, 2]]) and before[1] != after[1]
    for i in range(3):  # per-sample times are floats, sample by sample
        one = {n: (v[i].item() if n in times else v[i : i + 1]) for n, v in step.items()}
        torch.testing.assert_close(opd_loss(estimator, **one), before[i : i + 1], atol=1e-6, rtol=1e-6)


def test_the_released_shapes_give_every_sample_the_batch_mean_credit():
    # The released code: reward (B, 1), ratio (B,). With advantages 1, 2, 6 and B = 3 every ratio is
    # credited 3.
    reward, ratio = torch.tensor([[1.0], [2.0], [6.0]]), torch.ones(3, requires_grad=True)
    product = reward * ratio
    assert product.shape == (3, 3)
    product.mean().backward()
    assert ratio.grad.tolist() == [1, 1, 1]  # mean credit 3, / B = 3 for everyone; should be 1/3, 2/3, 6/3
    step = transition()
    for name in ("path", "sampled_path"):
        with pytest.raises(ValueError, match=r"ratio \(3,\), advantage \(3, 1\)"):
            opd_loss(name, **step | {"future": reward})
    for name in RATIO:
        with pytest.raises(ValueError, match=r"log_prob \(3,\), log_prob_old \(3, 1\)"):
            opd_loss(name, **step, log_prob_old=reward)
        with pytest.raises(ValueError, match="x_next"):
            opd_loss(name, **step | {"x_next": step["x_next"][:1]})
        with pytest.raises(ValueError, match=r"x \(1, 2, 5\)"):
            opd_loss(name, **step | {"x": step["x"][:1]})
    for name in ("literal", "released", "analytic", "sampled", "path", "velocity"):
        with pytest.raises(ValueError, match="shapes differ"):
            opd_loss(name, **step | {"v_target": step["v_target"][:1]})


def test_a_step_without_noise_has_no_kl_and_no_ratio_but_qs_loss():
    step = transition(sigma=0.0)
    for name in opd.ESTIMATORS:
        if name == "velocity":
            assert opd_loss(name, **step).shape == (3,)
        else:
            with pytest.raises(ValueError, match="deterministic"):
                opd_loss(name, **step)


def test_the_weights_by_hand():
    step = transition()
    gap = (step["v_student"] - step["v_target"]).square().sum((1, 2))
    for name, weight in {"kl": WEIGHT, "kl_dt": WEIGHT / 4, "uniform": 1, "dt": 0.25, "ode": 0.03125}.items():
        torch.testing.assert_close(opd_loss("analytic", **step, scale=name), weight * gap, msg=name)
        torch.testing.assert_close(opd.mar_penalty(step["v_student"], step["v_target"], T_, DT, SIGMA, weight=name),
                                   weight * gap, msg=name)  # fmt: skip
    with pytest.raises(ValueError):
        opd.weight("true", T_, DT, SIGMA)


@pytest.mark.parametrize("estimator", opd.ESTIMATORS)
def test_half_precision_comes_back_as_float32_and_float64_stays(estimator):
    step = transition()
    step["v_student"] = step["v_student"].detach()
    half = {name: value.bfloat16() if isinstance(value, torch.Tensor) else value for name, value in step.items()}
    rounded = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in half.items()}
    loss = opd_loss(estimator, **half)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), opd_loss(estimator, **rounded), atol=1e-4, rtol=1e-4)
    assert opd_loss(estimator, **step).dtype == torch.float64
    half["log_prob_old"] = torch.full((3,), -7.0).bfloat16()
    assert opd_loss(estimator, **half).dtype == torch.float32


@pytest.mark.parametrize("estimator", opd.ESTIMATORS)
def test_gradients_reach_the_student_and_nothing_else(estimator):
    step = transition()
    others = {name: step[name].requires_grad_() for name in ("v_target", "x", "x_next", "future")}
    others["log_prob_old"] = randn(9, 3).requires_grad_()
    loss = opd_loss(estimator, **step | others)
    student, *rest = torch.autograd.grad(loss.sum(), [step["v_student"], *others.values()], allow_unused=True)
    assert student.abs().max() > 0
    assert all(gradient is None for gradient in rest)


# -------------------------------------------------------------------------- a nonlinear student, in one pass
def make_student(seed):
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3)).double()
    return net, lambda x, t: net(torch.cat([x, torch.full_like(x[:, :1], t)], dim=1))


@pytest.mark.parametrize("estimator", [name for name in opd.ESTIMATORS if name not in opd.NEEDS_FUTURE])
def test_backward_inside_the_rollout_equals_the_stored_trajectory(estimator):
    net, student = make_student(0)
    _, teacher = make_student(1)
    level = 0.0 if estimator == "velocity" else 0.7
    x0, ts = randn(2, 7, 3), time_grid(5, shift=3.0)

    def loss(step, v):
        return opd_loss(estimator, v_student=v, v_target=teacher(step.x, step.t), t=step.t, dt=step.dt,
                            sigma=step.sigma, x=step.x, x_next=step.x_next).mean() / 5  # fmt: skip

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
COUNT = 100_000


@pytest.fixture(scope="module")
def table():
    return {row["estimator"]: row for row in linear_gaussian.estimator_table(COUNT, seed=0)}


def test_the_exact_path_gradient_is_that_of_a_simulated_kl():
    # Second route to the reference itself: E[sum_t KL_t] by simulation at theta +- h with common noise.
    exact, h = linear_gaussian.exact_gradients()["path"], 1e-3
    k, b = linear_gaussian.student_offset()
    count, steps = 20_000, linear_gaussian.STEPS

    def kl_of_paths(theta):
        k, b = theta.view(2, -1)
        generator = torch.Generator().manual_seed(5)

        def student(x, t):
            slope, shift = linear_gaussian.teacher_coefficients(t)
            return slope * x + shift + k * x + b

        x = torch.randn(count, len(k), generator=generator, dtype=torch.float64)
        grid = [1 - n / steps for n in range(steps + 1)]
        path = rollout(student, x, grid, linear_gaussian.LEVEL, generator=generator)
        return sum(kl_weight(s.t, s.dt, s.sigma) * (k * s.x + b).square().sum(1) for s in path)

    theta = torch.cat([k, b])
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


@pytest.mark.parametrize("estimator", ["path", "sampled_path"])
def test_the_path_estimators_are_unbiased_for_the_kl_of_whole_trajectories(table, estimator):
    row = table[estimator]
    assert row["t2_path"] < CHANCE < 10 * CHANCE < min(row["t2_zero"], row["t2_direct"])
    assert row["cos_path"] > 0.99


def test_analytic_needs_tens_of_times_fewer_trajectories_than_sampled(table):
    ratio = table["sampled"]["std"] / table["analytic"]["std"]
    assert 5 < ratio < 9  # 25 to 80 times fewer trajectories for the same standard error
    assert table["analytic"]["std"] < min(table[name]["std"] for name in RATIO) / 4


@pytest.mark.parametrize(("bug", "estimator", "target"), [
    ("lost detach", "literal", "zero"),
    ("kept detach", "released", "direct"),
    ("wrong sign", "sampled", "direct"),
    ("wrong sign of the future", "path", "path"),
    ("no future", "path", "path"),
    ("dropped dt", "analytic", "direct"),
])  # fmt: skip
def test_planted_bugs_fail_the_same_oracles(bug, estimator, target):
    def broken(at, v):
        if bug == "lost detach":
            return opd.released(at, v)
        if bug == "kept detach":
            return opd.literal(at, v)
        if bug == "wrong sign":
            return -opd.ESTIMATORS[estimator](at, v)
        if bug == "wrong sign of the future":
            return opd.path(at._replace(future=-at.future), v)
        if bug == "no future":
            return opd.analytic(at, v)
        return opd.analytic(at, v) / at.dt

    (row,) = linear_gaussian.estimator_table(20_000, 0, (estimator,), {estimator: broken})
    assert row["t2_" + target] > 5 * CHANCE


def test_the_table_is_reproducible_and_prints_as_markdown(monkeypatch, capsys):
    assert linear_gaussian.estimator_table(50, 7) == linear_gaussian.estimator_table(50, 7)
    assert linear_gaussian.estimator_table(50, 7) != linear_gaussian.estimator_table(50, 8)
    monkeypatch.setattr(sys, "argv", ["linear_gaussian.py", "--trajectories", "60"])
    linear_gaussian.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("`")[1] for line in lines[4:]] == list(opd.ESTIMATORS)[:-1]
