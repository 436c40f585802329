"""Where do the README's figures come from?

    python bench.py estimators   the table of F Eq. 11's estimators on a linear-Gaussian flow
    python bench.py speed        single-pass against stored-trajectory OPD, as a ratio within one run
    python bench.py step         OPD steps on SD3.5-M's real shapes (random weights, no download; an accelerator):
                                 seconds, memory and model-FLOPs utilisation; flags of train.py may follow
    python bench.py learning     OPD, its estimators and GRPO-mix on the tiny world, three seeds, mean and std;
                                 with words after it, only the recipes whose name has one of them

Each prints a markdown table. `make bench` runs the first two, `make reproduce` the last (an hour or two on two
cores). Nothing here is timed by a test.
"""

import json
import statistics
import subprocess
import sys
import tempfile
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

    flags = ["--preset", "tiny", "--stage", "opd", "--out", "runs/bench-speed", "--no-resume", "--steps", "1000"]
    times: dict[bool, list[float]] = {True: [], False: []}
    s, _ = settings.parse(flags)
    prompts = evaluation.load_prompts(s, "train", s.train_prompts, settings.task_list(s))
    run = train.student_run(s)
    experts = evaluation.load_teachers(run.model, s)
    rows = train.rows_of(run, prompts)
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


# Dense bfloat16 FLOP/s of accelerators by a part of their name, as their makers state them.
PEAKS = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "B200": 2250e12}


def random_sd35(s, device, config: dict):
    """SD3.5 with this transformer and random weights, text conditions included: real shapes without a download."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

    import models
    from flow import Cond

    dtype = getattr(torch, s.precision)
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        transformer = SD3Transformer2DModel(**config).requires_grad_(False).eval()
        torch.set_default_dtype(before)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    model = models.SD35Model(Path(), transformer, scheduler, device, s.resolution, s.text_length)
    model.precision = s.precision
    if s.gradient_checkpointing:
        model.transformer.enable_gradient_checkpointing()
    tokens = torch.randn(1, 77 + s.text_length, config["joint_attention_dim"], dtype=dtype)
    model.known = dict.fromkeys(["", "a prompt"], Cond(tokens, tokens.new_ones(1, config["pooled_projection_dim"])))
    return model


def forward_flops(config: dict, resolution: int, text_length: int) -> int:
    """FLOPs of one row's forward, counted by torch on tensors without memory."""
    import torch
    from diffusers import SD3Transformer2DModel
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        transformer = SD3Transformer2DModel(**config)
        transformer(
            hidden_states=torch.empty(1, config["in_channels"], resolution // 8, resolution // 8),
            encoder_hidden_states=torch.empty(1, 77 + text_length, config["joint_attention_dim"]),
            pooled_projections=torch.empty(1, config["pooled_projection_dim"]), timestep=torch.empty(1),
        )  # fmt: skip
    return counter.get_total_flops()


def step(*flags: str, config: dict | None = None, rounds: int = 3) -> dict[str, float]:
    """OPD steps on SD3.5-M's real configuration with random weights; one warm-up, then `rounds` that count.

    Model FLOPs count a forward as 1, a backward as 1 for a LoRA (no gradient of frozen weights) and as 2 for full
    parameters, and nothing for what gradient checkpointing computes again.
    """
    import torch

    import adapters
    import cost
    import ranks
    import settings
    import train
    from data import Prompt

    s, _ = settings.parse(["--stage", "opd", "--no-resume", "--out", tempfile.mkdtemp(), *flags])
    device, config = ranks.start(s), config or cost.SD35_MEDIUM
    model = random_sd35(s, device, config)
    if s.parameters == "full":
        model.train_fully(keep_base=True)
        ranks.shard(model, s)
        run = train.Run(s, model)
    else:
        lora = adapters.lora_config(s.rank, s.alpha)
        model.add_adapter("student", lora)
        run = train.Run(s, model, lora)
    for task in s.teachers:
        model.add_adapter(f"teacher:{task}", adapters.lora_config(s.rank, s.alpha))
    experts = {task: f"teacher:{task}" for task in s.teachers} | {"anchor": f"teacher:{s.anchor}"}
    rows = train.rows_of(run, {task: [Prompt("a prompt", task, {}, "bench")] for task in settings.task_list(s)})
    seconds, cuda = [], device.type == "cuda"
    for _ in range(1 + rounds):
        began = time.perf_counter()
        train.distil_step(run, rows, experts, s.single_pass)
        run.update()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    a_row, backward = forward_flops(config, s.resolution, s.text_length), 2 if s.parameters == "full" else 1
    flops = sum(w.rows * a_row * (1 + backward * w.gradient) for w in cost.forwards(s))
    found = {"seconds": statistics.median(seconds[1:]), "flops": flops}
    name = torch.cuda.get_device_name(device) if cuda else "processor"
    peak = next((value for part, value in PEAKS.items() if part in name), None)
    if cuda:
        found["memory"] = torch.cuda.max_memory_allocated(device) / 2**30
    print(f"{name}, {len(rows)} trajectories a step and rank: {found['seconds']:.2f} s a step (of {rounds}, median), "
          f"{flops / found['seconds'] / 1e12:.3g} TFLOP/s"
          + (f", utilisation {flops / found['seconds'] / peak:.2f} of {peak / 1e12:.0f}" if peak else "")
          + (f", peak memory {found['memory']:.1f} GiB" if cuda else ""))  # fmt: skip
    return found


def learning(*words: str) -> None:
    """Every recipe of LEARNING (that has one of `words`) with every seed -> mean ± sample std over seeds.

    Finished runs are not repeated: an interrupted bench goes on where it stood.
    """
    import train

    if train.main(["--preset", "tiny", "--stage", "merge", "--name", "bench-merge"]):
        raise SystemExit(2)
    table = []
    for title, flags in LEARNING.items():
        if words and not any(word in title for word in words):
            continue
        results, gaps = [], []
        for seed in SEEDS:
            name = "bench-" + "".join(c if c.isalnum() else "-" for c in title.lower()) + f"-{seed}"
            if train.main(["--preset", "tiny", *flags, "--name", name, "--seed", str(seed)]):
                raise SystemExit(2)
            results.append(json.loads(Path("runs", name, "results.json").read_text())[name]["scores"])
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
    jobs = {"estimators": estimators, "speed": speed, "step": step, "learning": learning}
    if len(sys.argv) < 2 or sys.argv[1] not in jobs:
        print(f"usage: python bench.py {{{','.join(jobs)}}}", file=sys.stderr)
        sys.exit(2)
    jobs[sys.argv[1]](*sys.argv[2:])
