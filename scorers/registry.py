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
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

from data.common import first_line, read_json
from rewards import RewardError, Scorer

# Kind -> the module and name of its factory, which is imported when the kind is asked for: it may need an extra.
KINDS = {
    "geneval": "scorers.geneval:geneval", "ocr": "scorers.ocr:ocr", "pickscore": "scorers.clip:pickscore",
    "clipscore": "scorers.clip:clipscore", "aesthetic": "scorers.clip:aesthetic", "hps": "scorers.clip:hps",
    "imagereward": "scorers.clip:imagereward", "jpeg": "scorers.ocr:jpeg", "vlm": "scorers.vlm:vlm",
    "face": "scorers.faces:face", "trained": "scorers.vlm_trained:scorer", "judge": "scorers.remote:judge",
    "served": "scorers.remote:served", "blipvqa": "scorers.vqa:blipvqa", "softtifa": "scorers.vqa:softtifa",
    "diversity": "scorers.measures:diversity", "untouched": "scorers.measures:untouched",
}  # fmt: skip
# Scorers that have a name and are no kinds of their own: Q 3.2-3.3's judges, a Qwen-VL on a rubric each, and a face
# model that has nothing to say about a picture without a face. None has a kind's name ("aesthetic" is LAION's head).
VLM = {"kind": "vlm", "dtype": "bfloat16"}  # one of 8 billion parameters serves them all
NAMED = {
    "alignment": {**VLM, "rubric": "alignment"}, "beauty": {**VLM, "rubric": "aesthetic"},
    "portrait": {**VLM, "rubric": "portrait"}, "instruction": {**VLM, "rubric": "editing"},
    "identity": {"kind": "face", "no_face": "skip"},
}  # fmt: skip
DTYPES = ("float32", "bfloat16", "float16")
SHAPE = '{"weights": {CATEGORY: {NAME: NUMBER}}, "scorers": {NAME: {"kind": KIND, OPTION: VALUE}}, "watch": [NAME]}'


class Asked(NamedTuple):
    """What --rewards asks for: {name: {"kind", options}}, {category: {name: weight}} and the names that are watched.

    world: whose own scorers, its `KINDS`, come before those of a kind of the same name; None has none.
    """

    scorers: dict[str, dict]
    weights: dict[str, dict[str, float]]
    watch: tuple[str, ...] = ()
    world: ModuleType | None = None


# ------------------------------------------------------------------------------------------------ reading --rewards
def read(rewards: str, tasks: Sequence[str], world: ModuleType) -> Asked:
    """--rewards, or without it what the world pays the tasks by. RewardError, one line that names flag and entry."""
    where, scorers, watch = f"--rewards {rewards}", {}, ()
    if not rewards:
        weights = {category: row for task in tasks for category, row in world.REWARDS[task].items()}
    else:
        try:
            scorers, weights, watch = _file(Path(rewards)) if rewards.endswith(".json") else _short(rewards)
        except (OSError, ValueError) as fault:
            raise RewardError(f"{where}: {fault}") from fault
        numbers = [(name, weight) for row in weights.values() for name, weight in row.items()]
        for name, weight in numbers:
            if type(weight) not in (int, float) or not math.isfinite(weight):
                raise RewardError(f"{where}: the weight of {name} is {weight!r}; it must be a number")
        if not any(weight for _, weight in numbers):
            raise RewardError(f"{where}: no scorer has any weight")
    used = [*(name for row in weights.values() for name in row), *watch]
    if idle := set(scorers) - set(used):
        raise RewardError(f"{where}: {min(idle)} has no weight and is not watched; use it or remove it")
    kinds = (*world.KINDS, *KINDS)
    known = {**{kind: {"kind": kind} for kind in kinds}, **({} if world.KINDS else NAMED)}
    made = {name: dict(scorers.get(name) or known.get(name, {"kind": name})) for name in (*scorers, *used)}
    for name, entry in made.items():
        if not isinstance(kind := entry.get("kind"), str) or (kind not in kinds and ":" not in kind):
            raise RewardError(f"{where}: {name}: no scorer of kind {kind!r}; choose from {', '.join(known)}")
    rows = {category: {name: float(weight) for name, weight in row.items()} for category, row in weights.items()}
    return Asked(made, rows, tuple(watch), world)


def _short(text: str) -> tuple[dict, dict, Sequence[str]]:
    """The short form as what a file says: (scorers, weights, watch). ValueError for a name that is there twice."""
    scorers, weights = {}, {}
    for item in filter(None, text.split(",")):
        kind, _, weight = item.partition("=")
        name = kind.rpartition(":")[2]
        if name in weights:
            raise ValueError(f"{name} has a weight already")
        scorers[name] = {"kind": kind} if ":" in kind else {}
        weights[name] = float(weight or "1")
    return scorers, {"default": weights}, ()


