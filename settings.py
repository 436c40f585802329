"""What can be set, where does each value come from, and is the combination possible?

One frozen dataclass is the whole configuration: every field is a command-line flag, its help string stands in
its metadata, and its default is F App. A's for Stable Diffusion 3.5 Medium on eight accelerators. Precedence:
defaults < preset < preset's stage < `--config file.json` < flags. Nothing of torch is imported here, so `--help`
and every refusal come at once.

A refusal is a `SettingsError`: one line that names the flag and what to do; `train.py` exits with code 2.
"""

import argparse
import difflib
import json
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path

from presets import ASSETS, FLOW_TASKS, PRESETS, QWEN_TASKS

STAGES = ("pretrain", "curate", "grpo", "nft", "sft", "merge", "opd", "all")
TASKS = (*FLOW_TASKS, *QWEN_TASKS)
VELOCITY = {"weight": "uniform", "states": "ode"}  # what --estimator velocity stands for, with analytic
# What the tiny worlds' eyes can judge; the last two need the source of an edit.
TINY_REWARDS = ("geneval", "ocr", "quality", "preference", "task", "instruction", "identity")


class SettingsError(ValueError):
    """A flag, value or combination that cannot work; the message is one line."""


def _option(default, help: str, **more):
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata={"help": help, **more})
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class Settings:
    """Every setting of a run. Symbols in brackets are the papers' (F: Flow-OPD, Q: Qwen-Image-2.0-RL)."""

    # ------------------------------------------------------------------------------------------ what to run
    preset: str = _option("flow-opd", "hyper-parameters to start from: F App. A's on SD3.5-M, Q's on Qwen-Image-Edit, "
                          "or their tiny worlds'", choices=("flow-opd", "tiny", "qwen-rl", "tiny-qwen"))  # fmt: skip
    stage: str = _option("opd", "which part of the pipeline", choices=STAGES)
    name: str = _option("", "name of the run, a folder below --out; empty: preset-stage[-task]")
    out: str = _option("runs", "folder that holds the runs")
    config: str = _option("", "JSON file of settings, applied over the preset and under the flags")
    task: str = _option("", "grpo, nft: which teacher; 'mix' is the baseline that learns every task's rewards (F's "
                        "GRPO-mix, Q's Mix-RL); empty: a teacher for each of --tasks in turn",
                        choices=("", *TASKS, "mix"))  # fmt: skip
    steps: int = _option(1000, "optimizer steps (iterations) of the stage", low=0)
    seed: int = _option(0, "seed of everything random: batches, noise, new weights", low=0)
    resume: bool = _option(True, "continue a run of this name from its last checkpoint; --no-resume starts it anew")
    dry_run: bool = _option(False, "print the resolved settings and the plan, then stop")
    # ----------------------------------------------------------------------------------------- where it runs
    device: str = _option("auto", "accelerator or processor; auto: an accelerator if there is one",
                          choices=("auto", "cuda", "cpu"))  # fmt: skip
    precision: str = _option("bfloat16", "numbers inside the transformer; the SDE, losses and trained weights are "
                             "float32 in any case", choices=("bfloat16", "float32"))  # fmt: skip
    parallel: str = _option("ddp", "ddp: every rank holds the whole student; fsdp: its parameters are sharded over "
                            "all ranks (FSDP2); hsdp: sharded within a node, replicated over nodes",
                            choices=("ddp", "fsdp", "hsdp"))  # fmt: skip
    micro_batch: int = _option(24, "trajectories in one forward (guidance doubles its rows); 0: all of a step at once",
                               low=0)  # fmt: skip
    gradient_checkpointing: bool = _option(True, "recompute each block in backward: less memory, a third more work")
    timeout: float = _option(30.0, "minutes that a rank waits for the others, a first download included, before it "
                             "gives up", low=0.1)  # fmt: skip
    wandb: bool = _option(False, "log to Weights & Biases too (extra: pip install -e '.[wandb]')")
    # ------------------------------------------------------------------------------------- models and data
    model: str = _option("stabilityai/stable-diffusion-3.5-medium", "base checkpoint: a Hub id, a folder or a run")
    teachers: dict = _option({"composition": "jieliu/SD3.5M-FlowGRPO-GenEval",
                              "text": "CostaliyA/SD3.5M-FlowGRPO-OCR-3240",
                              "quality": "CostaliyA/SD3.5M-FlowGRPO-Deqa-Mix"},
                             "TASK=ID_OR_PATH ...: each task's teacher: a Hub id, a folder or a run; a LoRA in PEFT's "
                             "or diffusers' layout, or a full checkpoint")  # fmt: skip
    anchor: str = _option("quality", "MAR's task-agnostic teacher (F Eq. 12): a teacher's task, a Hub id or a path")
    init: str = _option("", "what the student starts from (a cold start, F 5.1); empty: the base itself")
    compare: dict = _option({}, "eval.py: NAME=ID_OR_PATH ...: students to score beside the base and the teachers")
    resolution: int = _option(512, "pixels a side, a multiple of 16", low=16)
    source_resolution: int = _option(0, "edits: pixels a side at which the source picture is read into tokens; 0: as "
                                     "--resolution (the stock pipeline: 1024)", low=0)  # fmt: skip
    text_length: int = _option(256, "most text tokens: of SD3.5's T5 (256 in the stock pipeline), of Qwen-Image (1024)",
                               low=1)  # fmt: skip
    prompts: dict = _option({}, "TASK=PATH ...: your own prompts (.txt, GenEval .jsonl, or a folder of them); "
                            "TASK auto routes each prompt by itself (F Eq. 7)")  # fmt: skip
    tasks: str = _option(",".join(FLOW_TASKS), "comma-separated tasks that opd and sft train and eval scores")
    # ------------------------------------------------------------------------------------------- optimizer
    parameters: str = _option("lora", "which parameters train: a LoRA on the frozen base, or the full transformer",
                              choices=("lora", "full"))  # fmt: skip
    lr: float = _option(3e-4, "learning rate (AdamW; pretrain: Muon too)", low=0.0)
    warmup: int = _option(0, "steps over which the learning rate rises to --lr", low=0)
    decay: bool = _option(False, "let the learning rate fall to zero along a cosine as long as --steps")
    weight_decay: float = _option(1e-4, "decoupled weight decay", low=0.0)
    grad_norm: float = _option(1.0, "largest norm of a gradient; longer ones are scaled down to it", low=0.0)
    ema_decay: float = _option(
        0.9, "decay of the averaged weights, which are what a checkpoint exports", low=0.0, high=1.0
    )
    ema_every: int = _option(8, "steps between two updates of the averaged weights", low=1)
    rank: int = _option(32, "LoRA rank r of a new adapter", low=1)
    alpha: float = _option(64.0, "LoRA alpha of a new adapter; its update is alpha/r * B @ A", low=0.0)
    batch_size: int = _option(16, "pretrain, sft: images a step and process", low=1)
    caption_dropout: float = _option(0.1, "pretrain: share of captions left empty, for guidance", low=0.0, high=1.0)
    # --------------------------------------------------------------------------------------------- rollout
    prompts_per_step: int = _option(6, "prompts [P] a step and process", low=1)
    group_size: int = _option(24, "samples per prompt [G]", low=1)
    num_steps: int = _option(10, "sampling steps in training [T]", low=1)
    noise_level: float = _option(0.7, "SDE noise level [a] of sigma_t = a sqrt(t/(1-t)) (Flow-CPS: eta)", low=0.0)
    kernel: str = _option("sde", "transition kernel: F Eq. 5-6, or Flow-CPS", choices=("sde", "cps"))
    window: str = _option("0:9", "START:STOP of the transitions that are stochastic; the others are ODE steps")
    cfg: float = _option(4.5, "guidance scale [w]; 1: without", low=0.0)
    guidance: str = _option("both", "what is guided. grpo, nft: rollout and objective, the rollout alone (Q 4.1's "
                            "hybrid), or neither; opd, eval: teachers and student, the teachers (Q 4.3), or neither",
                            choices=("both", "rollout", "teacher", "neither"))  # fmt: skip
    cfg_rescale: bool = _option(False, "Qwen-Image: give a guided velocity, token by token, the norm of the one with "
                                "the prompt, as the stock pipeline does")  # fmt: skip
    # ------------------------------------------------------------------------------------------------ grpo
    rewards: str = _option("", "NAME=WEIGHT,... of the scorers' kinds (recipe.py), or a .json file that says more: "
                           "options, far scorers, weights for each category; empty: the task's own")  # fmt: skip
    combine: str = _option("sum", "several rewards: their weighted sum, or each normalised in its group first (Q Eq. "
                           "13)", choices=("sum", "normalised"))  # fmt: skip
    overlap: bool = _option(False, "score a batch while the next one is drawn (Q 4.1), from a policy one update older")
    on_reward_failure: str = _option("stop", "a score that cannot be had: stop the run, or drop its prompt's group",
                                     choices=("stop", "drop"))  # fmt: skip
    threshold: float = _option(0.05, "curate: the least range of the reward within a group that is kept (Q 4.2)",
                               low=0.0)  # fmt: skip
    advantage_std: str = _option("group", "what advantages are divided by", choices=("group", "batch", "none"))
    advantage_clip: float = _option(5.0, "largest absolute advantage", low=0.0)
    clip: float = _option(1e-4, "clip range [epsilon] of the policy ratio", low=0.0)
    log_prob: str = _option("mean", "log-prob over the D latent dimensions: mean as released, sum is exact",
                            choices=("mean", "sum"))  # fmt: skip
    guard: bool = _option(False, "GRPO-Guard's ratio normalisation")
    beta: float = _option(0.04, "weight of the KL to the base policy (nft: of Q Eq. 9's distance to it)", low=0.0)
    interpolation: float = _option(1.0, "nft: strength [beta of Q Eq. 7]; 1 / it is the length of a step", low=1e-6)
    updates: int = _option(2, "grpo, nft: optimizer updates per rollout, each on its share of the prompts", low=1)
    mix: str = _option("turns", "--task mix: tasks take turns by steps, 3:1:1 (F App. A), or are joined in every step "
                       "(Q 4.3's Mix-RL)", choices=("turns", "joint"))  # fmt: skip
    train_steps: str = _option("all", "which transitions are trained", choices=("all", "first", "random"))
    train_count: int = _option(4, "how many of them (first: highest noise; random: favours high noise)", low=1)
    # ------------------------------------------------------------------------------------------ opd, merge, sft
    estimator: str = _option("analytic", "gradient estimator of the on-policy distillation; velocity is Q Eq. 14's "
                             "name for analytic with --weight uniform --states ode",
                             choices=("literal", "released", "analytic", "sampled", "path", "sampled_path",
                                      "velocity"))  # fmt: skip
    weight: str = _option("kl", "weight of a state: kl w(t) (F Eq. 9), kl_dt w(t) dt (the released code), uniform 1 (Q "
                          "Eq. 14), dt (Q Eq. 18), ode dt^2/2 (DiffusionOPD)",
                          choices=("kl", "kl_dt", "uniform", "dt", "ode"))  # fmt: skip
    states: str = _option("sde", "states that the student visits: of F's SDE, or of Q's ODE", choices=("sde", "ode"))
    mar: float = _option(0.02, "weight [lambda; beta in App. A] of manifold anchor regularisation", low=0.0)
    merge_method: str = _option("svd", "cold start by merging", choices=("cat", "svd", "ties", "factor"))
    sft_images: int = _option(960, "sft: images sampled from the routed teachers", low=1)
    # ------------------------------------------------------------------------------------- evaluation, output
    train_prompts: int = _option(20000, "prompts generated for training, per task without --prompts", low=1)
    eval_prompts: int = _option(8, "test prompts per task in an evaluation; 0: none, and no picture is ever decoded",
                                low=0)  # fmt: skip
    eval_steps: int = _option(40, "ODE sampling steps in an evaluation", low=1)
    save_every: int = _option(50, "steps between checkpoints", low=1)
    keep: int = _option(2, "checkpoints kept, newest first", low=1)
    threads: int = _option(0, "CPU threads per process; 0: all cores, shared among the processes", low=0)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, allow_abbrev=False, argument_default=argparse.SUPPRESS, exit_on_error=False,
        description="Flow-OPD and Qwen-Image-2.0-RL, from pretraining to on-policy distillation.",
    )  # fmt: skip
    for f in fields(Settings):
        flag, default = "--" + f.name.replace("_", "-"), f.default if f.default is not MISSING else f.default_factory()
        shown = " ".join(f"{k}={v}" for k, v in default.items()) if isinstance(default, dict) else default
        text = f"{f.metadata['help']} (default: {shown})".replace("%", "%%")
        if f.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        elif f.type is dict:
            parser.add_argument(flag, nargs="+", action="extend", metavar="NAME=PATH", help=text)
        else:
            kind = {"type": f.type, "metavar": f.type.__name__.upper()}
            if "choices" in f.metadata:
                kind["metavar"] = "{" + ",".join(c for c in f.metadata["choices"] if c) + "}"
            parser.add_argument(flag, help=text, **kind)
    return parser


