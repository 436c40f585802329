"""Where do the README's figures come from?

    python bench.py estimators   the table of F Eq. 11's estimators on a linear-Gaussian flow
    python bench.py speed        single-pass against stored-trajectory OPD, as a ratio within one run
    python bench.py learning     OPD, its estimators and GRPO-mix on the tiny world, three seeds, mean and std;
                                 with words after it, only the recipes whose name has one of them

Each prints a markdown table. `make bench` runs the first two, `make reproduce` the last (an hour or two on two
cores). Nothing here is timed by a test.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

SEEDS = (0, 1, 2)
# name -> flags of train.py. `merged` stands for the cold start that `--stage merge` writes first.
LEARNING = {
    "OPD analytic, from merged": ["--stage", "opd", "--init", "runs/bench-merge"],
    "OPD analytic, from base, 50 steps": ["--stage", "opd", "--steps", "50"],
    "OPD literal (F Eq. 10-11), from base, 50 steps": ["--stage", "opd", "--steps", "50", "--estimator", "literal"],
    "OPD velocity (Q Eq. 14), from base, 50 steps": ["--stage", "opd", "--steps", "50", "--estimator", "velocity"],
    "GRPO-mix 3:1:1 (F App. A), from merged": ["--stage", "grpo", "--task", "mix", "--init", "runs/bench-merge"],
}
COLUMNS = ("composition", "text", "quality", "average")


def estimators() -> None:
    """The estimator study of tests/linear_gaussian.py with 400,000 trajectories."""
    script = Path(__file__).parent / "tests" / "linear_gaussian.py"
    subprocess.run([sys.executable, script, "--trajectories", "400000"], check=True)


def speed(rounds: int = 5, warmup: int = 2) -> None:
    """Seconds of one OPD step, single-pass and stored, in turn: median of each and of the ratio pair by pair."""
    import eval as evaluation
    import settings
    import train

    flags = ["--stage", "opd", "--out", "runs/bench-speed", "--no-resume", "--steps", "1000"]
    times: dict[bool, list[float]] = {True: [], False: []}
    s, _ = settings.parse(flags)
    prompts = evaluation.load_prompts(s, "train", s.train_prompts, settings.task_list(s))
    run = train.student_run(s)
    experts = evaluation.load_teachers(run.model, s)
    rows = train.repeat(train.mixed_batch(run, prompts, s.prompts_per_step), s.group_size)
    for _ in range(warmup + rounds):
        for single in times:
            began = time.perf_counter()
            train.distil_step(run, rows, experts, single)
            run.update()
            times[single].append(time.perf_counter() - began)
    one, two = times[True][warmup:], times[False][warmup:]
    ratio = statistics.median(a / b for a, b in zip(one, two, strict=True))
    print("| OPD step | seconds (median) |\n|---|---:|")
    print(f"| single pass | {statistics.median(one):.2f} |\n| stored trajectory | {statistics.median(two):.2f} |")
    print(f"\nRatio, pair by pair: {ratio:.2f} ({len(rows)} trajectories, {rounds} rounds)")


def learning(*words: str) -> None:
    """Every recipe of LEARNING (that has one of `words`) with every seed -> mean ± sample std over seeds.

    Finished runs are not repeated: an interrupted bench goes on where it stood.
    """
    import train

    if train.main(["--stage", "merge", "--name", "bench-merge"]):
        raise SystemExit(2)
    table = []
    for title, flags in LEARNING.items():
        if words and not any(word in title for word in words):
            continue
        results, gaps = [], []
        for seed in SEEDS:
            name = "bench-" + "".join(c if c.isalnum() else "-" for c in title.lower()) + f"-{seed}"
            if train.main([*flags, "--name", name, "--seed", str(seed)]):
                raise SystemExit(2)
            results.append(json.loads(Path("runs", name, "results.json").read_text())[name])
            logged = [json.loads(line) for line in Path("runs", name, "metrics.jsonl").read_text().splitlines()]
            gaps.append(
                [statistics.mean(row.get("gap", float("nan")) for row in part) for part in (logged[:5], logged[-5:])]
            )
        cells = [[row[column] for row in results] for column in COLUMNS]
        cells += [list(gap) for gap in zip(*gaps)]  # the velocity gap over the first and the last five steps
        table.append(f"| {title} | " + " | ".join(spread(cell) for cell in cells) + " |")
    columns = [*COLUMNS, "gap at first", "gap at last"]
    print("\n| student | " + " | ".join(columns) + " |\n|---|" + "---:|" * len(columns))
    print("\n".join(table))


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


if __name__ == "__main__":
    jobs = {"estimators": estimators, "speed": speed, "learning": learning}
    if len(sys.argv) < 2 or sys.argv[1] not in jobs:
        print(f"usage: python bench.py {{{','.join(jobs)}}}", file=sys.stderr)
        sys.exit(2)
    jobs[sys.argv[1]](*sys.argv[2:])
