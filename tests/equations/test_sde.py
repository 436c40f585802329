"""Does the stochastic sampler of sde.py sample the same distribution as the ODE, with the density it claims?

Oracles: flows with a closed-form velocity (a point, a Gaussian, a mixture of two), hand-worked numbers and
torch.distributions. Wrong variants of the kernel are planted and must fail the oracle that the right one
passes.
"""

import math

import pytest
import torch
from torch.distributions import Normal

import sde

F64 = torch.float64
SHAPE = (3, 2, 5)  # B, C, W: all different, so that a swapped axis shows
SD35_GRID = (1, 0.960, 0.913, 0.858, 0.790, 0.707, 0.602, 0.465, 0.278, 0.009, 0)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(shape, seed: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


# --------------------------------------------------------------------------- closed-form flows to sample from
MEAN, STD = 1.5, 0.5  # the Gaussian data distribution


def gaussian_velocity(x, t):
    """E[eps - x_0 | x_t] for x_0 ~ N(MEAN, STD^2): regress eps and x_0 on x_t, whose variance is V."""
    variance = (1 - t) ** 2 * STD**2 + t**2
    return -MEAN + (t - (1 - t) * STD**2) * (x - (1 - t) * MEAN) / variance


MODES, WEIGHTS, WIDTH = (-1.0, 1.5), (0.3, 0.7), 0.4  # the mixture


def mixture_velocity(x, t):
    """E[eps - x_0 | x_t] for a mixture: each mode's Gaussian velocity, weighted by its posterior."""
    variance = (1 - t) ** 2 * WIDTH**2 + t**2
    modes = torch.tensor(MODES)
    residual = x.unsqueeze(-1) - (1 - t) * modes  # (B, 1, 2 modes)
    posterior = torch.softmax(torch.tensor(WEIGHTS).log() - residual**2 / (2 * variance), dim=-1)
    return (posterior * (-modes + (t - (1 - t) * WIDTH**2) * residual / variance)).sum(-1)


def mixture_cdf(x, t):
    scale = math.sqrt((1 - t) ** 2 * WIDTH**2 + t**2)
    return sum(w * Normal((1 - t) * m, scale).cdf(x) for m, w in zip(MODES, WEIGHTS))


def gaussian_cdf(x, t):
    return Normal((1 - t) * MEAN, math.sqrt((1 - t) ** 2 * STD**2 + t**2)).cdf(x)


def ks_distance(samples, cdf) -> float:
    """Kolmogorov-Smirnov: the largest gap between the samples' distribution function and the exact one."""
    x = samples.flatten().double().sort().values
    ranks = torch.arange(1, len(x) + 1, dtype=F64) / len(x)
    return (ranks - cdf(x)).abs().max().item()


def ks_of_a_rollout(velocity, cdf, level, num_steps=150, samples=20_000) -> float:
    """KS at t=0, and at the grid time nearest 0.5, whichever is worse: the *marginals*, not only the end."""
    x = draw((samples, 1), seed=0)
    with torch.no_grad():
        steps = list(sde.rollout(velocity, x, sde.time_grid(num_steps), level, generator=seeded(1)))
    middle = steps[num_steps // 2]
    end = ks_distance(steps[-1].x_next, lambda x: cdf(x, 0.0))
    return max(end, ks_distance(middle.x, lambda x: cdf(x, middle.t)))


# With 20,000 samples KS exceeds 1.95/sqrt(20,000) = 0.0138 once in a thousand (twice that for the two times);
# 150 Euler steps add less than 0.006: the variance is off by at most 3 % (`gaussian_moments` below), and a
# scale error d moves KS by 0.24 d.
KS_TOLERANCE = 1.95 / math.sqrt(20_000) + 0.006


FLOWS = pytest.mark.parametrize(
    "velocity, cdf",
    [(gaussian_velocity, gaussian_cdf), (mixture_velocity, mixture_cdf)],
    ids=["gaussian", "mixture"],
)


@pytest.mark.parametrize("level", [0.0, 0.3, 0.7, 1.2])
@FLOWS
def test_sde_marginals_equal_ode_marginals(velocity, cdf, level):
    assert ks_of_a_rollout(velocity, cdf, level) < KS_TOLERANCE


def _planted_mean(score_sign, inside):
    """sde_mean with the score term's sign replaced, or (1-t) v under the bracket replaced."""
    return lambda x, v, t, dt, sigma: x - (v + score_sign * sigma**2 / (2 * t) * (x + inside(t) * v)) * dt


@pytest.mark.parametrize(
    "wrong",
    [_planted_mean(0, lambda t: 1 - t), _planted_mean(-1, lambda t: 1 - t), _planted_mean(1, lambda t: t),
     _planted_mean(2, lambda t: 1 - t)],
    ids=["no score term", "wrong sign", "t for 1-t", "sigma^2/t"],
)  # fmt: skip
@FLOWS
def test_a_wrong_drift_changes_the_marginals(velocity, cdf, wrong, monkeypatch):
    monkeypatch.setattr(sde, "sde_mean", wrong)
    assert ks_of_a_rollout(velocity, cdf, 0.7) > 2 * KS_TOLERANCE


def gaussian_moments(start, num_steps, level, step_std=lambda sigma, dt: sigma * dt**0.5):
    """Mean and variance at t=0 with no sampling error: the Gaussian flow's step is affine, x' = A x + b."""
    times = (start * sde.time_grid(num_steps).double()).tolist()
    mean, variance = (1 - start) * MEAN, (1 - start) ** 2 * STD**2 + start**2
    for t, t_next in zip(times, times[1:]):
        sigma = sde.noise_scale(t, t_next, level)
        probe = torch.tensor([0.0, 1.0], dtype=F64)
        b, a_plus_b = sde.sde_mean(probe, gaussian_velocity(probe, t), t, t - t_next, sigma).tolist()
        slope = a_plus_b - b
        mean, variance = slope * mean + b, slope**2 * variance + step_std(sigma, t - t_next) ** 2
    return mean, variance


@pytest.mark.parametrize("level", [0.0, 0.3, 0.7, 1.2])
def test_sde_bias_vanishes_linearly_in_dt(level):
    # Weak order one: twice the steps, half the error (from t=0.9; sigma is bounded there).
    (mean, coarse), (_, fine) = gaussian_moments(0.9, 200, level), gaussian_moments(0.9, 400, level)
    assert mean == pytest.approx(MEAN, abs=1e-9)
    assert (coarse - STD**2) / (fine - STD**2) == pytest.approx(2, rel=0.05)
    assert fine == pytest.approx(STD**2, rel=0.01)


def test_a_dropped_dt_in_the_noise_fails_the_moments():
    _, variance = gaussian_moments(0.9, 400, 0.7, step_std=lambda sigma, dt: sigma)
    assert variance > 2 * STD**2


# ----------------------------------------------------------------------------------------------- one SDE step
def test_sde_mean_by_hand():
    # x=2, v=3, t=.5, dt=.1, sigma=.4: eps_hat = 2+.5*3 = 3.5; .16/(2*.5) = .16; drift 3+.56 = 3.56; 2-.356 =
    # 1.644
    mean = sde.sde_mean(torch.tensor([[2.0]], dtype=F64), torch.tensor([[3.0]], dtype=F64), 0.5, 0.1, 0.4)
    assert mean.item() == pytest.approx(1.644, abs=1e-12)
    # t=.8, sigma=.5: eps_hat = 2+.2*3 = 2.6; .25/1.6 = .15625; drift 3.40625; 2-.340625
    mean = sde.sde_mean(torch.tensor([[2.0]], dtype=F64), torch.tensor([[3.0]], dtype=F64), 0.8, 0.1, 0.5)
    assert mean.item() == pytest.approx(1.659375, abs=1e-12)


def test_sde_mean_is_ode_step_along_minus_half_sigma_squared_score():
    # The score of the Gaussian marginal by autograd of torch's own density, not through eps_hat.
    t, dt, sigma = 0.6, 0.05, 0.9
    x = draw(SHAPE, 2, F64).requires_grad_()
    marginal = Normal((1 - t) * MEAN, math.sqrt((1 - t) ** 2 * STD**2 + t**2))
    (score,) = torch.autograd.grad(marginal.log_prob(x).sum(), x)
    v = gaussian_velocity(x, t)
    torch.testing.assert_close(sde.sde_mean(x, v, t, dt, sigma), x - v * dt + sigma**2 / 2 * score * dt)


def test_sde_step_adds_noise_of_std_sigma_sqrt_dt_from_its_generator():
    x, v = draw(SHAPE, 3), draw(SHAPE, 4)
    x_next, mean, std = sde.sde_step(x, v, 0.5, 0.09, 0.4, seeded(5))
    assert std == pytest.approx(0.4 * 0.3)
    torch.testing.assert_close(x_next, mean + 0.12 * draw(SHAPE, 5))
    torch.testing.assert_close(mean, sde.sde_mean(x, v, 0.5, 0.09, 0.4))
    torch.manual_seed(6)  # without a generator: torch's own
    expected = mean + 0.12 * torch.randn(SHAPE)
    torch.manual_seed(6)
    torch.testing.assert_close(sde.sde_step(x, v, 0.5, 0.09, 0.4)[0], expected)


def test_sde_step_without_noise_is_the_ode_step():
    x, v = draw(SHAPE, 7), draw(SHAPE, 8)
    x_next, mean, std = sde.sde_step(x, v, 0.5, 0.1, 0.0, seeded(0))
    assert std == 0
    torch.testing.assert_close(x_next, sde.ode_step(x, v, 0.1))
    torch.testing.assert_close(mean, x - 0.1 * v)


@pytest.mark.parametrize("kernel", ["sde", "cps"])
def test_gradient_reaches_the_mean_and_not_the_action(kernel):
    x, v = draw(SHAPE, 9), draw(SHAPE, 10).requires_grad_()
    if kernel == "sde":
        x_next, mean, _ = sde.sde_step(x, v, 0.5, 0.1, 0.4)
        # d mean / d v = -dt (1 + sigma^2 (1-t)/(2t)) = -.1 (1 + .16*.5/1) = -.108
        slope = -0.108
    else:
        x_next, mean, _ = sde.cps_step(x, v, 0.5, 0.4, 0.5)
        # d mean / d v = -(1-t') t + t' cos(pi/4) (1-t) = -.6*.5 + .4*.5/sqrt(2)
        slope = -0.3 + 0.2 / math.sqrt(2)
    assert not x_next.requires_grad
    mean.sum().backward()
    torch.testing.assert_close(v.grad, torch.full(SHAPE, slope))


# ------------------------------------------------------------------------------------------- where noise is from
def test_standard_normal_from_one_source_is_torchs_own():
    for source, expected in ((seeded(3), draw(SHAPE, 3)), (None, None)):
        noise = sde.standard_normal(SHAPE, source)
        assert noise.shape == SHAPE and noise.dtype == torch.float32 and not noise.requires_grad
        assert expected is None or torch.equal(noise, expected)
    assert torch.equal(sde.standard_normal(SHAPE, seeded(3), F64), draw(SHAPE, 3, F64)), "in the dtype that is asked"
    many = sde.standard_normal((50_000,), seeded(0))
    assert abs(many.mean()) < 4 / 50_000**0.5 and abs(many.var() - 1) < 4 * (2 / 50_000) ** 0.5, "N(0, 1)"


def test_with_one_generator_a_row_each_rows_noise_is_its_own():
    rows = sde.standard_normal(SHAPE, [seeded(seed) for seed in (5, 6, 7)])
    assert rows.shape == SHAPE and rows.dtype == torch.float32
    for row, seed in zip(rows, (5, 6, 7), strict=True):
        assert torch.equal(row, draw(SHAPE[1:], seed)), "whatever the others are, and in whatever batch"
    assert torch.equal(sde.standard_normal((2, 2, 5), [seeded(7), seeded(5)]), rows[[2, 0]])
    assert sde.standard_normal(SHAPE, [seeded(5), seeded(5), seeded(6)], F64).dtype == F64


@pytest.mark.parametrize("count", [0, 2, 4])
def test_a_wrong_count_of_generators_is_refused(count):
    with pytest.raises(ValueError, match=f"^3 rows need as many generators, not {count}$"):
        sde.standard_normal(SHAPE, [seeded(seed) for seed in range(count)])


@pytest.mark.parametrize("kernel", ["sde", "cps"])
def test_a_trajectory_with_a_generator_of_its_own_is_the_same_in_every_batch(kernel):
    """In float64, where a batch's shape moves no bit that counts: the rows of one rollout, walked one at a time."""

    def walk(seeds):
        sources = [seeded(seed) for seed in seeds]
        x = sde.standard_normal((len(seeds), *SHAPE[1:]), sources, F64)
        return list(sde.rollout(gaussian_velocity, x, sde.time_grid(4), 0.7, kernel, (0, 3), sources))

    together = walk([11, 12, 13])
    for row, seed in enumerate([11, 12, 13]):
        for whole, alone in zip(together, walk([seed]), strict=True):
            torch.testing.assert_close(whole.x_next[row : row + 1], alone.x_next, rtol=0, atol=1e-12)
    moved = walk([11, 99, 13])[-1].x_next - together[-1].x_next
    assert (moved[1] != 0).any() and (moved[[0, 2]] == 0).all(), "another row's seed moves that row alone"


# ------------------------------------------------------------------------------------------------- log_prob
@pytest.mark.parametrize("std", [0.37, torch.tensor([0.2, 0.9, 2.5])], ids=["float", "per sample"])
def test_log_prob_equals_torch_normal(std):
    x_next, mean = draw(SHAPE, 11), draw(SHAPE, 12)
    scale = std.reshape(3, 1, 1) if isinstance(std, torch.Tensor) else std
    terms = Normal(mean, scale).log_prob(x_next)
    torch.testing.assert_close(sde.log_prob(x_next, mean, std, reduce="sum"), terms.sum((1, 2)))
    torch.testing.assert_close(sde.log_prob(x_next, mean, std, reduce="mean"), terms.mean((1, 2)))
    torch.testing.assert_close(sde.log_prob(x_next, mean, std), terms.mean((1, 2)))  # the default


def test_log_prob_by_hand():
    # x'-mu = .5, std = .5: -.25/.5 - ln .5 - ln(2 pi)/2 = -.5 + .693147 - .918939 = -.725791, twice for D=2
    value = sde.log_prob(torch.full((1, 2), 1.5), torch.ones(1, 2), 0.5, reduce="sum")
    assert value.item() == pytest.approx(2 * -0.7257914, abs=1e-6)


def test_log_prob_gradient_is_the_score_of_the_mean():
    x_next, mean = draw(SHAPE, 13), draw(SHAPE, 14).requires_grad_()
    sde.log_prob(x_next, mean, 0.5, reduce="sum").sum().backward()
    torch.testing.assert_close(mean.grad, (x_next - mean.detach()) / 0.25)


def test_log_prob_of_a_deterministic_step_raises():
    x = torch.zeros(3, 2)
    for std in (0.0, -0.1, torch.tensor([0.1, 0.0, 0.1])):
        with pytest.raises(ValueError, match="must be positive"):
            sde.log_prob(x, x, std)


# --------------------------------------------------------------------------------------- grid and noise scale
def test_time_grid_by_hand():
    torch.testing.assert_close(sde.time_grid(4), torch.tensor([1, 0.75, 0.5, 0.25, 0]))
    # shift 3: 3t/(1+2t) at .5 is 1.5/2 = .75
    torch.testing.assert_close(sde.time_grid(2, shift=3), torch.tensor([1, 0.75, 0]))
    assert sde.time_grid(1).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("shift", [0.3, 1.7, 3.0, 3.1])
def test_time_grid_ends_exactly_at_one_and_zero(shift):
    # 1 - 1e-7 instead of 1 would miss noise_scale's rule at t=1 and give a sigma of thousands.
    grid = sde.time_grid(7, shift)
    assert (grid[0].item(), grid[-1].item(), grid.dtype) == (1.0, 0.0, torch.float32)
    linear = torch.linspace(1, 0, 8)
    torch.testing.assert_close(grid, shift * linear / (1 + (shift - 1) * linear))


def test_time_grid_rejects_bad_arguments():
    for steps, shift in ((0, 1.0), (3, 0.0), (3, -2.0)):
        with pytest.raises(ValueError, match="num_steps >= 1 and shift > 0"):
            sde.time_grid(steps, shift)
    assert sde.time_grid(2, shift=0.5).tolist() == pytest.approx([1, 1 / 3, 0])  # .25/(.25+.5)


def test_noise_scale_by_hand_and_at_t_equal_one():
    assert sde.noise_scale(0.8, 0.5, 0.7) == pytest.approx(0.7 * 2)  # sqrt(.8/.2) = 2; t_next plays no part
    assert sde.noise_scale(1.0, 0.96, 0.7) == pytest.approx(0.7 * 5)  # sqrt(1/.04) = 5: 1-t at the next time
    both = sde.noise_scale(torch.tensor([1.0, 0.8, 0.5]), torch.tensor([0.96, 0.5, 0.1]), 0.7)
    torch.testing.assert_close(both, 0.7 * torch.tensor([5.0, 2.0, 1.0]))


def test_first_step_at_pure_noise_is_finite_with_std_equal_to_level():
    x = draw(SHAPE, 15)
    for n in (3, 1000):
        step = next(sde.rollout(gaussian_velocity, x, sde.time_grid(n), 0.7, generator=seeded(0)))
        assert step.std == pytest.approx(0.7, rel=1e-4)  # sigma sqrt(dt) = a sqrt(1/dt) sqrt(dt)
        assert step.x_next.isfinite().all()


def test_sd35_ten_step_grid_gives_the_expected_noise():
    # sigma at t=1 is .7/sqrt(.04) = 3.5; at t=.278 it is .7 sqrt(.278/.722) = .4344; at t=.009, .7
    # sqrt(.009/.991)
    sigmas = [sde.noise_scale(t, u, 0.7) for t, u in zip(SD35_GRID, SD35_GRID[1:])]
    assert (sigmas[0], sigmas[-2], sigmas[-1]) == pytest.approx((3.5, 0.43436, 0.066708), rel=1e-4)
    assert all(a > b for a, b in zip(sigmas[1:], sigmas[2:]))


# -------------------------------------------------------------------------------- the forward process (Q 1-2)
def test_interpolate_by_hand_and_at_both_ends():
    x0, eps = draw(SHAPE, 16), draw(SHAPE, 17)
    torch.testing.assert_close(sde.interpolate(x0, eps, 0.25), 0.75 * x0 + 0.25 * eps)
    assert torch.equal(sde.interpolate(x0, eps, 0.0), x0) and torch.equal(sde.interpolate(x0, eps, 1.0), eps)


def test_velocity_is_the_time_derivative_of_the_interpolation():
    x0, eps, t = draw(SHAPE, 18, F64), draw(SHAPE, 19, F64), torch.tensor([0.2, 0.5, 0.9], dtype=F64)
    _, v = torch.autograd.functional.jvp(lambda t: sde.interpolate(x0, eps, t), t, torch.ones_like(t))
    assert sde.flow_matching_loss(v, x0, eps).max() < 1e-20


def test_flow_matching_loss_by_hand():
    # eps-x0 = (2,-1); v = (3, 1): 1+4 = 5, mean 2.5
    v, x0, eps = torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 1.0]])
    assert sde.flow_matching_loss(v, x0, eps, reduce="sum").item() == 5
    assert sde.flow_matching_loss(v, x0, eps).item() == 2.5