def _pairs(flag: str, items: list[str]) -> dict[str, str]:
    for item in items:
        if "=" not in item:
            raise SettingsError(f"--{flag} {item}: write it as TASK=PATH, TASK one of {', '.join(TASKS)}")
    return dict(item.split("=", 1) for item in items)


def _read_config(path: str) -> dict:
    try:
        values = json.loads(Path(path).read_text())
    except OSError as fault:
        raise SettingsError(f"--config {path}: {fault.strerror}") from fault
    except ValueError as fault:
        raise SettingsError(f"--config {path}: not JSON ({fault})") from fault
    if not isinstance(values, dict):
        raise SettingsError(f"--config {path}: must be one JSON object of settings")
    known = {f.name: f.type for f in fields(Settings)}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            raise SettingsError(
                f"--config {path}: no setting {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")
            )
        kind = known[key]
        fits = isinstance(value, (int, float) if kind is float else kind) and (
            kind is bool or not isinstance(value, bool)
        )
        if not fits:
            raise SettingsError(f"--config {path}: {key} must be a {kind.__name__}, not {value!r}")
        if kind is dict and not all(isinstance(item, str) for item in value.values()):
            raise SettingsError(f"--config {path}: {key} must map names to paths, not {value!r}")
        values[key] = kind(value)
    return values


