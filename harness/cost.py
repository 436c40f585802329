"""How many parameters, forwards and bytes does a run take?

Counted without loading a model or importing torch: of a checkpoint only its config and its files' headers of shapes are
read. `sizes.py` knows the architectures, `plan.py` puts it all into words.

Exact: the parameters of the transformer and of a LoRA on it, and the forwards of a step (of a cold start by SFT, whose
tasks are drawn at random, their mean).
An ESTIMATE: the memory of one rank, added up as if everything that stays were there at once. With N numbers in the
transformer, n trained ones, b bytes a number of --precision (2 or 4), the student spread over S ranks (ddp: 1, fsdp:
all, hsdp: those of a node) and D numbers in a latent, there stay

    frozen backbone    N b               the base, and what carries the LoRAs; absent where everything trains and
                                         neither a LoRA teacher nor a term to the base (beta) needs it
    trained weights    4 n / S           float32, like the next four
    averaged weights   4 n / S           the EMA that a checkpoint exports
    old policy         4 n / S           DiffusionNFT's, which draws and which the loss starts from
    gradients          4 n / S
    Adam moments       8 n / S           two a number (in pretraining Muon keeps one: counted as two)
    bfloat16 copies    2 n               autocast casts float32 weights once a forward ...
    gathered blocks    2 b / block       ... but of a sharded student only the block at work and the next are whole
    adapters           4 a               float32 factors of all LoRA teachers and of the anchor, a numbers
    full experts       N b each          those of this micro-batch and of the next one, and a full anchor (Q 4.3)
    trajectories       4 D each          latents that wait for their update, see `stored_latents`
    text conditioning  b (S_t J + P)     a row: S_t text tokens of J channels and the pooled vector of P; of an edit
                                         also 4 D' for its source's latents, and S_t counts the source's tokens too
    judges             2 or 4 a number   VLM judges on this accelerator, each scorer its own, in its own dtype
    VAE                4 a number        once a picture was wanted, or a source is read

and the largest of the moments adds to them: the text encoders (b a number), a forward without gradient, a training
step (`sizes.activations`), a picture's way through the VAE (VAE_PIXEL bytes a pixel), and a copy of the trained weights
while their average is exported. In host memory wait every full expert, N b, and every distinct prompt's conditioning.
"""

import json
import math
import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from harness.sizes import (
    CLIP_TOKENS,
    PICTURE_TOKENS,
    QWEN_IMAGE,
    QWEN_VAE,
    QWEN_VL_7B,
    SD35_ENCODERS,
    SD35_MEDIUM,
    SD35_VAE,
    VAE_PIXEL,
    VAE_READS,
    activations,
    architecture,
    block_parameters,
    is_qwen,
    latent_channels,
    lora_parameters,
    transformer_parameters,
    unread_names,
    unread_parameters,
)
from scorers import registry
from settings import (
    ASSETS,
    Settings,
    SettingsError,
    is_tiny,
    rewarded_tasks,
    student_cfg,
    task_list,
    teacher_cfg,
    test_tasks,
    trained_cfg,
    window_of,
)

# Importing this of `adapters` would cost seconds; a test holds the copy to the original.
FILE_ENDINGS = (".safetensors", ".json", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".zip")
LORAS = ("peft", "diffusers", "hub")
# Stages that draw groups of pictures for their rewards, and those of them that train on what they drew.
SCORED, TAUGHT = ("curate", "grpo", "nft"), ("grpo", "nft")
ROLLOUTS = ("opd", *SCORED)  # stages that walk trajectories with guidance; OPD and curation keep none
IDLE = ("merge", "eval", "curate")  # stages without an optimizer
TINY_SIDE = 24  # pixels of a tiny world's pictures
DRAWN = 96  # pictures that are drawn at once where --micro-batch leaves it open
# VLM judges: parameters of those that rubrics ask unless told otherwise, and the rubric that asks not the first one.
JUDGES = {"Qwen/Qwen2.5-VL-7B-Instruct": QWEN_VL_7B, "Qwen/Qwen3-VL-30B-A3B-Instruct": 31_070_000_000}
ASKED = {"judge": "Qwen/Qwen3-VL-30B-A3B-Instruct"}
GIB = 1 << 30
SPARE = 1.1  # an allocator wastes a little: a verdict asks for a tenth more than the sum