def test_flow_matching_loss_is_least_at_the_conditional_mean():
    # The Gaussian's closed-form velocity beats a shifted one by exactly the shift squared (sampling error
    # 4/sqrt(B)).
    B, t = 40_000, 0.4
    x0, eps = MEAN + STD * draw((B, 1), 20), draw((B, 1), 21)
    v = gaussian_velocity(sde.interpolate(x0, eps, t), t)
    excess = sde.flow_matching_loss(v + 0.5, x0, eps) - sde.flow_matching_loss(v, x0, eps)
    assert excess.mean().item() == pytest.approx(0.25, abs=4 * excess.std().item() / math.sqrt(B))


# --------------------------------------------------------------------------------------------------- Flow-CPS
def point_velocity(x0):
    """The velocity of a data set of one point per sample, known exactly: v = eps - x_0 = (x - x_0)/t."""
    return lambda x, t: (x - x0) / t


def test_cps_step_by_hand():
    # x=2, v=3, t=.5, t'=.4, level 1/3 (cos 60/2 deg: cos(pi/6)=.866025, sin=.5): x0_hat=.5, x1_hat=3.5
    # mean = .6*.5 + .4*.866025*3.5 = 1.512436; std = .2
    x, v = torch.tensor([[2.0]], dtype=F64), torch.tensor([[3.0]], dtype=F64)
    x_next, mean, std = sde.cps_step(x, v, 0.5, 0.4, 1 / 3, seeded(0))
    assert torch.equal(sde.cps_mean(x, v, 0.5, 0.4, 1 / 3), mean)
    assert (mean.item(), std) == (pytest.approx(1.5124356), pytest.approx(0.2))
    torch.testing.assert_close(x_next, mean + 0.2 * draw((1, 1), 0, F64))