def parse(argv: list[str], prog: str = "train.py") -> tuple[Settings, dict]:
    """The command line -> (resolved settings, what the user chose of them); `--stage all` resolves each stage anew.

    Raises SettingsError on an unknown flag, a wrong value or an impossible combination.
    """
    parser = _parser(prog)
    try:
        given, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as fault:
        raise SettingsError(str(fault).replace("argument ", "")) from fault
    if unknown:
        flags = ["--" + f.name.replace("_", "-") for f in fields(Settings)]
        near = difflib.get_close_matches(unknown[0].split("=")[0], flags, 1)
        raise SettingsError(f"unknown flag {unknown[0]}" + (f"; did you mean {near[0]}?" if near else "; see --help"))
    flags = vars(given)
    for f in fields(Settings):
        if f.type is dict and f.name in flags:
            flags[f.name] = _pairs(f.name, flags[f.name])
    chosen = _read_config(flags["config"]) if flags.get("config") else {}
    chosen.update(flags)
    if prog == "eval.py":
        chosen = {"name": "eval", "mar": 0.0, **chosen}
    return resolve(chosen), chosen


def resolve(chosen: dict) -> Settings:
    """Lay what the user chose over the preset of the stage, check it, and give the run its name."""
    stage, preset = chosen.get("stage", Settings.stage), chosen.get("preset", Settings.preset)
    if preset not in PRESETS:
        raise SettingsError(f"--preset {preset}: choose from {', '.join(PRESETS)}")
    values = {**PRESETS[preset][""], **PRESETS[preset].get(stage, {}), **chosen}
    if values.get("estimator") == "velocity":
        values = {**VELOCITY, **values}
    settings = Settings(**values)
    check(settings)
    if stage == "all":  # refuse now what one of its parts would refuse after the others have trained for hours
        for part in parts_of(settings):
            for_stage(chosen, part)
    if not settings.name:
        parts = [preset, stage, settings.task if stage in ("grpo", "nft") else ""]
        settings = Settings(**{**asdict(settings), "name": "-".join(p for p in parts if p)})
    return settings


