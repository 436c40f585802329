"""What is different in Qwen-Image and Qwen-Image-Edit?

    packed latents     the transformer reads p x p patches of the latent as tokens of p^2 C channels: `pack`, `unpack`.
                       All the rest of the project sees (B, C, H, W).
    a masked text      prompts of unequal length are padded, and a mask says where (`Cond.mask`)
    source pictures    an edit's sources become more tokens behind those of the picture that is being made
                       (`Cond.sources`); the velocity of the first ones alone counts. Each is read twice: by the VAE,
                       which keeps every pixel, and by the text encoder, a Qwen2.5-VL, which says what is in it.
    time in [0, 1]     SD3 embeds [0, 1000]
    rescaled guidance  the guided velocity keeps the length of the one with the prompt: `QwenFlow.guide`
    a grid by size     the scheduler's shift grows with the number of tokens: `shift_of`

`QwenFlow` is what the tiny-qwen world's model (tiny.py) shares with `QwenModel`, the published pipelines.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage
from PIL import Image
from torch import Tensor, nn

from data.pictures import Source, to_picture
from models import qwen_vl
from models.flow import Cond, FlowModel
from models.hub import ModelError, Transformer
from models.published import Published

DRAWS = "QwenImagePipeline"


class Editor(NamedTuple):
    """How a pipeline's text encoder is shown the pictures of an edit."""

    before: str  # what stands before the prompt for each of them, {} is its number; "": the template has its place
    side: int  # the encoder sees a source in its own shape, with as many pixels as a square of this side
    most: float  # how many there may be. Qwen-Image-Edit-2509 was trained with up to three


EDITS = {
    "QwenImageEditPipeline": Editor("", 1024, 1),
    "QwenImageEditPlusPipeline": Editor("Picture {}: <|vision_start|><|image_pad|><|vision_end|>", 384, math.inf),
}
PIPELINES = (DRAWS, *EDITS)


def picture_tokens(pipeline: str) -> int:
    """Tokens of an edit's square picture in its text, of 28 x 28 pixels: 1,369 of Qwen-Image-Edit, 196 of -2509."""
    return round(EDITS[pipeline].side / 28) ** 2