class Base(NamedTuple):
    """What is known of the model without loading it."""

    note: str
    config: dict  # the transformer's
    encoders: int  # parameters of the text encoders
    vae: int  # of the VAE; 0: there is none
    text: int  # text tokens S_t of a prompt without a source picture
    side: int  # latents are side x side
    source: int = 0  # an edit's source has latents of source x source
    picture: int = 0  # and is as many text tokens besides

    @property
    def parameters(self) -> int:
        """N: parameters of the transformer."""
        return transformer_parameters(self.config)

    def tokens(self, edit: bool = False) -> tuple[int, int]:
        """(image tokens, text tokens) of a row; an edit's source counts among both."""
        image, patch = self.side**2 + edit * self.source**2, self.config["patch_size"]
        return image // patch**2, self.text + edit * self.picture

    @property
    def latent(self) -> int:
        """D: numbers in a latent."""
        return latent_channels(self.config) * self.side**2


class Expert(NamedTuple):
    """A teacher, the anchor, or what the student starts from, as its files tell."""

    where: str
    kind: str  # "peft", "diffusers", "full", "hub" (taken for a LoRA), or "" where there is nothing usable
    parameters: int
    note: str
    unread: int = 0  # parameters among them that are not trained where the student starts from it


class Judge(NamedTuple):
    """A VLM that scores: which, in which numbers, on the run's accelerator or elsewhere; 0 parameters: not known."""

    model: str
    dtype: str
    device: str
    parameters: int


class Work(NamedTuple):
    """What one kind of forward costs a rank in one step; rows count guidance's doubling."""

    who: str
    gradient: bool
    forwards: int
    rows: int


ENCODING = "encoding prompts"
LATER = ("gradients", "Adam moments", "bfloat16 copies", "trajectories", "text conditioning")


class Memory(NamedTuple):
    """Bytes of one rank: what stays on the accelerator, what comes and goes there, what waits in host memory."""

    parts: dict[str, int]
    moments: dict[str, int]
    host: dict[str, int]

    def at(self, moment: str) -> int:
        """Bytes at one of the moments: what stays, and it. Prompts are encoded before there is anything of a step."""
        early = moment == ENCODING
        return self.moments[moment] + sum(size for name, size in self.parts.items() if not (early and name in LATER))

    @property
    def largest(self) -> str:
        """The moment that takes most; "" where there is none."""
        return max(self.moments, key=self.at, default="")

    @property
    def total(self) -> int:
        """The most that is there at once."""
        return self.at(self.largest) if self.moments else sum(self.parts.values())


# -------------------------------------------------------------------------------------------- what the files tell
def _shapes(file: Path) -> dict[str, list[int]]:
    """{tensor: shape} from a safetensors file's header, 8 bytes of length and then JSON. No weight is read."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > file.stat().st_size:
                raise ValueError("its header is cut off")
            header = json.loads(stream.read(length))
        return {key: entry["shape"] for key, entry in header.items() if key != "__metadata__"}
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as fault:
        raise SettingsError(f"{file}: not a readable safetensors file ({fault}); fetch or write it anew") from fault


def _numbers(files: Sequence[Path], within: Sequence[str] = ("",)) -> int:
    """Numbers in all tensors of these files whose name has one of `within` in it."""
    shapes = ((name, shape) for file in files for name, shape in _shapes(file).items())
    return sum(math.prod(shape) for name, shape in shapes if any(part in name for part in within))


def _transformer_config(folder: Path) -> dict | None:
    """The config of the transformer in a folder; None where there is none."""
    file = next((f for f in (folder / "transformer" / "config.json", folder / "config.json") if f.is_file()), None)
    if file is None:
        return None
    try:
        config = json.loads(file.read_text())
        transformer_parameters(config)
        return config
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as fault:
        known = "not the config of an SD3 or Qwen-Image transformer"
        raise SettingsError(f"{file}: {known} ({fault!r}); give SD3.5, Qwen-Image or Qwen-Image-Edit") from fault


def last_step(run: Path) -> int | None:
    """Step of a run's newest complete checkpoint, or None. Incomplete ones have hidden names."""
    names = (p.name for p in run.glob("checkpoints/step-*"))
    return max((int(name[5:]) for name in names if name[5:].isdecimal()), default=None)


