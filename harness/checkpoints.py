"""How does a run survive a kill at any moment? A folder that belongs to one set of settings, and whole checkpoints.

A checkpoint is written under a hidden name and renamed when it is complete. `step-NNNNNN/` holds

    the student's exported (averaged) weights, ready for the Hub, with a model card
    training/      weights, averages and moments, as torch.distributed.checkpoint writes them: every rank its own part
    training.json  the step, and how many updates each tensor has had

This is the whole state: all randomness of a step comes from generators that are seeded by the step (`Run.generator`).
A continued run ends with the same bits on a CPU, and may go on with another number of ranks.
"""

import json
import shutil
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from data.common import write_atomic
from harness.ranks import lost_others, rank_and_world, reason, wait
from harness.weights import Weights
from models.hub import ModelError, last_checkpoint
from settings import Settings, SettingsError, read_by

# Settings that may change when a run is continued: they move no number of a step, or only who computes it. (With
# --overlap, `steps` and `save_every` decide before which steps nothing is drawn ahead.)
FREE = (
    "steps", "save_every", "keep", "eval_prompts", "eval_steps", "device", "parallel", "micro_batch",
    "prompts_per_step", "gradient_checkpointing", "timeout", "wandb",
)  # fmt: skip


def prepare(folder: Path, s: Settings) -> None:
    """Make a run's folder or accept the one that is there, and clear away what a kill has left in it; see `check`."""
    if not s.resume:
        shutil.rmtree(folder, ignore_errors=True)
    check(folder, s)
    for stale in sorted((folder / "checkpoints").glob(".*")):
        whole = stale.with_name(stale.name[1:].removesuffix("-old"))
        if stale.name.endswith("-old") and not whole.exists():  # killed between the two renames of `save`
            stale.rename(whole)
        else:
            shutil.rmtree(stale)
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "config.json", json.dumps(recorded(s), indent=1) + "\n")


def recorded(s: Settings) -> dict:
    """The settings that a run's config.json holds: what the stage reads, and not how it was started."""
    return {k: v for k, v in read_by(s).items() if k not in ("resume", "dry_run", "config")}


def check(folder: Path, s: Settings) -> None:
    """SettingsError if the folder holds a checkpoint that was made with other settings."""
    file = folder / "config.json"
    if not file.exists() or not last_checkpoint(folder):
        return
    old = json.loads(file.read_text())
    for k, value in recorded(s).items():
        if k not in FREE and k in old and old[k] != value:
            raise SettingsError(
                f"{folder} was made with --{k.replace('_', '-')} {old[k]}, not {value}: "
                "give another --name, or --no-resume to start it anew"
            )


def save(
    target: Path, export: Callable[[Path], None], step: int, tensors: dict[str, Tensor], updates: Mapping, keep: int
) -> None:
    """Write the checkpoint `target`, and remove all but the `keep` newest. It is complete or absent. All ranks call it.

    export(folder) adds what others can use.
    """
    hidden, replaced = target.with_name(f".{target.name}"), target.with_name(f".{target.name}-old")
    first = rank_and_world()[0] == 0
    if first:
        shutil.rmtree(hidden, ignore_errors=True)
        hidden.mkdir(parents=True)
    wait()
    export(hidden)
    # DCP's safetensors writer: each rank writes its own part, any number of ranks reads it, nothing is pickled.
    writer = dcp.HuggingFaceStorageWriter(str(hidden / "training"), save_distributed=True)
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that one process is alone
        dcp.save(tensors, storage_writer=writer)
    if first:
        write_atomic(hidden / "training.json", json.dumps({"step": step, "updates": updates}) + "\n")
        if target.exists():
            target.rename(replaced)
        hidden.rename(target)
        shutil.rmtree(replaced, ignore_errors=True)
        for old in sorted(target.parent.glob("step-*"))[:-keep]:
            shutil.rmtree(old.rename(old.with_name(f".{old.name}")))  # never half a checkpoint under a whole one's name
    wait()


def resume(folder: Path, weights: Weights) -> int:
    """Fill `weights` from the newest checkpoint -> the step to go on with; 0 if there is none.

    ModelError if a part of the checkpoint is missing or damaged.
    """
    last = last_checkpoint(folder)
    if last is None:
        return 0
    try:
        state = json.loads((last / "training.json").read_text())
        if state["updates"]:
            weights.make_moments(state["updates"])
        reader = dcp.HuggingFaceStorageReader(str(last / "training"))
        for name, entry in reader.read_metadata().state_dict_metadata.items():  # DCP would leave a gap as it is
            if sum(chunk.sizes.numel() for chunk in entry.chunks) < entry.size.numel():
                raise ValueError(f"a part of {name} is missing")
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            dcp.load(weights.state()[0], storage_reader=reader)
    except (Exception, CheckpointException) as fault:  # DCP's own is no Exception
        if lost_others(fault):
            raise
        raise ModelError(
            f"{last / 'training'}: cannot resume from it ({reason(fault)}); remove {last} to continue from an "
            "earlier checkpoint, or start anew with --no-resume"
        ) from fault
    if rank_and_world()[0] == 0:
        print(f"{folder.name}: continues from {last}", file=sys.stderr)
    return state["step"]
