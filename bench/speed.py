"""Where do the speed figures in docs/RESULTS.md come from?

    python -m bench.speed passes    single-pass against stored-trajectory OPD, as a ratio within one run
    python -m bench.speed overlap   what a slow reward costs an iteration, waited for and overlapped, in one run
    python -m bench.speed step      OPD steps on SD3.5-M's real shapes, or with --preset qwen-rl on Qwen-Image-Edit's:
                                    random weights, no download; seconds, model-FLOPs utilisation, memory. Flags of
                                    train.py may follow

Things that are compared take turns in one run, so that the machine's other load meets them alike.
"""

import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch.utils.flop_counter import FlopCounterMode

import opd
import train
from bench.runs import parsed, run_job
from data.files import Prompt
from harness import counting, load, plan, ranks, rollout
from harness.run import Run
from models import hub, lora, qwen, sd3
from models.flow import Cond, FlowModel
from scorers import panel
from settings import Settings, size_of, task_list
from tiny import drawings, edits

# Dense bfloat16 FLOP/s of accelerators by a part of their name, as their makers state them.
PEAKS = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "B200": 2250e12}
CLIP_TOKENS = 77  # SD3: they stand before T5's in the text sequence
EDITOR = "QwenImageEditPlusPipeline"  # of Qwen-Image-Edit-2509 and later


def seconds_of(work: Callable) -> float:
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def passes(rounds: int = 5, warmup: int = 2) -> None:
    """Seconds of one OPD step, single pass and stored: medians, and the ratio pair by pair."""
    all_states = ["--stage", "opd", "--drawn-states", "0"]
    s = parsed("--preset", "tiny", *all_states, "--no-resume", "--out", tempfile.mkdtemp())
    prompts, run = load.load_prompts(s, "train", s.train_prompts, task_list(s)), load.student_run(s)
    experts, rows = load.load_teachers(run.model, s), rollout.rows_of(run, prompts, 0)

    def step(stored: bool) -> None:
        run.s = replace(s, estimator="path" if stored else "analytic")  # a path estimator stores the trajectory
        train.distil_step(run, rows, experts)

    pairs = [[seconds_of(lambda: step(stored)) for stored in (False, True)] for _ in range(warmup + rounds)]  # noqa: B023
    single, stored = zip(*pairs[warmup:], strict=True)
    ratio = statistics.median(a / b for a, b in pairs[warmup:])
    print("| OPD step | seconds (median) |\n|---|---:|")
    print(f"| single pass | {statistics.median(single):.2f} |\n| stored trajectory | {statistics.median(stored):.2f} |")
    print(f"\nRatio, pair by pair: {ratio:.2f} ({len(rows)} trajectories, {rounds} rounds)")


def overlap(steps: int = 8, rounds: int = 3) -> None:
    """Seconds of a GRPO iteration with an instant reward, and with one as slow as the rollout, awaited or overlapped.

    Medians over all steps but the first of each run, before which nothing was drawn ahead.
    """
    flags = ["--preset", "tiny", "--stage", "grpo", "--task", "text", "--out", "runs/bench-overlap", "--no-resume"]
    flags += ["--steps", str(steps), "--save-every", str(steps), "--eval-prompts", "0"]
    s = parsed(*flags)
    run = load.student_run(s)
    rows = rollout.rows_of(run, load.load_prompts(s, "train", s.train_prompts, ("text",)), 0)
    parts = rollout.micro_batches(rows, s.micro_batch)
    # A rollout's own time; the rest of each is the machine's other load.
    latency = min(seconds_of(lambda: [rollout.roll_out(run.model, part, s) for part in parts]) for _ in range(5))
    build, real = panel.build, drawings.scorer("ocr")

    def slow(images, prompts, sources=None):
        time.sleep(latency)
        return real.score(images, prompts, sources)

    times: dict[str, list[float]] = {"instant": [], "slow, awaited": [], "slow, overlapped": []}
    try:
        for _ in range(rounds):
            for name, seconds in times.items():
                scorer = real if name == "instant" else real._replace(score=slow)
                panel.build = lambda *_, scorer=scorer: panel.Panel([scorer], {"default": {"ocr": 1.0}})
                if train.main([*flags, "--name", "run", *(["--overlap"] if "overlapped" in name else [])]):
                    raise SystemExit(2)
                lines = Path("runs/bench-overlap/run/metrics.jsonl").read_text().splitlines()
                seconds += [json.loads(line)["seconds"] for line in lines[1:-1]]
    finally:
        panel.build = build
    found = {name: statistics.median(seconds) for name, seconds in times.items()}
    print(f"a rollout, and the slow reward's latency: {latency:.2f} s\n\n| reward | seconds (median) | ratio |")
    print("|---|---:|---:|")
    for name, seconds in found.items():
        print(f"| {name} | {seconds:.2f} | {seconds / found['instant']:.2f} |")


