"""The tables of an evaluation as data: on which prompts, by which scorers, and which numbers are printed.

An evaluation yields rows, one a picture (runs/NAME/rows.jsonl):

    {"model", "prompt", "index", "sample", "task", "tag", "category", "picture", "sources", "scores": {metric: number}}

index: the prompt's place among its task's distinct ones; picture: the file, below the run's folder; sources: those that
an edit begins from. A number of a table is the mean of a metric over prompts; each prompt has the mean over its
pictures (`Column`).
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

import rewards
from harness import compare, load
from harness.tables import Cell
from rewards import Scorer
from scorers import registry
from scorers.panel import DEFAULT
from scorers.registry import NAMED, Asked
from settings import SUITES as SUITE_TASKS
from settings import TASKS, Settings, suite_list

Rows = Sequence[Mapping]


class Column(NamedTuple):
    """The mean over prompts of a metric, times `scale`; even: the unweighted mean over groups of the means in each.

    metric: a key of a row's scores, or several, of which those that the row has are averaged first; task: of rows of
    this one only, or of these, "" for all; group: the key of a row ("tag" or "category") whose values have a mean each
    in the second table, "" for none.
    """

    name: str
    metric: str | tuple[str, ...]
    task: str | tuple[str, ...] = ""
    group: str = ""
    even: bool = False
    scale: float = 1.0


class Suite(NamedTuple):
    """A table. average: {column: number} of a model -> {name: number} of what is computed from them.

    weights: {category: scorers}, as --rewards has it; scorers: {name: entry} of those that have a default. One without
    needs its entry in --rewards, and its column is left out without it.
    """

    columns: tuple[Column, ...]
    average: Callable[[Mapping[str, float]], dict[str, float]] = lambda scores: {}
    weights: Mapping[str, Sequence[str]] = {}
    scorers: Mapping[str, Mapping] = {}


def mean_of(*names: str) -> Callable[[Mapping[str, float]], dict[str, float]]:
    """The plain mean of columns, of those that are there."""

    def average(scores: Mapping[str, float]) -> dict[str, float]:
        own = [scores[column] for column in names if column in scores]
        return {"average": sum(own) / len(own)} if own else {}

    return average


def table2_average(scores: Mapping[str, float], *columns: str, printed: bool = True) -> dict[str, float]:
    """F Table 2's Avg of its four columns, if they are there; scorers give DeQA / 5 and PickScore / 26, and not as
    printed. The paper does not say on which prompts it measures these two."""
    if not set(columns) <= set(scores):
        return {}
    geneval, ocr, deqa, pickscore = (scores[column] for column in columns)
    scales = (1, 1) if printed else (rewards.HIGHEST_RATING, rewards.PICKSCORE_SCALE)
    return {"Avg": rewards.table2_average(geneval, ocr, deqa * scales[0], pickscore * scales[1])}


WORLDS = {  # what the tiny worlds are measured by
    "tiny": Suite((
        Column("composition", "geneval", "composition", "tag", even=True), Column("text", "ocr", "text"),
        Column("quality", "quality", "quality"),
    ), mean_of("composition", "text", "quality")),
    "tiny-qwen": Suite((
        Column("t2i", "t2i", "t2i"), Column("t2i alignment", "alignment", "t2i", "category"),
        Column("t2i aesthetic", "aesthetic", "t2i"), Column("edit", "edit", "edit"),
        Column("edit instruction", "instruction", "edit", "tag"), Column("edit identity", "identity", "edit"),
    ), mean_of("t2i", "edit")),
}  # fmt: skip


BF16 = {"dtype": "bfloat16"}
ARENA = {"kind": "vlm", "rubric": "arena", **BF16}
OPEN = SUITE_TASKS["table4"]
PILLARS = ("Quality", "Aesthetics", "Alignment", "Real-world Fidelity", "Creative Generation")  # Q Table 1
SUITES = {  # of published models; columns in the papers' order, numbers on their scales
    "table2": Suite(
        (Column("GenEval", "geneval", "composition", "tag", even=True), Column("OCR Acc.", "ocr", "text"),
         Column("DeQA", "deqa", "quality", scale=5), Column("PickScore", "pickscore", "quality", scale=26)),
        lambda scores: table2_average(scores, "GenEval", "OCR Acc.", "DeQA", "PickScore"),
        {"composition": ("geneval",), "text": ("ocr",), "quality": ("deqa", "pickscore")},
        {name: {"kind": name} for name in ("geneval", "ocr", "pickscore")},
    ),
    "table3": Suite(
        (*(Column(name.title(), "blipvqa", name) for name in ("color", "shape", "texture")),
         Column("Complex", "official", "complex"), Column("2D-Spatial", "official", "spatial"),
         Column("3D-Spatial", "official", "3d_spatial"), Column("Numeracy", "official", "numeracy"),
         Column("Non-Spatial", "clip", "non_spatial", scale=0.3)),  # clipscore is 100 cos / 30
        weights={**dict.fromkeys(("color", "shape", "texture"), ("blipvqa",)), "non_spatial": ("clip",)},
        scorers={"blipvqa": {"kind": "blipvqa"},
                 "clip": {"kind": "clipscore", "model": "openai/clip-vit-base-patch32"}},
    ),
    # SILENT (F Table 4): on which prompts it was measured. Here it is those of quality.
    "table4": Suite(
        (Column("ImageReward", "imagereward", OPEN), Column("Aesthetic", "aesthetic", OPEN),
         Column("UnifiedReward", "unifiedreward", OPEN, scale=5), Column("HPS-v2.1", "hps", OPEN),
         Column("QwenVL Score", "qwenvl", OPEN, scale=5)),
        weights=dict.fromkeys(OPEN, ("imagereward", "aesthetic", "unifiedreward", "hps", "qwenvl")),
        scorers={"qwenvl": {"kind": "vlm", "rubric": "judge", **BF16}},
    ),
    "geneval2": Suite(
        tuple(Column(f"Soft-TIFA {kind}", f"tifa_{kind.lower()}", "geneval2", scale=100) for kind in ("AM", "GM")),
        weights={"geneval2": ("tifa_am", "tifa_gm")},
        scorers={"tifa_am": {"kind": "softtifa", "mean": "arithmetic"}, "tifa_gm": {"kind": "softtifa"}},
    ),
    # Overall is the mean over pictures of the means of what applies to each, and not the mean of the five columns.
    "qwen-bench": Suite(
        (*(Column(name, name, "qwen-bench", scale=100) for name in PILLARS),
         Column("Overall", PILLARS, "qwen-bench", scale=100)), weights={"qwen-bench": PILLARS},
    ),
    "dpg": Suite(()),
    "arena": Suite(()),
    "edit": Suite(
        (Column("instruction", "instruction", "edit", "tag"), Column("identity", "identity", "edit"),
         Column("untouched", "untouched", "edit")),
        weights={"edit": ("instruction", "identity", "untouched")},
        scorers={"untouched": {"kind": "untouched"}, **{name: NAMED[name] for name in ("instruction", "identity")}},
    ),
    "diversity": Suite((Column("diversity", "diversity"),), weights={"default": ("diversity",)},
                       scorers={"diversity": {"kind": "diversity"}}),
}  # fmt: skip


def asked_of(s: Settings) -> Asked | None:
    """The scorers of an evaluation: its suites', over which --rewards has its own entries and further weights; None if
    none is asked for. A tiny world measures by itself what its scorers can, and compares pixels."""
    names, world = suite_list(s), load.world_of(s)
    own = load.asked_of(s) if not world.KINDS and s.rewards else Asked({}, {})
    known = {name: entry for name, entry in own.scorers.items() if name != "arena"}  # which votes, see `arena_judge`
    asked = {category for name in names for category in SUITES[name].weights} - {DEFAULT}
    kept = {*asked, *TASKS, DEFAULT} if asked else own.weights  # a finer category would hide a suite's scorers
    weights = {category: dict(row) for category, row in own.weights.items() if category in kept}
    watch = tuple(name for name in own.watch if name != "arena")
    for name in names:
        suite = SUITES[name]
        for category, scorers in suite.weights.items():
            for scorer in scorers:
                entry = known.get(scorer) or suite.scorers.get(scorer)
                if entry and scorer not in world.KINDS:
                    known[scorer] = {**entry, "model": ""} if world.KINDS and scorer == "diversity" else dict(entry)
                    weights.setdefault(category, {}).setdefault(scorer, 1.0)
    shared = {scorer for name in names for scorer in SUITES[name].weights.get(DEFAULT, ()) if scorer in known}
    for row in weights.values():  # a category's own row hides the default one
        row.update(dict.fromkeys(shared, 1.0))
    used = {*watch, *(name for row in weights.values() for name in row)}
    known = {name: entry for name, entry in known.items() if name in used}
    return Asked(known, weights, watch, None if world.KINDS else world) if weights else None


def left_out(s: Settings, asked: Asked | None) -> list[str]:
    """A note for each scorer of a suite that has no default and no entry in --rewards."""
    known = {*(asked.scorers if asked else ()), *load.world_of(s).KINDS}
    wanted = {name: {n for row in SUITES[name].weights.values() for n in row} for name in suite_list(s)}
    lost = [(name, scorer) for name, scorers in wanted.items() for scorer in sorted(scorers - known)]
    return [f"--suite {name}: --rewards does not define {scorer}; its column is left out." for name, scorer in lost]


def arena_judge(s: Settings, device: str) -> Scorer | None:
    """Who votes in the arena of published models: the scorer "arena" of --rewards, or a Qwen-VL; None: the rules do."""
    if load.world_of(s).KINDS:
        return None
    entry = load.asked_of(s).scorers.get("arena", ARENA) if s.rewards else ARENA
    return registry.make(entry["kind"], {key: value for key, value in entry.items() if key != "kind"}, device)


def of(s: Settings, rows: Rows) -> Suite:
    """The table of an evaluation: its suites' columns side by side, or those of its world."""
    chosen = [SUITES[name] for name in suite_list(s) if SUITES[name].columns]
    if not chosen:
        return WORLDS.get(s.preset) or plain(rows)
    graded = any(row["scores"].get("geneval", 0) not in (0, 1) for row in rows)
    rename = lambda c: c._replace(name=f"{c.name} (graded)") if graded and c.metric == "geneval" else c  # noqa: E731
    columns = tuple(rename(column) for suite in chosen for column in suite.columns)
    return Suite(columns, lambda scores: {k: v for suite in chosen for k, v in suite.average(scores).items()})


