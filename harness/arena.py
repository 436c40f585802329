"""An arena: pairs of models, each in both orders, and a judge that votes. Q 5, Fig. 4.

In the tiny worlds the rules vote: the picture with the higher mean of its scores. Of published models a judge does, a
Qwen-VL that sees both pictures (rubric `arena`), here or behind an endpoint: the scorer "arena" of --rewards.

SILENT (Q 5): how people's votes were counted. A vote is cast here if the judge's expected preference (Q Eq. 12) is
clear, by half a rating at least; otherwise it is a tie.
"""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from data.batches import batches
from data.files import Prompt
from data.pictures import stacked
from rewards import HIGHEST_RATING, LOWEST_RATING, Scorer

MIDDLE, CLEAR = (LOWEST_RATING + HIGHEST_RATING) / 2, 0.5


def vote(rows: Sequence[Mapping], folder: Path, judge: Scorer | None, batch: int = 32) -> list[dict]:
    """A vote for each pair of models, picture and order: {"a", "b", "prompt", "index", "sample", "task", "category",
    "order", "winner": "a", "b" or "tie"}. order 1: b was shown first. rows: of an evaluation, whose run is `folder`."""
    games: dict[tuple, dict[str, Mapping]] = {}
    for row in rows:
        games.setdefault((row["task"], row["index"], row["sample"]), {})[row["model"]] = row
    pairs = (pair for own in games.values() for pair in itertools.combinations(own.values(), 2))
    asked = [(pair, order) for pair in pairs for order in (0, 1)]
    shown = [pair if order == 0 else pair[::-1] for pair, order in asked]
    leans = (lean for some in batches(shown, batch) for lean in preferences(some, folder, judge))
    votes = []
    for ((a, b), order), lean in zip(asked, leans, strict=True):
        shared = {key: a[key] for key in ("prompt", "index", "sample", "task", "category")}
        winner = "tie" if lean == 0 else "a" if (lean > 0) == (order == 0) else "b"
        votes.append({"a": a["model"], "b": b["model"], **shared, "order": order, "winner": winner})
    return votes


def preferences(shown: Sequence[tuple[Mapping, Mapping]], folder: Path, judge: Scorer | None) -> list[float]:
    """Positive where the picture that is shown first is better, negative where the second is, 0 for a tie."""
    if judge is None:
        return [statistics.fmean(a["scores"].values()) - statistics.fmean(b["scores"].values()) for a, b in shown]
    first, second = (stacked(folder / row["picture"] for row in side) for side in zip(*shown, strict=True))
    prompts = [Prompt(a["prompt"], "t2i", {}, a["picture"]) for a, _ in shown]
    leans = judge.score(second, prompts, [(picture,) for picture in first]).double() * HIGHEST_RATING - MIDDLE
    return [lean if abs(lean) >= CLEAR else 0.0 for lean in leans.tolist()]


def wins(votes: Sequence[Mapping]) -> tuple[list[str], np.ndarray, list[str]]:
    """(the M models, wins (P, M, M) of i over j for each prompt, its category); a tie is half a win of both."""
    models = list(dict.fromkeys(name for v in votes for name in (v["a"], v["b"])))
    places = list(dict.fromkeys((v["task"], v["index"]) for v in votes))
    found, categories = np.zeros((len(places), len(models), len(models))), [""] * len(places)
    for v in votes:
        place, i, j = places.index((v["task"], v["index"])), models.index(v["a"]), models.index(v["b"])
        share = {"a": 1.0, "b": 0.0, "tie": 0.5}[v["winner"]]
        found[place, i, j] += share
        found[place, j, i] += 1 - share
        categories[place] = v["category"]
    return models, found, categories
