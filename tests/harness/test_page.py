"""Oracles for report.html: it is parsed, and what a reader sees is compared with what went in."""

import base64
import io
import json
import random
import re
import shlex
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from bench import curves
from harness import cli, ownership, page, tables
from settings import FIELDS, PRESETS, READERS, SettingsError


class Read(HTMLParser):
    """A page's tags with their attributes, its tables as rows of cells (a text and its pictures), and all its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.tables, self.text, self.raw, self.inside = [], [], "", text, False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = self.inside or tag == "table"
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append(["", []])
        elif tag == "img":
            data = base64.b64decode(dict(attrs)["src"].removeprefix("data:image/webp;base64,"), validate=True)
            self.tables[-1][-1][-1][1].append(Image.open(io.BytesIO(data)).convert("RGB"))

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "table"

    def handle_data(self, data):
        self.text += data
        if self.inside:
            self.tables[-1][-1][-1][0] += data.strip("\n")


MODELS = ["base", "a & b", "student"]
EVIL = 'a <script>alert("x")</script> & <img src=http://a.b/c.png> 你好 مرحبا'


def rows_of(folder, prompts=3, size=24, samples=1, paint=None):
    """Rows of an evaluation of two tasks: each picture has one color, which says whose it is, or what `paint` makes."""
    found, folder = [], folder / "pictures"
    folder.mkdir(parents=True)
    for m, model in enumerate(MODELS):
        for k, task in enumerate(("text", "quality")):
            for index in range(prompts):
                for sample in range(samples):
                    file = folder / f"{m}-{task}-{index}-{sample}.png"
                    color = (60 * m, 100 * k + sample, 20 * index)
                    picture = paint(size) if paint else Image.new("RGB", (size, size), color)
                    picture.save(file)
                    text = EVIL if (task, index) == ("text", 1) else f"{task} {index}"
                    found.append({"model": model, "prompt": text, "index": index, "sample": sample, "task": task,
                                  "tag": "", "picture": f"pictures/{file.name}", "sources": [],
                                  "scores": {"ocr": m / 4 + index / 100}})  # fmt: skip
    return found


def settings_of(*flags):
    return cli.parse(["--preset", "tiny", "--stage", "opd", "--name", "mine", *flags])[0]


def written(folder, rows=(), results=None, notes=(), warnings=(), flags=()):
    folder.mkdir(exist_ok=True)
    return Read(page.write(folder, settings_of(*flags), results or {}, rows, notes, warnings).read_text())


# -------------------------------------------------------------------------------------------------- contact sheet
def test_every_model_has_a_column_and_every_prompt_a_row_with_its_own_pictures(tmp_path):
    rows = rows_of(tmp_path, samples=2)
    sheet = written(tmp_path, rows).tables[-1]
    head, *body = sheet
    assert [text for text, _ in head] == ["", *MODELS]
    assert [row[0][0] for row in body] == ["text 0", EVIL, "text 2", "quality 0", "quality 1", "quality 2"]
    for i, (_, *cells) in enumerate(body):
        assert len(cells) == len(MODELS)
        for m, (text, (picture,)) in enumerate(cells):
            assert picture.size == (24, 24) and picture.getpixel((12, 12)) == (60 * m, 100 * (i // 3), 20 * (i % 3))
            assert text == f"{MODELS[m]}{m / 4 + i % 3 / 100:.2f}"


def test_a_picture_that_is_missing_leaves_its_cell_empty_and_moves_nothing(tmp_path):
    rows = [row for row in rows_of(tmp_path) if not (row["model"] == "a & b" and row["index"] == 1)]
    for row in written(tmp_path, rows).tables[-1][1:]:
        assert [len(pictures) for _, pictures in row[1:]] == [1, 0 if row[0][0] in (EVIL, "quality 1") else 1, 1]
    assert written(tmp_path / "none").tables[-1][0][0][0] == "setting", "no empty sheet without a picture"


def test_an_edits_source_stands_before_what_was_made_of_it(tmp_path):
    rows = rows_of(tmp_path, prompts=1)
    Image.new("RGB", (40, 20), (7, 8, 9)).save(tmp_path / "source.png")
    rows = [{**row, "sources": [str(tmp_path / "source.png")] * 2 * (row["task"] == "quality")} for row in rows]
    head, drawn, edited = written(tmp_path, rows).tables[-1]
    assert [text for text, _ in head] == ["", "source", *MODELS]
    assert drawn[1] == ["", []] and [p.size for p in edited[1][1]] == [(40, 20)] * 2
    assert edited[1][1][0].getpixel((0, 0)) == (7, 8, 9)
    assert [len(pictures) for _, pictures in drawn] == [0, 0, 1, 1, 1]


def test_a_page_stays_small_whatever_was_drawn(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)  # noise is what no format compresses
    noise = lambda size: Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))  # noqa: E731
    monkeypatch.setattr(page, "BUDGET", 200_000)
    found = written(tmp_path, rows_of(tmp_path, prompts=10, size=300, paint=noise))
    assert len(found.tables[-1]) == 1 + 2 * page.PROMPTS and len(found.raw) < 4 / 3 * 200_000 + 20_000
    monkeypatch.undo()
    real = written(tmp_path / "real", rows_of(tmp_path / "real", prompts=1, size=300)).tables[-1]
    assert real[1][1][1][0].size == (page.EDGE, page.EDGE)


# ---------------------------------------------------------------------------------------------------- the whole page
def test_a_page_needs_no_network_and_no_text_in_it_becomes_a_tag(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {i}, "gap": {1 / i}}}\n' for i in (1, 2, 3)))
    evil = {EVIL: {"scores": {EVIL: 0.5}, "tags": {EVIL: 0.5}}, "b": {"scores": {EVIL: 0.1}, "tags": {}}}
    found = written(tmp_path, rows_of(tmp_path), evil, [EVIL], [EVIL], ["--init", "runs/<b>x"])
    plain = {"html", "meta", "title", "style", "h1", "h2", "p", "pre", "small", "table", "thead", "tbody", "tr", "td"}
    svg = {"svg", "g", "path", "text", "defs", "use", "rect", "clippath"}
    assert {tag for tag, _ in found.tags} <= plain | svg | {"th", "b", "u", "div", "figure", "figcaption", "img"}
    links = [value for _, attrs in found.tags for key, value in attrs.items() if key.endswith(("src", "href"))]
    assert links and all(link.startswith(("#", "data:image/webp;")) for link in links)
    assert "@import" not in found.raw and not re.search(r"url\((?!#)", found.raw)
    assert found.text.count(EVIL) == 7, "notes, warnings, prompts, and the heads of the tables"


def test_a_warning_is_red_and_a_note_is_not(tmp_path):
    found = written(tmp_path, notes=["be calm"], warnings=["beware"])
    red = re.findall(r'class="red">(.*?)<', found.raw)
    assert red == ["beware"] and "be calm" in found.text and re.search(r"\.red\{color:#b0", found.raw)


def test_best_and_second_are_marked_and_bars_are_as_long_as_their_numbers(tmp_path):
    results = {name: {"scores": {"text": value}, "tags": {"counting": value}} for name, value in
               (("base", 0.25), ("merged", 0.5), ("student", 0.75))}  # fmt: skip
    del results["merged"]["tags"]["counting"]
    found = written(tmp_path, results=results)
    _, scores, tags = found.tables
    assert [[text for text, _ in row] for row in scores] == [
        ["model", "text"], ["base", "0.250"], ["merged", "0.500"], ["student", "0.750"]
    ]  # fmt: skip
    assert "<b>0.750</b>" in found.raw and "<u>0.500</u>" in found.raw and "<td>0.250" in found.raw
    assert [[text for text, _ in row] for row in tags] == [["tag", *results], ["counting", "0.25", "", "0.75"]]
    assert [float(part) for part in re.findall(r"--part:([\d.]+)%", found.raw)] == [25, 75]


# ------------------------------------------------------------------------------------------------- how it was made
def variations():
    """Command lines of every preset and stage, each with some flags of other values than the preset's."""
    rng = random.Random(1)
    for preset in PRESETS:
        for stage in READERS:
            chosen = {"preset": preset, "stage": stage}
            names = [n for n, f in FIELDS.items() if n not in ("preset", "stage", "config", "tasks", "task")
                     and stage in f.metadata["stages"]]  # fmt: skip
            for _ in range(12):
                given = dict(chosen)
                for name in rng.sample(names, 3):
                    f, usual = FIELDS[name], getattr(cli.unchecked(chosen), name)
                    choices = [c for c in f.metadata.get("choices", ()) if c not in ("", "eval")]
                    other = {bool: not usual, int: 3, float: 0.5, dict: {"text": "a b", "quality": "-c"}, str: "-x y'"}
                    given[name] = rng.choice(choices) if choices else other[f.type]
                yield given


