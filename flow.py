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
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

import adapters
import sde
from adapters import ModelError

STUDENT = "student"


class Cond(NamedTuple):
    """Text conditioning of B prompts: token embeddings (B, S, C) and one pooled vector (B, C)."""

    tokens: Tensor
    pooled: Tensor

    def rows(self, index: Tensor | slice) -> "Cond":
        return Cond(self.tokens[index], self.pooled[index])


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
    train_shift = 0.0  # training times are logit-normal around this: the model's noise schedule

    def __init__(self, transformer: SD3Transformer2DModel, device: torch.device | str = "cpu"):
        self.device, self.precision = torch.device(device), "float32"
        self.transformer = transformer.to(self.device)  # the student's
        self.backbone = self.transformer  # carries the LoRAs; another module only where all parameters train
        self.active: nn.Module = self.transformer  # what `velocity` runs
        self.source = "a new model"  # where the weights came from, for error messages and adapter files
        self.fingerprint = ""  # hash of the base weights: an adapter remembers the base it was trained on
        self.adapters: dict[str, LoraConfig] = {}
        self.visitors: dict[str, Visitor] = {}
        self.trains = ""  # "", "lora" or "full": what `trainable` hands to the optimizer

    # ------------------------------------------------------------------------------------------ the interface
    def prepare(self, prompts: Iterable[str]) -> None:
        """Encode every prompt that a run will need, where encoding is dear."""

    def velocity(self, x: Tensor, t: float | Tensor, cond: Cond, uncond: Cond | None = None, cfg: float = 1.0):
        """v_theta(x_t, t, c) (B, C, H, W), float32, with classifier-free guidance where cfg != 1.

        v = v(uncond) + cfg * (v(cond) - v(uncond)): both branches in one forward of 2B rows. t is one time for
        all or one a sample (B,). Gradients flow if they are enabled. ValueError if cfg != 1 has no `uncond`.
        """
        t = torch.as_tensor(t, dtype=torch.float32, device=x.device).expand(len(x))
        if cfg == 1.0:
            return self._forward(x, t, cond)
        if uncond is None:
            raise ValueError(f"guidance scale {cfg} needs the conditioning of the empty prompt (uncond)")
        both = Cond(torch.cat([uncond.tokens, cond.tokens]), torch.cat([uncond.pooled, cond.pooled]))
        v_uncond, v_cond = self._forward(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return v_uncond + cfg * (v_cond - v_uncond)

    def _forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        # float32 weights (LoRA, full student) and a bfloat16 backbone meet under autocast.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            v = self.active(
                hidden_states=x,
                encoder_hidden_states=cond.tokens,
                pooled_projections=cond.pooled,
                timestep=t * 1000,  # SD3 embeds t in [0, 1000]
                return_dict=False,
            )[0]
        return sde.full_precision(v)

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
            shell = SD3Transformer2DModel.from_config(self.transformer.config)
        shell.load_state_dict({key: value.to(self._dtype()) for key, value in state.items()}, assign=True)
        shell.save_pretrained(folder / "transformer")

    def _dtype(self) -> torch.dtype:
        return getattr(torch, self.precision)


def read_transformer(folder: Path, dtype: torch.dtype, like: dict | None = None) -> SD3Transformer2DModel:
    """`folder/transformer` (or `folder` itself) in diffusers' layout, frozen, on the CPU.

    ModelError names the folder if it cannot be read, or the entry in which its config differs from `like`.
    """
    folder = folder / "transformer" if (folder / "transformer").is_dir() else folder
    try:
        config = json.loads((folder / "config.json").read_text())
        wrong = [k for k in like or {} if k[0] != "_" and k != "sample_size" and k in config and config[k] != like[k]]
        if not wrong:
            # low_cpu_mem_usage stays at its default: weights go straight from the file into place
            options = {"torch_dtype": dtype, "use_safetensors": True, "output_loading_info": True}
            module, info = SD3Transformer2DModel.from_pretrained(folder, **options)
            if amiss := [*info["missing_keys"], *info["unexpected_keys"]]:  # diffusers only warns of these
                raise ValueError(f"its weights are not those that its config describes: {amiss[0]}")
            return module.requires_grad_(False).eval()
    except Exception as fault:  # JSON, safetensors, a missing file or shapes: one line instead of a stack
        raise ModelError(f"{folder}: not a readable transformer ({first_line(fault)})") from fault
    k = wrong[0]
    raise ModelError(f"{folder / 'config.json'}: another architecture: {k} is {config[k]}, the model's is {like[k]}")


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


def first_line(fault: Exception) -> str:
    return next((line for line in str(fault).splitlines() if line.strip()), type(fault).__name__)
