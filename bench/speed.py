"""Where do the speed figures in docs/RESULTS.md come from?

    python -m bench.speed overlap   what a slow reward costs an iteration, waited for and overlapped, in one run
    python -m bench.speed step      OPD steps on SD3.5-M's real shapes, with --preset qwen-rl on Qwen-Image-2.1's, also
                                    without its kept prefixes, or on those of another --model: random weights, no
                                    download; seconds, model-FLOPs utilisation, memory. Flags of train.py may follow

Things that are compared take turns in one run, so that the machine's other load meets them alike.
"""

import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch.utils.flop_counter import FlopCounterMode

import opd
import train
from bench.runs import parsed, run_job, table
from data.files import Prompt
from data.pictures import places
from harness import counting, load, plan, ranks, rollout
from harness.run import Run
from models import hub, lora, qwen, qwen21, sd3
from models import load as models
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


def overlap(steps: int = 8, rounds: int = 3) -> None:
    """Seconds of a GRPO iteration with an instant reward, and with one as slow as the rollout, awaited or overlapped.

    Medians over all steps but the first of each run, before which nothing was drawn ahead.
    """
    flags = ["--preset", "tiny", "--stage", "grpo", "--task", "text", "--out", "runs/bench-overlap", "--no-resume"]
    flags += ["--steps", str(steps), "--save-every", str(steps), "--eval-prompts", "0"]
    s = parsed(*flags)
    run = load.student_run(s)
    rows = rollout.rows_of(run, load.load_prompts(s, "train", s.train_prompts, ("text",)), 0)
    parts = rollout.micro_batches(run.model, rows, s.micro_batch)
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
    print(f"a rollout, and the slow reward's latency: {latency:.2f} s; medians")
    table({name: [{"seconds": s, "ratio": s / found["instant"]}] for name, s in found.items()}, ("seconds", "ratio"))


