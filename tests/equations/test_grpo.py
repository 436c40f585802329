"""Does the clipped objective of grpo.py follow the expected reward?

Proven here: advantages on groups worked by hand and their invariances; the objective by cases; its first gradient is
REINFORCE's closed form, and following it raises the expected reward of a Gaussian policy; GRPO-Guard's ratio and the
hybrid of guided rollouts against densities of torch.distributions; collateral impact against a real step.
"""

import math
from collections import Counter
from itertools import islice

import pytest
import torch
from torch.distributions import Normal

import grpo
import sde


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=gen(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ advantages
def test_group_advantages_by_hand():
    # Row 0: 1, 2, 6: mean 3, deviations -2, -1, 3, population variance (4+1+9)/3 = 14/3.
    # Row 1: 0, 0, 3: mean 1, deviations -1, -1, 2, variance 6/3 = 2.
    rewards = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]], requires_grad=True)
    deviation = torch.tensor([[-2.0, -1.0, 3.0], [-1.0, -1.0, 2.0]])
    group = deviation / torch.tensor([[math.sqrt(14 / 3)], [math.sqrt(2)]])
    torch.testing.assert_close(grpo.group_advantages(rewards), group)
    assert not grpo.group_advantages(rewards).requires_grad
    torch.testing.assert_close(grpo.group_advantages(rewards, std="none"), deviation)
    # All six: mean 2, squares 1+0+16+4+4+1 = 26, variance 26/6 (around the *batch* mean, as in Flow-GRPO).
    torch.testing.assert_close(grpo.group_advantages(rewards, std="batch"), deviation / math.sqrt(26 / 6))


@pytest.mark.parametrize("scale", [1e-5, 1.0, 1e4])
def test_group_advantages_ignore_scale_and_shift_of_the_reward(scale):
    rewards = randn(3, 5)
    expected = grpo.group_advantages(rewards)
    torch.testing.assert_close(grpo.group_advantages(scale * (rewards + 2)), expected)
    # Planted bug: the released epsilon changes the answer on small rewards.
    deviation = rewards - rewards.mean(1, keepdim=True)
    released = scale * deviation / (scale * rewards.std(1, correction=0, keepdim=True) + 1e-4)
    assert scale > 1e-5 or not torch.allclose(released, expected, rtol=0.5)


@pytest.mark.parametrize("std", ["group", "batch", "none"])
def test_equal_rewards_give_exactly_zero_even_with_rounding_noise(std):
    # 0.7 + k * 6e-8 is one or two float32 roundings away from 0.7; row 1 differs by a real 1e-4.
    noise = torch.tensor([0.0, 6e-8, 0.0, 1.2e-7, -6e-8])
    rewards = torch.stack([0.7 + noise, 0.7 + torch.tensor([0.0, 1e-4, 0.0, 0.0, 0.0])])
    assert rewards[0].unique().numel() > 1
    advantages = grpo.group_advantages(rewards, std=std)
    assert torch.equal(advantages[0], torch.zeros(5)) and (advantages[1] != 0).all()
    # Planted bug: divided by its own std the noise would weigh as much as a real difference.
    naive = (rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, correction=0, keepdim=True)
    assert naive[0].abs().max() > 1
    for equal in (torch.full((3, 5), 0.1), torch.zeros(3, 5), torch.tensor([[2.0], [3.0]])):  # and groups of one
        assert torch.equal(grpo.group_advantages(equal, std=std), torch.zeros_like(equal))


def test_multi_reward_advantages_by_hand():
    # K=2, P=1, G=2. Reward 0: 0, 4 -> -1, 1. Reward 1: 9, 3 -> 1, -1. 0.7*(-1, 1) + 0.2*(1, -1) = (-0.5, 0.5).
    rewards = torch.tensor([[[0.0, 4.0]], [[9.0, 3.0]]])
    torch.testing.assert_close(grpo.multi_reward_advantages(rewards, [0.7, 0.2]), torch.tensor([[-0.5, 0.5]]))


