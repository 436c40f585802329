"""Oracles for what a run leaves: the size and the pixels of a grid, captions that fit, numbers for programs."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from harness import cli, fonts, ranks, report


@pytest.fixture
def written(monkeypatch):
    """The captions that are drawn from now on: (x, y, lines)."""
    found, real = [], fonts.written

    def written(picture, lines):
        for x, y, line in lines:
            if found and found[-1][0] == x and y == found[-1][1] + 13 * len(found[-1][2]):
                found[-1][2].append(line)
            else:
                found.append((x, y, [line]))
        return real(picture, lines)

    monkeypatch.setattr(fonts, "written", written)
    return found


def sheet(file):
    return Image.open(file).convert("RGB")


# -------------------------------------------------------------------------------------------------------- pictures
def test_a_grid_has_the_size_and_the_pixels_that_its_images_ask_for(tmp_path):
    # 10 images of 24 px, five times as large, eight a row: 8 * (120+8) + 8 wide, 2 * (120 + 4*13 + 10) + 8 high.
    images = torch.zeros(10, 3, 24, 24)
    images[:, 0] = torch.arange(0, 200, 20)[:, None, None] / 255  # redder and redder
    images[9, 1, 0, 23] = 1.0  # a mark in the last one's upper right corner
    report.save_grid(tmp_path / "samples/grid.png", images, ["a caption"] * 10)
    found = sheet(tmp_path / "samples/grid.png")
    assert found.size == (1032, 372)
    for i in range(10):
        assert found.getpixel((8 + i % 8 * 128 + 60, 8 + i // 8 * 182 + 60)) == (20 * i, 0, 0)
    corner = (8 + 128 + 119, 8 + 182)
    assert found.getpixel(corner) == found.getpixel((corner[0] - 4, corner[1] + 4)) == (180, 255, 0)
    assert found.getpixel((corner[0] - 5, corner[1])) == (180, 0, 0), "neither turned nor mirrored, and not blurred"
    caption = np.asarray(found)[8 + 120 + 2 : 8 + 120 + 15, 8:128]
    assert (caption < 100).any(), "the caption stands below its picture"
    with pytest.raises(ValueError, match="zip"):
        report.save_grid(tmp_path / "grid.png", images, ["one"])


@pytest.mark.parametrize("size, edge", [(512, 256), (64, 64)])
def test_a_real_picture_is_shrunk_until_four_fit_a_row_and_never_enlarged(tmp_path, size, edge):
    # Four a row, six lines: 4 * (edge+8) + 8 wide, 2 * (edge + 6*13 + 10) + 8 high.
    images = torch.zeros(5, 3, size, size)
    images[:, :, :, size // 2 :] = 1.0  # black on the left, white on the right
    report.save_grid(tmp_path / "grid.png", images, [""] * 5)
    found = sheet(tmp_path / "grid.png")
    assert found.size == (4 * (edge + 8) + 8, 2 * (edge + 88) + 8)
    for x, y in ((8, 8), (8 + 3 * (edge + 8), 8), (8, 8 + edge + 88)):
        row = np.asarray(found)[y + edge // 2, x : x + edge, 0]
        assert row[: edge // 2 - 4].max() < 5 and row[edge // 2 + 4 :].min() > 250


@pytest.mark.parametrize("size, most", [(24, 4), (128, 6)])
def test_a_long_caption_is_cut_and_the_score_in_its_last_line_stays(tmp_path, written, size, most):
    long = "a very long prompt about " + " and ".join(f"animal number {i}" for i in range(40))
    images = torch.zeros(2, 3, size, size)
    report.save_grid(tmp_path / "g.png", images, [f"{long}\n0.75", "short\n0.25"])
    (x, y, first), (_, _, second) = written
    edge = 120 if size == 24 else 128
    assert (x, y) == (8, 8 + edge + 2) and len(first) == most and first[-1] == "0.75"
    shown = " ".join(first[:-1])
    assert shown.endswith(" ...") and long.startswith(shown.removesuffix(" ...")) and len(shown) > 30
    assert second == ["short", "0.25"]
    assert max(len(line) for line in first) <= edge // 6 + 4, "as wide as its picture"


SCRIPTS = ["一只猫", "日本の猫", "고양이", "قطة", "חתול", "кот", "बिल्ली", "แมว", "🐱❤️", "a cat, 9 €"]


def ink(text):
    """How dark each pixel is of a line of text alone."""
    blank = Image.new("RGB", (120, 20), "white")
    return 255 - np.asarray(fonts.written(blank, [(2, 2, text)]).convert("L")).astype(int)


@pytest.mark.parametrize("text", SCRIPTS)
def test_every_script_is_drawn_letter_by_letter_with_the_extra_fonts(text):
    pytest.importorskip("manimgx_fonts_cjk")
    assert ink(text).max() > 100 and fonts.families(text)[1] == ""
    if text[0] not in "a\N{CAT FACE}":  # right to left, or joined: the letters in another order are another picture
        assert not np.array_equal(ink(text), ink(text[::-1]))
    assert not np.array_equal(ink(text), ink("?" * len(text)))


def test_arabic_is_joined_and_runs_from_right_to_left():
    joined, apart = ink("\u0642\u0637\u0629"), ink("\u0642 \u0637 \u0629")
    assert (joined.max(0) > 99).nonzero()[0].max() < (apart.max(0) > 99).nonzero()[0].max()
    both = ink("\u0642 \u0631")  # the first letter, the wider one, stands on the right
    columns = (both.max(0) > 99).nonzero()[0]
    gap = np.diff(columns).argmax()
    assert columns[-1] - columns[gap + 1] > columns[gap] - columns[0]


def test_a_letter_that_no_font_has_is_a_question_mark_and_is_said_once(monkeypatch, capsys):
    monkeypatch.setattr(fonts, "known", lambda: ["DejaVu Sans"])
    ranks.tell_once.cache_clear()
    assert np.array_equal(ink("a \u732b"), ink("a ?")) and np.array_equal(ink("\u72ac"), ink("?"))
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "[fonts]" in said


def test_wide_letters_take_two_columns_and_lines_break_within_them():
    assert fonts.wrapped("\u4e00" * 5 + " ab\n\u4e00b", 4) == ["\u4e00" * 2, "\u4e00" * 2, "\u4e00", "ab", "\u4e00b"]
    assert fonts.wrapped("ab cde f", 6) == ["ab cde", "f"]


# ---------------------------------------------------------------------------------------------------------- reports
def test_a_report_leaves_every_number_for_programs_too(tmp_path):
    s = cli.parse(["--preset", "tiny", "--stage", "merge"])[0]
    row = {"scores": {"text": 0.25, "average": 0.25}, "tags": {}}
    assert report.write_report(tmp_path, s, {"student": row}) == tmp_path / "report.html"
    assert json.loads((tmp_path / "results.json").read_text()) == {"student": row}
    assert report.lines_of({"student": row})[0].split("\n")[2] == "| student | 0.250 | 0.250 |"
    found = {"a": {**row, "tags": {"counting": 0.5}}, "b": row}
    page = report.write_report(tmp_path, s, found).read_text()
    assert "counting" in page and "| a | 0.500 |" in "\n".join(report.lines_of(found))
    assert {"scores.tex", "scores.csv", "tags.md", "tags.json"} <= {p.name for p in tmp_path.iterdir()}
    assert not (tmp_path / "rows.jsonl").exists() and report.lines_of({"a": {"scores": {}, "tags": {}}}) == []