def hub_id(where: str) -> bool:
    """Is this OWNER/NAME[/FOLDER][@REVISION] on the Hub, and no path? The rule is `adapters.hub_id`'s."""
    named = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(/\w[\w.-]*)*(@[\w./-]+)?", where, re.ASCII)
    return bool(named) and Path(where).suffix not in FILE_ENDINGS and not Path(where.split("/")[0]).exists()


def _folder(where: str) -> Path | None:
    """What a model, teacher, anchor or init is here: a run stands for its last checkpoint, a file for its folder."""
    path = Path(where).expanduser()
    if not where or not path.exists():
        return None
    path = path.parent if path.is_file() else path
    step = last_step(path)
    return path if step is None else path / "checkpoints" / f"step-{step:06d}"


def expert(where: str, base: Base | None, rank: int) -> Expert:
    """What a teacher, anchor or init is. SettingsError, one line, for a file that is there and cannot be read."""
    folder = _folder(where)
    if folder is None and hub_id(where):
        count = lora_parameters(base.config, rank) if base else 0
        note = f"Hub, fetched on first use; taken for a LoRA of rank {rank}"
        return Expert(where, "hub", count, note, unread_lora(base.config, rank) if base else 0)
    if folder is None:
        return Expert(where, "", 0, "MISSING: no such file or folder, and no Hub id")
    unread = unread_names(base.config) if base else ()
    peft, diffusers = folder / "adapter_model.safetensors", folder / "pytorch_lora_weights.safetensors"
    if peft.is_file() and (folder / "adapter_config.json").is_file():
        return Expert(where, "peft", _numbers([peft]), "a LoRA in PEFT's layout", _numbers([peft], unread))
    if diffusers.is_file():
        note = "a LoRA in diffusers' layout"
        return Expert(where, "diffusers", _numbers([diffusers]), note, _numbers([diffusers], unread))
    config = _transformer_config(folder)
    if config is None:
        return Expert(where, "", 0, "UNUSABLE: neither an adapter nor a checkpoint")
    return Expert(where, "full", transformer_parameters(config), "a full checkpoint", unread_parameters(config))


def unread_lora(config: dict, rank: int) -> int:
    """Parameters of `sizes.lora_parameters` that are not trained: Qwen-Image's last to_add_out."""
    return lora_parameters(config | {"num_layers": 1}, rank, ("attn.to_add_out",)) if is_qwen(config) else 0


def base_of(s: Settings) -> Base | None:
    """What is known of the model; None where there is none to look at."""
    # Pretraining makes a new model, of the shipped one's shape.
    folder = _folder(str(Path(__file__).parents[1] / ASSETS[s.preset] / "base") if s.stage == "pretrain" else s.model)
    side, source = s.resolution // 8, (s.source_resolution or s.resolution) // 8
    config = _transformer_config(folder) if folder else None
    if folder is None and hub_id(s.model) and not is_tiny(s):
        config, name = (QWEN_IMAGE, "Qwen-Image") if "Qwen-Image" in s.model else (SD35_MEDIUM, "SD3.5-M")
        note = f"Hub, fetched on first use; the published configuration of {name} is assumed"
    elif config is None:
        return None
    elif is_tiny(s):
        return _tiny_base(s, folder, config)
    else:
        note = f"{'Qwen-Image' if is_qwen(config) else 'Stable Diffusion 3'} in a folder"
    encoders, vae = (QWEN_VL_7B, QWEN_VAE) if is_qwen(config) else (SD35_ENCODERS, SD35_VAE)
    if folder:
        encoders = _numbers(sorted(folder.glob("text_encoder*/model*.safetensors"))) or encoders
        vae = _numbers(sorted(folder.glob("vae/*.safetensors"))) or vae
    if is_qwen(config):
        return Base(note, config, encoders, vae, s.text_length, side, source, PICTURE_TOKENS)
    return Base(note, config, encoders, vae, CLIP_TOKENS + s.text_length, side)


