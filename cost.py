"""How many parameters, forwards and bytes does a run take?

Counted without loading a model, from the standard library and `settings` alone: of a checkpoint only its config and
its files' headers of shapes are read. `plan.py` puts it into words.

Exact: the parameters of diffusers' `SD3Transformer2DModel` and of a LoRA on it, and the forwards of a step.
An ESTIMATE: the memory of one rank, added up as if everything that stays were there at once. With N numbers in the
transformer, n trained ones, b bytes a number of --precision (2 or 4), the student spread over S ranks (ddp: 1, fsdp:
all, hsdp: those of a node) and D numbers in a latent, there stay

    frozen backbone    N b               the base, and what carries the LoRAs; absent where everything trains and
                                         neither a LoRA teacher nor GRPO's KL to the base needs it
    trained weights    4 n / S           float32, like the next three
    averaged weights   4 n / S           the EMA that a checkpoint exports
    gradients          4 n / S
    Adam moments       8 n / S           two a number (in pretraining Muon keeps one: counted as two)
    bfloat16 copies    2 n               autocast casts float32 weights once a forward ...
    gathered blocks    2 b / block       ... but of a sharded student only the block at work and the next are whole
    adapters           4 a               float32 factors of all LoRA teachers and of the anchor, a numbers
    full experts       N b each          those of this micro-batch and of the next one, and a full anchor (Q 4.3)
    trajectories       4 D each          latents that wait for their update, see `stored_latents`
    text conditioning  b (S_t J + P)     a row: S_t text tokens of J channels and the pooled vector of P
    VAE                4 a number        once a picture was wanted

and the largest of the moments adds to them: the text encoders (b a number), a forward without gradient, a training
step (`activations`), a picture's way through the VAE (VAE_PIXEL bytes a pixel), and a copy of the trained weights
while their average is exported. In host memory wait every full expert, N b, and every distinct prompt's conditioning.
"""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from settings import ASSETS, TASKS, Settings, SettingsError, is_tiny, task_list, window_of

# The transformer of Stable Diffusion 3.5 Medium as published; assumed where the model is a Hub id.
SD35_MEDIUM = {
    "num_layers": 24, "num_attention_heads": 24, "attention_head_dim": 64, "caption_projection_dim": 1536,
    "joint_attention_dim": 4096, "pooled_projection_dim": 2048, "patch_size": 2, "in_channels": 16, "out_channels": 16,
    "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm", "pos_embed_max_size": 384, "sample_size": 128,
}  # fmt: skip
SD35_ENCODERS = 120_000_000 + 690_000_000 + 4_760_000_000  # CLIP-L, CLIP-G and the encoder of T5-XXL
SD35_VAE = 84_000_000
CLIP_TOKENS = 77  # stand before T5's in the text sequence
IMAGE_LAYERS = ("to_q", "to_k", "to_v", "to_out.0")  # projections of an attention, by the stream that they serve
TEXT_LAYERS = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
# Importing these two of `adapters` would cost seconds; a test holds the copies to the originals.
TARGETS = tuple(f"attn.{name}" for name in (*IMAGE_LAYERS, *TEXT_LAYERS))
FILE_ENDINGS = (".safetensors", ".json", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".zip")
LORAS = ("peft", "diffusers", "hub")
# Bytes that autograd keeps in one block for every token and channel, by what trains and by b; measured. First a block
# with one attention, then what qk_norm adds to each attention, then what a second attention on the image tokens adds.
# A frozen weight needs no input kept, hence LoRA's smaller numbers; under autocast norms stay float32.
KEPT = {("lora", 4): (48, 8, 16), ("lora", 2): (28, 12, 8), ("full", 4): (84, 16, 24), ("full", 2): (42, 20, 12)}
# The VAE's last blocks work on 256 float32 maps of full resolution, of which about four are alive at once (measured:
# 0.97 GiB at 512 px). Pictures are decoded one by one.
VAE_PIXEL = 4 * 256 * 4
ROLLOUTS = ("opd", "curate", "grpo")  # stages that walk trajectories with guidance; the first two keep none
IDLE = ("merge", "eval", "curate")  # stages without an optimizer
DRAWN = 96  # pictures that are drawn at once where --micro-batch leaves it open
GIB = 1 << 30
SPARE = 1.1  # an allocator wastes a little: a verdict asks for a tenth more than the sum


