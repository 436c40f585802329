"""Which scorers does --rewards name, and how is each of them made?

The short form names scorers by their kinds and weighs them, for all prompts. A kind is one of `KINDS`, a named judge of
`NAMED`, or a function of the user's own:

    --rewards geneval=0.8,pickscore=0.2
    --rewards my_file.py:brightness=0.5,ocr      with def brightness(images, prompts, sources) in it, see `own`

The file is one JSON object and says more: scorers with options, near or far, weights for each category of prompts (Q
4.2; `panel.Panel.category` says what a category is), and scorers that are only watched:

    {"scorers": {"judge": {"kind": "judge", "rubric": "alignment", "model": "Qwen/Qwen3-VL-30B-A3B-Instruct",
                           "endpoints": ["http://gpu-7:8000/v1", "http://gpu-8:8000/v1"]},
                 "pick":  {"kind": "served", "scorer": "pickscore", "endpoints": ["http://gpu-9:9000"]}},
     "weights": {"composition": {"geneval": 0.8, "pick": 0.2}, "default": {"judge": 1.0}},
     "watch":   ["aesthetic"]}

A name under "weights" or "watch" that "scorers" does not define is a kind or a named judge with its defaults. The
options of a kind are the arguments of its factory.
"""

import importlib
import importlib.util
import inspect
import json
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rewards import RewardError, Scorer

# Kind -> the module and name of its factory, which is imported when the kind is asked for: it may need an extra.
KINDS = {
    "geneval": "scorers.geneval:geneval", "ocr": "scorers.ocr:ocr", "pickscore": "scorers.clip:pickscore",
    "clipscore": "scorers.clip:clipscore", "aesthetic": "scorers.clip:aesthetic", "hps": "scorers.clip:hps",
    "imagereward": "scorers.clip:imagereward", "jpeg": "scorers.ocr:jpeg", "vlm": "scorers.vlm:vlm",
    "face": "scorers.faces:face", "trained": "scorers.vlm_trained:scorer", "judge": "scorers.remote:judge",
    "served": "scorers.remote:served",
}  # fmt: skip
# The tiny worlds' own, which are asked there instead of a kind of the same name. They have no options.
TINY = {
    **dict.fromkeys(("geneval", "ocr", "quality", "preference", "task"), "tiny.drawings:scorer"),
    **dict.fromkeys(("instruction", "identity"), "tiny.edits:scorer"),
}
# Scorers that have a name and are no kinds of their own: Q 3.2-3.3's judges, a Qwen-VL on a rubric each, and a face
# model that has nothing to say about a picture without a face. None has a kind's name ("aesthetic" is LAION's head).
VLM = {"kind": "vlm", "dtype": "bfloat16"}  # one of 8 billion parameters serves them all
NAMED = {
    "alignment": {**VLM, "rubric": "alignment"}, "beauty": {**VLM, "rubric": "aesthetic"},
    "portrait": {**VLM, "rubric": "portrait"}, "instruction": {**VLM, "rubric": "editing"},
    "identity": {"kind": "face", "no_face": "skip"},
}  # fmt: skip
# What each task is paid by without --rewards: {task: {category: weights}}; no two tasks have a category in common,
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
DTYPES = ("float32", "bfloat16", "float16")


class Asked(NamedTuple):
    """What --rewards asks for: {name: {"kind", options}}, {category: {name: weight}} and the names that are watched."""

    scorers: dict[str, dict]
    weights: dict[str, dict[str, float]]
    watch: tuple[str, ...] = ()


# ------------------------------------------------------------------------------------------------ reading --rewards
def read(rewards: str, tasks: Sequence[str], tiny: bool) -> Asked:
    """--rewards, or without it the defaults of the tasks. RewardError, one line that names flag or file and entry."""
    if rewards.endswith(".json"):
        return _file(Path(rewards), tiny)
    if rewards:
        return _short(rewards, tiny)
    defaults = TINY_DEFAULTS if tiny else DEFAULTS
    weights = {category: dict(row) for task in tasks for category, row in defaults[task].items()}
    return Asked({name: _entry("", name, tiny) for row in weights.values() for name in row}, weights)


