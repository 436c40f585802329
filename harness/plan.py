"""What will a command do, what does it need, and what is missing? `--dry-run` answers and loads no weights.

The forwards of a step are counted by the stage's own loop (harness/counting.py), parameters on torch's meta device,
from a local config or the published one. Exit code 2 if something is missing. What the Hub has is no fault: it is
fetched when the run starts.
"""

import contextlib
import re
import threading
import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path

import huggingface_hub
import torch

import rewards
import settings
from data import preferences
from data.common import first_line
from data.files import DataError
from harness import load, ownership, ranks, rollout, suites
from harness.counting import forwards
from models import flow, hub, lora, tiny
from models import load as models
from models.experts import STUDENT
from scorers import registry
from settings import RL, Settings, SettingsError, is_tiny, student_cfg, task_list, teacher_cfg, trained_cfg

GIB = 1 << 30
# The transformers as published, for a Hub id that is not in the cache: of SD3.5-M, of Qwen-Image and its editors, of
# Qwen-Image-2.1.
SD35_MEDIUM = {
    "_class_name": "SD3Transformer2DModel", "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16,
    "num_layers": 24, "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096,
    "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 384, "qk_norm": "rms_norm",
    "dual_attention_layers": tuple(range(13)),
}  # fmt: skip
QWEN_IMAGE = {
    "_class_name": "QwenImageTransformer2DModel", "patch_size": 2, "in_channels": 64, "out_channels": 16,
    "num_layers": 60, "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 3584,
    "axes_dims_rope": (16, 56, 56), "guidance_embeds": False,
}  # fmt: skip
QWEN_IMAGE_21 = {
    "_class_name": "QwenImage21Transformer2DModel", "patch_size": 1, "in_channels": 64, "out_channels": 64,
    "num_layers": 32, "attention_head_dim": 128, "num_attention_heads": 32, "context_in_dim": 4096, "mlp_ratio": 3,
    "axes_dims_rope": (16, 56, 56), "causal_condition": True,
}  # fmt: skip
PUBLISHED = {"Qwen-Image-2.1": QWEN_IMAGE_21, "Qwen": QWEN_IMAGE}  # by a part of the id; else SD3.5-M
# Bytes of a trained number: the weight, its average, its gradient and AdamW's two moments, all float32.
TRAINED_BYTES = 5 * 4


# ----------------------------------------------------------------------------------- parameters, on the meta device
def base_of(s: Settings) -> flow.FlowModel:
    """The run's base without weights: every tensor has its shape and is on the meta device.

    ModelError for a folder that holds no transformer that is known here.
    """
    if s.stage == "pretrain":
        with torch.device("meta"):
            return tiny.new_tiny(s.seed, device="meta", qwen="edit" in task_list(s))
    config = transformer_config(s.model)
    return models.FLOWS[config["_class_name"]](hub.empty_transformer(config), "meta")


def transformer_config(where: str) -> dict:
    """The config of a model's transformer: of a folder, of the Hub's cache, or as published."""
    if repo := hub.hub_id(where):
        revision = hub.base_and_revision(where)[1] or None
        file = huggingface_hub.try_to_load_from_cache(repo, "transformer/config.json", revision=revision)
        if not isinstance(file, str):
            return next((config for part, config in PUBLISHED.items() if part in repo), SD35_MEDIUM)
        return hub.transformer_config(Path(file).parent)
    return hub.transformer_config(hub.locate(where))


def trained_numbers(s: Settings, base: flow.FlowModel) -> int:
    """How many numbers train. It puts the student on the base."""
    if s.stage in ("curate", "merge", "eval"):
        return 0
    if s.stage != "pretrain" and s.parameters == "full":
        base.train_fully(keep_base=False)
    elif s.stage != "pretrain":
        config = lora.lora_config(s.rank, s.alpha)
        if s.init and not hub.hub_id(s.init):
            config = base.read_adapter(hub.locate(s.init))[1]
        base.add_adapter(STUDENT, config)
    return numbers(base.trainable().values())


def numbers(tensors) -> int:
    return sum(tensor.numel() for tensor in tensors)


# --------------------------------------------------------------------------------------------------- what is needed
def cached(where: str, patterns: Sequence[str]) -> bool:
    """Is a Hub id in the local cache?"""
    revision = hub.base_and_revision(where)[1] or None
    try:
        huggingface_hub.snapshot_download(
            hub.hub_id(where), revision=revision, allow_patterns=list(patterns), local_files_only=True
        )
    except Exception:
        return False
    return True