# ------------------------------------------------------------------------------------------ a step of real shapes
def transformer_of(config: dict, device: torch.device | str, dtype: torch.dtype) -> torch.nn.Module:
    """A transformer of this configuration with random weights."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device(device):
        transformer = hub.TRANSFORMERS[config["_class_name"]].from_config(config)
    torch.set_default_dtype(before)
    return transformer.requires_grad_(False).eval()


def text_tokens(s: Settings, config: dict, edit: bool) -> int:
    """Tokens of a longest prompt; of an edit, the picture's too."""
    if "pooled_projection_dim" in config:
        return CLIP_TOKENS + s.text_length
    return s.text_length + edit * qwen.picture_tokens(EDITOR)


def random_model(s: Settings, device: torch.device, config: dict) -> FlowModel:
    """SD3.5 or Qwen-Image-Edit with this transformer, random weights and random text."""
    dtype = getattr(torch, s.precision)
    transformer = transformer_of(config, device, dtype)
    if "pooled_projection_dim" in config:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        model = sd3.SD35Model(Path(), transformer, scheduler, device, size_of(s), s.text_length)
    else:
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        sides = size_of(s), s.source_resolution
        model = qwen.QwenModel(Path(), EDITOR, transformer, scheduler, device, *sides, s.text_length)
        model.rescale = s.cfg_rescale
    model.precision = s.precision
    if s.gradient_checkpointing:
        model.transformer.enable_gradient_checkpointing()
    if s.compile:
        model.compile()

    def encode(prompts, images=None):
        edit = any(images or ())
        tokens = torch.randn(len(prompts), text_tokens(s, config, edit), config["joint_attention_dim"], dtype=dtype)
        pooled = tokens[:, 0, :1].expand(-1, config.get("pooled_projection_dim", 1))
        sources = (torch.randn(len(prompts), *source_shape(s, config)),) if edit else ()
        return Cond(tokens, pooled, None, sources).to(device)

    model.encode = encode
    return model


def source_shape(s: Settings, config: dict) -> tuple[int, int, int]:
    """(C, H, W) of the latents of an edit's source picture, which is a square."""
    width, height = size_of(s)
    side = qwen.fitted(1.0, s.source_resolution**2 or width * height)[0] // 8
    return config["out_channels"], side, side


def forward_flops(config: dict, x: tuple[int, int, int], text: int, source: tuple[int, int, int] | None = None) -> int:
    """FLOPs of one row's forward with so many text tokens, counted by torch on tensors without memory.

    x, source: the shapes (C, H, W) of its latents and of those of an edit's source picture.
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        kind = FlowModel if "pooled_projection_dim" in config else qwen.QwenFlow
        model = kind(transformer_of(config, "meta", torch.float32), "meta")
        tokens, pooled = (torch.empty(1, *shape) for shape in ((text, config["joint_attention_dim"]),
                                                               (config.get("pooled_projection_dim", 1),)))  # fmt: skip
        cond = Cond(tokens, pooled, None, (torch.empty(1, *source),) if source else ())
        model._run(torch.empty(1, *x), torch.empty(1), cond)
    return counter.get_total_flops()


def random_run(s: Settings, device: torch.device, config: dict) -> tuple[Run, dict[str, str]]:
    """A student, a LoRA teacher for each task and MAR's anchor on `random_model`."""
    model, config_of_student = random_model(s, device, config), None
    if s.parameters == "full":
        model.train_fully(shard=ranks.sharding(s.parallel, s.precision, model.device))
    else:
        config_of_student = lora.lora_config(s.rank, s.alpha)
        model.add_adapter("student", config_of_student)
    run = Run(s, model, config_of_student)
    experts = {task: f"teacher:{task}" for task in s.teachers}
    if s.mar > 0:
        experts["anchor"] = experts.get(s.anchor, "anchor")
    for name in dict.fromkeys(experts.values()):
        model.add_adapter(name, lora.lora_config(s.rank, s.alpha))
    return run, experts


