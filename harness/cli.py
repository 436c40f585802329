"""From a command line to Settings: flags, --config and presets are put together and checked.

Only the standard library and settings.py are imported, so that `--help` and a mistake are answered before a program
spends seconds on importing torch. A mistake is a `SettingsError` of one line; a program then ends with exit code 2.
"""

import argparse
import contextlib
import difflib
import io
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import settings
from data.common import DataError, one_line, read_json
from settings import FIELDS, PRESETS, TASKS, VELOCITY, Settings, SettingsError, decided_by, is_tiny, parts_of, unread

DESCRIPTIONS = {
    "train.py": "Flow-OPD and Qwen-Image-2.0-RL, from pretraining to on-policy distillation.",
    "eval.py": "Base, teachers and students draw the same test prompts from the same noise, and are compared.",
}


def answer_early(argv: Sequence[str], prog: str = "train.py") -> None:
    """Answer --help and a wrong flag, and exit; return if there is work to do. Only rank 0 prints."""
    out, err = (io.StringIO(),) * 2 if int(os.environ.get("RANK", "0")) > 0 else (sys.stdout, sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            parse(argv, prog)
        except SettingsError as fault:
            print(f"error: {one_line(fault)}", file=sys.stderr)
            wait_for_rank_0()
            sys.exit(2)
        finally:
            flush()


def wait_for_rank_0(seconds: float = 30.0) -> None:
    """What another rank does with a user's error before it speaks: rank 0 mostly has the same one and prints it.

    The launcher then ends this rank, with exit code 2. If this rank went first, rank 0 could be ended before it prints.
    """
    if int(os.environ.get("RANK", "0")) > 0:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(2))
        time.sleep(seconds)


def flush() -> None:
    """Write out what was printed. Nobody may be reading (`| head`): then the rest goes nowhere, without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def parse(argv: Sequence[str], prog: str = "train.py") -> tuple[Settings, dict]:
    """The command line -> (settings, what was given on it and in --config).

    Raises SettingsError for an unknown flag, for one that the stage does not read, for a wrong value and for a
    combination that cannot work.
    """
    first = _Parser(prog, allow_abbrev=False, argument_default=argparse.SUPPRESS, add_help=False)
    for name in ("config", "preset", "stage", "tasks"):
        first.add_argument(_flag(name))
    given = vars(first.parse_known_args(argv)[0])
    file = _read_config(given["config"]) if given.get("config") else {}
    given = {**file, **given}
    if prog == "eval.py":
        given.setdefault("stage", "eval")
    if (given.get("stage") == "eval") != (prog == "eval.py"):
        raise SettingsError(f"--stage {given['stage']} is not of {prog}: eval.py evaluates, train.py does all else")
    chosen = {name: given[name] for name in ("preset", "stage", "tasks") if name in given}
    values = unchecked(chosen)
    _check_values(values)
    fixed = {"preset", "stage"}  # --help shows what other flags may give a meaning to
    shown = [n for n in FIELDS if not all(why and why.keys() <= fixed for why in why_unread(chosen, n))]
    flags, unknown = _parser(prog, values, shown).parse_known_args(argv)
    if unknown:
        raise SettingsError(f"unknown flag {unknown[0]}; {_near(unknown[0].split('=')[0], map(_flag, FIELDS))}")
    flags = {name: _pairs(name, v) if FIELDS[name].type is dict else v for name, v in vars(flags).items()}
    if flags.get("compare", {}).get("base") == "":
        flags |= _whole_list(flags)
    given |= flags
    for name in (*file, *flags):
        reasons = why_unread(given, name)
        if all(reasons):
            where = _flag(name) if name in flags else f"--config {given['config']}: {name}"
            raise SettingsError(f"{where}: {_refusal(name, reasons, values.stage)}")
    return resolve(given), given


def resolve(given: dict) -> Settings:
    """Values that are given, over those of the preset and its stage -> checked settings with a name."""
    s = unchecked(given)
    _check(s)
    if s.stage == "all":  # refuse now what a part would refuse after the others have trained for hours
        for part in (*parts_of(s), "eval"):
            for_stage(given, part)
    return s


def why_unread(given: dict, name: str) -> list[dict]:
    """Why a setting is not read by the stage, or by each part of --stage all (`settings.unread`); {}: it is."""
    s = unchecked(given)
    if s.stage != "all":
        return [unread(s, name)]
    if name in decided_by(s):
        return [{"stage": "all"}]
    return [unread(unchecked(_own(given, stage)), name) for stage in (*parts_of(s), "eval")]


def _refusal(name: str, reasons: Sequence[dict], stage: str) -> str:
    """The words for a flag that changes nothing: the flags that it does not go with, or the stages that it is for."""
    why = next((why for why in reasons if why.keys() != {"stage"}), {})
    if not why:
        by = "eval.py" if stage == "eval" else f"--stage {stage}"
        stages = ", ".join("eval.py" if known == "eval" else known for known in FIELDS[name].metadata["stages"])
        return f"{by} does not read it; it is for {stages}"
    said = (f"--no-{_flag(k)[2:]}" if v is False else f"{_flag(k)} {v or repr(v)}" for k, v in why.items())
    return f"with {' '.join(word for word in said if word != '--stage eval')} it changes nothing"


def _own(given: dict, stage: str) -> dict:
    """What was given, as far as one stage of a plan reads it."""
    return {k: v for k, v in given.items() if stage in FIELDS[k].metadata["stages"] and k != "name"} | {"stage": stage}


def parts(given: dict) -> list[Settings]:
    """The settings of every run that a command line starts, in their order: of --stage all, but for its evaluation and
    for what one run makes and a later one takes; of a teacher for each task in turn; or of the one run."""
    s, found = unchecked(given), []
    if s.stage != "all" and not (s.stage in settings.RL and not s.task):
        return [resolve(given)]
    for stage in parts_of(s) if s.stage == "all" else (s.stage,):
        for task in settings.task_list(s) if stage in settings.RL else ("",):
            name = "-".join([s.name, *[stage] * (s.stage == "all"), *[task] * bool(task)])
            found.append(for_stage(given, stage, name=name, **({"task": task} if task else {})))
    return found


def for_stage(given: dict, stage: str, **more) -> Settings:
    """Settings of one stage of a larger plan: what was given, as far as the stage reads it, and the plan's own."""
    return resolve({**_own(given, stage), **more})


