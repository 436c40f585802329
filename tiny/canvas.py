"""The pictures of the tiny worlds, 24 x 24 pixels: how they are drawn, and how they are read back.

A scene is {"objects": [{"class", "color", "cell"}]} or {"word", "color"}, and perhaps {"paper"}. Reading is template
matching, exact on clean drawings and close to zero on noise and blank images. Images are float arrays (3, 24, 24) in
[0, 1].
"""

import random
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SIZE, CELL, OBJECT = 24, 12, 10  # pixels: the image, one of the 2 x 2 cells, one object inside its cell
DEFECT_RATE = 0.5  # how often a print is spoilt
CLASSES = ("circle", "square", "triangle", "cross")
COLORS = {
    "red": (0.86, 0.08, 0.08), "green": (0.05, 0.62, 0.15), "blue": (0.10, 0.25, 0.95),
    "yellow": (0.98, 0.85, 0.05), "purple": (0.60, 0.10, 0.75), "black": (0.0, 0.0, 0.0),
}  # fmt: skip
INKS = ("red", "green", "blue", "purple", "black")  # colours that a word is printed in (yellow is illegible)
LETTERS, WORD_LENGTH = "ACEHLNOTXZ", 3
PAPERS = {"white": (1.0, 1.0, 1.0), "pink": (1.0, 0.78, 0.86), "mint": (0.78, 1.0, 0.84), "sky": (0.76, 0.88, 1.0)}
WORD_BOX = (0, 7, SIZE, 17)
BOXES = [(x, y, x + CELL, y + CELL) for y in (0, CELL) for x in (0, CELL)] + [WORD_BOX]  # where a thing can stand
STRANGER = 0.5  # the cosine of two things that differ in colour or in shape
INK = 0.4  # as far from its paper as this, a pixel is ink: that of a faded yellow on pink is 0.45


# ----------------------------------------------------------------------------------------------------- drawing
@lru_cache
def object_masks() -> dict[str, np.ndarray]:
    """The four shapes as binary masks (OBJECT, OBJECT): the ink of one object."""
    y, x = np.mgrid[:OBJECT, :OBJECT] - (OBJECT - 1) / 2
    return {
        "circle": (x**2 + y**2 <= 5**2).astype(np.float32),
        "square": np.ones((OBJECT, OBJECT), np.float32),
        "triangle": (np.abs(x) <= (y + 5.5) / 2).astype(np.float32),
        "cross": ((np.abs(x) < 2) | (np.abs(y) < 2)).astype(np.float32),
    }


