"""The velocity v_theta(x_t, t, c), with classifier-free guidance; every model answers the stages through `FlowModel`.

What the stages ask a model:

    prepare(prompts, images)           encode these once and for all; the text encoders may leave afterwards
    encode(prompts, images) -> Cond    text, and an edit's source pictures, -> conditioning, no gradient
    velocity(x, t, cond, uncond, cfg)  v_theta(x_t, t, c), the only place where guidance is written
    adapter(name), keep(names)         run as one of the experts, or as the base; which of them are needed (experts.py)
    decode(x) -> images in [0, 1]      latents -> pixels
    time_grid(num_steps)               the model's own scheduler grid, t = 1 (noise) ... 0 (data)
    tokens(prompt, pictures)           how long the texts of one forward must be, if they are not padded
    latent_shape                       (C, H, W) of x

images[b] has the source pictures of prompt b (`data.pictures.Source`) in the order in which the prompt counts them,
none if it is no edit. The rows of a batch have equally many, of equal shapes: `rollout.micro_batches` sees to it.
sd3.py, qwen.py, qwen21.py and tiny.py have the models.

Numbers: the transformer computes in `precision` (bfloat16 on an accelerator), trained weights are float32, and what
leaves `velocity` is float32 at least, so that guidance, SDE and losses never see a bfloat16.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import sde
from data.pictures import Source
from models.experts import Experts
from models.hub import ModelError


class Cond(NamedTuple):
    """Conditioning of B prompts: token embeddings (B, S, C), and what some models add to them, else None.

    pooled: one vector a prompt, (B, C') (SD3). mask: (B, S) bool, False where a shorter prompt was padded; None if none
    was (Qwen-Image). sources: latents of an edit's pictures, each (B, C, H_i, W_i), in order; () for other prompts.
    slots: (B, S) bool, True where the tokens stand for a source (Qwen-Image-2.1). kept: see `kept_by`.
    """

    tokens: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None
    sources: tuple[Tensor, ...] = ()
    slots: Tensor | None = None
    kept: dict | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> "Cond":
        """Every tensor of it changed."""
        tokens, pooled, mask, slots = (
            part if part is None else change(part) for part in (self.tokens, self.pooled, self.mask, self.slots)
        )
        return Cond(tokens, pooled, mask, tuple(map(change, self.sources)), slots)

    def kept_by(self, expert: str | None, new: Callable) -> tuple[Any, bool]:
        """(what an expert keeps of what it computes from the conditioning alone, is it there already?).

        What is new is made by `new` and the expert fills it. (None, False) if nothing is kept, and with gradients: the
        weights that are trained act through it, too.
        """
        if self.kept is None or torch.is_grad_enabled():
            return None, False
        known = expert in self.kept
        return self.kept.setdefault(expert, new()), known

    def rows(self, index: Tensor | slice) -> "Cond":
        return self.each(lambda part: part[index])

    def to(self, device: torch.device | str) -> "Cond":
        return self.each(lambda part: part.to(device))


def joined(conds: Sequence[Cond]) -> Cond:
    """Several batches' conditioning as one: shorter prompts are padded with zeros, and the mask says where.

    ValueError if their sources differ in number or shape: nothing masks a picture's tokens.
    """
    if len({tuple(source.shape[1:] for source in cond.sources) for cond in conds}) > 1:
        raise ValueError("prompts whose source pictures differ in number or shape do not fit into one batch")
    longest = max(cond.tokens.shape[1] for cond in conds)
    padded = any(cond.mask is not None or cond.tokens.shape[1] < longest for cond in conds)
    tokens, masks = [], []
    for cond in conds:
        rows, length = cond.tokens.shape[:2]
        mask = cond.tokens.new_ones(rows, length, dtype=torch.bool) if cond.mask is None else cond.mask
        tokens.append(nn.functional.pad(cond.tokens, (0, 0, 0, longest - length)))
        masks.append(nn.functional.pad(mask, (0, longest - length)))
    pooled = None if conds[0].pooled is None else torch.cat([cond.pooled for cond in conds])
    sources = tuple(torch.cat(some) for some in zip(*(cond.sources for cond in conds), strict=True))
    slots = [nn.functional.pad(c.slots, (0, longest - c.slots.shape[1])) for c in conds if c.slots is not None]
    padding = torch.cat(masks) if padded else None
    return Cond(torch.cat(tokens), pooled, padding, sources, torch.cat(slots) if slots else None)


def check_count(count: int, most: float, model: str, at: str = "") -> None:
    """ModelError if an edit, of this line of a file, has more source pictures than the model takes."""
    if count > most:
        takes = f"{model} takes {most or 'no'} source picture, not {count}"
        raise ModelError(f"{at}{takes}; Qwen-Image-Edit takes one, Qwen-Image-Edit-2509 and Qwen-Image-2.1 several")


class FlowModel(Experts):
    """A flow-matching transformer and its experts; this class is SD3's velocity, others override `_run`."""

    pipeline = ""  # the diffusers pipeline that loads our adapters, if there is one
    empty = ""  # the prompt of guidance's other branch
    most_sources: float = 0  # how many source pictures an edit may have; inf: as many as fit into memory
    together = True  # both branches of guidance in one forward
    keeps_prefix = False  # does an expert keep what it computes from the conditioning alone (`Cond.kept`)?
    train_shift = 0.0  # training times are logit-normal around this: the model's noise schedule

    def prepare(self, prompts: Sequence[str], images: Sequence[Sequence[Source]] | None = None) -> set[str]:
        """Encode every prompt (of an edit, with its pictures) that a run will need, if encoding is expensive.

        Returns the prompts whose end was cut because they are longer than the encoder reads.
        """
        return set()

    def tokens(self, prompt: str, pictures: Sequence[Source]) -> int:
        """How many tokens the rows of one forward must have; 0 if shorter ones are padded."""
        return 0

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
        if not self.together:
            return self.guide(self._forward(x, t, uncond), self._forward(x, t, cond), cfg)
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