def unchecked(given: dict) -> Settings:
    """Unchecked settings: what is given, over the preset's values for the stage, over the preset's for all."""
    preset, stage = given.get("preset", Settings.preset), given.get("stage", Settings.stage)
    if preset not in PRESETS:
        raise SettingsError(f"--preset {preset}: choose from {', '.join(PRESETS)}")
    values = {**PRESETS[preset][""], **PRESETS[preset].get(stage, {}), **given}
    if values.get("estimator") == "velocity":
        values = {**VELOCITY, **values}
    if not values.get("name"):
        parts = (preset, stage, values.get("task", ""))
        values["name"] = "eval" if stage == "eval" else "-".join(part for part in parts if part)
    return Settings(**values)


def differing(s: Settings) -> dict[str, tuple]:
    """{name: (value, the preset's)} of what a stage reads and the preset has otherwise, the run's name included."""
    usual, hidden = unchecked({"preset": s.preset, "stage": s.stage}), ("resume", "dry_run", "config")
    found = {name: (value, getattr(usual, name)) for name, value in settings.read_by(s).items() if name not in hidden}
    return {name: pair for name, pair in found.items() if pair[0] != pair[1]}


def command_of(s: Settings) -> str:
    """The command that makes a run again, with every flag that `differing` names: also of a part of --stage all."""
    words = ["eval.py"] if s.stage == "eval" else ["train.py", "--stage", s.stage]
    words += ["--preset", s.preset]
    for name, (value, _) in differing(s).items():
        if isinstance(value, bool):
            words.append(_flag(name) if value else "--no" + _flag(name)[1:])
        elif isinstance(value, dict):
            words += [_flag(name), *(f"{key}={where}" for key, where in value.items())]
        else:  # argparse takes a value that begins with a dash for a flag
            words += [f"{_flag(name)}={value}"] if str(value).startswith("-") else [_flag(name), str(value)]
    world = os.environ.get("WORLD_SIZE", "1")
    here = os.environ.get("LOCAL_WORLD_SIZE", world)
    nodes = [f"--nnodes={int(world) // int(here)}"] * (world != here)
    start = ["python"] if world == "1" else ["torchrun", *nodes, f"--nproc_per_node={here}"]
    return shlex.join([*start, *words])


