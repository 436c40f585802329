"""How far apart are two policies, or two flows, and why is that a distance between velocities?

    F Eq. 8     KL(N(mu_p, s^2 I) || N(mu_q, s^2 I)) = ||mu_p - mu_q||^2 / (2 s^2),  s^2 = sigma^2 dt
    F Eq. 9     = w(t) ||v_p - v_q||^2,   w(t) = dt/2 (sigma (1-t)/(2t) + 1/sigma)^2
    Q Eq. 16    W2^2 = inf over couplings of E||x - y||^2
    Q Eq. 17    W2(p_0, p_0*) <= (int E||v - v*||^2 dt)^{1/2} exp(int L_t dt)

From Eq. 8 to Eq. 9: both policies stand at the *same* state x_t, and `sde.sde_mean` is affine in v, so that x
cancels and mu_p - mu_q = -dt (1 + sigma^2 (1-t)/(2t)) (v_p - v_q). Square it, divide by 2 sigma^2 dt, and
pull sigma into the bracket. The file has Eq. 8 and Eq. 9 as two routes that share no arithmetic: GRPO's KL to
the base takes Eq. 8, distillation takes Eq. 9, and the tests make them agree.

The two papers answer differently. F weighs every step by w(t), which grows without bound as sigma -> 0: on
SD3.5's ten steps it runs from 0.0016 at t=1 to 1.1 at t=0.28, so F's distillation is mostly about the
low-noise end. Q rolls out an ODE, where the KL of two deterministic steps is infinite; it bounds a transport
distance, and the weight is 1 at all times.

ERRATUM (Q Eq. 15): it says "forward KL" and prints KL(p_theta || p_theta*), student first: that is the reverse one,
as in F Eq. 2. For Gaussians that share a covariance the two are equal; over whole trajectories they are not.

Notation as in sde.py: means and velocities (B, ...), times and sigma floats or (B,), results (B,).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sde import Time, flat_reduce, full_precision, per_sample, require_noise, same_shape


def gaussian_kl(mean_p: Tensor, mean_q: Tensor, std: Time, reduce: str = "sum") -> Tensor:
    """F Eq. 8: KL(N(mean_p, std^2 I) || N(mean_q, std^2 I)) in nats, (B,); "mean" divides it by D.

    std > 0 is the step's sigma sqrt(dt), the same for both. Gradients flow to both means. It looks at the means
    only, so it holds for every kernel of `sde.rollout`. Raises ValueError if shapes differ or std is 0.
    """
    same_shape(mean_p=mean_p, mean_q=mean_q)
    require_noise(std)
    gap, std = full_precision(mean_p) - full_precision(mean_q), per_sample(std, mean_p)  # (B, ...)
    return flat_reduce(gap**2 / (2 * std**2), reduce)  # ||mu_p - mu_q||^2 / (2 s^2)


def kl_weight(t: Time, dt: Time, sigma: Time) -> Time:
    """F Eq. 9: w(t) = dt/2 (sigma (1-t)/(2t) + 1/sigma)^2 in nats per unit of ||dv||^2; a float, or (B,).

    t in (0, 1], dt > 0. Raises ValueError for sigma = 0, where the weight is infinite, and for unequal shapes.
    """
    require_noise(sigma)
    t, dt, sigma = full_precision(t), full_precision(dt), full_precision(sigma)
    same_shape(**{k: x for k, x in (("t", t), ("dt", dt), ("sigma", sigma)) if isinstance(x, Tensor) and x.ndim})
    # sigma (1-t)/(2t): v's part in the score term; 1/sigma: v's part in the drift
    return dt / 2 * (sigma * (1 - t) / (2 * t) + 1 / sigma) ** 2


def velocity_kl(v_p: Tensor, v_q: Tensor, t: Time, dt: Time, sigma: Time, reduce: str = "sum") -> Tensor:
    """F Eq. 9: KL between two SDE policies at one state, w(t) ||v_p - v_q||^2 in nats, (B,). Gradients flow to both.

    It equals `gaussian_kl` of the two `sde.sde_mean`s. Raises ValueError if shapes differ or sigma is 0.
    """
    same_shape(v_p=v_p, v_q=v_q)
    gap_B = flat_reduce((full_precision(v_p) - full_precision(v_q)).square(), reduce)  # ||v_p - v_q||^2
    return gap_B * per_sample(kl_weight(t, dt, sigma), gap_B)


def w2_bound(velocity_gap_sq: Tensor, lipschitz: Tensor, ts: Tensor | Sequence[float]) -> Tensor:
    """Q Eq. 17, right side: (int E||v - v*||^2 dt)^{1/2} exp(int L_t dt), a 0-d tensor in units of x.

    velocity_gap_sq and lipschitz, (N+1,), are E||v - v*||^2 under the *student's* marginals and the teacher's
    Lipschitz constant, both >= 0, at the grid times ts, (N+1,), which ascend or descend. Trapezoid rule.
    Gradients flow (infinite slope where the gap is zero everywhere).

    Why it holds: run both ODEs from one noise; d/dt ||x - y|| <= ||v - v*||(x) + L_t ||x - y||, and Grönwall
    and Cauchy-Schwarz on an interval of length at most 1 give the bound. A constant gap with L=0 attains it.
    ERRATUM (Q Eq. 17): it needs a finite int L_t dt, which data on single points does not have.
    Raises ValueError if shapes differ, a value is negative or ts is not monotone.
    """
    gap_sq, lipschitz = full_precision(velocity_gap_sq), full_precision(lipschitz)
    ts = full_precision(torch.as_tensor(ts, device=gap_sq.device))
    same_shape(velocity_gap_sq=gap_sq, lipschitz=lipschitz, ts=ts)
    if (torch.cat([gap_sq, lipschitz]) < 0).any():
        raise ValueError("squared gaps and Lipschitz constants must not be negative")
    if not ((ts.diff() > 0).all() or (ts.diff() < 0).all()):
        raise ValueError(f"ts must ascend or descend strictly, not {ts.tolist()}")
    gap = torch.trapezoid(gap_sq, ts).abs()  # abs: a descending grid integrates to the negative
    return gap.sqrt() * torch.trapezoid(lipschitz, ts).abs().exp()  # exp(int L_t dt)