def check(s: Settings) -> None:
    """Refuse what cannot work; every message names the flag and the way out."""
    _check_values(s)
    _check_names(s)
    if s.stage in ("curate", "grpo", "nft", "opd"):
        _check_rollout(s)
        _check_guidance(s)
    if s.stage == "opd":
        _check_objective(s)
    if s.stage in ("opd", "sft", "merge"):
        _check_teachers(s)
    _check_parameters(s)


def _check_values(s: Settings) -> None:
    for f in fields(Settings):
        value, flag = getattr(s, f.name), "--" + f.name.replace("_", "-")
        if "choices" in f.metadata and value not in f.metadata["choices"]:
            raise SettingsError(f"{flag} {value}: choose from {', '.join(c for c in f.metadata['choices'] if c)}")
        if "low" in f.metadata and not value >= f.metadata["low"]:  # 'not >=' refuses NaN as well
            raise SettingsError(f"{flag} {value}: must be at least {f.metadata['low']}")
        if "high" in f.metadata and value > f.metadata["high"]:
            raise SettingsError(f"{flag} {value}: must be at most {f.metadata['high']}")
    if not is_tiny(s) and s.resolution % 16:
        raise SettingsError(f"--resolution {s.resolution}: must be a multiple of 16 (VAE 8 x patch 2)")


