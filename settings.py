"""What can be set, and what does each preset set?

One frozen dataclass is the whole configuration. Every field is a flag of the command line, and its metadata has its
help, its bounds and the stages that read it. A value is looked for in this order: flags, `--config file.json`, the
preset's entry for the stage, the preset, the default here (`harness.cli.resolve`). Only the standard library is
imported, so that `--help` and a wrong flag are answered at once.
"""

from dataclasses import dataclass, field, fields

FLOW_TASKS, QWEN_TASKS = ("composition", "text", "quality"), ("t2i", "edit")  # F's and Q's
TASKS = (*FLOW_TASKS, *QWEN_TASKS)
ASSETS = {"tiny": "assets/tiny", "tiny-qwen": "assets/tiny-qwen"}

# Stages of train.py, of which "all" is several, and "eval", which is eval.py.
STAGES = ("pretrain", "curate", "grpo", "nft", "sft", "merge", "opd", "reward", "all")
READERS = (*(stage for stage in STAGES if stage != "all"), "eval")
RL = ("grpo", "nft")  # reinforcement learning from rewards
ROLLOUT = ("curate", *RL, "opd")  # stages that draw trajectories
LORA = (*RL, "sft", "opd")  # stages that train the published model
TRAINED = ("pretrain", *LORA, "reward")  # stages with an optimizer
LOADED = (*ROLLOUT, "sft", "merge", "eval")  # stages that load the published model
SHOWN = tuple(stage for stage in READERS if stage not in ("curate", "reward"))  # stages that draw test pictures


# The tables that eval.py knows, each with the tasks of whose prompts it is made, and those with prompts of their own.
SUITES = {
    "table2": FLOW_TASKS, "table3": (), "table4": ("quality", "t2i"), "geneval2": (), "qwen-bench": (), "dpg": (),
    "arena": TASKS, "edit": ("edit",), "diversity": TASKS,
}  # fmt: skip
BENCHMARKS = tuple(name for name, tasks in SUITES.items() if not tasks)
TINY_SUITES = ("arena", "edit", "diversity")
LAYOUTS = ("geneval", "compbench", "dpg", "gedit", "flat")

MOST = 1_000_000  # the high of a number that has no other


class SettingsError(ValueError):
    """A flag, value or combination that cannot work. The message is one line; a program ends with exit code 2."""


def _option(default, help: str, stages: tuple[str, ...] = READERS, **more):
    """A field: its default, its help and the stages that read it.

    more: choices; low and high, both allowed; group, the title under which --help shows this field and the next ones.
    Every number has both bounds: a count beyond a million, or a number that is not finite, is a slip of the pen.
    """
    metadata = {"help": help, "stages": stages, **({"high": MOST} if type(default) in (int, float) else {}), **more}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


