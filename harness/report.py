"""What does a run leave for its reader: report.html (harness/page.py), and the same numbers for programs?"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from data.common import write_atomic
from harness import page, tables
from settings import Settings


def tables_of(rows: Mapping[str, dict]) -> dict[str, tables.Table]:
    """{"scores": table, "tags": table}, each if some row has any; see `write_report`."""
    return {key: tables.of_evaluation(rows, key) for key in ("scores", "tags") if any(r[key] for r in rows.values())}


def lines_of(rows: Mapping[str, dict]) -> list[str]:
    """The lines of the tables in Markdown."""
    found = []
    for key, table in tables_of(rows).items():
        found += [*({"tags": ["By tag:", ""]}.get(key, [])), tables.markdown(table), ""]
    return found


def write_report(
    folder: Path, s: Settings, found: Mapping[str, dict], rows: Sequence[Mapping] = (), notes: Sequence[str] = (),
    warnings: Sequence[str] = (), more: Mapping[str, tables.Table] = {},  # noqa: B006
) -> Path:  # fmt: skip
    """A run's report.html (harness/page.py) -> its path; beside it the tables, results.json, and rows.jsonl if any.

    found: {name: {"scores": {column: number}, "tags": {tag: accuracy}}}; rows: one a picture (harness/suites.py);
    more: other tables, by name.
    """
    if rows:
        write_atomic(folder / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    shown = {**tables_of(found), **more}
    for key, table in shown.items():
        tables.write(folder, key, table)
    plain = {
        name: {key: {column: getattr(v, "value", v) for column, v in numbers.items()} for key, numbers in row.items()}
        for name, row in found.items()
    }
    write_atomic(folder / "results.json", json.dumps(plain, indent=1) + "\n")
    return page.write(folder, s, shown, rows, notes, warnings)
