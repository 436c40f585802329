"""What does a reader see of a run: pictures with their prompts and scores, curves, tables, one report?

samples/*.png      grids of pictures, `save_grid`
samples/curves.png one curve for each key of metrics.jsonl, `plot_metrics`
report.md          the table, accuracies by tag and all pictures, `write_report`
results.json       the same numbers for programs
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from data.common import write_atomic
from data.pictures import decode, to_picture
from harness import fonts, tables
from harness.run import read_metrics


# ------------------------------------------------------------------------------------------------------ pictures
def save_grid(file: Path, images: Sequence[Tensor], captions: Sequence[str]) -> None:
    """A grid of N images (3, H, W) in [0, 1], each with a caption (prompt and score) below.

    Small pictures, those of the tiny world, are enlarged until they can be seen. Real ones are shrunk to 256 pixels.
    The last image is as large as the model draws. Others, the sources of edits, may have another size and shape.
    """
    size, lettering = images[-1].shape[-1], []
    edge, columns, lines = (size * 5, 8, 4) if size < 64 else (min(size, 256), 4, 6)
    scaling = Image.Resampling.NEAREST if edge > size else Image.Resampling.LANCZOS
    height = edge + lines * 13 + 10  # of a picture with its caption
    sheet = Image.new("RGB", (columns * (edge + 8) + 8, -(-len(images) // columns) * height + 8), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = 8 + i % columns * (edge + 8), 8 + i // columns * height
        sheet.paste(ImageOps.contain(to_picture(image), (edge, edge), scaling), (x, y))
        pen.rectangle((x - 1, y - 1, x + edge, y + edge), outline=(170, 170, 170))
        text = fonts.wrapped(caption, edge // 6)  # 6 pixels a letter
        if len(text) > lines:  # a long prompt is cut, the score in the last line stays
            text = [*text[: lines - 2], text[lines - 2] + " ...", text[-1]]
        lettering += [(x, y + edge + 2 + 13 * row, line) for row, line in enumerate(text)]
    file.parent.mkdir(parents=True, exist_ok=True)
    fonts.written(sheet, lettering).save(file)


def plot_metrics(folder: Path, columns: int = 3) -> list[Path]:
    """One curve for each key of metrics.jsonl -> PNG files under samples/; none before two steps are logged."""
    rows = read_metrics(folder)
    if len(rows) < 2:
        return []
    keys = sorted({k for row in rows for k in row} - {"step", "seconds"})
    height = -(-len(keys) // columns)
    figure = Figure(figsize=(12, 2.6 * height), layout="constrained")
    for i, key in enumerate(keys, 1):
        axis = figure.add_subplot(height, columns, i)
        axis.plot(*zip(*((row["step"], row[key]) for row in rows if key in row), strict=True), linewidth=1)
        axis.set_title(key, fontsize=9)
        axis.grid(alpha=0.3)
    figure.savefig(folder / "samples" / "curves.png", dpi=90)
    return [folder / "samples" / "curves.png"]


def save_samples(folder: Path, rows: Sequence[Mapping], count: int = 16) -> None:
    """A grid for each model and task of an evaluation's rows, with prompts and scores: samples/MODEL-TASK.png.

    The source pictures of an edit stand before what was made of them.
    """
    tasks: dict[tuple[str, str], list] = {}
    for row in rows:
        if row["sample"] == 0:
            tasks.setdefault((row["model"], row["task"]), []).append(row)
    for (model, task), some in tasks.items():
        shown, captions = [], []
        for row in some[:count]:
            scores = "  ".join(f"{metric} {value:.2f}" for metric, value in row["scores"].items())
            places = (*row["sources"], folder / row["picture"])
            shown += [torch.from_numpy(decode(place)).permute(2, 0, 1) / 255 for place in places]
            captions += [*["source"] * len(row["sources"]), f"{row['prompt']}\n{scores}"]
        save_grid(folder / "samples" / f"{model.replace(' ', '-')}-{task}.png", shown, captions)


# ---------------------------------------------------------------------------------------------- table and report
def tables_of(rows: Mapping[str, dict]) -> dict[str, tables.Table]:
    """{"scores": table, "tags": table}, each if some row has any; see `write_report`."""
    return {key: tables.of_evaluation(rows, key) for key in ("scores", "tags") if any(r[key] for r in rows.values())}


def lines_of(rows: Mapping[str, dict]) -> list[str]:
    """The lines of the tables in Markdown."""
    found = []
    for key, table in tables_of(rows).items():
        found += [*({"tags": ["By tag:", ""]}.get(key, [])), tables.markdown(table), ""]
    return found


def write_report(folder: Path, title: str, rows: Mapping[str, dict], notes: Sequence[str] = ()) -> Path:
    """report.md of a run: the table, accuracies by tag, the curves and every grid in samples/; results.json beside it.

    rows: {name: {"scores": {column: number}, "tags": {tag: accuracy}}}.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = [f"# {title}", "", *lines_of(rows), *notes, ""]
    pictures = [*plot_metrics(folder), *sorted((folder / "samples").glob("*.png"))]
    for picture in dict.fromkeys(pictures):
        parts += [f"![{picture.stem}](samples/{picture.name})", ""]
    write_atomic(folder / "report.md", "\n".join(parts))
    for key, table in tables_of(rows).items():
        tables.write(folder, key, table)
    plain = {
        name: {key: {column: getattr(v, "value", v) for column, v in numbers.items()} for key, numbers in row.items()}
        for name, row in rows.items()
    }
    write_atomic(folder / "results.json", json.dumps(plain, indent=1) + "\n")
    return folder / "report.md"
