"""Pictures: tensors as 8-bit pictures, and the source pictures that edits begin from (Q's second task).

A prompt's `image` is a path, or the picture itself as a data URI, `data:image/png;base64,...`, or a list of these.
"""

import base64
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from data.common import first_line
from data.files import DataError, Prompt
from rewards import RewardError

PNG_URI = "data:image/png;base64,"
FORMATS = ("PNG", "JPEG", "WEBP")
MOST_PIXELS = 1 << 26  # of a source, 8192 x 8192: they need 200 MB
CACHED_PICTURES = 64  # decoded sources that are kept: 200 MB of 1024 x 1024 pixels


def to_picture(image: Tensor) -> Image.Image:
    """An image (3, H, W) in [0, 1] as an 8-bit RGB picture; values are rounded to the nearest byte and clamped.

    RewardError for values that are not finite: a nan becomes 0 when it is made a byte, and a broken decoder would be
    scored as a black picture.
    """
    if not image.isfinite().all():
        raise RewardError("a picture holds values that are not finite; the model that drew it has diverged")
    pixels = (image.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous()
    return Image.fromarray(pixels.cpu().numpy())


def data_uri(image: Tensor) -> str:
    """An image (3, H, W) in [0, 1] as a PNG in a data URI."""
    return PNG_URI + png(to_picture(image))


def png(picture: Image.Image, level: int = -1) -> str:
    """A picture as a PNG file in base64. `level` 1 packs lightly: for thousands of pictures that are sent once."""
    stream = io.BytesIO()
    picture.save(stream, "PNG", compress_level=level)
    return base64.b64encode(stream.getvalue()).decode()


# ------------------------------------------------------------------------------------------------ sources of edits
class Source(NamedTuple):
    """A picture that an edit begins from. Equal places are equal pictures: what is known of one is not read again."""

    where: str  # a path or a data URI
    pixels: Callable[[], Tensor]  # reads it: (3, H, W) in [0, 1]


def places(prompt: Prompt) -> tuple[str, ...]:
    """Where the pictures of an edit are, paths or data URIs, "Picture 1" first; () for a prompt that has none."""
    where = prompt.metadata.get("image", ())
    return (where,) if isinstance(where, str) else tuple(where)


def sources_of(prompt: Prompt) -> tuple[Source, ...]:
    """A prompt's pictures in the order of `places`, not read yet."""
    return tuple(Source(where, partial(_pixels, prompt, where)) for where in places(prompt))


def sources(prompts: Sequence[Prompt]) -> list[tuple[Tensor, ...] | None] | None:
    """The source pictures of edits, (3, H, W) in [0, 1], None for a prompt without any; None if none has one.

    The rows of one picture share one tensor.
    """
    found = [sources_of(p) for p in prompts]
    read = {place: pixels() for place, pixels in {s.where: s.pixels for some in found for s in some}.items()}
    return [tuple(read[s.where] for s in some) or None for some in found] if read else None


def layout(prompt: Prompt) -> tuple[float, ...]:
    """Width / height of each source picture that a prompt begins from, whatever its task is called; () for none.

    Rows of one layout fit into one batch: nothing masks a picture's tokens, and all rows have the places of the first.
    """
    return tuple(_look(prompt, _aspect, where) for where in places(prompt))


def _pixels(prompt: Prompt, where: str) -> Tensor:
    return torch.from_numpy(_look(prompt, _cached, where)).permute(2, 0, 1) / 255


def source_images(prompt: Prompt) -> list[np.ndarray]:
    """The pictures that an edit begins from, (H, W, 3) uint8, upright.

    The last `CACHED_PICTURES` are kept and shared, so nobody may write to them. DataError as `check_sources`.
    """
    return [_look(prompt, _cached, where) for where in places(prompt)]


def check_sources(prompt: Prompt) -> None:
    """DataError, `path:line: ...`, for an edit with a picture that is missing or cannot be read, to its last byte."""
    for where in places(prompt):
        _look(prompt, verify, where)


def _look(prompt: Prompt, look: Callable, where: str):
    """`look` at a picture of a prompt. What is wrong with it is wrong with the prompt's line."""
    try:
        return look(where)
    except DataError as fault:
        raise DataError(f"{prompt.source}: {fault}") from None


# ------------------------------------------------------------------------------------------------- reading pictures
@contextmanager
def opened(where: str | Path) -> Iterator[Image.Image]:
    """A picture from a file or a data URI, its header read and its size known. DataError for whatever is wrong.

    Only `FORMATS` are tried: others start programs (PostScript) or hold what is no picture of eight bits.
    """
    try:
        source = Path(where) if isinstance(where, Path) or not where.startswith("data:") else _embedded(where)
        if isinstance(source, Path) and os.path.exists(source) and not os.path.isfile(source):
            raise ValueError("no regular file")  # a pipe would be waited for
        with Image.open(source, formats=FORMATS) as picture:
            if picture.width * picture.height > MOST_PIXELS:
                raise ValueError(f"{picture.width} x {picture.height} pixels are more than {MOST_PIXELS}")
            yield picture
    except Exception as fault:  # Pillow refuses a picture with as many types of exceptions as it has formats
        cause = getattr(fault, "strerror", None) or first_line(fault)
        shown = "the image in the line" if str(where).startswith("data:") else where
        raise DataError(
            f"{shown}: no picture that can be read ({cause[:200]}); give a PNG, JPEG or WEBP file"
        ) from None


def _embedded(uri: str) -> io.BytesIO:
    head, _, body = uri.partition(",")
    if not head.endswith(";base64"):
        raise ValueError("a data URI that is not base64")
    return io.BytesIO(base64.b64decode(body, validate=True))


def verify(where: str | Path) -> None:
    """DataError unless a picture is whole: a file that was cut in half has a sound header."""
    with opened(where) as picture:
        picture.draft(None, (1, 1))  # all bytes of a JPEG are read, and few of its pixels are computed
        picture.load()


def decode(where: str | Path) -> np.ndarray:
    """A picture, upright, as (H, W, 3) uint8: transparent pixels over white, 16 bits of grey as the nearest of eight.

    DataError as `opened`.
    """
    with opened(where) as picture:
        picture = ImageOps.exif_transpose(picture)  # a camera's rotation is in EXIF, not in the pixels
        if picture.mode.startswith("I"):
            grey = np.rint(np.asarray(picture, np.float64) / 257).clip(0, 255).astype(np.uint8)
            return grey[..., None].repeat(3, -1)
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return np.array(picture.convert("RGB"))


def stacked(files: Iterable[Path]) -> Tensor:
    """Pictures of one size, (B, 3, H, W) in [0, 1]."""
    return torch.stack([torch.from_numpy(decode(file)).permute(2, 0, 1) / 255 for file in files])


_cached = lru_cache(CACHED_PICTURES)(decode)


@cache
def _aspect(where: str) -> float:
    height, width, _ = _cached(where).shape
    return width / height
