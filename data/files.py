"""Prompt files: on what does the pipeline train and evaluate, and which expert does a prompt need?

    which prompts are there?             read_prompts    F §6.1 ("the Flow-GRPO splits"), Q §4.2
    which expert does a prompt need?     task_of         k = R(c), F Eq. 7; the task type of Q §4.3

F has three tasks, composition, text and quality, each with an expert of its own. Q has two wider ones: "t2i" is every
picture from a prompt alone (its kinds are categories, Q §4.2), "edit" is a picture from a picture.

The files are those that users of the earlier releases have. A path is a `.txt` (one prompt a line), a `.jsonl` (one
GenEval object a line), a `.json` (an array of them) or a folder with `{train,test}_metadata.jsonl` or
`{train,test}.txt`:

    {"tag": "position", "prompt": "a photo of a cow right of a laptop", "include": [
     {"class": "laptop", "count": 1}, {"class": "cow", "count": 1, "position": ["right of", 0]}]}

`tag`, `include` and `prompt` are required, and of Q's prompts only `prompt`. An include may have a `color`
and a `position` = [relation, index of the include it refers to]. `exclude` lists counts that must not be reached.
`category` says whose reward weights serve the prompt, `target` what a text has to read, if it is not quoted in the
prompt. Editing adds `t2i_prompt` (what the source shows) and `image`:

    {"prompt": "Change the number of forks to two.", "image": "images/7.jpg", "t2i_prompt": "a photo of three forks"}

An image is a path, relative to the folder of the file, or the picture itself as a data URI (`data/pictures.py`), or a
list of these, if the model takes several.

Exporters may write null, "" or [] for a field that is not given: it counts as not given. 2.0 is a count. A fault of a
line is found when it is read, not after an hour of training. It is said in one line that starts with `path:line:` (line
0 is the file as a whole).
"""

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from data.checklists import impossible
from data.common import DataError, read_objects, read_text
from rewards import RELATIONS, as_seen, ocr_target

TASKS = ("composition", "text", "quality", "t2i", "edit")
SPLITS = ("train", "test")
OPEN_TASKS, OPEN_FIELDS = ("t2i", "edit"), ("image", "category", "target")  # see `is_open`
EDIT_FIELDS = ("image", "t2i_prompt")
# The fields of a line and of an entry of its lists that are checked; other fields pass.
FIELDS = {**dict.fromkeys(("tag", "prompt", "category", "target", *EDIT_FIELDS), str), "include": list, "exclude": list}
ENTRY = {"class": str, "count": int, "color": str, "position": list}
MEANING = {str: "a non-empty string", int: "a positive whole number", list: "a non-empty list"}


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
    """All prompts of a `.txt`, a `.jsonl`, a `.json` or, for the split "train" or "test", of a folder, in order.

    F §6.1, Q §4.2. Blank lines are skipped. `split` matters for folders only. There, GenEval metadata is preferred to
    plain text, because only metadata can be scored. A prompt of the task "text" must quote its target, and one of the
    task "edit" needs `EDIT_FIELDS`. The path of an image is made absolute, so that a run finds it from any folder.
    Raises DataError for anything wrong with the files, except for the pictures (`pictures.check_sources`), and
    ValueError for an unknown task or split.
    """
    check_known("task", task, TASKS)
    check_known("split", split, SPLITS)
    file = prompt_file(Path(path), split)
    if file.suffix.lower() == ".txt":
        lines = [(f"{file}:{n}", line.strip()) for n, line in enumerate(read_text(file).split("\n"), 1)]
        found = [(source, line, {}) for source, line in lines if line]
    else:
        checked = [(source, _metadata(source, entry, task)) for source, entry in read_objects(file)]
        found = [(source, metadata["prompt"], metadata) for source, metadata in checked]
    prompts = []
    for source, text, metadata in found:
        if task == "text":
            _check_target(source, text, metadata)
        if task == "edit":
            _check_fields(source, metadata, FIELDS, EDIT_FIELDS)
        if "image" in metadata:
            metadata["image"] = _absolute(metadata["image"], file.parent.absolute())
        prompts.append(Prompt(text, task, metadata, source))
    if not prompts:
        raise DataError(f"{file}:0: the file holds no prompt; write one a line")
    return prompts


def holds_split(path: str | Path, split: str) -> bool:
    """Does a folder hold a file of this split? A file serves both. A folder that --stage curate wrote has no test."""
    path = Path(path)
    return not os.path.isdir(path) or any((path / name).is_file() for name in _names(split))


def _names(split: str) -> tuple[str, str]:
    return f"{split}_metadata.jsonl", f"{split}.txt"


