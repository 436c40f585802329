"""Is the KL that distillation minimises the true one, and does Q's transport bound bound?

Proven here: F Eq. 8 against torch.distributions and against sampled actions, F Eq. 9 against Eq. 8 through the SDE's
own means, Q Eq. 17 on linear flows whose Wasserstein distance is known. Planted wrong formulas fail the same oracles.
"""

import math

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

import kl
import sde

F64 = torch.float64
SHAPE = (3, 2, 5)  # B, C, W; D = 10
SD35_GRID = (1, 0.960, 0.913, 0.858, 0.790, 0.707, 0.602, 0.465, 0.278, 0.009, 0)


def draw(seed, shape=SHAPE, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---------------------------------------------------------------------------------------------------- F Eq. 8
@pytest.mark.parametrize("std", [0.3, torch.tensor([0.3, 0.8, 2.0], dtype=F64)], ids=["float", "per sample"])
def test_gaussian_kl_equals_torch_distributions(std):
    p, q = draw(0), draw(1)
    scale = std.reshape(3, 1, 1) if isinstance(std, torch.Tensor) else std
    expected = kl_divergence(Independent(Normal(p, scale), 2), Independent(Normal(q, scale), 2))
    torch.testing.assert_close(kl.gaussian_kl(p, q, std), expected)  # the default is the sum
    torch.testing.assert_close(kl.gaussian_kl(p, q, std, reduce="mean"), expected / 10)
    # By hand: ||(3,4)||^2 / (2 * .25) = 25/.5 = 50
    assert kl.gaussian_kl(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2), 0.5).item() == 50


def test_the_kl_is_the_mean_log_ratio_of_sampled_actions():
    # Monte Carlo of E_p[log p - log q] with the actions that sde_step draws; 4 standard errors.
    B, t, dt, sigma = 100_000, 0.6, 0.1, 0.8
    x, v_p, v_q = (draw(seed, (1, 3)).expand(B, 3) for seed in (2, 3, 4))
    action, mean_p, std = sde.sde_step(x, v_p, t, dt, sigma, torch.Generator().manual_seed(5))
    mean_q = sde.sde_mean(x, v_q, t, dt, sigma)
    log_ratio = sde.log_prob(action, mean_p, std, "sum") - sde.log_prob(action, mean_q, std, "sum")
    error = 4 * log_ratio.std().item() / math.sqrt(B)
    expected = kl.velocity_kl(v_p, v_q, t, dt, sigma)[0].item()
    assert log_ratio.mean().item() == pytest.approx(expected, abs=error)
    assert error < 0.1 * expected  # so that a factor, or a dropped dt, would show


# ---------------------------------------------------------------------------------------------------- F Eq. 9
def test_kl_weight_by_hand():
    # t=.5, dt=.2, sigma=.5: .5*.5/1 + 2 = 2.25; .1 * 5.0625 = .50625
    # t=.8, dt=.1, sigma=2: 2*.2/1.6 + .5 = .75; .05 * .5625 = .028125
    both = kl.kl_weight(*(torch.tensor(pair) for pair in ((0.5, 0.8), (0.2, 0.1), (0.5, 2.0))))
    torch.testing.assert_close(both, torch.tensor([0.50625, 0.028125]))
    assert kl.kl_weight(0.5, 0.2, 0.5) == pytest.approx(0.50625, abs=1e-12)
    # At t=1 the score term does not see v: only 1/sigma is left.
    assert kl.kl_weight(1.0, 0.04, 3.5) == pytest.approx(0.04 / (2 * 3.5**2))
    value = kl.velocity_kl(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2), 0.5, 0.2, 0.5)
    assert value.item() == pytest.approx(0.50625 * 5)


def test_kl_weight_spans_three_orders_of_magnitude_over_sd35s_trained_steps():
    # SD3.5, a=.7, all steps but the last: 0.0016 at t=1 (.02/12.25 = .00163) to 1.1 at t=.278.
    steps = list(zip(SD35_GRID, SD35_GRID[1:]))[:-1]
    weights = [kl.kl_weight(t, t - u, sde.noise_scale(t, u, 0.7)) for t, u in steps]
    assert weights == sorted(weights)
    assert weights[0] == pytest.approx(0.001633, rel=1e-3) and weights[-1] == pytest.approx(1.105, rel=1e-3)


@pytest.mark.parametrize("t, t_next", [(1.0, 0.9), (0.9, 0.7), (0.5, 0.45), (0.05, 0.01)])
@pytest.mark.parametrize("level", [0.2, 0.7, 1.3])
@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_velocity_kl_equals_gaussian_kl_of_the_sde_means(t, t_next, level, reduce):
    x, v_p, v_q, dt, sigma = draw(6), draw(7), draw(8), t - t_next, sde.noise_scale(t, t_next, level)
    _, mean_p, std = sde.sde_step(x, v_p, t, dt, sigma)
    expected = kl.gaussian_kl(mean_p, sde.sde_mean(x, v_q, t, dt, sigma), std, reduce)
    torch.testing.assert_close(kl.velocity_kl(v_p, v_q, t, dt, sigma, reduce), expected, rtol=1e-6, atol=0)