# ------------------------------------------------------------------------------------------ a step of real shapes
def transformer_of(config: dict, device: torch.device | str, dtype: torch.dtype) -> torch.nn.Module:
    """A transformer of this configuration with random weights."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device(device):
        transformer = hub.TRANSFORMERS[config["_class_name"]].from_config(config)
    torch.set_default_dtype(before)
    return transformer.requires_grad_(False).eval()


def is_21(config: dict) -> bool:
    return config["_class_name"] == plan.QWEN_IMAGE_21["_class_name"]


def random_cond(s: Settings, config: dict, rows: int, edit: bool, device: torch.device | str) -> Cond:
    """Conditioning of random numbers: of the longest text and, for an edit, of one picture."""
    width, height = size_of(s)
    side = qwen.fitted(1.0, s.source_resolution**2 or width * height)[0]  # of the source picture, a square
    text, slots = s.text_length, None
    if "pooled_projection_dim" in config:
        text += CLIP_TOKENS
    of_one = (side // qwen21.SLOT) ** 2 if is_21(config) else qwen.picture_tokens(EDITOR)
    picture = of_one * edit  # tokens in the text
    if is_21(config):  # on the CPU where there are no numbers: they say how long the sequence is
        slots = torch.zeros(rows, text + picture, dtype=torch.bool, device="cpu" if device == "meta" else device)
        slots[:, :picture] = True
    channels = config["context_in_dim" if is_21(config) else "joint_attention_dim"]
    tokens = torch.randn(rows, text + picture, channels, dtype=getattr(torch, s.precision), device=device)
    pooled = tokens[:, 0, :1].expand(-1, config.get("pooled_projection_dim", 1))
    source = torch.randn(rows, *latents_of(config, (side, side)), device=device)
    return Cond(tokens, pooled, None, (source,) * edit, slots)


def latents_of(config: dict, size: tuple[int, int]) -> tuple[int, int, int]:
    """(C, H, W) of a picture of (width, height) pixels."""
    side = 16 if is_21(config) else 8
    return config["out_channels"], size[1] // side, size[0] // side


def random_model(s: Settings, device: torch.device, config: dict) -> FlowModel:
    """A published model with this transformer, random weights and random text."""
    parts = Path(), transformer_of(config, device, getattr(torch, s.precision))
    if "pooled_projection_dim" in config:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        model = sd3.SD35Model(*parts, scheduler, device, size_of(s), s.text_length)
    else:
        parts += FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), device
        parts += size_of(s), s.source_resolution, s.text_length
        model = qwen21.Qwen21Model(*parts) if is_21(config) else qwen.QwenModel(EDITOR, *parts)
        model.rescale = s.cfg_rescale
    model.precision = s.precision
    if s.gradient_checkpointing:
        model.transformer.enable_gradient_checkpointing()
    if s.compile:
        model.compile()
    model.encode = lambda prompts, images=None: random_cond(s, config, len(prompts), any(images or ()), device)
    model.tokens = lambda prompt, pictures: 0  # all texts have one length
    return model


def forward_flops(s: Settings, config: dict, edit: bool = False, known: bool = False) -> int:
    """FLOPs of one row's forward with the longest text, counted by torch on tensors without memory.

    known: the keys and values of text and source are known already (Qwen-Image-2.1).
    """

    def on_meta(module, args, kwargs):  # 2.1's masks have numbers
        moved = ({k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in some.items()}
                 for some in (dict(enumerate(args)), kwargs))  # fmt: skip
        return tuple(next(moved).values()), next(moved)

    with torch.device("meta"), torch.no_grad():
        model = models.FLOWS[config["_class_name"]](transformer_of(config, "meta", torch.float32), "meta")
        for part in (*model.transformer.transformer_blocks, model.transformer.norm_out):
            part.register_forward_pre_hook(on_meta, with_kwargs=True)
        x, t = torch.empty(1, *latents_of(config, size_of(s))), torch.empty(1)
        cond = random_cond(replace(s, precision="float32"), config, 1, edit, "meta")
        cond = cond._replace(kept={} if known else None)
        for _ in range(1 + known):
            with FlopCounterMode(display=False) as counter:
                model._run(x, t, cond)
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


def step(*flags: str, config: dict | None = None, rounds: int = 3) -> list[dict]:
    """OPD steps with random weights, on all states (0) and on --drawn-states -> their figures.

    One warm-up, then `rounds` that count. Of Q's two tasks half the rows are edits. A model that keeps prefixes is
    timed without that, too. "Bare" is the time of the same transformer calls alone, forwards and backwards, all of
    them whole. Model FLOPs count a forward as 1, a backward as 1 for a LoRA (no gradient of frozen weights) and as 2
    for full parameters, and nothing for what checkpointing computes again.
    """
    s = parsed("--stage", "opd", "--no-resume", "--out", tempfile.mkdtemp(), *flags)
    device, tasks = ranks.start(s), task_list(s)
    config = config or plan.transformer_config(s.model)
    run, experts = random_run(s, device, config)
    picture = edits.make_prompts("edit", "train", 1)[0].metadata["image"]
    prompts = {t: [Prompt("a prompt", t, {"image": picture} if t == "edit" else {}, "bench")] for t in tasks}
    rows, cuda = rollout.rows_of(run, prompts, 0), device.type == "cuda"
    backward, keeps = 2 if s.parameters == "full" else 1, run.model.keeps_prefix
    # FLOPs of a row's forward: of a whole one, and of one whose prefix is known
    whole, rest = (
        statistics.mean(forward_flops(s, config, t == "edit", known) for t in tasks) for known in (False, keeps)
    )
    name, found = torch.cuda.get_device_name(device) if cuda else "processor", []
    bare = functools.cache(lambda count, learns: bare_seconds(run.model, prompts, count, learns, rounds))
    states = dict.fromkeys((0, 0 if s.estimator in opd.NEEDS_FUTURE else s.drawn_states))
    for drawn, kept in product(states, dict.fromkeys((keeps, False))):
        run.s, run.model.keeps_prefix = replace(s, drawn_states=drawn), kept
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        times = [seconds_of(lambda: train.distil_step(run, rows, experts)) for _ in range(1 + rounds)]
        peak = torch.cuda.max_memory_allocated(device) / 2**30 if cuda else 0.0
        counted = counting.forwards(run.s, train.distil, run.model)
        calls = [(learns, *of_them) for (moment, _, learns), of_them in counted.items() if moment == "step"]
        flops = sum(((n - known) * whole + known * rest) * (1 + backward * learns) for learns, _, n, known in calls)
        alone = sum(n * bare(round(count / n), learns) for learns, n, count, _ in calls)
        seconds = statistics.median(times[1:])
        found.append({"states": drawn, "kept": kept, "seconds": seconds, "bare": alone, "flops": flops, "memory": peak})
        said = f"{name}, {len(rows)} trajectories a step and rank, {drawn or 'all'} of their states: "
        said += f"{'prefixes kept, ' if kept else 'every forward whole, ' if keeps else ''}{flops / 1e12:.4g} TFLOP, "
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
        cond = model.encode([p.text] * count, [places(p)] * count)
        x, t = torch.randn(count, *model.latent_shape).to(model.device), torch.full((count,), 0.5, device=model.device)

        def call(x=x, t=t, cond=cond) -> None:
            with torch.set_grad_enabled(learns):
                v = model._forward(x, t, cond)
            if learns:
                v.sum().backward()

        found.append(statistics.median([seconds_of(call) for _ in range(1 + rounds)][1:]))
    return statistics.mean(found)


if __name__ == "__main__":
    run_job("speed", overlap, step)