def plain(rows: Rows) -> Suite:
    """A column "TASK METRIC" for each metric of each task in rows. The metric that is called `geneval` is GenEval's
    number where it holds verdicts; the graded reward that a far scorer may give is another number, and is called so."""
    found: dict[tuple[str, str], set[float]] = {}
    for row in rows:
        for metric, value in row["scores"].items():
            found.setdefault((row["task"], metric), set()).add(value)
    columns = []
    for (task, metric), values in found.items():
        if metric == "geneval" and values <= {0.0, 1.0}:
            columns.append(Column(f"{task} {metric}", metric, task, "tag", even=True))
        else:
            columns.append(Column(f"{task} {metric}" + " (graded)" * (metric == "geneval"), metric, task))
    four = ("composition geneval", "text ocr", "quality deqa", "quality pickscore")
    return Suite(tuple(columns), lambda scores: table2_average(scores, *four, printed=False))


def numbers(rows: Rows, suite: Suite, resamples: int = 0) -> dict[str, dict]:
    """{model: {"scores": {column: number}, "tags": {group: number}}}. A model lacks a column if its rows lack the
    metric. With `resamples` a score is a `tables.Cell` with its bootstrap interval: prompts are drawn again within
    their tag and category, the same ones for all models. Then "above" has a model's scores minus the first model's,
    paired by prompt."""
    found: dict[str, dict] = {}
    first = None
    for model in dict.fromkeys(row["model"] for row in rows):
        own: dict[tuple, list[Mapping]] = {}
        for row in rows:
            if row["model"] == model:
                own.setdefault((row["task"], row["index"]), []).append(row)
        prompts, told, counts, tags = list(own.values()), {}, {}, {}
        for column in suite.columns:
            values_P, groups_P = values_of(column, prompts)
            there = ~np.isnan(values_P)
            if there.any():
                told[column], counts[column.name] = (values_P, groups_P), int(there.sum())
                means = rewards.per_tag_accuracy(values_P[there], groups_P[there].tolist()) if column.group else {}
                tags |= {f"{column.name}: {k}" if k in tags else k: v for k, v in means.items()}

        def table(index: np.ndarray, told=told) -> dict[str, float]:
            scores = {column.name: number(column, *(part[index] for part in parts)) for column, parts in told.items()}
            return {**scores, **suite.average(scores)}

        scores = table(np.arange(len(prompts))) if told else {}
        found[model] = {"scores": scores, "tags": tags}
        if resamples and scores:
            strata = [f"{p[0]['task']} {p[0]['tag']} {p[0]['category']}" for p in prompts]
            often = Counter(strata)  # prompts that are alone in theirs are one stratum: alone they would never vary
            strata = [p[0]["task"] if often[name] == 1 else name for p, name in zip(prompts, strata, strict=True)]
            kinds = {"scores": table} | ({"above": partial(minus, table, first)} if first else {})
            for kind, statistic in kinds.items():
                values = lambda index, statistic=statistic: [*statistic(index).values()]  # noqa: E731
                cells = zip(*compare.bootstrap(values, len(prompts), strata, resamples), strict=True)
                named = zip(statistic(np.arange(len(prompts))), cells, strict=True)
                found[model][kind] = {name: Cell(v, counts.get(name, 0), low, high) for name, (v, low, high) in named}
            first = first or table
    return found