def test_cps_keeps_the_schedules_noise_level_exactly_and_the_sde_overshoots():
    # Gaussian data, 5 steps. The residual x_{t'} - (1-t') x_0 must have std t'. Standard error of a std:
    # 1/sqrt(2B).
    B, tolerance = 50_000, 4 / math.sqrt(100_000)
    x0, x = MEAN + STD * draw((B, 1), 22), draw((B, 1), 23)
    overshoot = {}
    for kernel in ("cps", "sde"):
        steps = sde.rollout(point_velocity(x0), x, sde.time_grid(5), 0.7, kernel, (0, 4), seeded(24))
        for step in list(steps)[:4]:
            ratio = (step.x_next - (1 - step.t_next) * x0).std().item() / step.t_next
            overshoot.setdefault(kernel, []).append(ratio - 1)
    assert max(map(abs, overshoot["cps"])) < tolerance
    assert min(overshoot["sde"]) > 3 * tolerance
    # The first SDE step by hand: t=1, t'=.8, sigma^2 = .49/.2 = 2.45, sigma^2 dt = .49:
    # variance .64 + .49*.2 + .245^2 = .798025
    assert overshoot["sde"][0] == pytest.approx(math.sqrt(0.798025) / 0.8 - 1, abs=2 * tolerance)


