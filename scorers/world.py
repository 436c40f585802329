"""The world of published models: prompts by rules or from files, and pictures that scorers measure.

`tiny/drawings.py` and `tiny/edits.py` have the same functions for the tiny worlds.
"""

from collections.abc import Sequence
from copy import copy

import numpy as np
from torch import Tensor

from data.files import Prompt
from data.pictures import sources
from data.written import TASKS, make_prompts  # noqa: F401  a part of what a world has
from scorers.panel import Panel

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


def check_prompt(prompt: Prompt) -> None:
    """Published models take any words."""


def score(images: Tensor, prompts: Sequence[Prompt], task: str, panel: Panel | None) -> dict[str, Sequence[float]]:
    """{metric: a score for each image, nan for one that was not asked about} of images of a task's test prompts.

    Every scorer of the panel that is asked is a metric. GenEval trains with a graded reward and is measured by strict
    verdicts (F Table 2). Prompts for which the panel has no weights are not scored: a teacher's rewards are for its
    own task.
    """
    rows = [b for b, p in enumerate(prompts) if panel and panel.category(p) is not None]
    if not rows:
        return {}
    strict, some = copy(panel), [prompts[b] for b in rows]
    strict.evaluates = True
    strict.scorers = {name: s._replace(score=s.verdict or s.score) for name, s in panel.scorers.items()}
    values_KB = np.full((len(panel.scorers), len(prompts)), np.nan)
    values_KB[:, rows] = strict.ask(images[rows], some, 1, sources(some)).values
    return dict(zip(panel.scorers, values_KB, strict=True))
