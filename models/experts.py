"""Which weights compute: how do a student and its teachers share one model?

    the student     a LoRA on the frozen backbone, or (`--parameters full`) a transformer of its own
    LoRA experts    teachers phi_k (F Eq. 7), the anchor of MAR (F Eq. 12), the base: all on the one backbone, so that
                    a teacher costs its low-rank factors only, not a second transformer
    full experts    teachers that are whole checkpoints. They wait in (pinned) host memory, and only the one that is
                    needed now, and the next one while it is being copied, are on the accelerator (Q 4.3)

`Experts.adapter(name)` is the only way to run anything but the student, and always restores the student.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from models import hub, lora
from models.hub import Transformer

STUDENT = "student"


class HostExpert:
    """A full checkpoint whose weights stay in host memory and are copied to the accelerator while they are needed."""

    def __init__(self, module: nn.Module, device: torch.device):
        self.module, self.device = module.requires_grad_(False), device
        tensors = [*module.parameters(), *module.buffers()]
        cuda = device.type == "cuda"
        self.pairs = [(tensor, tensor.data.pin_memory() if cuda else tensor.data) for tensor in tensors]
        for tensor, host in self.pairs:
            tensor.data = host  # pinned; the pageable original is let go
        self.stream = torch.cuda.Stream(device) if cuda else None
        self.present = device.type == "cpu"  # on the CPU there is nothing to copy
        self.arrival = None

    def fetch(self) -> None:
        """Begin the copy to the device, beside whatever is being computed there."""
        if self.present:
            return
        with torch.cuda.stream(self.stream):  # a stream of None changes nothing
            for tensor, host in self.pairs:
                tensor.data = host.to(self.device, non_blocking=True)
        self.arrival = self.stream.record_event() if self.stream else None
        self.present = True

    def ready(self) -> nn.Module:
        """The module, on the device. What is computed next waits for the copy, the host does not."""
        self.fetch()
        if self.arrival:
            now = torch.cuda.current_stream(self.device)
            now.wait_event(self.arrival)
            for tensor, _ in self.pairs:
                tensor.data.record_stream(now)  # not to be reused before what is queued now has read it
            self.arrival = None
        return self.module

    def release(self) -> None:
        """Give the accelerator's memory back. Frozen weights need no copy to the host."""
        if self.present and self.device.type != "cpu":
            for tensor, host in self.pairs:
                tensor.data = host
            self.present = False


