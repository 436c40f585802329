"""Whose is a run's folder? A run owns what it writes there (`OURS`) and nothing else, and one process holds it.

    claim(s)     before a model loads: is the folder a run's or empty, can it be written, does nobody else hold it?
    prepare(s)   when everything is loaded: clear what a kill has left, set an earlier run aside, write config.json
    forget(...)  after the new run's first save: remove what was set aside

`--no-resume` renames what the earlier run has written to NAME.replaced, and the first save of the new run removes it.
Whatever else is in the folder stays, also inside of a checkpoint.

The lock is flock's, on the file `.lock`: the kernel releases it whenever its process dies, and a process that is forked
keeps it. On NFS it needs a lock service; on a file system without locks a run goes on without one.
"""

import contextlib
import fcntl
import json
import os
import re
import secrets
import shutil
import socket
import sys
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from data.common import write_atomic
from harness.ranks import rank_and_world
from models.hub import checkpoints_in
from settings import TASKS, Settings, SettingsError, read_by

# Settings that may change when a run is continued: they move no number of a step, or only who computes it. (With
# --overlap, `steps` and `save_every` decide before which steps nothing is drawn ahead.)
FREE = (
    "steps", "save_every", "keep", "eval_prompts", "eval_steps", "device", "parallel", "micro_batch",
    "prompts_per_step", "gradient_checkpointing", "compile", "timeout", "wandb", "out", "name",
)  # fmt: skip
# Settings that say where something is: it is known by its content (`check_inputs`).
LOCATED = ("model", "teachers", "anchor", "init", "prompts", "rewards", "data")
# What a run writes, below its folder. config.json is ours too, but it is replaced, never set aside.
_TASK = "|".join(TASKS)
OURS = re.compile(
    r"metrics\.jsonl|report\.html|results\.json|rows\.jsonl|(scores|tags)\.(md|tex|csv|json)|curation\.md"
    r"|events\.out\.tfevents\..+|checkpoints/step-\d+"
    r"|pictures/[^/]+/[a-z0-9-]+-[0-9a-f]{12}-\d+\.png"
    rf"|ranges/rank-\d+\.jsonl|prompts/({_TASK})/train(_metadata\.jsonl|\.txt)"
)
IDENTITY = "identity"  # config.json's entry that is no setting
PLACES = ("*", "pictures/*/*", "checkpoints/*", "ranges/*", "prompts/*/*")
REPLACED, LOCK, SUMS, CARD = ".replaced", ".lock", "SHA256SUMS", "README.md"
HIDDEN = re.compile(r"\.(?P<step>step-\d+)(-(?P<was>old|gone))?")  # what a kill leaves of a checkpoint
LEAST = 1 << 20  # bytes that must be free before a model is loaded


class Lock:
    """Holds a run's folder until nobody in this process refers to it, or the process dies."""

    held = weakref.WeakValueDictionary()  # this process may ask again: its stages, benches and tests do

    def __init__(self, folder: Path):
        """BlockingIOError, with the words of the holder, if another process has it; OSError if it cannot be written."""
        file = (folder / LOCK).open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            who = file.read(200).strip() or "another process"
            file.close()
            raise BlockingIOError(who) from None
        except OSError as fault:
            print(f"warning: {folder}: cannot be locked ({fault.strerror}); start one run at a time", file=sys.stderr)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        weakref.finalize(self, _release, folder, file, os.getpid())

    @classmethod
    def on(cls, folder: Path) -> "Lock":
        while True:
            (folder / LOCK).touch()
            found = os.stat(folder / LOCK)  # by file: the folder may be moved, or have another spelling
            key = found.st_dev, found.st_ino
            lock = cls.held[key] = cls.held.get(key) or cls(folder)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(found, os.stat(folder / LOCK)):  # else its holder has just removed it
                    return lock


def _release(folder: Path, file: TextIO, process: int) -> None:
    """Let a lock go; of a run that was refused before it wrote anything, no folder stays."""
    if process == os.getpid():  # and not a fork of it
        with contextlib.suppress(OSError):
            if [p.name for p in folder.iterdir()] == [LOCK]:
                (folder / LOCK).unlink()
                folder.rmdir()
    file.close()


def of(s: Settings) -> Path:
    return Path(os.path.expanduser(s.out), s.name)


def claim(s: Settings, reads: Mapping[str, str] = {}) -> Lock | None:  # noqa: B006
    """Hold the run's folder for as long as the lock lives; None on ranks other than 0, which hold nothing.

    reads: {flag: path} of what the run will read, none of which may lie in the folder. SettingsError, one line: the
    folder is not a run's, belongs to other settings, is held by another process, or cannot be written.
    """
    folder = of(s)
    for flag, where in reads.items():
        path = Path(os.path.expanduser(where))  # Path's own raises for a user who is not there
        if where and os.path.exists(path) and path.resolve().is_relative_to(folder.resolve()):
            raise SettingsError(f"{flag} {where}: lies in the run's own folder {folder}; give another --name")
    if rank_and_world()[0] > 0:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not is_run(folder) and {p.name for p in folder.iterdir()} - {LOCK, ".config.json", ".shared"}:
            raise SettingsError(f"{folder}: is not empty and no run of ours (no config.json); give another --name")
        check(folder, s)
        lock = Lock.on(folder)
        if shutil.disk_usage(folder).free < LEAST:
            raise SettingsError(f"--out {s.out}: no space left on the device")
    except BlockingIOError as holder:
        raise SettingsError(f"{folder}: {holder} holds this run; wait for its end, or give another --name") from None
    except OSError as fault:
        raise SettingsError(f"--out {s.out}: {folder}: {fault.strerror}") from fault
    return lock


