"""Marks and preferences from files: read in order, refused by line, and split by prompt."""

import json

import numpy as np
import pytest
from PIL import Image

from data import preferences as P
from data.files import DataError

GOOD = {"image": "a.png", "prompt": "p", "score": 4}
PAIR = {"image_w": "a.png", "image_l": "a.png", "prompt": "p"}


def picture(file, seed=0):
    file.parent.mkdir(exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save(file)
    return file


def write(folder, *lines, name="marks.jsonl"):
    file = folder / name
    file.write_bytes(b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines))
    return file


def test_both_kinds_of_lines_are_read_in_order_with_paths_relative_to_their_file(tmp_path):
    a, b = picture(tmp_path / "images/a.png"), picture(tmp_path / "b.png", seed=1)
    marks = write(tmp_path, {"image": "images/a.png", "prompt": "p", "score": 4}, b"", b"  ",
                  {"image": str(b), "prompt": "q", "score": 2.5, "annotator": "kept out"})  # fmt: skip
    assert P.read(marks, "pointwise") == [P.Sample(a, "p", 4.0), P.Sample(b, "q", 2.5)]
    pairs = write(tmp_path, {"image_w": "b.png", "image_l": "images/a.png", "prompt": "r"})
    assert P.read(str(pairs), "pairwise") == [P.Pair(b, a, "r")]


BAD = {
    "no JSON": b"{", "no UTF-8": b'{"image": "\xff"}', "no object": [1], "an empty prompt": GOOD | {"prompt": ""},
    "a number for a path": GOOD | {"image": 3}, "a pair among marks": PAIR, "a mark of 0": GOOD | {"score": 0},
    "a mark beyond 5": GOOD | {"score": 5.01}, "a mark that is true": GOOD | {"score": True},
    "a mark in letters": GOOD | {"score": "4"}, "a mark that is nan": json.dumps(GOOD | {"score": np.nan}).encode(),
    "no mark": {"image": "a.png", "prompt": "p"}, "no picture": GOOD | {"image": "none.png"},
    "a text for a picture": GOOD | {"image": "marks.jsonl"},
    "pairwise: a mark": GOOD, "pairwise: one picture": {"image_w": "a.png", "prompt": "p"},
    "pairwise: no picture": PAIR | {"image_l": "none.png"},
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, name):
    picture(tmp_path / "a.png")
    pairwise = name.startswith("pairwise")
    file = write(tmp_path, PAIR if pairwise else GOOD, b"", BAD[name])
    with pytest.raises(DataError) as error:
        P.read(file, "pairwise" if pairwise else "pointwise")
    assert str(error.value).startswith(f"{file}:3: ") and "\n" not in str(error.value)


def test_a_file_that_is_missing_or_empty_and_a_picture_that_breaks_off_are_named(tmp_path):
    for file in (tmp_path / "no.jsonl", write(tmp_path, b"", b" ")):
        with pytest.raises(DataError, match=f"^{file}:0: "):
            P.read(file, "pointwise")
    whole = picture(tmp_path / "half.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    (sample,) = P.read(write(tmp_path, GOOD | {"image": "half.png"}), "pointwise")  # its header is fine
    with pytest.raises(DataError, match=f"^{sample.image}: "):
        P.read_picture(sample.image)


def test_the_holdout_is_a_share_of_the_prompts_the_same_one_everywhere():
    samples = [P.Sample(None, f"prompt {i // 2}", 3.0) for i in range(4000)]
    training, held = P.split(samples, 0.2)
    assert len(training) + len(held) == 4000 and 0.17 < len(held) / 4000 < 0.23
    assert not {s.prompt for s in training} & {s.prompt for s in held}, "both pictures of a prompt are on one side"
    pairs = [P.Pair(None, None, s.prompt) for s in reversed(samples)]
    assert {p.prompt for p in P.split(pairs, 0.2)[1]} == {s.prompt for s in held}, "whatever else is in the file"
    assert {s.prompt for s in held} < {s.prompt for s in P.split(samples, 0.3)[1]}, "a larger share keeps the smaller"