def _tiny_base(s: Settings, folder: Path, config: dict) -> Base:
    encoders = sorted(folder.glob("text_encoder*/model*.safetensors"))
    text = next((v[0] for file in encoders for k, v in _shapes(file).items() if k == "place.weight"), 0)
    note = "new, the tiny world's" if s.stage == "pretrain" else "the tiny world's"
    side = config.get("sample_size", TINY_SIDE)  # Qwen-Image's config does not say; a source is as large as a picture
    return Base(note, config, _numbers(encoders), 0, text, side, side if is_qwen(config) else 0)


def experts_of(s: Settings, base: Base | None) -> dict[str, Expert]:
    """Every expert that the stage reads, by name."""
    wanted = {}
    if s.stage in ("opd", "sft", "merge", "eval"):
        wanted = {f"teacher {task}": where for task, where in s.teachers.items()}
    if anchor_of(s) == "anchor":
        wanted["anchor"] = s.anchor
    if s.stage == "eval":
        wanted |= {f"compare {name}": where for name, where in s.compare.items()}
    return {name: expert(where, base, s.rank) for name, where in wanted.items()}


# ---------------------------------------------------------------------------------------- the arithmetic of a step
def doubled(cfg: float) -> int:
    """Rows of a forward for one trajectory: classifier-free guidance asks with and without the prompt."""
    return 1 if cfg == 1 else 2


def is_hybrid(s: Settings) -> bool:
    """Q 4.1: is the rollout guided, and the objective not? Then it asks for the two branches one after the other."""
    return s.stage in SCORED and student_cfg(s) != trained_cfg(s)


def is_single_pass(s: Settings) -> bool:
    """Does OPD train each transition as it is made? The path estimators must know the future first."""
    return s.stage == "opd" and s.estimator not in ("path", "sampled_path")


def is_ode(s: Settings) -> bool:
    """Does the stage walk the ODE? (Q Eq. 8 and 14)"""
    return s.stage == "nft" or (s.stage == "opd" and s.states == "ode")


def trained_steps(s: Settings) -> int:
    """How many of the T transitions train: --train-steps of the stochastic ones, of the ODE's any."""
    start, stop = (0, s.num_steps) if is_ode(s) else window_of(s)
    return stop - start if s.train_steps == "all" else min(s.train_count, stop - start)


def trained_tasks(s: Settings) -> list[str]:
    """The tasks whose prompts train; where each task has a run of its own, that of the longest rows."""
    tasks = task_list(s)
    if s.stage not in TAUGHT or s.task == "mix":
        return tasks
    return [s.task or ("edit" if "edit" in tasks else tasks[0])]


def groups(s: Settings) -> dict[str, int]:
    """Groups (prompts) of each task in a rank's step: OPD and joint Mix-RL share P evenly, others have one task."""
    tasks = task_list(s)
    if s.stage == "curate" or (s.stage in TAUGHT and not (s.task == "mix" and s.mix == "joint")):
        return {{"mix": "the task whose turn it is", "": "the run's task"}.get(s.task, s.task): s.prompts_per_step}
    return {task: len(range(i, s.prompts_per_step, len(tasks))) for i, task in enumerate(tasks)}


