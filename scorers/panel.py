"""What is a picture worth to this run: which scorers are asked about it, and how are their answers weighed?

    one reward, or a weighted sum                    R = sum_k w_k R_k, then Q Eq. 4     F 6.1, App. A
    several rewards, each normalised in its group    A = sum_k w_k (R_k - mean) / std    Q Eq. 13
    other weights for another category of prompts    w_k(category)                       Q 4.2
    pictures that wait for a far judge               others are drawn meanwhile          Q 4.1

A `Panel` holds the scorers of a run. Its answer is a `Scores`, which the functions below weigh. A scorer that is only
*watched* has weight 0: it is asked and logged, and `is_hacked` compares it with what is trained on.

A score that cannot be had is never a 0. It ends the run, after a checkpoint, with the scorer's own message; or, with
`--on-reward-failure drop`, its whole prompt group is left out of the update, because a group that lost some of its
samples has another mean, and advantages are about that mean.

Groups are scored while the same step draws others, so the policy is the same and the first ratio is 1. With `--overlap`
the next step is drawn ahead, too, by an older policy. The ratio is taken to the policy that drew (Q Eq. 6 asks for no
more), and `ratio_std` shows the distance.
"""

import math
import queue
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import grpo
from data.common import first_line
from data.files import Prompt
from rewards import RewardError, Scorer, composite
from scorers import registry
from scorers.common import check_scores
from scorers.selftest import self_test

DEFAULT = "default"  # the category whose weights serve prompts of a category that has none of its own


class Scores(NamedTuple):
    """Answers about a batch, K scorers and B pictures."""

    names: tuple[str, ...]  # K
    values: np.ndarray  # (K, B) float64, nan for a scorer that was not asked
    weights: np.ndarray  # (K, B), 0 for a scorer that does not count
    lost: np.ndarray  # (B,) bool, the rows of groups that are left out


