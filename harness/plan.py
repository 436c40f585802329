"""What will this command do, and will it fit?

`--dry-run` answers without loading a model, in a fraction of a second; the numbers are `cost.py`'s. `--help` and a
wrong flag are answered as early.
"""

import contextlib
import io
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import settings
from harness.cost import (
    GIB,
    SCORED,
    SPARE,
    TAUGHT,
    Base,
    anchor_of,
    base_of,
    doubled,
    edits,
    expert,
    experts_of,
    forwards,
    fully,
    groups,
    is_hybrid,
    is_ode,
    is_single_pass,
    judge_bytes,
    judges,
    last_step,
    memory,
    number_bytes,
    rows_in_step,
    trained_parameters,
    trained_steps,
    trained_tasks,
)
from rewards import RewardError
from scorers import registry
from settings import (
    Settings,
    SettingsError,
    is_tiny,
    parts_of,
    student_cfg,
    task_list,
    teacher_cfg,
    test_tasks,
    trained_cfg,
    window_of,
)


def answer_early(argv: list[str], prog: str) -> None:
    """Answer --help, --dry-run and a wrong flag at once, before the caller spends seconds on importing torch.

    Exits with 0 or, after one line on stderr, with 2; returns where there is work to do. Of torchrun's ranks only
    the first speaks.
    """
    with contextlib.ExitStack() as stack:
        if int(os.environ.get("RANK", "0")) > 0:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        try:
            s, _ = settings.parse(argv, prog)
            registry.read(s.rewards, settings.rewarded_tasks(s), is_tiny(s))
            if s.dry_run:
                print(describe(s, prog=prog))
                sys.exit(0)
        except (SettingsError, RewardError) as fault:
            print(f"error: {fault}", file=sys.stderr)
            sys.exit(2)


def _size(number: float) -> str:
    return f"{number / GIB:.2f} GiB" if number >= GIB / 10 else f"{number / 2**20:.2f} MiB"


def verdict(s: Settings, total: int) -> str:
    """Does it fit? One sentence, with a tenth to spare."""
    if total * SPARE <= 24 * GIB:
        return "fits one 24 GiB accelerator"
    if total * SPARE <= 80 * GIB:
        return "needs more than 24 GiB: one 80 GiB accelerator a rank"
    near = [judge for judge in judges(s).values() if judge_bytes(judge)]
    ways = {
        "judges in bfloat16 (--rewards FILE)": any(judge.dtype == "float32" for judge in near),
        "judges behind endpoints (--rewards FILE)": bool(near),
        "--gradient-checkpointing": not s.gradient_checkpointing, "--micro-batch 1": s.micro_batch != 1,
        "--precision bfloat16": s.precision != "bfloat16", "--parameters lora": fully(s),
        "--parallel fsdp on more ranks": fully(s), "a smaller --resolution": True,
    }  # fmt: skip
    return "needs more than 80 GiB a rank: try " + " or ".join(way for way, helps in ways.items() if helps)


def runs_of(s: Settings) -> list[str]:
    """Names of the runs that the command makes, in their order; the parts of a larger plan have their own."""
    tasks = task_list(s)
    if s.stage == "all":
        each = {"grpo": [f"grpo-{task}" for task in tasks]}
        parts = [name for part in parts_of(s) for name in each.get(part, [part])]
        return [*(f"{s.name}-{part}" for part in parts), s.name]
    return [f"{s.name}-{task}" for task in tasks] if s.stage in TAUGHT and not s.task else [s.name]


def _standing(s: Settings, folder: Path) -> str:
    """Whether a run's folder exists, and where it would go on."""
    if not folder.exists():
        return "new"
    if s.stage in ("eval", "merge"):
        return "exists, is written anew"
    if not s.resume:
        return "exists, --no-resume removes it first"
    step = last_step(folder)
    return "exists without a checkpoint, starts at step 0" if step is None else f"exists, continues from step {step}"


def describe(s: Settings, world: int | None = None, local: int | None = None, prog: str = "train.py") -> str:
    """What the run would do: the resolved settings as JSON, then lines of a label and a text. Nothing is written.

    world, local: ranks in all and on a node, without them torchrun's own. Raises SettingsError, one line, for a
    checkpoint that is there and cannot be read.
    """
    world = world or int(os.environ.get("WORLD_SIZE", "1"))
    local = local or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    resolved, s = json.dumps(asdict(s), indent=1), s
    base = base_of(s)
    lines = [("run", f"{Path(s.out) / name}: {_standing(s, Path(s.out) / name)}") for name in runs_of(s)]
    lines += _model_lines(s, base)
    if s.stage == "all":
        lines.append(("numbers", "each part has its own preset: ask with --stage STAGE --dry-run"))
    else:
        lines += [*_step_lines(s, world), *_drawing_lines(s), *_cost_lines(s, base, world, local)]
    return "\n".join([resolved, *(f"{label:<21} {text}" for label, text in lines)])