class Base(NamedTuple):
    """What is known of the model without loading it."""

    note: str
    config: dict  # the transformer's
    encoders: int  # parameters of the text encoders
    vae: int  # of the VAE; 0: there is none
    text: int  # text tokens S_t
    side: int  # latents are side x side

    @property
    def parameters(self) -> int:
        """N: parameters of the transformer."""
        return transformer_parameters(self.config)

    @property
    def image(self) -> int:
        """Image tokens."""
        return (self.side // self.config["patch_size"]) ** 2


class Expert(NamedTuple):
    """A teacher, the anchor, or what the student starts from, as its files tell."""

    where: str
    kind: str  # "peft", "diffusers", "full", "hub" (taken for a LoRA), or "" where there is nothing usable
    parameters: int
    note: str


class Work(NamedTuple):
    """What one kind of forward costs a rank in one step; rows count guidance's doubling."""

    who: str
    gradient: bool
    forwards: int
    rows: int


class Memory(NamedTuple):
    """Bytes of one rank: what stays on the accelerator, what comes and goes there, what waits in host memory."""

    parts: dict[str, int]
    moments: dict[str, int]
    host: dict[str, int]

    @property
    def total(self) -> int:
        """What stays, and the largest moment."""
        return sum(self.parts.values()) + max(self.moments.values(), default=0)


# -------------------------------------------------------------------------------------------------- parameters
def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _width(config: dict) -> int:
    return config["num_attention_heads"] * config["attention_head_dim"]


def _dual(config: dict, layer: int) -> bool:
    return layer in (config.get("dual_attention_layers") or ())


def _block_parameters(config: dict, layer: int) -> int:
    """One joint block of an image and a text stream; the last block's text stream ends at the attention."""
    w, last, dual = _width(config), layer == config["num_layers"] - 1, _dual(config, layer)
    norm = config["attention_head_dim"] if config.get("qk_norm") else 0  # one scale for q, one for k, of each stream
    total = _linear(w, (9 if dual else 6) * w) + _linear(w, (2 if last else 6) * w)  # adaptive norms: image, text
    total += (7 if last else 8) * _linear(w, w) + 4 * norm  # q, k, v, out of both streams
    total += dual * (4 * _linear(w, w) + 2 * norm)  # attn2: the image stream with itself
    return total + (1 if last else 2) * (_linear(w, 4 * w) + _linear(4 * w, w))  # feed-forward of each stream


def transformer_parameters(config: dict) -> int:
    """Exact number of parameters of diffusers' `SD3Transformer2DModel` with this config.json.

    Position embeddings are a buffer, no parameters. KeyError for a missing entry, ValueError for a `qk_norm` that
    SD3 does not have.
    """
    if config.get("qk_norm") not in (None, "rms_norm"):
        raise ValueError(f"qk_norm {config['qk_norm']!r}")
    w, area = _width(config), config["patch_size"] ** 2
    total = _linear(config["in_channels"] * area, w)  # patches in
    total += _linear(256, w) + _linear(config["pooled_projection_dim"], w) + 2 * _linear(w, w)  # time and pooled text
    total += _linear(config["joint_attention_dim"], config["caption_projection_dim"])
    total += sum(_block_parameters(config, layer) for layer in range(config["num_layers"]))
    outputs = config.get("out_channels") or config["in_channels"]
    return total + _linear(w, 2 * w) + _linear(w, area * outputs)  # last norm, patches out


def lora_parameters(config: dict, rank: int, targets: Sequence[str] = TARGETS) -> int:
    """Exact number of parameters of a LoRA of this rank on `targets`, as PEFT injects it.

    Every projection is W -> W, with factors (rank, W) and (W, rank). PEFT matches whole dotted endings: "attn.to_q"
    leaves attn2 alone, the second attention of SD3.5's first blocks; a bare "to_q" adapts it too. The last block has
    no to_add_out.
    """
    modules, last = 0, config["num_layers"] - 1
    for layer in range(config["num_layers"]):
        names = [f"attn.{name}" for name in (*IMAGE_LAYERS, *TEXT_LAYERS[: 3 if layer == last else 4])]
        names += [f"attn2.{name}" for name in IMAGE_LAYERS if _dual(config, layer)]
        modules += sum(any(f".{name}".endswith(f".{target}") for target in targets) for name in names)
    return modules * 2 * rank * _width(config)


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


def _numbers(files: Sequence[Path]) -> int:
    return sum(math.prod(shape) for file in files for shape in _shapes(file).values())


def _transformer_config(folder: Path) -> dict | None:
    """The config of the SD3 transformer in a folder; None where there is none."""
    file = next((f for f in (folder / "transformer" / "config.json", folder / "config.json") if f.is_file()), None)
    if file is None:
        return None
    try:
        config = json.loads(file.read_text())
        transformer_parameters(config)
        return config
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as fault:
        raise SettingsError(f"{file}: not the config of an SD3 transformer ({fault!r}); give an SD3.5 model") from fault


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
        return Expert(where, "hub", count, f"Hub, fetched on first use; taken for a LoRA of rank {rank}")
    if folder is None:
        return Expert(where, "", 0, "MISSING: no such file or folder, and no Hub id")
    peft, diffusers = folder / "adapter_model.safetensors", folder / "pytorch_lora_weights.safetensors"
    if peft.is_file() and (folder / "adapter_config.json").is_file():
        return Expert(where, "peft", _numbers([peft]), "a LoRA in PEFT's layout")
    if diffusers.is_file():
        return Expert(where, "diffusers", _numbers([diffusers]), "a LoRA in diffusers' layout")
    config = _transformer_config(folder)
    if config is None:
        return Expert(where, "", 0, "UNUSABLE: neither an adapter nor a checkpoint")
    return Expert(where, "full", transformer_parameters(config), "a full checkpoint")


def base_of(s: Settings) -> Base | None:
    """What is known of the model; None where there is none to look at."""
    # Pretraining makes a new model, of the shipped one's shape.
    folder = _folder(str(Path(__file__).parent / ASSETS / "base") if s.stage == "pretrain" else s.model)
    text, side = CLIP_TOKENS + s.text_length, s.resolution // 8
    if folder is None and hub_id(s.model) and not is_tiny(s):
        note = "Hub, fetched on first use; the published configuration of SD3.5-M is assumed"
        return Base(note, SD35_MEDIUM, SD35_ENCODERS, SD35_VAE, text, side)
    config = _transformer_config(folder) if folder else None
    if config is None:
        return None
    encoders = sorted(folder.glob("text_encoder*/model*.safetensors"))
    if is_tiny(s):
        text = next((v[0] for file in encoders for k, v in _shapes(file).items() if k == "place.weight"), 0)
        note = "new, the tiny world's" if s.stage == "pretrain" else "the tiny world's"
        return Base(note, config, _numbers(encoders), 0, text, config["sample_size"])
    vae = _numbers(sorted(folder.glob("vae/*.safetensors"))) or SD35_VAE
    return Base("Stable Diffusion 3 in a folder", config, _numbers(encoders) or SD35_ENCODERS, vae, text, side)


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
def guidance(s: Settings) -> int:
    """Rows of a forward for one trajectory: classifier-free guidance asks with and without the prompt."""
    return 1 if s.cfg == 1 else 2


def is_single_pass(s: Settings) -> bool:
    """Does OPD train each transition as it is made? The path estimators must know the future first."""
    return s.stage == "opd" and s.single_pass and s.estimator not in ("path", "sampled_path")


def is_ode(s: Settings) -> bool:
    """Does OPD walk the ODE? (Q Eq. 14)"""
    return s.stage == "opd" and s.estimator == "velocity"


def trained_steps(s: Settings) -> int:
    """How many of the T transitions train: --train-steps of the stochastic ones, of the ODE's any."""
    start, stop = (0, s.num_steps) if is_ode(s) else window_of(s)
    return stop - start if s.train_steps == "all" else min(s.train_count, stop - start)


def groups(s: Settings) -> dict[str, int]:
    """Groups (prompts) of each task in a rank's step: OPD shares P evenly, GRPO has one task at a time."""
    if s.stage == "grpo":
        return {{"mix": "the task whose turn it is", "": "the run's task"}.get(s.task, s.task): s.prompts_per_step}
    tasks = task_list(s)
    return {task: len(range(i, s.prompts_per_step, len(tasks))) for i, task in enumerate(tasks)}


def rows_in_step(s: Settings) -> tuple[int, int, int]:
    """(rows of a rank's step, forwards that they take, rows of the largest), guidance not counted.

    GRPO rolls out and updates share by share: a micro-batch never spans two of its `updates`.
    """
    rows = s.batch_size if s.stage in ("pretrain", "sft") else s.prompts_per_step * s.group_size
    shares = s.updates if s.stage == "grpo" else 1
    most = min(s.micro_batch or rows, rows // shares)
    return rows, shares * -(-rows // shares // most), most


def anchor_of(s: Settings) -> str:
    """Which expert is MAR's anchor: "anchor", or the teacher that it is; "" where MAR is off."""
    if s.stage != "opd" or s.mar == 0:
        return ""
    return f"teacher {s.anchor}" if s.anchor in s.teachers else "anchor"


def taught(s: Settings) -> list[list[str]]:
    """OPD: the teacher of each row (F Eq. 7), micro-batch by micro-batch; rows come task by task."""
    names = [f"teacher {task}" for task, count in groups(s).items() for _ in range(count * s.group_size)]
    most = rows_in_step(s)[2]
    return [names[i : i + most] for i in range(0, len(names), most)]


def forwards(s: Settings) -> list[Work]:
    """The transformer forwards of a rank's step, of every kind that there is."""
    rows, parts, _ = rows_in_step(s)
    if s.stage in ("pretrain", "sft"):  # flow matching: each image once, without guidance
        return [Work("student", True, parts, rows)]
    if s.stage == "curate":  # prompt by prompt, without gradient
        return [Work("student", False, parts * s.num_steps, rows * s.num_steps * guidance(s))]
    if s.stage not in ("grpo", "opd"):
        return []
    # Single pass: the rollout's own forward carries the gradient where a transition trains, and only the others have
    # none. Otherwise the rollout walks all T steps without gradient and the trained states are visited again: GRPO
    # waits for the reward, path credit for the future.
    trained = trained_steps(s)
    walked = s.num_steps - trained if is_single_pass(s) else s.num_steps

    def work(who: str, gradient: bool, calls: int, steps: int, of: int = rows) -> Work:
        return Work(who, gradient, calls * steps, of * steps * guidance(s))

    found = [work("student", True, parts, trained), work("student", False, parts, walked)]
    if s.stage == "grpo":
        return [*found, work("base", False, parts, trained)] if s.beta > 0 else found  # the KL's other side
    # Each trained state is labelled by its row's teacher, one forward for each teacher in the micro-batch. The anchor
    # sees every row (F Eq. 12) and so has already answered for those that it also teaches.
    anchor, labelled = anchor_of(s), taught(s)
    calls = sum(len({*part} - {anchor}) for part in labelled)
    found.append(work("teachers", False, calls, trained, sum(name != anchor for part in labelled for name in part)))
    found.append(work("anchor", False, parts if anchor else 0, trained))
    return [w for w in found if w.forwards]


def distinct_prompts(s: Settings) -> int:
    """Prompts that a rank encodes, at most: those it will train on, the test prompts, and the empty one of guidance."""
    tasks = task_list(s)
    tests = s.eval_prompts * len(tasks)
    if s.stage == "grpo":
        tasks = TASKS if s.task == "mix" else [s.task or TASKS[0]]
    own = {task: _count_lines(Path(path)) for task, path in s.prompts.items()}
    there = own.get("auto", 0) + sum(own.get(task) or s.train_prompts for task in tasks)
    seen = {"sft": s.sft_images, "merge": 0, "eval": 0, "curate": there}.get(s.stage, s.steps * s.prompts_per_step)
    return min(there, seen) + tests + (s.cfg != 1 or tests > 0)


def _count_lines(path: Path) -> int:
    """Prompts in a file, or in a folder's training file; 0 where it cannot be read: the run itself will say so."""
    files = [path / "train_metadata.jsonl", path / "train.txt"] if path.is_dir() else [path]
    file = next((f for f in files if f.is_file()), None)
    return sum(bool(line.strip()) for line in file.read_bytes().split(b"\n")) if file else 0


# ------------------------------------------------------------------------------------------------------- memory
def number_bytes(s: Settings) -> int:
    """b: bytes of a number inside the transformer. The tiny model ignores --precision and is float32."""
    return 2 if s.precision == "bfloat16" and not is_tiny(s) else 4


def activations(base: Base, rows: int, trained: str, b: int, checkpointing: bool = False, gradient: bool = True) -> int:
    """Bytes that autograd keeps of one forward of `rows`; without gradient, those of one block at work (a bound).

    A block: rows x W x ((N + S) (block + norm) + N (second + norm) where it has a second attention), see KEPT, with
    N image and S text tokens. Checkpointing keeps the inputs of every block, rows x W x (N + S) numbers of b bytes,
    and one block's own, which backward recomputes block by block. trained: "lora" or "full".
    """
    block, norm, second = KEPT[trained, b]
    norm = norm if base.config.get("qk_norm") else 0
    width, tokens, layers = rows * _width(base.config), base.image + base.text, range(base.config["num_layers"])
    blocks = [width * (tokens * (block + norm) + base.image * (second + norm) * _dual(base.config, n)) for n in layers]
    if not gradient:
        return max(blocks)
    return len(blocks) * width * tokens * b + max(blocks) if checkpointing else sum(blocks)


def fully(s: Settings) -> bool:
    """Does the whole transformer train?"""
    return s.stage == "pretrain" or (s.parameters == "full" and s.stage not in IDLE)


def pictured(s: Settings) -> bool:
    """Is a picture ever decoded?"""
    return s.stage in ("curate", "grpo", "eval") or s.eval_prompts > 0


def trained_parameters(s: Settings, base: Base, init: Expert | None, experts: dict[str, Expert]) -> int:
    """n: numbers that the optimizer moves, or that a merge makes (`cat` adds the teachers' ranks up)."""
    if s.stage in IDLE:
        counts = [e.parameters for e in experts.values()]
        return 0 if s.stage != "merge" else sum(counts) if s.merge_method == "cat" else max(counts)
    if fully(s):
        return base.parameters + (base.encoders if s.stage == "pretrain" else 0)
    return init.parameters if init and init.kind in LORAS else lora_parameters(base.config, s.rank)


def memory(s: Settings, base: Base, experts: dict[str, Expert], n: int, world: int, local: int) -> Memory:
    """The estimate that the top of this file describes, for n trained numbers; world, local: ranks in all, a node."""
    b, full, steps = number_bytes(s), fully(s), s.stage not in IDLE
    shards = {"ddp": 1, "fsdp": world, "hsdp": local}[s.parallel]
    beside = {} if s.stage == "merge" else experts  # a merge reads its teachers' factors into host memory
    loras = [e.parameters for e in beside.values() if e.kind in LORAS]
    visitors = {name: e.parameters for name, e in beside.items() if e.kind == "full"}
    frozen = not full or loras or (s.stage == "grpo" and s.beta > 0)
    parts = {"frozen backbone": (base.parameters + is_tiny(s) * base.encoders) * b if frozen else 0}
    parts["trained weights"] = parts["averaged weights"] = 4 * n // shards
    parts["gradients"], parts["Adam moments"] = 4 * n // shards * steps, 8 * n // shards * steps
    if shards > 1:
        layers = range(base.config["num_layers"])
        parts["gathered blocks"] = 2 * b * max(_block_parameters(base.config, layer) for layer in layers)
    elif b == 2:
        parts["bfloat16 copies"] = 2 * n * steps
    parts["adapters"] = 4 * sum(loras)
    parts["full experts"] = b * present(s, visitors)
    parts["trajectories"] = 4 * base.config["in_channels"] * base.side**2 * stored_latents(s)
    row = b * (base.text * base.config["joint_attention_dim"] + base.config["pooled_projection_dim"])
    rows, _, most = rows_in_step(s)
    held = most if s.stage in ROLLOUTS[:2] else rows * steps  # GRPO keeps those of the whole step, SFT its batch's
    parts["text conditioning"] = row * held * (guidance(s) if s.stage in ROLLOUTS else 1)
    parts["VAE"] = 4 * base.vae * pictured(s)
    host = {"full experts": b * sum(visitors.values()), "prompts": row * distinct_prompts(s) * (not is_tiny(s))}
    return Memory(*({k: v for k, v in d.items() if v} for d in (parts, moments(s, base, n // shards, world), host)))


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

    GRPO waits for the rewards of the whole step. OPD without the single pass holds the trained steps of one
    micro-batch, with the labels beside them. Single-pass OPD and flow matching store nothing.
    """
    rows, _, most = rows_in_step(s)
    if s.stage == "grpo":
        return rows * (3 * s.num_steps + 1)
    labels = 2 if anchor_of(s) else 1
    return most * ((3 + labels) * trained_steps(s) + 1) if s.stage == "opd" and not is_single_pass(s) else 0


def moments(s: Settings, base: Base, weights: int, world: int) -> dict[str, int]:
    """Bytes of what comes and goes, by name; only the largest counts. weights: this rank's trained numbers."""
    found, trained, b = {"exporting the average": 4 * weights}, "full" if fully(s) else "lora", number_bytes(s)
    rollout = s.stage in ROLLOUTS
    most = rows_in_step(s)[2] * (guidance(s) if rollout else 1)
    pictures = -(-s.sft_images // len(task_list(s))) if s.stage == "sft" else s.eval_prompts  # of one task
    drawn = min(s.micro_batch or DRAWN, -(-pictures // world)) * guidance(s)  # ranks share what is drawn
    if not is_tiny(s) and distinct_prompts(s):
        found["encoding prompts"] = base.encoders * b
    if rollout or drawn:
        rows = max(drawn, most) if rollout else drawn
        found["forward without gradient"] = activations(base, rows, trained, b, gradient=False)
    if s.stage not in IDLE:
        checkpointing = s.gradient_checkpointing and not is_tiny(s)  # the tiny model has no use for it
        found["training step"] = activations(base, most, trained, b, checkpointing)
    if base.vae and pictured(s):
        found["decoding a picture"] = VAE_PIXEL * s.resolution**2
    return found
