"""What is different in Qwen-Image-2.1, one model that draws and edits?

    one sequence        text, sources and the picture that is being made: [text, source 1, text, ..., prompt, picture].
                        The text encoder, a Qwen3-VL, reserves a slot for 2 x 2 tokens of a source (`Cond.slots`). In
                        the transformer its latents stand there.
    causal in blocks    a token sees what is before it, and all of its own picture: text and sources, the prefix, never
                        see the picture that is being made.
    the prefix at t = 0 with `causal_condition` it is modulated by t = 0. Its keys and values do not depend on x and t:
                        without gradient an expert computes them once (`Cond.kept`).
    latents unpatched   64 channels at a 16th of the size, no patches
    an RGBA VAE         pictures have a fourth channel, how opaque they are. See `Qwen21Model`.

Guidance is not rescaled. Prompts of unequal length are not padded: a picture's place behind its text depends on the
text's length, so a padded row would be another picture. Rows of one length share a forward.
"""

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKLQwenImage21
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache
from torch import Tensor, nn

from data.pictures import Source
from models import qwen_vl
from models.flow import Cond, FlowModel
from models.hub import ModelError
from models.qwen import QwenPublished, hidden_states, pack, resized, unpack

PIPELINE = "QwenImage21Pipeline"
SLOT = 32  # pixels a side of one slot of the text encoder: 2 x 2 latent tokens of 16 pixels
# As the stock pipeline asks; what the encoder makes of the first turn is dropped.
SYSTEM = "<|im_start|>system\nComprehend and analyze the provided prompt.<|im_end|>\n"
USER = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


class Qwen21Flow(FlowModel):
    """The transformer of Qwen-Image-2.1: the velocity of the target's tokens alone."""

    together = False

    def __init__(self, *parts):
        super().__init__(*parts)
        self.keeps_prefix = self.transformer.config.causal_condition

    def tokens(self, prompt: str, pictures: Sequence[Source]) -> int:
        return self._rows([prompt], [pictures])[0].tokens.shape[1]

    def _run(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        if cond.mask is not None:
            return self._by_length(x, t, cond)
        cache, known = cond.kept_by(self.selected, self._new_cache)
        pictures, count = [*cond.sources, x], x.shape[2] * x.shape[3]
        slots = cond.tokens.new_zeros(cond.tokens.shape[:2], dtype=torch.bool) if cond.slots is None else cond.slots
        v = self.active(
            hidden_states=torch.cat([pack(picture, 1) for picture in pictures], 1),
            encoder_hidden_states=cond.tokens,
            timestep=(1000 * t).to(self._dtype()) / 1000,  # in the stock pipeline's order, as in qwen.py
            img_shapes=[[(1, *picture.shape[2:]) for picture in pictures]] * len(x),
            img_mask=torch.cat([slots, slots.new_ones(len(x), count // 4)], 1),
            kv_cache=cache,
            kv_cache_mode=("cached" if known else "extract") if cache else None,
            return_dict=False,
        )[0]
        return unpack(v[:, -count:], 1, *x.shape[2:]).contiguous()  # without patches it is a view

    def _new_cache(self) -> QwenImage21KVCache:
        return QwenImage21KVCache(self.transformer.config.num_layers)

    def _by_length(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Rows whose texts were padded, without the padding: those of one length at once."""
        lengths, found = cond.mask.sum(1).tolist(), {}
        for length in dict.fromkeys(lengths):
            rows = [row for row, own in enumerate(lengths) if own == length]
            own = cond.rows(torch.tensor(rows, device=x.device))
            slots = None if own.slots is None else own.slots[:, :length]
            own = own._replace(tokens=own.tokens[:, :length], slots=slots, mask=None)
            found |= zip(rows, self._run(x[rows], t[rows], own), strict=True)
        return torch.stack([found[row] for row in range(len(x))])


class Qwen21Model(Qwen21Flow, QwenPublished):
    """The published Qwen-Image-2.1.

    DEVIATION (diffusers): the fourth channel, alpha, is 1 in sources: their transparent pixels are over white. Stock
    shows its text encoder the same, but its VAE all four channels. What the VAE makes is put over white too, since
    scorers see RGB; stock returns RGBA.
    """

    pipeline, vae_kind = PIPELINE, AutoencoderKLQwenImage21
    most_sources, latent_side = 10, 16

    def __init__(self, *parts):
        super().__init__(*parts)
        if any(side % 2 for side in self.latent_shape[1:]):
            raise ModelError(f"--resolution: the sides of {PIPELINE}'s pictures must be multiples of {SLOT}")

    def read_encoders(self) -> qwen_vl.VLM:
        both = self.folder / "processor"
        vlm = qwen_vl.read(self.folder / "text_encoder", both, both, self.device, self._dtype())
        # The transformer was trained on what comes before the last norm.
        vlm.network.model.language_model.norm = nn.Identity()
        return vlm

    def encode_row(self, encoders: qwen_vl.VLM, prompt: str, pictures: Sequence[Source]) -> Cond:
        shown = [resized(picture.pixels(), self.source_area) for picture in pictures]
        for picture, image in zip(pictures, shown, strict=True):
            if picture.where not in self.sources:
                self.sources[picture.where] = self.encode_picture(image.convert("RGBA")).cpu()
        sources = tuple(self.sources[picture.where] for picture in pictures)
        text = (SYSTEM + USER).replace("{}", words_before(len(pictures)) + "{}")
        question, drop = qwen_vl.Question(text, [prompt or " "], shown), len(encoders.tokenizer(SYSTEM).input_ids)
        hidden, slots = hidden_states(encoders, question, drop, self.text_length)
        if 4 * slots.sum() != sum(source.shape[2] * source.shape[3] for source in sources):
            raise ModelError(f"{self.source}: its text encoder sees the sources in another size than its VAE; give "
                             "another --source-resolution")  # fmt: skip
        return Cond(hidden, sources=sources, slots=slots if sources else None)

    def length(self, encoders: qwen_vl.VLM, prompt: str, pictures: int) -> int:
        return len(encoders.tokenizer(USER.partition("{}")[0] + words_before(pictures) + prompt).input_ids) - pictures

    def pixels(self, latents: Tensor) -> Tensor:
        rgba = super().pixels(latents)
        alpha = rgba[:, 3:] / 2 + 0.5
        return alpha * rgba[:, :3] + (1 - alpha)  # over white, which is 1


def words_before(pictures: int) -> str:
    """What stands before the prompt of an edit of so many pictures."""
    return " ".join(f"<image{i}><|vision_start|>{qwen_vl.PICTURE}<|vision_end|>" for i in range(1, pictures + 1))