def download_sizes(wanted: Mapping[str, Sequence[str]], seconds: float = 4.0) -> dict[str, int]:
    """Bytes of the files that match, by Hub id, as far as the Hub answers within some seconds in all.

    Nothing is asked if HF_HUB_OFFLINE is set, or once a question has failed.
    """
    found: dict[str, int] = {}

    def ask() -> None:
        with contextlib.suppress(Exception):  # whatever it is, a plan does without sizes
            for where, patterns in wanted.items():
                revision = hub.base_and_revision(where)[1] or None
                about = huggingface_hub.HfApi().model_info(
                    hub.hub_id(where), revision=revision, files_metadata=True, timeout=seconds
                )
                files = [f for f in about.siblings if any(fnmatch(f.rfilename, pattern) for pattern in patterns)]
                found[where] = sum(f.size or 0 for f in files)

    if not huggingface_hub.constants.is_offline_mode():
        thread = threading.Thread(target=ask, daemon=True)  # a name server that does not answer would hold us longer
        thread.start()
        thread.join(seconds)
    return dict(found)


def lacking(extra: str) -> list[str]:
    """Packages of an extra of pyproject.toml that are not installed."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    names = [re.match(r"[\w.-]+", line)[0] for line in project["optional-dependencies"][extra]]
    return [name for name in names if not any(True for _ in metadata.distributions(name=name))]


def missing(s: Settings) -> list[str]:
    """What the run would stop for, in words: paths, prompt files, scorers' options, and packages of an extra."""
    found, extras = [], ["wandb"] if s.wandb else []
    asked = load.asked_of(s) if s.rewards or s.stage in ("curate", *RL) else None
    if s.stage == "eval":
        asked = suites.asked_of(s)
    if asked:
        needs = {"ocr": "ocr", "geneval": "geneval", "face": "face", "blipvqa": "compbench"}
        extras += [needs[e["kind"]] for e in asked.scorers.values() if e["kind"] in needs]

    def attempt(work: Callable, *arguments) -> None:
        try:
            work(*arguments)
        except (SettingsError, DataError, hub.ModelError, rewards.RewardError) as fault:
            found.append(first_line(fault))

    tasks = task_list(s)
    if s.stage in (*settings.ROLLOUT, "sft"):
        attempt(load.load_prompts, s, "train", 8, [s.task] if s.task in tasks else tasks)
    if s.eval_prompts and s.stage in settings.SHOWN:
        attempt(load.test_prompts, replace(s, eval_prompts=min(s.eval_prompts, 8)))
    if asked:
        attempt(registry.check, asked)
    if s.data:
        attempt(preferences.read, s.data, s.objective)
    for extra in dict.fromkeys(extras) if not is_tiny(s) or s.wandb else ():
        if names := lacking(extra):
            found.append(f"{', '.join(names)}: pip install -e '.[{extra}]'")
    return found


# --------------------------------------------------------------------------------------------------------- the text
def show(s: Settings, loops: Mapping[str, Callable], parts: Sequence[Settings] = ()) -> int:
    """Print the plan, on rank 0 -> the exit code: 2 if something is missing. As `describe`."""
    if ranks.rank_and_world()[0] > 0:
        return 0
    text, lost = describe(s, loops, parts)
    print(text)
    return 2 if lost else 0


def describe(s: Settings, loops: Mapping[str, Callable], parts: Sequence[Settings] = ()) -> tuple[str, list[str]]:
    """(lines of a label and a text, what is missing). Nothing is written, and no weights are loaded.

    loops: the loop of each stage that has one, as train.py has it: (settings, load) -> anything.
    parts: the runs that the command starts, if they are others than s (`cli.parts`).
    """
    lines, lost = [], [fault for part in parts or [s] for fault in missing(part)]
    if s.stage == "all":
        lines = [("runs", ", ".join(part.name for part in parts) + f", {s.name}"),
                 ("numbers", "ask for each part, --stage STAGE --dry-run")]  # fmt: skip
        made = settings.decided_by(s)  # of which there is nothing to find yet
        wanted = [item for part in parts for item in _wanted(part).items()]
        wanted = {name: where for name, where in wanted if not any(own.startswith(name.split()[0]) for own in made)}
        more, also, _ = _checkpoint_lines(wanted)
    else:
        if len(parts) > 1:
            tasks = ", ".join(part.task for part in parts)
            lines.append(("runs", f"one for each of {tasks}; these are the numbers of the first"))
        s = parts[0] if parts else s
        standing = _standing(s)
        lost += [standing] if standing.startswith("refused") else []
        more, also, base = _model_lines(s)
        lines += [("run", standing), *_step_lines(s), *_forward_lines(forwards(s, loops.get(s.stage), base))]
    lost = list(dict.fromkeys([*lost, *also]))
    lines += [*more, *(("MISSING", what) for what in lost)]
    return "\n".join(f"{label:<20} {text}" for label, text in lines), lost