def micro_batches(s: Settings) -> list[list[str]]:
    """The task of each row of a rank's step, micro-batch by micro-batch, guidance not counted.

    Rows come task by task. A micro-batch never spans two of GRPO's (or NFT's) `updates`, nor has both edits and prompts
    without a source picture: their token sequences differ in length. Flow matching has a part of its batch for each.
    """
    tasks, edits = task_list(s), s.batch_size // 2 if "edit" in task_list(s) else 0
    if s.stage == "pretrain":
        parts = [["drawings"] * (s.batch_size - edits), ["edit"] * edits]
    elif s.stage == "sft":  # drawn at random: their mean
        parts = [[task] * len(range(i, s.batch_size, len(tasks))) for i, task in enumerate(tasks)]
    else:
        rows = [task for task, count in groups(s).items() for _ in range(count * s.group_size)]
        share = len(rows) // (s.updates if s.stage in TAUGHT else 1)
        shares = [rows[i : i + share] for i in range(0, len(rows), share)]
        parts = [list(kind) for some in shares for _, kind in groupby(some, lambda task: task == "edit")]
    found = []
    for part in filter(None, parts):
        size = s.micro_batch or len(part)
        found += [part[i : i + size] for i in range(0, len(part), size)]
    return found


def rows_in_step(s: Settings) -> tuple[int, int, int]:
    """(rows of a rank's step, forwards that they take, rows of the largest), guidance not counted."""
    sizes = [len(part) for part in micro_batches(s)]
    # By chance a batch of flow matching may be one task's.
    most = min(s.micro_batch or s.batch_size, s.batch_size) if s.stage == "sft" else max(sizes)
    return sum(sizes), len(sizes), most


def anchor_of(s: Settings) -> str:
    """Which expert is MAR's anchor: "anchor", or the teacher that it is; "" where MAR is off."""
    if s.stage != "opd" or s.mar == 0:
        return ""
    return f"teacher {s.anchor}" if s.anchor in s.teachers else "anchor"


def taught(s: Settings) -> list[list[str]]:
    """OPD: the teacher of each row (F Eq. 7), micro-batch by micro-batch."""
    return [[f"teacher {task}" for task in part] for part in micro_batches(s)]


def forwards(s: Settings) -> list[Work]:
    """The transformer forwards of a rank's step, of every kind that there is."""
    if s.stage not in ("pretrain", "sft", *ROLLOUTS):
        return []
    rows, parts, _ = rows_in_step(s)
    if s.stage in ("pretrain", "sft"):  # flow matching: each image once, without guidance
        return [Work("student", True, parts, rows)]
    found = _distilled(s) if s.stage == "opd" else _drawn(s)
    return [w for w in found if w.forwards]


def _drawn(s: Settings) -> list[Work]:
    """Curation draws; GRPO and NFT draw, wait for the rewards and visit the trained states."""
    rows, parts, _ = rows_in_step(s)
    walked, guided = s.num_steps, doubled(student_cfg(s))
    drawn = parts * walked * (2 if is_hybrid(s) else 1), rows * walked * guided
    if s.stage == "curate":
        return [Work("student", False, *drawn)]
    visited = parts * trained_steps(s), rows * trained_steps(s) * doubled(trained_cfg(s))
    base = [Work("base", False, *visited)] if s.beta > 0 else []  # the other side of the KL, or of Q Eq. 9's distance
    if s.stage == "grpo":
        return [Work("student", True, *visited), Work("student", False, *drawn), *base]
    # The old policy draws, and says at each trained time where the loss starts from (Q Eq. 7).
    old = Work("old policy", False, drawn[0] + visited[0], drawn[1] + visited[1])
    return [Work("student", True, *visited), old, *base]


