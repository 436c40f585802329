"""What the benches share: ends of curves, tables over seeds, the command line."""

import json
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import train
from harness import cli, tables
from harness.run import read_metrics
from settings import TRAINED, Settings


def parsed(*flags: str) -> Settings:
    return cli.parse(flags)[0]


def trained(flags: Sequence[str]) -> Path:
    """Run train.py to its end -> the run's folder.

    SystemExit if it fails, or if a signal has stopped it before its last step, for which train.py's exit code is 0.
    """
    s = parsed(*flags)
    if train.main(flags):
        raise SystemExit(2)  # train.py has said why
    folder = Path(s.out, s.name)
    if s.stage in TRAINED and s.steps and read_metrics(folder)[-1]["step"] < s.steps:
        raise SystemExit(f"{folder} was stopped before its last step: repeat the command to go on")
    return folder


def ends(run: Path, key: str) -> tuple[float, float]:
    """Mean of a metric over a run's first and its last five steps; nan where it was not logged."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first, last = (statistics.mean(row.get(key, float("nan")) for row in part) for part in (rows[:5], rows[-5:]))
    return first, last


def table(rows: Mapping[str, Sequence[Mapping[str, float]]], columns: Sequence[str], first: str = "model") -> None:
    """Print a markdown table. rows: {name: one dict of scores a seed}."""
    found = {name: tables.over_seeds(own, columns) for name, own in rows.items()}
    print("\n" + tables.markdown(tables.Table(found, first)))


def survival(found: Iterable[tuple[str, int, str, int]]) -> int:
    """Print (what, how many were tried, of what, how many survived) line by line, and the sums -> the exit code."""
    total = [0, 0]
    for what, tried, kind, good in found:
        total = [total[0] + tried, total[1] + good]
        print(f"{what}: {tried} {kind}, {good} survived", flush=True)
    print(f"tried {total[0]}, survived {total[1]}")
    return int(total[0] != total[1])


def run_job(module: str, *jobs: Callable) -> None:
    """The command line of a bench: `python -m bench.MODULE JOB [words]`."""
    named = {job.__name__: job for job in jobs}
    if len(sys.argv) < 2 or sys.argv[1] not in named:
        print(f"usage: python -m bench.{module} {{{','.join(named)}}}", file=sys.stderr)
        raise SystemExit(2)
    named[sys.argv[1]](*sys.argv[2:])