def _short(rewards: str, tiny: bool) -> Asked:
    scorers, weights = {}, {}
    for item in filter(None, rewards.split(",")):
        kind, _, weight = item.partition("=")
        name, where = kind.rpartition(":")[2], f"--rewards {item}"
        if name in weights:
            raise RewardError(f"{where}: {name} has a weight already")
        scorers[name] = {"kind": kind} if ":" in kind else _entry(where, kind, tiny)
        try:
            weights[name] = float(weight or "1")
        except ValueError:
            weights[name] = math.nan
    _check_weights(f"--rewards {rewards}", {"default": weights})
    return Asked(scorers, {"default": weights})


def _file(file: Path, tiny: bool) -> Asked:
    where = f"--rewards {file}"
    try:
        content = json.loads(file.read_text())
    except OSError as fault:
        raise RewardError(f"{where}: {fault.strerror}") from fault
    except ValueError as fault:
        raise RewardError(f"{where}: not JSON ({fault})") from fault
    if not isinstance(content, dict) or not {"weights"} <= set(content) <= {"scorers", "weights", "watch"}:
        raise RewardError(f"{where}: must be an object with weights, and perhaps scorers and watch")
    scorers, weights, watch = content.get("scorers", {}), content["weights"], content.get("watch", [])
    if not isinstance(watch, list) or not all(isinstance(name, str) for name in watch):
        raise RewardError(f"{where}: watch must be a list of names")
    for part, value in (("scorers", scorers), ("weights", weights)):
        if not isinstance(value, dict) or not all(isinstance(entry, dict) for entry in value.values()):
            raise RewardError(f"{where}: {part} must be an object of objects")
    _check_weights(f"{where}: weights", weights)
    used = dict.fromkeys([*(name for row in weights.values() for name in row), *watch])
    if idle := set(scorers) - set(used):
        raise RewardError(f"{where}: scorers.{min(idle)} has no weight and is not watched; use it or remove it")
    for name, entry in scorers.items():
        if not isinstance(kind := entry.get("kind"), str) or (kind not in _kinds(tiny) and ":" not in kind):
            raise RewardError(f"{where}: scorers.{name}: kind is {kind!r}; choose from {', '.join(_kinds(tiny))}")
    made = {name: dict(entry) for name, entry in scorers.items()}
    made |= {name: _entry(where, name, tiny) for name in used if name not in made}
    return Asked(made, {c: {name: float(w) for name, w in row.items()} for c, row in weights.items()}, tuple(watch))


def _check_weights(where: str, weights: Mapping[str, Mapping]) -> None:
    rows = [(name, weight) for row in weights.values() for name, weight in row.items()]
    for name, weight in rows:
        if type(weight) not in (int, float) or not math.isfinite(weight):
            raise RewardError(f"{where}: the weight of {name} is {weight!r}; it must be a number")
    if not any(weight for _, weight in rows):
        raise RewardError(f"{where}: no scorer has any weight")


def _kinds(tiny: bool) -> tuple[str, ...]:
    return tuple({**TINY, **KINDS} if tiny else KINDS)


def _entry(where: str, name: str, tiny: bool) -> dict:
    """What a name without an entry of its own means."""
    named = {} if tiny else NAMED
    if name not in named and name not in _kinds(tiny):
        raise RewardError(f"{where}: no scorer {name!r}; choose from {', '.join([*_kinds(tiny), *named])}")
    return dict(named.get(name, {"kind": name}))


# --------------------------------------------------------------------------------------------------- making a scorer
def check(asked: Asked, tiny: bool) -> None:
    """RewardError if an entry has an option that its kind does not, or lacks one; nothing is loaded but the code."""
    for name, entry in asked.scorers.items():
        arguments(entry["kind"], {key: value for key, value in entry.items() if key != "kind"}, tiny, name)