def _distilled(s: Settings) -> list[Work]:
    """OPD: single pass, the rollout's own forward carries the gradient where a transition trains, and only the others
    have none; otherwise all T steps are walked without gradient, and the trained states are visited again."""
    rows, parts, _ = rows_in_step(s)
    trained, own, theirs = trained_steps(s), doubled(student_cfg(s)), doubled(teacher_cfg(s))
    walked = s.num_steps - trained if is_single_pass(s) else s.num_steps
    # Each trained state is labelled by its row's teacher, one forward for each teacher in the micro-batch. The anchor
    # sees every row (F Eq. 12) and so has already answered for those that it also teaches.
    anchor, labelled = anchor_of(s), taught(s)
    calls = sum(len({*part} - {anchor}) for part in labelled)
    asked = sum(name != anchor for part in labelled for name in part)
    return [
        Work("student", True, parts * trained, rows * trained * own),
        Work("student", False, parts * walked, rows * walked * own),
        Work("teachers", False, calls * trained, asked * trained * theirs),
        Work("anchor", False, parts * trained if anchor else 0, rows * trained * theirs),
    ]


def asks_empty(s: Settings) -> bool:
    """Is the empty prompt of guidance ever encoded?"""
    return (student_cfg(s) if s.stage == "curate" else teacher_cfg(s)) != 1


