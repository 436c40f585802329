"""The velocity v_theta(x_t, t, c), with classifier-free guidance; every model answers the stages through `FlowModel`.

The stages ask a model these things and nothing else:

    prepare(prompts, images)           encode these once and for all; the text encoders may leave afterwards
    encode(prompts, images) -> Cond    text, and an edit's source picture, -> conditioning, no gradient
    velocity(x, t, cond, uncond, cfg)  v_theta(x_t, t, c), the only place where guidance is written
    adapter(name)                      run as one of the experts, or as the base    (experts.py)
    decode(x) -> images in [0, 1]      latents -> pixels
    time_grid(num_steps)               the model's own scheduler grid, t = 1 (noise) ... 0 (data)
    latent_shape                       (C, H, W) of x

A source picture is a `data.pictures.Source`; a batch has one for every prompt or for none. sd3.py, qwen.py and tiny.py
have the models.

Numbers: the transformer computes in `precision` (bfloat16 on an accelerator), trained weights are float32, and what
leaves `velocity` is float32 at least, so that guidance, SDE and losses never see a bfloat16.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

import sde
from data.pictures import Source
from models.experts import Experts


class Cond(NamedTuple):
    """Conditioning of B prompts: token embeddings (B, S, C), and what some models add to them, else None.

    pooled: one vector a prompt, (B, C') (SD3). mask: (B, S) bool, False where a shorter prompt was padded; None if none
    was (Qwen-Image). source: latents of the picture to be edited, (B, C, H, W); a batch has one for every row or none.
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

    ValueError if only some of them have a source.
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


class FlowModel(Experts):
    """A flow-matching transformer and its experts; this class is SD3's velocity, qwen.py overrides `_run`."""

    pipeline = ""  # the diffusers pipeline that loads our adapters, if there is one
    empty = ""  # the prompt of guidance's other branch
    train_shift = 0.0  # training times are logit-normal around this: the model's noise schedule

    def prepare(self, prompts: Sequence[str], images: Sequence[Source | None] | None = None) -> None:
        """Encode every prompt (of an edit, with its source picture) that a run will need, if encoding is expensive."""

    def velocity(self, x: Tensor, t: float | Tensor, cond: Cond, uncond: Cond | None = None, cfg: float = 1.0):
        """v_theta(x_t, t, c) (B, C, H, W), float32, with classifier-free guidance if cfg != 1.

        t is one time for all or one a sample (B,). Gradients flow if they are enabled. ValueError if cfg != 1 has no
        `uncond`.
        """
        t = torch.as_tensor(t, dtype=torch.float32, device=x.device).expand(len(x))
        if cfg == 1.0:
            return self._forward(x, t, cond)
        if uncond is None:
            raise ValueError(f"guidance scale {cfg} needs the conditioning of the empty prompt (uncond)")
        v = self._forward(torch.cat([x, x]), torch.cat([t, t]), joined([uncond, cond]))  # both branches at once
        return self.guide(*v.chunk(2), cfg)

    def guide(self, v_uncond: Tensor, v_cond: Tensor, cfg: float) -> Tensor:
        """Classifier-free guidance, v = v_uncond + cfg (v_cond - v_uncond): the only place where it is written."""
        return v_uncond + cfg * (v_cond - v_uncond)

    def _forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        # float32 weights (LoRA, full student) and a bfloat16 backbone meet under autocast.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            return sde.full_precision(self._run(x, t, cond))

    def _run(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """One forward of the active expert, SD3's way; t (B,)."""
        return self.active(
            hidden_states=x,
            encoder_hidden_states=cond.tokens,
            pooled_projections=cond.pooled,
            timestep=t * 1000,  # SD3 embeds t in [0, 1000]
            return_dict=False,
        )[0]
