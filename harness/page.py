"""What does a reader see of a run? One page, report.html, that needs no network and no other file.

    how it was made   the command that makes it again, date, commit, and the settings that differ from the preset's
    scores            a model is a row, a column of the evaluation is a column
    by tag            accuracies as bars
    pictures          one contact sheet: a prompt is a row, a model is a column (F Fig. 3, 7-9), with scores
    curves            metrics.jsonl, smoothed; `python -m bench.curves` lays those of several runs over each other

`PROMPTS` prompts a task are shown, each picture with at most `EDGE` pixels a side and its share of `BUDGET` bytes, so
that the pictures of a page take 4 MB at most, whatever was drawn.
"""

import base64
import io
import json
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from html import escape
from pathlib import Path

from PIL import Image

from data.common import write_atomic
from data.pictures import decode
from harness import cli, tables
from harness.run import read_metrics
from settings import Settings

PROMPTS, EDGE, BUDGET = 8, 256, 3 << 20
UNITS = {"seconds": "s", "memory": "GiB", "kl": "nats per dimension"}
STYLE = """
body{font:16px/1.45 system-ui,sans-serif;color:#1b1b1b;margin:1em auto;max-width:1200px;padding:0 12px}
h1,h2{line-height:1.2} pre{background:#f4f4f2;padding:10px;overflow-x:auto}
.red{color:#b00020;font-weight:600} .wide{overflow-x:auto} small,figcaption{color:#666;font-size:13px}
table{border-collapse:collapse} th,td{padding:4px 9px;text-align:right;white-space:nowrap;border-top:1px solid #ddd}
th:first-child{text-align:left;position:sticky;left:0;background:#fff} td small{display:block}
.facts td{white-space:normal;text-align:left;overflow-wrap:anywhere}
.bar{min-width:90px;background:linear-gradient(90deg,#bcd7ee var(--part),#0000 0)}
.sheet{width:100%;min-width:calc(160px + 100px*var(--n));table-layout:fixed} .sheet th:first-child{width:160px}
.sheet th,.sheet td{vertical-align:top;padding:4px;text-align:left;white-space:normal;overflow-wrap:anywhere}
.sheet tbody th{font-weight:400} .sheet img{width:100%;display:block} .sheet img.tiny{image-rendering:pixelated}
figure{margin:0} figcaption b{display:none;font-weight:400}
.curves{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(340px,100%),1fr));gap:8px}
svg{width:100%;height:auto}
@media(max-width:700px){.facts{table-layout:fixed;width:100%;font-size:14px}
.facts th:first-child{width:32%;white-space:normal}
.sheet{min-width:0} .sheet thead{display:none} figcaption b{display:block}
.sheet tr{display:grid;grid-template-columns:repeat(var(--n),112px)} .sheet td{border:0}
.sheet tbody th:first-child{grid-column:1/-1;width:auto;max-width:calc(100vw - 32px);border-top:2px solid #999}}
"""