# ------------------------------------------------------------------------------------------------------------- asking
class Panel:
    """The scorers of a run, with a weight for each category of prompts.

    evaluates: a `silent` scorer may say nothing about a picture, nan, which nothing could learn from.
    """

    evaluates = False

    def __init__(self, scorers: Sequence[Scorer], weights: Mapping[str, Mapping[str, float]],
                 watched: Sequence[str] = (), drop: bool = False):  # fmt: skip
        """weights: {category: {scorer's name: weight}}; drop: lose the group that a scorer fails on, not the run."""
        self.scorers, self.weights, self.drop = {s.name: s for s in scorers}, weights, drop
        self.watched = tuple(watched)

    def category(self, prompt: Prompt) -> str | None:
        """Whose weights a prompt has: of its metadata field "category", else its GenEval tag, else its task, else the
        default, the first that has any; None if none has."""
        names = (prompt.metadata.get("category"), prompt.metadata.get("tag"), prompt.task, DEFAULT)
        return next((name for name in names if name in self.weights), None)

    def check(self, prompts: Iterable[Prompt]) -> None:
        """RewardError for the first prompt that has no weights, or that a scorer can never score well."""
        for prompt in prompts:
            for name, scorer in self.scorers.items():
                if self.weight(name, prompt) or name in self.watched:
                    try:
                        scorer.check(prompt)
                    except ValueError as fault:
                        raise RewardError(f"{prompt.source}: scorer {name!r}: {fault}") from None

    def weight(self, name: str, prompt: Prompt) -> float:
        """w_k of a prompt: its `category`'s; 0 if that does not name the scorer. RewardError without a category."""
        category = self.category(prompt)
        if category is None:
            raise RewardError(f"{prompt.source}: no weights for the category {prompt.task!r}, and no {DEFAULT!r} ones")
        return self.weights[category].get(name, 0.0)

    def ask(self, images: Tensor, prompts: Sequence[Prompt], group: int, sources=None) -> Scores:
        """Every scorer's answer about the pictures for which it counts, (K, B). Groups of `group` rows lie together.

        sources: the source picture of every row that is an edit, None for other rows; None if no row is one.
        RewardError naming scorer, prompt and cause; with `drop`, the rows of the groups that a scorer failed on are
        marked lost instead, after each of them was asked for on its own.
        """
        weights = np.array([[self.weight(name, p) for p in prompts] for name in self.scorers])
        values, lost = np.full(weights.shape, np.nan), np.zeros(len(prompts), bool)
        for k, (name, scorer) in enumerate(self.scorers.items()):
            rows = [b for b in range(len(prompts)) if name in self.watched or weights[k, b] != 0]
            if not rows:
                continue
            try:
                values[k, rows] = self._ask_one(scorer, images, prompts, sources, rows)
            except RewardError:
                if not self.drop:
                    raise
                for first in range(0, len(prompts), group):
                    some = [b for b in rows if first <= b < first + group]
                    try:
                        values[k, some] = self._ask_one(scorer, images, prompts, sources, some) if some else []
                    except RewardError as fault:
                        print(f"a group is lost: {fault}", file=sys.stderr)
                        lost[first : first + group] = True
        return Scores(tuple(self.scorers), values, weights, lost)

    def _ask_one(self, scorer: Scorer, images: Tensor, prompts: Sequence[Prompt], sources, rows: list[int]):
        """The scorer's answers about `rows`, float64, in their order.

        Edits and others are asked about one after the other: a scorer sees a source for every picture or none at all.
        """
        edits = [b for b in rows if sources is not None and sources[b] is not None]
        found = np.full(len(prompts), np.nan)
        for some in (edits, [b for b in rows if b not in edits]):
            if not some:
                continue
            asked, theirs = [prompts[b] for b in some], [sources[b] for b in some] if some is edits else None
            try:
                answer = scorer.score(images[some], asked, theirs)
            except ValueError as fault:  # a RewardError, or such as a prompt without a target
                said = first_line(fault)  # a scorer calls itself by its kind, the run by its name in --rewards
                raise RewardError(said if repr(scorer.name) in said else f"scorer {scorer.name!r}: {said}") from fault
            texts, silent = [p.text for p in asked], scorer.silent and self.evaluates
            found[some] = check_scores(scorer.name, np.asarray(answer), texts, scorer.low, scorer.high, silent)
        return found[rows]


def build(asked: registry.Asked, device: torch.device | str, drop: bool = False) -> Panel:
    """The scorers that --rewards asks for, each loaded and put to its self-test before anything is drawn.

    A scorer's device is the run's unless its entry names another. RewardError that names the scorer.
    """
    registry.check(asked)  # of all of them, before the first is loaded
    made, untested = [], asked.world.KINDS if asked.world else ()  # a world's own scorers need no test
    for name, entry in asked.scorers.items():
        kind, options = entry["kind"], {key: value for key, value in entry.items() if key != "kind"}
        scorer = registry.make(kind, options, str(device), asked.world)
        if kind not in untested and ":" not in kind and self_test(scorer):
            print(f"reward {scorer.name}: gave a known picture its known score", file=sys.stderr)
        made.append(scorer._replace(name=name))
    return Panel(made, asked.weights, asked.watch, drop)


# ------------------------------------------------------------------------------------------------------------ weighing
def joined(parts: Sequence[Scores]) -> Scores:
    """The answers of several shares of a batch as one."""
    names, values, weights, lost = zip(*parts, strict=True)
    return Scores(names[0], np.concatenate(values, 1), np.concatenate(weights, 1), np.concatenate(lost))


def totals(scores: Scores) -> np.ndarray:
    """The weighted sum of every row, (B,), F 6.1; nan for lost rows."""
    return np.where(scores.lost, np.nan, composite(scores.values, scores.weights))