def test_sde_noise_excess_is_the_stated_closed_form():
    # x = (1-t) x_0 + t eps with x_0 = 0: the step multiplies eps by a slope and adds std.
    t, t_next, sigma = 0.7, 0.5, 0.9
    eps = torch.ones(1, 1, dtype=F64)
    _, mean, std = sde.sde_step(t * eps, eps, t, t - t_next, sigma)
    dt = t - t_next
    expected = t_next**2 + sigma**2 * dt**2 / t + (sigma**2 * dt / (2 * t)) ** 2
    assert mean.item() ** 2 + std**2 == pytest.approx(expected)


def test_cps_shrinks_a_broad_distribution_where_the_sde_does_not():
    # The price named in cps_step's docstring: at 150 steps the SDE's end is right, CPS has lost variance.
    x, ts = draw((20_000, 1), 25), sde.time_grid(150)
    std = {}
    for kernel in sde.KERNELS:
        *_, last = sde.rollout(gaussian_velocity, x, ts, 0.7, kernel, generator=seeded(26))
        std[kernel] = last.x_next.std().item()
    assert std["sde"] == pytest.approx(STD, rel=0.03)
    assert std["cps"] < 0.9 * STD


def test_cps_level_zero_is_the_ode_and_the_last_step_is_deterministic():
    x, v = draw(SHAPE, 27), draw(SHAPE, 28)
    x_next, mean, std = sde.cps_step(x, v, 0.5, 0.4, 0.0)
    torch.testing.assert_close(x_next, sde.ode_step(x, v, 0.1))
    assert std == 0
    x_next, mean, std = sde.cps_step(x, v, 0.5, 0.0, 0.7)
    assert std == 0
    torch.testing.assert_close(x_next, x - 0.5 * v)