def _standing(s: Settings) -> str:
    """Whether a run of this name is there, and what becomes of it."""
    folder = ownership.of(s)
    if not folder.exists():
        return f"{folder}: new"
    if s.stage in ("eval", "merge"):
        return f"{folder}: is there and will be written anew"
    if not s.resume:
        return f"{folder}: is there and --no-resume replaces it"
    try:
        ownership.check(folder, s)
    except SettingsError as fault:
        return f"refused: {fault}"
    last = hub.last_checkpoint(folder)
    return f"{folder}: is there and will be continued from " + (last.name if last else "its start")


def _step_lines(s: Settings) -> list[tuple[str, str]]:
    """Batch arithmetic, rollout and guidance."""
    world, found = ranks.rank_and_world()[1], []
    every = f"{world} rank{'s' * (world > 1)}"
    if s.stage in settings.ROLLOUT:
        rows, level, (start, stop), kernel = world * s.prompts_per_step * s.group_size, *rollout.noise_of(s)
        total, learnt = " at a time", ""
        if s.stage != "curate":
            total = f", {s.steps * rows:,} in {s.steps} steps"
            chosen = f"{s.drawn_states or 'all'} a trajectory" if s.stage == "opd" else s.train_steps
            learnt = f", {len(rollout.trained_steps(s, torch.Generator()))} trained ({chosen})"
        shape = f"{s.prompts_per_step} prompts x {s.group_size} samples x {every}"
        found.append(("batch", f"{shape} = {rows:,} trajectories{total}; --micro-batch {s.micro_batch}"))
        noisy = f"{start}..{stop - 1} stochastic ({kernel}, level {level:g})" if level and stop > start else "an ODE"
        found.append(("rollout", f"{s.num_steps} steps, {noisy}{learnt}"))
        places = {"student": student_cfg(s)} | ({"teachers": teacher_cfg(s)} if s.stage == "opd" else {})
        places |= {"objective": trained_cfg(s)} if s.stage in RL else {}
        scales = (f"{who} {'none' if cfg == 1 else f'{cfg:g}'}" for who, cfg in places.items())
        found.append(("guidance", ", ".join(scales)))
    elif s.stage in ("pretrain", "sft", "reward"):
        rows = world * s.batch_size
        total = f"{rows:,} a step, {s.steps * rows:,} in {s.steps} steps"
        found.append(("batch", f"{s.batch_size} images x {every} = {total}"))
    if s.stage == "opd":
        found.append(("objective", f"{s.estimator}, weight {s.weight}, {s.states} states, MAR {s.mar:g}"))
    if s.stage in ("curate", *RL):
        asked = load.asked_of(s)
        paid = (f"{c}: " + " + ".join(f"{w:g} {name}" for name, w in row.items()) for c, row in asked.weights.items())
        found.append(("rewards", "; ".join(paid)))
    return found


def _forward_lines(found: Mapping[tuple[str, str, bool], list[int]]) -> list[tuple[str, str]]:
    """The counted forwards of a rank. An anchor that is one of the teachers is counted with them."""
    when, lines = {"before": "before the first step", "step": "a step", "end": "test pictures at the end"}, []
    for (moment, who, gradient), (calls, rows, known) in found.items():
        whose = f", {who}, {'with' if gradient else 'without'} gradient" if who else ""
        reused = f", {known:,} with text and sources known" if known else ""
        lines.append(("forwards", f"{when[moment]}{whose}: {calls:,} of {rows:,} rows{reused}"))
    return lines


def _wanted(s: Settings) -> dict[str, tuple[str, Sequence[str]]]:
    """The checkpoints that a run reads: {name: (where it is, patterns of its files)}."""
    files, others = load.base_files(s), (*hub.ADAPTER_FILES, *hub.TRANSFORMER_FILES)
    found = {"model": (s.model, files)} if files else {}
    return found | {name: (where, others) for name, where in load.checkpoints_of(s).items()}


def _checkpoint_lines(wanted: Mapping[str, tuple]) -> tuple[list[tuple[str, str]], list[str], dict[str, str]]:
    """(lines, what is missing, the kind of each checkpoint that is here) of what `_wanted` names."""
    far = {where: patterns for where, patterns in wanted.values() if hub.hub_id(where) and not cached(where, patterns)}
    sizes, lines, lost, kinds = download_sizes(far), [], [], {}
    for name, (where, _) in wanted.items():
        try:
            note = "in the Hub's cache"
            if where in far:
                note = "downloaded when the run starts, " + (gib(sizes[where]) if where in sizes else "of unknown size")
            elif not hub.hub_id(where):
                folder = hub.locate(where)
                kinds[name] = "base" if name == "model" else hub.kind(folder)
                note = {"base": "a folder", "full": "a full checkpoint"}.get(kinds[name], "a LoRA")
            lines.append((name, f"{where}: {note}"))
        except hub.ModelError as fault:
            lost.append(first_line(fault))
    return lines, lost, kinds


