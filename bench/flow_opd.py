"""Where do the README's figures come from?

    python -m bench.flow_opd estimators   the table of F Eq. 11's estimators on a linear-Gaussian flow
    python -m bench.flow_opd speed        single-pass against stored-trajectory OPD, as a ratio within one run
    python -m bench.flow_opd step         OPD steps on the real shapes of SD3.5-M, or with --preset qwen-rl Qwen-Image
                                          (random weights, an accelerator): seconds, memory, model-FLOPs
                                          utilisation; flags of train.py may follow
    python -m bench.flow_opd overlap      what a slow reward costs an iteration, waited for and overlapped, in one run
    python -m bench.flow_opd judges       pointwise and pairwise reward models (Q Fig. 2) as a reward of GRPO
    python -m bench.flow_opd collateral   cosines between the tasks' policy gradients, tiny world, a minute (F Eq. 4)
    python -m bench.flow_opd learning     OPD, its estimators and GRPO-mix on the tiny world, three seeds, mean and std;
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
    script = Path(__file__).parents[1] / "tests" / "helpers" / "linear_gaussian.py"
    subprocess.run([sys.executable, script, "--trajectories", "400000"], check=True)


def speed(rounds: int = 5, warmup: int = 2) -> None:
    """Seconds of one OPD step, single-pass and stored, in turn: median of each and of the ratio pair by pair."""
    import settings
    import train
    from harness import load, rollout

    flags = ["--preset", "tiny", "--stage", "opd", "--out", "runs/bench-speed", "--no-resume", "--steps", "1000"]
    times: dict[bool, list[float]] = {True: [], False: []}
    s, _ = settings.parse(flags)
    prompts = load.load_prompts(s, "train", s.train_prompts, settings.task_list(s))
    run = load.student_run(s)
    experts = load.load_teachers(run.model, s)
    rows = rollout.rows_of(run, prompts, 0)
    for _ in range(warmup + rounds):
        for single in times:
            began = time.perf_counter()
            train.distil_step(run, rows, experts, stored=not single)
            run.update()
            times[single].append(time.perf_counter() - began)
    one, two = times[True][warmup:], times[False][warmup:]
    ratio = statistics.median(a / b for a, b in zip(one, two, strict=True))
    print("| OPD step | seconds (median) |\n|---|---:|")
    print(f"| single pass | {statistics.median(one):.2f} |\n| stored trajectory | {statistics.median(two):.2f} |")
    print(f"\nRatio, pair by pair: {ratio:.2f} ({len(rows)} trajectories, {rounds} rounds)")


# Dense bfloat16 FLOP/s of accelerators by a part of their name, as their makers state them.
CLIP_TOKENS = 77  # SD3: they stand before T5's in the text sequence
PICTURE_TOKENS = (392 // 28) ** 2  # Qwen-Image-Edit reads the source into its text, a token for each 28 x 28 pixels
PEAKS = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "B200": 2250e12}


def random_model(s, device, config: dict):
    """SD3.5 or Qwen-Image-Edit with this transformer, random weights and text: real shapes without a download."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler

    from models import qwen, sd3
    from models.flow import Cond
    from models.hub import TRANSFORMERS

    dtype, kind = getattr(torch, s.precision), TRANSFORMERS[config.get("_class_name", "SD3Transformer2DModel")]
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        transformer = kind(**{key: value for key, value in config.items() if key != "_class_name"})
        torch.set_default_dtype(before)
    transformer.requires_grad_(False).eval()
    if kind is TRANSFORMERS["SD3Transformer2DModel"]:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        model = sd3.SD35Model(Path(), transformer, scheduler, device, s.resolution, s.text_length)
    else:
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        sides = s.resolution, s.source_resolution or s.resolution
        name = "QwenImageEditPlusPipeline"
        model = qwen.QwenModel(Path(), name, transformer, scheduler, device, *sides, s.text_length)
        model.rescale = s.cfg_rescale
    model.precision = s.precision
    if s.gradient_checkpointing:
        model.transformer.enable_gradient_checkpointing()

    def encode(prompts, images=None):
        edits = images is not None
        tokens = torch.randn(len(prompts), text_tokens(s, config, edits), config["joint_attention_dim"], dtype=dtype)
        pooled = tokens[:, 0, :1].expand(-1, config.get("pooled_projection_dim", 1))
        source = torch.randn(len(prompts), config["out_channels"], *2 * (model.source_side // 8,)) if edits else None
        return Cond(tokens, pooled, None, source).to(device)

    model.encode = encode
    return model


def text_tokens(s, config: dict, edits: bool) -> int:
    """Tokens of a longest prompt; of an edit, the picture's too."""
    if "pooled_projection_dim" in config:  # SD3: CLIP's stand before T5's
        return CLIP_TOKENS + s.text_length
    return s.text_length + edits * PICTURE_TOKENS


def forward_flops(config: dict, resolution: int, text: int, source: int = 0) -> int:
    """FLOPs of one row's forward with so many text tokens, counted by torch on tensors without memory.

    source: pixels a side of an edit's source picture; 0: no edit.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from models.flow import Cond, FlowModel
    from models.hub import TRANSFORMERS
    from models.qwen import QwenFlow

    kind = TRANSFORMERS[config.get("_class_name", "SD3Transformer2DModel")]
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        transformer = kind(**{key: value for key, value in config.items() if key != "_class_name"})
        model = (FlowModel if "pooled_projection_dim" in config else QwenFlow)(transformer, "meta")
        tokens = torch.empty(1, text, config["joint_attention_dim"])
        channels = config["out_channels"]
        before = torch.empty(1, channels, source // 8, source // 8) if source else None
        cond = Cond(tokens, torch.empty(1, config.get("pooled_projection_dim", 1)), None, before)
        model._run(torch.empty(1, channels, resolution // 8, resolution // 8), torch.empty(1), cond)
    return counter.get_total_flops()


def random_run(s, device, config: dict):
    """(run, experts): a student and a LoRA teacher a task on `random_model`; MAR's anchor is one of the teachers."""
    from harness import ranks
    from harness.run import Run
    from models import lora as adapters

    model, lora = random_model(s, device, config), None
    if s.parameters == "full":
        model.train_fully(keep_base=True)
        ranks.shard(model, s)
    else:
        lora = adapters.lora_config(s.rank, s.alpha)
        model.add_adapter("student", lora)
    run = Run(s, model, lora)
    for task in s.teachers:
        model.add_adapter(f"teacher:{task}", adapters.lora_config(s.rank, s.alpha))
    anchor = {"anchor": f"teacher:{s.anchor}"} if s.mar > 0 else {}
    return run, {task: f"teacher:{task}" for task in s.teachers} | anchor


def step(*flags: str, config: dict | None = None, rounds: int = 3) -> dict[str, float]:
    """OPD steps on SD3.5-M's real configuration, or with --preset qwen-rl on Qwen-Image's, with random weights; one
    warm-up, then `rounds` that count. Of Q's two tasks half of the rows are edits.

    Model FLOPs count a forward as 1, a backward as 1 for a LoRA (no gradient of frozen weights) and as 2 for full
    parameters, and nothing for what gradient checkpointing computes again.
    """
    import torch

    import opd
    import settings
    import train
    from data.files import Prompt
    from harness import counting, plan, ranks, rollout
    from tiny import edits as tiny_edit

    s, _ = settings.parse(["--stage", "opd", "--no-resume", "--out", tempfile.mkdtemp(), *flags])
    device, tasks = ranks.start(s), settings.task_list(s)
    config = config or (plan.QWEN_IMAGE if "edit" in tasks else plan.SD35_MEDIUM)
    run, experts = random_run(s, device, config)
    picture = tiny_edit.make_prompts("edit", "train", 1)[0].metadata["image"]
    prompts = {t: [Prompt("a prompt", t, {"image": picture} if t == "edit" else {}, "bench")] for t in tasks}
    rows = rollout.rows_of(run, prompts, 0)
    seconds, cuda = [], device.type == "cuda"
    for _ in range(1 + rounds):
        began = time.perf_counter()
        train.distil_step(run, rows, experts, s.estimator in opd.NEEDS_FUTURE)
        run.update()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    size, backward = s.source_resolution or s.resolution, 2 if s.parameters == "full" else 1
    of = [forward_flops(config, s.resolution, text_tokens(s, config, t == "edit"), size * (t == "edit")) for t in tasks]
    counted = counting.forwards(s, train.distil)
    of_a_step = [(gradient, rows) for (moment, _, gradient), (_, rows) in counted.items() if moment == "step"]
    flops = sum(rows * statistics.mean(of) * (1 + backward * gradient) for gradient, rows in of_a_step)
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


def overlap(steps: int = 8, rounds: int = 3) -> dict[str, float]:
    """Seconds of a GRPO iteration with an instant reward, and with one as slow as the rollout, awaited or overlapped.

    The three take turns, so that the machine's other load meets them alike; medians over all steps but the first of
    each run, whose batch nothing was drawn ahead of.
    """
    import settings
    import train
    from harness import load, rollout
    from scorers import panel as scoring
    from tiny import drawings as tiny

    flags = ["--preset", "tiny", "--stage", "grpo", "--task", "text", "--out", "runs/bench-overlap", "--no-resume"]
    flags += ["--steps", str(steps), "--save-every", str(steps), "--eval-prompts", "0"]
    s, _ = settings.parse(flags)
    run = load.student_run(s)
    rows = rollout.rows_of(run, load.load_prompts(s, "train", s.train_prompts, ("text",)), 0)
    spent = []
    for _ in range(5):
        began = time.perf_counter()
        for part in rollout.micro_batches(rows, s.micro_batch):
            rollout.roll_out(run.model, part, s)
        spent.append(time.perf_counter() - began)
    latency = min(spent)  # a rollout's own time; the rest is the machine's other load
    build, real = scoring.build, tiny.scorer("ocr")

    def slow(images, prompts, sources=None):
        time.sleep(latency)
        return real.score(images, prompts, sources)

    times: dict[str, list[float]] = {"instant": [], "slow, awaited": [], "slow, overlapped": []}
    try:
        for _ in range(rounds):
            for name, seconds in times.items():
                scorer = real if name == "instant" else real._replace(score=slow)
                scoring.build = lambda *rest, scorer=scorer: scoring.Panel([scorer], {"default": {"ocr": 1.0}})
                if train.main([*flags, "--name", "run", *(["--overlap"] if "overlapped" in name else [])]):
                    raise SystemExit(2)
                lines = Path("runs/bench-overlap/run/metrics.jsonl").read_text().splitlines()
                seconds += [json.loads(line)["seconds"] for line in lines[1:-1]]
    finally:
        scoring.build = build
    found = {name: statistics.median(seconds) for name, seconds in times.items()}
    print(f"a rollout, and the slow reward's latency: {latency:.2f} s\n\n| reward | seconds (median) | ratio |")
    print("|---|---:|---:|")
    for name, seconds in found.items():
        print(f"| {name} | {seconds:.2f} | {seconds / found['instant']:.2f} |")
    return found


def judges(*steps: str) -> None:
    """Q Fig. 2's question: two reward models of one architecture, each as GRPO's reward, judged by the true rule.

    For every seed: train both on graded prints of the tiny world, then a quality teacher from the shipped base on each;
    the table has what the true rules say of its pictures. Finished runs are not repeated.
    """
    import train

    more = ["--steps", *steps] if steps else []
    table: dict[str, list[dict]] = {}
    for objective in ("pointwise", "pairwise"):
        for seed in SEEDS:
            folder, name = f"runs/bench-rm-{objective}-{seed}", f"bench-judged-{objective}-{seed}"
            flags = ["--preset", "tiny", "--stage", "reward", "--objective", objective, "--name", Path(folder).name]
            if train.main([*flags, "--seed", str(seed)]):
                raise SystemExit(2)
            recipe = Path(folder, "reward.json")
            scorer = {"kind": "trained", "model": folder}
            recipe.write_text(json.dumps({"scorers": {"judge": scorer}, "weights": {"default": {"judge": 1.0}}}))
            flags = ["--preset", "tiny", "--stage", "grpo", "--task", "quality", "--rewards", str(recipe), *more]
            if train.main([*flags, "--name", name, "--seed", str(seed)]):
                raise SystemExit(2)
            scores = json.loads(Path("runs", name, "results.json").read_text())[name]["scores"]
            rows = [json.loads(line) for line in Path("runs", name, "metrics.jsonl").read_text().splitlines()]
            ends = [statistics.mean(row["reward/judge"] for row in part) for part in (rows[:5], rows[-5:])]
            table.setdefault(objective, []).append(scores | dict(zip(("judge at first", "judge at last"), ends)))
    columns = [*COLUMNS, "judge at first", "judge at last"]
    print("\n| reward model | " + " | ".join(columns) + " |\n|---|" + "---:|" * len(columns))
    for objective, rows in table.items():
        print(f"| {objective} | " + " | ".join(spread([row[c] for row in rows]) for c in columns) + " |")


def collateral(prompts_per_step: str = "3") -> None:
    """F Eq. 4 on the tiny world: what a GRPO step on one task does to another, as cosines of policy gradients."""
    import torch

    import grpo
    import sde
    import settings
    from harness import load, rollout
    from scorers import panel as scoring

    advantages, scores = {}, {}
    for task in settings.FLOW_TASKS:
        flags = ["--preset", "tiny", "--stage", "grpo", "--task", task, "--prompts-per-step", prompts_per_step]
        s, _ = settings.parse([*flags, "--no-resume", "--out", tempfile.mkdtemp()])
        run, panel = load.student_run(s), load.panel_of(s)
        prompts = load.load_prompts(s, "train", s.train_prompts, (task,))
        rollout.prepare(run, prompts)
        rows = rollout.rows_of(run, prompts, 0)
        drawn, images = rollout.roll_out(run.model, rows, s)
        found = panel.ask(images, rollout.prompts_of(rows), s.group_size)
        advantages[task] = scoring.advantages(found, s.group_size, s.combine, s.advantage_std).flatten()  # A_1, (B,)
        log_prob_B = 0.0  # of a whole trajectory
        for old in drawn.path[: settings.window_of(s)[1]]:
            mean = sde.transition_mean(old, drawn.velocity(old.x, old.t), s.noise_level)
            log_prob_B = log_prob_B + sde.log_prob(old.x_next, mean, old.std, "sum")
        own = [p for p in run.model.transformer.parameters() if p.requires_grad]
        by_row = (torch.autograd.grad(log_prob, own, retain_graph=True) for log_prob in log_prob_B)
        scores[task] = torch.stack([torch.cat([g.flatten() for g in row]) for row in by_row])  # grad log pi, (B, M)
    gradients = {task: (advantages[task][:, None] * scores[task]).mean(0) for task in scores}  # grad J_k, (M,)
    print("| learned | " + " | ".join(scores) + " |\n|---|" + "---:|" * len(scores))
    for one in scores:
        impacts = [
            grpo.collateral_impact(gradients[k], advantages[one], scores[one]) / gradients[k].norm() for k in scores
        ]
        print(f"| {one} | " + " | ".join(f"{float(impact / gradients[one].norm()):+.2f}" for impact in impacts) + " |")


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
    jobs = {f.__name__: f for f in (estimators, speed, step, overlap, judges, collateral, learning)}
    if len(sys.argv) < 2 or sys.argv[1] not in jobs:
        print(f"usage: python -m bench.flow_opd {{{','.join(jobs)}}}", file=sys.stderr)
        sys.exit(2)
    jobs[sys.argv[1]](*sys.argv[2:])
