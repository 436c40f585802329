"""Where do the README's figures come from?

    python bench.py estimators   the table of F Eq. 11's estimators on a linear-Gaussian flow
    python bench.py speed        single-pass against stored-trajectory OPD, as a ratio within one run
    python bench.py learning     OPD, its estimators and GRPO-mix on the tiny world, three seeds, mean and std

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
    "OPD analytic, from base": ["--stage", "opd"],
    "OPD literal (F Eq. 10-11), from base": ["--stage", "opd", "--estimator", "literal"],
    "OPD velocity (Q Eq. 14), from base": ["--stage", "opd", "--estimator", "velocity"],
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


def learning() -> None:
    """Every recipe of LEARNING with every seed -> a table of mean ± sample standard deviation over seeds."""
    import train

    if train.main(["--stage", "merge", "--name", "bench-merge"]):
        raise SystemExit(2)
    table = []
    for title, flags in LEARNING.items():
        results = []
        for seed in SEEDS:
            name = "bench-" + "".join(c if c.isalnum() else "-" for c in title.lower()) + f"-{seed}"
            if train.main([*flags, "--name", name, "--seed", str(seed)]):
                raise SystemExit(2)
            results.append(json.loads(Path("runs", name, "results.json").read_text())[name])
        cells = [[row[column] for row in results] for column in COLUMNS]
        table.append(f"| {title} | " + " | ".join(spread(cell) for cell in cells) + " |")
    print("\n| student | " + " | ".join(COLUMNS) + " |\n|---|" + "---:|" * len(COLUMNS))
    print("\n".join(table))


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


if __name__ == "__main__":
    jobs = {"estimators": estimators, "speed": speed, "learning": learning}
    if len(sys.argv) != 2 or sys.argv[1] not in jobs:
        print(f"usage: python bench.py {{{','.join(jobs)}}}", file=sys.stderr)
        sys.exit(2)
    jobs[sys.argv[1]]()