def write(
    folder: Path, s: Settings, found: Mapping[str, Mapping], rows: Sequence[Mapping] = (), notes: Sequence[str] = (),
    warnings: Sequence[str] = (), more: Mapping[str, tables.Table] = {},  # noqa: B006
) -> Path:  # fmt: skip
    """report.html of a run -> its path. For programs beside it: the tables, results.json, and rows.jsonl if any.

    found: {name: {"scores": {column: number}, "tags": {tag: accuracy}}}; rows: one a picture (harness/suites.py); notes
    stand below the tables, warnings in red at the top; more: other tables, by name.
    """
    if rows:
        write_atomic(folder / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    shown = {**tables.of_evaluation(found), **more}
    for key, own in shown.items():
        tables.write(folder, key, own)
    plain = {
        name: {key: {column: getattr(v, "value", v) for column, v in numbers.items()} for key, numbers in row.items()}
        for name, row in found.items()
    }
    write_atomic(folder / "results.json", json.dumps(plain, indent=1) + "\n")
    parts = [
        f"<h1>{escape(s.name)}</h1>", *(f'<p class="red">{escape(text)}</p>' for text in warnings), made_by(s),
        *(part for key, own in shown.items() if key != "tags" for part in section(key.capitalize(), table(own))),
        *(f"<p>{escape(text)}</p>" for text in notes), *section("By tag", "tags" in shown and bars(shown["tags"])),
        *section("Pictures", sheet(folder, rows)), *section("Curves", curves({s.name: read_metrics(folder)})),
    ]  # fmt: skip
    write_atomic(folder / "report.html", document(s.name, parts))
    return folder / "report.html"


def document(title: str, parts: Iterable[str]) -> str:
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
    return f"<!DOCTYPE html>\n<html>{head}<title>{escape(title)}</title><style>{STYLE}</style>\n" + "\n".join(parts)


def section(title: str, body: str) -> list[str]:
    """A part of the page under its title; nothing if there is nothing to show."""
    return [f"<h2>{title}</h2>", body] if body else []


# ------------------------------------------------------------------------------------------------- how it was made
def made_by(s: Settings) -> str:
    """The command that makes the run again, date and commit, and each setting that the preset has otherwise."""
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    facts = '<table class="facts"><tr><th>setting<td>here<td><small>preset</small>'
    for name, (value, usual) in cli.differing(s).items():
        facts += f"<tr><th>{name.replace('_', '_<wbr>')}<td>{escape(str(value))}<td><small>{escape(str(usual))}</small>"
    return f"<pre>{escape(cli.command_of(s))}</pre><p><small>{when}, commit {commit()}</small></p>{facts}</table>"


@cache
def commit() -> str:
    """The commit of this code, "+" if files of it have changed since; "unknown" outside of a repository."""
    asked = "git --no-optional-locks describe --always --abbrev=12 --exclude=* --dirty=+".split()
    try:
        here = Path(__file__).parent
        return subprocess.run(asked, cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# ----------------------------------------------------------------------------------------------------------- tables
def table(found: tables.Table) -> str:
    """A table of numbers with the papers' marks, intervals below them."""
    form = {"": "{}", "best": "<b>{}</b>", "second": "<u>{}</u>", "ceiling": "<b><u>{}</u></b>"}
    lines = [f"<tr><th>{escape(found.first)}" + "".join(f"<th>{escape(column)}" for column in found.columns)]
    for name, cells in tables.marked(found).items():
        numbers = ((*shown.partition(" "), mark) for shown, mark in cells)
        shown = (f"<td>{form[mark].format(value)}<small>{more}</small>" for value, _, more, mark in numbers)
        lines.append(f"<tr><th>{escape(name)}" + "".join(shown))
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def bars(found: tables.Table) -> str:
    """Accuracies in [0, 1] as bars: a tag is a row, a model is a column."""
    lines = ["<tr><th>tag" + "".join(f"<th>{escape(model)}" for model in found.rows)]
    for tag in found.columns:
        values = (found.cells(model).get(tag) for model in found.rows)
        shown = (f'<td class="bar" style="--part:{c.value:.1%}">{c.value:.2f}' if c else "<td>" for c in values)
        lines.append(f"<tr><th>{escape(tag)}" + "".join(shown))
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


# --------------------------------------------------------------------------------------------------------- pictures
def sheet(folder: Path, rows: Sequence[Mapping]) -> str:
    """The contact sheet of an evaluation's rows: the first sample of the first `PROMPTS` prompts of each task."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    shown: dict[tuple, dict] = {}
    for row in rows:
        if row["sample"] == 0 and row["index"] < PROMPTS:
            shown.setdefault((row["task"], row["index"]), {})[row["model"]] = row
    edits = max([len(row["sources"]) for row in rows], default=0)
    share, edits = BUDGET // (len(shown) * (len(models) + edits) or 1), edits > 0
    lines = []
    for found in shown.values():
        first = next(iter(found.values()))
        sources = (figure(Image.fromarray(decode(place)), "source", "", share) for place in first["sources"])
        cells = ["".join(sources)] * edits
        for model in models:
            row = found.get(model)
            cells.append(figure(Image.open(folder / row["picture"]), model, scores_of(row), share) if row else "")
        lines.append(f"<tr><th>{escape(first['prompt'])}" + "".join(f"<td>{cell}" for cell in cells))
    if not lines:
        return ""
    head = "".join(f"<th>{escape(name)}" for name in ["source"] * edits + models)
    body = f'<thead><tr><th>{head}</thead><tbody>{"".join(lines)}</tbody>'
    return f'<div class="wide"><table class="sheet" style="--n:{len(models) + edits}">{body}</table></div>'


def scores_of(row: Mapping) -> str:
    """A picture's scores by name; one that is alone needs no name."""
    named = [f"{name} {value:.2f}" for name, value in row["scores"].items()]
    return ", ".join(named) if len(named) > 1 else "".join(named).rpartition(" ")[2]


def figure(picture: Image.Image, model: str, scores: str, share: int) -> str:
    """A picture with its scores below; its model's name, too, on a phone, which has no room for a head of the table."""
    small = max(picture.size) < 64
    image = f'<img src="{uri(picture, share)}" alt="{escape(model)}"{" class=tiny" * small}>'
    return f"<figure>{image}<figcaption><b>{escape(model)}</b>{escape(scores)}</figcaption></figure>"


def uri(picture: Image.Image, share: int) -> str:
    """A picture as WebP in a data URI: at most `EDGE` pixels a side, and smaller until it has `share` bytes or fewer.

    One of the tiny world's, below 64 pixels, keeps every pixel as it is.
    """
    edge, picture = EDGE, picture.convert("RGB")
    while True:
        stream, small = io.BytesIO(), picture.copy()
        small.thumbnail((edge, edge), Image.Resampling.LANCZOS)
        small.save(stream, "WEBP", lossless=max(small.size) < 64, quality=80)
        if stream.tell() <= share or edge < 16:
            return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()
        edge = edge * 3 // 4


# ----------------------------------------------------------------------------------------------------------- curves
def curves(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """One plot for each metric of {run: its lines of metrics.jsonl}: every run's values, faint, and smoothed.

    A metric that has one value only, over all steps and runs, is left out.
    """
    values: dict[str, set] = {}
    for row in (row for lines in runs.values() for row in lines):
        for key in row.keys() - {"step"}:
            values.setdefault(key, set()).add(row[key])
    keys = sorted(key for key, found in values.items() if len(found) > 1)
    return f'<div class="curves">{"".join(plot(key, runs) for key in keys)}</div>' if keys else ""


def plot(key: str, runs: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """One metric of every run that has it over the steps, as SVG."""
    from matplotlib import rc_context  # half a second, paid only by who draws
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(4.4, 2.9), layout="constrained")
    axis = drawn.add_subplot()
    for i, (name, rows) in enumerate(runs.items()):
        found = [(row["step"], row[key]) for row in rows if key in row]
        steps, raw = [step for step, _ in found], [value for _, value in found]
        every, color = max(1, len(found) // 400), f"C{i}"
        axis.plot(steps[::every], raw[::every], color, alpha=0.25, linewidth=0.8)
        axis.plot(steps[::every], smoothed(raw)[::every], color, label=name, linewidth=1.5)
    axis.set(title=key, xlabel="step", ylabel=f"{key} [{UNITS[key]}]" if key in UNITS else key)
    axis.grid(alpha=0.3)
    if len(runs) > 1:
        axis.legend(fontsize=8)
    stream = io.StringIO()
    with rc_context({"svg.fonttype": "none"}):  # text stays text
        drawn.savefig(stream, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = stream.getvalue()
    return svg[svg.index("<svg") :]


def smoothed(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """The exponential mean s_n = w s_{n-1} + (1 - w) x_n, over 1 - w^n, so that it begins at x_1."""
    found, mean = [], 0.0
    for n, value in enumerate(values, 1):
        mean = weight * mean + (1 - weight) * value
        found.append(mean / (1 - weight**n))
    return found
