"""Does the stochastic sampler of sde.py sample the same distribution as the ODE, with the density it claims?

Proven here, by flows with a closed-form velocity (a point, a Gaussian, a mixture of two), numbers worked by hand,
autograd and torch.distributions:
- the SDE's marginals are the ODE's, its error falls like dt, and each wrong drift that is planted fails;
- a step is N(mu, sigma^2 dt I) with the density that `log_prob` returns;
- Flow-CPS carries exactly the schedule's noise where the SDE carries more;
- a rollout is a chain of such steps, through which no gradient passes; a row of a batch never sees another row.
"""

import math

import pytest
import torch
from torch.distributions import Normal

import sde

F64 = torch.float64
SHAPE = (3, 2, 5)  # B, C, W: all different, so that a swapped axis shows
KERNEL = pytest.mark.parametrize("kernel", sde.KERNELS)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def draw(seed, shape=SHAPE, dtype=torch.float32):
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


# --------------------------------------------------------------------------- closed-form flows to sample from
MEAN, STD = 1.5, 0.5  # the Gaussian data distribution
MODES, WEIGHTS, WIDTH = (-1.0, 1.5), (0.3, 0.7), 0.4  # the mixture


def gaussian_velocity(x, t):
    """E[eps - x_0 | x_t] for x_0 ~ N(MEAN, STD^2): regress eps and x_0 on x_t, whose variance is V."""
    variance = (1 - t) ** 2 * STD**2 + t**2
    return -MEAN + (t - (1 - t) * STD**2) * (x - (1 - t) * MEAN) / variance


def gaussian_cdf(x, t):
    return Normal((1 - t) * MEAN, math.sqrt((1 - t) ** 2 * STD**2 + t**2)).cdf(x)


def mixture_velocity(x, t):
    """E[eps - x_0 | x_t] for a mixture: each mode's Gaussian velocity, weighted by its posterior."""
    variance, modes = (1 - t) ** 2 * WIDTH**2 + t**2, torch.tensor(MODES)
    residual = x.unsqueeze(-1) - (1 - t) * modes  # (B, 1, 2 modes)
    posterior = torch.softmax(torch.tensor(WEIGHTS).log() - residual**2 / (2 * variance), dim=-1)
    return (posterior * (-modes + (t - (1 - t) * WIDTH**2) * residual / variance)).sum(-1)


def mixture_cdf(x, t):
    scale = math.sqrt((1 - t) ** 2 * WIDTH**2 + t**2)
    return sum(w * Normal((1 - t) * m, scale).cdf(x) for m, w in zip(MODES, WEIGHTS))


def ks_distance(samples, cdf):
    """Kolmogorov-Smirnov: the largest gap between the samples' distribution function and the exact one."""
    x = samples.flatten().double().sort().values
    return (torch.arange(1, len(x) + 1, dtype=F64) / len(x) - cdf(x)).abs().max().item()


