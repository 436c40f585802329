"""Which weights compute: how do a student and its teachers share one model?

    the student     a LoRA on the frozen backbone, or (`--parameters full`) a transformer of its own
    LoRA experts    teachers phi_k (F Eq. 7), the anchor of MAR (F Eq. 12), the base: all on the one backbone, so that
                    a teacher costs its low-rank factors only, not a second transformer
    full experts    teachers that are whole checkpoints. They wait in (pinned) host memory, and only the one that is
                    needed now is on the accelerator (Q 4.3)

`Experts.adapter(name)` is the only way to run anything but the student, and always restores the student.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from models import hub, lora
from models.hub import Transformer

STUDENT = "student"
CHUNK = 1 << 30  # bytes of pinned memory that are asked for at once


class HostExpert:
    """A full checkpoint whose weights stay in host memory and are copied to the accelerator while they are needed.

    TRAP: torch rounds every pinned allocation up to a power of two, which makes 60 GiB of Qwen-Image's 38. So its
    tensors lie in a few chunks whose sizes are powers of two. The copy runs on the stream that computes: the memory
    that another expert has given back can be used at once, and no event is waited for.
    """

    def __init__(self, module: nn.Module, device: torch.device):
        self.module, self.device = module.requires_grad_(False), device
        self.present = device.type == "cpu"  # there is nothing to copy
        self.chunks: list[Tensor] = []  # bytes on the host
        self.places: list[tuple[Tensor, int, int]] = []  # (parameter or buffer, its chunk, where it begins)
        tensors = [] if self.present else [*module.parameters(), *module.buffers()]
        left, start, end = sum(map(_padded, tensors)), 0, 0
        for tensor in tensors:
            if start + _padded(tensor) > end:
                start, end = 0, max(_power_of_two(_padded(tensor)), min(CHUNK, _power_of_two(left // 2 + 1)))
                self.chunks.append(torch.empty(end, dtype=torch.uint8, pin_memory=device.type == "cuda"))
            self.places.append((tensor, len(self.chunks) - 1, start))
            tensor.data = _view(self.chunks[-1], start, tensor).copy_(tensor.data)
            start, left = start + _padded(tensor), left - _padded(tensor)

    def ready(self) -> nn.Module:
        """The module, on the device."""
        if not self.present:
            self._point_at([chunk.to(self.device, non_blocking=True) for chunk in self.chunks])
            self.present = True
        return self.module

    def release(self) -> None:
        """Give the accelerator's memory back. Frozen weights need no copy to the host."""
        if self.present and self.chunks:
            self._point_at(self.chunks)
            self.present = False

    def _point_at(self, chunks: Sequence[Tensor]) -> None:
        for tensor, chunk, start in self.places:
            tensor.data = _view(chunks[chunk], start, tensor)


def compile_blocks(transformer: Transformer) -> None:
    """Have torch compile each block when it first computes, once more for each kind of block, adapter and gradient."""
    torch._dynamo.config.recompile_limit = 64  # 8 would send the ninth of these back to the interpreter without a word
    for block in transformer.transformer_blocks:
        block.compile()