# fmt: off
@dataclass(frozen=True)
class Settings:
    """Every setting of a run. Symbols in brackets are the papers' (F: Flow-OPD, Q: Qwen-Image-2.0-RL)."""

    preset: str = _option("flow-opd", "hyper-parameters to start from: F App. A's on SD3.5-M, Q's on Qwen-Image-2.1, "
                          "or their tiny worlds'", choices=("flow-opd", "tiny", "qwen-rl", "tiny-qwen"),
                          group="what to run")
    stage: str = _option("opd", "which part of the pipeline", READERS[:-1], choices=(*STAGES, "eval"))
    name: str = _option("", "name of the run, which is a folder below --out")
    out: str = _option("runs", "folder that holds the runs")
    config: str = _option("", "JSON file of settings, applied over the preset and under the flags")
    task: str = _option("", "which teacher to train; 'mix' is the baseline that learns every task's rewards (F's "
                        "GRPO-mix, Q's Mix-RL); empty: a teacher for each of --tasks in turn", RL,
                        choices=("", *TASKS, "mix"))
    steps: int = _option(1000, "number of steps: each draws or reads a batch and learns from it", TRAINED, low=0)
    seed: int = _option(0, "seed of everything random: batches, noise, new weights", low=0, high=2**63 - 1)
    resume: bool = _option(True, "continue a run of this name from its last checkpoint; --no-resume starts it anew",
                           (*TRAINED, "curate", "merge"))
    dry_run: bool = _option(False, "print what the run would do and need, and stop; no weights are loaded")

    device: str = _option("auto", "accelerator or processor; auto: an accelerator if there is one",
                          choices=("auto", "cuda", "cpu"), group="where it runs")
    precision: str = _option("bfloat16", "numbers inside the network. The SDE, losses and trained weights are always "
                             "float32", (*LOADED, "reward"), choices=("bfloat16", "float32"))
    parallel: str = _option("ddp", "ddp: every rank holds the whole student; fsdp: its parameters are sharded over "
                            "all ranks (FSDP2); hsdp: sharded within a node, replicated over nodes", LORA,
                            choices=("ddp", "fsdp", "hsdp"))
    micro_batch: int = _option(24, "trajectories (reward: pictures) in one forward, guidance doubles its rows; 0: all "
                               "of a step at once", low=0)
    gradient_checkpointing: bool = _option(True, "recompute each block in backward: less memory, a third more work",
                                          LORA)
    compile: bool = _option(False, "compile the transformer's blocks (torch.compile): minutes at first; what it gains "
                            "later is not measured on an accelerator yet", LORA)
    timeout: float = _option(30.0, "minutes that a rank waits for the others, a first download included, before it "
                             "gives up", low=0.1, high=100_000)
    wandb: bool = _option(False, "log to Weights & Biases too (extra: pip install -e '.[wandb]')", TRAINED)

    model: str = _option("stabilityai/stable-diffusion-3.5-medium", "base checkpoint: a Hub id, a folder or a run; "
                         "reward: a Qwen-VL", (*LOADED, "reward"), group="models and data")
    teachers: dict = _option({"composition": "jieliu/SD3.5M-FlowGRPO-GenEval",
                              "text": "jieliu/SD3.5M-FlowGRPO-Text",
                              "quality": "jieliu/SD3.5M-FlowGRPO-PickScore"},
                             "each task's teacher: a Hub id, a folder or a run; a LoRA in PEFT's or diffusers' layout, "
                             "or a full checkpoint", ("sft", "merge", "opd", "eval"), metavar="TASK=ID_OR_PATH")
    anchor: str = _option("CostaliyA/SD3.5M-FlowGRPO-Deqa-Mix", "MAR's task-agnostic teacher (F Eq. 12): a Hub id, a "
                          "path, or the task of a teacher", ("opd",))
    init: str = _option("", "what the student starts from (a cold start, F 5.1); empty: the base itself",
                        ("curate", *LORA))
    compare: dict = _option({}, "students beside the base and the teachers; 'base teacher.TASK=... NAME=...' is the "
                            "whole list", ("eval",), metavar="NAME=ID_OR_PATH")
    resolution: str = _option("512", "pixels a side, or WIDTHxHEIGHT as 768x512; multiples of 16 (Qwen-Image-2.1: of "
                              "32)", LOADED)
    source_resolution: int = _option(0, "edits: a source picture is read into tokens in its own shape, with as many "
                                     "pixels as a square of this side; 0: as --resolution (the stock pipeline: 1024)",
                                     LOADED, low=0, high=4096)
    text_length: int = _option(256, "text tokens that are read, at most; the stock pipelines read 256 (SD3.5's T5) "
                               "and 1024 (Qwen-Image)", LOADED, low=1, high=10_000)
    prompts: dict = _option({}, "your own prompts (.txt, GenEval .jsonl, or a folder of them); TASK auto routes each "
                            "prompt by itself (F Eq. 7)", ("pretrain", *LOADED), metavar="TASK=PATH")
    tasks: str = _option(",".join(FLOW_TASKS), "comma-separated tasks that are trained and evaluated",
                         ("pretrain", *LOADED))
    train_prompts: int = _option(20000, "prompts generated for training, per task without --prompts",
                                 (*ROLLOUT, "sft"), low=1)
    data: str = _option("", "annotated pictures, a .jsonl file", ("reward",))
    holdout: float = _option(0.1, "share of the prompts that is never trained on", ("reward",), low=1e-6, high=1 - 1e-6)

    parameters: str = _option("lora", "which parameters train: a LoRA on the frozen base, or the full transformer",
                              ("curate", *LORA), choices=("lora", "full"), group="optimizer")
    lr: float = _option(3e-4, "learning rate (AdamW; pretrain: Muon too)", TRAINED, low=0.0, high=10.0)
    warmup: int = _option(0, "steps over which the learning rate rises to --lr", TRAINED, low=0)
    decay: bool = _option(False, "let the learning rate fall to zero at --steps, along a cosine", TRAINED)
    weight_decay: float = _option(1e-4, "decoupled weight decay", TRAINED, low=0.0)
    grad_norm: float = _option(1.0, "largest norm of a gradient; longer ones are scaled down to it", TRAINED, low=1e-9)
    ema_decay: float = _option(0.9, "decay of the averaged weights, which are what a checkpoint exports", TRAINED,
                               low=0.0, high=1.0)
    ema_every: int = _option(8, "optimizer updates between two updates of the averaged weights", TRAINED, low=1)
    rank: int = _option(32, "LoRA rank r of a new adapter", (*LORA, "reward"), low=1, high=4096)
    alpha: float = _option(64.0, "LoRA alpha of a new adapter; its update is alpha/r * B @ A", (*LORA, "reward"),
                           low=1e-6)
    batch_size: int = _option(16, "images per step and process", ("pretrain", "sft", "reward"), low=1)

    prompts_per_step: int = _option(6, "prompts [P] per step and process", ROLLOUT, low=1, high=10_000, group="rollout")
    group_size: int = _option(24, "samples per prompt [G]", ROLLOUT, low=1, high=10_000)
    num_steps: int = _option(10, "sampling steps in training [T]", ROLLOUT, low=1, high=1000)
    noise_level: float = _option(0.7, "SDE noise level [a] of sigma_t = a sqrt(t/(1-t)) (Flow-CPS: eta)",
                                 ("curate", "grpo", "opd"), low=0.0, high=100.0)
    kernel: str = _option("sde", "transition kernel: F Eq. 5-6, or Flow-CPS", ("curate", "grpo"),
                          choices=("sde", "cps"))
    window: str = _option("0:9", "START:STOP of the stochastic transitions, the others: ODE", ("curate", "grpo", "opd"))
    train_steps: str = _option("all", "which transitions are trained: all; the first, of highest noise; or random "
                               "ones, that favour high noise (Q 4.2)", RL, choices=("all", "first", "random"))
    train_count: int = _option(4, "how many transitions are trained, if not all", RL, low=1)
    cfg: float = _option(4.5, "guidance scale [w]; 1: without", ("pretrain", *LOADED), low=0.0, high=1000.0)
    guidance: str = _option("both", "what is guided. grpo, nft: rollout and objective, the rollout alone (Q 4.1's "
                            "hybrid), or neither. opd, sft, eval: teachers and student, the teachers (Q 4.3), or "
                            "neither. Other stages: their pictures, or not",
                            ("pretrain", *LOADED), choices=("both", "rollout", "teacher", "neither"))
    cfg_rescale: bool = _option(False, "Qwen-Image: give a guided velocity, token by token, the norm of the one with "
                                "the prompt, as the stock pipeline does", LOADED)

    rewards: str = _option("", "NAME=WEIGHT,... of the scorers' kinds, or a .json file that says more: options, far "
                           "scorers, weights for each category; empty: the task's own", LOADED, group="rewards")
    combine: str = _option("sum", "several rewards: their weighted sum, or each is normalised in its group first "
                           "(Q Eq. 13)", RL, choices=("sum", "normalised"))
    overlap: bool = _option(False, "draw the next step before this one is learnt from, for scorers that are slower "
                            "than drawing; its policy is one step older. (Without it, too, groups are scored while the "
                            "same step draws others, Q 4.1)", RL)
    on_reward_failure: str = _option("stop", "a score that cannot be had: stop the run, or drop its prompt's group",
                                     ("curate", *RL), choices=("stop", "drop"))
    threshold: float = _option(0.05, "a prompt is kept if the rewards of its group differ by more than this (Q 4.2)",
                               ("curate",), low=0.0)
    objective: str = _option("pointwise", "marks of single pictures (Q Eq. 11), or pairs (Q Eq. 10)", ("reward",),
                             choices=("pointwise", "pairwise"))

    advantage_std: str = _option("group", "standard deviation that advantages are divided by", RL,
                                 choices=("group", "batch", "none"), group="objective")
    advantage_clip: float = _option(5.0, "largest absolute advantage; opd: reward of a transition, in nats per "
                                    "dimension", (*RL, "opd"), low=1e-6)
    clip: float = _option(1e-4, "clip range [epsilon] of the policy ratio", ("grpo", "opd"), low=0.0)
    log_prob: str = _option("mean", "the ratio's log-probs over the D latent dimensions: mean as released, sum is "
                            "exact; it moves where the clip bites", ("grpo", "opd"), choices=("mean", "sum"))
    guard: bool = _option(False, "GRPO-Guard: its ratio normalisation, and each step's loss divided by dt", ("grpo",))
    beta: float = _option(0.04, "weight of the distance to the base. grpo: dt KL / D, in Flow-GRPO's unit (its 0.04, "
                          "0.01 for PickScore); nft: Q Eq. 9, the mean square distance of velocities", RL, low=0.0)
    interpolation: float = _option(1.0, "beta of Q Eq. 7: a step is 1 / beta long", ("nft",), low=1e-6)
    updates: int = _option(2, "optimizer updates per rollout, each on its share of the prompts", (*RL, "opd"), low=1)
    mix: str = _option("turns", "--task mix: tasks take turns by steps, 3:1:1 (F App. A), or are joined in every step "
                       "(Q 4.3's Mix-RL)", RL, choices=("turns", "joint"))
    estimator: str = _option("analytic", "gradient estimator; velocity is Q Eq. 14's name for analytic with --weight "
                             "uniform --states ode", ("opd",), choices=("literal", "released", "analytic", "sampled",
                                                                        "path", "sampled_path", "velocity"))
    weight: str = _option("kl", "weight of a state: kl w(t) (F Eq. 9), kl_dt w(t) dt (the released code), uniform 1 (Q "
                          "Eq. 14), dt (Q Eq. 18), ode dt^2/2 (DiffusionOPD)", ("opd",),
                          choices=("kl", "kl_dt", "uniform", "dt", "ode"))
    states: str = _option("sde", "states that the student visits: of F's SDE, or of Q's ODE", ("opd",),
                          choices=("sde", "ode"))
    drawn_states: int = _option(1, "how many states of a trajectory are learnt from [k], drawn by the size of their "
                                "gradient and weighed by 1/p (in neither paper); 0: all", ("opd",), low=0, high=1000)
    mar: float = _option(0.02, "weight [lambda; beta in App. A] of manifold anchor regularisation", ("opd",), low=0.0)
    anchor_every: int = _option(1, "MAR looks at one of so many samples, and counts it so many times", ("opd",), low=1)
    merge_method: str = _option("svd", "how the teachers' updates are averaged", ("merge",),
                                choices=("cat", "svd", "ties", "knots", "dare", "iso", "factor"))
    sft_images: int = _option(960, "images sampled from the routed teachers", ("sft",), low=1)

    eval_prompts: int = _option(8, "test prompts per task in an evaluation; 0: none, and no picture is ever decoded",
                                SHOWN, low=0, group="evaluation and output")
    suite: str = _option("", "tables, with commas: " + ", ".join(SUITES) + "; empty: what --rewards names", ("eval",))
    export: str = _option("", "layouts of official evaluators: " + ", ".join(LAYOUTS), ("eval",))
    samples: int = _option(1, "pictures per test prompt", ("eval",), low=1, high=1000)
    eval_steps: int = _option(40, "ODE sampling steps in an evaluation", SHOWN, low=1, high=1000)
    save_every: int = _option(50, "steps between checkpoints", TRAINED, low=1)
    keep: int = _option(2, "checkpoints kept, newest first", TRAINED, low=1)
