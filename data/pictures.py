"""Pictures: tensors as 8-bit pictures, and the source pictures that edits begin from (Q's second task).

A prompt's `image` is a path, or the picture itself as a data URI, `data:image/png;base64,...`.
"""

import base64
import io
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from data.files import DataError, Prompt
from rewards import RewardError

PNG_URI = "data:image/png;base64,"
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
def sources(prompts: Sequence[Prompt]) -> list[Tensor | None] | None:
    """The source pictures of edits, (3, H, W) in [0, 1], None for a prompt without one; None if none has one."""
    found = [source_image(p) for p in prompts]
    if all(image is None for image in found):
        return None
    return [image if image is None else torch.from_numpy(image).permute(2, 0, 1) / 255 for image in found]


def source_image(prompt: Prompt) -> np.ndarray | None:
    """The picture that an edit begins from, (H, W, 3) uint8, upright; None for a prompt that has none.

    The last `CACHED_PICTURES` are kept and shared, so nobody may write to them. DataError as `check_source`.
    """
    return _look(prompt, _decoded)


def check_source(prompt: Prompt) -> None:
    """DataError, `path:line: ...`, for an edit whose picture is missing or cannot be read. No pixel is decoded."""
    _look(prompt, _verified)


def _look(prompt: Prompt, look):
    """`look` at the prompt's picture, if it has one. What is wrong with it is wrong with the prompt's line."""
    where = prompt.metadata.get("image")
    if where is None:
        return None
    try:
        return look(where)
    # Pillow refuses a picture with as many types of exceptions as it has formats.
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as fault:
        shown = "the image in the line" if where.startswith("data:") else f"image {where}"
        reason = getattr(fault, "strerror", None) or "no picture that can be read"
        raise DataError(f"{prompt.source}: {shown}: {reason}; give a PNG or JPEG file, or {PNG_URI}...") from None


def _opened(where: str) -> Image.Image:
    if not where.startswith("data:"):
        return Image.open(where)
    head, _, body = where.partition(",")
    if not head.endswith(";base64"):
        raise ValueError("a data URI that is not base64")
    return Image.open(io.BytesIO(base64.b64decode(body, validate=True)))


def _verified(where: str) -> None:
    with _opened(where) as picture:
        picture.verify()


@lru_cache(CACHED_PICTURES)
def _decoded(where: str) -> np.ndarray:
    with _opened(where) as picture:  # a camera's rotation is in EXIF, not in the pixels
        return np.array(ImageOps.exif_transpose(picture).convert("RGB"))