def test_multi_reward_weights_per_category_pick_each_prompts_own_column():
    rewards = randn(3, 2, 5)  # K=3, P=2, G=5
    rewards[2, 1] = 0.3  # a constant reward adds nothing
    weights = torch.tensor([[1.0, 0.0], [0.0, 0.25], [0.0, 0.75]])
    advantages = grpo.multi_reward_advantages(rewards, weights)
    torch.testing.assert_close(advantages[0], grpo.group_advantages(rewards[0])[0])
    torch.testing.assert_close(advantages[1], 0.25 * grpo.group_advantages(rewards[1])[1])
    shared = torch.tensor([0.2, 0.3, 0.5])
    by_prompt = grpo.multi_reward_advantages(rewards, shared[:, None].expand(3, 2))
    torch.testing.assert_close(grpo.multi_reward_advantages(rewards, shared), by_prompt)


def test_normalising_each_reward_is_scale_free_where_normalising_the_sum_is_not():
    rewards, weights = randn(2, 3, 5), torch.tensor([0.5, 0.5], dtype=torch.float64)
    scaled = rewards * torch.tensor([1.0, 1000.0]).double()[:, None, None]  # e.g. a [0,1] and a 0-1000 scorer
    ours = grpo.multi_reward_advantages(rewards, weights)
    torch.testing.assert_close(grpo.multi_reward_advantages(scaled, weights), ours)
    sum_first = grpo.group_advantages((weights[:, None, None] * scaled).sum(0))  # planted: the large one decides alone
    torch.testing.assert_close(sum_first, grpo.group_advantages(rewards[1]), atol=0.02, rtol=0)
    assert not torch.allclose(sum_first, ours, atol=0.1)


def test_what_is_no_group_no_number_and_no_weight_is_refused():
    for bad in (math.nan, math.inf):
        rewards = torch.zeros(3, 2, 5)
        rewards[2, 1, 4] = bad
        with pytest.raises(ValueError, match=f"reward {bad} is not finite at prompt 1, sample 4"):
            grpo.group_advantages(rewards[2])
        with pytest.raises(ValueError, match=f"reward {bad} is not finite at reward 2, prompt 1, sample 4"):
            grpo.multi_reward_advantages(rewards, [1, 1, 1])
    calls = [
        lambda: grpo.group_advantages(torch.zeros(2, 3), std="sample"),
        lambda: grpo.group_advantages(torch.zeros(3)),
    ]
    weights = [torch.ones(shape) for shape in ((2,), (3, 1), (3, 5), (2, 3), ())] + [[0.5, math.nan, 0.5]]
    calls += [lambda w=w: grpo.multi_reward_advantages(torch.zeros(3, 2, 5), w) for w in weights]
    calls += [lambda: grpo.multi_reward_advantages(torch.zeros(3, 2), [1.0, 1.0, 1.0])]
    for call in calls:
        with pytest.raises(ValueError):
            call()


# ---------------------------------------------------------------------------------------------- the objective
# eps = 0.2. (ratio, advantage, objective, d objective / d ratio)
CLIP_CASES = [
    (1.0, 2.0, 2.0, 2.0),
    (1.1, 2.0, 2.2, 2.0),  # inside the range
    (1.5, 2.0, 2.4, 0.0),  # good sample, far enough up: 1.2 * 2, clipped
    (0.5, 2.0, 1.0, 2.0),  # good sample pushed down: not clipped, it may come back
    (0.5, -3.0, -2.4, 0.0),  # bad sample, far enough down: 0.8 * -3, clipped
    (1.5, -3.0, -4.5, -3.0),  # bad sample pushed up: not clipped
]


def drawn(action, mean, std, dt=1.0):
    """A transition that was sampled as `action` from N(mean, std^2 I)."""
    return sde.Transition(0, 0.5, 0.5 - dt, dt, std / dt**0.5, mean, mean, mean, std, action)


def with_ratio(ratio):
    """(transition, student's mean), one number a sample: std 1, means 0 and 1, hence log rho = action - 1/2."""
    action = ratio.double().log()[:, None] + 0.5
    return drawn(action, torch.zeros_like(action), 1.0, dt=0.25), torch.ones_like(action)


