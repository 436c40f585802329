"""How does a scalar reward on finished images become a gradient for every denoising step?

GRPO draws a group of G images per prompt, calls "better than its siblings" an advantage, and pushes each
sampled transition x_t -> x_{t-dt} up or down by it:

    A_i     = (R_i - mean_c) / std_c                                         F §4.1, Q Eq. 4
    A_i     = sum_k w_k (R_k,i - mean_k,c) / std_k,c                         Q Eq. 13 (several rewards)
    rho     = pi_theta(x_{t-dt}|x_t, c) / pi_old(x_{t-dt}|x_t, c)            Gaussian, see sde.log_prob
    loss    = -mean_{i,t} min(rho A_i, clip(rho, 1-eps, 1+eps) A_i)          Q Eq. 6
    grad J  = 1/G sum_i A_i grad log p_theta(x_i|c)                          F Eq. 3, the loss at rho = 1
    dJ_k    ~ E[A_1 <grad J_k, grad log pi>]                                 F Eq. 4, harm done to task k

Notation: P prompts, G images per prompt, K rewards, B = P*G samples, M parameters. `*_PG` tensors keep the
group as a row; everything that belongs to one transition is flat, (B,).

How the code departs from the papers:
- DEVIATION: F Eq. 3 has log p of the final image, which no flow model can evaluate cheaply. As in Q Eq. 6 it
  becomes the sum over the trajectory's Gaussian transitions: same expected gradient, computable.
- DEVIATION: no epsilon in the denominator of an advantage (see `group_advantages`).
- Q rolls out with an ODE yet optimises a ratio. With no noise there is no ratio, so the caller trains the
  transitions of a stochastic window (`sde.rollout`) or takes the forward-process loss of `nft.py`.
- Clip ranges belong to a reduction: 1e-4 goes with log-probs averaged over the D latent dimensions ("mean"),
  the true ratio ("sum") moves D times as far.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sde import Time, Transition, flat_reduce, full_precision, per_sample, require_noise, same_shape, transition_mean

STD_MODES = ("group", "batch", "none")
SUBSET_MODES = ("all", "first", "random")

# Rewards that differ by less than this share of their size are equal: it is a few float32 roundings. Divided
# by their own std they would turn into full-size advantages, a gradient made of rounding errors.
RELATIVE_NOISE = 1e-6


def _require_finite(rewards: Tensor, *axes: str) -> None:
    """ValueError naming the first NaN or infinite reward by its axes; it would poison its group."""
    bad = (~torch.isfinite(rewards)).nonzero().tolist()
    if bad:
        place = ", ".join(f"{axis} {index}" for axis, index in zip(axes, bad[0], strict=True))
        raise ValueError(f"reward {rewards[tuple(bad[0])].item()} is not finite at {place}")


# ------------------------------------------------------------------------------------------------ advantages


def group_advantages(rewards_PG: Tensor, std: str = "group") -> Tensor:
    """Group-relative advantages, F §4.1 and Q Eq. 4: A = (R - mean_c) / std.

    rewards_PG: (P, G), row = all images of one prompt, any scale. Returns (P, G), float32 at least, no
    gradient. The mean is always the group's own. `std` (population, divided by G) is

    - "group": the group's own (Q Eq. 4): every prompt pushes equally hard, nearly solved ones included;
    - "batch": that of all P*G rewards (Flow-GRPO's global std): a prompt counts by its spread;
    - "none": 1 (Dr. GRPO): (1 - 1/G) times the gradient of the expected reward itself, in the reward's units.

    A group whose rewards are equal (up to `RELATIVE_NOISE`) teaches nothing and gets exactly 0.
    DEVIATION: released code divides by std + 1e-4. Without the constant, a*R + b gives the same advantages as
    R for every a > 0, also for rewards that live on a scale of 1e-3; equal groups need no constant either.
    Raises ValueError on a NaN or infinite reward, on a shape that is not (P, G) and on an unknown `std`.
    """
    if std not in STD_MODES:
        raise ValueError(f"std must be one of {STD_MODES}, got {std!r}")
    if rewards_PG.ndim != 2:
        raise ValueError(f"rewards must be (prompts, group), got shape {tuple(rewards_PG.shape)}")
    _require_finite(rewards_PG, "prompt", "sample")
    rewards_PG = full_precision(rewards_PG.detach())
    deviation_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)  # R - mean_c
    std_P1 = rewards_PG.std(dim=1, correction=0, keepdim=True)  # std_c = sqrt(1/G sum (R - mean_c)^2)
    flat_P1 = std_P1 <= RELATIVE_NOISE * rewards_PG.abs().amax(dim=1, keepdim=True)
    if std == "group":
        deviation_PG = deviation_PG / std_P1
    elif std == "batch":
        deviation_PG = deviation_PG / rewards_PG.std(correction=0)
    return deviation_PG.masked_fill(flat_P1, 0.0)  # also where 0 / 0 made a NaN


def multi_reward_advantages(rewards_KPG: Tensor, weights: Tensor | Sequence) -> Tensor:
    """Q Eq. 13: normalise each reward inside its group, then add: A = sum_k w_k (R_k - mean_k,c) / std_k,c.

    rewards_KPG: (K, P, G). weights: (K,), or (K, P) for Q §4.2's per-category calibration (column p holds the
    weights of prompt p's category). Returns (P, G), float32 at least, no gradient.

    Normalising before the sum (GDPO) makes the result blind to each reward's scale; normalising the weighted
    sum lets the reward with the largest numbers decide alone. A reward that is constant in a group adds 0
    there. Q wants sum_k w_k = 1. That is the caller's choice, not enforced: a total other than 1 scales the
    advantages. The sum of K normalised rewards has a std below 1 unless they agree; Q does not normalise
    again, nor do we.
    Raises ValueError on weights of another shape or not finite, and on a NaN or infinite reward.
    """
    if rewards_KPG.ndim != 3:
        raise ValueError(f"rewards must be (rewards, prompts, group), got shape {tuple(rewards_KPG.shape)}")
    _require_finite(rewards_KPG, "reward", "prompt", "sample")
    advantages_KPG = torch.stack([group_advantages(rewards_PG) for rewards_PG in rewards_KPG])
    K, P, _ = advantages_KPG.shape
    w = torch.as_tensor(weights, dtype=advantages_KPG.dtype, device=advantages_KPG.device)
    if w.shape not in ((K,), (K, P)):
        raise ValueError(f"weights must have shape ({K},) or ({K}, {P}), got {tuple(w.shape)}")
    if not w.isfinite().all():
        raise ValueError(f"weights must be finite, got {w.tolist()}")
    w_KP1 = w.reshape(K, -1, 1)  # (K,) is shared by all prompts: (K, 1, 1)
    return (w_KP1 * advantages_KPG).sum(dim=0)


# ---------------------------------------------------------------------------------------------- the objective


def clipped_objective(ratio: Tensor, advantage: Tensor, eps: float | None) -> Tensor:
    """The clipped surrogate of F Eq. 11 and Q Eq. 6, per sample: min(rho A, clip(rho, 1-eps, 1+eps) A).

    ratio, advantage: the same shape, (B,). Returns that shape, float32 at least; to be *maximised*. The
    gradient flows through both (detach the advantage outside) and is zero exactly where the policy has
    already moved past the clip in the direction that the advantage asks for. The min is pessimistic: a sample
    that moved the wrong way is never clipped, so it can come back. eps=None switches clipping off: rho A.

    ERRATUM: released code multiplies a (B, 1) reward by a (B,) ratio. Broadcasting makes that (B, B), every
    sample then gets the batch's mean credit, and no error says so. Here unequal shapes raise ValueError.
    """
    same_shape(ratio=ratio, advantage=advantage)
    ratio, advantage = full_precision(ratio), full_precision(advantage)
    unclipped = ratio * advantage  # rho A
    if eps is None:
        return unclipped
    return torch.minimum(unclipped, ratio.clamp(1 - eps, 1 + eps) * advantage)


def policy_loss(
    log_prob: Tensor,
    log_prob_old: Tensor | None,
    advantage: Tensor,
    clip: float | None,
    advantage_clip: float = 5.0,
    kl: Tensor | None = None,
    beta: float = 0.0,
    ratio: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Q Eq. 6's summand for one transition, with the usual KL penalty: -min(rho A, clip(rho) A) + beta KL.

    log_prob, log_prob_old, advantage, kl: (B,). Returns `(loss, stats)`: loss (B,), the caller takes the mean
    over samples and steps; stats are detached scalars (README defines them).
    - log_prob: of the sampled x_{t-dt} under the student, carries the gradient. log_prob_old: under the
      policy that sampled it; None says that this is still the student. Then rho is exactly 1, and its
      gradient is grad log pi, so that the loss's gradient is F Eq. 3 with the sign of a loss.
    - advantage: clamped to +-advantage_clip (5 in Flow-GRPO): one lucky image must not outweigh its group.
    - kl: (B,) KL to the frozen reference policy (kl.velocity_kl), gradient flows; weighted by beta.
    - ratio: (B,), replaces exp(log_prob - log_prob_old); for `guard_ratio`.
    No gradient reaches log_prob_old or the advantage. Raises ValueError on unequal shapes.
    """
    old = (log_prob if log_prob_old is None else log_prob_old).detach()
    same_shape(log_prob=log_prob, log_prob_old=old, advantage=advantage)
    if ratio is None:
        ratio = torch.exp(full_precision(log_prob) - full_precision(old))  # rho = pi_theta / pi_old
    ratio = full_precision(ratio)
    advantage = full_precision(advantage.detach()).clamp(-advantage_clip, advantage_clip)
    objective = clipped_objective(ratio, advantage, clip)
    loss = -objective
    with torch.no_grad():
        stats = {
            "ratio_mean": ratio.mean(),
            "ratio_std": ratio.std(correction=0),
            # Where the min took the clipped branch, hence no gradient. Counting |rho - 1| > eps, as is often
            # done, also counts samples that moved the wrong way and still have their gradient.
            "clip_fraction": (ratio * advantage > objective).float().mean(),
        }
    if kl is not None:
        same_shape(advantage=advantage, kl=kl)
        loss = loss + beta * full_precision(kl)
        stats["kl"] = full_precision(kl).detach().mean()
    return loss, stats


def guard_ratio(
    log_prob: Tensor,
    log_prob_old: Tensor,
    mean: Tensor,
    mean_old: Tensor,
    std: Time,
    reduce: str = "mean",
) -> Tensor:
    """GRPO-Guard's normalised ratio (arXiv 2510.22319, RatioNorm), cited in Q §6.

    With x_{t-dt} = mean_old + std*eps and dmu = mean - mean_old, the log-ratio of the two Gaussians is

        log rho = <dmu, eps>/std - ||dmu||^2/(2 std^2)

    so it sits below zero by the second term (positive advantages seldom reach the clip) and spreads like
    1/std (late, quiet steps clip first). Adding the bias back and multiplying by std leaves

        rho_guard = exp(std * (log rho + ||dmu||^2/(2 std^2))) = exp(<dmu, eps>),

    centred at rho = 1, with a spread that depends on ||dmu|| alone: one eps means the same at every t.

    log_prob, log_prob_old: (B,), reduced over D by `reduce`; mean, mean_old: (B, ...); std = sigma*sqrt(dt) >
    0, a float or (B,). `reduce` must be the log-probs' own, "sum" or "mean": under "mean" all three terms,
    and so <dmu, eps>, are divided by D. Returns (B,), float32 at least, to be passed to
    `policy_loss(ratio=...)`. The gradient reaches log_prob and mean (with respect to the policy it is
    std*grad log pi at dmu = 0), never the old ones. The method's other half, dividing the loss by dt so that
    every t pulls alike, is the caller's.
    Raises ValueError on unequal shapes, std <= 0 and an unknown `reduce`.
    """
    same_shape(log_prob=log_prob, log_prob_old=log_prob_old)
    same_shape(mean=mean, mean_old=mean_old)
    require_noise(std)
    std = per_sample(std, log_prob)
    gap = full_precision(mean) - full_precision(mean_old).detach()  # dmu, (B, ...)
    gap_sq = flat_reduce(gap.square(), reduce)  # ||dmu||^2, (B,)
    log_ratio = full_precision(log_prob) - full_precision(log_prob_old).detach()
    same_shape(log_ratio=log_ratio, gap_sq=gap_sq)
    return torch.exp(std * (log_ratio + gap_sq / (2 * std**2)))


def unguided(step: Transition, v: Tensor, level: float, kernel: str = "sde") -> Transition:
    """Q §4.1's hybrid CFG: a guided transition as the policy without guidance would have taken it, noise for noise.

    step: from a guided `sde.rollout`; v: v(x_t, t, c), (B, ...), of the same policy without the unconditional branch.
    With x' = mean + std eps the result has v, its own mean, and the action mean_c + std eps. A step without noise is
    returned as it is (nothing is trained on it). No gradient.

    Which ratio this optimises. Q leaves the unconditional branch out of the objective and does not say of which action
    the probability is then asked. Of the guided x' itself, rho = pi(x'|x, c) / pi_old(x'|x, c) would be 1 at first,
    too, but its gradient A (x' - mean_c) / std^2 dmean_c has the part A (mean - mean_c) / std^2 dmean_c, which looks
    at the state alone: it is no score, its mean is not zero (`tests/test_grpo.py` shows both), and it pulls the
    conditional branch towards or away from its guided self, whatever the action was worth. Here the noise is kept and
    the mean exchanged, so that

        first gradient = A eps / std dmean_c = 1/w (gradient of the guided policy with its other branch held fixed)

    because the guided mean is affine in the velocity and v_guided = (1-w) v_uncond + w v_cond: the exact policy
    gradient of what was really drawn, in the conditional branch, but for the factor 1/w of guidance scale w (an
    optimizer such as Adam takes it away). The first ratio is 1 by construction: the old log-probability is of this
    transition, not of the guided one. After an update it stays a ratio of two unguided policies.
    DEVIATION: Q does not say this. Norm-rescaled guidance is not affine in v_cond; there 1/w is approximate.
    Raises ValueError where shapes differ.
    """
    same_shape(v=v, v_guided=step.v)
    if step.std == 0:
        return step
    with torch.no_grad():
        mean = transition_mean(step, v, level, kernel)
        return step._replace(v=full_precision(v).detach(), mean=mean, x_next=mean + (step.x_next - step.mean))


# ----------------------------------------------------------------------------------- which steps, which task


def timestep_subset(
    num_steps: int,
    count: int | None = None,
    mode: str = "all",
    emphasis: float = 1.0,
    generator: torch.Generator | None = None,
) -> list[int]:
    """Q §4.2: the transitions to train, sorted indices in 0..num_steps-1; 0 is the one that leaves t = 1.

    Training every step makes the policy hack the reward within a few iterations; high-noise steps decide
    layout and meaning, so they are the safer part. `count` None means all of them. `mode` is

    - "all": every transition (`count` must not ask for fewer);
    - "first": the `count` noisiest (Flow-GRPO trains the first 9 of 10);
    - "random": `count` different ones from `generator`, drawn one by one with P(n) proportional to
      (num_steps - n)^emphasis. emphasis 0 is uniform, larger values prefer high noise more.

    DEVIATION: Q gives neither the subset nor its weights; the power law and its default 1 are our choice.
    Raises ValueError on a count outside 1..num_steps, a negative emphasis, and an unknown mode.
    """
    if mode not in SUBSET_MODES:
        raise ValueError(f"mode must be one of {SUBSET_MODES}, got {mode!r}")
    count = num_steps if count is None else count
    if count not in range(1, num_steps + 1):
        raise ValueError(f"count must be in 1..{num_steps}, got {count}")
    if mode == "all" and count != num_steps:
        raise ValueError(f"mode 'all' trains all {num_steps} steps, got count={count}; use 'first', 'random'")
    if emphasis < 0:
        raise ValueError(f"emphasis must be >= 0, got {emphasis}")
    if mode != "random":
        return list(range(count))
    weights = torch.arange(num_steps, 0, -1, dtype=torch.float64) ** emphasis  # (N - n)^emphasis, n = 0..N-1
    drawn = torch.multinomial(weights, count, replacement=False, generator=generator)
    return sorted(drawn.tolist())


def mix_schedule(step: int, ratio: Mapping[str, int]) -> str:
    """GRPO-mix (F App. A): the task whose prompts and reward epoch `step` uses, in blocks of a fixed cycle.

    ratio {"composition": 3, "text": 1, "quality": 1} trains composition in epochs 0, 1, 2, text in 3, quality
    in 4, composition again in 5. Depends on `step` alone (no state), so a resumed run continues the cycle.
    Raises ValueError on an empty ratio, on one that is not an int > 0 and on a negative step.

    ERRATUM: F §6.1 calls 3:1:1 a ratio of weighted *rewards* on one image; F App. A and the released code
    take turns by *epochs*, one reward at a time. This is the second; the first is `multi_reward_advantages`.
    """
    if not ratio:
        raise ValueError("ratio names no task")
    for task, share in ratio.items():
        if not isinstance(share, int) or share < 1:
            raise ValueError(f"ratio of {task!r} must be an int > 0, got {share!r}")
    if step < 0:
        raise ValueError(f"step must be >= 0, got {step}")
    cycle = [task for task, share in ratio.items() for _ in range(share)]
    return cycle[step % len(cycle)]


# ------------------------------------------------------------------------------------------------ diagnostics


def collateral_impact(grad_k: Tensor, advantage: Tensor, grad_log_prob: Tensor) -> Tensor:
    """F Eq. 4: what a policy-gradient step on task 1 does to task k, to first order and up to the step size.

        dJ_k ~ <grad J_k, dtheta>  with  dtheta = lr * E[A_1 grad log pi],
        so dJ_k / lr ~ E[A_1 <grad J_k, grad log pi>]

    grad_k: (M,) gradient of J_k; advantage: (B,) of task 1 on its own samples; grad_log_prob: (B, M). Returns
    a scalar, no gradient: negative means that learning task 1 unlearns task k (the papers' gradient
    interference). F's "proportional to" drops the factor lr > 0; the sign, which is what matters here, stays.
    Raises ValueError where the shapes do not match.
    """
    inputs = (grad_k, advantage, grad_log_prob)
    grad_k, advantage, grad_log_prob = (full_precision(x.detach()) for x in inputs)
    if grad_log_prob.shape != (*advantage.shape, *grad_k.shape):
        shapes = [tuple(x.shape) for x in inputs]
        raise ValueError(f"need grad_k (M,), advantage (B,), grad_log_prob (B, M), got {shapes}")
    return (advantage * (grad_log_prob @ grad_k)).mean()