def test_the_command_of_a_run_makes_the_same_run(monkeypatch):
    tried = 0
    for given in variations():
        try:
            s = cli.resolve(given)
        except SettingsError:
            continue
        if any(all(cli.why_unread(given, name)) for name in given.keys() - {"preset", "stage"}):
            continue  # a command line would be refused
        tried += 1
        words = shlex.split(cli.command_of(s))
        assert words[:2] == ["python", "eval.py" if s.stage == "eval" else "train.py"]
        again, _ = cli.parse(words[2:], words[1])
        assert ownership.recorded(again) == ownership.recorded(s), words
        differing = {name for name in FIELDS if getattr(s, name) != getattr(cli.unchecked(
            {"preset": s.preset, "stage": s.stage}), name)} & ownership.recorded(s).keys()  # fmt: skip
        assert differing == cli.differing(s).keys()
    assert tried > 200
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert cli.command_of(s).startswith("torchrun --nnodes=2 --nproc_per_node=8 ")


def test_a_report_leaves_every_number_for_programs_too(tmp_path):
    s = settings_of()
    row = {"scores": {"text": 0.25, "average": 0.25}, "tags": {}}
    assert page.write(tmp_path, s, {"student": row}) == tmp_path / "report.html"
    assert json.loads((tmp_path / "results.json").read_text()) == {"student": row}
    assert tables.lines_of({"student": row})[0].split("\n")[1] == "student  0.250    0.250"
    found = {"a": {**row, "tags": {"counting": 0.5}}, "b": row}
    assert "counting" in page.write(tmp_path, s, found).read_text()
    assert "a         0.500" in "\n".join(tables.lines_of(found))
    assert {"scores.tex", "scores.csv", "tags.md", "tags.json"} <= {p.name for p in tmp_path.iterdir()}
    assert not (tmp_path / "rows.jsonl").exists() and tables.lines_of({"a": {"scores": {}, "tags": {}}}) == []