# fmt: on


FIELDS = {f.name: f for f in fields(Settings)}

# What --guidance may say: a stage refuses values that differ in nothing there.
GUIDANCE = {
    **dict.fromkeys(RL, ("both", "rollout", "neither")),
    **dict.fromkeys(("sft", "opd", "eval"), ("both", "teacher", "neither")),
    **dict.fromkeys(("pretrain", "curate", "merge"), ("both", "neither")),
}

# When does a stage that reads a field not read it? Under each of the field's conditions here: every other field that a
# condition names is read by the stage and has one of these values. A flag that is given then is refused (`unread`).
GIVEN = "anything but an empty value"
IN_TINY = {"preset": tuple(ASSETS)}  # a tiny world has its own sizes, scorers and judge
TINY_JUDGE = {**IN_TINY, "stage": ("reward",)}
UNGUIDED = {"guidance": ("neither",)}, {"cfg": (1.0,)}
NO_PICTURE = {"eval_prompts": (0,), "stage": ("pretrain", "merge")}  # these draw test pictures only
MERGE_ALONE = {"eval_prompts": (0,), "stage": ("merge",)}
NO_TEST = {"eval_prompts": (0,), "stage": ("pretrain", "merge", *RL, "opd")}
NO_SCORE = {"eval_prompts": (0,), "stage": ("pretrain", "merge", "sft", "opd")}  # these score test pictures only
NO_RATIO = {"estimator": ("analytic", "velocity")}
UNREAD: dict[str, tuple[dict, ...]] = {
    **dict.fromkeys(("precision", "resolution", "text_length", "source_resolution"), (IN_TINY,)),
    "gradient_checkpointing": (IN_TINY,), "compile": (IN_TINY,),
    "parallel": ({"parameters": ("lora",)},),
    "model": (TINY_JUDGE,), "data": (IN_TINY,),
    **dict.fromkeys(("anchor", "anchor_every"), ({"mar": (0.0,)},)),
    "prompts": (NO_PICTURE,), **dict.fromkeys(("seed", "tasks", "micro_batch"), (MERGE_ALONE,)),
    **dict.fromkeys(("rank", "alpha"), ({"parameters": ("full",)}, {"init": GIVEN}, TINY_JUDGE)),
    "noise_level": ({"states": ("ode",)},),
    "kernel": ({"noise_level": (0.0,)},),
    "window": ({"states": ("ode",)}, {"noise_level": (0.0,)}),
    "drawn_states": ({"estimator": ("path", "sampled_path")},),
    "train_count": ({"train_steps": ("all",)},),
    "cfg": (UNGUIDED[0], NO_PICTURE), "guidance": (UNGUIDED[1], NO_PICTURE), "cfg_rescale": (*UNGUIDED, NO_PICTURE),
    "rewards": ({**IN_TINY, "stage": ("pretrain", "merge", "sft", "opd", "eval")}, NO_SCORE),
    "advantage_std": ({"combine": ("normalised",)},),
    "advantage_clip": (NO_RATIO,),
    "clip": ({"updates": (1,), "overlap": (False,)}, {"updates": (1,), "stage": ("opd",)}, NO_RATIO),  # no ratio, or 1
    "log_prob": (NO_RATIO, {"updates": (1,), "estimator": ("literal", "sampled", "path", "sampled_path")}),
    "mix": ({"task": ("", *TASKS)},),
    "eval_steps": (NO_TEST,),
}  # fmt: skip
VELOCITY = {"weight": "uniform", "states": "ode"}  # what --estimator velocity stands for, with analytic

