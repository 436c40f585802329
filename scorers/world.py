"""The world of published models: prompts by rules or from files, and pictures that scorers measure.

`tiny/drawings.py` and `tiny/edits.py` have the same functions for the tiny worlds.
"""

from collections.abc import Mapping, Sequence
from copy import copy

import numpy as np
from torch import Tensor

import rewards
from data.files import Prompt
from data.pictures import sources
from data.written import TASKS, make_prompts  # noqa: F401  a part of what a world has
from scorers.panel import Panel, totals

KINDS = ()  # it has no scorers of its own
# What each task is paid by without --rewards: {task: {category: weights}}; no two tasks have a category in common,
# so that none replaces another's. F's three (6.1) are Flow-GRPO's. F's DeQA teacher, the anchor, is taken as published
# and not trained here: DeQA's checkpoint needs code of its own, which a far scorer may run.
# SILENT (Q 4.2): Q weighs categories and gives no numbers. These are ours, with Q's emphases.
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
    mean over tags. GenEval's graded reward, which a far scorer may give, is called so: it is another number.
    A task for which the panel has no weights is not scored: a teacher's rewards are for its own task.
    """
    if panel is None or any(panel.category(p) is None for p in prompts):
        return {}, [], {}
    strict = copy(panel)  # GenEval trains with a graded reward and is measured by verdicts (F Table 2)
    strict.scorers = {name: s._replace(score=s.verdict or s.score) for name, s in panel.scorers.items()}
    found, named, by_tag = strict.ask(images, prompts, 1, sources(prompts)), {}, {}
    for name, row in zip(found.names, found.values, strict=True):  # (B,), nan for a picture that was not asked about
        asked = ~np.isnan(row)
        if not asked.any():
            continue
        verdicts, tags = list(row[asked] == 1), [p.metadata.get("tag", "") for p, b in zip(prompts, asked) if b]
        is_geneval = panel.scorers[name].verdict is not None or name == "geneval"
        if is_geneval and set(row[asked]) <= {0.0, 1.0}:
            named[f"{task} {name}"] = rewards.geneval_score(verdicts, tags)
            by_tag = rewards.per_tag_accuracy(verdicts, tags)
        else:
            named[f"{task} {name}" + " (graded)" * is_geneval] = float(row[asked].mean())
    return named, list(totals(found)), by_tag


def average(scores: Mapping[str, float]) -> dict[str, float]:
    """F Table 2's Avg, if its four columns are there."""
    if not set(TABLE2) <= set(scores):
        return {}
    geneval, ocr, deqa, pickscore = (scores[column] for column in TABLE2)  # scorers give DeQA / 5 and PickScore / 26
    printed = (deqa * rewards.HIGHEST_RATING, pickscore * rewards.PICKSCORE_SCALE)
    return {"Avg": rewards.table2_average(geneval, ocr, *printed)}