def test_cps_level_one_replaces_all_noise_and_larger_or_negative_levels_raise():
    x, v = draw(SHAPE, 29), draw(SHAPE, 30)
    _, mean, std = sde.cps_step(x, v, 0.5, 0.4, 1.0)
    assert std == pytest.approx(0.4)
    torch.testing.assert_close(mean, 0.6 * (x - 0.5 * v))
    for level in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
            sde.cps_step(x, v, 0.5, 0.4, level)


# ---------------------------------------------------------------------------------------------------- rollout
def test_rollout_yields_a_chain_of_consistent_transitions():
    x, ts = draw(SHAPE, 31), (1.0, 0.7, 0.4, 0.1, 0.0)
    steps = list(sde.rollout(gaussian_velocity, x, ts, 0.7, generator=seeded(32)))
    noise = seeded(32)
    assert [s.index for s in steps] == [0, 1, 2, 3]
    assert torch.equal(steps[0].x, x)
    for n, step in enumerate(steps):
        assert (step.t, step.t_next, step.dt) == (ts[n], ts[n + 1], ts[n] - ts[n + 1])
        assert step.sigma == sde.noise_scale(step.t, step.t_next, 0.7) > 0
        assert step.std == pytest.approx(step.sigma * step.dt**0.5)
        torch.testing.assert_close(step.v, gaussian_velocity(step.x, step.t))
        torch.testing.assert_close(step.mean, sde.sde_mean(step.x, step.v, step.t, step.dt, step.sigma))
        torch.testing.assert_close(step.x_next, step.mean + step.std * torch.randn(SHAPE, generator=noise))
    assert all(a.x_next is b.x for a, b in zip(steps, steps[1:]))