def minus(table: Callable, other: Callable, index: np.ndarray) -> dict[str, float]:
    """The scores of two models on the same prompts: the differences in those that both have."""
    others = other(index)
    return {name: value - others[name] for name, value in table(index).items() if name in others}


def values_of(column: Column, prompts: Sequence[Rows]) -> tuple[np.ndarray, np.ndarray]:
    """(the metric of each of P prompts, nan for one without it; the group of each). prompts: the rows of each."""
    names, tasks = ((own,) if isinstance(own, str) else own for own in (column.metric, column.task))
    values_P = np.full(len(prompts), np.nan)
    for i, own in enumerate(prompts):
        told = [[row["scores"][name] for name in names if name in row["scores"]] for row in own]
        scores = [np.mean(some) for some in told if some]
        if scores and ("" in tasks or own[0]["task"] in tasks):
            values_P[i] = column.scale * np.mean(scores)
    return values_P, np.array([own[0][column.group] if column.group else "" for own in prompts])


def number(column: Column, values_P: np.ndarray, groups_P: np.ndarray) -> float:
    """The column's number of some prompts, from what `values_of` says of them; nan if none has the metric."""
    there = ~np.isnan(values_P)
    if column.even and there.any():
        return rewards.geneval_score(values_P[there].tolist(), groups_P[there].tolist())  # F Table 2
    return float(values_P[there].mean()) if there.any() else float("nan")
