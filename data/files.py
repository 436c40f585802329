"""Data: what does the pipeline train and evaluate on, and who gets which prompt when?

Four questions, four functions:

    which prompts are there?             read_prompts    F §6.1 ("the Flow-GRPO splits"), Q §4.2
    which picture is to be edited?       source_image    Q's second task
    which expert does a prompt need?     task_of         k = R(c), F Eq. 7; the task type of Q §4.3
    what does rank r train on at step s? prompt_batch    a function of (seed, s, r) and of nothing else

Tasks are F's three, composition, text and quality, each with an expert of its own, and Q's two, which are wider:
"t2i" is every picture from a prompt alone (its kinds are categories, Q §4.2), "edit" is a picture from a picture.

The files are those that users of the earlier releases have. A path is a `.txt` (one prompt a line), a
`.jsonl` (one GenEval object a line) or a folder with `{train,test}_metadata.jsonl` or `{train,test}.txt`:

    {"tag": "position", "prompt": "a photo of a cow right of a laptop", "include": [
     {"class": "laptop", "count": 1}, {"class": "cow", "count": 1, "position": ["right of", 0]}]}

`tag`, `include` and `prompt` are required, of Q's prompts `prompt` alone; an include may have a `color`
and a `position` = [relation, index of the include it refers to]; `exclude` lists counts that must not be reached;
`category` says whose reward weights serve the prompt. Editing adds `t2i_prompt` (what the source shows) and `image`:

    {"prompt": "Change the number of forks to two.", "image": "images/7.jpg", "t2i_prompt": "a photo of three forks"}

a path, relative to the folder that the file is in, or the picture itself as a data URI, `data:image/png;base64,...`.
Whatever is wrong with a line is found when it is read, not after an hour of training, and is said in one line that
starts with `path:line:` (line 0 is the file as a whole); `check_source` says the same of a picture.

Randomness: no sampler and no generator is kept between steps. Everything random in a run is drawn from
`seed_for(...)` of what it is for, so resuming is exact on any number of ranks without saving any state.
"""

import base64
import codecs
import hashlib
import io
import json
import random
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from rewards import RELATIONS, ocr_target

TASKS = ("composition", "text", "quality", "t2i", "edit")
SPLITS = ("train", "test")
OPEN_TASKS, OPEN_FIELDS = ("t2i", "edit"), ("image", "category")  # Q's, see `is_open`
EDIT_FIELDS = ("image", "t2i_prompt")
PNG_URI = "data:image/png;base64,"  # how a source picture stands in the line itself
CACHED_PICTURES = 64  # decoded sources that are kept: 200 MB of 1024 x 1024 pixels


class DataError(ValueError):
    """A prompt file that cannot be used; the message is one line, `path:line: what is wrong; what to do`."""


class Prompt(NamedTuple):
    """One prompt: the text c, its task (of `TASKS`), its line's object ({} where there is none) and its "file:line"."""

    text: str
    task: str
    metadata: dict
    source: str


# -------------------------------------------------------------------------------------------- reading prompts
def read_prompts(path: str | Path, task: str, split: str = "train") -> list[Prompt]:
    """All prompts of a `.txt`, a `.jsonl` or, for the split "train" or "test", of a folder, in order.

    F §6.1, Q §4.2. Blank lines are skipped; `split` matters for folders only, where GenEval metadata is
    preferred to plain text, because only metadata can be scored. A prompt of the task "text" must quote its
    target; a prompt of the task "edit" needs the fields `image` and `t2i_prompt`. The path of an image is made
    absolute, so that a run finds it from wherever it was started. Raises DataError for anything wrong with the
    files, the pictures aside (`check_source`), ValueError for an unknown task or split.
    """
    for name, value, allowed in (("task", task, TASKS), ("split", split, SPLITS)):
        if value not in allowed:
            raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(allowed)}")
    file = _prompt_file(Path(path), split)
    prompts = []
    for source, line in _lines(file):
        metadata = _parse_metadata(source, line, task) if file.suffix == ".jsonl" else {}
        text = metadata.get("prompt", line)
        if task == "text":
            try:
                ocr_target(text)
            except ValueError as error:
                raise DataError(f"{source}: {error}") from None
        if task == "edit":
            for field in EDIT_FIELDS:
                if field not in metadata:
                    raise DataError(f"{source}: an edit needs the field {field!r}; add it to this line")
        if "image" in metadata and not metadata["image"].startswith("data:"):
            metadata["image"] = str(file.parent.absolute() / metadata["image"])
        prompts.append(Prompt(text, task, metadata, source))
    if not prompts:
        raise DataError(f"{file}:0: the file holds no prompt; write one a line")
    return prompts


def holds_split(path: str | Path, split: str) -> bool:
    """Does a folder hold a file of this split? (A file serves both.) A folder that --stage curate wrote has no test."""
    path = Path(path)
    return not path.is_dir() or any((path / name).is_file() for name in (f"{split}_metadata.jsonl", f"{split}.txt"))


