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

Clip ranges belong to a reduction: 1e-4 goes with log-probs averaged over the D latent dimensions ("mean"); the
true ratio ("sum") moves D times as far.
DEVIATION (F Eq. 3): it has log p of the final image, which no flow model can evaluate cheaply. As in Q Eq. 6 it becomes
the sum over the trajectory's Gaussian transitions: same expected gradient, computable.
ERRATUM (Q Eq. 6): it sums t = 0..T-1 of pi(x_{t-1}|x_t), and t = 0 would lead to x_{-1}.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kl import gaussian_kl
from sde import Time, Transition, flat_reduce, full_precision, per_sample, require_noise, same_shape, transition_mean

STD_MODES = ("group", "batch", "none")
SUBSET_MODES = ("all", "first", "random")

# Rewards that differ by less than this share of their size are equal: it is a few float32 roundings. Divided
# by their own std they would become full-size advantages, a gradient made of rounding errors.
RELATIVE_NOISE = 1e-6


# ------------------------------------------------------------------------------------------------ advantages
def group_advantages(rewards_PG: Tensor, std: str = "group") -> Tensor:
    """F §4.1, Q Eq. 4: A = (R - mean_c) / std, (P, G), float32 at least, no gradient.

    rewards_PG: a row holds all images of one prompt, any scale. The mean is always the group's own. `std`
    (population, divided by G) is

    - "group": the group's own (Q Eq. 4): every prompt pushes equally hard, nearly solved ones included;
    - "batch": that of all P*G rewards (Flow-GRPO's global std): a prompt counts by its spread;
    - "none": 1 (Dr. GRPO): (1 - 1/G) times the gradient of the expected reward itself, in the reward's units.

    A group whose rewards are equal (up to `RELATIVE_NOISE`) teaches nothing and gets exactly 0.
    DEVIATION (Flow-GRPO's code): it divides by std + 1e-4. Without the constant, a*R + b gives the same advantages as
    R for every a > 0, also for rewards that live on a scale of 1e-3.
    Raises ValueError for a NaN or infinite reward, a shape that is not (P, G) and an unknown `std`.
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
        deviation_PG = deviation_PG / std_P1  # Q Eq. 4
    elif std == "batch":
        deviation_PG = deviation_PG / rewards_PG.std(correction=0)  # one scale for all prompts
    return deviation_PG.masked_fill(flat_P1, 0.0)  # also where 0 / 0 made a NaN


def multi_reward_advantages(rewards_KPG: Tensor, weights: Tensor | Sequence) -> Tensor:
    """Q Eq. 13: A = sum_k w_k (R_k - mean_k,c) / std_k,c, (P, G), float32 at least, no gradient.

    weights: (K,), or (K, P) for Q §4.2's per-category calibration (column p holds the weights of prompt p's
    category). Each reward is normalised inside its group and then added (GDPO): the result is blind to each
    reward's scale, whereas normalising the weighted sum lets the reward with the largest numbers decide alone. A
    reward that is constant in a group adds 0 there. Q wants sum_k w_k = 1; another total scales the advantages.
    The sum is not normalised again. Raises ValueError for weights of another shape and for numbers not finite.
    """
    if rewards_KPG.ndim != 3:
        raise ValueError(f"rewards must be (rewards, prompts, group), got shape {tuple(rewards_KPG.shape)}")
    _require_finite(rewards_KPG, "reward", "prompt", "sample")
    advantages_KPG = torch.stack([group_advantages(rewards_PG) for rewards_PG in rewards_KPG])
    K, P, _ = advantages_KPG.shape
    w = torch.as_tensor(weights, dtype=advantages_KPG.dtype, device=advantages_KPG.device)
    if w.shape not in ((K,), (K, P)) or not w.isfinite().all():
        raise ValueError(f"weights must be finite, of shape ({K},) or ({K}, {P}), got {w.tolist()}")
    return (w.reshape(K, -1, 1) * advantages_KPG).sum(dim=0)  # (K,) is shared by all prompts: (K, 1, 1)


def _require_finite(rewards: Tensor, *axes: str) -> None:
    """ValueError naming the first NaN or infinite reward by its axes; it would poison its group."""
    bad = (~torch.isfinite(rewards)).nonzero().tolist()
    if bad:
        place = ", ".join(f"{axis} {index}" for axis, index in zip(axes, bad[0], strict=True))
        raise ValueError(f"reward {rewards[tuple(bad[0])].item()} is not finite at {place}")


# ---------------------------------------------------------------------------------------------- the objective
def clipped_objective(ratio: Tensor, advantage: Tensor, eps: float | None) -> Tensor:
    """F Eq. 11, Q Eq. 6: min(rho A, clip(rho, 1-eps, 1+eps) A) per sample, (B,), to be *maximised*.

    ratio, advantage: one shape. The gradient flows through both (detach the advantage outside) and is zero
    exactly if the policy has already moved past the clip in the direction that the advantage asks for. The min
    is pessimistic: a sample that moved the wrong way is never clipped, so it can come back. eps=None: rho A.

    ERRATUM (F's code): it multiplies a (B, 1) reward by a (B,) ratio. Broadcasting makes that (B, B), every
    sample then gets the batch's mean credit, and no error says so. Here unequal shapes raise ValueError.
    """
    same_shape(ratio=ratio, advantage=advantage)
    ratio, advantage = full_precision(ratio), full_precision(advantage)
    unclipped = ratio * advantage  # rho A
    if eps is None:
        return unclipped
    return torch.minimum(unclipped, ratio.clamp(1 - eps, 1 + eps) * advantage)  # pessimistic


def policy_loss(
    step: Transition,
    mean: Tensor,
    advantage: Tensor,
    clip: float | None,
    advantage_clip: float = 5.0,
    reduce: str = "mean",
    guard: bool = False,
    mean_ref: Tensor | None = None,
    beta: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Q Eq. 6's summand for one transition, with Flow-GRPO's KL to a frozen reference, (B,), to be minimised:

        -min(rho A, clip(rho) A) / D [/ dt]  +  beta dt KL(pi_theta || pi_ref) / D

    Both terms are per dimension, whatever `reduce` and kernel: `reduce` says what rho is, hence where the clip bites.
    "mean" makes it the D-th root of the ratio of densities, whose gradient has the 1/D already; "sum" is that ratio,
    and its term is divided by D. At rho = 1 both have the gradient -A grad log pi_theta / D: F Eq. 3 per dimension.

    - step: a sampled transition; its mean and std are those of the policy that drew it. mean: of the student at the
      same state (`sde.transition_mean`), (B, ...), carries the gradient. Where the two are equal, rho is exactly 1.
    - advantage: (B,), clamped to +-advantage_clip (5 in Flow-GRPO): one lucky image must not outweigh its group.
    - guard: GRPO-Guard (arXiv 2510.22319, cited in Q §6): `guard_ratio`, and the term is divided by dt, so that every t
      of the SDE pulls alike. Literally by dt, as its code does: the term grows by about std / dt, and the KL does not.
    - mean_ref: the reference's mean, with beta. DEVIATION (Flow-GRPO's code): it divides by 2 sigma^2 where F Eq. 8 has
      2 sigma^2 dt, and by D. That is dt KL / D, i.e. the mean over D of w(t) dt ||v - v_ref||^2, and its beta (0.04;
      0.01 for PickScore) belongs to it. A true KL would count 1 / dt times as much, 3.7 to 25 times on SD3.5's grid.

    Also returned, (B,) each, detached: the ratio - 1 and its square, 1 where the min took the clipped branch (no
    gradient is left), and what beta multiplies. No gradient reaches step, advantage or mean_ref. Raises ValueError for
    unequal shapes and for a step without noise.
    """
    log_rho = log_ratio(step, mean, reduce)
    rho = guard_ratio(log_rho, mean, step.mean, step.std, reduce) if guard else log_rho.exp()
    advantage = full_precision(advantage.detach()).clamp(-advantage_clip, advantage_clip)
    objective = clipped_objective(rho, advantage, clip)
    loss = -objective / (mean[0].numel() if reduce == "sum" else 1)
    if guard:
        loss = loss / per_sample(step.dt, loss)
    stats = ratio_terms(rho, advantage, objective)
    if mean_ref is not None:
        kl = gaussian_kl(mean, mean_ref.detach(), step.std, "mean") * per_sample(step.dt, loss)  # F Eq. 8, dt KL / D
        loss = loss + beta * kl
        stats["kl"] = kl.detach()
    return loss, stats


@torch.no_grad()
def ratio_terms(rho: Tensor, advantage: Tensor, objective: Tensor) -> dict[str, Tensor]:
    """What is logged of a ratio, (B,) each: rho - 1, its square, 1 where `clipped_objective` took the clipped branch.

    Counting |rho - 1| > eps, as is often done, also counts samples that moved the wrong way and keep their gradient.
    """
    off = rho - 1
    return {"off": off, "off_sq": off.square(), "clip_fraction": (rho * advantage > objective).to(off)}


def log_ratio(step: Transition, mean: Tensor, reduce: str = "mean") -> Tensor:
    """F Eq. 11, Q Eq. 6: log rho = log pi_theta(x'|x) - log pi_old(x'|x), (B,), by D if reduce is "mean".

    The difference is taken before the sum over D, number by number: two log-densities of 65,536 numbers are about
    1e5, and float32 would leave 1e-2 of their difference. Gradient to `mean`. Raises as `sde.log_prob`.
    """
    same_shape(mean=mean, mean_old=step.mean, action=step.x_next)
    require_noise(step.std)
    action, std = full_precision(step.x_next).detach(), per_sample(step.std, mean)
    new, old = (action - full_precision(m) for m in (mean, step.mean.detach()))  # (B, ...)
    return flat_reduce((old.square() - new.square()) / (2 * std**2), reduce)


def guard_ratio(log_rho: Tensor, mean: Tensor, mean_old: Tensor, std: Time, reduce: str = "mean") -> Tensor:
    """GRPO-Guard's RatioNorm (arXiv 2510.22319, cited in Q §6): exp(std (log rho + ||dmu||^2/(2 std^2))), (B,).

    With x_{t-dt} = mean_old + std*eps and dmu = mean - mean_old, the log-ratio of the two Gaussians is

        log rho = <dmu, eps>/std - ||dmu||^2/(2 std^2)

    It sits below zero by the second term (positive advantages seldom reach the clip) and spreads like 1/std
    (late, quiet steps clip first). Adding the bias back and multiplying by std leaves exp(<dmu, eps>), centred at
    1 with a spread that depends on ||dmu|| alone: one eps means the same at every t.

    log_rho: (B,), reduced over D by `reduce`; mean, mean_old: (B, ...); std = sigma*sqrt(dt) > 0, a float or (B,). The
    gradient reaches log_rho and mean (with respect to the policy it is std*grad log pi at dmu = 0), never mean_old.
    Raises ValueError for unequal shapes and std <= 0.
    """
    same_shape(mean=mean, mean_old=mean_old)
    require_noise(std)
    log_rho = full_precision(log_rho)
    std = per_sample(std, log_rho)
    gap = full_precision(mean) - full_precision(mean_old).detach()  # dmu, (B, ...)
    gap_sq = flat_reduce(gap.square(), reduce)  # ||dmu||^2, (B,)
    same_shape(log_rho=log_rho, gap_sq=gap_sq)
    return torch.exp(std * (log_rho + gap_sq / (2 * std**2)))  # exp(<dmu, eps>)


def hybrid_transition(step: Transition, v: Tensor, level: float, kernel: str = "sde") -> Transition:
    """Q §4.1's hybrid CFG: the guided transition `step` as the policy without guidance would have taken it.

    step: from a guided `sde.rollout`, x' = mean + std eps; v: v(x_t, t, c), (B, ...), of the same policy without
    the unconditional branch. Returned: v, its own mean_c, and the action mean_c + std eps with the same noise. A
    step without noise is returned as it is (nothing is trained on it). No gradient.

    Why not ask the guided action x' itself of the unguided policy? That ratio would be 1 at first, too, but its
    gradient A (x' - mean_c) / std^2 dmean_c has the part A (mean - mean_c) / std^2 dmean_c, which looks at the
    state alone: its mean is not zero, and it pulls the conditional branch towards or away from its guided self,
    whatever the action was worth. Here the mean is exchanged and the noise kept, so that

        first gradient = A eps / std dmean_c = 1/w (gradient of the guided policy with its other branch held fixed)

    because v_guided = (1-w) v_uncond + w v_cond and the mean is affine in the velocity: the exact policy gradient
    of what was drawn, in the conditional branch, but for 1/w (an optimizer such as Adam takes it away).
    SILENT (Q 4.1): the objective has no unconditional branch, and Q does not say whose action it judges.
    Norm-rescaled guidance is not affine in v_cond; there 1/w is approximate. Raises ValueError if shapes differ.
    """
    same_shape(v=v, v_guided=step.v)
    if step.std == 0:
        return step
    with torch.no_grad():
        mean = transition_mean(step, v, level, kernel)  # mean_c
        return step._replace(v=full_precision(v).detach(), mean=mean, x_next=mean + (step.x_next - step.mean))


# ----------------------------------------------------------------------------------- which steps, which task
def timestep_subset(
    num_steps: int, count: int | None = None, mode: str = "all", generator: torch.Generator | None = None
) -> list[int]:
    """Q §4.2: the transitions to train, sorted indices in 0..num_steps-1; 0 is the one that leaves t = 1.

    Training every step makes the policy hack the reward within a few iterations; high-noise steps decide
    layout and meaning, so they are the safer part. `count` None means all of them. `mode` is

    - "all": every transition (`count` must not ask for fewer);
    - "first": the `count` noisiest (Flow-GRPO trains the first 9 of 10);
    - "random": `count` different ones from `generator`, drawn one by one with P(n) proportional to
      num_steps - n, which prefers high noise.

    Both subsets are an emphasis: a mean over them is not that over all steps.

    SILENT (Q 4.2): neither the subset nor its weights are given; the linear law is our choice.
    Raises ValueError for a count outside 1..num_steps and an unknown mode.
    """
    if mode not in SUBSET_MODES:
        raise ValueError(f"mode must be one of {SUBSET_MODES}, got {mode!r}")
    count = num_steps if count is None else count
    if count not in range(1, num_steps + 1) or (mode == "all" and count != num_steps):
        raise ValueError(f"mode {mode!r} cannot train {count} of {num_steps} steps")
    if mode != "random":
        return list(range(count))
    weights = torch.arange(num_steps, 0, -1, dtype=torch.float64)  # N - n for n = 0..N-1
    return sorted(torch.multinomial(weights, count, replacement=False, generator=generator).tolist())


def mix_schedule(step: int, ratio: Mapping[str, int]) -> str:
    """GRPO-mix (F App. A): the task whose prompts and reward epoch `step` uses, in blocks of a fixed cycle.

    ratio {"composition": 3, "text": 1, "quality": 1} trains composition in epochs 0, 1, 2, text in 3, quality
    in 4, composition again in 5. It depends on `step` alone, so a resumed run continues the cycle. Raises
    ValueError unless every share is an int > 0 and step >= 0.

    ERRATUM (F 6.1, App. A): 6.1 calls 3:1:1 a ratio of weighted *rewards* on one image; F App. A and the released code
    take turns by *epochs*, one reward at a time. This is the second; the first is `multi_reward_advantages`.
    """
    if step < 0 or not ratio or not all(isinstance(share, int) and share > 0 for share in ratio.values()):
        raise ValueError(f"need step >= 0 and shares that are ints > 0, got {step} and {dict(ratio)}")
    cycle = [task for task, share in ratio.items() for _ in range(share)]
    return cycle[step % len(cycle)]


# ------------------------------------------------------------------------------------------------ diagnostics
def collateral_impact(grad_k: Tensor, advantage: Tensor, grad_log_prob: Tensor) -> Tensor:
    """F Eq. 4: E[A_1 <grad J_k, grad log pi>], what a policy-gradient step on task 1 does to task k; a scalar.

        dJ_k ~ <grad J_k, dtheta>  with  dtheta = lr E[A_1 grad log pi],  to first order and up to lr > 0

    grad_k: (M,) gradient of J_k; advantage: (B,) of task 1 on its own samples; grad_log_prob: (B, M). No
    gradient. Negative: learning task 1 unlearns task k (the papers' gradient interference). Raises ValueError
    unless the shapes match.
    """
    inputs = (grad_k, advantage, grad_log_prob)
    grad_k, advantage, grad_log_prob = (full_precision(x.detach()) for x in inputs)
    if grad_log_prob.shape != (*advantage.shape, *grad_k.shape):
        raise ValueError(f"need grad_k (M,), advantage (B,), grad_log_prob (B, M), got {[x.shape for x in inputs]}")
    return (advantage * (grad_log_prob @ grad_k)).mean()  # <grad J_k, grad log pi> is (B,)
