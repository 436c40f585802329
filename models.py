"""What differs between the models, behind one small interface?

The stages ask a model six things and nothing else:

    encode(prompts) -> Cond            text -> conditioning, no gradient
    velocity(x, t, cond, uncond, cfg)  v_theta(x_t, t, c); the only place where guidance is written
    decode(x) -> images in [0, 1]      latents -> pixels
    time_grid(num_steps)               the model's own scheduler grid, t = 1 (noise) ... 0 (data)
    latent_shape                       (C, H, W) of x
    adapter(name)                      run as one of the LoRA adapters, or as the base

One frozen backbone carries every LoRA: the student that trains, each teacher phi_k (F Eq. 7) and the anchor of
MAR (F Eq. 12). A teacher therefore costs its low-rank factors only, not a second transformer.

This file holds the tiny model (a real diffusers `SD3Transformer2DModel` over 24 x 24 pixels, with a word-level
text embedding of its own), and adapters in PEFT's file layout.
"""

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor, nn

import sde
import tiny

STUDENT = "student"
# Every attention projection of both streams of SD3's joint blocks, as Flow-GRPO publishes its LoRAs.
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
PREFIX = "base_model.model."  # what PEFT puts before every module name in its files


class ModelError(ValueError):
    """A checkpoint or adapter that cannot be used; the message is one line that names the file and the fault."""


class Cond(NamedTuple):
    """Text conditioning of B prompts: token embeddings (B, S, C) and one pooled vector (B, C)."""

    tokens: Tensor
    pooled: Tensor

    def rows(self, index: Tensor | slice) -> "Cond":
        return Cond(self.tokens[index], self.pooled[index])


class TinyTextEncoder(nn.Module):
    """Word and position embeddings; SD3's joint attention does the rest. Trained in `--stage pretrain` only."""

    def __init__(self, dim: int):
        super().__init__()
        self.word = nn.Embedding(len(tiny.VOCABULARY), dim)
        self.place = nn.Embedding(tiny.MAX_TOKENS, dim)

    def forward(self, tokens: Tensor) -> Cond:
        embedded = self.word(tokens) + self.place.weight  # (B, S, C)
        return Cond(embedded, embedded.mean(1))


