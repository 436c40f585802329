"""Which rewards did the user ask for, and can it be?

`--rewards` is a short form or a file. The short form names scorers by their kinds and weighs them, for all prompts:

    --rewards geneval=0.8,pickscore=0.2

The file is one JSON object and says more: scorers with options, near or far, weights for each category of prompts (Q
4.2; `scoring.Panel.weight` says what a category is), and scorers that are only watched:

    {"scorers": {"judge": {"kind": "judge", "rubric": "alignment", "model": "Qwen/Qwen3-VL-30B-A3B-Instruct",
                           "endpoints": ["http://gpu-7:8000/v1", "http://gpu-8:8000/v1"]},
                 "pick":  {"kind": "served", "scorer": "pickscore", "endpoints": ["http://gpu-9:9000"]}},
     "weights": {"composition": {"geneval": 0.8, "pick": 0.2}, "default": {"judge": 1.0}},
     "watch":   ["aesthetic"]}

A name under "weights" or "watch" that "scorers" does not define is one of `NAMED`, Q's own judges, or a kind of its own
with that kind's defaults; the short form knows both, too. Only the standard library and `settings` are imported: a
mistake is one line, before anything is loaded.
"""

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from settings import TASKS, TINY_REWARDS, Settings, SettingsError, is_tiny, task_list

# Kind -> the options that its scorer takes: the factories' own arguments, as far as JSON can say them.
WHERE, DTYPES = ("device", "dtype"), ("float32", "bfloat16", "float16")
LIMITS = ("timeout", "deadline", "tries", "rest", "longest_rest", "concurrency", "max_bytes")  # remote.Limits
NEAR = {
    "jpeg": (), "ocr": ("device",), "geneval": (*WHERE, "detector", "clip", "strict", "short_side", "batch"),
    "pickscore": (*WHERE, "model", "processor", "batch"), "clipscore": (*WHERE, "model", "batch"),
    "hps": (*WHERE, "model", "batch"), "aesthetic": (*WHERE, "model", "head", "batch"),
    "imagereward": (*WHERE, "model", "batch"),
}  # fmt: skip
OTHERS = {
    "vlm": (*WHERE, "rubric", "model", "thought", "batch"), "face": ("no_face", "folder"),
    "trained": (*WHERE, "model", "batch"), "judge": ("rubric", "model", "endpoints", "thought", "key_env", *LIMITS),
    "served": ("scorer", "endpoints", "key_env", "batch", *LIMITS),
}  # fmt: skip
REQUIRED = {"vlm": ("rubric",), "trained": ("model",), "judge": ("rubric", "model", "endpoints"),
            "served": ("scorer", "endpoints")}  # fmt: skip
KINDS = {**NEAR, **OTHERS}
TYPES = {  # of an option's value; a string where nothing is said
    "strict": (bool,), "thought": (bool,), "endpoints": (list,), "batch": (int,), "short_side": (int,), "tries": (int,),
    "concurrency": (int,), "max_bytes": (int,),
    **dict.fromkeys(("timeout", "deadline", "rest", "longest_rest"), (int, float)),
}  # fmt: skip
NO_FACE = ("error", "skip")
# What each task is paid by where nothing is said: {task: {category: weights}}; no two tasks have a category in common,
# so that none replaces another's. DEVIATION: F 6.1 pays the quality teacher with DeQA and PickScore, 4:6; DeQA's
# checkpoint needs code of its own to be run, so that PickScore is alone here unless DeQA is served. DEVIATION: Q 4.2
# weighs categories and gives no numbers; these are ours, its emphases are Q's.
DEFAULTS = {
    "composition": {"composition": {"geneval": 1.0}}, "text": {"text": {"ocr": 1.0}},
    "quality": {"quality": {"pickscore": 1.0}},
    "t2i": {
        "t2i": {"alignment": 0.5, "beauty": 0.5}, "portrait": {"alignment": 0.3, "beauty": 0.2, "portrait": 0.5},
        "typography": {"alignment": 0.8, "beauty": 0.2},
    },
    "edit": {"edit": {"instruction": 0.6, "identity": 0.4}},
}  # fmt: skip
# F blends quality with a preference 4:6, because quality alone is hacked: the tiny teacher learns to paint everything
# black, as F Fig. 2's teachers lose what they are not paid for. ERRATUM: App. A gives 1:1 and other rewards.
TINY_DEFAULTS = {
    "composition": {"composition": {"task": 1.0}}, "text": {"text": {"task": 1.0}},
    "quality": {"quality": {"quality": 0.4, "preference": 0.6}},
    "t2i": {"t2i": {"preference": 0.6, "quality": 0.4}, "typography": {"preference": 0.8, "quality": 0.2}},
    "edit": {"edit": {"instruction": 0.6, "identity": 0.4}},
}  # fmt: skip
# Scorers that have a name and are no kinds of their own: Q 3.2-3.3's judges, a Qwen-VL on a rubric each, and a face
# model that has nothing to say about a picture without a face. None has a kind's name ("aesthetic" is LAION's head).
VLM = {"kind": "vlm", "dtype": "bfloat16"}  # one of 8 billion parameters serves them all
NAMED = {
    "alignment": {**VLM, "rubric": "alignment"}, "beauty": {**VLM, "rubric": "aesthetic"},
    "portrait": {**VLM, "rubric": "portrait"}, "instruction": {**VLM, "rubric": "editing"},
    "identity": {"kind": "face", "no_face": "skip"},
}  # fmt: skip


