"""harness/tables.py: which numbers are marked, and that every writer writes the same numbers."""

import csv
import json
import math
import re

import pytest

from harness import tables
from harness.tables import Cell, Table

ROWS = {
    "base": {"text": 0.25, "error": 3.0},
    "teacher text": {"text": 0.96, "error": 9.0},
    "teacher quality": {"text": 0.5, "error": 0.125},
    "a_b": {"text": Cell(0.9, 7, 0.8504, 0.95), "error": 1.5},
    "opd": {"text": Cell(0.8996, 7, std=0.0125), "error": Cell(1.0, 5)},
    "new": {"error": 2.0},
}
TABLE = Table(ROWS, ceilings=("teacher text", "teacher quality"), lower=("error",))


def marks(table, column):
    at = table.columns.index(column)
    return {name: cells[at][1] for name, cells in tables.marked(table).items() if cells[at][1]}


def test_best_and_second_are_marked_as_printed_and_teachers_are_ceilings_outside_the_comparison():
    # 0.9 and 0.8996 are both printed 0.900: both are the best, and the base, far behind, is the second.
    assert marks(TABLE, "text") == {"a_b": "best", "opd": "best", "base": "second", "teacher text": "ceiling"}
    assert marks(TABLE, "error") == {"opd": "best", "a_b": "second", "teacher quality": "ceiling"}, "lower is better"
    assert marks(TABLE._replace(digits=4), "text")["opd"] == "second"
    assert marks(TABLE._replace(ceilings=(), lower=()), "error") == {"teacher text": "best", "base": "second"}


@pytest.mark.parametrize("values", [(0.5,), (0.5, 0.5, 0.5), (float("nan"), 0.5)])
def test_nothing_is_marked_where_nothing_differs(values):
    assert marks(Table({str(i): {"x": value} for i, value in enumerate(values)}), "x") == {}


def test_a_terminal_has_columns_of_one_width_and_no_marks():
    lines = tables.aligned(TABLE).split("\n")
    assert len({len(line) for line in lines}) == 1 and lines[0].split() == ["model", "text", "error"]
    assert lines[4].split("  ")[0] == "a_b" and lines[4].endswith("  0.900 [0.850, 0.950]  1.500")


def test_markdown_and_latex_show_marks_intervals_deviations_and_gaps():
    assert tables.markdown(TABLE).split("\n") == [
        "| model | text | error |",
        "|---|---:|---:|",
        "| base | <u>0.250</u> | 3.000 |",
        "| teacher text | **<u>0.960</u>** | 9.000 |",
        "| teacher quality | 0.500 | **<u>0.125</u>** |",
        "| a_b | **0.900 [0.850, 0.950]** | <u>1.500</u> |",
        "| opd | **0.900 ± 0.013** | **1.000** |",
        "| new |  | 2.000 |",
    ]
    lines = tables.latex(TABLE).split("\n")
    assert lines[0] == r"\begin{tabular}{lrr}" and lines[2] == r"model & text & error \\"
    assert r"a\_b & \textbf{0.900 [0.850, 0.950]} & \underline{1.500} \\" in lines
    assert r"opd & \textbf{0.900 $\pm$ 0.013} & \textbf{1.000} \\" in lines and r"new &  & 2.000 \\" in lines


def test_csv_and_json_have_the_same_numbers_at_full_precision(tmp_path):
    found = json.loads(tables.as_json(TABLE))
    assert len(found) == 11 and {"model": "opd", "column": "text", "value": 0.8996, "n": 7, "low": None, "high": None,
                                 "std": 0.0125} in found  # fmt: skip
    tables.write(tmp_path, "scores", TABLE)
    read = list(csv.DictReader((tmp_path / "scores.csv").open()))
    number = lambda text: float(text) if text else None  # noqa: E731
    assert [{k: v if k in ("model", "column") else number(v) for k, v in row.items()} for row in read] == found
    assert {p.suffix for p in tmp_path.iterdir()} == {".md", ".tex", ".csv", ".json"}


def test_names_do_not_break_a_row():
    table = Table({"50% & {more} | #1": {"x_y": 1.0}})
    assert [line.count("|") for line in tables.markdown(table).split("\n")] == [3, 3, 3]
    row = tables.latex(table).split("\n")[4]
    assert row == r"50\% \& \{more\} | \#1 & 1.000 \\" and len(re.findall(r"(?<!\\)&", row)) == 1


def test_a_row_over_seeds_has_mean_and_sample_deviation_and_one_seed_has_none():
    found = tables.over_seeds([{"a": 1.0, "b": 0.0, "c": 9.0}, {"a": 2.0, "b": 0.5}, {"a": 4.5, "b": 1.0}], ("b", "a"))
    assert list(found) == ["b", "a"] and found["a"][:2] == (2.5, 3) and found["a"].std == pytest.approx(3.25**0.5)
    assert tables.text(found["b"], 2) == "0.50 ± 0.50"
    assert tables.text(tables.over_seeds([{"a": 0.125}], ("a",))["a"], 3) == "0.125"
    assert tables.text(tables.over_seeds([{"a": 2400}, {"a": 4800}], ("a",))["a"], 3) == "3600 ± 1697"
    never = tables.over_seeds([{"a": math.nan}, {"a": 4800}, {"a": math.nan}], ("a",))["a"]
    assert tables.text(never, 3) == "-", "what a seed has not reached has no mean"