class FlowModel:
    """A flow-matching transformer with its text encoder and any number of LoRA adapters on one backbone."""

    def __init__(self, transformer: SD3Transformer2DModel, text_encoder: nn.Module, shift: float = 1.0):
        self.transformer, self.text_encoder, self.shift = transformer, text_encoder, shift
        config = transformer.config
        self.latent_shape = (config.in_channels, config.sample_size, config.sample_size)
        self.source = "a new model"  # where the weights came from, for error messages and adapter files
        self.fingerprint = ""  # hash of the base weights: an adapter remembers the base it was trained on
        self.adapters: dict[str, LoraConfig] = {}

    # ------------------------------------------------------------------------------------------ the interface
    def encode(self, prompts: Sequence[str]) -> Cond:
        """Prompts -> Cond, without gradient; ValueError where a prompt lies outside the vocabulary."""
        with torch.no_grad():
            return self.encode_tokens(torch.tensor([tiny.tokenize(p) for p in prompts]))

    def encode_tokens(self, tokens: Tensor) -> Cond:
        """Token ids (B, S) -> Cond with gradient: pretraining learns the embeddings through it."""
        return self.text_encoder(tokens)

    def velocity(self, x: Tensor, t: float | Tensor, cond: Cond, uncond: Cond | None = None, cfg: float = 1.0):
        """v_theta(x_t, t, c) (B, C, H, W), with classifier-free guidance where cfg != 1.

        v = v(uncond) + cfg * (v(cond) - v(uncond)): both branches in one forward of 2B rows. t is one time for
        all or one a sample (B,). Gradients flow if they are enabled. ValueError if cfg != 1 has no `uncond`.
        """
        t = torch.as_tensor(t, dtype=torch.float32).expand(len(x))
        if cfg == 1.0:
            return self._forward(x, t, cond)
        if uncond is None:
            raise ValueError(f"guidance scale {cfg} needs the conditioning of the empty prompt (uncond)")
        both = Cond(torch.cat([uncond.tokens, cond.tokens]), torch.cat([uncond.pooled, cond.pooled]))
        v_uncond, v_cond = self._forward(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return v_uncond + cfg * (v_cond - v_uncond)

    def _forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.transformer(
            hidden_states=x,
            encoder_hidden_states=cond.tokens,
            pooled_projections=cond.pooled,
            timestep=t * 1000,  # SD3 embeds t in [0, 1000]
            return_dict=False,
        )[0]

    def decode(self, x: Tensor) -> Tensor:
        """Latents -> images (B, 3, H, W) in [0, 1]. The tiny model works on pixels in [-1, 1]: no VAE."""
        return (x.float() / 2 + 0.5).clamp(0, 1)

    @staticmethod
    def latents(images: Tensor) -> Tensor:
        """The inverse of `decode` for images in [0, 1]: what flow matching (F Eq. 1, Q Eq. 2) trains on."""
        return images * 2 - 1

    def time_grid(self, num_steps: int) -> Tensor:
        return sde.time_grid(num_steps, self.shift)

    # ------------------------------------------------------------------------------------------------ adapters
    def add_adapter(self, name: str, config: LoraConfig, state: dict[str, Tensor] | None = None) -> None:
        """Put one LoRA on the backbone, from `state` or new (A gaussian, B zero: it begins as the base)."""
        with warnings.catch_warnings():  # several adapters on one backbone are the point, not an oversight
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            self.transformer.add_adapter(config, adapter_name=name)
        if state is not None:
            result = set_peft_model_state_dict(self.transformer, state, adapter_name=name)
            if result.unexpected_keys:
                raise ModelError(f"adapter {name}: the model has no place for {result.unexpected_keys[0]}")
            missing = [key for key in result.missing_keys if f".{name}." in key]
            if missing:
                raise ModelError(f"adapter {name}: there is no value for {missing[0]}")
        self.adapters[name] = config
        self._select(STUDENT if STUDENT in self.adapters else name)

    @contextmanager
    def adapter(self, name: str | None) -> Iterator[None]:
        """Run the body as adapter `name` (None: the base), then restore the student, whatever happens.

        TRAP: PEFT's `set_adapter` also moves `requires_grad`. A teacher that is still selected when the
        student's loss runs backward leaves the student's gradients None, silently; hence a context
        that always comes back, and a body without gradients: nothing but the student ever trains.
        """
        if name is not None and name not in self.adapters:
            raise KeyError(f"no adapter {name!r}; there are {sorted(self.adapters)}")
        try:
            self._select(name)
            with torch.no_grad():
                yield
        finally:
            self._select(STUDENT if STUDENT in self.adapters else None)

    def _select(self, name: str | None) -> None:
        if not self.adapters:
            return
        if name is None:
            self.transformer.disable_adapters()
            return
        self.transformer.enable_adapters()
        self.transformer.set_adapter(name)
        for key, parameter in self.transformer.named_parameters():
            parameter.requires_grad_(f".{STUDENT}." in key)

    def adapter_state(self, name: str = STUDENT) -> dict[str, Tensor]:
        """The LoRA factors of one adapter, {module.lora_A.weight: (r, in), module.lora_B.weight: (out, r)}."""
        # PEFT's default for embedding layers, "auto", asks the hub about the base at every checkpoint.
        state = get_peft_model_state_dict(self.transformer, adapter_name=name, save_embedding_layers=False)
        return {key: value.detach().clone().contiguous() for key, value in state.items()}

    def trainable(self) -> list[nn.Parameter]:
        """What the optimizer trains: the student's factors, or everything where there is no student yet."""
        if STUDENT in self.adapters:
            return [p for p in self.transformer.parameters() if p.requires_grad]
        return [*self.transformer.parameters(), *self.text_encoder.parameters()]


# ------------------------------------------------------------------------------------------- the tiny model's files
def new_tiny(seed: int, width: int = 96, layers: int = 3) -> FlowModel:
    """A freshly initialised tiny model: 0.98 M parameters at the default size."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = SD3Transformer2DModel(
            sample_size=tiny.SIZE, patch_size=4, in_channels=3, out_channels=3, num_layers=layers,
            attention_head_dim=32, num_attention_heads=width // 32, joint_attention_dim=width,
            caption_projection_dim=width, pooled_projection_dim=width, pos_embed_max_size=tiny.SIZE // 4,
        )  # fmt: skip
        return FlowModel(transformer, TinyTextEncoder(width))


def save_tiny(model: FlowModel, folder: Path) -> None:
    """Write the base checkpoint: `transformer/` in diffusers' layout, `text_encoder/model.safetensors`."""
    model.transformer.save_pretrained(folder / "transformer")
    (folder / "text_encoder").mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(model.text_encoder.state_dict(), folder / "text_encoder" / "model.safetensors")


def load_tiny(folder: Path) -> FlowModel:
    """Read a base checkpoint of `save_tiny`, frozen; ModelError names the file that is missing or unreadable."""
    folder = Path(folder)
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    words = folder / "text_encoder" / "model.safetensors"
    for file in (folder / "transformer" / "config.json", weights, words):
        if not file.is_file():
            raise ModelError(f"{file}: missing; is {folder} a base checkpoint? `--stage pretrain` writes one")
    try:
        file = folder / "transformer" / "config.json"
        transformer = SD3Transformer2DModel.from_config(json.loads(file.read_text()))
        file = weights
        transformer.load_state_dict(safetensors.torch.load_file(file))
        file = words
        text_encoder = TinyTextEncoder(transformer.config.joint_attention_dim)
        text_encoder.load_state_dict(safetensors.torch.load_file(file))
    except Exception as fault:  # safetensors, JSON and shape errors alike: one line instead of a stack
        reason = f"{file.relative_to(folder)}: {str(fault).splitlines()[0]}"
        raise ModelError(f"{folder}: not a readable base checkpoint ({reason})") from fault
    model = FlowModel(transformer, text_encoder)
    model.source, model.fingerprint = str(folder), sha256(weights.read_bytes()).hexdigest()[:16]
    transformer.requires_grad_(False)
    text_encoder.requires_grad_(False)
    return model


# ------------------------------------------------------------------------------------------- adapters on disk
def lora_config(rank: int, alpha: float, targets: Sequence[str] = TARGETS) -> LoraConfig:
    """Flow-GRPO's LoRA: gaussian A, zero B, update (alpha / rank) * B @ A on every attention projection."""
    return LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=list(targets))


