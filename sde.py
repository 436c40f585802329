"""How does a deterministic flow become a stochastic policy whose samples have the same distribution?

A flow model draws an image by integrating an ODE from noise to data. Reinforcement learning needs an *action*
with a probability: a step that is random, with a density to differentiate. This file turns the one into the
other. Nothing here knows about prompts, rewards or teachers.

    Q Eq. 1     x_t = (1-t) x_0 + t eps                          `interpolate`: t=1 is noise, t=0 is data
    F 1, Q 2    E ||v(x_t, t) - (eps - x_0)||^2                  `flow_matching_loss`: how v is pretrained
    Q Eq. 3     dx = v dt                                        `ode_step`, `sample`
    F 5, Q 5    dx = [v + sigma^2/(2t) (x + (1-t) v)] dt + sigma dw
    F Eq. 6     pi(x_{t-dt} | x_t) = N(mu(x_t, t), sigma^2 dt I) `sde_mean`, `sde_step`, `log_prob`

Why the SDE leaves the marginals alone: the best guess of the noise inside x_t is eps_hat = x + (1-t) v, so
the score is grad log p_t = -eps_hat/t, and the bracket is v - (sigma^2/2) grad log p_t. F and Q write the
reverse-time SDE, whose dt is negative. Here dt > 0 is the length of a step, so the drift is subtracted and the
step moves *along* the score: Langevin drift, which undoes what the noise sigma dw adds.

The cancellation is exact only as dt -> 0. At ten steps the state ends up a little too noisy; `cps_step` has the right
amount of noise at any number of steps.

Notation. x, v, eps, mean: (B, ...) with any trailing shape, D numbers a sample. The grid descends: t_0=1 >
... > t_N=0, and dt = t_n - t_{n+1} > 0. sigma = a sqrt(t/(1-t)), where `level` is a (0.7 for SD3.5). Times,
dt and sigma are floats or (B,) tensors. Arithmetic is float32 or better: bfloat16 in, float32 out; float64
stays. Functions raise ValueError if the shapes of two tensors differ (`same_shape`, at the end of the file).

ERRATUM (F Eq. 1): it regresses x_1 - x_0 with data at t=1; F Eq. 5 holds only with data at t=0 (Q's convention,
and that of SD3). The whole project puts data at t=0; read F Eq. 1 with x_0 and x_1 exchanged.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Time = float | Tensor  # a python float or 0-d tensor for the whole batch, or one value per sample, (B,)
Noise = torch.Generator | Sequence[torch.Generator] | None  # one source for the batch, or one for each of its B rows
KERNELS = ("sde", "cps")


# ---------------------------------------------------------------------------- the forward process (Q Eq. 1-2)
def interpolate(x0: Tensor, eps: Tensor, t: Time) -> Tensor:
    """Q Eq. 1: x_t = (1-t) x_0 + t eps, (B, ...). t in [0, 1], 1 is pure noise. Gradients flow."""
    same_shape(x0=x0, eps=eps)
    x0, eps, t = full_precision(x0), full_precision(eps), per_sample(t, x0)
    return (1 - t) * x0 + t * eps  # (B, ...)


def flow_matching_loss(v: Tensor, x0: Tensor, eps: Tensor, reduce: str = "mean") -> Tensor:
    """F Eq. 1, Q Eq. 2: ||v - (eps - x_0)||^2 per sample, (B,), with v at `interpolate(x0, eps, t)`.

    Gradients flow. DEVIATION (F Eq. 1, Q Eq. 2): both write the squared norm ("sum"). The default divides it by D,
    as all implementations do, so that a learning rate survives a change of resolution.
    """
    same_shape(v=v, x0=x0, eps=eps)
    target = full_precision(eps) - full_precision(x0)  # d x_t / dt, (B, ...)
    return flat_reduce((full_precision(v) - target).square(), reduce)


# ------------------------------------------------------------------------------------- the grid and the noise
def time_grid(num_steps: int, shift: float = 1.0) -> Tensor:
    """t_0=1 > t_1 > ... > t_N=0, (N+1,) float32, with SD3's static shift t -> s t / (1 + (s-1) t).

    shift > 1 spends more steps near t=1 (SD3.5: 3). Raises ValueError for num_steps < 1 or shift <= 0.
    """
    if num_steps < 1 or shift <= 0:
        raise ValueError(f"need num_steps >= 1 and shift > 0, not {num_steps} and {shift}")
    t = torch.linspace(1, 0, num_steps + 1)
    # 1 + (s-1) t written as s t + (1-t): exactly 1 and 0 at the ends, so `noise_scale` recognises t=1
    return shift * t / (shift * t + (1 - t))


def noise_scale(t: Time, t_next: Time, level: float) -> Time:
    """F §5.1.1 (from Flow-GRPO): sigma_t = a sqrt(t/(1-t)), a = `level` >= 0; a float, or (B,).

    At t=1 that is infinite, so there (and only there) 1-t is taken at the next grid time. This makes the first
    step's std, sigma sqrt(dt), equal to a. SILENT (F Eq. 5): the choice is the released code's.
    """
    t, t_next = full_precision(t), full_precision(t_next)
    one_minus_t = 1 - t + (t == 1) * (t - t_next)  # 1-t, and 1-t_next if t=1
    return level * (t / one_minus_t) ** 0.5


def standard_normal(shape: Sequence[int], generator: Noise = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """The eps of Q Eq. 1 and F Eq. 6: N(0, I) of `shape` (B, ...), on the generator's device, no gradient.

    With one generator for each row, row i's noise is a function of generator i alone: every trajectory stays the
    same however a batch is cut into micro-batches and shared among ranks. Raises ValueError for another count.
    """
    if generator is None or isinstance(generator, torch.Generator):
        device = "cpu" if generator is None else generator.device
        return torch.randn(*shape, generator=generator, dtype=dtype, device=device)
    if len(generator) != shape[0]:
        raise ValueError(f"a batch of shape {tuple(shape)} needs a generator for each row, not {len(generator)}")
    return torch.stack([torch.randn(*shape[1:], generator=g, dtype=dtype, device=g.device) for g in generator])


# --------------------------------------------------------------------------------------- one step of a kernel
def ode_step(x: Tensor, v: Tensor, dt: Time) -> Tensor:
    """Q Eq. 3, Euler: x_{t-dt} = x - v dt, (B, ...). Gradients flow."""
    same_shape(x=x, v=v)
    return full_precision(x) - full_precision(v) * per_sample(dt, x)


def sde_mean(x: Tensor, v: Tensor, t: Time, dt: Time, sigma: Time) -> Tensor:
    """F Eq. 5-6, Q Eq. 5: mu = x - [v + sigma^2/(2t) (x + (1-t) v)] dt, the mean of x_{t-dt}, (B, ...).

    t in (0, 1], dt > 0, sigma >= 0. Affine in v, which makes F Eq. 9 exact. Gradients flow to x and v.
    """
    same_shape(x=x, v=v)
    x, v = full_precision(x), full_precision(v)
    t, dt, sigma = per_sample(t, x), per_sample(dt, x), per_sample(sigma, x)
    eps_hat = x + (1 - t) * v  # (B, ...) the noise that v says is in x; the score is -eps_hat / t
    return x - (v + sigma**2 / (2 * t) * eps_hat) * dt


def sde_step(
    x: Tensor, v: Tensor, t: Time, dt: Time, sigma: Time, generator: Noise = None
) -> tuple[Tensor, Tensor, Time]:
    """F Eq. 6: one Euler-Maruyama step, (x_next, mean, std) with std = sigma sqrt(dt), a float or (B,).

    Gradients flow through `mean`, never through `x_next`.
    """
    mean, std = sde_mean(x, v, t, dt, sigma), full_precision(sigma) * full_precision(dt) ** 0.5
    return _act(mean, std, generator), mean, std


def cps_mean(x: Tensor, v: Tensor, t: Time, t_next: Time, level: float) -> Tensor:
    """The mean of `cps_step`: (1-t') x0_hat + t' cos(level pi/2) x1_hat, (B, ...). Gradients flow to x and v."""
    same_shape(x=x, v=v)
    x, v = full_precision(x), full_precision(v)
    t, t_next = per_sample(t, x), per_sample(t_next, x)
    x0_hat, x1_hat = x - t * v, x + (1 - t) * v  # (B, ...) each: the data and the noise that v sees in x
    return (1 - t_next) * x0_hat + t_next * math.cos(level * math.pi / 2) * x1_hat


def cps_step(
    x: Tensor, v: Tensor, t: Time, t_next: Time, level: float, generator: Noise = None
) -> tuple[Tensor, Tensor, Time]:
    """Flow-CPS, coefficient-preserving sampling (in neither paper): `sde_step`'s place, level in [0, 1].

        x' = (1-t') x0_hat + t' [cos(level pi/2) x1_hat + sin(level pi/2) z],  z ~ N(0, I)

    cos^2 + sin^2 = 1, so the state carries exactly the schedule's noise t', which the network was trained at.
    The SDE's noise has variance t'^2 + sigma^2 dt^2/t + (sigma^2 dt/(2t))^2, which shows as grain at few steps.
    The price: x0_hat is a conditional mean, so each step drops the spread of x_0 given x_t, and broad marginals
    shrink. level=0 is the ODE step; t'=0 is deterministic. Raises ValueError for a level outside [0, 1].
    """
    if not 0 <= level <= 1:
        raise ValueError(f"the cps level must be in [0, 1], not {level}")
    mean = cps_mean(x, v, t, t_next, level)
    std = full_precision(t_next) * math.sin(level * math.pi / 2)  # of the fresh noise z
    return _act(mean, std, generator), mean, std


def _act(mean: Tensor, std: Time, generator: Noise) -> Tensor:
    """The action x_next ~ N(mean, std^2 I), (B, ...): data, hence detached. `log_prob` differentiates its mean."""
    noise = standard_normal(mean.shape, generator, mean.dtype)  # on the generator's device: one seed, one noise
    return mean.detach() + per_sample(std, mean) * noise.to(mean.device)


def log_prob(x_next: Tensor, mean: Tensor, std: Time, reduce: str = "mean") -> Tensor:
    """F Eq. 6: log N(x_next; mean, std^2 I) per sample, (B,). Gradients flow through `mean`.

    "sum" is the true log-density; "mean" divides it by D. DEVIATION (F's code): it has the mean only, and
    its clip range (1e-4) belongs to it: exp of a mean is the D-th root of F Eq. 11's ratio. Hence the choice.
    Raises ValueError for std <= 0 and an unknown `reduce`.
    """
    same_shape(x_next=x_next, mean=mean)
    require_noise(std)
    x_next, mean, std = full_precision(x_next), full_precision(mean), per_sample(std, mean)
    log_std = std.log() if isinstance(std, Tensor) else math.log(std)
    # log N = -(x' - mu)^2 / (2 std^2) - log std - log(2 pi)/2, elementwise (B, ...)
    return flat_reduce(-((x_next - mean) ** 2) / (2 * std**2) - log_std - math.log(2 * math.pi) / 2, reduce)


# ----------------------------------------------------------------------------------------- whole trajectories
class Transition(NamedTuple):
    """One step of a rollout: everything that any loss of the project needs about it.

    std = sigma sqrt(dt) for both kernels; both are 0.0 if the step was deterministic. (With "cps", sigma is
    only defined by that relation: F Eq. 9's weight `kl.kl_weight` belongs to the "sde" kernel.)
    """

    index: int  # n, 0 .. N-1
    t: float  # t_n
    t_next: float  # t_{n+1}
    dt: float  # t_n - t_{n+1} > 0
    sigma: float
    x: Tensor  # (B, ...) the state x_t, never with a gradient
    v: Tensor  # (B, ...) velocity(x, t), with a gradient if gradients are enabled
    mean: Tensor  # (B, ...) likewise
    std: float
    x_next: Tensor  # (B, ...) the action, x of the next transition, never with a gradient


def rollout(
    velocity: Callable[[Tensor, float], Tensor],
    x: Tensor,
    ts: Tensor | Sequence[float],
    level: float,
    kernel: str = "sde",
    window: tuple[int, int] | None = None,
    generator: Noise = None,
) -> Iterator[Transition]:
    """F §5.1.1 (on-policy sampling): walk x, (B, ...), down the grid ts, (N+1,); yield N `Transition`s.

    Lazy: each transition is handed over as it is made. The caller may call backward on it at once and store
    nothing (single-pass OPD), or `list()` it (GRPO). Grad mode is the caller's: if gradients are enabled, `v` and
    `mean` carry them, but no gradient crosses a step.

    window=(start, stop) makes only steps start <= n < stop stochastic, the others ODE steps (Q trains a subset
    of mostly high-noise steps of an ODE rollout; a step without noise has no ratio). None: all steps. level=0
    or an empty window is the plain ODE. The step into t=0 is stochastic like the others with "sde", as in the
    released code, which does not train on it: a window that stops before it leaves the image clean. With "cps"
    it is deterministic.

    Raises ValueError, at the call, for an unknown kernel, a bad grid, a window outside 0..N or level < 0.
    """
    times = [float(t) for t in ts]
    if len(times) < 2 or times[0] > 1 or times[-1] < 0 or any(t <= t_next for t, t_next in zip(times, times[1:])):
        raise ValueError(f"ts must be two or more strictly descending times in [0, 1], not {times}")
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {KERNELS}, not {kernel!r}")
    num_steps = len(times) - 1
    start, stop = (0, num_steps) if window is None else window
    if not 0 <= start <= stop <= num_steps:
        raise ValueError(f"window must satisfy 0 <= start <= stop <= {num_steps}, not {(start, stop)}")
    if level < 0:
        raise ValueError(f"level must not be negative, not {level}")
    noisy = range(start, stop) if level > 0 else ()  # the n whose steps are stochastic
    return _walk(velocity, full_precision(x).detach(), times, level, kernel, noisy, generator)


def _walk(velocity, x, times, level, kernel, noisy, generator) -> Iterator[Transition]:
    """The loop of `rollout`; apart, so that bad arguments raise at the call and not at the first `next`."""
    for index, (t, t_next) in enumerate(zip(times, times[1:])):
        dt = t - t_next
        v = full_precision(velocity(x, t))  # (B, ...)
        if index not in noisy:
            mean, sigma, std = ode_step(x, v, dt), 0.0, 0.0  # Q Eq. 3
            x_next = mean.detach()
        elif kernel == "sde":
            sigma = noise_scale(t, t_next, level)
            x_next, mean, std = sde_step(x, v, t, dt, sigma, generator)  # F Eq. 6
        else:
            x_next, mean, std = cps_step(x, v, t, t_next, level, generator)
            sigma = std / dt**0.5  # so that std = sigma sqrt(dt) here, too
        yield Transition(index, t, t_next, dt, sigma, x, v, mean, std, x_next)
        x = x_next


def transition_mean(step: Transition, v: Tensor, level: float, kernel: str = "sde") -> Tensor:
    """The mean of `step` if the velocity had been v: what a policy ratio (F Eq. 11, Q Eq. 6) needs, (B, ...).

    The same arithmetic as the rollout's, so that the unchanged policy gives the old mean bit for bit, hence a
    first ratio of exactly 1. Gradients flow to v. Raises ValueError for a step without noise, which has no ratio.
    """
    require_noise(step.std)
    if kernel == "cps":
        return cps_mean(step.x, v, step.t, step.t_next, level)
    return sde_mean(step.x, v, step.t, step.dt, step.sigma)


@torch.no_grad()
def sample(velocity: Callable[[Tensor, float], Tensor], x: Tensor, ts: Tensor | Sequence[float]) -> Tensor:
    """Q Eq. 3: the plain ODE sampler, x (B, ...) from ts[0] to ts[-1]. No gradient. Raises as `rollout`."""
    for step in rollout(velocity, x, ts, level=0.0):
        x = step.x_next
    return x


# ------------------------------------------------------------------------------- precision, shapes, reductions
def full_precision(x: Time) -> Time:
    """A tensor in float32, or float64 if it came so; a float as it is. (A bfloat16 difference is mostly rounding.)"""
    return x.to(torch.promote_types(x.dtype, torch.float32)) if isinstance(x, Tensor) else x


def per_sample(value: Time, x: Tensor) -> Time:
    """(B,) -> (B, 1, ..., 1), to multiply x sample by sample. Floats and 0-d tensors pass through.

    Raises ValueError for any other shape: a (B, 1) would broadcast against a (B,) to a (B, B) without an error,
    which is the bug of the released Flow-OPD loss.
    """
    value = full_precision(value)
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    if value.shape != x.shape[:1]:
        raise ValueError(f"a per-sample value must have shape ({len(x)},), not {tuple(value.shape)}")
    return value.reshape([-1] + [1] * (x.ndim - 1))


def same_shape(**tensors: Tensor) -> None:
    """Raise ValueError, with names and shapes, unless all tensors have one shape (no silent broadcasting)."""
    if len({tuple(x.shape) for x in tensors.values()}) > 1:
        raise ValueError("shapes differ: " + ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items()))


def flat_reduce(term: Tensor, reduce: str) -> Tensor:
    """(B, ...) -> (B,): the "sum" of the equations over everything but the batch, or the "mean", which is it by D."""
    if reduce not in ("sum", "mean"):
        raise ValueError(f"reduce must be 'sum' or 'mean', not {reduce!r}")
    flat_BD = full_precision(term).reshape(len(term), -1)
    return flat_BD.sum(dim=1) if reduce == "sum" else flat_BD.mean(dim=1)


def require_noise(std: Time) -> None:
    """Raise ValueError unless `std` > 0: a deterministic step has no density, and its KL is 0 or infinite."""
    if not torch.all(torch.as_tensor(std) > 0):
        raise ValueError("the standard deviation must be positive: a deterministic step has no density")
