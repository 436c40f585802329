"""What is logged of a step? Shares of its mean over rows and transitions, the policy's ratio, and three warnings."""

import sys
from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from harness import ranks
from harness.run import Run
from scorers import panel


def shares_of(found_B: Mapping[str, Tensor], weight_B: Tensor) -> dict[str, Tensor]:
    """Values of rows, (B,), as their share of the step's mean. To read a number here would drain the device's queue."""
    return {key: (value.detach() * weight_B).sum().double() for key, value in found_B.items()}


def summed(stats: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Key by key, the sum of a step's shares."""
    found: dict[str, Tensor | float] = {}
    for row in stats:
        for key, value in row.items():
            found[key] = found.get(key, 0.0) + value
    return {key: float(value) for key, value in found.items()}


def averaged(stats: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Key by key, the mean over a step's updates."""
    return {key: sum(row[key] for row in stats) / len(stats) for key in stats[0]}


def ratio_stats(found: Mapping[str, float]) -> dict[str, float]:
    """Shares of E[rho - 1] and E[(rho - 1)^2], `off` and `off_sq` -> `ratio_mean` and `ratio_std` over all ranks.

    Both are exact at 1: where no ratio differs from 1, they are 1.0 and 0.0. They and `clip_fraction` are divided by
    `weight`, the sum of the weights: with drawn states only its mean is 1.
    """
    found = ranks.average_numbers(dict(found))
    weight = found.pop("weight", 1.0)
    off, off_sq, cut = (found.pop(key) / weight for key in ("off", "off_sq", "clip_fraction"))
    return {"ratio_mean": 1 + off, "ratio_std": max(off_sq - off * off, 0.0) ** 0.5, "clip_fraction": cut, **found}


def warn_of_ratio(run: Run, found: Mapping[str, float]) -> None:
    """Print a line if the first ratio is not 1 where the policy that learns has just drawn (F Eq. 11, Q Eq. 6).

    Then its forward with gradients has other bits than the one without: attention kernels may differ on an accelerator.
    """
    mean, std = found["ratio_mean"], found["ratio_std"]
    if run.rank == 0 and (mean, std) != (1.0, 0.0):
        at = f"warning: step {run.step + 1}: the first policy ratio is {mean:.9g}, spread {std:.3g}, and not exactly 1"
        print(f"{at}: a forward with gradients differs from one without; compare --clip with it", file=sys.stderr)


def warn_of_equal(run: Run, metrics: Mapping[str, float], equal: int, after: int = 10) -> int:
    """Print a line once every group's rewards have been equal for `after` steps in a row -> how many it has been.

    Equal rewards have no advantage (Q Eq. 4): nothing is learnt from them.
    """
    equal = equal + 1 if metrics["group_std"] == 0 else 0
    if run.rank == 0 and equal == after:
        why = "no group's rewards differ, so nothing is learnt; look at the scorers, the prompts (--stage curate), --lr"
        print(f"warning: step {run.step + 1}: for {after} steps {why}", file=sys.stderr)
    return equal


def warn_of_hacking(run: Run, watched: Collection[str]) -> set[str]:
    """Print a line for each watched scorer that falls while the trained reward rises (F Fig. 2, Q 4.2) -> which."""
    names = watched if run.rank == 0 else ()
    found = {name for name in names if panel.is_hacked(run.history("reward"), run.history(f"reward/{name}"))}
    for name in sorted(found):
        print(f"warning: step {run.step}: the reward rises while {name} falls", file=sys.stderr)
    return found