def save_adapter(folder: Path, state: dict[str, Tensor], config: LoraConfig, model: FlowModel) -> None:
    """Write one adapter in PEFT's layout: adapter_config.json and adapter_model.safetensors.

    The file's metadata carries the fingerprint of the base it belongs to, so that `load_adapter` can refuse it on
    another one: the shapes of two bases of one architecture agree, and only the pictures would tell.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config.base_model_name_or_path = Path(model.source).name
    config.save_pretrained(folder)
    tensors = {PREFIX + key: value.contiguous() for key, value in state.items()}
    metadata = {"format": "pt", "base": model.fingerprint}
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors", metadata=metadata)


def load_adapter(folder: Path, model: FlowModel) -> tuple[dict[str, Tensor], LoraConfig]:
    """Read an adapter in PEFT's layout and check it against the model: (state, config).

    Raises ModelError, one line naming the file, for a missing or unreadable file, an adapter trained on another
    base, a module the model lacks, or factors whose shapes do not fit.
    """
    folder = Path(folder)
    weights = folder / "adapter_model.safetensors"
    for file in (folder / "adapter_config.json", weights):
        if not file.is_file():
            raise ModelError(f"{file}: missing; an adapter is a folder in PEFT's layout")
    try:
        config = LoraConfig.from_pretrained(folder)
        with safe_open(weights, "pt") as file:
            base = (file.metadata() or {}).get("base", "")
            state = {key.removeprefix(PREFIX): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except Exception as fault:
        raise ModelError(f"{weights}: not a readable adapter ({str(fault).splitlines()[0]})") from fault
    if base and model.fingerprint and base != model.fingerprint:
        raise ModelError(f"{weights}: trained on another base ({base}) than {model.source} ({model.fingerprint})")
    modules = dict(model.transformer.named_modules())
    for key, value in state.items():
        name, _, factor = key.removesuffix(".weight").rpartition(".")
        layer = modules.get(name)
        if not hasattr(layer, "in_features"):
            raise ModelError(f"{weights}: adapts {name}, which {model.source} does not have")
        wide = (config.r, layer.in_features) if factor == "lora_A" else (layer.out_features, config.r)
        if tuple(value.shape) != wide:
            raise ModelError(f"{weights}: {key} is {tuple(value.shape)}, and {model.source} needs {wide}")
    return state, config