def test_policy_loss_by_hand():
    # clip 0.2, advantages clamped to +-5: ratio 1.5, A 2: clipped 2.4; 0.5, -3: clipped -2.4;
    # 1.05, 7 -> 5: 5.25; 0.5, 1: free 0.5. KL to a mean that is 2, 4, 0, 6 away: half the squares, by dt = 1/4.
    step, mean = with_ratio(torch.tensor([1.5, 0.5, 1.05, 0.5]))
    advantage, away = (torch.tensor(x).double() for x in ([2.0, -3.0, 7.0, 1.0], [2.0, 4.0, 0.0, 6.0]))
    kl = away**2 / 2 / 4
    loss, stats = grpo.policy_loss(step, mean, advantage, 0.2, mean_ref=mean + away[:, None], beta=0.1)
    torch.testing.assert_close(loss, torch.tensor([-2.4, 2.4, -5.25, -0.5]).double() + 0.1 * kl)
    off = torch.tensor([0.5, -0.5, 0.05, -0.5]).double()
    by_hand = {"off": off, "off_sq": off**2, "clip_fraction": torch.tensor([1, 1, 0, 0]).double(), "kl": kl}
    torch.testing.assert_close(stats, by_hand)
    wide, stats = grpo.policy_loss(step, step.mean, advantage, 0.2, advantage_clip=2.5)
    assert wide.tolist() == [-2.0, 2.5, -2.5, -1.0] and "kl" not in stats
    assert torch.equal(grpo.policy_loss(step, step.mean, advantage, 0.2, 2.5, mean_ref=mean)[0], wide), "beta is 0"


@pytest.mark.parametrize("guard", [False, True])
@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_first_ratio_is_exactly_one_and_its_gradient_is_reinforce(reduce, guard):
    # Policy N(theta, s^2 I) in D=3; grad_theta log pi(x) = (x - theta) / s^2, so F Eq. 3 is a closed form.
    theta = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)
    s, dt, x, advantage = 0.7, 0.2, randn(5, 3), randn(5, seed=1)
    mean = theta.expand(5, 3)
    loss, stats = grpo.policy_loss(drawn(x, mean, s, dt), mean, advantage, 1e-4, reduce=reduce, guard=guard)
    assert not any(value.any() for value in stats.values()), "no ratio is off, none is clipped"
    if reduce == "mean" and not guard:
        assert torch.equal(loss.detach(), -advantage)
    (grad,) = torch.autograd.grad(loss.mean(), theta)
    reinforce = (advantage[:, None] * (x - theta.detach()) / s**2).mean(0)  # 1/G sum A grad log p
    torch.testing.assert_close(grad, -reinforce / 3 * (s / dt if guard else 1))  # per dimension


def test_gradient_is_zero_exactly_where_clipped():
    ratio, advantage, value, slope = torch.tensor(CLIP_CASES).double().T
    step, mean = with_ratio(ratio)
    mean.requires_grad_()
    loss, stats = grpo.policy_loss(step, mean, advantage, clip=0.2)
    torch.testing.assert_close(-loss.detach(), value)
    loss.sum().backward()
    torch.testing.assert_close(mean.grad[:, 0], -slope * ratio * (step.x_next[:, 0] - 1))  # d rho = rho (x' - mean)
    assert stats["clip_fraction"].tolist() == [0, 0, 1, 0, 1, 0]
    assert torch.equal(grpo.clipped_objective(ratio, advantage, None), ratio * advantage)


def test_no_gradient_reaches_the_old_policy_the_reference_or_the_advantage():
    action, old, mean, ref = (randn(4, 3, seed=i).requires_grad_() for i in range(4))
    advantage = randn(4, seed=5).requires_grad_()
    loss, stats = grpo.policy_loss(drawn(action, old, 0.5), mean, advantage, None, guard=True, mean_ref=ref, beta=0.5)
    loss.sum().backward()
    assert [x.grad is None for x in (action, old, mean, ref, advantage)] == [True, True, False, True, True]
    assert not any(value.requires_grad for value in stats.values())


GRID = [1.0, 0.9, 0.55, 0.3]  # three transitions; dt 0.1, 0.35, 0.25


