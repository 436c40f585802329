"""Who computes the velocity, and how do a student and its teachers share one model?

    velocity(x, t, cond, uncond, cfg)  v_theta(x_t, t, c); the only place where guidance is written
    adapter(name)                      run as one of the experts, or as the base

Who computes it:

    the student    a LoRA on the frozen backbone, or (`--parameters full`) a transformer of its own
    LoRA experts   teachers phi_k (F Eq. 7), the anchor of MAR (F Eq. 12), the base: all on the one backbone, so that
                   a teacher costs its low-rank factors only, not a second transformer
    full experts   teachers that are whole checkpoints: they wait in pinned host memory, and only the one that is
                   needed now, and the next one while it is being copied, are on the accelerator (Q 4.3)

Numbers: the transformer computes in `precision` (bfloat16 on an accelerator), trained weights are float32, and what
leaves `velocity` is float32 at least, so that guidance, SDE and losses never see a bfloat16.

`models.py` has the concrete models, which add text encoding, decoding and the time grid.
"""

import copy
import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import QwenImageTransformer2DModel, SD3Transformer2DModel
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

import sde
from data.common import first_line
from models import lora as adapters
from models.lora import ModelError

STUDENT = "student"
Transformer = SD3Transformer2DModel | QwenImageTransformer2DModel
TRANSFORMERS = {kind.__name__: kind for kind in (SD3Transformer2DModel, QwenImageTransformer2DModel)}


class Cond(NamedTuple):
    """Conditioning of B prompts: token embeddings (B, S, C), and what some models add to them, else None.

    pooled: one vector a prompt, (B, C') (SD3). mask: (B, S) bool, False where a shorter prompt was padded; None where
    none was (Qwen-Image). source: latents of the picture to be edited, (B, C, H, W); a batch has one for every row or
    for none.
    """

    tokens: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None
    source: Tensor | None = None

    def rows(self, index: Tensor | slice) -> "Cond":
        return Cond(*(part if part is None else part[index] for part in self))

    def to(self, device: torch.device | str) -> "Cond":
        return Cond(*(part if part is None else part.to(device) for part in self))


def joined(conds: Sequence[Cond]) -> Cond:
    """Several batches' conditioning as one: shorter prompts are padded with zeros, and the mask says where.

    ValueError where only some of them have a source.
    """
    if len({cond.source is None for cond in conds}) > 1:
        raise ValueError("edits and prompts without a source picture do not fit into one batch")
    longest = max(cond.tokens.shape[1] for cond in conds)
    padded = any(cond.mask is not None or cond.tokens.shape[1] < longest for cond in conds)
    tokens, masks = [], []
    for cond in conds:
        rows, length = cond.tokens.shape[:2]
        mask = cond.tokens.new_ones(rows, length, dtype=torch.bool) if cond.mask is None else cond.mask
        tokens.append(nn.functional.pad(cond.tokens, (0, 0, 0, longest - length)))
        masks.append(nn.functional.pad(mask, (0, longest - length)))
    pooled, source = (None if getattr(conds[0], part) is None else torch.cat([getattr(cond, part) for cond in conds])
                      for part in ("pooled", "source"))  # fmt: skip
    return Cond(torch.cat(tokens), pooled, torch.cat(masks) if padded else None, source)


class Visitor:
    """A full-checkpoint expert: its weights live in (pinned) host memory and visit the accelerator."""

    def __init__(self, module: nn.Module, device: torch.device):
        self.module, self.device = module.requires_grad_(False), device
        tensors = [*module.parameters(), *module.buffers()]
        cuda = device.type == "cuda"
        self.pairs = [(tensor, tensor.data.pin_memory() if cuda else tensor.data) for tensor in tensors]
        for tensor, host in self.pairs:
            tensor.data = host  # pinned; the pageable original is let go
        self.stream = torch.cuda.Stream(device) if cuda else None
        self.present = device.type == "cpu"  # on the CPU there is nowhere to go
        self.arrival = None

    def fetch(self) -> None:
        """Begin the copy onto the device, beside whatever is being computed there."""
        if self.present:
            return
        with torch.cuda.stream(self.stream):  # a stream of None changes nothing
            for tensor, host in self.pairs:
                tensor.data = host.to(self.device, non_blocking=True)
        self.arrival = self.stream.record_event() if self.stream else None
        self.present = True

    def ready(self) -> nn.Module:
        """The module, on the device; what is computed next waits for the copy, the host does not."""
        self.fetch()
        if self.arrival:
            now = torch.cuda.current_stream(self.device)
            now.wait_event(self.arrival)
            for tensor, _ in self.pairs:
                tensor.data.record_stream(now)  # not to be reused before what is queued now has read it
            self.arrival = None
        return self.module

    def leave(self) -> None:
        """Give the accelerator's memory back. Frozen weights need no copy home."""
        if self.present and self.device.type != "cpu":
            for tensor, host in self.pairs:
                tensor.data = host
            self.present = False