def _check_names(s: Settings) -> None:
    if Path(s.name).name != s.name or s.name in (".", ".."):
        raise SettingsError(f"--name {s.name}: must be a plain folder name")
    for name in s.compare:  # names adapters, files and rows of the table
        if name in ("", "base") or set(name) & set("./\\"):
            raise SettingsError(f"--compare {name}=...: give it a name of its own, without dots and slashes")
    for key in (*s.teachers, *(set(s.prompts) - {"auto"}), *task_list(s)):
        if key not in TASKS:
            raise SettingsError(f"task {key!r}: choose from {', '.join(TASKS)}")
    if not task_list(s):
        raise SettingsError(f"--tasks {s.tasks}: name at least one of {', '.join(TASKS)}")
    if s.stage == "pretrain" and not is_tiny(s):
        raise SettingsError("--stage pretrain makes the tiny world's base: add --preset tiny")


def _check_rollout(s: Settings) -> None:
    start, stop = window_of(s)
    silent = start >= stop or s.noise_level == 0
    if s.stage == "grpo" and silent:
        raise SettingsError("--stage grpo needs noise: widen --window and set --noise-level above 0")
    if s.stage in ("grpo", "nft") and s.prompts_per_step % s.updates:
        raise SettingsError(f"--updates {s.updates} must divide --prompts-per-step {s.prompts_per_step}")
    if s.stage in ("curate", "grpo", "nft") and s.group_size < 2:
        raise SettingsError("--group-size 1: a group of one has no advantage and no range; use at least 2")
    joint = s.stage == "opd" or (s.stage in ("grpo", "nft") and s.task == "mix" and s.mix == "joint")
    if joint and s.prompts_per_step < len(task_list(s)):
        raise SettingsError(f"--prompts-per-step {s.prompts_per_step}: {len(task_list(s))} tasks need one prompt each")
    if s.stage == "opd" and s.states == "sde" and silent:
        raise SettingsError("--states sde needs noise: widen --window, raise --noise-level, or use --states ode")
    if s.stage == "opd" and s.kernel != "sde":
        raise SettingsError("--stage opd knows the KL of the SDE kernel only (F Eq. 9): use --kernel sde")
    if s.kernel == "cps" and stop == s.num_steps and start < stop:
        raise SettingsError(f"--kernel cps has no noise in the last step: let --window stop at {stop - 1}")
    if s.kernel == "cps" and s.noise_level > 1:
        raise SettingsError(f"--noise-level {s.noise_level}: must be at most 1 with --kernel cps")
    if s.stage == "grpo" and s.beta > 0 and s.kernel != "sde":
        raise SettingsError("--beta is the SDE kernel's KL (F Eq. 9): use --kernel sde or --beta 0")


def _check_objective(s: Settings) -> None:
    """Is the combination of estimator, weight and states one that an equation covers?"""
    if s.estimator == "velocity" and (s.weight, s.states) != (VELOCITY["weight"], VELOCITY["states"]):
        raise SettingsError("--estimator velocity is analytic with --weight uniform --states ode: say analytic")
    ratio = s.estimator not in ("analytic", "velocity")  # a policy gradient: it needs the density of an action
    if ratio and s.states == "ode":
        raise SettingsError(f"--estimator {s.estimator} needs the density of an SDE step: use --states sde")
    if s.weight in ("kl", "kl_dt") and s.states == "ode":
        raise SettingsError(f"--weight {s.weight} is infinite without noise: use uniform, dt or ode, or --states sde")
    if ratio and s.weight not in ("kl", "kl_dt"):
        raise SettingsError(f"--estimator {s.estimator} rewards with the KL: use --weight kl or kl_dt, or analytic")


