"""The tiny worlds' models: real diffusers transformers (SD3's, Qwen-Image's) over 24 x 24 pixels and few words.

No VAE: the latents are the pixels, in [-1, 1]. No published text encoder: `TinyTextEncoder` is trained with the base.
"""

from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch
from diffusers import QwenImageTransformer2DModel, SD3Transformer2DModel
from torch import Tensor, nn

import sde
from data.pictures import Source
from models.flow import Cond, FlowModel, check_count
from models.hub import Transformer, fingerprint, read_transformer, reading
from models.qwen import QwenFlow
from tiny import drawings, edits
from tiny.canvas import SIZE


class TinyTextEncoder(nn.Module):
    """Word and position embeddings; SD3's joint attention does the rest. Trained in `--stage pretrain` only."""

    def __init__(self, dim: int, words: int):
        super().__init__()
        self.word = nn.Embedding(words, dim)
        self.place = nn.Embedding(drawings.MAX_TOKENS, dim)

    def forward(self, tokens: Tensor) -> Cond:
        embedded = self.word(tokens) + self.place.weight  # (B, S, C)
        return Cond(embedded, embedded.mean(1))


class TinyModel(FlowModel):
    """The tiny world's model: pixels instead of latents, words instead of text encoders."""

    train_shift = 0.4  # in so small an image content is decided early: train more at high noise than SD3 does
    latent_shape = (3, SIZE, SIZE)
    tokenize = staticmethod(drawings.tokenize)

    def __init__(self, transformer: Transformer, text_encoder: nn.Module, device: torch.device | str = "cpu"):
        super().__init__(transformer, device)
        self.text_encoder = text_encoder.to(self.device)

    def encode(self, prompts: Sequence[str], images: Sequence[Sequence[Source]] | None = None) -> Cond:
        """Prompts -> Cond, without gradient; ValueError if a prompt lies outside the vocabulary."""
        check_count(max(map(len, images or [()])), self.most_sources, self.source)
        shown = [picture.pixels() for pictures in images or () for picture in pictures]
        with torch.no_grad():
            return self.encode_tokens(torch.tensor([self.tokenize(p) for p in prompts]), shown)

    def encode_tokens(self, tokens: Tensor, images: Sequence[Tensor] | None = None) -> Cond:
        """Token ids (B, S), and a source picture of each edit, -> Cond with gradient: pretraining learns by it."""
        return self.text_encoder(tokens.to(self.device))

    def decode(self, x: Tensor) -> Tensor:
        """Latents -> images (B, 3, H, W) in [0, 1] on the CPU. The model works on pixels in [-1, 1]: no VAE."""
        return (x.float() / 2 + 0.5).clamp(0, 1).cpu()

    def latents(self, images: Tensor) -> Tensor:
        """The inverse of `decode` for images in [0, 1]: what pretraining (F Eq. 1, Q Eq. 2) works on."""
        return (images * 2 - 1).to(self.device)

    def time_grid(self, num_steps: int) -> Tensor:
        return sde.time_grid(num_steps)

    def trainable(self) -> dict[str, nn.Parameter]:
        """As any model's; before there is a student, everything, the text encoder included (pretraining)."""
        if self.trains:
            return super().trainable()
        whole = [("transformer", self.transformer), ("text_encoder", self.text_encoder)]
        return {f"{part}.{name}": p for part, module in whole for name, p in module.named_parameters()}

    def _place(self, device: torch.device, shard=None) -> None:
        super()._place(device, shard)
        self.text_encoder.to(device)

    def save_full(self, folder: Path, state: dict[str, Tensor]) -> None:
        super().save_full(folder, state)
        (folder / "text_encoder").mkdir(parents=True, exist_ok=True)
        words = {key: value.detach().cpu().contiguous() for key, value in self.text_encoder.state_dict().items()}
        safetensors.torch.save_file(words, folder / "text_encoder" / "model.safetensors")


class TinyQwenModel(QwenFlow, TinyModel):
    """The tiny-qwen world's: Qwen-Image's transformer in place of SD3's, and a second task, editing.

    That of 2.1 follows its prompts less for the same CPU seconds (docs/RESULTS.md).
    """

    tokenize = staticmethod(edits.tokenize)
    most_sources = 1

    def encode_tokens(self, tokens: Tensor, images: Sequence[Tensor] | None = None) -> Cond:
        cond = self.text_encoder(tokens.to(self.device))
        sources = (self.latents(torch.stack(list(images))),) if images else ()
        return Cond(cond.tokens, None, (tokens > 0).to(self.device), sources)


def new_tiny(
    seed: int, width: int = 96, layers: int = 3, device: torch.device | str = "cpu", qwen: bool = False
) -> TinyModel:
    """A freshly initialised tiny model: 0.98 M parameters at the default size; Qwen-Image's architecture: 1.04 M."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if qwen:
            transformer = QwenImageTransformer2DModel(
                patch_size=4, in_channels=48, out_channels=3, num_layers=layers, attention_head_dim=32,
                num_attention_heads=width // 32, joint_attention_dim=width, axes_dims_rope=(8, 12, 12),
            )  # fmt: skip
            return TinyQwenModel(transformer, TinyTextEncoder(width, len(edits.VOCABULARY)), device)
        transformer = SD3Transformer2DModel(
            sample_size=SIZE, patch_size=4, in_channels=3, out_channels=3, num_layers=layers,
            attention_head_dim=32, num_attention_heads=width // 32, joint_attention_dim=width,
            caption_projection_dim=width, pooled_projection_dim=width, pos_embed_max_size=SIZE // 4,
        )  # fmt: skip
        return TinyModel(transformer, TinyTextEncoder(width, len(drawings.VOCABULARY)), device)


def load_tiny(folder: Path, device: torch.device | str = "cpu") -> TinyModel:
    """Read a base checkpoint of `--stage pretrain`, frozen; ModelError names what is not readable."""
    words = folder / "text_encoder" / "model.safetensors"
    transformer = read_transformer(folder, torch.float32)
    qwen = isinstance(transformer, QwenImageTransformer2DModel)
    vocabulary = edits.VOCABULARY if qwen else drawings.VOCABULARY
    with reading(words, "a tiny world's words"):
        text_encoder = TinyTextEncoder(transformer.config.joint_attention_dim, len(vocabulary))
        text_encoder.load_state_dict(safetensors.torch.load_file(words))
    model = (TinyQwenModel if qwen else TinyModel)(transformer, text_encoder.requires_grad_(False), device)
    model.source, model.fingerprint = str(folder), fingerprint(folder / "transformer")
    return model
