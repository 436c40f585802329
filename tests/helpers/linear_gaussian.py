"""Which OPD estimators follow the KL? A flow where every gradient is known exactly (F Eq. 10-12, opd.py).

The teacher is the flow of Gaussian data, whose velocity is linear in x; the student adds k x + b to it, and its 2 D
parameters theta = (k, b) are what the estimators differentiate. The anchor of MAR adds another such offset. Every
dimension is then a scalar linear-Gaussian process: the student's states are N(m, s) with a two-line recursion, so that
the KL of whole trajectories, under any weight of the states,

    sum_n w_n E||k x_n + b||^2 = sum_n w_n sum_d [k^2 (s + m^2) + 2 k b m + b^2]

and its gradient are exact. A policy theta that is updated on trajectories of theta_old meets the states of theta_old,
and its one action is then followed by theta_old's. The exact part uses its own arithmetic, none of sde.py or kl.py.

`python tests/helpers/linear_gaussian.py --trajectories 400000` prints the table of the estimators as markdown.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # when run as a script

import opd
import sde

DIMS, STEPS, LEVEL = 8, 6, 0.7
DATA_MEAN, DATA_VAR = 1.0, 0.25
CHUNK = 20_000
ON_SDE_STATES = tuple(name for name in opd.ESTIMATORS if name != "velocity")
FOLLOWS = {"literal": "zero", "released": "direct", "analytic": "direct", "sampled": "old direct", "path": "path",
           "sampled_path": "old path"}  # fmt: skip


def offset(seed: int) -> tuple[Tensor, Tensor]:
    """k and b, (D,) each: a velocity is the teacher's + k x + b."""
    k, b = torch.randn(2, DIMS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return k, b


STUDENT, ANCHOR = offset(3), offset(4)


def teacher_coefficients(t: float) -> tuple[float, float]:
    """v_teacher = slope x + shift = E[eps - x_0 | x_t] for x_0 ~ N(m, s^2): regress on u = x_t - (1-t) m."""
    slope = (t - (1 - t) * DATA_VAR) / (t**2 + (1 - t) ** 2 * DATA_VAR)
    return slope, -DATA_MEAN - slope * (1 - t) * DATA_MEAN


def teacher(x: Tensor, t: float) -> Tensor:
    slope, shift = teacher_coefficients(t)
    return slope * x + shift


# ------------------------------------------------------------------------------------------------------- exactly
class Step(NamedTuple):
    """What the exact part knows of step n."""

    t: float
    dt: float
    sigma: float  # 0: a step of the ODE
    weight: float  # of the squared gap


def steps_of(weight: str, start: int, stop: int) -> list[Step]:
    """The steps 0 .. stop-1, of which those from `start` on are noisy; the others have no weight."""
    found = []
    for n in range(stop):
        t, dt = 1 - n / STEPS, 1 / STEPS
        sigma = LEVEL * (t / (1 - t if n else dt)) ** 0.5
        w = dt / 2 * (sigma * (1 - t) / (2 * t) + 1 / sigma) ** 2
        w = {"kl": w, "kl_dt": w * dt, "uniform": 1.0, "dt": dt, "ode": dt**2 / 2}[weight]
        found.append(Step(t, dt, sigma, w) if n >= start else Step(t, dt, 0.0, 0.0))
    return found


def moved(step: Step, theta, moments):
    """Mean and variance, (D,) each, after a step of the policy theta = (k, b)."""
    (k, b), (mean, var) = theta, moments
    slope, shift = teacher_coefficients(step.t)
    half = step.sigma**2 / (2 * step.t)  # drift: (1 + half (1-t)) v + half x, with v = (slope + k) x + shift + b
    gain = 1 - step.dt * ((1 + half * (1 - step.t)) * (slope + k) + half)
    mean = gain * mean - step.dt * (1 + half * (1 - step.t)) * (shift + b)
    return mean, gain**2 * var + step.sigma**2 * step.dt


def product(one, two, moments) -> Tensor:
    """E <k x + b, k' x + b'>, a scalar."""
    (k, b), (k2, b2), (mean, var) = one, two, moments
    return (k * k2 * (var + mean**2) + (k * b2 + k2 * b) * mean + b * b2).sum()


def exact_gradients(
    weight: str = "kl", start: int = 0, stop: int = STEPS, old=STUDENT, new=None, trained: Sequence[int] = ()
) -> dict[str, Tensor]:
    """Gradients by theta = (k, b) at `new` on trajectories of `old` (new None: itself), (2D,), no sampling.

    direct: of the weighted squared gaps, with the states held fixed; path: of whole trajectories. Under "old", the gap
    whose reward is the log-ratio of the old policy: at new = old it is the same. mar: of the gap to the anchor.
    trained: the steps whose gaps count; none: all noisy ones. whole: the path gradient that the deterministic steps
    before `start`, and the steps that are not trained, take part in.
    """
    steps, theta = steps_of(weight, start, stop), tuple(x.clone().requires_grad_() for x in new or old)
    counted = [n for n in range(start, stop) if not trained or n in trained]
    away = tuple(x - y for x, y in zip(theta, ANCHOR))
    at, whole = [(torch.zeros(DIMS).double(), torch.ones(DIMS).double())], []  # x ~ N(0, 1) at t = 1
    through = at[0]
    for step in steps:
        at.append(moved(step, old, at[-1]))
        whole.append(through)
        through = moved(step, theta, through)
    total = dict.fromkeys(("direct", "old direct", "path", "old path", "mar", "whole"), 0.0)
    for n in counted:
        w = steps[n].weight
        later, moments = 0.0, moved(steps[n], theta, at[n])  # one action of theta, then those of theta_old
        for m in range(n + 1, stop):
            later = later + steps[m].weight * product(old, old, moments) * (m in counted)
            moments = moved(steps[m], old, moments)
        gap, old_gap = w * product(theta, theta, at[n]), 2 * w * product(old, theta, at[n])
        terms = {"direct": gap, "old direct": old_gap, "path": gap + later, "old path": old_gap + later,
                 "mar": w * product(away, away, at[n]), "whole": w * product(theta, theta, whole[n])}  # fmt: skip
        total = {name: value + terms[name] for name, value in total.items()}
    found = {name: torch.cat(torch.autograd.grad(value, theta, retain_graph=True)) for name, value in total.items()}
    return found | {"zero": torch.zeros(2 * DIMS).double()}


# ----------------------------------------------------------------------------------------------------- by sampling
def walk(count: int, generator: torch.Generator, start=0, stop=STEPS, trained: Sequence[int] = ()) -> list[opd.Visit]:
    """The trained transitions (none: all noisy ones) of `count` trajectories of STUDENT."""
    x = torch.randn(count, DIMS, generator=generator, dtype=torch.float64)
    grid, (k, b) = [1 - n / STEPS for n in range(STEPS + 1)], STUDENT
    path = sde.rollout(lambda x, t: teacher(x, t) + k * x + b, x, grid, LEVEL, "sde", (start, stop), generator)
    path = [tr for tr in path if tr.sigma and (not trained or tr.index in trained)]
    return [opd.Visit(tr, teacher(tr.x, tr.t)) for tr in path]


def trajectory_gradients(
    walk: Sequence[opd.Visit], estimator: str, loss=None, mar: float = 0.0, theta=STUDENT, **more
) -> Tensor:
    """(count, 2D): the gradient of each trajectory's loss at the student `theta`, the sum over its transitions.

    loss: instead of the estimator's; mar: weight of MAR; more: fields of the visits. dv/dk = x and dv/db = 1, so that
    the chain rule takes one product from the gradient by v, which autograd gives for a whole batch at once, to the
    gradient of every single trajectory."""
    (k, b), (k2, b2), total = theta, ANCHOR, 0.0
    for at in opd.credited(estimator, [at._replace(**more) for at in walk]):
        step, v = at.step, (at.v_target + k * at.step.x + b).requires_grad_()
        loss_B, _ = (loss or opd.ESTIMATORS[estimator])(at, v)
        if mar:
            anchor = at.v_target + k2 * step.x + b2
            loss_B = loss_B + mar * opd.mar_penalty(v, anchor, step.t, step.dt, step.sigma, "mean", at.weight)
        (by_v,) = torch.autograd.grad(loss_B.sum(), v)
        total = total + torch.cat([by_v * step.x, by_v], dim=1)
    return total


def distance(gradients: Tensor, target: Tensor) -> float:
    """Hotelling's T^2 of a sample mean: chi-squared, 2D degrees of freedom, if the true mean is `target`."""
    gap = gradients.mean(0) - target
    return float(len(gradients) * gap @ torch.linalg.solve(torch.cov(gradients.T), gap))


def estimator_table(count: int, seed: int) -> Iterator[Mapping]:
    """One dict an estimator: the norm of the mean gradient and its standard error, the std of one trajectory's gradient
    (root of the summed variances), cosines with the exact gradients. All of the sum over D, as the equations have it.

    All estimators see the same trajectories, `CHUNK` at a time."""
    generator, exact, sums, squares = torch.Generator().manual_seed(seed), exact_gradients(), {}, {}
    for size in [CHUNK] * (count // CHUNK):
        drawn = walk(size, generator)
        for name in ON_SDE_STATES:
            gradients = DIMS * trajectory_gradients(drawn, name)
            sums[name] = sums.get(name, 0.0) + gradients.sum(0)
            squares[name] = squares.get(name, 0.0) + gradients.square().sum()
    for name in ON_SDE_STATES:
        mean = sums[name] / count
        std = float(squares[name] / count - mean.square().sum()) ** 0.5
        cosines = {f"cos_{t}": float(torch.cosine_similarity(mean, exact[t], dim=0)) for t in ("direct", "path")}
        yield {"estimator": name, "mean_norm": float(mean.norm()), "error": std / count**0.5, "std": std, **cosines}


def main() -> None:
    """Print the table of opd.py's estimators as markdown."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--trajectories", type=int, default=400_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    exact = exact_gradients()
    print(f"exact: |direct| = {exact['direct'].norm():.1f}, |path| = {exact['path'].norm():.1f}\n")
    print("| estimator | mean gradient | per-trajectory std | cos with direct | cos with path |")
    print("|---|---|---|---|---|")
    for row in estimator_table(args.trajectories, args.seed):
        cosines = f"{row['cos_direct']:.2f} | {row['cos_path']:.2f}"
        cosines = "- | -" if row["estimator"] == "literal" else cosines  # the direction of zero is noise
        mean = f"{row['mean_norm']:.2f} ± {row['error']:.2f}"
        print(f"| `{row['estimator']}` | {mean} | {row['std']:.0f} | {cosines} |")


if __name__ == "__main__":
    main()