def _prompt_file(path: Path, split: str) -> Path:
    """The one file to read: `path` itself, or what a folder holds for the split."""
    if path.is_dir():
        names = (f"{split}_metadata.jsonl", f"{split}.txt")
        file = next((path / name for name in names if (path / name).is_file()), None)
        if not file:
            raise DataError(f"{path}:0: no {names[0]} and no {names[1]} in this folder; add one")
        return file
    if path.suffix not in (".txt", ".jsonl"):
        raise DataError(f"{path}:0: neither a .txt, a .jsonl nor a folder; give one of these")
    return path


def _lines(file: Path) -> list[tuple[str, str]]:
    """("file:line", stripped text) of every line that is not blank.

    Split as bytes, for two reasons: bad UTF-8 is then named by its line, and characters such as U+2028, which
    str.splitlines would break at, may stand inside a prompt.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}:0: cannot be read ({error.strerror}); check the path") from None
    lines = []
    for number, raw in enumerate(data.removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        try:
            line = raw.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            message = f"byte {error.start} of the line is not UTF-8; save the file as UTF-8"
            raise DataError(f"{file}:{number}: {message}") from None
        if line:
            lines.append((f"{file}:{number}", line))
    return lines


def _parse_metadata(source: str, line: str, task: str) -> dict:
    """One checked line; DataError names the first field that is missing or wrong."""
    try:
        metadata = json.loads(line)
    except json.JSONDecodeError as error:
        fault = f"malformed JSON ({error.msg}, column {error.colno})"
        raise DataError(f"{source}: {fault}; write one object a line") from None
    if not isinstance(metadata, dict):
        raise DataError(f"{source}: not a JSON object; write one with tag, include and prompt")
    needed = ("prompt",) if is_open(task, metadata) else ("tag", "prompt", "include")
    lists = dict.fromkeys(("include", "exclude"), (list, "a non-empty list of objects"))
    for field in ("tag", "prompt", *EDIT_FIELDS, "category", *lists):
        if field in metadata or field in needed:
            _require(source, metadata, field, *lists.get(field, (str, "a non-empty string")))
    for name in lists:
        for index, entry in enumerate(metadata.get(name, [])):
            _check_entry(f"{source}: {name}[{index}]", entry, index, len(metadata.get("include", [])))
    return metadata


def is_open(task: str, metadata: Mapping) -> bool:
    """Is a line one of Q's prompts, by its task or by a field of theirs, so that it needs no checklist?"""
    return task in OPEN_TASKS or any(field in metadata for field in OPEN_FIELDS)


def _require(where: str, entry: Mapping, field: str, kind: type, meaning: str) -> None:
    """DataError unless `entry[field]` is there, of the very type `kind` (True is no int), not empty or 0."""
    if field not in entry:
        raise DataError(f"{where}: the field {field!r} is missing; it must be {meaning}")
    if type(entry[field]) is not kind or not entry[field]:
        raise DataError(f"{where}: the field {field!r} is {entry[field]!r}; it must be {meaning}")


def _check_entry(where: str, entry: object, index: int, includes: int) -> None:
    """DataError unless `entry`, number `index` of its list, is {class, count[, color][, position]}."""
    if not isinstance(entry, dict):
        raise DataError(f"{where} is {entry!r}; it must be an object with class and count")
    _require(where, entry, "class", str, "a non-empty string")
    _require(where, entry, "count", int, "a positive whole number")
    if entry["count"] < 1:
        raise DataError(f"{where}: the field 'count' is {entry['count']}; it must be a positive whole number")
    if "color" in entry:
        _require(where, entry, "color", str, "a non-empty string")
    if "position" in entry:
        _require(where, entry, "position", list, "[relation, index of another include]")
        _check_position(where, entry["position"], index, includes)


def _check_position(where: str, position: list, index: int, includes: int) -> None:
    if len(position) != 2:
        raise DataError(f"{where}: the field 'position' is {position!r}; it must be [relation, index]")
    relation, other = position
    if relation not in RELATIONS:
        raise DataError(f"{where}: unknown relation {relation!r}; choose one of {', '.join(RELATIONS)}")
    if type(other) is not int or other not in range(includes) or other == index:
        fault = f"position refers to include {other!r}"
        raise DataError(f"{where}: {fault}; it must be the index of another of the {includes} includes")


# ------------------------------------------------------------------------------------- the sources of edits
def source_image(prompt: Prompt) -> np.ndarray | None:
    """The picture that an edit begins from, (H, W, 3) uint8, upright; None for a prompt that has none. Q's second task.

    The last `CACHED_PICTURES` are kept, and shared: not to be written to. DataError as `check_source`.
    """
    return _source(prompt, _decoded)


def check_source(prompt: Prompt) -> None:
    """DataError, `path:line: ...`, for an edit whose picture is not there or is none; cheap: no pixel is decoded."""
    _source(prompt, _verified)


