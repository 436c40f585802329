"""Does a run survive kill -9 or a full disk at any moment? It meets them before every write, and goes on each time.

    python -m bench.kills               # every write: some minutes
    python -m bench.kills --every 20    # a sample of them

A write is whatever changes a file of the run: opening it for writing, renaming, removing, making or removing a folder.
Python announces each of them to an audit hook, and there a real SIGKILL ends the process, or this and every later
attempt to write more fails as on a full disk. A kill is survived if the same command, repeated, ends with the
checkpoints and metrics of a run that nobody disturbed, bit for bit. A full disk is survived if, besides, the program
ended with code 2 and left no half-written checkpoint.
"""

import argparse
import errno
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import NamedTuple

import safetensors.torch

from bench.runs import survival

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}  # audit events; "open" counts if it is for writing
KILL, FULL = -signal.SIGKILL, 2  # what may happen before a write, and the exit code that it ends with


class Case(NamedTuple):
    """begin(folder) makes the state to start from, work(folder) is what is killed, again(folder) is the repetition.

    Each returns its exit code.
    """

    begin: Callable[[Path], int]
    work: Callable[[Path], int]
    again: Callable[[Path], int]


def forked(work: Callable[[Path], int], folder: Path, at: int = 0, fault: int = KILL) -> tuple[int, int]:
    """Run `work` in a fork, with `fault` before its write number `at` (0: never) -> (exit code, number of writes)."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        count = 0

        def hook(event: str, arguments: tuple) -> None:
            nonlocal count
            if is_write(event, arguments, folder):
                count += 1
                if count == at and fault == KILL:
                    os.kill(os.getpid(), signal.SIGKILL)
                if 0 < at <= count and fault == FULL and event in ("open", "os.mkdir"):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        code, log = 1, folder.with_name("log")
        try:
            sys.stdout = sys.stderr = log.open("w")
            announce_safetensors()
            os.fsync = lambda file: None  # a process that is killed loses nothing of what the system has: save the time
            sys.addaudithook(hook)
            code = work(folder)
        except BaseException:
            traceback.print_exc()
        os.write(writer, str(count).encode())
        sys.stderr.flush()
        os._exit(code)
    os.close(writer)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with open(reader) as pipe:
        return code, int(pipe.read() or 0)


def is_write(event: str, arguments: tuple, folder: Path) -> bool:
    """Is this audit event about to change a file below `folder`? TensorBoard writes from a thread, at any time: no."""
    path = arguments[0] if arguments else None
    if event == "open":
        changes = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    else:
        changes = event in CHANGES
    if not changes or not isinstance(path, str | os.PathLike) or "tfevents" in str(path):
        return False
    within_an_open_folder = event != "open" and arguments[-1] not in (-1, None)  # how rmtree names files
    return within_an_open_folder or Path(path).absolute().is_relative_to(folder)


def announce_safetensors() -> None:
    """safetensors writes files in Rust, which no audit hook sees: announce it."""
    real = safetensors.torch.serialize_file

    def serialize_file(tensors, filename, *more, **options):
        sys.audit("open", str(filename), "w", os.O_WRONLY)
        return real(tensors, filename, *more, **options)

    safetensors.torch.serialize_file = serialize_file


def outcome(folder: Path) -> dict[str, str]:
    """What a run has left: the tensors and counts of its newest checkpoint, its metrics without times, hidden files."""
    found = {str(p): "left over" for p in folder.rglob(".*")}
    (file,) = folder.rglob("metrics.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    found["metrics"] = json.dumps([{k: v for k, v in row.items() if k != "seconds"} for row in rows])
    newest = max(folder.rglob("step-*"))
    found["checkpoint"] = newest.name
    found["counts"] = (newest / "training.json").read_text()
    for file in newest.rglob("*.safetensors"):  # tensor by tensor: the order within a file is the writer's
        for name, tensor in safetensors.torch.load_file(file).items():
            found[f"{file.name} {name}"] = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    return found


def survived(case: Case, every: int = 1, fault: int = KILL) -> tuple[int, int, int]:
    """Meet `fault` before each write (or each `every`-th) of `case.work` -> (writes, faults tried, faults survived)."""
    with tempfile.TemporaryDirectory() as top:
        start, run = Path(top).resolve() / "start", Path(top).resolve() / "run"

        def begin() -> None:  # under one path: a run belongs to its folder
            shutil.rmtree(run, ignore_errors=True)
            shutil.copytree(start, run)

        run.mkdir()
        assert forked(case.begin, run)[0] == 0
        run.rename(start)
        begin()
        code, writes = forked(case.work, run)
        assert code == 0 and forked(case.again, run)[0] == 0
        expected, tried, good = outcome(run), 0, 0
        for at in range(1, writes + 1, every):
            begin()
            before = {*run.rglob(".step-*")}
            if (code := forked(case.work, run, at, fault)[0]) == 0 or (fault == KILL and code != KILL):
                continue  # nothing was to be written after that
            tried += 1
            half = [] if fault == KILL else [str(p) for p in {*run.rglob(".step-*")} - before]
            found = outcome(run) if forked(case.again, run)[0] == 0 else {}
            good += code == fault and not half and found == expected
            if code != fault or half or found != expected:
                unlike = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
                print(f"fault {fault} before write {at}: code {code}, {half}, other {unlike}", file=sys.stderr)
                print(run.with_name("log").read_text()[-2000:], file=sys.stderr)
        return writes, tried, good


# ------------------------------------------------------------------------------------------- a run of train.py
def cases(base: Path) -> Mapping[str, Case]:
    """Four short runs of DiffusionNFT in the tiny world: its state has an old policy and moments too."""
    import harness.run
    import train

    small = "--preset tiny --stage nft --task text --prompts-per-step 1 --group-size 2 --num-steps 2 --train-prompts 4"
    flags = f"{small} --eval-prompts 0 --device cpu --rank 2 --alpha 2 --save-every 1 --keep 2".split()

    def steps(count: int, *more: str) -> Callable[[Path], int]:
        def work(folder: Path) -> int:
            argv = [*flags, "--model", str(base), "--out", str(folder), "--name", "run", "--steps", str(count), *more]
            return train.main(argv)

        return work

    def left_by_a_kill(folder: Path) -> int:
        code = steps(2)(folder)
        done = folder / "run/checkpoints/step-000002"
        shutil.copytree(done, done.with_name(".step-000003"))
        shutil.copytree(done, done.with_name(".step-000002-old"))
        return code

    def stopped_at_once(folder: Path) -> int:
        harness.run.any_rank = lambda flag: True  # as if SIGTERM came before the first step: it saves over a checkpoint
        return steps(3)(folder)

    return {
        "a new run of three steps": Case(lambda folder: 0, steps(3), steps(3)),
        "a run that is continued, with what a kill has left": Case(left_by_a_kill, steps(4), steps(4)),
        "a run that is stopped as soon as it is continued": Case(steps(2), stopped_at_once, steps(3)),
        "a run that replaces another": Case(
            steps(3), steps(2, "--lr", "0.01", "--no-resume"), steps(2, "--lr", "0.01", "--no-resume")
        ),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="before each N-th write only")
    every = parser.parse_args().every
    import torch

    from models.tiny import new_tiny

    os.environ["OMP_NUM_THREADS"] = "1"  # the runs leave this as it is:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model = new_tiny(0, width=32, layers=1)
        model.save_full(Path(folder), model.transformer.state_dict())
        met = product(cases(Path(folder)).items(), ((KILL, "kills"), (FULL, "full disks")))
        found = ((name, what, survived(case, every, fault)) for (name, case), (fault, what) in met)
        return survival((f"{name}, {n} writes", tried, what, good) for name, what, (n, tried, good) in found)


if __name__ == "__main__":
    sys.exit(main())
