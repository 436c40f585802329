"""One structure for every table of numbers, and its writers: a terminal's, Markdown, LaTeX, CSV and JSON.

A table has models as rows and scores as columns. As in F Table 2, teachers are ceilings: they are left out of the
comparison, and the best of them in a column is bold and underlined. Of the others the best is bold, the second best
underlined. Numbers are compared as they are printed, so that equal prints get equal marks.
"""

import csv
import io
import json
import math
import re
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.common import write_atomic


class Cell(NamedTuple):
    """A number, what it is a mean of, and how sure it is.

    value: the number; n: how many prompts (or seeds) it comes from, 0 if that is not known; low, high: its interval;
    std: its standard deviation over seeds. nan stands for what is not known.
    """

    value: float
    n: int = 0
    low: float = math.nan
    high: float = math.nan
    std: float = math.nan


class Table(NamedTuple):
    """rows: {model: {column: Cell, or a number alone}}; a model may lack columns.

    first: the head of the first column; ceilings: models outside the comparison; lower: columns whose best is the
    lowest; digits: after the point.
    """

    rows: Mapping[str, Mapping[str, Cell | float]]
    first: str = "model"
    ceilings: Collection[str] = ()
    lower: Collection[str] = ()
    digits: int = 3

    @property
    def columns(self) -> list[str]:
        """The columns that some row has, in order of first appearance."""
        return list(dict.fromkeys(column for row in self.rows.values() for column in row))

    def cells(self, name: str) -> dict[str, Cell]:
        """A model's {column: Cell}."""
        return {c: cell if isinstance(cell, Cell) else Cell(cell) for c, cell in self.rows[name].items()}


def over_seeds(found: Sequence[Mapping[str, float]], columns: Sequence[str]) -> dict[str, Cell]:
    """A row of means and sample standard deviations: found is one {column: number} a seed, of those that have it."""
    cells = {}
    for column in columns:
        values = [row[column] for row in found if column in row]
        std = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
        cells[column] = Cell(statistics.fmean(values), len(values), std=std)
    return cells


# -------------------------------------------------------------------------------------------------- what is printed
def text(cell: Cell, digits: int) -> str:
    """0.912, 0.912 ± 0.014 with a deviation, 0.912 [0.897, 0.925] with an interval, - for nan. From 1000 on
    nothing is behind the point."""
    if math.isnan(cell.value):
        return "-"
    digits = 0 if abs(cell.value) >= 1000 else digits
    shown = f"{cell.value:.{digits}f}"
    if not math.isnan(cell.std):
        shown += f" ± {cell.std:.{digits}f}"
    if not math.isnan(cell.low):
        shown += f" [{cell.low:.{digits}f}, {cell.high:.{digits}f}]"
    return shown


def marked(table: Table) -> dict[str, list[tuple[str, str]]]:
    """{model: one (text, mark) a column}; mark: "best", "second", "ceiling" or "", text "" for a missing number.

    Nothing is marked among models whose numbers are all alike, or in a column of one model.
    """
    rows, marks = {name: table.cells(name) for name in table.rows}, {}
    for column, compared in product(table.columns, (True, False)):
        sign = -1 if column in table.lower else 1
        found = {
            name: sign * round(row[column].value, table.digits)
            for name, row in rows.items()
            if column in row and (name not in table.ceilings) == compared
        }
        ranks = sorted({value for value in found.values() if not math.isnan(value)}, reverse=True)
        for value, mark in zip(ranks, ("best", "second") if compared else ("ceiling",)):
            marks |= {(name, column): mark for name, own in found.items() if own == value and len(ranks) > 1}
    return {
        name: [(text(row[c], table.digits) if c in row else "", marks.get((name, c), "")) for c in table.columns]
        for name, row in rows.items()
    }


# ---------------------------------------------------------------------------------------------------------- writers
def aligned(table: Table) -> str:
    """A table for a terminal: columns of one width, without marks."""
    rows = [[table.first, *table.columns]]
    rows += [[name, *(shown for shown, _ in cells)] for name, cells in marked(table).items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)


def markdown(table: Table) -> str:
    """A table of GitHub's Markdown. A stroke in a name, which would end its cell, becomes a slash."""
    form = {"": "{}", "best": "**{}**", "second": "<u>{}</u>", "ceiling": "**<u>{}</u>**"}
    heads = (name.replace("|", "/") for name in [table.first, *table.columns])
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * len(table.columns)]
    for name, cells in marked(table).items():
        shown = [name.replace("|", "/"), *(form[mark].format(number) for number, mark in cells)]
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines)


def latex(table: Table) -> str:
    """A tabular for the package booktabs."""
    form = {"": "{}", "best": r"\textbf{{{}}}", "second": r"\underline{{{}}}"}
    form["ceiling"] = r"\underline{{\textbf{{{}}}}}"

    def safe(words: str) -> str:
        escaped = re.sub(r"[&%$#_{}]", r"\\\g<0>", words.replace("\\", "/"))
        return escaped.replace("±", r"$\pm$").replace("~", r"$\sim$").replace("^", r"\^{}")

    lines = [rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}", r"\toprule"]
    lines += [" & ".join(map(safe, (table.first, *table.columns))) + r" \\", r"\midrule"]
    for name, cells in marked(table).items():
        lines.append(" & ".join([safe(name), *(form[mark].format(safe(shown)) for shown, mark in cells)]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])


def records(table: Table) -> list[dict]:
    """One record a number that is there: model, column, value, n, low, high, std; None for what is not known."""
    found = []
    for name in table.rows:
        for column, cell in table.cells(name).items():
            known = {key: None if math.isnan(value) else value for key, value in cell._asdict().items()}
            found.append({"model": name, "column": column, **known, "n": cell.n or None})
    return found


def as_csv(table: Table) -> str:
    """The records, one a line, at full precision: what a spreadsheet and a plot read."""
    out = io.StringIO()
    writer = csv.DictWriter(out, ["model", "column", *Cell._fields], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records(table))
    return out.getvalue()


def as_json(table: Table) -> str:
    """The records as a list."""
    return json.dumps(records(table), indent=1, ensure_ascii=False) + "\n"


def of_evaluation(rows: Mapping[str, Mapping]) -> dict[str, Table]:
    """{"scores": table, "tags": table}, each if some row has any: rows {model: {key: {column: number or Cell}}}."""
    found = {key: {name: row[key] for name, row in rows.items()} for key in ("scores", "tags")}
    return {key: Table(own, ceilings=teachers(rows)) for key, own in found.items() if any(own.values())}


def teachers(names: Iterable[str]) -> list[str]:
    """Those of an evaluation's models that are ceilings."""
    return [name for name in names if name.startswith("teacher ")]


def lines_of(rows: Mapping[str, Mapping]) -> list[str]:
    """The lines of an evaluation's tables, for a terminal."""
    found = []
    for key, table in of_evaluation(rows).items():
        found += [*({"tags": ["By tag:", ""]}.get(key, [])), aligned(table), ""]
    return found


def write(folder: Path, name: str, table: Table) -> None:
    """NAME.md, NAME.tex, NAME.csv and NAME.json in a folder."""
    for ending, writer in WRITERS.items():
        write_atomic(folder / f"{name}.{ending}", writer(table).rstrip("\n") + "\n")


WRITERS = {"md": markdown, "tex": latex, "csv": as_csv, "json": as_json}  # by the ending of the file