def _padded(tensor: Tensor) -> int:
    """Bytes of a tensor, such that the next one begins at a multiple of 64."""
    return -(-tensor.nbytes // 64) * 64


def _power_of_two(size: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << (size - 1).bit_length()


def _view(chunk: Tensor, start: int, like: Tensor) -> Tensor:
    return chunk[start : start + like.nbytes].view(like.dtype).view(like.shape)


class Experts:
    """A transformer, the student on it or beside it, and any number of frozen experts; one of them is active."""

    def __init__(self, transformer: Transformer, device: torch.device | str = "cpu"):
        self.device, self.precision = torch.device(device), "float32"
        self.kind = type(transformer)  # sharding (FSDP2) gives the module a class of its own
        self.transformer = transformer.to(self.device)  # the student's
        self.backbone = self.transformer  # carries the LoRAs; another module only if all parameters train
        self.active: nn.Module = self.transformer  # what computes the velocity
        self.selected: str | None = None  # whose it is: an expert's name, None for the base
        self.source = "a new model"  # where the weights came from, for error messages and adapter files
        self.fingerprint = ""  # hash of the base weights: an adapter remembers the base it was trained on
        self.adapters: dict[str, LoraConfig] = {}
        self.layers: list[BaseTunerLayer] = []  # the backbone's modules that carry adapters
        self.hosted: dict[str, HostExpert] = {}
        self.trains = ""  # "", "lora" or "full": what `trainable` hands to the optimizer
        self.compiled = False

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
            if self.compiled:
                compile_blocks(module)
            return
        state, config = self.read_adapter(folder)
        self.add_adapter(name, config, state)

    def check(self, folder: Path) -> None:
        """ModelError unless what is in a folder can be an expert here: by its config, or as `read_adapter`."""
        if hub.kind(folder) == "full":
            hub.transformer_config(folder, self.backbone.config)
        else:
            self.read_adapter(folder)

    def read_adapter(self, folder: Path) -> tuple[dict[str, Tensor], LoraConfig]:
        """An adapter on disk, checked against this model's backbone; see `lora.read_adapter`."""
        return lora.read_adapter(folder, dict(self.backbone.named_modules()), self.source, self.fingerprint)

    def train_fully(
        self, where: str = "", keep_base: bool = True, device: torch.device | str = "",
        shard: Callable[[nn.Module], object] | None = None,
    ) -> None:  # fmt: skip
        """Make the student a transformer of its own in float32, from a full checkpoint, or from the base and a LoRA.

        The frozen base stays as the backbone of LoRA experts and of the KL to the base, unless nobody needs it.
        device: where the model goes; so that the student is never there as a whole, load the base on the CPU. `shard`
        (FSDP2) is given one block after the other, then the whole. ValueError if an adapter is there already: the
        student would be a copy of base and adapter together.
        """
        if self.adapters:
            raise ValueError(f"train_fully must come before the adapters {sorted(self.adapters)}")
        folder = hub.locate(where) if where else None
        if folder and hub.kind(folder) == "full":
            own = hub.read_transformer(folder, torch.float32, self.backbone.config)
            if self.transformer.is_gradient_checkpointing:
                own.enable_gradient_checkpointing()
        else:
            own = copy.deepcopy(self.transformer) if keep_base else self.transformer
            if folder:  # a merged cold start: its update becomes part of the weights
                state, config = self.read_adapter(folder)
                for key in state:
                    own.get_submodule(key.rpartition(".lora_")[0]).float()
                lora.add(own, "init", config, state)
                own.fuse_lora(adapter_names=["init"])
                own.unload_lora()
        self.transformer, self.trains = own.requires_grad_(True), "full"
        self.backbone = self.backbone if keep_base else own
        self._place(torch.device(device or self.device), shard)
        if self.compiled:
            compile_blocks(own)  # a copy is not compiled
        self._use(STUDENT)

    def _place(self, device: torch.device, shard: Callable[[nn.Module], object] | None) -> None:
        """Bring a full student to the device in float32, block by block, and whatever else there is."""
        self.device, blocks = device, self.transformer.transformer_blocks
        for part in (*(child for child in self.transformer.children() if child is not blocks), *blocks):
            part.float()
            if shard and part in [*blocks]:
                shard(part)
            else:
                part.to(device)
        if shard:
            shard(self.transformer)
        self.backbone.to(device)

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
        self.selected = name
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

    def compile(self) -> None:
        """Compile the blocks of the base now, and of every transformer that comes later."""
        self.compiled = True
        compile_blocks(self.transformer)

    def keep(self, names: Iterable[str]) -> None:
        """Send all full experts but these away from the device; one that is asked for comes by itself."""
        names = set(names)
        for name, expert in self.hosted.items():
            if name not in names:
                expert.release()

    def move_frozen(self, device: torch.device | str) -> None:
        """Move what does not train of the backbone, bit for bit: it waits on the host while others need the device."""
        for tensor in (*self.backbone.parameters(), *self.backbone.buffers()):
            if not tensor.requires_grad:
                tensor.data = tensor.data.to(device)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # --------------------------------------------------------------------------------------------------- the student
    def trainable(self) -> dict[str, nn.Parameter]:
        """What the optimizer trains, by name: the student's factors, or the whole transformer."""
        return {name: p for name, p in self.transformer.named_parameters() if p.requires_grad}

    def adapter_state(self, name: str = STUDENT) -> dict[str, Tensor]:
        """A copy of one adapter's factors; see `lora.state_of`."""
        return lora.state_of(self.backbone, name)

    def save_full(self, folder: Path, state: dict[str, Tensor]) -> None:
        """Write the student's whole transformer, from its full state dict, as `transformer/` in diffusers' layout."""
        shell = hub.empty_transformer({**self.transformer.config, "_class_name": self.kind.__name__})
        shell.load_state_dict({key: value.to(self._dtype()) for key, value in state.items()}, assign=True)
        shell.save_pretrained(folder / "transformer")

    def _dtype(self) -> torch.dtype:
        return getattr(torch, self.precision)