def prompt_file(path: Path, split: str) -> Path:
    """The one file to read: `path` itself, or what a folder holds for the split."""
    if os.path.isdir(path):  # False, too, for a name that no system has
        file = next((path / name for name in _names(split) if (path / name).is_file()), None)
        if not file:
            raise DataError(f"{path}:0: no {' and no '.join(_names(split))} in this folder; add one")
        return file
    if path.suffix.lower() not in (".txt", ".jsonl", ".json"):
        raise DataError(f"{path}:0: neither a .txt, a .jsonl, a .json nor a folder; give one of these")
    return path


def _absolute(image: str | list[str], root: Path) -> str | list[str]:
    if isinstance(image, list):
        return [_absolute(each, root) for each in image]
    return image if image.startswith("data:") else str(root / image)


def _metadata(source: str, entry: object, task: str) -> dict:
    """One checked line; DataError names the first field that is missing or wrong."""
    metadata = _given(source, entry)
    _check_fields(source, metadata, FIELDS, ("prompt",) if is_open(task, metadata) else ("prompt", "tag", "include"))
    for name in {"include", "exclude"} & set(metadata):
        metadata[name] = [_given(f"{source}: {name}[{i}]", each) for i, each in enumerate(metadata[name])]
        for index, each in enumerate(metadata[name]):
            where = f"{source}: {name}[{index}]"
            _check_fields(where, each, ENTRY, ("class", "count"))
            others = [i for i in range(len(metadata.get("include", []))) if i != index]
            if "position" in each and not _is_position(each["position"], others):
                meant = f"[one of {', '.join(RELATIONS)}; index of another include]"
                raise DataError(f"{where}: the field 'position' is {each['position']!r}; it must be {meant}")
    if cause := impossible(metadata):
        raise DataError(f"{source}: no picture can pass this checklist: {cause}")
    return metadata


def _given(where: str, entry: object) -> dict:
    """A JSON object without the fields that are not given; counts and indices that were written as 2.0 are 2."""
    if not isinstance(entry, dict):
        raise DataError(f"{where}: {entry!r} is not a JSON object")
    whole = lambda value: int(value) if type(value) is float and value.is_integer() else value  # noqa: E731
    known = FIELDS | ENTRY
    given = {field: v for field, v in entry.items() if v is not None and not (v in ("", []) and field in known)}
    numbers = {"count": whole, "position": lambda value: [*map(whole, value)] if type(value) is list else value}
    return {field: numbers[field](value) if field in numbers else value for field, value in given.items()}


def _check_target(source: str, text: str, metadata: Mapping) -> None:
    """DataError for a prompt of a text that has no target, or one that no picture can show."""
    try:
        target = metadata.get("target") or ocr_target(text)
    except ValueError as fault:
        raise DataError(f"{source}: {fault}") from None
    if not as_seen(target) or target != target.strip():
        raise DataError(f"{source}: the field 'target' is {target!r}; it must not begin or end with a blank")


def is_open(task: str, metadata: Mapping) -> bool:
    """Does a line need no checklist, because it is one of Q's prompts by its task or by a field, or has a target?"""
    return task in OPEN_TASKS or any(field in metadata for field in OPEN_FIELDS)


def _check_fields(where: str, entry: Mapping, kinds: Mapping[str, type], needed: Collection[str]) -> None:
    """DataError unless an object has the needed fields, and every field is of its exact type: true is no number."""
    for field, kind in kinds.items():
        value, wanted = entry.get(field), field in entry or field in needed
        for each in value if field == "image" and type(value) is list else [value] * wanted:
            if type(each) is not kind or (kind is int and each < 1) or (kind is str and not each.strip()):
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
        "text"         a target is given or quoted                (before "a photo of": signs in photos)
        "composition"  it opens with "a photo of", GenEval's phrase
        "quality"      everything else: preference and aesthetics
    An include list without a tag describes a prompt but does not grade it, and does not decide. "t2i" is never the
    answer: it is F's three together, and only the caller knows whether they have one expert or three.

    SILENT (F Eq. 7): R(c) is not defined; with one data set a task it amounts to where a prompt came from. A
    rule on the prompt itself also serves prompts from elsewhere, and agrees on every line of the GenEval and
    OCR test files.
    """
    if "image" in metadata:
        return "edit"
    if "tag" in metadata and "include" in metadata:
        return "composition"
    try:
        return "text" if "target" in metadata or ocr_target(text) else "quality"
    except ValueError:
        return "composition" if text.strip().lower().startswith("a photo of ") else "quality"