# What a preset changes for all its stages ("") and for each of them. Learning rates and sizes of the tiny world were
# found on two CPU cores; see docs/RESULTS.md.
#
# flow-opd: F 6.1 and App. A (T 10 and 40, G 24, a 0.7, 512 pixels, lambda 0.02, r 32, alpha 64) and, if F is silent,
# Flow-GRPO's recipe. On 8 ranks it has 48 groups an epoch and two updates of 24 groups; in OPD every step is one such
# update, hence 3 groups a rank. The experts are F's, all of them public: Flow-GRPO's own GenEval, OCR and PickScore
# teachers, each for the prompts of its data set, and the DeQA teacher, which belongs to no task, as the anchor.
# The released code differs: G 16, lambda 0.04, epochs OCR 1 : GenEval 3 in turn instead of all tasks in every step, two
# updates a rollout, rewards clamped at 5, and an OCR teacher of its own, CostaliyA/SD3.5M-FlowGRPO-OCR-3240.
# DEVIATION (F Eq. 11, Q Eq. 14): the mean over all states of a trajectory is estimated from one that is drawn and
# weighed by 1/p (`drawn_states`): the same mean gradient for a part of the forwards. --drawn-states 0 is the papers'.
# DEVIATION (F's code): all ten transitions are noisy there and nine are trained. Here the last one is an ODE step.
#
# A reward model's falling rate averages its weights well enough: what it exports are the trained ones (ema_decay=0).
REWARD = dict(decay=True, weight_decay=0.01, ema_every=1, ema_decay=0.0)
VLM_REWARD = dict(
    model="Qwen/Qwen2.5-VL-7B-Instruct", batch_size=16, micro_batch=4, lr=1e-4, warmup=50, rank=16, alpha=32.0,
    save_every=100, **REWARD,
)
TINY_REWARD = dict(steps=600, batch_size=64, micro_batch=64, lr=2e-3, warmup=30, save_every=150, **REWARD)
TINY_PRETRAIN = dict(
    steps=6000, batch_size=64, lr=3e-3, decay=True, warmup=100, weight_decay=0.01, ema_decay=0.999, save_every=500,
)
TINY = dict(
    precision="float32", micro_batch=0, gradient_checkpointing=False, resolution="24", rank=16, alpha=32.0, lr=1e-3,
    warmup=5, ema_every=1, batch_size=128, prompts_per_step=12, num_steps=6, advantage_std="batch", beta=0.0,
    updates=1, train_prompts=2048, eval_prompts=192, eval_steps=10, save_every=25,
)
PRESETS: dict[str, dict[str, dict]] = {
    "flow-opd": {
        "": {},
        "curate": dict(train_prompts=2000),
        "nft": dict(beta=1e-4),  # DiffusionNFT's, in the unit of Q Eq. 9
        "sft": dict(lr=1e-4, steps=300),
        "opd": dict(lr=1e-4, steps=300, prompts_per_step=3, updates=1),
        "reward": VLM_REWARD,
    },
    "tiny": {
        "": dict(
            # DEVIATION (F 6.1): the world has no DeQA teacher, so that its quality teacher is the anchor, too.
            model=f"{ASSETS['tiny']}/base", teachers={t: f"{ASSETS['tiny']}/teacher-{t}" for t in FLOW_TASKS},
            anchor="quality", group_size=16, window="0:5", cfg=1.0, train_steps="first", **TINY,
        ),
        "pretrain": TINY_PRETRAIN,
        "curate": dict(train_prompts=240),
        "grpo": dict(steps=150, lr=7e-4),
        "sft": dict(steps=100, batch_size=96, lr=1e-3),
        "opd": dict(steps=200, lr=3e-3, decay=True, prompts_per_step=24, group_size=4),
        "reward": TINY_REWARD,
    },
    # SILENT (Q 4): the methods are named, and hardly a number. Those here are Flow-GRPO's and DiffusionNFT's, scaled to
    # a model of 7 to 20 billion parameters.
    # DEVIATION (Q 5): Qwen-Image-2.0 is not public; the next published model that draws and edits in one transformer is
    # the base. Its Qwen Research licence allows research and evaluation only, nothing commercial.
    "qwen-rl": {
        "": dict(
            model="Qwen/Qwen-Image-2.1", tasks="t2i,edit", anchor="", mar=0.0, cfg=4.0,
            teachers={t: f"./runs/qwen-rl-grpo-{t}" for t in QWEN_TASKS}, text_length=512, micro_batch=4, rank=64,
            alpha=128.0, lr=1e-4, prompts_per_step=4, group_size=12, num_steps=40, window="0:16",
            combine="normalised", train_steps="random", train_count=8, mix="joint", log_prob="mean",
        ),
        "curate": dict(train_prompts=2000),
        "grpo": dict(steps=500, beta=0.0, updates=1, guidance="rollout"),
        "nft": dict(steps=500, beta=1e-4, updates=1, advantage_clip=1.0, guidance="rollout"),
        "sft": dict(steps=300),
        "opd": dict(
            steps=500, estimator="velocity", guidance="teacher", group_size=1, prompts_per_step=8,
            updates=1,
        ),
        "eval": dict(guidance="teacher"),
        "reward": VLM_REWARD,
    },
    "tiny-qwen": {
        "": dict(
            model=f"{ASSETS['tiny-qwen']}/base", teachers={t: f"{ASSETS['tiny-qwen']}/teacher-{t}" for t in QWEN_TASKS},
            tasks="t2i,edit", anchor="", mar=0.0, group_size=8, window="0:4", cfg=2.0,
            combine="normalised", mix="joint", train_steps="random", train_count=3, **TINY,
        ),
        "pretrain": TINY_PRETRAIN,
        "curate": dict(train_prompts=480, threshold=0.4),
        "grpo": dict(steps=80, lr=1.5e-3, guidance="rollout"),
        "nft": dict(steps=80, lr=4e-4, beta=1e-4, advantage_clip=1.0, guidance="rollout"),
        "sft": dict(steps=100, batch_size=96),
        "opd": dict(
            steps=120, lr=3e-3, decay=True, prompts_per_step=24, group_size=4,
            estimator="velocity", guidance="teacher",
        ),
        "eval": dict(guidance="teacher"),
        "reward": TINY_REWARD,
    },
}  # fmt: skip