def is_run(folder: Path) -> bool:
    return {"preset", "stage"} <= read_config(folder).keys()


def read_config(folder: Path) -> dict:
    """A run's config.json; {} if there is none that can be read."""
    try:
        found = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def recorded(s: Settings) -> dict:
    """The settings that a run's config.json holds: what the stage reads, and not how it was started."""
    found = {"preset": s.preset, "stage": s.stage, **read_by(s)}
    return {k: v for k, v in found.items() if k not in ("resume", "dry_run", "config")}


def check(folder: Path, s: Settings) -> None:
    """SettingsError if the folder is another stage's, or has a checkpoint that was made with other settings."""
    old = read_config(folder)
    if not old or (s.stage != "eval" and not s.resume):
        return
    now = recorded(s) if checkpoints_in(folder) else {"stage": s.stage}
    for k, value in now.items():
        if k not in (*FREE, *LOCATED) and k in old and old[k] != value:
            raise SettingsError(
                f"{folder} was made with --{k.replace('_', '-')} {old[k]}, not {value}: "
                "give another --name, or --no-resume to start it anew"
            )


def check_inputs(s: Settings, inputs: Mapping[str, str]) -> None:
    """SettingsError if the folder has a checkpoint that was made from other content than `inputs`, by flag."""
    folder = of(s)
    old = read_config(folder).get(IDENTITY, {}).get("inputs", {})
    if not old or s.stage == "merge" or not s.resume or not checkpoints_in(folder):
        return  # a merge has no state to go on from, and its teachers may have changed
    for flag in (*inputs, *old):
        if inputs.get(flag) != old.get(flag):
            raise SettingsError(
                f"{folder} was made with other content of {flag}: give another --name, or --no-resume to start it anew"
            )


def prepare(s: Settings, inputs: Mapping[str, str] = {}) -> str:  # noqa: B006
    """Clear away what a kill has left of checkpoints, set an earlier run aside under --no-resume, write config.json.

    Returns the run's id, a random word that it has for good.
    """
    folder = of(s)
    places = folder / "checkpoints"
    for stale in sorted(places.glob(".step-*")):
        match = HIDDEN.fullmatch(stale.name)
        if match and match["was"] == "old" and not (places / match["step"]).exists():
            stale.rename(places / match["step"])  # killed between the two renames of `checkpoints.save`
        elif match and match["was"]:
            discard(stale)
        elif match:  # nothing but our own files: it was being written
            shutil.rmtree(stale, ignore_errors=True)
    if checkpoints_in(folder):
        forget(folder)  # killed between the first save and this
    again = s.stage == "eval" or s.resume
    if not again:
        for entry in ours(folder):
            replaced = entry.with_name(entry.name + REPLACED)
            if replaced.exists():  # `entry` is of a run that has never saved, `replaced` of the one before it
                entry.unlink()
            else:
                entry.rename(replaced)
    known = read_config(folder).get(IDENTITY, {}).get("id") if again else None
    own = {"id": known or secrets.token_hex(8), "inputs": dict(inputs)}
    write_atomic(folder / "config.json", json.dumps({**recorded(s), IDENTITY: own}, indent=1) + "\n")
    return own["id"]


def ours(folder: Path, ending: str = "") -> list[Path]:
    """What a run has written below its folder, checkpoints first, the newest of them last."""
    found = [p for place in ("checkpoints/*", *PLACES) for p in sorted(folder.glob(place + ending))]
    inside = ((p, p.relative_to(folder).as_posix().removesuffix(ending)) for p in dict.fromkeys(found))
    named = [p for p, name in inside if OURS.fullmatch(name)]
    return sorted(named, key=lambda p: (p.parent.name != "checkpoints", len(p.name), p.name))


def forget(folder: Path) -> None:
    """Remove what --no-resume has set aside."""
    for entry in ours(folder, REPLACED):
        if entry.is_dir():
            discard(entry)
        else:
            entry.unlink()


def discard(checkpoint: Path) -> None:
    """Remove a checkpoint: the files that its list names, and then the folder if nothing else is in it.

    It is renamed first: half a checkpoint never has a whole one's name. If somebody has put files there, they stay,
    under NAME.rest. What the system does not let go stops no save.
    """
    step, files = re.search(r"step-\d+", checkpoint.name)[0], listed(checkpoint)
    gone = checkpoint.with_name(f".{step}-gone")
    with contextlib.suppress(OSError, ValueError):  # a ValueError is of a name, in a damaged list, that no disk has
        checkpoint.rename(gone)
        for name in (*files, CARD, SUMS):
            (gone / name).unlink(missing_ok=True)
        for inner, _, _ in os.walk(gone, topdown=False):
            with contextlib.suppress(OSError):  # somebody's file is in it
                os.rmdir(inner)
        if gone.exists():
            gone.rename(checkpoint.with_name(f"{step}.rest"))


def listed(checkpoint: Path) -> dict[str, str]:
    """{file: its checksum} of a checkpoint, as `sha256sum` writes and reads them; {} without the list."""
    try:
        lines = (checkpoint / SUMS).read_text().splitlines()
    except (OSError, ValueError):
        return {}
    pairs = (line.split("  ", 1) for line in lines if "  " in line)
    return {name: digest for digest, name in pairs if ".." not in Path(name).parts and not Path(name).is_absolute()}
