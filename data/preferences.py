"""What people said of pictures: a mark for each, or which of two is better. Data are JSON lines:

    {"image": "a.png", "prompt": "a cat", "score": 4}               a mark from 1 (bad) to 5 (excellent), Q Eq. 11
    {"image_w": "a.png", "image_l": "b.png", "prompt": "a cat"}     image_w was preferred, Q Eq. 10

Image paths are relative to the folder of their file.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from data.batches import seed_for
from data.common import first_line
from data.files import DataError
from rewards import HIGHEST_RATING as HIGHEST
from rewards import LOWEST_RATING as LOWEST

FORMS = {
    "pointwise": f'{{"image": FILE, "prompt": TEXT, "score": {LOWEST} to {HIGHEST}}}',
    "pairwise": '{"image_w": FILE, "image_l": FILE, "prompt": TEXT}',
}


class Sample(NamedTuple):
    """A picture with a mark y in [1, 5]. Pictures are files, or tensors (3, H, W) in [0, 1]."""

    image: Path | Tensor
    prompt: str
    score: float


class Pair(NamedTuple):
    """Two pictures of one prompt, the first of which was preferred."""

    winner: Path | Tensor
    loser: Path | Tensor
    prompt: str


def read(file: str | Path, objective: str) -> list[Sample] | list[Pair]:
    """The lines of a JSONL file that an objective ("pointwise" or "pairwise") learns from, in order.

    Blank lines are skipped. DataError, `file:line: what is wrong`, for a line of another form and for an image that is
    missing or is none. Only the images' headers are read now.
    """
    file = Path(file)
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as fault:
        raise DataError(f"{file}:0: cannot be read ({fault.strerror}); check the path") from None
    found = [_parse(f"{file}:{n}", line, file.parent, objective) for n, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise DataError(f"{file}:0: the file holds no line; write one JSON object a line")
    return found


def _parse(where: str, line: bytes, folder: Path, objective: str) -> Sample | Pair:
    """One line. Whatever is wrong with it, DataError says where, why and what is needed."""
    pointwise = objective == "pointwise"
    try:
        entry = json.loads(line)
        names, prompt = [entry[n] for n in (("image",) if pointwise else ("image_w", "image_l"))], entry["prompt"]
        if not all(isinstance(text, str) and text for text in (*names, prompt)):
            raise ValueError("an image or the prompt is no text")
        if pointwise and not (type(entry["score"]) in (int, float) and LOWEST <= entry["score"] <= HIGHEST):
            raise ValueError(f"the score is no number from {LOWEST} to {HIGHEST}")
        files = [folder / name for name in names]
        for file in files:
            Image.open(file).close()
    except Exception as fault:  # of JSON, UTF-8, a missing field, the file system or one of Pillow's many
        needed = f"--objective {objective} needs lines like {FORMS[objective]}"
        raise DataError(f"{where}: {first_line(fault)}; {needed}") from None
    return Sample(*files, prompt, float(entry["score"])) if pointwise else Pair(*files, prompt)


def read_picture(file: Path) -> Image.Image:
    """The whole picture as eight-bit RGB. DataError if the file breaks off after its header."""
    try:
        with Image.open(file) as opened:
            return opened.convert("RGB")
    except Exception as fault:
        raise DataError(f"{file}: no readable image ({first_line(fault)}); mend it or remove its line") from fault


def split(items: Sequence, share: float) -> tuple[list, list]:
    """(train, held-out): a hash of its prompt decides where an item goes, so all pictures of a prompt go together.

    About `share` of the prompts are held out, the same ones in every run and in every file.
    """
    parts: tuple[list, list] = [], []
    for item in items:
        parts[seed_for("holdout", item.prompt) < share * 2**63].append(item)
    return parts
