"""Learning curves at about equal CPU seconds: all states of a trajectory, or k drawn ones (--drawn-states).

    python -m bench.states [world start]   three seeds; from the base, and from the merge of the teachers

Finished runs are not repeated. The best of a pair in equal time is claim 6b of bench/reproduce.py.
"""

import json
import sys
import time
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import eval as evaluation
import settings
import train
from bench.runs import parsed, table, trained
from data.common import write_atomic
from harness import load, ranks
from harness.run import read_metrics

# (world, start) -> {drawn states of a trajectory, 0 for all: steps that take about as many CPU seconds}
STEPS = {
    ("tiny", "merge"): {0: 21, 1: 48, 2: 27}, ("tiny-qwen", "base"): {0: 21, 1: 54, 2: 33},
    ("tiny-qwen", "merge"): {0: 12, 1: 33, 2: 18}, ("tiny", "base"): {0: 39, 1: 96, 2: 57},
}  # fmt: skip
COLUMNS = ("a third", "two thirds", "end", "CPU seconds")


def average_at(checkpoint: Path, world: str, seed: int) -> float:
    """The average score of a checkpoint on 96 test prompts a task."""
    s = parsed("--preset", world, "--stage", "opd", "--eval-prompts", "96", "--seed", str(seed))
    model, prompts = load.base_model(s, ranks.start(s)), load.load_prompts(s, "test", 96, settings.test_tasks(s))
    model.add_expert("expert", str(checkpoint))
    with model.adapter("expert"):
        return evaluation.evaluate(model, prompts, s, settings.student_cfg(s))["scores"]["average"]


def curve(world: str, start: str, k: int, steps: int, seed: int) -> dict[str, float]:
    flags = ["--preset", world, "--drawn-states", str(k), "--steps", str(steps), "--seed", str(seed)]
    flags += ["--stage", "opd", "--save-every", str(steps // 3), "--keep", "3"]
    if start == "merge":
        merge = ["--preset", world, "--stage", "merge", "--eval-prompts", "0", "--name", f"bench-merge-{world}"]
        flags += ["--init", str(trained(merge))]
    run = trained([*flags, "--eval-prompts", "0", "--name", f"bench-curve-{world}-{start}-{k}-{seed}"])
    if not (run / "curve.json").exists():
        found = [average_at(part, world, seed) for part in sorted((run / "checkpoints").glob("step-*"))]
        write_atomic(run / "curve.json", json.dumps([*found, sum(row["seconds"] for row in read_metrics(run))]))
    return dict(zip(COLUMNS, json.loads((run / "curve.json").read_text()), strict=True))


if __name__ == "__main__":
    train.time = SimpleNamespace(time=time.process_time)  # a step's seconds are those of this process alone
    for world, start in [tuple(sys.argv[1:])] if sys.argv[1:] else STEPS:
        rows: dict[str, list] = {}
        for seed, (k, steps) in product(range(3), STEPS[world, start].items()):
            name = f"{k or 'all'} states, {steps} steps"
            rows.setdefault(name, []).append(curve(world, start, k, steps, seed))
        table(rows, COLUMNS, f"{world}, from the {start}")