def _source(prompt: Prompt, look):
    """`look` at the prompt's picture, where it has one; its faults are put as the faults of a line."""
    where = prompt.metadata.get("image")
    if where is None:
        return None
    try:
        return look(where)
    # Pillow says "this is no picture of mine" in as many types as it has formats.
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as fault:
        shown = "the image in the line" if where.startswith("data:") else f"image {where}"
        reason = getattr(fault, "strerror", None) or "no picture that can be read"
        raise DataError(f"{prompt.source}: {shown}: {reason}; give a PNG or JPEG file, or {PNG_URI}...") from None


def _opened(where: str) -> Image.Image:
    if not where.startswith("data:"):
        return Image.open(where)
    head, _, body = where.partition(",")
    if not head.endswith(";base64"):
        raise ValueError("a data URI that is not base64")
    return Image.open(io.BytesIO(base64.b64decode(body, validate=True)))


def _verified(where: str) -> None:
    with _opened(where) as picture:
        picture.verify()


@lru_cache(CACHED_PICTURES)
def _decoded(where: str) -> np.ndarray:
    with _opened(where) as picture:  # a camera that was held upright says so in EXIF, not in the pixels
        return np.array(ImageOps.exif_transpose(picture).convert("RGB"))


# ------------------------------------------------------------------------------------------------ the routing
def task_of(text: str, metadata: Mapping) -> str:
    """k = R(c), F Eq. 7's hard routing: one of F's tasks or "edit", from the prompt alone. F §5.1.1; Q §4.3.

    The first that fits, surest sign first:
        "edit"         there is a source image                    (Q's second task)
        "composition"  there is a tagged GenEval checklist
        "text"         words stand in ASCII double quotes         (before "a photo of": signs in photos)
        "composition"  it opens with "a photo of", GenEval's phrase
        "quality"      everything else: preference and aesthetics
    An include list without a tag describes a prompt but does not grade it, and does not decide. "t2i" is never the
    answer: it is F's three together, and only the one who asks knows whether they have one expert or three.

    DEVIATION: F leaves R(c) undefined; with one data set a task it amounts to where a prompt came from. A
    rule on the prompt itself also serves prompts from elsewhere, and agrees on every line of the GenEval and
    OCR test files.
    """
    if "image" in metadata:
        return "edit"
    if "tag" in metadata and "include" in metadata:
        return "composition"
    try:
        ocr_target(text)
        return "text"
    except ValueError:
        return "composition" if text.strip().lower().startswith("a photo of ") else "quality"


# ------------------------------------------------------------------------------ seeds and the batch of a rank
def seed_for(*parts: int | str) -> int:
    """One seed in [0, 2^63) for what `parts` name, e.g. seed_for("noise", seed, step, rank). Q §4.1.

    A cryptographic hash: neighbouring steps share nothing, and every process gets the same (unlike `hash`).
    1 and "1" differ. Raises ValueError for a part that is neither int nor str: the text form of other types
    (NumPy's integers for one) changes between versions, and the seed would silently change with it.
    """
    if not all(type(part) in (int, str) for part in parts):
        raise ValueError(f"a seed is made from ints and strings, got {parts!r}")
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def prompt_batch(
    prompts: Sequence[Prompt], count: int, seed: int, step: int, rank: int, world: int
) -> list[Prompt]:
    """The `count` prompts that `rank` of `world` trains on at `step`. F §5.1.1, Q §4.1 (prompt sampling).

    Each epoch is a fresh permutation of all N prompts, seeded by (seed, epoch), cut into steps of
    count * world prompts and each step into ranks. So the ranks of a step have different prompts, an epoch
    has no prompt twice, and a step has the same prompts however many ranks share it. The prompts left over,
    N mod (count * world), sit this epoch out; they are others in the next. Where a step needs more than N
    prompts, permutations follow each other without a gap, and repeats are unavoidable.
    Raises ValueError for an empty list, a count below 1, a negative step or a rank outside 0..world-1.
    """
    if not prompts or count < 1 or step < 0 or rank not in range(world):
        shown = f"{len(prompts)} prompts, count {count}, step {step}, rank {rank} of {world}"
        raise ValueError(f"no batch: need prompts, count >= 1, step >= 0 and 0 <= rank < world; got {shown}")
    size = count * world
    epoch_length = len(prompts) // size * size or len(prompts)  # prompts drawn from one permutation
    first = step * size + rank * count  # this rank's place in the endless line of prompts
    places = [divmod(place, epoch_length) for place in range(first, first + count)]  # (epoch, index)
    orders = {epoch: _permutation(len(prompts), seed, epoch) for epoch, _ in places}
    return [prompts[orders[epoch][index]] for epoch, index in places]


def _permutation(length: int, seed: int, epoch: int) -> list[int]:
    return random.Random(seed_for("prompts", seed, epoch)).sample(range(length), length)
