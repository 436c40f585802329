"""Can a flow model learn from rewards without a noisy sampler, a ratio or a stored trajectory?

DiffusionNFT keeps only the finished image x_0 and its reward. It noises x_0 again as in pre-training, and
asks for a velocity that fits good images and an implicit *negative* velocity that fits bad ones:

    x_t = (1-t) x_0 + t eps,  v* = eps - x_0                                  the flow-matching target
    v+  = beta v + (1-beta) v_old,   v- = (1+beta) v_old - beta v             Q Eq. 7
    L   = E[ r ||v+ - v*||^2 + (1-r) ||v- - v*||^2 ]                          Q Eq. 8
    r   = clip(A, -A_max, A_max) / (2 A_max) + 1/2   in [0, 1]                Q §2.2
    L_KL = E||v - v_ref||^2                                                   Q Eq. 9

What it does: write d = v - v_old and e = v_old - v*. Then v+ - v* = e + beta d, v- - v* = e - beta d, and

    L = ||e||^2 + 2 beta (2r-1) <d, e> + beta^2 ||d||^2
    grad_v L at v = v_old:  2 beta (2r-1) (v_old - v*)
    argmin:                 v_old + (1/beta) E[(2r-1) (v* - v_old) | x_t]

so r > 1/2 pulls the velocity towards the image's own target, r < 1/2 pushes it away, r = 1/2 leaves it alone,
and 1/beta is the step length: a *small* beta is the bold one. The images may come from any solver, ODE
included: this is one reading of Q's 40-step ODE rollout, which leaves no noise for a GRPO ratio.

Notation: t = 1 is noise; v, v_old, v_ref are the student's, the sampling policy's and the frozen reference's
velocities at (x_t, t, c), all (B, ...); per-sample values are (B,).

`nft_loss` is Q Eq. 8 itself. DEVIATION (DiffusionNFT's code): it compares predictions of x_0 instead of v and
divides each squared error by its own detached mean absolute error; Q's equation has neither.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sde import flat_reduce, full_precision, same_shape


def optimality(advantage: Tensor, advantage_max: float) -> Tensor:
    """Q §2.2 (below Eq. 8): r = clip(A, -A_max, A_max) / (2 A_max) + 1/2, the chance that an image is "good".

    advantage: any shape, group-relative (`grpo.group_advantages`), so 0 is the group's mean and maps to 1/2. r
    saturates at 0 or 1 at advantage_max > 0. Returns that shape, float32 at least, no gradient.
    """
    if advantage_max <= 0:
        raise ValueError(f"advantage_max must be > 0, got {advantage_max}")
    clipped = full_precision(advantage.detach()).clamp(-advantage_max, advantage_max)
    return clipped / (2 * advantage_max) + 0.5  # -A_max -> 0, 0 -> 1/2, A_max -> 1


def nft_loss(v: Tensor, v_old: Tensor, v_target: Tensor, r: Tensor, beta: float, reduce: str = "sum") -> Tensor:
    """Q Eq. 7-8, per sample: r ||v+ - v*||^2 + (1-r) ||v- - v*||^2, (B,), float32 at least.

    v, v_old, v_target = eps - x_0: (B, ...); r: (B,) in [0, 1] from `optimality`; beta > 0, Q's interpolation
    strength (1 or 0.1 in public runs). "mean" divides the squared norms by D. The gradient flows to v only. With
    r = 1, beta = 1 this is plain flow matching.
    Raises ValueError for unequal shapes, beta <= 0 and r outside [0, 1]: an advantage passed by mistake would
    train without complaint, with steps (2r-1)/beta of the wrong length.
    """
    same_shape(v=v, v_old=v_old, v_target=v_target)
    if beta <= 0:
        raise ValueError(f"beta must be > 0, got {beta}")
    if r.min() < 0 or r.max() > 1:
        raise ValueError(f"r must lie in [0, 1], got {r.tolist()}")
    v, v_old = full_precision(v), full_precision(v_old).detach()
    v_target, r = full_precision(v_target).detach(), full_precision(r).detach()
    v_plus = beta * v + (1 - beta) * v_old  # Q Eq. 7, left
    v_minus = (1 + beta) * v_old - beta * v  # Q Eq. 7, right: v_plus mirrored at v_old
    positive = flat_reduce((v_plus - v_target).square(), reduce)  # ||v+ - v*||^2, (B,)
    negative = flat_reduce((v_minus - v_target).square(), reduce)  # ||v- - v*||^2, (B,)
    same_shape(r=r, positive=positive)
    return r * positive + (1 - r) * negative  # Q Eq. 8


def velocity_penalty(v: Tensor, v_ref: Tensor, reduce: str = "sum") -> Tensor:
    """Q Eq. 9, per sample: ||v - v_ref||^2, (B,), float32 at least, gradient to v only. "mean" divides by D.

    ERRATUM (Q Eq. 9): Q calls this a KL penalty. The forward process has no sampling noise, so there is no Gaussian
    transition to take a KL of; it is a squared distance of velocities. One SDE step's KL is the same distance
    times the weight w(t) of F Eq. 9 (`kl.kl_weight`), i.e. Q weighs every time alike.
    """
    same_shape(v=v, v_ref=v_ref)
    return flat_reduce((full_precision(v) - full_precision(v_ref).detach()).square(), reduce)  # the reference is frozen


@torch.no_grad()
def ema_update(old: Sequence[Tensor], new: Sequence[Tensor], decay: float) -> None:
    """Q Eq. 7's old policy: DiffusionNFT's soft update of what samples, in place: old <- decay old + (1-decay) new.

    decay in [0, 1]: 0 copies (fully on-policy), 1 freezes. Keep `old` in float32: (1-decay) times a small step is
    below half precision's resolution and would be lost. Raises ValueError if decay or shapes do not fit; then
    nothing is written.
    """
    if not 0 <= decay <= 1 or [x.shape for x in old] != [x.shape for x in new]:
        raise ValueError(f"need a decay in [0, 1] and tensors of equal shapes, got {decay}")
    for target, tensor in zip(old, new):
        target.lerp_(tensor.to(target), 1 - decay)  # old + (1-decay) (new - old)


def old_policy_decay(step: int) -> float:
    """The decay of `ema_update` after step `step`, all its updates included: min(0.001 step, 0.5).

    It starts at 0, where sampling with the newest policy learns fastest, and rises to 0.5, where a slower sampling
    policy keeps the late phase stable. Q is silent on the schedule; this is one of DiffusionNFT's.
    """
    return min(0.001 * step, 0.5)