def _model_lines(s: Settings, base: Base | None) -> list[tuple[str, str]]:
    """The model, the student and every expert."""
    if base:
        c = base.config
        shape = f"{c['num_layers']} blocks, {c['num_attention_heads']} heads of {c['attention_head_dim']}"
        image, text = base.tokens()
        tokens = f"{image} image and {text} text tokens"
        if edits(s):
            image, text = base.tokens(edit=True)
            tokens += f"; an edit: {image} and {text}"
        billions = f"{base.parameters / 1e9:.3f} billion parameters ({base.parameters:,})"
        lines = [("model", f"{s.model}: {base.note}"), ("transformer", f"{billions}, {shape}; {tokens}")]
    else:
        lines = [("model", f"{s.model}: MISSING, no transformer/config.json there; no memory can be foretold")]
    init = expert(s.init, base, s.rank) if s.init else None
    start = f", from {s.init}: {init.note}" if init else ""
    student = f"the whole transformer in float32, {s.parallel}{start}" if fully(s) else f"a LoRA{start}"
    if not fully(s) and not init:
        student = f"a new LoRA of rank {s.rank}, alpha {s.alpha:g}"
    if not fully(s) and init and init.kind == "full":
        student = f"REFUSED: --init {s.init} is a full checkpoint; use --parameters full, or give it as --model"
    if s.stage == "merge":
        student = f"the teachers merged by {s.merge_method}, no training"
    if s.stage not in ("eval", "all"):
        lines.append(("student", student))
    for name, e in experts_of(s, base).items():
        lines.append((name, f"{e.where}: {e.note}" + (f", {e.parameters:,} parameters" if e.parameters else "")))
    if anchor_of(s) not in ("", "anchor"):
        lines.append(("anchor", anchor_of(s)))
    if "edit" in trained_tasks(s) and "edit" not in test_tasks(s):
        lines.append(("prompts", "edit: MISSING, edits need source pictures: --prompts edit=FILE.jsonl"))
    return lines


def _step_lines(s: Settings, world: int) -> list[tuple[str, str]]:
    """Batch arithmetic, objective and forwards of a step."""
    rows, parts, most = rows_in_step(s)
    lines, total = [], f"{world * rows:,} a step, {s.steps * world * rows:,} in {s.steps} steps"
    micro = f"{parts} micro-batches a rank of at most {most}"
    if s.stage in ("pretrain", "sft"):
        lines.append(("batch", f"ranks {world} x images {s.batch_size} = {total}; {micro}"))
    if s.stage == "curate":
        shape = f"{world} ranks, prompts {s.prompts_per_step} x group {s.group_size} at a time, {s.num_steps} steps"
        lines.append(("batch", f"{shape}; kept: a range above {s.threshold:g}; {micro}"))
    if s.stage in (*TAUGHT, "opd"):
        shape = f"ranks {world} x prompts {s.prompts_per_step} x group {s.group_size}"
        lines.append(("batch", f"{shape} = trajectories {total}; {micro}"))
        lines.append(("groups", "a rank: " + ", ".join(f"{count} of {task}" for task, count in groups(s).items())))
        if s.task == "mix":
            order = "in every step (Q 4.3's Mix-RL)" if s.mix == "joint" else "in turns (F's GRPO-mix)"
            lines.append(("tasks", f"{', '.join(task_list(s))}, {order}"))
        start, stop = window_of(s)
        noisy = f"{start}..{stop - 1} stochastic ({s.kernel}, level {s.noise_level:g})"
        trained = f"{trained_steps(s)} trained ({s.train_steps})"
        lines.append(("rollout", f"{s.num_steps} steps, {'an ODE' if is_ode(s) else noisy}, {trained}"))
    lines += _objective_lines(s)
    for w in forwards(s):
        gradient = "with gradient" if w.gradient else "without gradient"
        lines.append(("forwards", f"a step and rank, {w.who}, {gradient}: forwards {w.forwards:,}, rows {w.rows:,}"))
    return lines


