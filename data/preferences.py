"""What people said of pictures: a mark for each, or which of two is better. Data are JSON lines:

    {"image": "a.png", "prompt": "a cat", "score": 4}               a mark from 1 (bad) to 5 (excellent), Q Eq. 11
    {"image_w": "a.png", "image_l": "b.png", "prompt": "a cat"}     image_w was preferred, Q Eq. 10

Image paths are relative to the folder of their file.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from data.batches import seed_for
from data.common import DataError, first_line, read_objects
from data.pictures import verify
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

    DataError, `file:line: what is wrong`, for a line of another form and for an image that is missing, cut or none.
    """
    file = Path(file)
    found = [_parse(where, entry, file.parent, objective) for where, entry in read_objects(file)]
    if not found:
        raise DataError(f"{file}:0: the file holds no line; write one JSON object a line")
    return found


def _parse(where: str, entry: object, folder: Path, objective: str) -> Sample | Pair:
    """One line. Whatever is wrong with it, DataError says where, why and what is needed."""
    pointwise = objective == "pointwise"
    try:
        names, prompt = [entry[n] for n in (("image",) if pointwise else ("image_w", "image_l"))], entry["prompt"]
        if not all(isinstance(text, str) and text for text in (*names, prompt)):
            raise ValueError("an image or the prompt is no text")
        if pointwise and not (type(entry["score"]) in (int, float) and LOWEST <= entry["score"] <= HIGHEST):
            raise ValueError(f"the score is no number from {LOWEST} to {HIGHEST}")
    except (ValueError, TypeError, KeyError) as fault:
        needed = f"--objective {objective} needs lines like {FORMS[objective]}"
        raise DataError(f"{where}: {first_line(fault)}; {needed}") from None
    files = [folder / name for name in names]
    for file in files:
        try:
            verify(file)
        except DataError as fault:
            raise DataError(f"{where}: {fault}") from None
    return Sample(*files, prompt, float(entry["score"])) if pointwise else Pair(*files, prompt)


def split(items: Sequence, share: float) -> tuple[list, list]:
    """(train, held-out): a hash of its prompt decides where an item goes, so all pictures of a prompt go together.

    About `share` of the prompts are held out, the same ones in every run and in every file.
    """
    parts: tuple[list, list] = [], []
    for item in items:
        parts[seed_for("holdout", item.prompt) < share * 2**63].append(item)
    return parts