class Recipe(NamedTuple):
    """scorers: {name: {"kind", options}}; weights: {category: {name: weight}}; watch: names that are only logged."""

    scorers: dict[str, dict]
    weights: dict[str, dict[str, float]]
    watch: tuple[str, ...] = ()


def read(s: Settings) -> Recipe:
    """--rewards, or the defaults of the tasks. SettingsError, one line that names flag or file and entry."""
    if s.rewards.endswith(".json"):
        return _file(s, Path(s.rewards))
    if s.rewards:
        weights = {"default": _short(s)}
    else:
        # Of a task that is not drawn no scorer is loaded: a teacher has one task.
        tasks = (s.task,) if s.stage in ("grpo", "nft") and s.task in TASKS else task_list(s)
        defaults = TINY_DEFAULTS if is_tiny(s) else DEFAULTS
        weights = {category: dict(row) for task in tasks for category, row in defaults[task].items()}
    names = dict.fromkeys(name for row in weights.values() for name in row)
    return Recipe({name: _entry(s, name) for name in names}, weights)


def kinds(s: Settings) -> dict[str, tuple[str, ...]]:
    """The kinds that a run may name, with their options; the tiny world's own eyes have none, and come first."""
    return {**dict.fromkeys(TINY_REWARDS, ()), **KINDS, **dict.fromkeys(TINY_REWARDS, ())} if is_tiny(s) else KINDS


def named(s: Settings) -> dict[str, dict]:
    """Scorers that a run may name beside the kinds; the tiny world's own eyes judge what these do elsewhere."""
    return {} if is_tiny(s) else NAMED


def _entry(s: Settings, name: str) -> dict:
    """What a name without an entry means."""
    return dict(named(s).get(name, {"kind": name}))


def _short(s: Settings) -> dict[str, float]:
    found, known = {}, [*(kind for kind in kinds(s) if not REQUIRED.get(kind)), *named(s)]
    for item in filter(None, s.rewards.split(",")):
        name, _, weight = item.partition("=")
        if name in REQUIRED:
            needs = ", ".join(REQUIRED[name])
            raise SettingsError(f"--rewards {item}: {name} needs {needs}: write them to a .json file")
        if name not in known:
            raise SettingsError(f"--rewards {item}: no reward {name!r}{_hint(name, known)}")
        if name in found:
            raise SettingsError(f"--rewards {item}: {name} has a weight already")
        try:
            found[name] = float(weight or "1")
        except ValueError:
            found[name] = math.nan
        if not math.isfinite(found[name]):
            raise SettingsError(f"--rewards {item}: {weight!r} is not a number")
    if not any(found.values()):
        raise SettingsError(f"--rewards {s.rewards}: every weight is 0")
    return found