def advantages(scores: Scores, group: int, combine: str, std: str) -> Tensor:
    """(P, G) advantages: of the weighted sum (Q Eq. 4), or the weighted sum of each reward's own (Q Eq. 13).

    combine: "sum", else "normalised"; std as in `grpo.group_advantages`, for "sum". Groups of `group` rows lie
    together. Lost groups get exactly 0 and have no part in the std of the others.
    """
    kept = torch.from_numpy(~scores.lost[::group])  # (P,)
    found = torch.zeros(len(kept), group)
    if not kept.any():
        return found
    if combine == "sum":
        total_PG = torch.from_numpy(composite(scores.values, scores.weights)).reshape(-1, group)[kept]
        found[kept] = grpo.group_advantages(total_PG, std).float()
    else:
        counted = np.where(scores.weights != 0, scores.values, 0.0)  # nan if nobody was asked
        values_KPG = torch.from_numpy(counted).reshape(len(scores.names), -1, group)[:, kept]
        weights_KP = torch.from_numpy(scores.weights[:, ::group].copy())[:, kept]  # a group has one prompt
        found[kept] = grpo.multi_reward_advantages(values_KPG, weights_KP).float()
    return found


def metrics(scores: Scores, group: int) -> dict[str, float]:
    """Curves of a batch: the composite and every scorer's own mean, spread within groups, and the share lost.

    A scorer that was asked about nothing in this batch has nan for its mean, which is not logged.
    """
    total = totals(scores)
    groups = total.reshape(-1, group)[~scores.lost.reshape(-1, group)[:, 0]]
    found = {"reward": _mean(total), "group_std": _mean(groups.std(1)) if len(groups) else math.nan}
    for name, row in zip(scores.names, scores.values, strict=True):
        found[f"reward/{name}"] = _mean(row)
    return {**found, "lost": float(scores.lost.mean())}


def _mean(values: np.ndarray) -> float:
    there = values[~np.isnan(values)]
    return float(there.mean()) if len(there) else math.nan


def histograms(scores: Scores) -> dict[str, np.ndarray]:
    """Every scorer's answers, for TensorBoard: a reward that is hacked often piles up at one value."""
    there = {name: row[~np.isnan(row)] for name, row in zip(scores.names, scores.values, strict=True)}
    return {f"rewards/{name}": row for name, row in there.items() if len(row)}


def is_hacked(trained: Sequence[float], watched: Sequence[float], window: int = 20, drop: float = 0.1) -> bool:
    """Does the trained reward rise while a watched one falls? Reward hacking, as F Fig. 2 and Q 4.2 show it.

    Means over the last `window` steps against the first `window`: the trained one is higher than at first, the
    watched one is lower than its best stretch by more than the share `drop` of it. False before 2 window steps.
    """
    if min(len(trained), len(watched)) < 2 * window:
        return False
    stretches = [float(np.nanmean(watched[i : i + window])) for i in range(len(watched) - window + 1)]
    fallen = max(stretches) - stretches[-1] > drop * abs(max(stretches))
    return np.nanmean(trained[-window:]) > np.nanmean(trained[:window]) and fallen


# -------------------------------------------------------------------------------------------------- in the background
class Later:
    """Scoring in the background, one batch at a time and in order; the caller draws others meanwhile.

    Its thread is a daemon, which an executor's is not: a run that ends, or is told to stop, does not wait for a far
    judge.
    """

    def __init__(self, work: Callable):
        self.work, self.queue = work, queue.SimpleQueue()
        threading.Thread(target=self._serve, name="scoring", daemon=True).start()

    def submit(self, *batch: object) -> Future:
        """Begin to score a batch; its `.result()` waits, and raises what the scorer raised."""
        future: Future = Future()
        self.queue.put((future, batch))
        return future

    def close(self) -> None:
        self.queue.put(None)

    def _serve(self) -> None:
        while (item := self.queue.get()) is not None:
            future, batch = item
            try:
                future.set_result(self.work(*batch))
            except BaseException as fault:
                future.set_exception(fault)