def ks_of_a_rollout(velocity, cdf, level, num_steps=150, samples=20_000):
    """KS at t=0, and at the grid time nearest 0.5, whichever is worse: the *marginals*, not only the end."""
    with torch.no_grad():
        grid = sde.time_grid(num_steps)
        steps = list(sde.rollout(velocity, draw(0, (samples, 1)), grid, level, generator=seeded(1)))
    middle = steps[num_steps // 2]
    return max(ks_distance(steps[-1].x_next, lambda x: cdf(x, 0.0)), ks_distance(middle.x, lambda x: cdf(x, middle.t)))


# With 20,000 samples KS exceeds 1.95/sqrt(20,000) = 0.0138 once in a thousand (twice that for the two times);
# 150 Euler steps add less than 0.006: the variance is off by at most 3 % (`gaussian_moments` below), and a
# scale error d moves KS by 0.24 d.
KS_TOLERANCE = 1.95 / math.sqrt(20_000) + 0.006
GAUSSIAN, MIXTURE = (gaussian_velocity, gaussian_cdf), (mixture_velocity, mixture_cdf)


@pytest.mark.parametrize("level", [0.0, 0.3, 0.7, 1.2])
@pytest.mark.parametrize("flow", [GAUSSIAN, MIXTURE], ids=["gaussian", "mixture"])
def test_sde_marginals_equal_ode_marginals(flow, level):
    assert ks_of_a_rollout(*flow, level) < KS_TOLERANCE


@pytest.mark.parametrize(
    "score, inside",
    [(0, lambda t: 1 - t), (-1, lambda t: 1 - t), (1, lambda t: t), (2, lambda t: 1 - t)],
    ids=["no score term", "wrong sign", "t for 1-t", "sigma^2/t"],
)
@pytest.mark.parametrize("flow", [GAUSSIAN, MIXTURE], ids=["gaussian", "mixture"])
def test_a_wrong_drift_changes_the_marginals(flow, score, inside, monkeypatch):
    def wrong(x, v, t, dt, sigma):
        return x - (v + score * sigma**2 / (2 * t) * (x + inside(t) * v)) * dt

    monkeypatch.setattr(sde, "sde_mean", wrong)
    assert ks_of_a_rollout(*flow, 0.7) > 2 * KS_TOLERANCE


def gaussian_moments(start, num_steps, level, step_std=lambda sigma, dt: sigma * dt**0.5):
    """Mean and variance at t=0 with no sampling error: the Gaussian flow's step is affine, x' = A x + b."""
    times = (start * sde.time_grid(num_steps).double()).tolist()
    mean, variance = (1 - start) * MEAN, (1 - start) ** 2 * STD**2 + start**2
    for t, t_next in zip(times, times[1:]):
        sigma, probe = sde.noise_scale(t, t_next, level), torch.tensor([0.0, 1.0], dtype=F64)
        b, a_plus_b = sde.sde_mean(probe, gaussian_velocity(probe, t), t, t - t_next, sigma).tolist()
        mean, variance = (a_plus_b - b) * mean + b, (a_plus_b - b) ** 2 * variance + step_std(sigma, t - t_next) ** 2
    return mean, variance


@pytest.mark.parametrize("level", [0.0, 0.3, 0.7, 1.2])
def test_sde_bias_vanishes_linearly_in_dt(level):
    # Weak order one: twice the steps, half the error (from t=0.9; sigma is bounded there).
    (mean, coarse), (_, fine) = gaussian_moments(0.9, 200, level), gaussian_moments(0.9, 400, level)
    assert mean == pytest.approx(MEAN, abs=1e-9)
    assert (coarse - STD**2) / (fine - STD**2) == pytest.approx(2, rel=0.05)
    assert fine == pytest.approx(STD**2, rel=0.01)
    _, without_dt = gaussian_moments(0.9, 400, 0.7, step_std=lambda sigma, dt: sigma)  # a planted bug
    assert without_dt > 2 * STD**2


# ----------------------------------------------------------------------------------------------- one SDE step
@pytest.mark.parametrize("t, sigma, mean", [(0.5, 0.4, 1.644), (0.8, 0.5, 1.659375)])
def test_sde_mean_by_hand(t, sigma, mean):
    # x=2, v=3, dt=.1. t=.5: eps_hat = 2+.5*3 = 3.5; .16/(2*.5) = .16; drift 3+.56 = 3.56; 2-.356.
    # t=.8: eps_hat = 2+.2*3 = 2.6; .25/1.6 = .15625; drift 3.40625; 2-.340625.
    x, v = torch.tensor([[2.0]], dtype=F64), torch.tensor([[3.0]], dtype=F64)
    assert sde.sde_mean(x, v, t, 0.1, sigma).item() == pytest.approx(mean, abs=1e-12)


def test_sde_mean_is_ode_step_along_minus_half_sigma_squared_score():
    # The score of the Gaussian marginal by autograd of torch's own density, not through eps_hat.
    t, dt, sigma, x = 0.6, 0.05, 0.9, draw(2, dtype=F64).requires_grad_()
    marginal = Normal((1 - t) * MEAN, math.sqrt((1 - t) ** 2 * STD**2 + t**2))
    (score,) = torch.autograd.grad(marginal.log_prob(x).sum(), x)
    v = gaussian_velocity(x, t)
    torch.testing.assert_close(sde.sde_mean(x, v, t, dt, sigma), x - v * dt + sigma**2 / 2 * score * dt)


def test_sde_step_adds_noise_of_std_sigma_sqrt_dt_from_its_generator():
    x, v = draw(3), draw(4)
    x_next, mean, std = sde.sde_step(x, v, 0.5, 0.09, 0.4, seeded(5))
    assert std == pytest.approx(0.4 * 0.3)
    torch.testing.assert_close(x_next, mean + 0.12 * draw(5))
    torch.testing.assert_close(mean, sde.sde_mean(x, v, 0.5, 0.09, 0.4))
    x_next, mean, std = sde.sde_step(x, v, 0.5, 0.1, 0.0)  # without noise: the ODE
    assert std == 0
    torch.testing.assert_close(x_next, sde.ode_step(x, v, 0.1))
    torch.testing.assert_close(mean, x - 0.1 * v)


# --------------------------------------------------------------------------------------------------- log_prob
@pytest.mark.parametrize("std", [0.37, torch.tensor([0.2, 0.9, 2.5])], ids=["float", "per sample"])
def test_log_prob_equals_torch_normal(std):
    x_next, mean = draw(11), draw(12).requires_grad_()
    scale = std.reshape(3, 1, 1) if isinstance(std, torch.Tensor) else torch.tensor(std)
    terms = Normal(mean, scale).log_prob(x_next)
    torch.testing.assert_close(sde.log_prob(x_next, mean, std, reduce="sum"), terms.sum((1, 2)))
    torch.testing.assert_close(sde.log_prob(x_next, mean, std), terms.mean((1, 2)))  # the default
    sde.log_prob(x_next, mean, std, reduce="sum").sum().backward()
    torch.testing.assert_close(mean.grad, (x_next - mean.detach()) / scale**2)  # the score of the mean


# ------------------------------------------------------------------------------------------- where noise is from
def test_standard_normal_has_one_source_or_one_for_each_row():
    assert torch.equal(sde.standard_normal(SHAPE, seeded(3), F64), draw(3, dtype=F64))
    rows = sde.standard_normal(SHAPE, [seeded(seed) for seed in (5, 6, 7)])
    for row, seed in zip(rows, (5, 6, 7), strict=True):
        assert torch.equal(row, draw(seed, SHAPE[1:])), "whatever the others are"
    assert torch.equal(sde.standard_normal((2, 2, 5), [seeded(7), seeded(5)]), rows[[2, 0]]), "and in whatever batch"
    many = sde.standard_normal((50_000,), seeded(0))
    assert abs(many.mean()) < 4 / 50_000**0.5 and abs(many.var() - 1) < 4 * (2 / 50_000) ** 0.5, "N(0, 1)"
    for count in (2, 4):
        with pytest.raises(ValueError):
            sde.standard_normal(SHAPE, [seeded(0)] * count)


@KERNEL
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


# --------------------------------------------------------------------------------------- grid and noise scale
def test_time_grid_by_hand():
    torch.testing.assert_close(sde.time_grid(4), torch.tensor([1, 0.75, 0.5, 0.25, 0]))
    assert sde.time_grid(1).tolist() == [1, 0]
    torch.testing.assert_close(sde.time_grid(2, shift=3), torch.tensor([1, 0.75, 0]))  # 3t/(1+2t) at .5 is 1.5/2
    assert sde.time_grid(2, shift=0.5).tolist() == pytest.approx([1, 1 / 3, 0])  # .25/(.25+.5)
    for steps, shift in ((0, 1.0), (3, 0.0)):
        with pytest.raises(ValueError):
            sde.time_grid(steps, shift)


@pytest.mark.parametrize("shift", [0.3, 1.7, 3.0, 3.1])
def test_time_grid_ends_exactly_at_one_and_zero(shift):
    # 1 - 1e-7 instead of 1 would miss noise_scale's rule at t=1 and give a sigma of thousands.
    grid, linear = sde.time_grid(7, shift), torch.linspace(1, 0, 8)
    assert (grid[0].item(), grid[-1].item(), grid.dtype) == (1.0, 0.0, torch.float32)
    torch.testing.assert_close(grid, shift * linear / (1 + (shift - 1) * linear))


def test_noise_scale_by_hand_and_at_t_equal_one():
    assert sde.noise_scale(0.8, 0.5, 0.7) == pytest.approx(0.7 * 2)  # sqrt(.8/.2) = 2; t_next plays no part
    assert sde.noise_scale(1.0, 0.96, 0.7) == pytest.approx(0.7 * 5)  # sqrt(1/.04) = 5: 1-t at the next time
    both = sde.noise_scale(torch.tensor([1.0, 0.8, 0.5]), torch.tensor([0.96, 0.5, 0.1]), 0.7)
    torch.testing.assert_close(both, 0.7 * torch.tensor([5.0, 2.0, 1.0]))
    for n in (3, 1000):  # so the first step's std is a: sigma sqrt(dt) = a sqrt(1/dt) sqrt(dt)
        step = next(sde.rollout(gaussian_velocity, draw(15), sde.time_grid(n), 0.7, generator=seeded(0)))
        assert step.std == pytest.approx(0.7, rel=1e-4) and step.x_next.isfinite().all()


# -------------------------------------------------------------------------------- the forward process (Q 1-2)
def test_velocity_is_the_time_derivative_of_the_interpolation():
    x0, eps, t = draw(18, dtype=F64), draw(19, dtype=F64), torch.tensor([0.2, 0.5, 0.9], dtype=F64)
    x, v = torch.autograd.functional.jvp(lambda t: sde.interpolate(x0, eps, t), t, torch.ones_like(t))
    torch.testing.assert_close(x[1], (x0[1] + eps[1]) / 2)
    assert sde.flow_matching_loss(v, x0, eps).max() < 1e-20
    assert torch.equal(sde.interpolate(x0, eps, 0.0), x0) and torch.equal(sde.interpolate(x0, eps, 1.0), eps)


def test_flow_matching_loss_is_least_at_the_conditional_mean():
    # By hand: eps-x0 = (2,-1); v = (3, 1): 1+4 = 5, mean 2.5.
    v, x0, eps = torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 1.0]])
    assert sde.flow_matching_loss(v, x0, eps, reduce="sum").item() == 5
    assert sde.flow_matching_loss(v, x0, eps).item() == 2.5
    # The Gaussian's closed-form velocity beats a shifted one by exactly the shift squared (4 standard errors).
    B, t = 40_000, 0.4
    x0, eps = MEAN + STD * draw(20, (B, 1)), draw(21, (B, 1))
    v = gaussian_velocity(sde.interpolate(x0, eps, t), t)
    excess = sde.flow_matching_loss(v + 0.5, x0, eps) - sde.flow_matching_loss(v, x0, eps)
    assert excess.mean().item() == pytest.approx(0.25, abs=4 * excess.std().item() / math.sqrt(B))