@pytest.mark.parametrize("kernel", ["sde", "cps"])
@pytest.mark.parametrize("D", [1, 6, 35])
@pytest.mark.parametrize("guard", [False, True])
def test_log_prob_moves_where_the_clip_bites_and_not_the_gradient_nor_the_weight_of_the_kl(kernel, D, guard):
    """At every step: the policy's part by autograd of the true density over D, the KL's from F Eq. 9's w(t) dt, or
    from the cps mean's coefficients, both written out. So the balance of the two is that of the sums, too."""
    a, beta, x, A = 0.7, 0.3, randn(4, D, seed=7), torch.tensor([1.0, -2.0, 0.5, -0.1]).double()
    field = lambda x, t: torch.tanh(x) - t  # noqa: E731
    for step in sde.rollout(field, x, GRID, a, kernel, None, gen(3)):
        t, dt, found = step.t, step.dt, []
        v, v_ref = step.v.clone().requires_grad_(), step.v + 0.3 * randn(4, D, seed=9)
        mean, ref = (sde.transition_mean(step, u, a, kernel) for u in (v, v_ref))
        for reduce in ("mean", "sum"):
            whole, stats = grpo.policy_loss(step, mean, A, 1e-4, 5.0, reduce, guard, ref, beta)
            found.append(torch.autograd.grad(whole.sum(), v, retain_graph=True)[0])
        torch.testing.assert_close(found[0], found[1])
        true = (A * Normal(mean, step.std).log_prob(step.x_next).sum(1)).sum()
        policy = -torch.autograd.grad(true, v, retain_graph=True)[0] / D * (step.std / dt if guard else 1)
        if kernel == "sde":
            w_dt = dt**2 / 2 * (step.sigma * (1 - t) / (2 * t) + 1 / step.sigma) ** 2
        else:
            along = -(1 - step.t_next) * t + step.t_next * math.cos(a * math.pi / 2) * (1 - t)  # d mean / d v
            w_dt = dt * along**2 / (2 * (step.t_next * math.sin(a * math.pi / 2)) ** 2)
        torch.testing.assert_close(stats["kl"], w_dt * (step.v - v_ref).square().mean(1))
        torch.testing.assert_close(found[0], policy + beta * w_dt * 2 * (step.v - v_ref) / D)


def test_guard_makes_every_step_of_sd35s_grid_pull_alike():
    """The norm of the gradient with respect to the velocity, of one advantage and one noise, over the trained steps."""
    eps, norms = randn(1, 24, seed=3), {"plain": [], "guard": [], "ratio alone": []}
    grid = [1.0, 0.960, 0.913, 0.858, 0.790, 0.707, 0.602, 0.465, 0.278, 0.009, 0.0]  # of ten steps, shift 3
    path = sde.rollout(lambda x, t: 0.3 * x, randn(1, 24), grid, 0.7, window=(0, 9))
    for step in islice(path, 9):
        step = step._replace(x_next=step.mean + step.std * eps)
        for guard in (False, True):
            v = step.v.clone().requires_grad_()
            loss, _ = grpo.policy_loss(step, sde.transition_mean(step, v, 0.7), torch.ones(1), 1e-4, guard=guard)
            norm = torch.autograd.grad(loss.sum(), v)[0].norm().item()
            norms["guard" if guard else "plain"].append(norm)
        norms["ratio alone"].append(norm * step.dt)  # the half without its division
    spread = {name: max(some) / min(some) for name, some in norms.items()}
    assert spread == pytest.approx({"plain": 26, "guard": 1.2, "ratio alone": 8.4}, rel=0.05), spread


def gaussian_policy_gradient(theta, prompts, group, seed, std):
    """Ascent direction per prompt (P,) of the policy N(theta, 1) on the reward -(x - 2)^2."""
    x = theta + randn(prompts, group, seed=seed)
    advantage = grpo.group_advantages(-((x - 2) ** 2), std=std).flatten()
    # One copy of theta per sample gives per-sample gradients in one backward.
    parameter = torch.full((prompts * group,), theta, dtype=torch.float64, requires_grad=True)
    step = drawn(x.reshape(-1, 1), parameter.detach()[:, None], 1.0)
    loss, _ = grpo.policy_loss(step, parameter[:, None], advantage, 0.2, advantage_clip=1e6)
    (grad,) = torch.autograd.grad(loss.sum(), parameter)
    return -grad.reshape(prompts, group).mean(1)


