"""Pictures: tensors as the 8-bit pictures that scorers see and files hold."""

import torch
from PIL import Image

from rewards import RewardError


def to_picture(image: torch.Tensor) -> Image.Image:
    """An image (3, H, W) in [0, 1] as an 8-bit RGB picture; values are rounded to the nearest byte and clamped.

    RewardError for values that are not finite: a nan becomes 0 when it is made a byte, and a broken decoder would be
    scored as a black picture.
    """
    if not image.isfinite().all():
        raise RewardError("a picture holds values that are not finite; the model that drew it has diverged")
    pixels = (image.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous()
    return Image.fromarray(pixels.cpu().numpy())
