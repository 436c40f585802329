"""How does a run survive a kill at any moment? A checkpoint is whole or absent, and it is checked before it is used.

A checkpoint is written under a hidden name and renamed when it is complete and on the disk. `step-NNNNNN/` holds

    the student's exported (averaged) weights, ready for the Hub, with a model card
    training/      weights, averages and moments, as torch.distributed.checkpoint writes them: every rank its own part
    training.json  the step, and how many updates each tensor has had
    SHA256SUMS     a checksum of every file but the card, as `sha256sum -c` reads it

This is the whole state: all randomness of a step comes from generators that are seeded by the step (`Run.generator`).
A continued run ends with the same bits on a CPU, and may go on with another number of ranks.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from data.common import sync, write_atomic
from harness.ownership import CARD, SUMS, discard, listed
from harness.ranks import any_rank, lost_others, own, rank_and_world, reason, wait
from harness.weights import Weights
from models.hub import ModelError, checkpoints_in, last_checkpoint

STATE = "training.json"
WRITING = (OSError, SafetensorError, CheckpointException)  # what a disk that is full or gone raises


def save(
    target: Path, export: Callable[[Path], None], step: int, tensors: dict[str, Tensor], updates: Mapping, keep: int
) -> None:
    """Write the checkpoint `target`, and remove all but the `keep` newest. It is complete or absent. All ranks call it.

    export(folder) adds what others can use. FloatingPointError if a number is not finite, ModelError if the disk
    refuses: then nothing is written, and the checkpoints before stay.
    """
    hidden, replaced = target.with_name(f".{target.name}"), target.with_name(f".{target.name}-old")
    first = rank_and_world()[0] == 0
    poisoned = [name for name, t in tensors.items() if t.is_floating_point() and not own(t).isfinite().all()]
    if any_rank(bool(poisoned)):
        where = poisoned[0] if poisoned else "a tensor of another rank"
        raise FloatingPointError(f"step {step}: {where} is not finite; nothing is saved, older checkpoints stay")
    try:
        with _on_all_ranks():
            if first:
                shutil.rmtree(hidden, ignore_errors=True)
                hidden.mkdir(parents=True)
        with _on_all_ranks():
            export(hidden)
        # DCP's safetensors writer: each rank writes its own part, any number of ranks reads it, nothing is pickled.
        writer = dcp.HuggingFaceStorageWriter(str(hidden / "training"), save_distributed=True)
        with _on_all_ranks(), warnings.catch_warnings(action="ignore", category=UserWarning):  # one process is alone
            dcp.save(tensors, storage_writer=writer)
        with _on_all_ranks():
            if first:
                write_atomic(hidden / STATE, json.dumps({"step": step, "updates": updates}) + "\n")
                seal(hidden)
                if target.exists():
                    target.rename(replaced)
                hidden.rename(target)
                sync(target.parent)
    except WRITING as fault:
        if lost_others(fault):
            raise
        if first:
            shutil.rmtree(hidden, ignore_errors=True)
        raise ModelError(f"{target}: not saved ({reason(fault)}); older checkpoints stay") from fault
    if first:
        for old in (replaced, *checkpoints_in(target.parents[1])[:-keep]):
            if old.exists():
                discard(old)
    wait()


@contextlib.contextmanager
def _on_all_ranks() -> Iterator[None]:
    """If writing fails on any rank, raise on all of them, so that none waits in the next collective."""
    fault = None
    try:
        yield
    except WRITING as error:
        if lost_others(error):
            raise
        fault = error
    if any_rank(fault is not None):
        raise fault or OSError("another rank could not write")


def seal(folder: Path) -> None:
    """Give every file the mode that the umask asks for, write their checksums, and wait until all is on the disk."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / CARD)
    files.sort(key=lambda p: p.name == STATE)  # the last line: a list that was cut is seen to be
    mode = folder.stat().st_mode & 0o666  # safetensors writes 0600
    for file in files:
        file.chmod(mode)
    with ThreadPoolExecutor(8) as pool:
        digests = pool.map(digest, files)
        lines = [f"{value}  {p.relative_to(folder).as_posix()}\n" for value, p in zip(digests, files, strict=True)]
        list(pool.map(sync, (*files, *(p for p in folder.rglob("*") if p.is_dir()))))
    write_atomic(folder / SUMS, "".join(lines))


def digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint, by its checksums; "" if nothing is."""
    expected = listed(checkpoint)
    if next(reversed(expected), None) != STATE:
        return f"{SUMS} is missing or cut"
    with ThreadPoolExecutor(8) as pool:
        present = {name: os.path.isfile(checkpoint / name) for name in expected}
        found = pool.map(lambda name: digest(checkpoint / name) if present[name] else "", expected)
        for (name, wanted), got in zip(expected.items(), found, strict=True):
            if got != wanted:
                return f"{name} is {'not what was written' if got else 'missing'}"
    return ""


def newest_whole(folder: Path) -> None:
    """Rank 0: if the newest checkpoints are damaged and one before them is whole, rename them out of the way.

    ModelError if all are damaged: nothing is renamed then, and nothing begins anew by itself.
    """
    faults: dict[Path, str] = {}
    for checkpoint in reversed(checkpoints_in(folder)):
        if not (fault := damage(checkpoint)):
            break
        faults[checkpoint] = fault
    else:
        if faults:
            newest, fault = next(iter(faults.items()))
            raise ModelError(f"{newest}: damaged ({fault}), and none before it is whole; --no-resume starts anew")
    for checkpoint, fault in faults.items():
        names = (checkpoint.with_name(f"{checkpoint.name}.damaged{n or ''}") for n in count())
        moved = checkpoint.rename(next(name for name in names if not name.exists()))
        print(f"warning: {checkpoint}: damaged ({fault}); it is {moved.name} from now on", file=sys.stderr)


def resume(folder: Path, weights: Weights) -> int:
    """Fill `weights` from the newest whole checkpoint -> the step to go on with; 0 if there is none.

    ModelError if none is whole, or if it does not fit the run.
    """
    if rank_and_world()[0] == 0:
        newest_whole(folder)
    wait()
    last = last_checkpoint(folder)
    if last is None:
        return 0
    try:
        state = json.loads((last / STATE).read_text())
        if state["updates"]:
            weights.make_moments(state["updates"])
        reader = dcp.HuggingFaceStorageReader(str(last / "training"))
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            dcp.load(weights.state()[0], storage_reader=reader)
    except (Exception, CheckpointException) as fault:  # DCP's own is no Exception
        if lost_others(fault):
            raise
        raise ModelError(
            f"{last / 'training'}: cannot resume from it ({reason(fault)}); start anew with --no-resume"
        ) from fault
    if rank_and_world()[0] == 0:
        print(f"{folder.name}: continues from {last}", file=sys.stderr)
    return state["step"]