def test_gradient_without_std_is_the_true_gradient_of_the_expected_reward():
    # J = -(theta-2)^2 - 1, dJ/dtheta = -2(theta-2) = 3 at 0.5. The sample's own share of the group mean costs
    # the factor 1 - 1/G: E[(R_i - mean_j R_j) s_i] = (1 - 1/G) E[R s].
    prompts, group = 20_000, 5
    directions = gaussian_policy_gradient(0.5, prompts, group, 1, "none")
    tolerance = 5 * directions.std().item() / math.sqrt(prompts)
    assert tolerance < 0.2 and directions.mean().item() == pytest.approx(3 * (1 - 1 / group), abs=tolerance)


def test_following_the_gradient_raises_the_expected_reward():
    # E[R] = -(theta-2)^2 - 1 starts at -10 (theta -1) and ends near its maximum -1. The per-step noise of
    # theta is lr * std(direction) / sqrt(P), about 0.1 * 0.5 / 14 = 0.004.
    theta = -1.0
    for step in range(60):
        theta += 0.1 * gaussian_policy_gradient(theta, 200, 5, 100 + step, "group").mean().item()
    assert -((theta - 2) ** 2) - 1 > -1.1


# ------------------------------------------------------------------------------------------------ guard ratio
@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize("std", [0.05, 3.0, torch.tensor([0.1, 0.4, 2.0]).double()], ids=["quiet", "loud", "each"])
def test_guard_ratio_is_exp_of_the_mean_shift_times_the_noise(std, reduce):
    gap, scale = randn(3, 4, seed=9) * 0.1, std if isinstance(std, float) else std[:, None]
    mean_old, eps = randn(3, 4), randn(3, 4, seed=1)
    mean, action = mean_old + gap, mean_old + scale * eps
    log_rho = grpo.log_ratio(drawn(action, mean_old, std), mean, reduce)
    log_new, log_old = (Normal(m, scale).log_prob(action) for m in (mean, mean_old))
    torch.testing.assert_close(log_rho, getattr(log_new - log_old, reduce)(1))
    ratio = grpo.guard_ratio(log_rho, mean, mean_old, std, reduce)
    torch.testing.assert_close(ratio, getattr(gap * eps, reduce)(1).exp())


# ------------------------------------------------------------------------ guidance in the rollout alone (Q 4.1)
W, LEVEL = 3.0, 0.7  # guidance scale, noise level


def conditional(theta, x):
    """v(x, t, c), (B, 3): a policy with 3 x 3 parameters."""
    return torch.tanh(x @ theta)


def unconditional(x):
    return 0.5 * x.flip(1) - 0.3


def guided_path(kernel, batch=4):
    """(theta, transitions of a guided rollout, the last one without noise)."""
    theta = randn(3, 3, seed=1).requires_grad_()
    field = lambda x, t: (1 - W) * unconditional(x) + W * conditional(theta, x)  # noqa: E731
    with torch.no_grad():
        x = randn(batch, 3, seed=2)
        return theta, list(sde.rollout(field, x, [1.0, 0.8, 0.5, 0.0], LEVEL, kernel, (0, 2), gen(3)))


def log_density(action, mean, std):
    return Normal(mean, std).log_prob(action).sum(1)


