"""What is a picture worth to this run: which rewards, weighed how, asked when?

    one reward, or a weighted sum                    R = sum_k w_k R_k, then Q Eq. 4     F 6.1, App. A
    several rewards, each normalised in its group    A = sum_k w_k (R_k - mean) / std    Q Eq. 13
    other weights for another category of prompts    w_k(category)                       Q 4.2
    pictures that wait for a far judge               the next batch is drawn meanwhile   Q 4.1

A `Panel` holds the scorers of a run. It asks each of them about the pictures for which it counts, in their order, and
keeps every answer: one curve a reward is how a reader sees that one of them stalls or is hacked. A scorer that is only
*watched* has weight 0: it is asked, logged, and compared with what is trained on (`is_hacked`).

A score that cannot be had is never a 0. It ends the run, after a checkpoint, with the scorer's own message; or, with
`--on-reward-failure drop`, its whole prompt group is left out of the update, because a group that lost some of its
samples has another mean, and advantages are about that mean.

ERRATUM (Q 4.1): a rollout that overlaps with the scoring of the batch before it is drawn from the policy *before* that
batch's update, so that its first ratio is not 1; Q does not say so. The ratio is taken to the policy that drew it (Q
Eq. 6 asks for no more), and `ratio_std` shows the distance.
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
from rewards import RewardError, Scorer, check_scores
from scorers.recipe import NEAR, Recipe
from settings import TINY_REWARDS
from tiny import drawings as tiny
from tiny import edits as tiny_edit

DEFAULT = "default"  # the category whose weights serve prompts of a category that has none of its own


class Scores(NamedTuple):
    """Answers of a batch: (K, B) float64, nan where a scorer was not asked; lost: (B,) bool, groups left out."""

    names: tuple[str, ...]
    values: np.ndarray
    lost: np.ndarray


class Panel:
    """The scorers of a run, with a weight for each category of prompts."""

    def __init__(
        self,
        scorers: Sequence[Scorer],
        weights: Mapping[str, Mapping[str, float]],
        watched: Sequence[str] = (),
        drop: bool = False,
    ):
        """weights: {category: {scorer's name: weight}}. ValueError for a name without a scorer, or without a use."""
        self.scorers, self.weights, self.drop = {s.name: s for s in scorers}, weights, drop
        self.watched = tuple(watched)
        used = {name for row in weights.values() for name in row} | set(watched)
        if used != set(self.scorers):
            raise ValueError(f"weights and watch name {sorted(used)}, the scorers are {sorted(self.scorers)}")

    def category(self, prompt: Prompt) -> str | None:
        """Whose weights a prompt has: of its metadata field "category", else its GenEval tag, else its task, else the
        default, the first that has any; None where none has."""
        names = (prompt.metadata.get("category"), prompt.metadata.get("tag"), prompt.task, DEFAULT)
        return next((name for name in names if name in self.weights), None)

    def check(self, prompts: Iterable[Prompt]) -> None:
        """RewardError for the first prompt that has no weights, before anything is drawn."""
        for prompt in prompts:
            self.weight("", prompt)

    def weight(self, name: str, prompt: Prompt) -> float:
        """w_k of a prompt: its `category`'s; 0 where that does not name the scorer. RewardError without a category."""
        category = self.category(prompt)
        if category is None:
            raise RewardError(f"{prompt.source}: no weights for the category {prompt.task!r}, and no {DEFAULT!r} ones")
        return self.weights[category].get(name, 0.0)

    def ask(self, images: Tensor, prompts: Sequence[Prompt], group: int, sources=None) -> Scores:
        """Every scorer's answer about the pictures for which it counts, (K, B). Groups of `group` rows lie together.

        sources: the source picture of every row that is an edit, None for other rows; None where no row is one.
        RewardError naming scorer, prompt and cause; with `drop`, the rows of the groups that a scorer failed on are
        marked lost instead, after each of them was asked for on its own.
        """
        values, lost = np.full((len(self.scorers), len(prompts)), np.nan), np.zeros(len(prompts), bool)
        for k, (name, scorer) in enumerate(self.scorers.items()):
            watched = name in self.watched
            rows = [b for b, p in enumerate(prompts) if watched or self.weight(name, p) != 0]
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
        return Scores(tuple(self.scorers), values, lost)

    def _ask_one(self, scorer: Scorer, images: Tensor, prompts: Sequence[Prompt], sources, rows: list[int]):
        """The scorer's answers about `rows`, float64, in their order. Edits and others are asked about one after the
        other, so that a scorer sees a source for every picture or none at all."""
        edits = [] if sources is None else [b for b in rows if sources[b] is not None]
        if edits and len(edits) < len(rows):
            answers = {}
            for some, theirs in ((edits, sources), ([b for b in rows if sources[b] is None], None)):
                answers.update(zip(some, self._ask_one(scorer, images, prompts, theirs, some), strict=True))
            return np.array([answers[b] for b in rows])
        some, theirs = [prompts[b] for b in rows], [sources[b] for b in edits] or None
        try:
            answer = scorer.score(images[rows], some, theirs)
        except ValueError as fault:  # a RewardError, or such as a prompt without a target: a score that cannot be had
            said = first_line(fault)  # a scorer calls itself by its kind, the run by the name in its recipe
            raise RewardError(said if repr(scorer.name) in said else f"scorer {scorer.name!r}: {said}") from fault
        return check_scores(scorer.name, np.asarray(answer), [p.text for p in some], scorer.low, scorer.high)

    def advantages(self, scores: Scores, prompts: Sequence[Prompt], group: int, combine: str, std: str) -> Tensor:
        """(P, G) advantages: of the weighted sum (Q Eq. 4), or the weighted sum of each reward's own (Q Eq. 13).

        combine: "sum" or "normalised"; std as in `grpo.group_advantages`, for "sum". Lost groups get exactly 0 and
        have no part in the std of the others.
        """
        weights_KB = np.array([[self.weight(name, p) for p in prompts] for name in scores.names])
        counted = np.where(weights_KB != 0, scores.values, 0.0)  # nan where nobody was asked
        kept = torch.from_numpy(~scores.lost[::group])  # (P,)
        values = torch.from_numpy(counted).reshape(len(scores.names), -1, group)[:, kept]  # (K, P, G) of those
        weights = torch.from_numpy(weights_KB[:, ::group].copy())[:, kept]  # (K, P): a group has one prompt
        if combine not in ("sum", "normalised"):
            raise ValueError(f"combine must be sum or normalised, not {combine!r}")
        advantages = torch.zeros(len(kept), group)
        if combine == "normalised" and kept.any():
            advantages[kept] = grpo.multi_reward_advantages(values, weights).float()
        elif kept.any():
            advantages[kept] = grpo.group_advantages((weights[:, :, None] * values).sum(0), std).float()
        return advantages

    def totals(self, scores: Scores, prompts: Sequence[Prompt]) -> np.ndarray:
        """The weighted sum of every row, (B,); nan for lost rows."""
        weights_KB = np.array([[self.weight(name, p) for p in prompts] for name in scores.names])
        total = np.where(weights_KB != 0, weights_KB * scores.values, 0.0).sum(0)
        return np.where(scores.lost, np.nan, total)


def build(recipe: Recipe, device: torch.device | str, in_tiny_world: bool, drop: bool) -> Panel:
    """The scorers of a recipe, each loaded and put to its known answer before anything is drawn. RewardError names it.

    A scorer's device is the run's unless its entry names another.
    """
    made = []
    for name, entry in recipe.scorers.items():
        options = {key: value for key, value in entry.items() if key != "kind"}
        if in_tiny_world and entry["kind"] in TINY_REWARDS:
            scorer = (tiny_edit if entry["kind"] in tiny_edit.SCORERS else tiny).scorer(entry["kind"])
        else:
            scorer = make(entry["kind"], {"device": str(device), **options})
        made.append(scorer._replace(name=name))
    return Panel(made, recipe.weights, recipe.watch, drop)


def make(kind: str, options: dict) -> Scorer:
    """A scorer of one of `recipe.KINDS`, with options that `recipe.checked` has seen, after its self-test.

    The test costs a picture; a detector that was installed wrongly and answers 0 to everything costs a week. Raises
    RewardError where it fails.
    """
    from scorers import local as scorers

    scorer = _load(kind, dict(options))
    if scorers.self_test(scorer):
        print(f"reward {scorer.name}: gave a known picture its known score", file=sys.stderr)
    return scorer


def _load(kind: str, options: dict) -> Scorer:
    """What is optional is imported here, by the one that needs it."""
    where = {key: options.pop(key) for key in ("device", "dtype") if key in options}
    if kind in NEAR:
        from scorers import local as scorers

        return scorers.make(kind, **where, **options)
    if kind in ("judge", "served"):
        from scorers import remote

        limits = {key: options.pop(key) for key in remote.Limits._fields if key in options}
        if kind == "served":
            options["name"] = options.pop("scorer")
        return getattr(remote, kind)(**options, limits=remote.Limits(**limits))
    where["dtype"] = getattr(torch, where.get("dtype", "float32"))
    if kind == "vlm":
        from scorers import vlm as judges

        rubric = judges.named(options.pop("rubric"), options.pop("thought", False))
        return judges.local(rubric, **where, **options)
    if kind == "face":
        from scorers import faces

        return faces.scorer(**options)
    import reward_model

    return reward_model.scorer(options.pop("model"), **where, **options)


def joined(parts: Sequence[Scores]) -> Scores:
    """The answers of several shares of a batch as one."""
    values = np.concatenate([part.values for part in parts], axis=1)
    return Scores(parts[0].names, values, np.concatenate([part.lost for part in parts]))


def histograms(scores: Scores) -> dict[str, np.ndarray]:
    """Every scorer's answers, for TensorBoard: a reward that is hacked often piles up at one value."""
    there = {name: row[~np.isnan(row)] for name, row in zip(scores.names, scores.values, strict=True)}
    return {f"rewards/{name}": row for name, row in there.items() if len(row)}


def metrics(panel: Panel, scores: Scores, prompts: Sequence[Prompt], group: int) -> dict[str, float]:
    """Curves of a batch: the composite and every scorer's own mean, spread within groups, and the share lost.

    A scorer that was asked about nothing in this batch has nan for its mean, which is not logged.
    """
    total = panel.totals(scores, prompts)
    groups = total.reshape(-1, group)[~scores.lost.reshape(-1, group)[:, 0]]
    found = {"reward": _mean(total), "group_std": _mean(groups.std(1)) if len(groups) else math.nan}
    for name, row in zip(scores.names, scores.values, strict=True):
        found[f"reward/{name}"] = _mean(row)
    return {**found, "lost": float(scores.lost.mean())}


def _mean(values: np.ndarray) -> float:
    there = values[~np.isnan(values)]
    return float(there.mean()) if len(there) else math.nan


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


class Later:
    """Scoring in the background, one batch at a time and in order; the caller draws the next batch meanwhile.

    Its thread is a daemon: a run that ends, or is told to stop, does not wait for a far judge.
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
