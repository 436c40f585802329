"""Measures of pictures that need no judge: how unlike are a prompt's pictures, and what has an edit left as it was?"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from data.files import Prompt
from data.pictures import to_picture
from rewards import RewardError, Scorer
from scorers.clip import CLIP_L, clip_features
from scorers.common import diversity as distance
from scorers.common import pixels_of


def diversity(device: str = "cpu", dtype: torch.dtype = torch.float32, model: str = CLIP_L, batch: int = 16) -> Scorer:
    """How unlike a prompt's pictures are, `common.diversity`, each picture with its prompt's value: F 6.3.3's collapse.

    model: a CLIP whose image features are compared; "" compares pixels, as in the tiny worlds. All pictures of a prompt
    must be in one batch. RewardError for a prompt with one picture.
    """
    seen = clip_features("diversity", model, "", device, dtype)[0] if model else None

    def features(images: Tensor) -> np.ndarray:
        if seen is None:
            return images.flatten(1).numpy()
        with torch.no_grad():
            return torch.cat([seen(pixels_of(part)) for part in images.split(batch)]).cpu().numpy()

    def score(images: Tensor, prompts: Sequence[Prompt], sources: object = None) -> Tensor:
        found, groups = torch.zeros(len(prompts), dtype=torch.float64), {}
        for row, p in enumerate(prompts):
            groups.setdefault((p.text, repr(p.metadata)), []).append(row)
        for (text, _), rows in groups.items():
            if len(rows) < 2:
                raise RewardError(f"scorer 'diversity': one picture of the prompt {text!r}; draw more of each")
            found[rows] = distance(features(images[rows]))
        return found

    return Scorer("diversity", score, 0.0, float("inf"))


def untouched() -> Scorer:
    """What an edit left as it was, in [0, 1]: 1 - mean |result - source| over the prompt's boxes "keep"; Q 3.3.

    Boxes (x0, y0, x1, y1) are in the first source's pixels. A source of another shape is cropped to the
    result's, its middle. RewardError for a prompt without boxes.
    """

    def score(images: Tensor, prompts: Sequence[Prompt], sources: Sequence[tuple[Tensor, ...]] | None = None) -> Tensor:
        scores = []
        for image, p, source in zip(images, prompts, sources or [()] * len(prompts), strict=True):
            if not source or not p.metadata.get("keep"):
                raise RewardError(f"scorer 'untouched': {p.source}: needs a source picture and the field 'keep'")
            result, before = to_picture(image), to_picture(source[0])
            mask = Image.new("L", before.size)
            for box in p.metadata["keep"]:
                mask.paste(255, tuple(int(edge) for edge in box))
            before = ImageOps.fit(before, result.size, Image.Resampling.LANCZOS)
            kept = np.asarray(ImageOps.fit(mask, result.size, Image.Resampling.NEAREST)) > 0
            gap = np.abs(np.asarray(result, np.float64) - np.asarray(before, np.float64))[kept]
            if not gap.size:
                raise RewardError(f"scorer 'untouched': {p.source}: no pixel of the picture lies in 'keep'")
            scores.append(1 - gap.mean() / 255)
        return torch.tensor(scores, dtype=torch.float64)

    return Scorer("untouched", score, 0.0, 1.0)
