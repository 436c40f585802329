"""Which OPD estimators follow the KL? A flow where every gradient is known exactly (F Eq. 10-11, opd.py).

The teacher is the flow of Gaussian data, whose velocity is linear in x; the student adds k * x + b to it, and
its 2 D parameters theta = (k, b) are what the estimators differentiate. Every dimension is then a scalar
linear-Gaussian process: the student's states are N(mean, var) with a two-line recursion, so that the KL of
whole trajectories,

    KL(path) = sum_n w(t_n) E||k x_n + b||^2 = sum_n w(t_n) sum_d [k^2 (var + mean^2) + 2 k b mean + b^2]

and its gradient are exact: "path" with the moments differentiated too, "direct" with the states held fixed.
The exact part uses its own arithmetic, none of sde.py or kl.py.

`python tests/helpers/linear_gaussian.py --trajectories 400000` prints the table as markdown.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # when run as a script

import opd
import sde

DIMS, STEPS, LEVEL = 8, 6, 0.7
DATA_MEAN, DATA_VAR = 1.0, 0.25
CHUNK = 20_000
ON_SDE_STATES = tuple(name for name in opd.ESTIMATORS if name != "velocity")


def student_offset() -> tuple[Tensor, Tensor]:
    """k and b of v_student = v_teacher + k x + b, (D,) each: by how much the student is wrong."""
    k, b = torch.randn(2, DIMS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return k, b


def teacher_coefficients(t: float) -> tuple[float, float]:
    """v_teacher = slope x + shift = E[eps - x_0 | x_t] for x_0 ~ N(m, s^2): regress on u = x_t - (1-t) m."""
    slope = (t - (1 - t) * DATA_VAR) / (t**2 + (1 - t) ** 2 * DATA_VAR)
    return slope, -DATA_MEAN - slope * (1 - t) * DATA_MEAN


def exact_gradients() -> dict[str, Tensor]:
    """{"direct", "path"}: gradients of the trajectory KL by theta = (k, b), (2D,), no sampling."""
    gradients = {}
    for name in ("direct", "path"):
        k, b = (offset.clone().requires_grad_() for offset in student_offset())
        mean, var, total = torch.zeros_like(k), torch.ones_like(k), 0.0  # x ~ N(0, 1) at t = 1
        for n in range(STEPS):
            t, dt = 1 - n / STEPS, 1 / STEPS
            sigma = LEVEL * (t / (1 - t if n else dt)) ** 0.5
            weight = dt / 2 * (sigma * (1 - t) / (2 * t) + 1 / sigma) ** 2
            m, v = (mean, var) if name == "path" else (mean.detach(), var.detach())
            total = total + weight * (k**2 * (v + m**2) + 2 * k * b * m + b**2).sum()
            slope, shift = teacher_coefficients(t)
            half = sigma**2 / (2 * t)  # drift: (1 + half (1-t)) v + half x, with v = (slope + k) x + shift + b
            gain = 1 - dt * ((1 + half * (1 - t)) * (slope + k) + half)
            mean = gain * mean - dt * (1 + half * (1 - t)) * (shift + b)
            var = gain**2 * var + sigma**2 * dt
        gradients[name] = torch.cat(torch.autograd.grad(total, (k, b)))
    return gradients


def trajectory_gradients(count: int, generator: torch.Generator, estimators=ON_SDE_STATES, losses=opd.ESTIMATORS):
    """{estimator: (count, 2D)}, the gradient of each of `count` trajectories, by `losses` on `sde.rollout`.

    dv/dk = x and dv/db = 1, so that the chain rule takes one product from the gradient by v, which autograd
    gives for a whole batch at once, to the gradient of every single trajectory."""
    k, b = student_offset()

    def teacher(x, t):
        slope, shift = teacher_coefficients(t)
        return slope * x + shift

    x = torch.randn(count, DIMS, generator=generator, dtype=torch.float64)
    grid = [1 - n / STEPS for n in range(STEPS + 1)]
    steps = list(sde.rollout(lambda x, t: teacher(x, t) + k * x + b, x, grid, LEVEL, generator=generator))
    visits = [opd.Visit(step.x, step.x_next, step.t, step.dt, step.sigma, teacher(step.x, step.t)) for step in steps]

    gradients = {}
    for estimator in estimators:
        total = torch.zeros(count, 2 * DIMS, dtype=torch.float64)
        futures = opd.futures(estimator, visits, [step.v for step in steps])
        for at, step, future in zip(visits, steps, futures):
            v = step.v.clone().requires_grad_()
            loss_B = losses[estimator](at._replace(future=future), v)
            (by_v,) = torch.autograd.grad(loss_B.sum(), v)
            total += torch.cat([by_v * step.x, by_v], dim=1)
        gradients[estimator] = total
    return gradients


def distance(mean: Tensor, covariance: Tensor, count: int, target: Tensor) -> float:
    """Hotelling's T^2 of a sample mean: chi-squared, 2D degrees of freedom, if the true mean is `target`."""
    gap = mean - target
    return float(count * gap @ torch.linalg.solve(covariance, gap))


def estimator_table(
    num_trajectories: int,
    seed: int,
    estimators: Sequence[str] = ON_SDE_STATES,
    losses: Mapping[str, opd.Estimator] = opd.ESTIMATORS,
) -> list[dict]:
    """One dict an estimator: the norm of the mean gradient and its standard error, the std of one trajectory's
    gradient (root of the summed variances), cosines with the exact gradients, T^2 against 0 and against both.

    Runs round(num_trajectories / CHUNK) chunks, at least one; all estimators see the same trajectories."""
    generator, exact = torch.Generator().manual_seed(seed), exact_gradients()
    chunks = max(1, round(num_trajectories / CHUNK))
    size = min(CHUNK, num_trajectories)
    count = chunks * size
    sums = {name: 0.0 for name in estimators}
    squares = {name: 0.0 for name in estimators}
    for _ in range(chunks):
        for name, grads in trajectory_gradients(size, generator, estimators, losses).items():
            sums[name] = sums[name] + grads.sum(0)
            squares[name] = squares[name] + grads.T @ grads
    rows = []
    for name in estimators:
        mean = sums[name] / count
        covariance = squares[name] / count - torch.outer(mean, mean)
        std = float(covariance.trace().sqrt())
        row = {"estimator": name, "mean_norm": float(mean.norm()), "standard_error": std / count**0.5}
        row["std"] = std
        row["t2_zero"] = distance(mean, covariance, count, torch.zeros_like(mean))
        for target in ("direct", "path"):
            row[f"cos_{target}"] = float(torch.cosine_similarity(mean, exact[target], dim=0))
            row[f"t2_{target}"] = distance(mean, covariance, count, exact[target])
        rows.append(row)
    return rows


def main() -> None:
    """Print the table of opd.py's estimators as markdown."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--trajectories", type=int, default=400_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    norms = {name: float(gradient.norm()) for name, gradient in exact_gradients().items()}
    print(f"exact: |direct| = {norms['direct']:.1f}, |path| = {norms['path']:.1f}\n")
    print("| estimator | mean gradient | per-trajectory std | cos with direct | cos with path |")
    print("|---|---|---|---|---|")
    for row in estimator_table(args.trajectories, args.seed):
        cosines = f"{row['cos_direct']:.2f} | {row['cos_path']:.2f}"
        cosines = "- | -" if row["estimator"] == "literal" else cosines  # the direction of zero is noise
        mean = f"{row['mean_norm']:.2f} ± {row['standard_error']:.2f}"
        print(f"| `{row['estimator']}` | {mean} | {row['std']:.0f} | {cosines} |")


if __name__ == "__main__":
    main()