def pack(x: Tensor, p: int) -> Tensor:
    """Latents (B, C, H, W) -> tokens (B, HW/p^2, C p^2): row by row, channels before the place within a patch."""
    rows, channels, height, width = x.shape
    x = x.reshape(rows, channels, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(rows, (height // p) * (width // p), channels * p * p)


def unpack(tokens: Tensor, p: int, height: int, width: int) -> Tensor:
    """The inverse of `pack`, back to (B, C, height, width)."""
    rows, _, channels = tokens.shape
    x = tokens.reshape(rows, height // p, width // p, channels // p**2, p, p).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(rows, channels // p**2, height, width)


def shift_of(config: Mapping, tokens: int) -> float:
    """mu of a picture of that many tokens: linear between a small and a large picture's shift, and on beyond them.

    exp(mu) takes the place of SD3's 3: t -> exp(mu) t / (1 + (exp(mu) - 1) t). The larger a picture, the more noise it
    takes to hide it.
    """
    small, large = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return low + (tokens - small) * (high - low) / (large - small)


def fitted(ratio: float, area: int) -> tuple[int, int]:
    """(width, height) of about this ratio and about this many pixels, multiples of 32, as diffusers rounds them."""
    width = math.sqrt(area * ratio)
    return max(32, round(width / 32) * 32), max(32, round(width / ratio / 32) * 32)


def resized(image: Tensor, area: int) -> Image.Image:
    """A picture (3, H, W) in [0, 1] in its own shape, with about `area` pixels of 8 bits, as diffusers resizes it."""
    size = fitted(image.shape[2] / image.shape[1], area)
    return to_picture(image).resize(size, Image.Resampling.LANCZOS)


class QwenFlow(FlowModel):
    """A Qwen-Image transformer: what the tiny one and the published ones share.

    TRAP: the frequencies of `pos_embed` are plain attributes, since a buffer would lose its imaginary part in a change
    of type. A state dict lacks them, and a transformer that is made on the "meta" device, to be filled later, has none.
    """

    rescale = False  # --cfg-rescale

    def _run(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        p, (height, width) = self.transformer.config.patch_size, x.shape[2:]
        tokens = pack(x, p)
        shapes, count = [(1, height // p, width // p)], tokens.shape[1]
        shapes += [(1, source.shape[2] // p, source.shape[3] // p) for source in cond.sources]
        tokens = torch.cat([tokens, *(pack(source, p) for source in cond.sources)], 1)
        v = self.active(
            hidden_states=tokens,
            encoder_hidden_states=cond.tokens,
            encoder_hidden_states_mask=cond.mask,
            # TRAP: in bfloat16 0.9 is 0.8984, and the embedding's highest frequency is 1000. The stock pipeline rounds
            # 1000 t, divides, and rounds again; another order gives another time in 9 of 40 steps.
            timestep=(1000 * t).to(self._dtype()) / 1000,
            img_shapes=[shapes] * len(x),
            return_dict=False,
        )[0]
        return unpack(v[:, :count], p, height, width)

    def guide(self, v_uncond: Tensor, v_cond: Tensor, cfg: float) -> Tensor:
        """Guidance; with `rescale` every token of it is as long as v_cond's, as in the stock pipeline.

        Velocity matching (Q Eq. 14) with a guided teacher then has a target of the length of the velocity with the
        prompt: guidance changes the direction alone. The target is no longer affine in the two branches, so it is not
        the velocity of any tilted density. It is still a function of (x, t, c), which a student can learn.
        """
        v = super().guide(v_uncond, v_cond, cfg)
        if not self.rescale:
            return v
        p, (height, width) = self.transformer.config.patch_size, v.shape[2:]
        tokens, length = pack(v, p), pack(v_cond, p).norm(dim=-1, keepdim=True)
        return unpack(tokens * (length / tokens.norm(dim=-1, keepdim=True).clamp_min(1e-12)), p, height, width)

    def trainable(self) -> dict[str, nn.Parameter]:
        """As any model's, without what the last block does to the text after its attention, which nothing reads.

        TRAP: such parameters never get a gradient, and DDP would wait for one.
        """
        last = f"transformer_blocks.{self.transformer.config.num_layers - 1}."
        unread = tuple(last + part for part in ("attn.to_add_out.", "txt_mlp."))
        return {name: p for name, p in super().trainable().items() if not any(part in name for part in unread)}


class QwenPublished(Published):
    """What the published Qwen-Images have in common: normalised latents of a video's VAE, and a grid by size."""

    empty = " "  # what the published pipelines are guided away from
    sigmas: Sequence[float] | None = None  # the author's own sampling times, if the pipeline has any

    def __init__(self, folder: Path, transformer: Transformer, scheduler, device,
                 size: tuple[int, int], source_side: int, text_length: int):  # fmt: skip
        super().__init__(folder, transformer, scheduler, device, size, text_length)
        self.source_area = source_side**2 or size[0] * size[1]
        side = self.latent_side * transformer.config.patch_size  # pixels of a token's
        self.train_shift = shift_of(scheduler.config, size[0] * size[1] // side**2)
        self.sources: dict[str, Tensor] = {}  # picture's place -> its latents (1, C, h, w), on the host

    @torch.no_grad()
    def encode_picture(self, picture: Image.Image) -> Tensor:
        """A picture of 8 bits -> its normalised latents (1, C, h, w)."""
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1
        mean, std = self._scale()
        frame = pixels[None, :, None].to(self.device)  # the VAE is a video's: a picture is one frame
        z = self.vae().encode(frame, return_dict=False)[0].mode()  # no sample: the same picture, the same tokens
        return (z[:, :, 0] - mean) / std

    def pixels(self, latents: Tensor) -> Tensor:
        mean, std = self._scale()
        return self.vae().decode((latents * std + mean)[:, :, None], return_dict=False)[0][:, :, 0]

    def _scale(self) -> tuple[Tensor, Tensor]:
        config = self.vae().config
        mean, std = (torch.tensor(row, device=self.device) for row in (config.latents_mean, config.latents_std))
        return mean[:, None, None], std[:, None, None]

    def time_grid(self, num_steps: int) -> Tensor:
        """The scheduler's own grid (N+1,) for the stock pipeline's even steps: shifted by the picture's size.

        The published schedulers may then stretch it so that the last step begins at `shift_terminal`, 0.02. A pipeline
        may have `sigmas` of its own in place of even steps; ModelError for another number of steps than theirs.
        """
        if self.sigmas and len(self.sigmas) != num_steps:
            own = len(self.sigmas)
            raise ModelError(f"{self.source}: is made for {own} steps, its sample_sigmas: not for {num_steps} steps")
        if num_steps == 1:  # stretched, it would be 0 / 0
            return torch.tensor([1.0, 0.0])
        even = np.linspace(1.0, 1 / num_steps, num_steps)
        self.scheduler.set_timesteps(sigmas=self.sigmas or even, mu=self.train_shift)
        return self.scheduler.sigmas.clone()


class QwenModel(QwenFlow, QwenPublished):
    """A published Qwen-Image. One that edits draws too, with QwenImagePipeline's template: one model for both tasks."""

    vae_kind = AutoencoderKLQwenImage

    def __init__(self, name: str, *parts):
        """`name`: the pipeline's; parts: as `QwenPublished` takes them."""
        super().__init__(*parts)
        self.pipeline, self.most_sources = name, EDITS[name].most if name in EDITS else 0

    def read_encoders(self) -> qwen_vl.VLM:
        processor = self.folder / "processor" if self.most_sources else None
        places = (self.folder / "text_encoder", self.folder / "tokenizer", processor)
        return qwen_vl.read(*places, self.device, self._dtype())

    def encode_row(self, encoders: qwen_vl.VLM, prompt: str, pictures: Sequence[Source]) -> Cond:
        images = [picture.pixels() for picture in pictures]
        for picture, image in zip(pictures, images, strict=True):
            if picture.where not in self.sources:
                self.sources[picture.where] = self.latents(image).cpu()
        tokens = text_tokens(encoders, self.pipeline, prompt, images, self.text_length)
        return Cond(tokens, sources=tuple(self.sources[picture.where] for picture in pictures))

    def length(self, encoders: qwen_vl.VLM, prompt: str, pictures: int) -> int:
        return len(encoders.tokenizer(words_before(self.pipeline, pictures) + prompt).input_ids) - pictures

    def latents(self, image: Tensor) -> Tensor:
        """A source picture (3, H, W) in [0, 1] -> normalised latents (1, C, h, w), in its own shape.

        DEVIATION (diffusers): the stock pipelines read a source at about a megapixel. Here it is as large as the
        picture that is made, unless `--source-resolution` says otherwise: its tokens cost as much.
        """
        return self.encode_picture(resized(image, self.source_area))


def text_tokens(vlm: qwen_vl.VLM, name: str, prompt: str, images: Sequence[Tensor], longest: int) -> Tensor:
    """The last hidden states (1, S, C) of prompt and pictures, as the pipeline `name` asks; `longest` of the text.

    The pipelines' templates tell the encoder what to look for and are dropped from its answer. They differ between
    drawing and editing, and so do the tokens of one and the same prompt.
    """
    template, drop = _template(name if images else DRAWS)
    before = words_before(name, len(images))
    pictures = [resized(image, EDITS[name].side ** 2) for image in images]
    # TRAP: the stock pipelines of diffusers 0.42 leave out mm_token_type_ids, though transformers 5 needs them
    # (diffusers issue 14194).
    # ERRATUM (diffusers): hence the stock pipeline's edits differ a little from ours, which are as in training.
    question = qwen_vl.Question(template.replace("{}", before + "{}"), [prompt], pictures)
    return hidden_states(vlm, question, drop, longest)[0]


@torch.no_grad()
def hidden_states(vlm: qwen_vl.VLM, question: qwen_vl.Question, drop: int, longest: int) -> tuple[Tensor, Tensor]:
    """The last hidden states (1, S, C) after the first `drop` tokens, `longest` of the text, and which of them are a
    picture's, (1, S) bool. What is cut is not computed: a token sees none that comes after it."""
    inputs = vlm.inputs([question])
    seen = inputs["mm_token_type_ids"][0].nonzero()
    end = drop + longest + len(seen)
    names, most = ("input_ids", "attention_mask", "mm_token_type_ids"), max([end, *(seen.flatten() + 1).tolist()])
    inputs |= {name: inputs[name][:, :most] for name in names}
    # `model` alone: the head would add the logits of 152,000 words to every token.
    hidden = vlm.network.model(**inputs, use_cache=False).last_hidden_state
    return hidden[:, drop:end], inputs["mm_token_type_ids"][:, drop:end].bool()


def words_before(name: str, pictures: int) -> str:
    """What stands before the prompt of an edit of so many pictures."""
    return "".join(EDITS[name].before.format(i) for i in range(1, pictures + 1))


@cache
def _template(name: str) -> tuple[str, int]:
    """A stock pipeline's text around a prompt, and how many of its first tokens are dropped again."""
    kind = getattr(diffusers, name)
    empty = kind(**dict.fromkeys(list(inspect.signature(kind).parameters)))
    return empty.prompt_template_encode, empty.prompt_template_encode_start_idx