def make(kind: str, options: Mapping, device: str = "cpu", tiny: bool = False) -> Scorer:
    """A scorer of a kind, with options as JSON can say them. It is on `device` unless an option names another.

    RewardError, one line, for an unknown kind or option, and as the factory.
    """
    factory, values = arguments(kind, options, tiny, kind)
    if "device" in inspect.signature(factory).parameters:
        values.setdefault("device", device)
    return factory(**values)


def arguments(kind: str, options: Mapping, tiny: bool, name: str) -> tuple[Callable, dict]:
    """(factory, its arguments) of a kind. RewardError that begins with the scorer's `name`, if an option does not fit.

    The factory's signature says what its options are: its arguments whose values JSON can say. An argument that is a
    group of options, such as `remote.Limits`, is given by its fields.
    """
    where = f"scorer {name!r}"
    if ":" in kind or (tiny and kind in TINY):
        if options:
            raise RewardError(f"{where}: {kind} has no options, and {min(options)} is given")
        factory = own if ":" in kind else _import(TINY[kind])
        return factory, {next(iter(inspect.signature(factory).parameters)): kind}
    if kind not in KINDS:
        raise RewardError(f"{where}: no kind {kind!r}; choose from {', '.join(KINDS)}")
    factory, values, rest, known = _import(KINDS[kind]), {}, dict(options), []
    for argument, parameter in inspect.signature(factory).parameters.items():
        default, is_group = parameter.default, hasattr(parameter.default, "_replace")
        wanted = {option: _type(parameter.annotation, value)
                  for option, value in (default._asdict() if is_group else {argument: default}).items()}  # fmt: skip
        known += [option for option, kind_of_value in wanted.items() if kind_of_value]
        given = {o: _value(f"{where}: {o}", rest.pop(o), wanted[o]) for o in known if o in wanted and o in rest}
        if given:
            values[argument] = default._replace(**given) if is_group else given[argument]
        elif default is parameter.empty:
            raise RewardError(f"{where}: {kind} needs {argument!r}; give it in a .json file for --rewards")
    if rest:
        raise RewardError(f"{where}: {kind} has no option {min(rest)!r}; choose from {', '.join(known)}")
    return factory, values


def _import(where: str) -> Callable:
    module, _, name = where.partition(":")
    return getattr(importlib.import_module(module), name)


def _type(annotation, default) -> type | None:
    """The type of an option's values; None if JSON cannot say them."""
    if default is inspect.Parameter.empty:
        return list if typing.get_origin(annotation) is Sequence else str
    return type(default) if type(default).__name__ in ("str", "int", "float", "bool", "dtype") else None


def _value(where: str, value: object, wanted: type) -> object:
    """The argument that a JSON value means. RewardError if it is of another type."""
    if wanted.__name__ == "dtype" and value in DTYPES:
        import torch

        return getattr(torch, value)
    fits = type(value) is wanted or (wanted is float and type(value) is int)
    if fits and (wanted is not list or (value and all(isinstance(each, str) for each in value))):
        return value
    names = {"dtype": f"one of {', '.join(DTYPES)}", "list": "a list of strings"}
    meant = names.get(wanted.__name__, f"a {wanted.__name__}")
    raise RewardError(f"{where} is {value!r}; it must be {meant}")


def own(where: str) -> Scorer:
    """A user's function, FILE.py:FUNCTION, as a scorer: (images, prompts, sources) -> (B,), see `rewards.Scorer`.

    RewardError if there is no such file or function. What the file or the function itself raises is raised as it is.
    """
    file, _, name = where.rpartition(":")
    if not Path(file).is_file():
        raise RewardError(f"--rewards {where}: no file {file}; write it as FILE.py:FUNCTION")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise RewardError(f"--rewards {where}: {file} has no function {name!r}")
    return Scorer(name, function, -math.inf, math.inf)