# --------------------------------------------------------------------------------- values that follow from settings
def unread(s: Settings, name: str) -> dict:
    """Why a setting changes nothing in a stage (not "all"): {field: value}, the stage or a condition of `UNREAD`.

    Empty if it is read.
    """
    if s.stage not in FIELDS[name].metadata["stages"]:
        return {"stage": s.stage}
    for condition in UNREAD.get(name, ()):
        found = {other: getattr(s, other) for other in condition}
        known = all(other == "stage" or s.stage in FIELDS[other].metadata["stages"] for other in found)
        if known and all(v if condition[k] is GIVEN else v in condition[k] for k, v in found.items()):
            return found
    return {}


def read_by(s: Settings) -> dict:
    """The settings that a stage reads under the values of the others, by name."""
    return {name: getattr(s, name) for name in FIELDS if not unread(s, name)}


def is_tiny(s: Settings) -> bool:
    """Is this a run in a tiny world, which has its own prompts, scorers and text encoder?"""
    return s.preset in ASSETS


def window_of(s: Settings) -> tuple[int, int]:
    """--window START:STOP -> (start, stop), cut at the number of steps."""
    try:
        start, stop = (int(part) for part in s.window.split(":"))
    except ValueError:
        raise SettingsError(f"--window {s.window}: write it as START:STOP, e.g. 0:5") from None
    if start < 0 or stop < start:
        raise SettingsError(f"--window {s.window}: needs 0 <= START <= STOP")
    return start, min(stop, s.num_steps)


