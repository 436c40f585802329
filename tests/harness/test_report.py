"""Oracles for what a reader sees: the size and the pixels of a grid, lines that fit, tables by hand, and a report
that shows every picture and every number.
"""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from data.files import Prompt
from harness import report
from tiny import drawings as tiny


@pytest.fixture
def written(monkeypatch):
    """The lines that are drawn from now on: (x, y, text)."""
    found, real = [], ImageDraw.ImageDraw.text

    def text(pen, at, line, **kwargs):
        found.append((*at, line))
        real(pen, at, line, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return found


# -------------------------------------------------------------------------------------------------------- pictures
def test_a_grid_has_the_size_and_the_pixels_that_its_images_ask_for(tmp_path):
    # 10 images of 24 px, five times as large, eight a row: 8 * (120+8) + 8 wide, 2 * (120 + 4*13 + 10) + 8 high.
    images = torch.zeros(10, 3, 24, 24)
    images[:, 0] = torch.arange(0, 200, 20)[:, None, None] / 255  # redder and redder
    images[9, 1, 0, 23] = 1.0  # a mark in the last one's upper right corner
    file = tmp_path / "samples/grid.png"
    report.save_grid(file, images, ["a caption"] * 10)
    sheet = Image.open(file).convert("RGB")
    assert sheet.size == (1032, 372)
    for i in range(10):
        x, y = 8 + i % 8 * 128, 8 + i // 8 * 182
        assert sheet.getpixel((x + 60, y + 60)) == (20 * i, 0, 0)
    corner = (8 + 128 + 119, 8 + 182)
    assert sheet.getpixel(corner) == sheet.getpixel((corner[0] - 4, corner[1] + 4)) == (180, 255, 0)
    assert sheet.getpixel((corner[0] - 5, corner[1])) == (180, 0, 0), "neither turned nor mirrored, and not blurred"
    caption = np.asarray(sheet)[8 + 120 + 2 : 8 + 120 + 15, 8:128]
    assert (caption < 100).any(), "the caption stands below its picture"
    with pytest.raises(ValueError, match="zip"):
        report.save_grid(file, images, ["one"])


@pytest.mark.parametrize("size, edge", [(512, 256), (256, 256), (64, 64)])
def test_a_real_picture_is_shrunk_until_four_fit_a_row_and_never_enlarged(tmp_path, size, edge):
    # Four a row, six lines: 4 * (edge+8) + 8 wide, 2 * (edge + 6*13 + 10) + 8 high.
    images = torch.zeros(5, 3, size, size)
    images[:, :, :, size // 2 :] = 1.0  # black on the left, white on the right
    report.save_grid(tmp_path / "grid.png", images, [""] * 5)
    sheet = Image.open(tmp_path / "grid.png").convert("RGB")
    assert sheet.size == (4 * (edge + 8) + 8, 2 * (edge + 88) + 8)
    for x, y in ((8, 8), (8 + 3 * (edge + 8), 8), (8, 8 + edge + 88)):
        row = np.asarray(sheet)[y + edge // 2, x : x + edge, 0]
        assert row[: edge // 2 - 4].max() < 5 and row[edge // 2 + 4 :].min() > 250
        assert 100 < row.mean() < 155, "the whole width is there"


@pytest.mark.parametrize("size, most", [(24, 4), (128, 6)])
def test_a_long_caption_gives_way_and_the_score_in_its_last_line_stays(tmp_path, written, size, most):
    long = "a very long prompt about " + " and ".join(f"animal number {i}" for i in range(40))
    report.save_grid(tmp_path / "g.png", torch.zeros(2, 3, size, size), [f"{long}\n0.75", "short\n0.25"])
    edge = 120 if size == 24 else 128
    first = [(y, line) for x, y, line in written if x == 8]
    assert [y for y, _ in first] == [8 + edge + 2 + 13 * k for k in range(most)], "no more lines than there is room"
    shown = " ".join(line for _, line in first[:-1])
    assert shown.endswith(" ...") and long.startswith(shown.removesuffix(" ...")) and len(shown) > 30
    assert first[-1][1] == "0.75"
    assert [line for x, _, line in written if x > 8] == ["short", "0.25"], "a short one is left as it is"
    written.clear()
    fits = "\n".join("abcdef"[:most])
    report.save_grid(tmp_path / "g.png", torch.zeros(1, 3, size, size), [fits])
    assert "\n".join(line for *_, line in written) == fits, "what just fits is not cut"


def test_wrap_keeps_words_and_line_breaks_and_fits_the_width():
    font = ImageFont.load_default(size=11)
    text = "a photo of a red circle and a blue square\n0.75"
    lines = report.wrap(text, 100, font)
    assert " ".join(lines) == text.replace("\n", " ") and lines[-1] == "0.75" and len(lines) > 2
    assert all(font.getlength(line) <= 100 for line in lines)
    width = font.getlength(lines[0])
    assert report.wrap(text, width, font)[0] == lines[0], "a line that just fits stays whole"
    assert report.wrap("extraordinarily wide", 1, font) == ["extraordinarily", "wide"]
    assert report.wrap("", 100, font) == [""]


def test_curves_are_drawn_from_two_steps_on(tmp_path):
    (tmp_path / "samples").mkdir()
    assert report.plot_metrics(tmp_path) == []
    lines = [json.dumps({"step": s, "seconds": 1.0, "loss": 1 / s, "reward": s}) + "\n" for s in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text(lines[0])
    assert report.plot_metrics(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    assert report.plot_metrics(tmp_path) == [tmp_path / "samples/curves.png"]
    assert Image.open(tmp_path / "samples/curves.png").size == (1080, 234)


def test_samples_are_the_first_pictures_with_their_prompts_and_scores(tmp_path, written):
    prompts = {task: tiny.make_prompts(task, "test", 5) for task in ("text", "quality")}
    images = torch.rand(5, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    result = {"images": {"text": (images, [0.125, 1.0, 0.5, 0.0, 0.0]), "quality": (images, [])}}
    report.save_samples(tmp_path, "final", result, prompts, count=2)
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["final-quality.png", "final-text.png"]
    texts = [p.text for p in prompts["text"][:2]]
    by_column = [" ".join(line for x, _, line in written if x == 8 + 128 * i) for i in range(3)]
    quality = [p.text for p in prompts["quality"][:2]]
    assert by_column == [f"{texts[0]} 0.12 {quality[0]}", f"{texts[1]} 1.00 {quality[1]}", ""], "a score where one is"


# ---------------------------------------------------------------------------------------------- tables and reports
def test_a_table_is_aligned_markdown_and_missing_numbers_stay_empty():
    rows = {"base": {"text": 0.12345, "quality": 1}, "student": {"text": 0.5, "composition": 2}}
    assert report.markdown_table(rows).split("\n") == [
        "| model | text | quality | composition |",
        "|---|---:|---:|---:|",
        "| base | 0.123 | 1.000 |  |",
        "| student | 0.500 |  | 2.000 |",
    ]
    assert "| base | 0.1 | 1.0 |  |" in report.markdown_table(rows, digits=1)


def test_a_report_shows_every_picture_and_every_number(tmp_path):
    prompts = {"text": tiny.make_prompts("text", "test", 5)}
    images = torch.rand(5, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    row = {"scores": {"text": 0.25, "average": 0.25}, "tags": {}}
    report.save_samples(tmp_path, "final", {"images": {"text": (images, [0.1] * 5)}}, prompts, count=3)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5}\n')
    text = report.write_report(tmp_path, "my run", {"student": row}, ["A note."]).read_text()
    assert text.startswith("# my run\n") and "A note." in text
    assert "| model | text | average |\n" in text and "| student | 0.250 | 0.250 |" in text
    assert "GenEval tag" not in text, "nothing was scored by tags"
    shown = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert sorted(shown) == sorted(f"samples/{p.name}" for p in (tmp_path / "samples").glob("*.png"))
    assert sorted(shown) == ["samples/curves.png", "samples/final-text.png"]
    assert json.loads((tmp_path / "results.json").read_text()) == {"student": row}
    tagged = {**row, "tags": {"counting": 0.5, "single_object": 1.0}}
    text = report.write_report(tmp_path, "r", {"a": tagged, "b": row}).read_text()
    assert "| model | single_object | counting |\n" in text and "| a | 1.000 | 0.500 |\n| b |  |  |" in text


def test_a_report_without_scores_has_no_table(tmp_path):
    row = {"scores": {}, "tags": {}}
    text = report.write_report(tmp_path / "new", "unscored", {"student": row}).read_text()
    assert text.startswith("# unscored\n") and "|" not in text
    assert json.loads((tmp_path / "new/results.json").read_text()) == {"student": row}
    assert "|" not in report.write_report(tmp_path / "new", "nothing", {}).read_text()


# ------------------------------------------------------------------------------------------------ pictures of edits
def edits(sources, results, scores=()):
    prompts = {"edit": [Prompt(f"edit {i}", "edit", {}, "x:1") for i in range(len(results))]}
    return {"images": {"edit": (results, list(scores))}, "sources": {"edit": sources}}, prompts


def test_each_source_stands_before_what_was_made_of_it(tmp_path, written):
    results = torch.arange(1, 4)[:, None, None, None].expand(3, 3, 24, 24) / 4
    result, prompts = edits([1 - image for image in results], results, [0.5, 0.25, 1.0])
    report.save_samples(tmp_path, "final", result, prompts, count=2)
    assert [line for *_, line in written] == ["source", "edit 0", "0.50", "source", "edit 1", "0.25"]
    sheet = Image.open(tmp_path / "samples/final-edit.png").convert("RGB")
    assert [sheet.getpixel((68 + 128 * i, 68))[0] for i in range(4)] == [191, 64, 128, 128]
    del result["sources"]
    report.save_samples(tmp_path, "plain", result, prompts, count=2)
    sheet = Image.open(tmp_path / "samples/plain-edit.png").convert("RGB")
    assert [sheet.getpixel((68 + 128 * i, 68))[0] for i in range(3)] == [64, 128, 255], "and without them as ever"


def test_a_source_of_another_size_and_shape_is_shown_whole_and_undistorted(tmp_path):
    wide = torch.zeros(3, 100, 400)
    wide[:, :, 200:] = 0.5  # black on the left, grey on the right
    result, prompts = edits([wide], torch.zeros(1, 3, 128, 128))
    report.save_samples(tmp_path, "s", result, prompts)
    sheet = np.asarray(Image.open(tmp_path / "samples/s-edit.png").convert("L"))
    assert sheet.shape == (128 + 88 + 8, 4 * 136 + 8), "as large as the result asks for"
    assert (sheet[8:40, 8:68] < 9).all() and (abs(sheet[8:40, 76:136].astype(int) - 128) < 9).all(), "128 x 32"
    assert (sheet[42:130, 10:134] > 250).all()


def test_a_source_is_needed_for_every_result(tmp_path):
    result, prompts = edits([torch.zeros(3, 24, 24)], torch.zeros(2, 3, 24, 24))
    with pytest.raises(ValueError, match="zip"):
        report.save_samples(tmp_path, "s", result, prompts)