def _file(file: Path) -> tuple[dict, dict, Sequence[str]]:
    """(scorers, weights, watch) of a rewards file; ValueError if it has not its shape."""
    content = read_json(file)
    if isinstance(content, dict) and {"weights"} <= set(content) <= {"scorers", "weights", "watch"}:
        scorers, weights, watch = content.get("scorers", {}), content["weights"], content.get("watch", [])
        if isinstance(scorers, dict) and isinstance(weights, dict) and isinstance(watch, list):
            rows = all(isinstance(row, dict) for row in (*scorers.values(), *weights.values()))
            if rows and all(isinstance(name, str) for name in watch):
                return scorers, weights, watch
    raise ValueError(f"must have this shape, scorers and watch being optional: {SHAPE}")


# --------------------------------------------------------------------------------------------------- making a scorer
def check(asked: Asked) -> None:
    """RewardError if an entry has an option that its kind does not, or lacks one; nothing is loaded but the code."""
    for name, entry in asked.scorers.items():
        arguments(entry["kind"], {key: value for key, value in entry.items() if key != "kind"}, asked.world, name)


def make(kind: str, options: Mapping, device: str = "cpu", world: ModuleType | None = None) -> Scorer:
    """A scorer of a kind, with options as JSON can say them. It is on `device` unless an option names another.

    RewardError, one line, for an unknown kind or option, and as the factory.
    """
    factory, values = arguments(kind, options, world, kind)
    if "device" in inspect.signature(factory).parameters:
        values.setdefault("device", device)
    return named(factory(**values))


def named(scorer: Scorer) -> Scorer:
    """The scorer with its scores on the CPU, and with its own exceptions as RewardErrors that name it.

    A ValueError, such as for a prompt without a target, says itself what is wrong.
    """

    def asked(ask: Callable) -> Callable:
        def score(*batch):
            try:
                return torch.as_tensor(ask(*batch)).detach().cpu()
            except (ValueError, KeyboardInterrupt):
                raise
            except BaseException as fault:  # its sys.exit would end the run without a checkpoint
                raise RewardError(f"scorer {scorer.name!r}: {type(fault).__name__}: {first_line(fault)}") from fault

        return score

    return scorer._replace(score=asked(scorer.score), verdict=scorer.verdict and asked(scorer.verdict))


def arguments(kind: str, options: Mapping, world: ModuleType | None, name: str) -> tuple[Callable, dict]:
    """(factory, its arguments) of a kind. RewardError that begins with the scorer's `name`, if an option does not fit.

    The factory's signature says what its options are. An argument that is a group of options, such as `remote.Limits`,
    is given by its fields. A user's function and a tiny world's own scorers have no options.
    """
    where, is_worlds = f"scorer {name!r}", bool(world) and kind in world.KINDS
    if ":" in kind or is_worlds:
        if options:
            raise RewardError(f"{where}: {kind} has no options, and {min(options)} is given")
        return (world.scorer, {"name": kind}) if is_worlds else (own, {"where": kind})
    if kind not in KINDS:
        raise RewardError(f"{where}: no kind {kind!r}; choose from {', '.join(KINDS)}")
    factory, known = _import(KINDS[kind]), {}
    parameters = inspect.signature(factory).parameters.values()
    for p in parameters:
        known |= p.annotation.__annotations__ if hasattr(p.default, "_fields") else {p.name: p.annotation}
    if unknown := set(options) - set(known):
        raise RewardError(f"{where}: {kind} has no option {min(unknown)!r}; choose from {', '.join(known)}")
    values = {option: _value(f"{where}: {option}", value, known[option]) for option, value in options.items()}
    for p in parameters:
        if group := {o: values.pop(o) for o in getattr(p.default, "_fields", ()) if o in values}:
            values[p.name] = p.default._replace(**group)
        if p.default is p.empty and p.name not in values:
            raise RewardError(f"{where}: {kind} needs {p.name!r}; give it in a .json file for --rewards")
    return factory, values


def _import(where: str) -> Callable:
    module, _, name = where.partition(":")
    return getattr(importlib.import_module(module), name)


def _value(where: str, value: object, annotation: object) -> object:
    """The argument that a JSON value means. RewardError if it is not of a type that the argument takes."""
    types = typing.get_args(annotation) or (annotation,)
    if typing.get_origin(annotation) is Sequence:
        fits = isinstance(value, list) and value and all(isinstance(each, str) for each in value)
    elif torch.dtype in types:
        fits = value in DTYPES
        value = getattr(torch, value) if fits else value
    else:
        fits = type(value) in types or (float in types and type(value) is int)
    if not fits:
        raise RewardError(f"{where} is {value!r}; it must be {annotation}")
    return value


def own(where: str) -> Scorer:
    """A user's function, FILE.py:FUNCTION, as a scorer: (images, prompts, sources) -> (B,), see `rewards.Scorer`.

    RewardError if there is no such file or function, or the file cannot be run.
    """
    file, _, name = where.rpartition(":")
    if not Path(file).is_file():
        raise RewardError(f"--rewards {where}: no file {file}; write it as FILE.py:FUNCTION")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as fault:
        raise RewardError(f"--rewards {where}: {file}: {type(fault).__name__}: {first_line(fault)}") from fault
    if not callable(function := getattr(module, name, None)):
        raise RewardError(f"--rewards {where}: {file} has no function {name!r}")
    return Scorer(name, function, -math.inf, math.inf)