def task_list(s: Settings) -> list[str]:
    return [t for t in s.tasks.split(",") if t]


def rewarded_tasks(s: Settings) -> tuple[str, ...]:
    """The tasks whose default rewards are asked for without --rewards: those that are drawn. A teacher has one task."""
    return (s.task,) if s.stage in ("grpo", "nft") and s.task in TASKS else tuple(task_list(s))


def suite_list(s: Settings) -> list[str]:
    return [name for name in s.suite.split(",") if name] if s.stage == "eval" else []


def known_tasks(s: Settings) -> tuple[str, ...]:
    """All tasks of the paper that the run follows: Q's where it draws any of them."""
    return QWEN_TASKS if set(task_list(s)) & set(QWEN_TASKS) else FLOW_TASKS


def size_of(s: Settings) -> tuple[int, int]:
    """(width, height) of the pictures in pixels. SettingsError if --resolution is no such size."""
    sides = s.resolution.split("x")
    if len(sides) > 2 or not all(side.isascii() and side.isdigit() and 16 <= int(side[:9]) <= 4096 for side in sides):
        raise SettingsError(f"--resolution {s.resolution}: one side or WIDTHxHEIGHT, each from 16 to 4096 pixels")
    return int(sides[0]), int(sides[-1])


def test_tasks(s: Settings) -> list[str]:
    """The tasks that an evaluation draws: all of its suites, but for edits of which there are no source pictures."""
    pictures, suites = is_tiny(s) or "edit" in s.prompts or "auto" in s.prompts, suite_list(s)
    asked = {task for name in suites for task in SUITES[name]} if suites else set(TASKS)
    return [t for t in task_list(s) if t in asked and (t != "edit" or pictures)]


