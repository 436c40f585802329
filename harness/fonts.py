"""Captions in any script: Chinese, Japanese, Korean, Arabic, Hebrew, emoji and others, beside Latin letters.

matplotlib (3.11 on) joins Arabic letters, lays lines from right to left, and takes each letter from the first of
several fonts that has it. Here the fonts are chosen. DejaVu Sans comes with matplotlib; what it lacks is looked for in
the extra `fonts` (Noto) and in the system's fonts.
"""

import logging
import re
import textwrap
import unicodedata
import warnings
from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from PIL import Image

from harness import ranks

PACKAGES = ("manimgx_fonts", "manimgx_fonts_cjk")  # of the extra: nothing but Noto's files
PIXELS = 10  # the letters' size
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # it tells of each weight that a font lacks


@cache
def known() -> list[str]:
    """The families that there are, Noto's first; matplotlib's own list misses fonts that came after its first run."""
    listed = {entry.fname for entry in font_manager.fontManager.ttflist}
    places = [p for name in PACKAGES if (spec := find_spec(name)) for p in spec.submodule_search_locations]
    more = [str(file) for place in places for file in Path(place).glob("*.tt[fc]")]
    for file in {*more, *font_manager.findSystemFonts()} - listed:
        try:
            font_manager.fontManager.addfont(file)
        except Exception:  # a bitmap font, or a broken one, raises nearly anything
            continue
    names = {entry.name for entry in font_manager.fontManager.ttflist if not entry.name.startswith("Last Resort")}
    return sorted(names, key=lambda name: (not name.startswith("Noto Sans"), name))


@cache
def letters_of(family: str) -> frozenset[int]:
    """The code points that a family has, in the file from which matplotlib would draw them."""
    found = font_manager.findfont(font_manager.FontProperties(family=family), fallback_to_default=False)
    return frozenset(FT2Font(found, face_index=found.face_index).get_charmap())


def families(text: str) -> tuple[list[str], str]:
    """(the families that draw a text, in the order in which they are asked for a letter; the letters that none has).

    Chinese and Japanese write some letters differently under one number: a text with kana is Japanese.
    """
    language = "JP" if re.search("[\u3040-\u30ff]", text) else "KR" if re.search("[\uac00-\ud7af]", text) else "SC"
    found, left = ["DejaVu Sans"], {c for c in text if not c.isspace() and unicodedata.category(c) not in ("Cc", "Cf")}
    left -= {chr(code) for code in letters_of(found[0])}
    for family in sorted(known(), key=lambda name: not name.endswith(f"CJK {language}")) if left else ():
        if has := {c for c in left if ord(c) in letters_of(family)}:
            found, left = [*found, family], left - has
    return found, "".join(sorted(left))


def wrapped(text: str, columns: int) -> list[str]:
    """The lines of a text; a wide letter of East Asia, or an emoji, takes two columns and needs no blank to break."""
    marked = "".join(c + "\0" * (unicodedata.east_asian_width(c) in "WF") for c in text)
    return [line.replace("\0", "") for part in marked.split("\n") for line in textwrap.wrap(part, columns)]


def written(picture: Image.Image, lines: Iterable[tuple[float, float, str]]) -> Image.Image:
    """A picture with lines of text on it, each at (x, y) of its upper left corner.

    A letter that no font has is shown as a question mark, and a line says once what to install.
    """
    figure = Figure([side / 72 for side in picture.size], dpi=72, facecolor="none")
    canvas, missing = FigureCanvasAgg(figure), ""
    for x, y, text in lines:
        asked, lost = families(text)
        missing += lost
        text = "".join("?" if c in lost else c for c in text)
        place = x / picture.width, 1 - y / picture.height
        for _ in range(3 if any("CJK" in family for family in asked) else 1):  # it is thin: once more makes it darker
            figure.text(*place, text, va="top", fontsize=PIXELS, family=asked, parse_math=False)
    with warnings.catch_warnings(action="ignore"):  # of a style or an invisible letter that a font lacks
        canvas.draw()
    if missing:
        ranks.tell_once("captions with ?: no font here has some of their letters; pip install -e '.[fonts]'")
    layer = Image.fromarray(np.asarray(canvas.buffer_rgba()))
    return Image.alpha_composite(picture.convert("RGBA"), layer).convert("RGB")
