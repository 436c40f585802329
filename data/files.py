"""Prompt files: on what does the pipeline train and evaluate, and which expert does a prompt need?

    which prompts are there?             read_prompts    F §6.1 ("the Flow-GRPO splits"), Q §4.2
    which expert does a prompt need?     task_of         k = R(c), F Eq. 7; the task type of Q §4.3

F has three tasks, composition, text and quality, each with an expert of its own. Q has two wider ones: "t2i" is every
picture from a prompt alone (its kinds are categories, Q §4.2), "edit" is a picture from a picture.

The files are those that users of the earlier releases have. A path is a `.txt` (one prompt a line), a
`.jsonl` (one GenEval object a line) or a folder with `{train,test}_metadata.jsonl` or `{train,test}.txt`:

    {"tag": "position", "prompt": "a photo of a cow right of a laptop", "include": [
     {"class": "laptop", "count": 1}, {"class": "cow", "count": 1, "position": ["right of", 0]}]}

`tag`, `include` and `prompt` are required, and of Q's prompts only `prompt`. An include may have a `color`
and a `position` = [relation, index of the include it refers to]. `exclude` lists counts that must not be reached.
`category` says whose reward weights serve the prompt. Editing adds `t2i_prompt` (what the source shows) and `image`:

    {"prompt": "Change the number of forks to two.", "image": "images/7.jpg", "t2i_prompt": "a photo of three forks"}

An image is a path, relative to the folder of the file, or the picture itself as a data URI (`data/pictures.py`).
A fault of a line is found when it is read, not after an hour of training. It is said in one line that starts with
`path:line:` (line 0 is the file as a whole).
"""

import codecs
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from rewards import RELATIONS, ocr_target

TASKS = ("composition", "text", "quality", "t2i", "edit")
SPLITS = ("train", "test")
OPEN_TASKS, OPEN_FIELDS = ("t2i", "edit"), ("image", "category")  # Q's, see `is_open`
EDIT_FIELDS = ("image", "t2i_prompt")
# The fields of a line and of an entry of its lists that are checked; other fields pass.
FIELDS = {**dict.fromkeys(("tag", "prompt", "category", *EDIT_FIELDS), str), "include": list, "exclude": list}
ENTRY = {"class": str, "count": int, "color": str, "position": list}
MEANING = {str: "a non-empty string", int: "a positive whole number", list: "a non-empty list"}


class DataError(ValueError):
    """A prompt file that cannot be used. The message is one line, `path:line: what is wrong`."""


class Prompt(NamedTuple):
    """One prompt: the text c, its task (of `TASKS`), its line's object ({} if there is none) and its "file:line"."""

    text: str
    task: str
    metadata: dict
    source: str


def check_known(what: str, value: str, known: Collection[str]) -> None:
    """ValueError for a task or split that is not one of those that are known."""
    if value not in known:
        raise ValueError(f"unknown {what} {value!r}: choose one of {', '.join(known)}")


# -------------------------------------------------------------------------------------------- reading prompts
def read_prompts(path: str | Path, task: str, split: str = "train") -> list[Prompt]:
    """All prompts of a `.txt`, a `.jsonl` or, for the split "train" or "test", of a folder, in order.

    F §6.1, Q §4.2. Blank lines are skipped. `split` matters for folders only. There, GenEval metadata is preferred to
    plain text, because only metadata can be scored. A prompt of the task "text" must quote its target, and one of the
    task "edit" needs `EDIT_FIELDS`. The path of an image is made absolute, so that a run finds it from any folder.
    Raises DataError for anything wrong with the files, except for the pictures (`pictures.check_source`), and
    ValueError for an unknown task or split.
    """
    check_known("task", task, TASKS)
    check_known("split", split, SPLITS)
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
            _check_fields(source, metadata, FIELDS, EDIT_FIELDS)
        if "image" in metadata and not metadata["image"].startswith("data:"):
            metadata["image"] = str(file.parent.absolute() / metadata["image"])
        prompts.append(Prompt(text, task, metadata, source))
    if not prompts:
        raise DataError(f"{file}:0: the file holds no prompt; write one a line")
    return prompts