def shows_base(s: Settings) -> bool:
    """Is the base drawn beside what the run has made? A full student may have taken its place in memory."""
    return s.stage == "merge" or (s.stage in LORA and s.parameters == "lora")


def parts_of(s: Settings) -> tuple[str, ...]:
    """The stages of --stage all in their order. Merging comes before SFT: it takes seconds, and OPD begins there."""
    if known_tasks(s) == QWEN_TASKS:
        return (*(("pretrain",) if is_tiny(s) else ()), "grpo", "opd")
    return (*(("pretrain", "grpo") if is_tiny(s) else ()), "merge", "sft", "opd")


def decided_by(s: Settings) -> set[str]:
    """The settings that --stage all decides itself: what one part makes and a later one takes, and each one's task."""
    parts = parts_of(s)
    own = {"model": "pretrain" in parts, "teachers": "grpo" in parts}
    return {"task", "compare", "init", *(name for name, made in own.items() if made)}


def student_cfg(s: Settings) -> float:
    """The guidance scale of rollouts, and of the student's pictures; 1: without guidance."""
    return s.cfg if s.guidance in ("both", "rollout") else 1.0


def teacher_cfg(s: Settings) -> float:
    """The guidance scale of teachers (and of the base, where it is looked at as it comes)."""
    return 1.0 if s.guidance == "neither" else s.cfg


def trained_cfg(s: Settings) -> float:
    """The guidance scale inside the objective: the unconditional branch is out of it under Q 4.1's hybrid."""
    return s.cfg if s.guidance == "both" else 1.0