# --------------------------------------------------------------------------------------------------- Flow-CPS
def test_cps_step_by_hand_and_at_both_ends_of_its_level():
    # x=2, v=3, t=.5, t'=.4, level 1/3 (cos(pi/6)=.866025, sin=.5): x0_hat=.5, x1_hat=3.5
    # mean = .6*.5 + .4*.866025*3.5 = 1.512436; std = .2
    x, v = torch.tensor([[2.0]], dtype=F64), torch.tensor([[3.0]], dtype=F64)
    x_next, mean, std = sde.cps_step(x, v, 0.5, 0.4, 1 / 3, seeded(0))
    assert (mean.item(), std) == (pytest.approx(1.5124356), pytest.approx(0.2))
    torch.testing.assert_close(x_next, mean + 0.2 * draw(0, (1, 1), F64))
    x, v = draw(27), draw(28)
    x_next, _, std = sde.cps_step(x, v, 0.5, 0.4, 0.0)  # level 0: the ODE
    torch.testing.assert_close((x_next, std), (sde.ode_step(x, v, 0.1), 0.0))
    x_next, _, std = sde.cps_step(x, v, 0.5, 0.0, 0.7)  # into t'=0: the data that v believes in
    torch.testing.assert_close((x_next, std), (x - 0.5 * v, 0.0))
    _, mean, std = sde.cps_step(x, v, 0.5, 0.4, 1.0)  # level 1: all noise is fresh
    torch.testing.assert_close((mean, std), (0.6 * (x - 0.5 * v), 0.4))
    for level in (-0.1, 1.1):
        with pytest.raises(ValueError):
            sde.cps_step(x, v, 0.5, 0.4, level)