# --------------------------------------------------------------------------------------------- flags and the file
class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise SettingsError(message.removeprefix("argument "))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _near(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, known, 1)
    return f"did you mean {near[0]}?" if near else "see --help"


def _parser(prog: str, values: Settings, readable: Iterable[str]) -> argparse.ArgumentParser:
    """A parser of the flags that a stage reads; --help shows them in groups, with the values that they would have."""
    at = f"--preset {values.preset}" + (f" --stage {values.stage}" if prog == "train.py" else "")
    epilog = f"These are the flags that {at} reads, and the values that it has without them."
    parser = _Parser(prog, usage=f"{prog} [FLAGS]", description=DESCRIPTIONS[prog], epilog=epilog, allow_abbrev=False,
                     argument_default=argparse.SUPPRESS)  # fmt: skip
    group = parser
    for name, f in FIELDS.items():
        if "group" in f.metadata:
            group = parser.add_argument_group(f.metadata["group"])
        text = f"{f.metadata['help']} [{_shown(values, name)}]".replace("%", "%%")
        text = text if name in readable else argparse.SUPPRESS
        if f.type is bool:
            group.add_argument(_flag(name), action=argparse.BooleanOptionalAction, help=text)
        elif f.type is dict:
            group.add_argument(_flag(name), nargs="+", action="extend", metavar=f.metadata["metavar"], help=text)
        else:
            choices = "{" + ",".join(c for c in f.metadata.get("choices", ()) if c not in ("", "eval")) + "}"
            metavar = choices if "choices" in f.metadata else f.type.__name__.upper()
            group.add_argument(_flag(name), type=f.type, metavar=metavar, help=text)
    return parser


def _shown(values: Settings, name: str) -> str:
    """A setting's value, as --help shows it; of --stage all that of each part that reads it, if they differ."""
    stages = [stage for stage in parts_of(values) if stage in FIELDS[name].metadata["stages"]]
    found = {values.stage: values}
    if values.stage == "all" and stages and name not in ("stage", "name"):
        found = {stage: unchecked({"preset": values.preset, "tasks": values.tasks, "stage": stage}) for stage in stages}
    told = {stage: getattr(part, name) for stage, part in found.items()}
    if FIELDS[name].type is dict:
        told = {stage: " ".join(f"{k}={v}" for k, v in value.items()) for stage, value in told.items()}
    same = len(set(told.values())) == 1
    return str(told.popitem()[1]) if same else ", ".join(f"{stage} {value}" for stage, value in told.items())


def _pairs(name: str, items: Sequence[str]) -> dict[str, str]:
    for item in items:
        if "=" not in item and (name, item) != ("compare", "base"):
            raise SettingsError(f"{_flag(name)} {item}: write it as {FIELDS[name].metadata['metavar']}")
    return dict((*item.split("=", 1), "")[:2] for item in items)


def _whole_list(flags: dict) -> dict[str, dict[str, str]]:
    """--compare base teacher.TASK=... NAME=... as --teachers and --compare: these models and no other."""
    if "teachers" in flags:
        raise SettingsError("--compare base is the whole list: write teacher.TASK=... in it instead of --teachers")
    named = {name: where for name, where in flags["compare"].items() if name != "base"}
    teachers = {name.removeprefix("teacher."): named.pop(name) for name in [*named] if name.startswith("teacher.")}
    return {"teachers": teachers, "compare": named}


def _read_config(path: str) -> dict:
    """Settings by name from a JSON file, checked for names and types."""
    try:
        found = read_json(Path(path))
    except DataError as fault:
        raise SettingsError(f"--config {fault}") from fault
    if not isinstance(found, dict):
        raise SettingsError(f"--config {path}: must be one JSON object of settings")
    found.pop("identity", None)  # a run's own config.json has it
    for name, value in found.items():
        if name not in FIELDS:
            raise SettingsError(f"--config {path}: no setting {name!r}; {_near(name, FIELDS)}")
        kind, value = FIELDS[name].type, str(value) if name == "resolution" and type(value) is int else value
        fits = type(value) is kind or (kind is float and type(value) is int)
        if not fits or (kind is dict and not all(isinstance(item, str) for item in value.values())):
            meant = "an object of names and paths" if kind is dict else f"a {kind.__name__}"
            raise SettingsError(f"--config {path}: {name} must be {meant}, not {value!r}")
        try:
            found[name] = kind(value)
        except OverflowError:
            raise SettingsError(f"--config {path}: {name} is a number of {len(str(value))} digits") from None
    return found


