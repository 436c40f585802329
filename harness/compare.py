"""How do models compare, and how sure is it? Bootstrap intervals, an arena's ratings.

Whatever is resampled are *prompts*: the pictures of one prompt are alike, so that pictures are no independent sample.

P prompts, M models.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from harness.tables import Cell

RESAMPLES, LEVEL = 1000, 0.95


def bootstrap(
    statistic: Callable[[np.ndarray], float | np.ndarray], prompts: int, strata: Sequence[str] = (),
    resamples: int = RESAMPLES,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """(estimate, low, high) of a statistic of prompts: the percentile bootstrap, 95 %.

    statistic(index (P,) of prompts) -> a number or an array. The estimate has every prompt once, each resample P drawn
    with replacement. strata: one name a prompt (GenEval's tags): each is drawn from itself, as often as it is there.
    """
    labels = np.asarray(strata if len(strata) else [""] * prompts)
    groups, rng = [np.flatnonzero(labels == label) for label in dict.fromkeys(labels)], np.random.default_rng(0)
    draws = [
        statistic(np.concatenate([rng.choice(group, len(group)) for group in groups])) for _ in range(resamples)
    ]
    low, high = np.nanquantile(np.asarray(draws, np.float64), [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return np.asarray(statistic(np.arange(prompts)), np.float64), low, high


# ------------------------------------------------------------------------------------------------------------ arena
def bradley_terry(wins_MM: np.ndarray, prior: float = 1.0) -> np.ndarray:
    """Log-strengths theta, (M,), of mean 0, that maximise the likelihood of an arena's votes; Q 5, Fig. 4.

        P(i beats j) = sigmoid(theta_i - theta_j)
        L(theta) = sum_ij wins_ij log P(i beats j) + prior/2 sum_i [log sigmoid(theta_i) + log sigmoid(-theta_i)]

    wins_ij: how often i beat j, a tie being half a win of both. The prior is `prior` drawn games of every model against
    an average one. With it the answer is finite and unique also for a model that wins always and for models that
    nobody compared. Newton's method; a step changes no difference by more than 1, which is enough for every step to
    raise L, because the curvature of log sigmoid changes by a factor of e at most over a distance of 1.
    """
    wins = np.asarray(wins_MM, np.float64) * (1 - np.eye(len(wins_MM)))
    games, theta = wins + wins.T, np.zeros(len(wins))
    for _ in range(1000):
        p_MM, p_M = 1 / (1 + np.exp(theta[None] - theta[:, None])), 1 / (1 + np.exp(-theta))
        slope = (wins - games * p_MM).sum(1) + prior * (0.5 - p_M)  # dL/dtheta
        pull = games * p_MM * (1 - p_MM)
        curvature = np.diag(pull.sum(1) + prior * p_M * (1 - p_M)) - pull  # -d2L/dtheta2
        step = np.linalg.solve(curvature, slope)
        theta += step / max(1.0, np.ptp(step), abs(step).max())
        if np.ptp(step) < 1e-10 and abs(step).max() < 1e-6:  # of many votes, rounding moves the mean by more
            break
    return theta - theta.mean()


def elo(wins_PMM: np.ndarray, names: Sequence[str], categories: Sequence[str] = ()) -> dict[str, dict]:
    """{model: {"overall": Cell, category: Cell}}: ratings 1000 + 400 log10(strength), Q Fig. 4, with their intervals.

    wins_PMM: of every prompt, as in `bradley_terry`, in both orders of a pair; categories: one a prompt. The mean
    rating of all models is 1000 in every column, since a category has votes of its own only.
    """
    wins_PMM, rows = np.asarray(wins_PMM, np.float64), {name: {} for name in names}
    index_of = {"overall": np.arange(len(wins_PMM))}
    index_of |= {own: np.flatnonzero(np.asarray(categories) == own) for own in dict.fromkeys(categories)}
    for column, own in index_of.items():
        rating = lambda index, own=own: 1000 + 400 / math.log(10) * bradley_terry(wins_PMM[own[index]].sum(0))  # noqa: E731
        found = bootstrap(rating, len(own))
        for name, *numbers in zip(names, *found, strict=True):
            rows[name][column] = Cell(float(numbers[0]), len(own), *map(float, numbers[1:]))
    return rows
