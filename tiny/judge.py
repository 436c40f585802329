"""The tiny world's reward model: a small transformer that marks a picture, and the prints that it learns from.

It is a model of the same kind as a VLM: it reads a picture and a prompt and answers with one of five score tokens (Q
Eq. 12). It is trained on drawings with graded printing faults, by an annotator who errs a little.
"""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.files import Prompt
from data.preferences import Pair, Sample, split
from reward_model import HIGHEST, LOWEST, expected_score
from rewards import RewardError
from tiny import canvas, drawings

PROMPTS, PICTURES = 3000, 2  # of all tasks together; pictures of each prompt
ANNOTATOR_ERROR = 0.25  # standard deviation of what the annotator sees, on the scale of 1 to 5
FAULTS = ((), ("grain",), ("fade",), ("blur",), ("tint",), ("grain", "fade"), ("blur", "grain"))


class TinyJudge(nn.Module):
    """36 patches and the words of a prompt go through two transformer blocks to the logits of five score tokens.

    It has no dropout and never leaves training mode: in evaluation mode torch takes another path, with other last bits.
    """

    def __init__(self, width: int = 64, layers: int = 2, seed: int = 0):
        super().__init__()
        self.shape, patch = {"width": width, "layers": layers}, 4
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.eye = nn.Sequential(nn.Conv2d(3, width, patch, patch), nn.GELU(), nn.Conv2d(width, width, 1))
            self.word = nn.Embedding(len(drawings.VOCABULARY), width)
            # A place for each patch, for each word, and for the answer, which has no token before it is given.
            places = (canvas.SIZE // patch) ** 2 + drawings.MAX_TOKENS + 1
            self.place = nn.Parameter(0.02 * torch.randn(places, width))
            block = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            self.blocks = nn.TransformerEncoder(block, layers, nn.LayerNorm(width), enable_nested_tensor=False)
            self.head = nn.Linear(width, HIGHEST)

    @property
    def device(self) -> torch.device:
        return self.place.device

    def scores(self, images: Sequence[Tensor] | Tensor, prompts: Sequence[str]) -> Tensor:
        """R of Q Eq. 12 for B pictures (3, 24, 24), (B,) float32 on the device; RewardError for what it cannot read."""
        tokens = []
        for prompt in prompts:
            try:
                tokens.append(drawings.tokenize(prompt))
            except ValueError as fault:
                raise RewardError(f"the tiny reward model cannot read {prompt!r}: {fault}") from None
        x = images if isinstance(images, Tensor) else torch.stack(list(images))
        if x.shape[1:] != (3, canvas.SIZE, canvas.SIZE):
            size = f"{canvas.SIZE} x {canvas.SIZE}"
            raise RewardError(f"the tiny reward model sees {size} pixels, not {tuple(x.shape)}")
        patches = self.eye(x.to(self.place) * 2 - 1).flatten(2).mT  # (B, 36, C)
        words = self.word(torch.tensor(tokens, device=self.device))  # (B, 12, C)
        both = F.pad(torch.cat([patches, words], 1), (0, 0, 0, 1)) + self.place
        return expected_score(self.head(self.blocks(both)[:, -1]), range(HIGHEST))

    def trainable(self) -> dict[str, nn.Parameter]:
        """What the optimizer trains, by name: everything."""
        return dict(self.named_parameters())

    def save(self, folder: Path) -> dict:
        """Write the weights -> what `load` needs besides."""
        weights = {name: value.detach().float().cpu().contiguous() for name, value in self.state_dict().items()}
        safetensors.torch.save_file(weights, folder / "model.safetensors")
        return {"kind": "tiny", **self.shape}


def load(folder: Path, about: Mapping) -> TinyJudge:
    """The judge whose weights stand in the folder, frozen; about: what its `save` has returned."""
    judge = TinyJudge(about["width"], about["layers"])
    judge.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
    return judge.requires_grad_(False)


# ---------------------------------------------------------------------------------------------- what it learns from
def print_fault(image: np.ndarray, rng: random.Random) -> np.ndarray:
    """A drawing (3, 24, 24) with up to two printing faults of any strength: grain, a faded, blurred or tinted print.

    `canvas.spoil` knows two faults of one strength; marks from 1 to 5 need all that lies between.
    """
    for fault in rng.choice(FAULTS):
        strength = np.float32(rng.random())
        if fault == "grain":
            noise = np.random.default_rng(rng.getrandbits(32)).standard_normal(image.shape, np.float32)
            image = image + 0.4 * strength * noise
        elif fault == "blur":
            around = F.avg_pool2d(F.pad(torch.from_numpy(image)[None], (2, 2, 2, 2), mode="replicate"), 5, 1)[0].numpy()
            image = image + strength * (around - image)
        else:
            paint = [0.62] * 3 if fault == "fade" else [rng.random() for _ in range(3)]
            image = image + 0.8 * strength * (np.array(paint, np.float32)[:, None, None] - image)
    return image.clip(0, 1)


def marked_prints(prompts: int, objective: str, seed: int, holdout: float) -> tuple[list, list[Sample]]:
    """(training items, held-out samples): two prints of each prompt, of the train split of every task.

    One annotator sees 1 + 4 `canvas.quality` of each picture with an error. Pointwise, the nearest whole number from
    1 to 5 is written down; pairwise, which of the two pictures looked better. So both objectives learn from the same
    pictures and the same judgement. Held-out samples have the true value, whatever the objective.
    """
    rng = random.Random(f"reward model/{seed}")
    each = prompts // len(drawings.TASKS)
    asked = [p for task in drawings.TASKS for p in drawings.make_prompts(task, "train", each, seed)]
    drawn = [(p.text, torch.from_numpy(print_fault(_drawing(p, rng), rng))) for p in asked for _ in range(PICTURES)]
    truth = 1 + 4 * canvas.quality(torch.stack([image for _, image in drawn]))
    samples = [Sample(image, text, true) for (text, image), true in zip(drawn, truth.tolist(), strict=True)]
    training, held = split(samples, holdout)
    seen = [s._replace(score=rng.gauss(s.score, ANNOTATOR_ERROR)) for s in training]
    if objective == "pointwise":
        return [s._replace(score=float(min(max(round(s.score), LOWEST), HIGHEST))) for s in seen], held
    pairs = zip(seen[::2], seen[1::2], strict=True)  # both pictures of a prompt lie side by side
    ordered = [(a, b) if a.score > b.score else (b, a) for a, b in pairs]
    return [Pair(winner.image, loser.image, winner.prompt) for winner, loser in ordered], held


def _drawing(prompt: Prompt, rng: random.Random) -> np.ndarray:
    """A picture that may or may not show what its prompt says, now and then a page of one colour: quality is all."""
    if rng.random() < 0.06:
        paint = np.array(rng.choice([(1.0, 1.0, 1.0), *canvas.COLORS.values()]), np.float32)
        return np.tile(paint[:, None, None], (1, canvas.SIZE, canvas.SIZE))
    if "include" in prompt.metadata:
        return canvas.draw(drawings.scene_of(prompt.metadata, rng, 0.3))
    word = "".join(rng.choices(canvas.LETTERS, k=canvas.WORD_LENGTH))
    return canvas.draw({"word": word, "color": rng.choice(canvas.INKS)})