def _model_lines(s: Settings) -> tuple[list[tuple[str, str]], list[str], flow.FlowModel | type[flow.FlowModel]]:
    """Checkpoints, parameters and memory -> (lines, what is missing, the base if it is known)."""
    wanted = _wanted(s)
    lines, lost, kinds = _checkpoint_lines(wanted)
    if s.stage == "reward" or ("model" in wanted and "model" not in dict(lines)):
        return lines, lost, flow.FlowModel
    base = base_of(s)
    whole, fixed = numbers(base.transformer.parameters()), numbers(base.transformer.buffers())
    trained = trained_numbers(s, base)
    lines.append(("parameters", f"transformer {whole:,}, trained {trained:,}"))
    parts = memory(s, whole, fixed, trained, {name for name, kind in kinds.items() if kind == "full"})
    kept = kept_bytes(s, base) if base.keeps_prefix and s.stage != "merge" else 0
    total = " + ".join(f"{name} {gib(size)}" for name, size in parts.items())
    unknown = ", without checkpoints that are not here yet" if wanted.keys() - kinds.keys() - {"model"} else ""
    lines.append(("memory", f"{gib(sum(parts.values()))} stay on a rank: {total}{unknown}"))
    if kept:
        lines.append(("", f"plus at most {gib(kept)} as a micro-batch is drawn: keys and values of text and sources"))
    if s.stage in settings.TRAINED:
        lines.append(("", "plus activations, LoRA teachers, VAE, scorers. Text encoders are gone by the first step."))
        lines.append(("", "To measure all of it, run on an accelerator with --name probe --steps 1: `memory` (GiB) in"))
        lines.append(("", "runs/probe/metrics.jsonl"))
    return lines, lost, base


def kept_bytes(s: Settings, base: flow.FlowModel) -> int:
    """What a micro-batch of longest texts, with one source for an edit, keeps from step to step (`Cond.kept`).

    Two numbers a token, channel and block: of the student and in distillation of a teacher, guided ones twice.
    """
    config, b = base.transformer.config, 4 if s.precision == "float32" else 2
    width, height = settings.size_of(s)
    tokens = s.text_length + (s.source_resolution**2 or width * height) // 16**2 * ("edit" in task_list(s))
    branches = 1 + (student_cfg(s) != 1) + (s.stage == "opd") * (1 + (teacher_cfg(s) != 1))
    rows = branches * (s.micro_batch or s.prompts_per_step * s.group_size)
    return 2 * b * config.num_layers * config.num_attention_heads * config.attention_head_dim * tokens * rows


def gib(size: float) -> str:
    return f"{size / GIB:.{2 if size > GIB / 100 else 5}f} GiB"


def memory(s: Settings, whole: int, fixed: int, trained: int, full: Collection[str]) -> dict[str, float]:
    """Bytes of a rank that stay through a run. full: which checkpoints are transformers.

    whole, fixed and trained: N parameters and F numbers in buffers (SD3's positions, a tenth of it), of which n train.
    b (N + F) of the frozen base, b bytes a number (it is absent if all train and nobody asks it); 20 n of the trained
    ones (4 n more for nft, whose old policy draws, and for --overlap), over the ranks that share them, and 4 F beside
    them; b (N + F) of the full teacher that is on the accelerator, and of the anchor.
    """
    b = 4 if is_tiny(s) or s.precision == "float32" else 2
    full = {*full} - {"init"} if s.stage != "merge" else set()
    fully = s.stage == "pretrain" or (s.parameters == "full" and s.stage in settings.LORA)
    asked = s.beta > 0 if s.stage in RL else bool({*load.checkpoints_of(s)} - full - {"init"})  # it carries LoRAs
    shards = {"fsdp": ranks.rank_and_world()[1], "hsdp": ranks.local_world()}.get(s.parallel, 1) if fully else 1
    older = (s.stage == "nft") + (s.stage in RL and s.overlap)
    parts = {
        "base": b * (whole + fixed) * (not fully or (asked and s.stage != "pretrain")),
        "student": (TRAINED_BYTES + 4 * older) * trained / shards + 4 * fixed * fully,
        "full teachers": b * (whole + fixed) * min(len(full), 1 + ("anchor" in full)),
    }
    return {name: size for name, size in parts.items() if size}