def test_cps_rollout_uses_the_cps_step_and_reports_sigma_by_std():
    x = draw(SHAPE, 33)
    first, *_, last = sde.rollout(
        gaussian_velocity, x, (1.0, 0.75, 0.5, 0.0), 0.7, "cps", generator=seeded(34)
    )
    x_next, mean, std = sde.cps_step(x, first.v, 1.0, 0.75, 0.7, seeded(34))
    torch.testing.assert_close((first.x_next, first.mean), (x_next, mean))
    assert first.std == std and first.sigma == pytest.approx(std / 0.5)  # sqrt(dt) = .5
    assert (last.std, last.sigma) == (0, 0)


def test_rollout_is_reproducible_from_its_generator():
    x, ts = draw(SHAPE, 35), sde.time_grid(3)
    ends = [
        list(sde.rollout(gaussian_velocity, x, ts, 0.7, generator=seeded(s)))[-1].x_next for s in (1, 1, 2)
    ]
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


def test_rollout_is_lazy():
    calls = []
    steps = sde.rollout(lambda x, t: calls.append(t) or x, draw(SHAPE, 36), (1.0, 0.5, 0.0), 0.7)
    assert calls == []
    next(steps)
    assert calls == [1.0]


@pytest.mark.parametrize("kernel", sde.KERNELS)
@pytest.mark.parametrize(
    "window, noisy",
    [(None, {0, 1, 2, 3}), ((0, 4), {0, 1, 2, 3}), ((1, 3), {1, 2}), ((0, 1), {0}), ((2, 2), set())],
)
def test_window_decides_which_steps_are_stochastic(window, noisy, kernel):
    ts = (0.9, 0.7, 0.5, 0.3, 0.1)
    steps = list(sde.rollout(gaussian_velocity, draw(SHAPE, 37), ts, 0.7, kernel, window, seeded(38)))
    assert {s.index for s in steps if s.std > 0} == noisy
    for step in steps:
        if step.index not in noisy:
            assert (step.std, step.sigma) == (0.0, 0.0)
            torch.testing.assert_close(step.mean, sde.ode_step(step.x, step.v, step.dt))
            assert torch.equal(step.x_next, step.mean)
        else:
            assert not torch.equal(step.x_next, step.mean)


def test_the_step_into_zero_is_stochastic_unless_the_window_excludes_it():
    def run(window):
        return list(sde.rollout(gaussian_velocity, draw(SHAPE, 39), (1.0, 0.5, 0.0), 0.7, window=window))

    # t=.5: sigma = .7 sqrt(.5/.5) = .7, std = .7 sqrt(.5)
    assert run(None)[-1].std == pytest.approx(0.7 * math.sqrt(0.5))
    assert run((0, 1))[-1].std == 0.0


def test_level_zero_draws_no_noise_and_equals_sample():
    x, ts, generator = draw(SHAPE, 40), sde.time_grid(6, 3), seeded(41)
    before = generator.get_state()
    steps = list(sde.rollout(gaussian_velocity, x, ts, 0.0, generator=generator))
    assert torch.equal(generator.get_state(), before)
    assert all((s.std, s.sigma) == (0.0, 0.0) for s in steps)
    assert torch.equal(sde.sample(gaussian_velocity, x, ts), steps[-1].x_next)


def test_sample_solves_the_gaussian_ode():
    # Exact solution from t=1: x_0 = MEAN + STD x_1. Euler's error at 400 steps is below 1 % (weak order one
    # above).
    x = draw(SHAPE, 42, F64).requires_grad_()
    x0 = sde.sample(gaussian_velocity, x, sde.time_grid(400))
    assert not x0.requires_grad
    torch.testing.assert_close(x0, MEAN + STD * x.detach(), atol=0.01, rtol=0)