def test_a_page_says_how_its_run_was_made(tmp_path):
    found = written(tmp_path, flags=["--lr", "0.125", "--init", "runs/m"])
    assert "--lr 0.125" in found.text and "--init runs/m" in found.text and page.commit() in found.text
    assert [[text for text, _ in row] for row in found.tables[0][1:]] == [
        ["name", "mine", "tiny-opd"], ["init", "runs/m", ""], ["lr", "0.125", "0.003"]
    ]  # fmt: skip
    assert re.search(r"20\d\d-\d\d-\d\d \d\d:\d\d UTC", found.text)


# ----------------------------------------------------------------------------------------------------------- curves
def metrics(folder, **columns):
    folder.mkdir()
    lines = [dict(zip(("step", *columns), row)) for row in zip(range(1, 99), *columns.values())]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def test_curves_of_runs_lie_over_each_other_and_constants_are_left_out(tmp_path, capsys):
    a = metrics(tmp_path / "a", gap=[3.0, 2.0, 1.5], ratio_mean=[1.0] * 3, seconds=[1.0] * 3)
    b = metrics(tmp_path / "b<b>", gap=[9.0, 8.0], ratio_mean=[1.0] * 2, seconds=[2.0] * 2)
    assert curves.main([a, b]) == 0
    found = Read(capsys.readouterr().out)
    plots = found.raw.split("<svg")[1:]
    assert len(plots) == 2 and "ratio_mean" not in found.text, "seconds are constant in each run, and not alike"
    for name, plot in zip(("gap", "seconds"), plots):
        text = Read("<svg" + plot).text
        assert "step" in text and name in text and a in text and b in text, "axes and runs are named"
        assert plot.count("stroke-width: 1.5") == 2 + 2, "a line each, and its sample in the legend"
    assert "[s]" in found.text
    assert curves.main([a, str(tmp_path / "nowhere")]) == 2 and "nowhere" in capsys.readouterr().err


def test_smoothing_keeps_a_constant_begins_at_the_first_value_and_follows_by_hand():
    assert page.smoothed([0.3] * 9) == pytest.approx([0.3] * 9)
    # w = 1/2: s_1 = 4; s_2 = (1/4 * 4 + 1/2 * 1) / (3/4) = 2; s_3 = (1/8 * 4 + 1/4 * 1 + 1/2 * 7) / (7/8) = 4.857
    assert page.smoothed([4.0, 1.0, 7.0], 0.5) == pytest.approx([4.0, 2.0, 34 / 7])