# ------------------------------------------------------------------------------------------------------- checks
def _check(s: Settings) -> None:
    """Refuse values out of bounds, and combinations that would end in a wrong result or in nothing."""
    _check_values(s)
    _check_names(s)
    if s.stage in ("curate", "grpo", "nft", "opd"):
        _check_rollout(s)
    if s.stage == "opd":
        _check_objective(s)
    for task in settings.task_list(s) if s.stage in ("opd", "sft") else ():
        if task not in s.teachers:
            raise SettingsError(f"task {task!r} has no teacher: give --teachers {task}=PATH, or other --tasks")
    if s.stage == "opd" and s.mar > 0 and s.anchor in TASKS and s.anchor not in s.teachers:
        raise SettingsError(f"--anchor {s.anchor}: no teacher of that task; name one of --teachers, a path, or --mar 0")
    if s.stage == "all" and s.parameters == "full" and "merge" in parts_of(s):
        raise SettingsError("--stage all merges LoRA teachers: use --parameters lora")
    if s.stage == "reward":
        _check_reward(s)


def _check_values(s: Settings) -> None:
    for name, f in FIELDS.items():
        value, known = getattr(s, name), f.metadata
        if "choices" in known and value not in known["choices"]:
            raise SettingsError(f"{_flag(name)} {value}: choose from {', '.join(c for c in known['choices'] if c)}")
        if "low" in known and not known["low"] <= value <= known["high"]:  # 'not' refuses NaN, too
            raise SettingsError(f"{_flag(name)} {value}: must be from {known['low']} to {known['high']}")
        for text in value.items() if f.type is dict else [(value,)] if f.type is str else ():
            if any(map(_unusable, text)):
                raise SettingsError(f"{_flag(name)}: a control or half a character, or a name longer than a disk takes")
    known = settings.GUIDANCE.get(s.stage, (s.guidance,))
    if s.guidance not in known:
        raise SettingsError(f"--guidance {s.guidance}: --stage {s.stage} knows {', '.join(known)}")
    if any(side % 16 for side in settings.size_of(s)) and not is_tiny(s):
        raise SettingsError(f"--resolution {s.resolution}: the sides must be multiples of 16 (VAE 8 x patch 2)")
    if 0 < s.source_resolution < 32:
        raise SettingsError(f"--source-resolution {s.source_resolution}: must be 0, or at least 32")


def _unusable(text: str) -> bool:
    """Can no path be this text? A name on a disk has at most 255 bytes; a list with commas is none."""
    try:
        longest = max(len(os.fsencode(part)) for part in text.split("/")) if "," not in text else 0
    except UnicodeEncodeError:  # half a character, which JSON can write
        return True
    return longest > 255 or len(text) > 4000 or any(ord(letter) < 32 for letter in text)