@lru_cache
def letter_masks() -> dict[str, np.ndarray]:
    """The alphabet as binary masks (10, 8), printed by Pillow's own font and centred in a cell of 8 pixels."""
    font = ImageFont.load_default(size=13)
    masks = {}
    for letter in LETTERS:
        canvas = Image.new("1", (24, 24))
        pen = ImageDraw.Draw(canvas)
        pen.fontmode = "1"  # no anti-aliasing: crisp ink
        pen.text((6, 4), letter, fill=1, font=font)
        glyph = canvas.crop(canvas.getbbox())
        cell = Image.new("1", (8, 10))
        cell.paste(glyph, ((8 - glyph.width) // 2, (10 - glyph.height) // 2))
        masks[letter] = np.asarray(cell, np.float32)
    return masks


def paint(image: np.ndarray, mask: np.ndarray, x: int, y: int, color: str) -> None:
    """Paint `mask` (h, w) onto `image` (3, SIZE, SIZE) in place, its corner at pixel (x, y)."""
    h, w = mask.shape
    patch = image[:, y : y + h, x : x + w]
    patch += mask * (np.asarray(COLORS[color], np.float32)[:, None, None] - patch)


def draw(scene: Mapping) -> np.ndarray:
    """Draw a scene, {"word", "color"} or {"objects": [{"class", "color", "cell"}]}, on its "paper" -> (3, 24, 24)."""
    image = np.ones((3, SIZE, SIZE), np.float32)
    for i, letter in enumerate(scene.get("word", "")):
        paint(image, letter_masks()[letter], i * 8, 7, scene["color"])
    for thing in scene.get("objects", ()):
        column, row = thing["cell"]
        paint(image, object_masks()[thing["class"]], column * CELL + 1, row * CELL + 1, thing["color"])
    blank = (image == 1).all(0)  # no colour of the world is white
    return np.where(blank, np.asarray(PAPERS[scene.get("paper", "white")], np.float32)[:, None, None], image)


def spoil(image: np.ndarray, rng: random.Random) -> np.ndarray:
    """With probability DEFECT_RATE, one of two printing faults: grain or a faded print (both keep the content)."""
    if rng.random() >= DEFECT_RATE:
        return image
    if rng.random() < 0.5:
        noise = np.random.default_rng(rng.getrandbits(32)).standard_normal(image.shape, np.float32)
        return (image + 0.18 * noise).clip(0, 1)
    return 0.55 * image + 0.45 * 0.62  # towards grey


# ----------------------------------------------------------------------------------------------- reading back
def correlate(windows: Tensor, masks: Tensor) -> Tensor:
    """Normalised cross-correlation in [-1, 1] of windows (N, L) with masks (M, L) -> (N, M); flat windows give 0."""
    windows = windows - windows.mean(-1, keepdim=True)
    masks = masks - masks.mean(-1, keepdim=True)
    norm = windows.norm(dim=-1, keepdim=True)
    # A blank or faint window has no shape: below this contrast (0.15 rms) its score fades to zero.
    floor = 0.15 * windows.shape[-1] ** 0.5
    return (windows @ (masks / masks.norm(dim=-1, keepdim=True)).T) / norm.clamp(min=floor)


def _ink(images: Tensor) -> Tensor:
    """How far each pixel is from white paper, (B, 3, H, W) -> (B, H, W): 1 for every full colour of the world."""
    return 1 - images.amin(1)


def _shapes() -> Tensor:
    """The masks of objects in their cells, (4, 144). Without the pixel of paper around it, a square has no edge."""
    return torch.stack([torch.from_numpy(np.pad(mask, 1)).flatten() for mask in object_masks().values()])


def detect(images: Tensor) -> list[list[dict]]:
    """Objects of each image (B, 3, 24, 24) as GenEval-style detections: class, score, box (x0, y0, x1, y1), color.

    One object a cell, the class that correlates best; the score stretches the correlation so that GenEval's
    thresholds mean something here: 0.3 at correlation 0.62, 0.9 at 0.86.
    """
    images = images.float()
    cells = _ink(images).unfold(1, CELL, CELL).unfold(2, CELL, CELL).flatten(3).flatten(1, 2)  # (B, 4, 144)
    best, kind = correlate(cells, _shapes()).max(-1)  # (B, 4) each
    results: list[list[dict]] = [[] for _ in images]
    for b, cell in ((best - 0.5) > 0).nonzero().tolist():
        name = CLASSES[kind[b, cell]]
        y, x = cell // 2 * CELL + 1, cell % 2 * CELL + 1
        ink = torch.from_numpy(object_masks()[name]).bool()
        pixels = images[b, :, y : y + OBJECT, x : x + OBJECT][:, ink]  # (3, number of ink pixels)
        results[b].append({
            "class": name,
            "score": min((best[b, cell].item() - 0.5) / 0.4, 1.0),
            "box": (float(x), float(y), float(x + OBJECT), float(y + OBJECT)),
            "color": name_color(pixels.median(1).values, COLORS),
        })  # fmt: skip
    return results


def name_color(pixel: Tensor, palette: Mapping[str, tuple[float, float, float]]) -> str:
    """The palette colour nearest to a pixel (3,), also when the whole print has faded towards grey by some amount."""
    return list(palette)[int(color_distances(pixel, palette).argmin())]


def color_distances(pixel: Tensor, palette: Mapping[str, tuple[float, float, float]]) -> Tensor:
    """Squared distance of a pixel (3,) from each palette colour, faded by whatever amount brings it nearest."""
    fade = torch.linspace(0, 0.5, 6)[:, None, None]
    shades = torch.tensor(list(palette.values())) * (1 - fade) + 0.62 * fade  # (6, colours, 3)
    return (shades - pixel).square().sum(-1).amin(0)


def read_text(images: Tensor) -> list[str]:
    """The letters of each image (B, 3, 24, 24), left to right on the line that reads best; "" where there are none."""
    masks = torch.stack([torch.from_numpy(m).flatten() for m in letter_masks().values()])
    windows = _ink(images.float()).unfold(1, 10, 1).unfold(2, 8, SIZE // WORD_LENGTH)
    found = windows.flatten(3)  # (B, rows, letters, 80)
    scores, letter = correlate(found.flatten(0, 2), masks).unflatten(0, found.shape[:3]).max(-1)
    line = scores.sum(-1).argmax(1)  # (B,) the row that reads best
    rows = torch.arange(len(images))
    return [
        "".join(LETTERS[i] for i, s in zip(letters, values, strict=True) if s > 0.6)
        for letters, values in zip(letter[rows, line].tolist(), scores[rows, line].tolist(), strict=True)
    ]


def quality(images: Tensor) -> Tensor:
    """Print quality of images (B, 3, 24, 24) in [0, 1] -> (B,): clean paper, full colours, and something on it.

    exp(-6 d) with d the mean distance of a pixel from the nearest pure colour (paper or palette), times a gate
    that is 1 where 4 to 70 % of the page is inked and 0 for an empty page or one of solid paint (four squares are
    69 %): without the gate, RL on quality alone learns to draw blank paper (F Fig. 2's seesaw).
    """
    coverage = (_ink(images.float()) > 0.5).float().mean((1, 2))
    gate = (coverage / 0.04).clamp(max=1) * ((1 - coverage) / 0.3).clamp(max=1)
    return purity(images, [(1.0, 1.0, 1.0), *COLORS.values()]) * gate


def purity(images: Tensor, pure: Sequence[tuple[float, float, float]]) -> Tensor:
    """exp(-6 d), (B,), with d the mean distance of a pixel of (B, 3, 24, 24) from the nearest of the pure colours."""
    colours = torch.tensor(list(pure))[None, :, :, None, None]  # (1, n, 3, 1, 1)
    return torch.exp(-6 * (images.float()[:, None] - colours).norm(dim=2).amin(1).mean((1, 2)))


def paper_of(images: Tensor) -> Tensor:
    """The paper's colour, (B, 3), read off the upper and lower edge, on which nothing is ever drawn."""
    return images.float()[:, :, (0, -1)].flatten(2).median(2).values


def embedding(image: Tensor, box: Sequence[int]) -> np.ndarray:
    """The tiny identity network: (11,), what stands in one of `BOXES` of a picture (3, 24, 24).

    Two halves of length 1: the colour (6), and the shape (4, and one more for everything else, letters included). Both
    are soft choices that allow for faded print, so that a pale circle is still the same circle; an empty box is all 0.
    """
    x0, y0, x1, y1 = box
    patch = image.float()[:, y0:y1, x0:x1].flatten(1)  # (3, pixels)
    ink = (patch - paper_of(image[None])[0][:, None]).norm(dim=0)  # (pixels,), how far each is from paper
    there = ink > INK
    if there.sum() < 8:  # grain, no thing
        return np.zeros(len(COLORS) + len(CLASSES) + 1)
    color = torch.softmax(-40 * color_distances(patch[:, there].median(1).values, COLORS), 0)  # (6,)
    fits = torch.full((len(CLASSES) + 1,), 0.5)  # what correlates less has another shape, see `detect`
    if tuple(box) == WORD_BOX:
        fits[:-1] = 0
    else:
        fits[:-1] = correlate(ink[None], _shapes())[0]
    shape = torch.softmax(20 * fits, 0)  # (5,)
    return torch.cat([color / color.norm(), shape / shape.norm()]).numpy()