class Experts:
    """A transformer, the student on it or beside it, and any number of frozen experts; one of them is active."""

    def __init__(self, transformer: Transformer, device: torch.device | str = "cpu"):
        self.device, self.precision = torch.device(device), "float32"
        self.kind = type(transformer)  # sharding (FSDP2) gives the module a class of its own
        self.transformer = transformer.to(self.device)  # the student's
        self.backbone = self.transformer  # carries the LoRAs; another module only if all parameters train
        self.active: nn.Module = self.transformer  # what computes the velocity
        self.source = "a new model"  # where the weights came from, for error messages and adapter files
        self.fingerprint = ""  # hash of the base weights: an adapter remembers the base it was trained on
        self.adapters: dict[str, LoraConfig] = {}
        self.layers: list[BaseTunerLayer] = []  # the backbone's modules that carry adapters
        self.hosted: dict[str, HostExpert] = {}
        self.trains = ""  # "", "lora" or "full": what `trainable` hands to the optimizer

    # ------------------------------------------------------------------------------------------------- who is there
    def add_adapter(self, name: str, config: LoraConfig, state: dict[str, Tensor] | None = None) -> None:
        """Put one LoRA on the backbone, from `state` or new; see `lora.add`."""
        lora.add(self.backbone, name, config, state)
        self.adapters[name] = config
        self.layers = [layer for layer in self.backbone.modules() if isinstance(layer, BaseTunerLayer)]
        for layer in self.layers:  # once and for all: who is selected changes nothing about who trains
            for key, parameter in layer.named_parameters():
                parameter.requires_grad_(f".{STUDENT}." in key)
        if name == STUDENT:
            self.trains = "lora"
        self._use(STUDENT)

    def add_expert(self, name: str, where: str) -> None:
        """Add a frozen expert from a Hub id, folder or run: a LoRA, or a full checkpoint of the same architecture."""
        folder = hub.locate(where)
        if hub.kind(folder) == "full":
            module = hub.read_transformer(folder, self._dtype(), self.backbone.config)
            self.hosted[name] = HostExpert(module, self.device)
            return
        state, config = self.read_adapter(folder)
        self.add_adapter(name, config, state)

    def read_adapter(self, folder: Path) -> tuple[dict[str, Tensor], LoraConfig]:
        """An adapter on disk, checked against this model's backbone; see `lora.read_adapter`."""
        return lora.read_adapter(folder, dict(self.backbone.named_modules()), self.source, self.fingerprint)

    def train_fully(self, where: str = "", keep_base: bool = True) -> None:
        """Make the student a transformer of its own in float32, from a full checkpoint, or from the base and a LoRA.

        The frozen base stays as the backbone of LoRA experts and of the KL to the base, unless nobody needs it.
        ValueError if an adapter is there already: the student would be a copy of base and adapter together.
        """
        if self.adapters:
            raise ValueError(f"train_fully must come before the adapters {sorted(self.adapters)}")
        folder = hub.locate(where) if where else None
        if folder and hub.kind(folder) == "full":
            own = hub.read_transformer(folder, torch.float32, self.backbone.config).to(self.device)
            if self.transformer.is_gradient_checkpointing:
                own.enable_gradient_checkpointing()
        else:
            own = copy.deepcopy(self.transformer).float() if keep_base else self.transformer.float()
            if folder:  # a merged cold start: its update becomes part of the weights
                state, config = self.read_adapter(folder)
                lora.add(own, "init", config, state)
                own.fuse_lora(adapter_names=["init"])
                own.unload_lora()
        self.transformer, self.trains = own.requires_grad_(True), "full"
        self.backbone = self.backbone if keep_base else own
        self._use(STUDENT)

    # ------------------------------------------------------------------------------------------------ who computes
    @contextmanager
    def adapter(self, name: str | None) -> Iterator[None]:
        """Run the body as expert `name` (None: the base), then restore the student, whatever happens.

        TRAP: PEFT's own `set_adapter` moves `requires_grad` to what it selects. If a teacher is still selected when
        the student's loss runs backward, the student's gradients are silently None. Hence `_use`, which leaves
        `requires_grad` alone, a context that always comes back (a checkpointed backward runs the forward once more),
        and a body without gradients. KeyError for an unknown name.
        """
        if name is not None and name not in self.adapters and name not in self.hosted:
            raise KeyError(f"no adapter {name!r}; there are {sorted([*self.adapters, *self.hosted])}")
        try:
            self._use(name)
            with torch.no_grad():
                yield
        finally:
            self._use(STUDENT)

    def _use(self, name: str | None) -> None:
        if name in self.hosted:
            self.active = self.hosted[name].ready()
        elif name == STUDENT and self.trains == "full":
            self.active = self.transformer
        else:
            self.active = self.backbone
            # PEFT's `set_adapter` and `enable_adapters` walk every parameter: 80 ms a switch on SD3.5-M, this is 1 ms.
            for layer in self.layers:
                layer._disable_adapters = name not in self.adapters
                if name in self.adapters:
                    layer._active_adapter = name

    def keep(self, names: Iterable[str]) -> None:
        """Have these full experts on the device, or on their way to it, and no others."""
        names = set(names)
        for name, expert in self.hosted.items():
            if name not in names:
                expert.release()
        for name in names & set(self.hosted):
            self.hosted[name].fetch()

    # --------------------------------------------------------------------------------------------------- the student
    def trainable(self) -> dict[str, nn.Parameter]:
        """What the optimizer trains, by name: the student's factors, or the whole transformer."""
        return {name: p for name, p in self.transformer.named_parameters() if p.requires_grad}

    def adapter_state(self, name: str = STUDENT) -> dict[str, Tensor]:
        """A copy of one adapter's factors; see `lora.state_of`."""
        return lora.state_of(self.backbone, name)

    def save_full(self, folder: Path, state: dict[str, Tensor]) -> None:
        """Write the student's whole transformer, from its full state dict, as `transformer/` in diffusers' layout."""
        with torch.device("meta"):
            shell = self.kind.from_config(self.transformer.config)
        shell.load_state_dict({key: value.to(self._dtype()) for key, value in state.items()}, assign=True)
        shell.save_pretrained(folder / "transformer")

    def _dtype(self) -> torch.dtype:
        return getattr(torch, self.precision)