def _check_names(s: Settings) -> None:
    if Path(s.name).name != s.name or s.name in (".", "..") or not s.name.isprintable() or len(s.name.encode()) > 200:
        raise SettingsError(f"--name {s.name}: must be a plain folder name of at most 200 bytes")
    for name in s.compare:  # names adapters, files and rows of the table
        if name in ("", "base") or name.startswith("teacher ") or set(name) & set("./\\"):
            raise SettingsError(f"--compare {name}=...: give it a name of its own, without dots and slashes")
    known = {"tiny": settings.FLOW_TASKS, "tiny-qwen": settings.QWEN_TASKS}.get(s.preset, TASKS)
    own = {s.task} - {"", "mix"}
    suites = settings.suite_list(s)
    tables = settings.TINY_SUITES if is_tiny(s) else settings.SUITES
    for name, words in (("suite", tables), ("export", settings.LAYOUTS)):
        for word in filter(None, getattr(s, name).split(",")):
            if word not in words:
                raise SettingsError(f"--{name} {word}: choose from {', '.join(words)}")
    for name in suites:
        if name in settings.BENCHMARKS and name not in s.prompts:
            raise SettingsError(f"--suite {name} has prompts of its own: give --prompts {name}=PATH")
        if name not in settings.BENCHMARKS and not set(settings.SUITES[name]) & set(settings.test_tasks(s)):
            raise SettingsError(f"--suite {name} needs prompts of one of the tasks {', '.join(settings.SUITES[name])}")
    if "arena" in suites and not (s.teachers or s.compare):
        raise SettingsError("--suite arena compares models: name another one than the base in --compare")
    if "diversity" in suites and s.samples < 2:
        raise SettingsError("--suite diversity compares the pictures of a prompt: add --samples 4")
    mine = set(s.prompts) - {"auto", *(set(suites) & set(settings.BENCHMARKS))}
    for task in (*s.teachers, *mine, *own, *(settings.task_list(s) or [s.tasks])):
        if task not in known:
            raise SettingsError(f"task {task!r}: choose from {', '.join(known)}")
    if len(set(tasks := settings.task_list(s))) < len(tasks):
        raise SettingsError(f"--tasks {s.tasks}: names a task twice")
    if s.stage == "pretrain" and not is_tiny(s):
        raise SettingsError("--stage pretrain makes a tiny world's base: add --preset tiny")


def _check_rollout(s: Settings) -> None:
    start, stop = settings.window_of(s)
    if (s.stage == "grpo" or (s.stage == "opd" and s.states == "sde")) and (start >= stop or s.noise_level < 1e-3):
        way = ", or use --states ode" if s.stage == "opd" else ""
        raise SettingsError(
            f"--stage {s.stage} needs noise: widen --window and set --noise-level to 0.001 or more{way}"
        )
    if s.stage == "grpo" and s.guard and s.kernel == "cps":
        raise SettingsError("--guard makes the steps of the SDE pull alike, not those of --kernel cps: leave one out")
    updates = 1 if s.stage == "curate" else s.updates
    if s.prompts_per_step % updates:
        raise SettingsError(f"--updates {s.updates} must divide --prompts-per-step {s.prompts_per_step}")
    if s.stage != "opd" and s.group_size < 2:
        raise SettingsError("--group-size 1: a group of one has no advantage and no range; use at least 2")
    joint = s.stage == "opd" or (s.stage in ("grpo", "nft") and s.task == "mix" and s.mix == "joint")
    tasks, world = len(settings.task_list(s)), int(os.environ.get("WORLD_SIZE", "1"))
    if joint and s.prompts_per_step * world // updates < tasks:  # a task without a prompt would not be trained
        raise SettingsError(f"--prompts-per-step {s.prompts_per_step}: {tasks} tasks need one prompt each an update")
    if s.kernel == "cps" and (s.noise_level > 1 or (start < stop == s.num_steps)):
        raise SettingsError("--kernel cps needs a --noise-level of at most 1, and has no noise in the last step: "
                            f"let --window stop at {s.num_steps - 1}")  # fmt: skip


def _check_objective(s: Settings) -> None:
    """Is there an equation for this estimator, weight and kind of states?"""
    if s.estimator == "velocity" and (s.weight, s.states) != (VELOCITY["weight"], VELOCITY["states"]):
        raise SettingsError("--estimator velocity is analytic with --weight uniform --states ode: say analytic")
    if s.estimator not in ("analytic", "velocity") and s.states == "ode":  # a policy gradient
        raise SettingsError(f"--estimator {s.estimator} needs the density of an SDE step: use --states sde")
    if s.weight in ("kl", "kl_dt") and s.states == "ode":
        raise SettingsError(f"--weight {s.weight} is infinite without noise: use uniform, dt or ode, or --states sde")
    if s.estimator in ("path", "sampled_path") and settings.window_of(s)[0] > 0:
        raise SettingsError(f"--estimator {s.estimator} is biased if a step before a trained one has no noise: start "
                            "--window at 0")  # fmt: skip


def _check_reward(s: Settings) -> None:
    if not is_tiny(s) and not s.data:
        raise SettingsError(f"--stage reward with --preset {s.preset} needs --data FILE.jsonl")
    if s.objective == "pairwise" and (s.batch_size % 2 or s.micro_batch % 2):
        raise SettingsError("--objective pairwise takes pictures in twos: make --batch-size and --micro-batch even")