def distinct_prompts(s: Settings, edits: bool = False) -> int:
    """Prompts without a source picture, or edits, that a rank encodes, at most: those it will train on, the test
    prompts, and guidance's empty one (edits: not counted, each has one of its own)."""

    def mine(tasks: Sequence[str]) -> list[str]:
        return [task for task in tasks if (task == "edit") == edits]

    tasks = mine(trained_tasks(s))
    own = {task: _count_lines(Path(path)) for task, path in s.prompts.items()}
    there = own.get("auto", 0) + sum(own.get(task) or s.train_prompts for task in tasks) if tasks else 0
    shares = groups(s)
    often = sum(shares.get(task, 0) for task in tasks) if set(tasks) & set(shares) else s.prompts_per_step
    drawn = -(-s.sft_images * len(tasks) // len(trained_tasks(s)))
    seen = {"sft": drawn, "merge": 0, "eval": 0, "curate": there}.get(s.stage, s.steps * often)
    found = min(there, seen) + s.eval_prompts * len(mine(test_tasks(s)))
    return found + (found > 0 and not edits and asks_empty(s))


def _count_lines(path: Path) -> int:
    """Prompts in a file, or in a folder's training file; 0 where it cannot be read: the run itself will say so."""
    files = [path / "train_metadata.jsonl", path / "train.txt"] if path.is_dir() else [path]
    file = next((f for f in files if f.is_file()), None)
    return sum(bool(line.strip()) for line in file.read_bytes().split(b"\n")) if file else 0


# ------------------------------------------------------------------------------------------------------- memory
def number_bytes(s: Settings) -> int:
    """b: bytes of a number inside the transformer. The tiny model ignores --precision and is float32."""
    return 2 if s.precision == "bfloat16" and not is_tiny(s) else 4


def fully(s: Settings) -> bool:
    """Does the whole transformer train?"""
    return s.stage == "pretrain" or (s.parameters == "full" and s.stage not in IDLE)


def pictured(s: Settings) -> bool:
    """Is a picture ever decoded?"""
    return s.stage in (*SCORED, "eval") or s.eval_prompts > 0


def edits(s: Settings) -> bool:
    """Is a source picture ever read?"""
    return "edit" in trained_tasks(s) or (s.eval_prompts > 0 and "edit" in test_tasks(s))


def judges(s: Settings) -> dict[str, Judge]:
    """The VLM judges of this process by the scorer's name. Scorers that ask the same one share it (`vlm._load`)."""
    asked = registry.read(s.rewards, rewarded_tasks(s), is_tiny(s)).scorers if s.stage in SCORED else {}
    return {name: judge(entry) for name, entry in asked.items() if entry["kind"] == "vlm"}


def judge(entry: dict) -> Judge:
    """What a scorer of the kind "vlm" loads. SettingsError for a checkpoint that is there and cannot be read."""
    where = entry.get("model") or ASKED.get(entry.get("rubric"), next(iter(JUDGES)))
    folder = _folder(where)
    count = _numbers(sorted(folder.glob("*.safetensors"))) if folder else JUDGES.get(where, 0)
    return Judge(where, entry.get("dtype", registry.DTYPES[0]), entry.get("device", ""), count)


def judge_bytes(found: Judge) -> int:
    """What it takes of the accelerator."""
    return 0 if found.device == "cpu" else found.parameters * (4 if found.dtype == "float32" else 2)


def trained_parameters(s: Settings, base: Base, init: Expert | None, experts: dict[str, Expert]) -> int:
    """n: numbers that the optimizer moves, or that a merge makes (`cat` adds the teachers' ranks up)."""
    if s.stage in IDLE:
        counts = [e.parameters for e in experts.values()]
        return 0 if s.stage != "merge" else sum(counts) if s.merge_method == "cat" else max(counts)
    if fully(s):
        return base.parameters - unread_parameters(base.config) + (base.encoders if s.stage == "pretrain" else 0)
    if init and init.kind in LORAS:
        return init.parameters - init.unread
    return lora_parameters(base.config, s.rank) - unread_lora(base.config, s.rank)


def memory(s: Settings, base: Base, experts: dict[str, Expert], n: int, world: int, local: int) -> Memory:
    """The estimate that the top of this file describes, for n trained numbers; world, local: ranks in all, a node."""
    b, full, steps = number_bytes(s), fully(s), s.stage not in IDLE
    shards = {"ddp": 1, "fsdp": world, "hsdp": local}[s.parallel]
    beside = {} if s.stage == "merge" else experts  # a merge reads its teachers' factors into host memory
    loras = [e.parameters for e in beside.values() if e.kind in LORAS]
    visitors = {name: e.parameters for name, e in beside.items() if e.kind == "full"}
    frozen = not full or loras or (s.stage in TAUGHT and s.beta > 0)
    parts = {"frozen backbone": (base.parameters + is_tiny(s) * base.encoders) * b if frozen else 0}
    parts["trained weights"] = parts["averaged weights"] = 4 * n // shards
    parts["old policy"] = 4 * n // shards * (s.stage == "nft")
    parts["gradients"], parts["Adam moments"] = 4 * n // shards * steps, 8 * n // shards * steps
    if shards > 1:
        layers = range(base.config["num_layers"])
        parts["gathered blocks"] = 2 * b * max(block_parameters(base.config, layer) for layer in layers)
    elif b == 2:
        parts["bfloat16 copies"] = 2 * n * steps
    parts["adapters"] = 4 * sum(loras)
    parts["full experts"] = b * present(s, visitors)
    parts["trajectories"] = 4 * base.latent * stored_latents(s)
    rows, _, most = rows_in_step(s)
    held = most if s.stage in ("opd", "curate") else rows * steps  # RL keeps the whole step's, SFT its batch's
    guided = 2 if s.stage in ROLLOUTS and asks_empty(s) else 1
    parts["text conditioning"] = conditioning(base, b, "edit" in trained_tasks(s)) * held * guided
    parts["judges"] = sum(map(judge_bytes, {*judges(s).values()}))
    parts["VAE"] = 4 * base.vae * (pictured(s) or edits(s))
    # Beside an edit waits what guidance sets against it: the same picture, with an empty prompt.
    prompts = conditioning(base, b) * distinct_prompts(s)
    empty = conditioning(base._replace(text=0), b, True) * asks_empty(s)
    prompts += (conditioning(base, b, True) + empty) * distinct_prompts(s, edits=True)
    host = {"full experts": b * sum(visitors.values()), "prompts": prompts * (not is_tiny(s))}
    return Memory(*({k: v for k, v in d.items() if v} for d in (parts, moments(s, base, n // shards, world), host)))


def conditioning(base: Base, b: int, edit: bool = False) -> int:
    """Bytes of one prompt's conditioning (`flow.Cond`), of an edit with its source's latents."""
    config, text = base.config, base.tokens(edit)[1]
    source = 4 * latent_channels(config) * base.source**2 if edit else 0
    return b * (text * config["joint_attention_dim"] + config.get("pooled_projection_dim", 0)) + source


def present(s: Settings, visitors: dict[str, int]) -> int:
    """Parameters of the full experts that are on the accelerator at once, at most.

    In OPD a micro-batch's own teachers, the next one's, and the anchor; elsewhere they come one by one.
    """
    if s.stage != "opd":
        return max(visitors.values(), default=0)
    parts = taught(s)
    together = [{*part, *after, anchor_of(s)} for part, after in zip(parts, [*parts[1:], parts[0]], strict=True)]
    return max(sum(visitors.get(name, 0) for name in names) for names in together)


def stored_latents(s: Settings) -> int:
    """Latents that wait until they are trained on: x, v and the mean of every step, and the last x.

    GRPO and NFT wait for the rewards of the whole step, with --overlap while the next one is drawn; NFT keeps the last
    transition alone. OPD without the single pass holds the trained steps of one micro-batch, with the labels beside
    them. Single-pass OPD and flow matching store nothing.
    """
    rows, _, most = rows_in_step(s)
    if s.stage in TAUGHT:
        return rows * (3 * (1 if s.stage == "nft" else s.num_steps) + 1) * (2 if s.overlap else 1)
    labels = 2 if anchor_of(s) else 1
    return most * ((3 + labels) * trained_steps(s) + 1) if s.stage == "opd" and not is_single_pass(s) else 0


def largest_forwards(s: Settings, world: int) -> tuple[int, int, int]:
    """Rows of the largest forward, guidance counted: (of a step without gradient, with gradient, of what is drawn
    outside of steps)."""
    most, student, objective = rows_in_step(s)[2], doubled(student_cfg(s)), doubled(trained_cfg(s))
    theirs = doubled(teacher_cfg(s))
    walked = 1 if is_hybrid(s) else student  # one branch after the other
    silent = {"opd": max(walked, theirs), "curate": walked, "grpo": max(walked, objective)}
    silent["nft"] = silent["grpo"]
    loud = {"opd": student, "grpo": objective, "nft": objective}
    pictures = -(-s.sft_images // len(task_list(s))) if s.stage == "sft" else s.eval_prompts  # of one task
    # Teachers draw for SFT and in an evaluation; else it is the student. Ranks share what is drawn.
    own = max(student, theirs) if s.stage in ("sft", "eval") else student
    drawn = min(s.micro_batch or DRAWN, -(-pictures // world)) * own
    return most * silent.get(s.stage, 0), most * loud.get(s.stage, 1), drawn


def moments(s: Settings, base: Base, weights: int, world: int) -> dict[str, int]:
    """Bytes of what comes and goes, by name; only the largest counts. weights: this rank's trained numbers."""
    found, trained, b = {"exporting the average": 4 * weights}, "full" if fully(s) else "lora", number_bytes(s)
    silent, loud, drawn = largest_forwards(s, world)
    own, tests = base.tokens("edit" in trained_tasks(s)), base.tokens("edit" in test_tasks(s))
    kind = architecture(base.config)
    if not is_tiny(s) and distinct_prompts(s) + distinct_prompts(s, edits=True):
        source = 8 * base.source  # pixels a side; the source goes through the VAE beside the encoder
        found[ENCODING] = base.encoders * b + VAE_READS[kind] * source**2 * edits(s)
    if silent or drawn:
        walked = activations(base.config, *own, silent, trained, b, gradient=False)
        shown = activations(base.config, *(own if s.stage == "sft" else tests), drawn, trained, b, gradient=False)
        # The old policy's weights stand in the student's place, and these wait beside them.
        found["forward without gradient"] = max(walked, shown) + 4 * weights * (s.stage == "nft")
    if s.stage not in IDLE:
        checkpointing = s.gradient_checkpointing and not is_tiny(s)  # the tiny model has no use for it
        found["training step"] = activations(base.config, *own, loud, trained, b, checkpointing)
    if base.vae and pictured(s):
        found["decoding a picture"] = VAE_PIXEL[kind] * s.resolution**2
    return found
