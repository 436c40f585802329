"""Self-tests: a scorer is asked about pictures whose score is known, before a run starts.

The test costs a picture. A detector that was installed wrongly and answers 0 to everything would cost a week.
"""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from data.files import Prompt
from data.written import CLASSES
from rewards import MAX_PER_CLASS, RewardError, Scorer


def self_test(scorer: Scorer) -> bool:
    """Ask a scorer about a picture whose score is known; by its name, so that a served one can be asked, too.

    True: it passed; False: for its name there is no picture of known score. RewardError that names the scorer, what it
    was shown and what it said if it fails.
    """
    if scorer.name not in KNOWN_ANSWERS:
        return False
    images, prompts, is_right, claim = KNOWN_ANSWERS[scorer.name]()
    scores = [float(score) for score in scorer.score(torch.stack(images), prompts, None)]
    if not is_right(*scores):
        said = ", ".join(f"{score:.4g}" for score in scores)
        raise RewardError(f"scorer {scorer.name!r} failed its self-test: {claim}, but it said {said}")
    return True


def _flat(color: str) -> Image.Image:
    return Image.new("RGB", (256, 256), color)


def _tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


def _prompt(text: str, **metadata) -> Prompt:
    return Prompt(text, "quality", metadata, "self-test")


def _known_ocr() -> tuple:
    sign = _flat("white")
    ImageDraw.Draw(sign).text((128, 128), "HELLO", "black", ImageFont.load_default(48), anchor="mm")
    prompts = [_prompt('a sign that says "HELLO"')] * 2
    claim = "a rendered word must score 1 and a blank page 0"
    return [_tensor(sign), _tensor(_flat("white"))], prompts, lambda word, blank: (word, blank) == (1, 0), claim


def _known_jpeg() -> tuple:
    noise = torch.rand(3, 256, 256, generator=torch.Generator().manual_seed(0))
    claim = "a flat picture must score above 0.95 and noise below 0.5"
    return [_tensor(_flat("grey")), noise], [_prompt("")] * 2, lambda flat, rough: flat > 0.95 and rough < 0.5, claim


def _known_clip() -> tuple:
    prompts = [_prompt("a red square"), _prompt("a blue square")]
    claim = "a red square must score higher as 'a red square' than as 'a blue square'"
    return [_tensor(_flat("red"))] * 2, prompts, lambda red, blue: red > blue, claim


def _known_aesthetic() -> tuple:
    claim = "a sunset must score in [0, 12]"  # a wrong head, or features of another length, are far off
    sunset = torch.linspace(0, 1, 256)[None, :, None] * torch.tensor([1.0, 0.5, 0.2])[:, None, None].expand(3, 1, 256)
    return [sunset], [_prompt("")], lambda rating: 0 <= rating <= 12, claim


def _known_geneval() -> tuple:
    sign = _flat("white")
    ImageDraw.Draw(sign).regular_polygon((128, 128, 80), 8, fill="red")
    drawn = _prompt("a photo of a red stop sign", include=[{"class": "stop sign", "count": 1, "color": "red"}])
    # Of so many objects asked for, each one found adds to the graded reward; the verdict is asked about one of them.
    crowd = [{"class": name, "count": MAX_PER_CLASS} for name in CLASSES]
    prompts = [drawn, _prompt("a crowd", include=crowd), _prompt("a person", include=[{"class": "person", "count": 1}])]
    claim = "a blank picture must show no object, hence score 0"
    blank = _tensor(_flat("grey"))
    return [_tensor(sign), blank, blank], prompts, lambda _, crowd, person: crowd == person == 0, claim


KNOWN_ANSWERS = {
    "ocr": _known_ocr, "jpeg": _known_jpeg, "geneval": _known_geneval, "aesthetic": _known_aesthetic,
    **dict.fromkeys(("pickscore", "clipscore", "hps", "imagereward"), _known_clip),
}  # fmt: skip