def _file(s: Settings, file: Path) -> Recipe:
    try:
        content = json.loads(file.read_text())
    except OSError as fault:
        raise SettingsError(f"--rewards {file}: {fault.strerror}") from fault
    except ValueError as fault:
        raise SettingsError(f"--rewards {file}: not JSON ({fault})") from fault
    where = f"--rewards {file}"
    _require(where, content, ("weights",), ("scorers", "weights", "watch"))
    for part in ("scorers", "weights"):
        if not isinstance(content.get(part, {}), dict):
            raise SettingsError(f"{where}: {part} must be an object")
    scorers = {name: checked(f"{where}: scorers.{name}", e, kinds(s)) for name, e in content.get("scorers", {}).items()}
    weights = {c: _row(f"{where}: weights.{c}", row) for c, row in content["weights"].items()}
    watch = content.get("watch", [])
    if not isinstance(watch, list) or not all(isinstance(name, str) for name in watch):
        raise SettingsError(f"{where}: watch must be a list of scorers' names")
    used = dict.fromkeys([*(name for row in weights.values() for name in row), *watch])
    for name in used:
        if name not in scorers:
            known = {**kinds(s), **dict.fromkeys(named(s), ())}
            if name not in known:
                raise SettingsError(f"{where}: {name} is not under scorers, and no kind{_hint(name, known)}")
            scorers[name] = checked(f"{where}: {name} (not under scorers)", _entry(s, name), kinds(s))
    for name in scorers:
        if name not in used:
            raise SettingsError(f"{where}: scorers.{name} has no weight and is not watched; use it or remove it")
    if not weights or not any(weight for row in weights.values() for weight in row.values()):
        raise SettingsError(f"{where}: weights gives no scorer any weight")
    return Recipe(scorers, weights, tuple(watch))


def _require(where: str, entry: object, needed: Sequence[str], known: Sequence[str]) -> None:
    if not isinstance(entry, dict):
        raise SettingsError(f"{where} must be an object, not {entry!r}")
    for key in entry:
        if key not in known:
            raise SettingsError(f"{where} has no {key!r}{_hint(key, known)}")
    for key in needed:
        if key not in entry:
            raise SettingsError(f"{where} needs {key!r}")


def checked(where: str, entry: object, known: Mapping[str, Sequence[str]]) -> dict:
    """A scorer's entry, {"kind", options}, of one of the `known` kinds. SettingsError, which begins with `where`."""
    _require(where, entry, ("kind",), [*(entry if isinstance(entry, dict) else ()), "kind"])
    kind = entry["kind"]
    if not isinstance(kind, str) or kind not in known:
        raise SettingsError(f"{where}: no reward of the kind {kind!r}{_hint(str(kind), known)}")
    _require(where, entry, REQUIRED.get(kind, ()), ("kind", *known[kind]))
    for option, value in entry.items():
        kinds_of_value = TYPES.get(option, (str,))
        if type(value) not in kinds_of_value:
            meant = " or ".join(kind.__name__ for kind in kinds_of_value)
            raise SettingsError(f"{where}: {option} is {value!r}; it must be a {meant}")
    if entry.get("no_face", "error") not in NO_FACE:
        raise SettingsError(f"{where}: no_face is {entry['no_face']!r}; choose from {', '.join(NO_FACE)}")
    if entry.get("dtype", DTYPES[0]) not in DTYPES:
        raise SettingsError(f"{where}: dtype is {entry['dtype']!r}; choose from {', '.join(DTYPES)}")
    if "endpoints" in entry and not (entry["endpoints"] and all(isinstance(e, str) for e in entry["endpoints"])):
        raise SettingsError(f"{where}: endpoints must be a list of addresses")
    return dict(entry)


def _row(where: str, row: object) -> dict[str, float]:
    if not isinstance(row, dict):
        raise SettingsError(f"{where} must be an object of weights, not {row!r}")
    for name, weight in row.items():
        if type(weight) not in (int, float) or not math.isfinite(weight):
            raise SettingsError(f"{where}.{name} is {weight!r}; it must be a number")
    return {name: float(weight) for name, weight in row.items()}


def _hint(name: str, known: Sequence[str] | Mapping) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; choose from {', '.join(known)}"