class FlowModel:
    """A flow-matching transformer, the student, with any number of experts beside it."""

    pipeline = ""  # the diffusers pipeline that loads our adapters, where there is one
    empty = ""  # the prompt of guidance's other branch
    train_shift = 0.0  # training times are logit-normal around this: the model's noise schedule

    def __init__(self, transformer: Transformer, device: torch.device | str = "cpu"):
        self.device, self.precision = torch.device(device), "float32"
        self.kind = type(transformer)  # sharding (FSDP2) gives the module a class of its own
        self.transformer = transformer.to(self.device)  # the student's
        self.backbone = self.transformer  # carries the LoRAs; another module only where all parameters train
        self.active: nn.Module = self.transformer  # what `velocity` runs
        self.source = "a new model"  # where the weights came from, for error messages and adapter files
        self.fingerprint = ""  # hash of the base weights: an adapter remembers the base it was trained on
        self.adapters: dict[str, LoraConfig] = {}
        self.visitors: dict[str, Visitor] = {}
        self.trains = ""  # "", "lora" or "full": what `trainable` hands to the optimizer

    # ------------------------------------------------------------------------------------------ the interface
    def prepare(self, prompts: Iterable[str], images: Iterable[Tensor | None] | None = None) -> None:
        """Encode every prompt (of an edit, with its source picture) that a run will need, where encoding is dear."""

    def velocity(self, x: Tensor, t: float | Tensor, cond: Cond, uncond: Cond | None = None, cfg: float = 1.0):
        """v_theta(x_t, t, c) (B, C, H, W), float32, with classifier-free guidance where cfg != 1.

        t is one time for all or one a sample (B,). Gradients flow if they are enabled. ValueError if cfg != 1 has no
        `uncond`.
        """
        if cfg == 1.0:
            return self._forward(x, self._times(x, t), cond)
        if uncond is None:
            raise ValueError(f"guidance scale {cfg} needs the conditioning of the empty prompt (uncond)")
        return self.guide(*self.branches(x, t, cond, uncond), cfg)

    def branches(self, x: Tensor, t: float | Tensor, cond: Cond, uncond: Cond) -> tuple[Tensor, Tensor]:
        """v without and with the prompt, (B, C, H, W) each, in one forward of 2B rows."""
        t = self._times(x, t)
        v_uncond, v_cond = self._forward(torch.cat([x, x]), torch.cat([t, t]), joined([uncond, cond])).chunk(2)
        return v_uncond, v_cond

    def guide(self, v_uncond: Tensor, v_cond: Tensor, cfg: float) -> Tensor:
        """Classifier-free guidance, v = v_uncond + cfg (v_cond - v_uncond): the only place where it is written."""
        return v_uncond + cfg * (v_cond - v_uncond)

    def _times(self, x: Tensor, t: float | Tensor) -> Tensor:
        return torch.as_tensor(t, dtype=torch.float32, device=x.device).expand(len(x))

    def _forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        # float32 weights (LoRA, full student) and a bfloat16 backbone meet under autocast.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            return sde.full_precision(self._run(x, t, cond))

    def _run(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """One forward of `active`, SD3's way; t (B,)."""
        return self.active(
            hidden_states=x,
            encoder_hidden_states=cond.tokens,
            pooled_projections=cond.pooled,
            timestep=t * 1000,  # SD3 embeds t in [0, 1000]
            return_dict=False,
        )[0]

    # ------------------------------------------------------------------------------------------ student, experts
    def add_adapter(self, name: str, config: LoraConfig, state: dict[str, Tensor] | None = None) -> None:
        """Put one LoRA on the backbone, from `state` or new (A gaussian, B zero: it begins as the base)."""
        with warnings.catch_warnings():  # several adapters on one backbone are the point, not an oversight
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            self.backbone.add_adapter(config, adapter_name=name)
        for key, parameter in self.backbone.named_parameters():
            if f".{name}." in key:  # small, and trained or compared with what is trained: float32
                parameter.data = parameter.data.float()
        if state is not None:
            result = set_peft_model_state_dict(self.backbone, state, adapter_name=name)
            if result.unexpected_keys:
                raise ModelError(f"adapter {name}: the model has no place for {result.unexpected_keys[0]}")
            missing = [key for key in result.missing_keys if f".{name}." in key]
            if missing:
                raise ModelError(f"adapter {name}: there is no value for {missing[0]}")
        self.adapters[name] = config
        if name == STUDENT:
            self.trains = "lora"
        self._use(STUDENT)

    def add_expert(self, name: str, where: str) -> None:
        """Add a frozen expert from a Hub id, folder or run: a LoRA, or a full checkpoint of the same architecture.

        ModelError names the file where it does not fit this model.
        """
        folder = adapters.locate(where)
        if adapters.kind(folder) == "full":
            module = read_transformer(folder, self._dtype(), self.backbone.config)
            self.visitors[name] = Visitor(module, self.device)
            return
        state, config = self.read_adapter(folder)
        self.add_adapter(name, config, state)

    def read_adapter(self, folder: Path) -> tuple[dict[str, Tensor], LoraConfig]:
        """An adapter on disk, checked against this model's backbone; see `adapters.read_adapter`."""
        modules = dict(self.backbone.named_modules())
        return adapters.read_adapter(folder, modules, self.source, self.fingerprint)

    def train_fully(self, where: str = "", keep_base: bool = True) -> None:
        """Make the student a transformer of its own in float32, from a full checkpoint or from the base.

        The frozen base stays as the backbone of LoRA experts and of the KL to the base, unless nobody needs it.
        ValueError where an adapter is there already: the student would be a copy of base and adapter together.
        """
        if self.adapters:
            raise ValueError(f"train_fully must come before the adapters {sorted(self.adapters)}")
        folder = adapters.locate(where) if where else None
        if folder and adapters.kind(folder) == "full":
            own = read_transformer(folder, torch.float32, self.backbone.config).to(self.device)
            if self.transformer.is_gradient_checkpointing:
                own.enable_gradient_checkpointing()
        else:
            own = copy.deepcopy(self.transformer).float() if keep_base else self.transformer.float()
        if folder and adapters.kind(folder) != "full":  # a merged cold start: its update becomes part of the weights
            state, config = self.read_adapter(folder)
            own.add_adapter(config, adapter_name="init")
            set_peft_model_state_dict(own, state, adapter_name="init")
            own.fuse_lora(adapter_names=["init"])
            own.unload_lora()
        self.transformer, self.trains = own.requires_grad_(True), "full"
        self.backbone = self.backbone if keep_base else own
        self._use(STUDENT)

    @contextmanager
    def adapter(self, name: str | None) -> Iterator[None]:
        """Run the body as expert `name` (None: the base), then restore the student, whatever happens.

        TRAP: PEFT's `set_adapter` also moves `requires_grad`. A teacher that is still selected when the
        student's loss runs backward leaves the student's gradients None, silently; hence a context
        that always comes back, and a body without gradients: nothing but the student ever trains.
        """
        if name is not None and name not in self.adapters and name not in self.visitors:
            raise KeyError(f"no adapter {name!r}; there are {sorted([*self.adapters, *self.visitors])}")
        try:
            self._use(name)
            with torch.no_grad():
                yield
        finally:
            self._use(STUDENT)

    def _use(self, name: str | None) -> None:
        if name in self.visitors:
            self.active = self.visitors[name].ready()
        elif name == STUDENT and self.trains == "full":
            self.active = self.transformer
        else:
            self.active = self.backbone
            self._select(name if name in self.adapters else None)

    def _select(self, name: str | None) -> None:
        if not self.adapters:
            return
        if name is None:
            self.backbone.disable_adapters()
            return
        self.backbone.enable_adapters()
        self.backbone.set_adapter(name)
        for key, parameter in self.backbone.named_parameters():
            parameter.requires_grad_(f".{STUDENT}." in key)

    def keep(self, names: Iterable[str]) -> None:
        """Have these full experts on the device, or on their way to it, and no others."""
        names = set(names)
        for name, visitor in self.visitors.items():
            if name not in names:
                visitor.leave()
        for name in names & set(self.visitors):
            self.visitors[name].fetch()

    def trainable(self) -> dict[str, nn.Parameter]:
        """What the optimizer trains, by name: the student's factors, or the whole transformer."""
        return {name: p for name, p in self.transformer.named_parameters() if p.requires_grad}

    def adapter_state(self, name: str = STUDENT) -> dict[str, Tensor]:
        """The LoRA factors of one adapter, {module.lora_A.weight: (r, in), module.lora_B.weight: (out, r)}."""
        # PEFT's default for embedding layers, "auto", asks the hub about the base at every checkpoint.
        state = get_peft_model_state_dict(self.backbone, adapter_name=name, save_embedding_layers=False)
        return {key: value.detach().cpu().clone().contiguous() for key, value in state.items()}

    def save_full(self, folder: Path, state: dict[str, Tensor]) -> None:
        """Write the student's whole transformer, from its full state dict, as `transformer/` in diffusers' layout."""
        with torch.device("meta"):
            shell = self.kind.from_config(self.transformer.config)
        shell.load_state_dict({key: value.to(self._dtype()) for key, value in state.items()}, assign=True)
        shell.save_pretrained(folder / "transformer")

    def _dtype(self) -> torch.dtype:
        return getattr(torch, self.precision)


def read_transformer(folder: Path, dtype: torch.dtype, like: dict | None = None) -> Transformer:
    """`folder/transformer` (or `folder` itself) in diffusers' layout, frozen, on the CPU.

    ModelError names the folder if it cannot be read, or the entry in which its config differs from `like`.
    """
    folder = folder / "transformer" if (folder / "transformer").is_dir() else folder
    try:
        config = json.loads((folder / "config.json").read_text())
        like = json.loads(json.dumps(dict(like or {}), default=str))  # a file's lists are a new model's tuples
        ours = {k: v for k, v in like.items() if (k[0] != "_" and k != "sample_size") or k == "_class_name"}
        wrong = [k for k in ours if k in config and config[k] != ours[k]]
        if not wrong:
            # low_cpu_mem_usage stays at its default: weights go straight from the file into place
            options = {"torch_dtype": dtype, "use_safetensors": True, "output_loading_info": True}
            kind = TRANSFORMERS[config.get("_class_name", SD3Transformer2DModel.__name__)]
            module, info = kind.from_pretrained(folder, **options)
            if amiss := [*info["missing_keys"], *info["unexpected_keys"]]:  # diffusers only warns of these
                raise ValueError(f"its weights are not those that its config describes: {amiss[0]}")
            return module.requires_grad_(False).eval()
    except Exception as fault:  # JSON, safetensors, a missing file or shapes: one line instead of a stack
        raise ModelError(f"{folder}: not a readable transformer ({first_line(fault)})") from fault
    k = wrong[0]
    raise ModelError(f"{folder / 'config.json'}: another architecture: {k} is {config[k]}, the model's is {like[k]}")


def require_parts(folder: Path, parts: Iterable[str]) -> None:
    """ModelError where a pipeline's folder lacks one of these folders.

    transformers makes up a tokenizer without a word, and a VAE is missed at the first picture, after hours of training.
    """
    for part in parts:
        if not (folder / part).is_dir():
            raise ModelError(f"{folder / part}: missing; the base must be a pipeline in diffusers' layout")


def read_part(kind: type, folder: Path, dtype: torch.dtype | None = None):
    """`kind.from_pretrained(folder)`, frozen if it has weights (then with a `dtype`), or a ModelError of one line."""
    require_parts(folder.parent, [folder.name])
    try:
        if dtype is None:
            return kind.from_pretrained(folder)
        options = {"torch_dtype": dtype, "use_safetensors": True, "output_loading_info": True}
        loaded, info = kind.from_pretrained(folder, **options)
        # Tensors that the file lacks come back random or empty, with a warning at most. Embeddings that the T5 encoder
        # shares between two names may stand in the file under one of them.
        if lacking := [key for key in info["missing_keys"] if "embed_tokens" not in key]:
            raise ValueError(f"its weights lack {sorted(lacking)[0]}")
    except Exception as fault:
        raise ModelError(f"{folder}: not readable as {kind.__name__} ({first_line(fault)})") from fault
    return loaded.requires_grad_(False).eval()


def fingerprint(folder: Path) -> str:
    """A hash of the weights in `folder`: whole small files, the first and last 8 MB of large ones."""
    digest, edge = sha256(), 8 << 20
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            digest.update(stream.read(edge))
            if file.stat().st_size > edge:
                stream.seek(max(edge, file.stat().st_size - edge))
                digest.update(stream.read())
    return digest.hexdigest()[:16]