@pytest.mark.parametrize("kernel", ["sde", "cps"])
def test_the_hybrids_first_gradient_is_that_of_the_guided_policy_over_the_scale(kernel):
    """Of what was really drawn, with the other branch held fixed; and the first ratio is 1, not about 1."""
    theta, path = guided_path(kernel)
    advantage = randn(4, seed=5)
    for step in path[:2]:
        v = conditional(theta, step.x)
        plain = grpo.hybrid_transition(step, v.detach(), LEVEL, kernel)
        loss, stats = grpo.policy_loss(plain, sde.transition_mean(plain, v, LEVEL, kernel), advantage, clip=1e-4)
        assert not stats["off"].any() and not stats["off_sq"].any()
        (found,) = torch.autograd.grad(loss.sum(), theta)
        v_guided = (1 - W) * unconditional(step.x) + W * conditional(theta, step.x)
        mean = sde.transition_mean(step, v_guided, LEVEL, kernel)
        (whole,) = torch.autograd.grad(-(advantage * log_density(step.x_next, mean, step.std)).sum(), theta)
        assert found.norm() > 1e-3
        torch.testing.assert_close(3 * found, whole / W)  # the loss is per dimension
        # Planted bug: the guided action asked of the policy without guidance.
        asked = log_density(step.x_next, sde.transition_mean(step, conditional(theta, step.x), LEVEL, kernel), step.std)
        (naive,) = torch.autograd.grad(-(advantage * asked).sum(), theta)
        assert not torch.allclose(naive, whole / W, rtol=0.1)


@pytest.mark.parametrize("kernel", ["sde", "cps"])
def test_the_hybrid_is_a_score_and_the_guided_action_in_its_place_is_none(kernel):
    """Integrated over eps exactly, since the gradient is affine in it: the mean of eps and -eps. A constant advantage
    must teach nothing; asked of the guided action, it pulls by (mean - mean_c) / std^2 dmean_c, worked by hand."""
    theta, path = guided_path(kernel)
    for step in path[:2]:
        v = conditional(theta, step.x)
        mean = sde.transition_mean(step, v, LEVEL, kernel)
        ours, naive, eps = 0.0, 0.0, randn(4, 3, seed=9)
        for sign in (1, -1):
            drawn = step._replace(x_next=step.mean + sign * step.std * eps)
            action = grpo.hybrid_transition(drawn, v.detach(), LEVEL, kernel).x_next
            torch.testing.assert_close(action, mean.detach() + sign * step.std * eps)
            ours = ours + log_density(action, mean, step.std).sum() / 2
            naive = naive + log_density(drawn.x_next, mean, step.std).sum() / 2
        (score,) = torch.autograd.grad(ours, theta, retain_graph=True)
        (pull,) = torch.autograd.grad(naive, theta, retain_graph=True)
        assert score.abs().max() < 1e-12 < 1e-2 < pull.abs().max()
        gap = (step.mean - mean).detach() / step.std**2
        (expected,) = torch.autograd.grad((gap * mean).sum(), theta)
        torch.testing.assert_close(pull, expected)


def test_the_hybrid_keeps_noise_and_state_and_exchanges_mean_and_velocity():
    theta, path = guided_path("sde")
    v = conditional(theta, path[1].x)
    plain = grpo.hybrid_transition(path[1], v, LEVEL)
    assert not plain.mean.requires_grad and not plain.v.requires_grad and not plain.x_next.requires_grad
    assert torch.equal(plain.v, v.detach()) and torch.equal(plain.x, path[1].x)
    torch.testing.assert_close(plain.x_next - plain.mean, path[1].x_next - path[1].mean)
    kept = ("index", "t", "t_next", "dt", "sigma", "std")
    assert all(getattr(plain, name) == getattr(path[1], name) for name in kept)
    moved = v.detach().clone()
    moved[2] += 1  # one row's velocity is nobody else's
    other = grpo.hybrid_transition(path[1], moved, LEVEL)
    assert torch.equal(other.x_next[[0, 1, 3]], plain.x_next[[0, 1, 3]])
    assert not torch.isclose(other.x_next[2], plain.x_next[2]).any()
    assert path[2].std == 0 and grpo.hybrid_transition(path[2], v, LEVEL) is path[2]  # a step without noise
    with pytest.raises(ValueError):
        grpo.hybrid_transition(path[0], torch.zeros(1, 3), LEVEL)