@pytest.mark.parametrize("kernel", sde.KERNELS)
@pytest.mark.parametrize("level", [0.0, 0.7])
def test_gradients_reach_v_and_mean_of_each_step_and_never_cross_steps(level, kernel):
    theta = torch.tensor(0.5, requires_grad=True)
    x = draw(SHAPE, 43).requires_grad_()
    for step in sde.rollout(lambda x, t: theta * x, x, (0.9, 0.6, 0.2), level, kernel):
        assert step.v.requires_grad and step.mean.requires_grad
        assert not step.x.requires_grad and not step.x_next.requires_grad
        (grad,) = torch.autograd.grad(step.v.sum(), theta, retain_graph=True)
        torch.testing.assert_close(grad, step.x.sum())  # d(theta x)/d theta with x held fixed
        assert torch.autograd.grad(step.mean.sum(), theta)[0] != 0
    with torch.no_grad():
        assert not next(sde.rollout(lambda x, t: theta * x, x, (0.9, 0.2), level, kernel)).v.requires_grad


@pytest.mark.parametrize("kernel", sde.KERNELS)
def test_sample_i_does_not_move_sample_j(kernel):
    x, ts = draw(SHAPE, 44), sde.time_grid(4)
    changed = x.clone()
    changed[1] += 3
    a, b = (
        list(sde.rollout(gaussian_velocity, y, ts, 0.7, kernel, generator=seeded(45))) for y in (x, changed)
    )
    for one, other in zip(a, b):
        assert torch.equal(one.x_next[[0, 2]], other.x_next[[0, 2]])
        assert not torch.equal(one.mean[1], other.mean[1])
    log_a, log_b = sde.log_prob(x, x, 0.5), sde.log_prob(x, changed, 0.5)
    assert torch.equal(log_a[[0, 2]], log_b[[0, 2]]) and log_a[1] != log_b[1]


@pytest.mark.parametrize(
    "ts", [(1.0,), (1.0, 0.4, 0.4, 0.0), (0.0, 0.5, 1.0), (1.2, 0.5, 0.0), (1.0, 0.5, -0.1), (0.5, 0.7, 0.2)]
)
def test_rollout_rejects_a_grid_that_does_not_descend_within_zero_and_one(ts):
    with pytest.raises(ValueError, match="strictly descending"):
        sde.rollout(gaussian_velocity, torch.zeros(SHAPE), ts, 0.7)


def test_rollout_rejects_bad_options_at_the_call():
    x, ts = torch.zeros(SHAPE), (1.0, 0.5, 0.0)
    with pytest.raises(ValueError, match=r"kernel must be one of \('sde', 'cps'\), not 'ddim'"):
        sde.rollout(gaussian_velocity, x, ts, 0.7, kernel="ddim")
    for window in ((-1, 1), (2, 1), (0, 3)):
        with pytest.raises(ValueError, match="window must satisfy 0 <= start <= stop <= 2,"):
            sde.rollout(gaussian_velocity, x, ts, 0.7, window=window)
    with pytest.raises(ValueError, match="level must not be negative"):
        sde.rollout(gaussian_velocity, x, ts, -0.1)


# --------------------------------------------------------------------------------------------- shared helpers
def test_per_sample_times_act_on_their_own_sample():
    x, v = draw(SHAPE, 46), draw(SHAPE, 47)
    t, t_next = torch.tensor([1.0, 0.6, 0.3]), torch.tensor([0.9, 0.5, 0.1])
    sigma = sde.noise_scale(t, t_next, 0.7)
    together = (
        *sde.sde_step(x, v, t, t - t_next, sigma, seeded(0))[1:],
        sde.cps_step(x, v, t, t_next, 0.7, seeded(0))[1],
        sde.ode_step(x, v, t - t_next),
        sde.interpolate(x, v, t),
    )
    for i in range(3):
        row, a, b, s = slice(i, i + 1), t[i], t_next[i], sigma[i].item()  # 0-d times and a float sigma
        alone = (
            *sde.sde_step(x[row], v[row], a, a - b, s)[1:],
            sde.cps_step(x[row], v[row], a.item(), b.item(), 0.7)[1],
            sde.ode_step(x[row], v[row], a - b),
            sde.interpolate(x[row], v[row], a),
        )
        for batch, single in zip(together, alone):
            torch.testing.assert_close(batch[row], torch.as_tensor(single).expand_as(batch[row]))
    x_next, mean, std = sde.sde_step(x, v, t, t - t_next, sigma, seeded(48))
    torch.testing.assert_close(x_next, mean + std.reshape(3, 1, 1) * draw(SHAPE, 48))


def test_per_sample_rejects_a_column():
    with pytest.raises(ValueError, match=r"shape \(3,\), not \(3, 1\)"):
        sde.per_sample(torch.ones(3, 1), torch.ones(3))
    with pytest.raises(ValueError, match=r"shape \(3,\), not \(2,\)"):
        sde.sde_mean(torch.ones(SHAPE), torch.ones(SHAPE), torch.ones(2), 0.1, 0.1)
    assert sde.per_sample(torch.ones(3), torch.ones(3)).shape == (3,)
    assert sde.per_sample(torch.ones(3), torch.ones(SHAPE)).shape == (3, 1, 1)


