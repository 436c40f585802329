"""Pictures: eight bits and back, and the sources of edits in every form in which users have them."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from data import pictures as P
from data.files import DataError, Prompt

PIXELS = np.random.default_rng(0).integers(0, 256, (4, 7, 3), np.uint8)
PICTURE = Image.fromarray(PIXELS)


def source(image, line=3):
    return Prompt("Make it red.", "edit", {"image": str(image)}, f"mine.jsonl:{line}")


def uri(picture):
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return P.PNG_URI + base64.b64encode(stream.getvalue()).decode()


def test_a_source_is_the_same_picture_from_a_file_and_from_the_line_itself(tmp_path):
    PICTURE.save(tmp_path / "a.png")
    drawn = P.data_uri(torch.from_numpy(PIXELS).permute(2, 0, 1) / 255)
    for where in (tmp_path / "a.png", uri(PICTURE), drawn):
        found = P.source_image(source(where))
        assert found.dtype == np.uint8 and np.array_equal(found, PIXELS)
        P.check_source(source(where))
    plain = Prompt("a fox", "t2i", {}, "x:1")
    P.check_source(plain)
    assert P.sources([plain, plain]) is None
    none, one = P.sources([plain, source(drawn)])
    assert none is None and torch.equal(one, torch.from_numpy(PIXELS.copy()).permute(2, 0, 1) / 255)


def test_a_source_is_upright_rgb_whatever_the_file_holds(tmp_path):
    assert np.array_equal(P.source_image(source(uri(PICTURE.getchannel(0)))), PIXELS[..., :1].repeat(3, -1))
    assert np.array_equal(P.source_image(source(uri(PICTURE.convert("RGBA")))), PIXELS)
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me clockwise by a quarter"
    PICTURE.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(P.source_image(source(tmp_path / "a.png")), np.rot90(PIXELS, -1))


def test_a_source_is_read_once_while_it_is_kept_and_checked_without_decoding(tmp_path, monkeypatch):
    P._decoded.cache_clear()
    PICTURE.save(tmp_path / "a.png")
    first = P.source_image(source(tmp_path / "a.png", 1))
    assert P.source_image(source(tmp_path / "a.png", 2)) is first
    for number in range(P.CACHED_PICTURES):
        P.source_image(source(uri(Image.new("RGB", (1, number + 1)))))
    assert P.source_image(source(tmp_path / "a.png")) is not first, "and not for ever"
    monkeypatch.setattr(Image.Image, "convert", None)
    P.check_source(source(tmp_path / "a.png"))


def test_a_source_that_cannot_be_used_is_named_by_its_line_before_and_when_it_is_needed(tmp_path):
    whole = base64.b64decode(uri(PICTURE).partition(",")[2])
    files = {"words": b"no picture", "empty": b"", "cut": whole[:60],
             "flipped": whole[:45] + bytes([whole[45] ^ 1]) + whole[46:]}  # fmt: skip  # a wrong checksum
    for name, content in files.items():
        (tmp_path / f"{name}.png").write_bytes(content)
    texts = (uri(PICTURE).replace(",", ",!"), P.PNG_URI + base64.b64encode(b"words").decode(), "data:image/png,raw")
    for where in (tmp_path / "none.png", tmp_path, *(tmp_path / f"{name}.png" for name in files), *texts):
        for look in (P.check_source, P.source_image):
            with pytest.raises(DataError, match="^mine.jsonl:3: ") as error:
                look(source(where))
            assert len(str(error.value)) < 300 and ("the image in the line" in str(error.value)) == (where in texts)
