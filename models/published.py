"""What SD3.5 and Qwen-Image have in common: text encoders that are used once, a VAE that is read when it is needed.

A subclass says how one prompt is encoded (`read_encoders`, `encode_row`), how many tokens it has (`length`), and how
latents become pixels (`pixels`).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from tqdm import tqdm

from data.pictures import Source
from models.flow import Cond, FlowModel, check_count, joined
from models.hub import Transformer, read_part


class Published(FlowModel):
    """A model in the Hub's layout. The transformer is there from the start, all else is read from `folder`."""

    vae_kind = AutoencoderKL
    latent_side = 8  # pixels a side of one latent

    def __init__(self, folder: Path, transformer: Transformer, scheduler, device, size: tuple[int, int],
                 text_length: int):  # fmt: skip
        super().__init__(transformer, device)
        self.folder, self.scheduler, self.text_length = folder, scheduler, text_length
        shape = size[1] // self.latent_side, size[0] // self.latent_side
        self.latent_shape = (transformer.config.out_channels, *shape)
        self.known: dict[tuple[str, ...], Cond] = {}  # (prompt, *its pictures' places) -> one row, on the host
        self.cut: set[str] = set()  # prompts of which the encoder has not read the end
        self._vae: nn.Module | None = None

    def prepare(self, prompts: Sequence[str], images: Sequence[Sequence[Source]] | None = None) -> set[str]:
        """Encode each distinct prompt (of an edit, with its pictures) not known yet; then the text encoders may go.

        One prompt at a time: a row computed in another batch differs in its last bits, and a resumed run, which
        has fewer prompts left to encode, would not be the same run. ModelError for more pictures than the model takes.
        """
        before = set(self.cut)
        self._rows(prompts, images)
        return self.cut - before

    def encode(self, prompts: Sequence[str], images: Sequence[Sequence[Source]] | None = None) -> Cond:
        """Prompts, and the source pictures of edits, -> Cond on the device; what `prepare` has not seen, now."""
        return joined(self._rows(prompts, images)).to(self.device)

    def _rows(self, prompts: Sequence[str], images: Sequence[Sequence[Source]] | None) -> list[Cond]:
        pairs = list(zip(prompts, images or [()] * len(prompts), strict=True))
        keys = [(prompt, *(picture.where for picture in pictures)) for prompt, pictures in pairs]
        new = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in self.known}
        if new:
            self.move_frozen("cpu")  # the text encoders may be as large as the transformer
            self._encode(new)
            self.move_frozen(self.device)
        return [self.known[key] for key in keys]

    @torch.no_grad()
    def _encode(self, new: Mapping[tuple[str, ...], tuple[str, Sequence[Source]]]) -> None:
        for _, pictures in new.values():
            check_count(len(pictures), self.most_sources, self.source)
        encoders = self.read_encoders()
        for key, (prompt, pictures) in tqdm(new.items(), desc="encoding prompts", leave=False, delay=1):
            if self.length(encoders, prompt, len(pictures)) > self.text_length:
                self.cut.add(prompt)
            self.known[key] = self.encode_row(encoders, prompt, pictures).to("cpu")

    def vae(self) -> nn.Module:
        if self._vae is None:
            self._vae = read_part(self.vae_kind, self.folder / "vae", torch.float32).to(self.device)
        return self._vae

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Latents -> images (B, 3, H, W) in [0, 1] on the CPU, through the VAE in float32 (bfloat16 shows bands)."""
        # One at a time: its memory, not its speed, is what matters here.
        rows = (self.pixels(row.to(self.device)) for row in x.float().split(1))
        return torch.cat([(row / 2 + 0.5).clamp(0, 1).cpu() for row in rows])