def _objective_lines(s: Settings) -> list[tuple[str, str]]:
    """What is guided, what is learnt, and from whom."""
    lines = [("guidance", guidance(s))] if s.stage in ("opd", *SCORED) else []
    if s.stage == "grpo":
        lines.append(("objective", f"GRPO, {s.updates} updates a step, KL to the base {s.beta:g}"))
    if s.stage == "nft":
        said = f"DiffusionNFT, strength {s.interpolation:g}, distance to the base {s.beta:g}"
        lines.append(("objective", f"{said}, {s.updates} updates a step"))
    if s.stage == "opd":
        way = "single pass" if is_single_pass(s) else "stored trajectories"
        lines.append(("objective", f"{s.estimator}, {way}, MAR {s.mar:g}"))
    if s.stage not in SCORED:
        return lines
    asked = registry.read(s.rewards, settings.rewarded_tasks(s), is_tiny(s))
    for category, row in asked.weights.items():
        paid = " + ".join(f"{weight:g} {name}" for name, weight in row.items())
        lines.append(("reward", f"{category}: {paid}" + (f", {s.combine}" if len(row) > 1 else "")))
    for name, entry in asked.scorers.items():
        options = ", ".join(f"{key} {value}" for key, value in entry.items())
        lines.append(("scorer", f"{name}: {options}" + (", only watched" if name in asked.watch else "")))
    for name, judge in judges(s).items():
        billions = f"{judge.parameters / 1e9:.2f} billion parameters" if judge.parameters else "of unknown size"
        place = f"on {judge.device}" if judge.device else "on the run's own accelerator"
        size = f", {_size(judge_bytes(judge))} a rank" if judge_bytes(judge) else ", not counted"
        lines.append(("judge", f"{name}: {judge.model}, {billions}, {judge.dtype}, {place}{size}"))
    return lines


def guidance(s: Settings) -> str:
    """The guidance strategy in words: the scale of each part of the stage, or none."""
    places = {"of the teachers": teacher_cfg(s), "of the student": student_cfg(s)}
    if s.stage in SCORED:
        places = {"in the rollout": student_cfg(s), "in the objective": trained_cfg(s)}
    if s.stage == "curate":
        places.pop("in the objective")
    scales = {place: "none" if cfg == 1 else f"{cfg:g}" for place, cfg in places.items()}
    if len(set(scales.values())) == 1:
        told = f"{next(iter(scales.values()))} {' and '.join(scales)}"
    else:
        told = ", ".join(f"{scale} {place}" for place, scale in scales.items())
    rescaled = ", rescaled to the norm with the prompt" if s.cfg_rescale and set(scales.values()) != {"none"} else ""
    return told + rescaled + (", the branches one after the other" if is_hybrid(s) else "")


def _drawing_lines(s: Settings) -> list[tuple[str, str]]:
    """What is drawn outside of the steps, shared among the ranks."""
    lines, pictures = [], s.eval_prompts * len(test_tasks(s))
    own, theirs = s.eval_steps * doubled(student_cfg(s)), s.eval_steps * doubled(teacher_cfg(s))  # rows of a picture
    if s.stage == "sft":
        images = -(-s.sft_images // len(task_list(s))) * len(task_list(s))
        lines.append(("drawing", f"before the first step: {images} images of the teachers, {images * theirs:,} rows"))
    tests, rows = pictures, pictures * own
    if s.stage == "eval":  # the base, the teachers, and the students to compare
        tests = pictures * (1 + len(s.teachers) + len(s.compare))
        rows = pictures * ((1 + len(s.teachers)) * theirs + len(s.compare) * own)
    lines.append(("drawing", f"in the end: {tests} test pictures, {rows:,} rows"))
    return lines


def _cost_lines(s: Settings, base: Base | None, world: int, local: int) -> list[tuple[str, str]]:
    """Memory, and where everything goes."""
    lines, each = [], ""
    if base:
        experts = experts_of(s, base)
        n = trained_parameters(s, base, expert(s.init, base, s.rank) if s.init else None, experts)
        found = memory(s, base, experts, n, world, local)
        lines.append(("trained", f"{n:,} parameters"))
        lines += [("memory", f"{name}: {_size(value)}") for name, value in found.parts.items()]
        for name, value in found.moments.items():
            lines.append(("moment", f"{name}: {_size(value)}{', the largest' if name == found.largest else ''}"))
        sentence = f"{_size(found.total)} a rank with the largest moment, an estimate: {verdict(s, found.total)}"
        lines.append(("memory", sentence))
        lines += [("host memory", f"{k}: {_size(v)} a rank, {_size(v * local)} a node") for k, v in found.host.items()]
        # The exported weights (a LoRA in float32, in PEFT's and in diffusers' layout; a transformer in b bytes a
        # number), and to go on from: weights, their average and two moments in float32.
        export = number_bytes(s) * n if fully(s) else 4 * n * (1 if is_tiny(s) else 2)
        each = f", about {_size(export + (8 if s.stage == 'merge' else 16) * n)} each"
    for folder in (Path(s.out) / name for name in runs_of(s)):
        if s.stage == "curate":
            lines.append(("writes", f"{folder}: config.json, ranges/*.jsonl, prompts/TASK/, curation.md"))
            continue
        if s.stage == "eval":
            lines.append(("writes", f"{folder}: report.md, results.json, samples/*.png"))
            continue
        board = "TensorBoard and Weights & Biases" if s.wandb else "TensorBoard"
        lines.append(("writes", f"{folder}: config.json, metrics.jsonl, {board}, samples/*.png, report.md"))
        often = f"every {s.save_every} steps, the newest {s.keep} kept" if s.stage != "merge" else "once"
        lines.append(("checkpoints", f"{folder}/checkpoints/step-NNNNNN, {often}{each}"))
    return lines