def test_cps_keeps_the_schedules_noise_level_exactly_and_the_sde_overshoots():
    # Gaussian data, 5 steps, the velocity of one known point per sample: v = eps - x_0 = (x - x_0)/t. The residual
    # x_{t'} - (1-t') x_0 must have std t'. Standard error of a std: 1/sqrt(2B).
    B, tolerance = 50_000, 4 / math.sqrt(100_000)
    x0, x = MEAN + STD * draw(22, (B, 1)), draw(23, (B, 1))
    overshoot = {}
    for kernel in sde.KERNELS:
        steps = sde.rollout(lambda x, t: (x - x0) / t, x, sde.time_grid(5), 0.7, kernel, (0, 4), seeded(24))
        overshoot[kernel] = [(s.x_next - (1 - s.t_next) * x0).std().item() / s.t_next - 1 for s in list(steps)[:4]]
    assert max(map(abs, overshoot["cps"])) < tolerance
    assert min(overshoot["sde"]) > 3 * tolerance
    # The first SDE step by hand: t=1, t'=.8, sigma^2 = .49/.2 = 2.45, sigma^2 dt = .49:
    # variance .64 + .49*.2 + .245^2 = .798025, as the closed form of `cps_step` says
    assert overshoot["sde"][0] == pytest.approx(math.sqrt(0.798025) / 0.8 - 1, abs=2 * tolerance)