# ----------------------------------------------------------------------------------- which steps, which task
def test_timestep_subset_by_hand():
    assert grpo.timestep_subset(5) == grpo.timestep_subset(5, 5, "first") == [0, 1, 2, 3, 4]
    assert grpo.timestep_subset(10, 9, "first") == list(range(9))  # the last of ten untrained
    assert grpo.timestep_subset(5, None, "random") == [0, 1, 2, 3, 4]
    subsets = [grpo.timestep_subset(8, 3, "random", generator=gen(seed)) for seed in range(50)]
    assert subsets == [grpo.timestep_subset(8, 3, "random", generator=gen(seed)) for seed in range(50)]
    assert len({tuple(s) for s in subsets}) > 10
    assert all(s == sorted(set(s)) and len(s) == 3 and s[0] >= 0 and s[-1] <= 7 for s in subsets)
    for arguments in ((5, 0, "first"), (5, 6, "random"), (5, 3, "all"), (5, 2, "last")):
        with pytest.raises(ValueError):
            grpo.timestep_subset(*arguments)


def test_random_subset_prefers_high_noise_by_the_stated_law():
    n, generator = 4000, gen(7)
    counts = Counter(grpo.timestep_subset(4, 1, "random", generator=generator)[0] for _ in range(n))
    for index, weight in enumerate((4, 3, 2, 1)):
        p = weight / 10
        assert counts[index] / n == pytest.approx(p, abs=4.5 * math.sqrt(p * (1 - p) / n))


def test_mix_schedule_is_three_one_one_in_order_for_ever():
    ratio = {"composition": 3, "text": 1, "quality": 1}
    tasks = [grpo.mix_schedule(step, ratio) for step in range(10)]
    assert tasks == ["composition", "composition", "composition", "text", "quality"] * 2
    assert grpo.mix_schedule(5 * 1000 + 3, ratio) == "text"
    for step, bad in ((0, {}), (0, {"text": 0}), (0, {"text": 1.5}), (-1, {"text": 1})):
        with pytest.raises(ValueError):
            grpo.mix_schedule(step, bad)


# ------------------------------------------------------------------------------------------------ diagnostics
def softmax_policy(reward_k, advantage):
    """Uniform softmax over the actions, one sample of each: batch means are exact expectations.

    grad_logits log pi(a) = e_a - p; J_k = sum p R_k, grad J_k = p (R_k - J_k).
    """
    p = torch.full((len(reward_k),), 1 / len(reward_k), dtype=torch.float64)
    return p * (reward_k - (p * reward_k).sum()), advantage, torch.eye(len(reward_k), dtype=torch.float64) - p


def test_collateral_impact_by_hand():
    # R_k = 3, 0, 0: J_k = 1, grad J_k = (2/3, -1/3, -1/3). A_1 = 1, -1, 0: mean A_1 grad log pi = (1/3, -1/3, 0).
    # Inner product 2/9 + 1/9 = 1/3.
    grad_k, advantage, scores = softmax_policy(torch.tensor([3.0, 0, 0]).double(), torch.tensor([1.0, -1, 0]).double())
    assert grpo.collateral_impact(grad_k, advantage, scores).item() == pytest.approx(1 / 3)
    for bad in ((grad_k[:2], advantage, scores), (grad_k, advantage[:, None], scores), (grad_k, advantage[:1], scores)):
        with pytest.raises(ValueError):
            grpo.collateral_impact(*bad)


@pytest.mark.parametrize("seed", range(6))
def test_collateral_impact_predicts_the_change_of_the_other_task(seed):
    reward_k, advantage = randn(5, seed=seed), grpo.group_advantages(randn(1, 5, seed=seed + 50))[0]
    grad_k, _, grad_log_prob = softmax_policy(reward_k, advantage)
    predicted = grpo.collateral_impact(grad_k.requires_grad_(), advantage, grad_log_prob)
    assert not predicted.requires_grad
    predicted = predicted.item()
    lr, step = 1e-5, (advantage[:, None] * grad_log_prob).mean(0)  # dtheta / lr: task 1's policy gradient
    change = (torch.softmax(lr * step, 0) * reward_k).sum() - reward_k.mean()
    assert change.item() / lr == pytest.approx(predicted, abs=1e-4)
    assert (change.item() > 0) == (predicted > 0) and abs(predicted) > 1e-3