def test_a_weight_without_dt_or_without_its_score_term_is_not_the_kl_of_the_means():
    x, v_p, v_q, t, dt, sigma = draw(6), draw(7), draw(8), 0.6, 0.1, 0.8
    means = (sde.sde_mean(x, v, t, dt, sigma) for v in (v_p, v_q))
    per_gap = kl.gaussian_kl(*means, sigma * dt**0.5) / (v_p - v_q).square().sum((1, 2))
    torch.testing.assert_close(per_gap, torch.full((3,), kl.kl_weight(t, dt, sigma), dtype=F64))
    for wrong in (dt / 2 / sigma**2, 0.5 * (sigma * (1 - t) / (2 * t) + 1 / sigma) ** 2):
        assert not torch.isclose(per_gap, torch.full((3,), wrong, dtype=F64), rtol=0.1).any()


def test_kl_of_a_policy_with_itself_is_zero():
    v = draw(14)
    assert kl.velocity_kl(v, v, 0.5, 0.1, 0.4).tolist() == [0, 0, 0]
    assert kl.gaussian_kl(v, v, 0.4).tolist() == [0, 0, 0]


def test_gradients_flow_to_both_policies_with_opposite_sign():
    p, q = draw(15).requires_grad_(), draw(16).requires_grad_()
    # 2 w (v_p - v_q) with w by hand above, and (mu_p - mu_q) / std^2
    for loss, slope in ((kl.velocity_kl(p, q, 0.5, 0.2, 0.5), 2 * 0.50625), (kl.gaussian_kl(p, q, 0.5), 1 / 0.25)):
        by_p, by_q = torch.autograd.grad(loss.sum(), (p, q))
        torch.testing.assert_close(by_p, slope * (p - q).detach())
        torch.testing.assert_close(by_q, -by_p)


# --------------------------------------------------------------------------------------------------- Q Eq. 17
def test_w2_bound_trapezoid_by_hand_on_an_uneven_grid():
    # gap^2 = 4, 1, 3 at t = 1, .6, 0: .4*2.5 + .6*2 = 2.2; L = 0, 1, 2: .4*.5 + .6*1.5 = 1.1
    gap, lipschitz = torch.tensor([4.0, 1.0, 3.0], requires_grad=True), torch.tensor([0.0, 1.0, 2.0])
    expected = math.sqrt(2.2) * math.exp(1.1)
    bound = kl.w2_bound(gap, lipschitz, (1.0, 0.6, 0.0))
    assert bound.item() == pytest.approx(expected)
    assert kl.w2_bound(gap.flip(0), lipschitz.flip(0), torch.tensor([0.0, 0.6, 1.0])).item() == pytest.approx(expected)
    bound.backward()  # d/dgap = exp(1.1) / (2 sqrt(2.2)) times the trapezoid weights (.2, .5, .3)
    torch.testing.assert_close(gap.grad, expected / 4.4 * torch.tensor([0.2, 0.5, 0.3]))


def test_w2_bound_is_attained_by_a_constant_gap_with_a_constant_teacher():
    # v = a and v* = b shift the noise by -a and -b: W2 of two translates is |a - b| = |(3, -4)| = 5; L = 0.
    assert kl.w2_bound(torch.full((6,), 25.0), torch.zeros(6), torch.linspace(1, 0, 6)).item() == pytest.approx(5)


def linear_flow(student, teacher, without_exp=False, num=2001):
    """(W2, bound) for v = diag(student) x and v* = diag(teacher) x from x_1 ~ N(0, I), in closed form.

    x_t = exp(a (t-1)) x_1 on each axis, so E||v - v*||^2 = sum (a-b)^2 exp(2a (t-1)) under the student, the
    teacher's Lipschitz constant is max |b|, and the ends are Gaussians of std exp(-a) and exp(-b): with
    commuting covariances W2^2 is the sum of squared differences of the stds.
    """
    a, b = torch.tensor(student, dtype=F64), torch.tensor(teacher, dtype=F64)
    ts = torch.linspace(1, 0, num, dtype=F64)
    gap = ((a - b) ** 2 * torch.exp(2 * a * (ts[:, None] - 1))).sum(-1)
    lipschitz = torch.zeros(num, dtype=F64) if without_exp else b.abs().max().expand(num)
    return (torch.exp(-a) - torch.exp(-b)).norm().item(), kl.w2_bound(gap, lipschitz, ts).item()


@pytest.mark.parametrize(
    "student, teacher",
    [([0.5], [0.6]), ([-0.5], [-0.6]), ([-2.2], [-2.0]), ([0.3, -0.8], [0.1, -1.0]), ([1.0, 0.0], [-1.0, 0.5])],
)
def test_w2_bound_holds_on_linear_gaussian_flows(student, teacher):
    distance, bound = linear_flow(student, teacher)
    assert 0 < distance <= bound


def test_w2_bound_is_near_tight_for_a_slow_flow_and_false_without_its_lipschitz_factor():
    # a = -.1, b = -.12: the Lipschitz factor is all that the flow really does to an early error.
    distance, bound = linear_flow([-0.1], [-0.12])
    assert distance <= bound < 1.08 * distance
    distance, wrong = linear_flow([-2.2], [-2.0], without_exp=True)  # a planted bug
    assert wrong < distance


def test_w2_bound_refuses_what_is_no_gap_no_constant_and_no_grid():
    ones, ts = torch.ones(3), (1.0, 0.5, 0.0)
    bad = [(ones, torch.ones(2), ts), (-ones, ones, ts), (ones, -0.5 * ones, ts)]
    bad += [(ones, ones, grid) for grid in ((1.0, 0.0, 0.5), (1.0, 1.0, 0.0), (0.0, 1.0, 1.0))]
    for arguments in bad:
        with pytest.raises(ValueError):
            kl.w2_bound(*arguments)