def step(*flags: str, config: dict | None = None, rounds: int = 3) -> dict[int, dict[str, float]]:
    """OPD steps with random weights, on all states (0) and on --drawn-states -> {states: its figures}.

    One warm-up, then `rounds` that count. Of Q's two tasks half the rows are edits. "Bare" is the time of the same
    transformer calls alone, forwards and backwards. Model FLOPs count a forward as 1, a backward as 1 for a LoRA (no
    gradient of frozen weights) and as 2 for full parameters, and nothing for what checkpointing computes again.
    """
    s = parsed("--stage", "opd", "--no-resume", "--out", tempfile.mkdtemp(), *flags)
    device, tasks = ranks.start(s), task_list(s)
    config = config or (plan.QWEN_IMAGE if "edit" in tasks else plan.SD35_MEDIUM)
    run, experts = random_run(s, device, config)
    picture = edits.make_prompts("edit", "train", 1)[0].metadata["image"]
    prompts = {t: [Prompt("a prompt", t, {"image": picture} if t == "edit" else {}, "bench")] for t in tasks}
    rows, cuda = rollout.rows_of(run, prompts, 0), device.type == "cuda"
    x, backward, before = run.model.latent_shape, 2 if s.parameters == "full" else 1, {"edit": source_shape(s, config)}
    of = [forward_flops(config, x, text_tokens(s, config, t == "edit"), before.get(t)) for t in tasks]
    name, found = torch.cuda.get_device_name(device) if cuda else "processor", {}
    bare = functools.cache(lambda count, learns: bare_seconds(run.model, prompts, count, learns, rounds))
    for drawn in dict.fromkeys((0, 0 if s.estimator in opd.NEEDS_FUTURE else s.drawn_states)):
        run.s = replace(s, drawn_states=drawn)
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        times = [seconds_of(lambda: train.distil_step(run, rows, experts)) for _ in range(1 + rounds)]
        peak = torch.cuda.max_memory_allocated(device) / 2**30 if cuda else 0.0
        counted = counting.forwards(run.s, train.distil)
        calls = [(learns, *of_them) for (moment, _, learns), of_them in counted.items() if moment == "step"]
        flops = sum(count * statistics.mean(of) * (1 + backward * learns) for learns, _, count in calls)
        alone = sum(n * bare(round(count / n), learns) for learns, n, count in calls)
        seconds = statistics.median(times[1:])
        found[drawn] = {"seconds": seconds, "bare": alone, "flops": flops, "memory": peak}
        said = f"{name}, {len(rows)} trajectories a step and rank, {drawn or 'all'} of their states: "
        said += f"{seconds:.2f} s a step (of {rounds}, median), {seconds / alone:.2f} of its bare calls, "
        said += f"{flops / seconds / 1e12:.3g} TFLOP/s"
        for part, most in PEAKS.items():
            said += f", utilisation {flops / seconds / most:.2f} of {most / 1e12:.0f}" if part in name else ""
        print(said + (f", peak memory {peak:.1f} GiB" if cuda else ""), flush=True)
    return found


def bare_seconds(model: FlowModel, prompts: dict[str, list[Prompt]], count: int, learns: bool, rounds: int) -> float:
    """Seconds of one forward of so many rows, and of its backward if it learns: the mean over tasks of medians."""
    found = []
    for (p,) in prompts.values():
        cond = model.encode([p.text] * count, [p.metadata.get("image")] * count)
        x, t = torch.randn(count, *model.latent_shape).to(model.device), torch.full((count,), 0.5, device=model.device)

        def call(x=x, t=t, cond=cond) -> None:
            with torch.set_grad_enabled(learns):
                v = model._forward(x, t, cond)
            if learns:
                v.sum().backward()

        found.append(statistics.median([seconds_of(call) for _ in range(1 + rounds)][1:]))
    return statistics.mean(found)


if __name__ == "__main__":
    run_job("speed", passes, overlap, step)