def _check_guidance(s: Settings) -> None:
    known = ("both", "teacher", "neither") if s.stage == "opd" else ("both", "rollout", "neither")
    if s.guidance not in known:
        raise SettingsError(f"--guidance {s.guidance}: --stage {s.stage} knows {', '.join(known)}")


def _check_teachers(s: Settings) -> None:
    if not s.teachers:
        raise SettingsError(f"--stage {s.stage} needs --teachers TASK=PATH, at least one")
    missing = [t for t in task_list(s) if t not in s.teachers]
    if s.stage != "merge" and missing:
        raise SettingsError(
            f"task {missing[0]!r} has no teacher: give --teachers {missing[0]}=PATH, or leave it out of --tasks"
        )


def _check_parameters(s: Settings) -> None:
    if s.parallel != "ddp" and s.parameters != "full":
        raise SettingsError(f"--parallel {s.parallel} shards full parameters: add --parameters full, or use ddp")
    if s.stage == "merge" and s.parameters == "full":
        raise SettingsError("--stage merge merges LoRA teachers: use --parameters lora")
    if s.stage in ("pretrain", "curate") and s.parallel != "ddp":
        raise SettingsError(f"--stage {s.stage} knows --parallel ddp only: nothing there is too large for a rank")


def for_stage(chosen: dict, stage: str, **more) -> Settings:
    """One stage of a larger plan: what the user chose, over that stage's preset, with the plan's own paths."""
    base = {k: v for k, v in chosen.items() if k not in ("stage", "name")}
    return resolve({**base, "stage": stage, **more})


def is_tiny(s: Settings) -> bool:
    """Does the run live in the tiny world, with its own prompts, eyes and text encoder?"""
    return s.preset in ASSETS


def window_of(s: Settings) -> tuple[int, int]:
    """--window START:STOP -> (start, stop), clipped to the number of steps."""
    try:
        start, stop = (int(part) for part in s.window.split(":"))
    except ValueError:
        raise SettingsError(f"--window {s.window}: write it as START:STOP, e.g. 0:5") from None
    if start < 0 or stop < start:
        raise SettingsError(f"--window {s.window}: needs 0 <= START <= STOP")
    return start, min(stop, s.num_steps)


def task_list(s: Settings) -> list[str]:
    return [t for t in s.tasks.split(",") if t]


def known_tasks(s: Settings) -> tuple[str, ...]:
    """All tasks of the paper that the run follows: Q's where it draws any of them."""
    return QWEN_TASKS if set(task_list(s)) & set(QWEN_TASKS) else FLOW_TASKS


def test_tasks(s: Settings) -> list[str]:
    """The tasks that an evaluation draws: all, but for edits of which there are no source pictures."""
    pictures = is_tiny(s) or "edit" in s.prompts or "auto" in s.prompts
    return [t for t in task_list(s) if t != "edit" or pictures]


def parts_of(s: Settings) -> tuple[str, ...]:
    """The stages of --stage all in their order. Merging takes seconds and is picky about its teachers: it is first."""
    if known_tasks(s) == QWEN_TASKS:
        return (*(("pretrain",) if is_tiny(s) else ()), "grpo", "opd")
    return (*(("pretrain", "grpo") if is_tiny(s) else ()), "merge", "sft", "opd")


def student_cfg(s: Settings) -> float:
    """The guidance scale of rollouts, and of the student's pictures; 1: without guidance."""
    return s.cfg if s.guidance in ("both", "rollout") else 1.0


def teacher_cfg(s: Settings) -> float:
    """The guidance scale of teachers (and of the base, where it is looked at as it comes)."""
    return 1.0 if s.guidance == "neither" else s.cfg


def trained_cfg(s: Settings) -> float:
    """The guidance scale inside the objective: the unconditional branch is out of it under Q 4.1's hybrid."""
    return s.cfg if s.guidance == "both" else 1.0