def holds_split(path: str | Path, split: str) -> bool:
    """Does a folder hold a file of this split? A file serves both. A folder that --stage curate wrote has no test."""
    path = Path(path)
    return not path.is_dir() or any((path / name).is_file() for name in _names(split))


def _names(split: str) -> tuple[str, str]:
    return f"{split}_metadata.jsonl", f"{split}.txt"


def _prompt_file(path: Path, split: str) -> Path:
    """The one file to read: `path` itself, or what a folder holds for the split."""
    if path.is_dir():
        file = next((path / name for name in _names(split) if (path / name).is_file()), None)
        if not file:
            raise DataError(f"{path}:0: no {' and no '.join(_names(split))} in this folder; add one")
        return file
    if path.suffix not in (".txt", ".jsonl"):
        raise DataError(f"{path}:0: neither a .txt, a .jsonl nor a folder; give one of these")
    return path


def _lines(file: Path) -> list[tuple[str, str]]:
    """("file:line", stripped text) of every line that is not blank.

    Split as bytes, for two reasons: bad UTF-8 is then named by its line, and characters such as U+2028, at which
    str.splitlines would break, may stand inside a prompt.
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
            raise DataError(f"{file}:{number}: byte {error.start} of the line is not UTF-8; save it as UTF-8") from None
        if line:
            lines.append((f"{file}:{number}", line))
    return lines


def _parse_metadata(source: str, line: str, task: str) -> dict:
    """One checked line; DataError names the first field that is missing or wrong."""
    try:
        metadata = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{source}: malformed JSON ({error.msg}, column {error.colno})") from None
    _check_fields(source, metadata, FIELDS, ("prompt",))
    if not is_open(task, metadata):
        _check_fields(source, metadata, FIELDS, ("tag", "include"))
    for name in ("include", "exclude"):
        for index, entry in enumerate(metadata.get(name, [])):
            where = f"{source}: {name}[{index}]"
            _check_fields(where, entry, ENTRY, ("class", "count"))
            others = [i for i in range(len(metadata.get("include", []))) if i != index]
            if "position" in entry and not _is_position(entry["position"], others):
                meant = f"[one of {', '.join(RELATIONS)}; index of another include]"
                raise DataError(f"{where}: the field 'position' is {entry['position']!r}; it must be {meant}")
    return metadata


def is_open(task: str, metadata: Mapping) -> bool:
    """Is a line one of Q's prompts, by its task or by a field of theirs, so that it needs no checklist?"""
    return task in OPEN_TASKS or any(field in metadata for field in OPEN_FIELDS)


def _check_fields(where: str, entry: object, kinds: Mapping[str, type], needed: Collection[str]) -> None:
    """DataError unless `entry` is an object with the needed fields, and every field is of its kind and not empty.

    Types are exact: true is no number.
    """
    if not isinstance(entry, dict):
        raise DataError(f"{where}: {entry!r} is not a JSON object")
    for field, kind in kinds.items():
        value, wanted = entry.get(field), field in entry or field in needed
        if wanted and (type(value) is not kind or not value or (kind is int and value < 1)):
            shown = repr(value) if field in entry else "missing"
            raise DataError(f"{where}: the field {field!r} is {shown}; it must be {MEANING[kind]}")


def _is_position(value: list, others: Collection[int]) -> bool:
    return len(value) == 2 and value[0] in RELATIONS and type(value[1]) is int and value[1] in others


# ------------------------------------------------------------------------------------------------ the routing
def task_of(text: str, metadata: Mapping) -> str:
    """k = R(c), F Eq. 7's hard routing: one of F's tasks or "edit", from the prompt alone. F §5.1.1; Q §4.3.

    The first that fits, the surest sign first:
        "edit"         there is a source image                    (Q's second task)
        "composition"  there is a tagged GenEval checklist
        "text"         words stand in ASCII double quotes         (before "a photo of": signs in photos)
        "composition"  it opens with "a photo of", GenEval's phrase
        "quality"      everything else: preference and aesthetics
    An include list without a tag describes a prompt but does not grade it, and does not decide. "t2i" is never the
    answer: it is F's three together, and only the caller knows whether they have one expert or three.

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