def test_cps_shrinks_a_broad_distribution_where_the_sde_does_not():
    # The price named in cps_step's docstring: at 150 steps the SDE's end is right, CPS has lost variance.
    std = {}
    for kernel in sde.KERNELS:
        *_, last = sde.rollout(
            gaussian_velocity, draw(25, (20_000, 1)), sde.time_grid(150), 0.7, kernel, generator=seeded(26)
        )
        std[kernel] = last.x_next.std().item()
    assert std["sde"] == pytest.approx(STD, rel=0.03) and std["cps"] < 0.9 * STD


# ---------------------------------------------------------------------------------------------------- rollout
@KERNEL
def test_rollout_yields_a_chain_of_consistent_transitions(kernel):
    x, ts, noise = draw(31), (1.0, 0.7, 0.4, 0.1, 0.0), seeded(32)
    steps = list(sde.rollout(gaussian_velocity, x, ts, 0.7, kernel, generator=seeded(32)))
    assert [s.index for s in steps] == [0, 1, 2, 3] and torch.equal(steps[0].x, x)
    for n, step in enumerate(steps):
        assert (step.t, step.t_next, step.dt) == (ts[n], ts[n + 1], ts[n] - ts[n + 1])
        torch.testing.assert_close(step.v, gaussian_velocity(step.x, step.t))
        if kernel == "sde":
            sigma = sde.noise_scale(step.t, step.t_next, 0.7)
            expected = sde.sde_step(step.x, step.v, step.t, step.dt, sigma, noise)
        else:
            expected = sde.cps_step(step.x, step.v, step.t, step.t_next, 0.7, noise)
        torch.testing.assert_close((step.x_next, step.mean, step.std), expected)
        assert step.sigma == pytest.approx(step.std / step.dt**0.5)
    assert all(a.x_next is b.x for a, b in zip(steps, steps[1:]))
    assert (steps[-1].std > 0) == (kernel == "sde"), "the step into t=0"


def test_rollout_is_lazy():
    calls = []
    steps = sde.rollout(lambda x, t: calls.append(t) or x, draw(36), (1.0, 0.5, 0.0), 0.7)
    assert calls == []
    next(steps)
    assert calls == [1.0]


@KERNEL
@pytest.mark.parametrize(
    "window, noisy", [(None, {0, 1, 2, 3}), ((1, 3), {1, 2}), ((0, 1), {0}), ((0, 4), {0, 1, 2, 3}), ((2, 2), set())]
)
def test_window_decides_which_steps_are_stochastic(window, noisy, kernel):
    ts = (0.9, 0.7, 0.5, 0.3, 0.1)
    steps = list(sde.rollout(gaussian_velocity, draw(37), ts, 0.7, kernel, window, seeded(38)))
    assert {s.index for s in steps if s.std > 0} == noisy
    for step in steps:
        assert torch.equal(step.x_next, step.mean) == (step.index not in noisy)
        if step.index not in noisy:
            assert (step.std, step.sigma) == (0.0, 0.0)
            torch.testing.assert_close(step.mean, sde.ode_step(step.x, step.v, step.dt))