def test_unequal_shapes_raise_with_names_and_shapes():
    a, b = torch.ones(3, 2), torch.ones(3, 1)
    sde.same_shape(a=a, b=a, c=a)
    with pytest.raises(ValueError, match=r"a \(3, 2\), b \(3, 1\)"):
        sde.same_shape(a=a, b=b)
    calls = {
        "x ": [lambda: sde.ode_step(a, b, 0.1), lambda: sde.sde_mean(a, b, 0.5, 0.1, 0.1),
               lambda: sde.cps_step(a, b, 0.5, 0.4, 0.7)],
        "x0 ": [lambda: sde.interpolate(a, b, 0.5), lambda: sde.flow_matching_loss(a, a, b)],
        "x_next ": [lambda: sde.log_prob(a, b, 0.5)],
    }  # fmt: skip
    for name, functions in calls.items():
        for call in functions:
            with pytest.raises(ValueError, match=name + r"\(3, 2\)"):
                call()


def test_flat_reduce_by_hand_for_any_trailing_shape():
    term = torch.arange(12.0).reshape(2, 3, 2)  # rows 0..5 and 6..11
    assert sde.flat_reduce(term, "sum").tolist() == [15, 51]
    assert sde.flat_reduce(term, "mean").tolist() == [2.5, 8.5]
    assert sde.flat_reduce(torch.tensor([1.0, 2.0]), "sum").tolist() == [1, 2]
    with pytest.raises(ValueError, match="'sum' or 'mean', not 'max'"):
        sde.flat_reduce(term, "max")


def test_bfloat16_is_computed_in_float32_and_float64_is_kept():
    low, high = draw(SHAPE, 49).bfloat16(), draw(SHAPE, 49, F64)
    t = torch.tensor([0.9, 0.5, 0.3])
    for x, dtype in ((low, torch.float32), (low.float(), torch.float32), (high, F64)):
        results = [
            *sde.sde_step(x, x, 0.5, 0.1, 0.4)[:2], *sde.cps_step(x, x, 0.5, 0.4, 0.7)[:2],
            sde.ode_step(x, x, 0.1), sde.log_prob(x, x, 0.5), sde.interpolate(x, x, 0.5),
            sde.flow_matching_loss(x, x, x),
            sde.sample(gaussian_velocity, x, (1.0, 0.0)),
            *next(sde.rollout(gaussian_velocity, x, (1.0, 0.5), 0.7))[5:8],
        ]  # fmt: skip
        assert {r.dtype for r in results} == {dtype}
    full = low.float()
    torch.testing.assert_close(sde.sde_mean(low, low, 0.5, 0.1, 0.4), sde.sde_mean(full, full, 0.5, 0.1, 0.4))
    low_t, low_next = t.bfloat16(), (t - 0.1).bfloat16()
    sigma = sde.noise_scale(low_t, low_next, 0.7)
    assert sigma.dtype == torch.float32
    torch.testing.assert_close(sigma, sde.noise_scale(low_t.float(), low_next.float(), 0.7))
    assert sde.sde_step(low, low, low_t, low_t, low_t)[2].dtype == torch.float32
    assert sde.cps_step(low, low, low_t, low_next, 0.7)[2].dtype == torch.float32


@pytest.mark.parametrize("kernel", ["sde", "cps"])
def test_transition_mean_of_the_same_velocity_is_the_rollouts_own_bit_for_bit(kernel):
    """Hence exp(log_prob - log_prob_old) is exactly 1 before the first update; another velocity moves the mean."""
    x = draw(SHAPE, seed=90)
    for step in sde.rollout(lambda x, t: torch.tanh(x) * t, x, sde.time_grid(4), 0.6, kernel, (0, 3), seeded(91)):
        if step.std > 0:
            assert torch.equal(sde.transition_mean(step, step.v, 0.6, kernel), step.mean)
            moved = sde.transition_mean(step, step.v + 1, 0.6, kernel) - step.mean
            # d mean / d v, by hand: -(1 + sigma^2 (1-t)/(2t)) dt, and (1-t') (-t) + t' cos (1-t)
            t, dt = step.t, step.dt
            sde_slope = -(1 + step.sigma**2 * (1 - t) / (2 * t)) * dt
            cps_slope = -(1 - step.t_next) * t + step.t_next * math.cos(0.6 * math.pi / 2) * (1 - t)
            slope = sde_slope if kernel == "sde" else cps_slope
            assert torch.allclose(moved, torch.full(SHAPE, slope), atol=1e-5)


def test_transition_mean_refuses_a_deterministic_step_and_an_unknown_kernel():
    ode, noisy = sde.rollout(lambda x, t: x, draw(SHAPE, seed=92), sde.time_grid(2), 0.7, window=(1, 2))
    with pytest.raises(ValueError, match="positive"):
        sde.transition_mean(ode, ode.v, 0.7)
    with pytest.raises(ValueError, match="kernel must be one of"):
        sde.transition_mean(noisy, noisy.v, 0.7, "euler")
