"""The world of published models: prompts by rules or from files, and pictures that scorers measure.

`tiny/drawings.py` and `tiny/edits.py` have the same functions for the tiny worlds.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

import rewards
from data.files import Prompt
from data.pictures import sources
from data.written import TASKS, make_prompts  # noqa: F401  a part of what a world has
from scorers.panel import Panel, totals

KINDS = ()  # it has no scorers of its own
# What each task is paid by without --rewards: {task: {category: weights}}; no two tasks have a category in common,
# so that none replaces another's. DEVIATION: F 6.1 pays the quality teacher with DeQA and PickScore, 4:6; DeQA's
# checkpoint needs code of its own to be run, so that PickScore is alone here unless DeQA is served. DEVIATION: Q 4.2
# weighs categories and gives no numbers; these are ours, its emphases are Q's.
REWARDS = {
    "composition": {"composition": {"geneval": 1.0}}, "text": {"text": {"ocr": 1.0}},
    "quality": {"quality": {"pickscore": 1.0}},
    "t2i": {
        "t2i": {"alignment": 0.5, "beauty": 0.5}, "portrait": {"alignment": 0.3, "beauty": 0.2, "portrait": 0.5},
        "typography": {"alignment": 0.8, "beauty": 0.2},
    },
    "edit": {"edit": {"instruction": 0.6, "identity": 0.4}},
}  # fmt: skip
# F Table 2's columns: each task's test prompts under its own scorers. The paper does not say on which prompts it
# measures DeQA and PickScore.
TABLE2 = ("composition geneval", "text ocr", "quality deqa", "quality pickscore")


def check_prompt(prompt: Prompt) -> None:
    """Published models take any words."""


def score(images: Tensor, prompts: Sequence[Prompt], task: str, panel: Panel | None) -> tuple[dict, list, dict]:
    """(named scores of the batch, one score for each image, accuracies by tag) of images of a task's test prompts.

    Every scorer of the panel that is asked has a column: the mean of its answers or, of GenEval's strict verdicts, the
    mean over tags. A task for which the panel has no weights is not scored: a teacher's rewards are for its own task.
    """
    if panel is None or any(panel.category(p) is None for p in prompts):
        return {}, [], {}
    found, named, by_tag = panel.ask(images, prompts, 1, sources(prompts)), {}, {}
    tags = [p.metadata.get("tag") for p in prompts]
    for name, row in zip(found.names, found.values, strict=True):  # (B,), nan for a picture that was not asked about
        if not np.isnan(row).all():
            named[f"{task} {name}"] = float(row[~np.isnan(row)].mean())
        if name == "geneval" and all(tags) and set(row) <= {0.0, 1.0}:
            named[f"{task} {name}"] = rewards.geneval_score(list(row == 1), tags)
            by_tag = rewards.per_tag_accuracy(list(row == 1), tags)
    return named, list(totals(found)), by_tag


def average(scores: Mapping[str, float], tags: Mapping[str, float]) -> dict[str, float]:
    """F Table 2's Avg, if its four columns are there. tags: GenEval's strict verdicts have accuracies by tag."""
    if not tags or not set(TABLE2) <= set(scores):
        return {}
    geneval, ocr, deqa, pickscore = (scores[column] for column in TABLE2)  # scorers give DeQA / 5 and PickScore / 26
    printed = (deqa * rewards.HIGHEST_RATING, pickscore * rewards.PICKSCORE_SCALE)
    return {"Avg": rewards.table2_average(geneval, ocr, *printed)}