def test_sample_solves_the_gaussian_ode():
    # Exact solution from t=1: x_0 = MEAN + STD x_1. Euler's error at 400 steps is below 1 % (order one, above).
    x, generator = draw(42, dtype=F64).requires_grad_(), seeded(41)
    before, ts = generator.get_state(), sde.time_grid(400)
    x0 = sde.sample(gaussian_velocity, x, ts)
    assert not x0.requires_grad
    torch.testing.assert_close(x0, MEAN + STD * x.detach(), atol=0.01, rtol=0)
    *_, last = sde.rollout(gaussian_velocity, x, ts, 0.0, generator=generator)  # level 0 is the same, and draws nothing
    assert torch.equal(last.x_next, x0) and torch.equal(generator.get_state(), before)


@KERNEL
@pytest.mark.parametrize("level", [0.0, 0.7])
def test_gradients_reach_v_and_mean_of_each_step_and_never_cross_steps(level, kernel):
    theta, x = torch.tensor(0.5, requires_grad=True), draw(43).requires_grad_()
    for step in sde.rollout(lambda x, t: theta * x, x, (0.9, 0.6, 0.2), level, kernel):
        assert not step.x.requires_grad and not step.x_next.requires_grad
        (grad,) = torch.autograd.grad(step.v.sum(), theta, retain_graph=True)
        torch.testing.assert_close(grad, step.x.sum())  # d(theta x)/d theta with x held fixed
        assert torch.autograd.grad(step.mean.sum(), theta)[0] != 0
    with torch.no_grad():
        assert not next(sde.rollout(lambda x, t: theta * x, x, (0.9, 0.2), level, kernel)).v.requires_grad


@KERNEL
def test_transition_mean_of_the_same_velocity_is_the_rollouts_own_bit_for_bit(kernel):
    """Hence exp(log_prob - log_prob_old) is exactly 1 before the first update; another velocity moves the mean."""
    walk = sde.rollout(lambda x, t: torch.tanh(x) * t, draw(90), sde.time_grid(4), 0.6, kernel, (0, 3), seeded(91))
    *noisy, last = walk
    for step in noisy:
        assert torch.equal(sde.transition_mean(step, step.v, 0.6, kernel), step.mean)
        moved = sde.transition_mean(step, step.v + 1, 0.6, kernel) - step.mean
        # d mean / d v, by hand: -(1 + sigma^2 (1-t)/(2t)) dt, and (1-t') (-t) + t' cos (1-t)
        t, t_next, dt = step.t, step.t_next, step.dt
        slope = -(1 + step.sigma**2 * (1 - t) / (2 * t)) * dt
        if kernel == "cps":
            slope = -(1 - t_next) * t + t_next * math.cos(0.6 * math.pi / 2) * (1 - t)
        assert torch.allclose(moved, torch.full(SHAPE, slope), atol=1e-5)
    with pytest.raises(ValueError):
        sde.transition_mean(last, last.v, 0.6, kernel)  # without noise there is no ratio


@pytest.mark.parametrize(
    "bad",
    [{"ts": ts} for ts in ((1.0,), (1.0, 0.4, 0.4, 0.0), (0.0, 0.5, 1.0), (1.2, 0.5, 0.0), (1.0, 0.5, -0.1))]
    + [{"window": window} for window in ((-1, 1), (2, 1), (0, 3))]
    + [{"kernel": "ddim"}, {"level": -0.1}],
)
def test_a_bad_grid_and_bad_options_are_refused_at_the_call(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        sde.rollout(gaussian_velocity, torch.zeros(SHAPE), **{"ts": (1.0, 0.5, 0.0), "level": 0.7} | bad)


# ------------------------------------------------------------------------------- precision, shapes, reductions
def test_flat_reduce_by_hand_for_any_trailing_shape():
    term = torch.arange(12.0).reshape(2, 3, 2)  # rows 0..5 and 6..11
    assert sde.flat_reduce(term, "sum").tolist() == [15, 51]
    assert sde.flat_reduce(term, "mean").tolist() == [2.5, 8.5]
    assert sde.flat_reduce(torch.tensor([1.0, 2.0]), "sum").tolist() == [1, 2]
    with pytest.raises(ValueError):
        sde.flat_reduce(term, "max")
