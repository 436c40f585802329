"""What does a reader see of a run: pictures with their prompts and scores, curves, tables, one report?

    samples/*.png      grids of pictures, `save_grid`
    samples/curves.png one curve a key of metrics.jsonl, `plot_metrics`
    report.md          the table, GenEval's tags and all pictures, `write_report`
    results.json       the same numbers for programs
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from data.common import write_atomic
from data.files import Prompt
from rewards import to_picture
from tiny import drawings as tiny

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend must be chosen before)


# ------------------------------------------------------------------------------------------------------ pictures
def save_grid(file: Path, images: Sequence[Tensor], captions: Sequence[str]) -> None:
    """A grid of N images (3, H, W) in [0, 1], each with a caption (prompt and score) below, wrapped to its width.

    The tiny world's pixels are enlarged until they can be seen, real pictures shrunk to 256 pixels at most. The last
    image is as large as the model draws; others, sources of edits, may have another size and shape.
    """
    font, size = ImageFont.load_default(size=11), images[-1].shape[-1]
    edge, columns, lines = (size * 5, 8, 4) if size < 64 else (min(size, 256), 4, 6)
    scaling = Image.Resampling.NEAREST if edge > size else Image.Resampling.LANCZOS
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (edge + 8) + 8, rows * (edge + lines * 13 + 10) + 8), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = 8 + i % columns * (edge + 8), 8 + i // columns * (edge + lines * 13 + 10)
        sheet.paste(ImageOps.contain(to_picture(image), (edge, edge), scaling), (x, y))
        pen.rectangle((x - 1, y - 1, x + edge, y + edge), outline=(170, 170, 170))
        text = wrap(caption, edge, font)
        if len(text) > lines:  # a long prompt gives way, the score in the last line stays
            text = [*text[: lines - 2], text[lines - 2] + " ...", text[-1]]
        for k, line in enumerate(text):
            pen.text((x, y + edge + 2 + 13 * k), line, fill="black", font=font)
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file)


def wrap(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """Break text into lines no wider than `width` pixels; explicit line breaks stay."""
    lines = []
    for paragraph in text.split("\n"):
        lines.append("")
        for word in paragraph.split():
            longer = f"{lines[-1]} {word}".strip()
            if lines[-1] and font.getlength(longer) > width:
                lines.append(word)
            else:
                lines[-1] = longer
    return lines


def plot_metrics(folder: Path) -> list[Path]:
    """One curve a key of metrics.jsonl -> PNG files under samples/; [] where nothing was logged."""
    file = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    keys = sorted({k for row in rows for k in row} - {"step", "seconds"})
    if len(rows) < 2:
        return []
    columns = 3
    figure, axes = plt.subplots(
        -(-len(keys) // columns), columns, figsize=(12, 2.6 * -(-len(keys) // columns)), squeeze=False
    )
    for axis, key in zip(axes.flat, keys, strict=False):
        points = [(row["step"], row[key]) for row in rows if key in row]
        axis.plot(*zip(*points, strict=True), linewidth=1)
        axis.set_title(key, fontsize=9)
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(keys) :]:
        axis.axis("off")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure.tight_layout()
    target = folder / "samples" / "curves.png"
    figure.savefig(target, dpi=90)
    plt.close(figure)
    return [target]


def save_samples(
    folder: Path, name: str, result: dict, prompts: Mapping[str, Sequence[Prompt]], count: int = 16
) -> None:
    """One grid a task with prompts and, where there are any, scores: samples/NAME-TASK.png.

    Where result["sources"] has the source pictures of a task, each stands before what was made of it.
    """
    for task, (images, each) in result["images"].items():
        captions = [p.text for p in prompts[task][:count]]
        captions = [f"{caption}\n{value:.2f}" for caption, value in zip(captions, each, strict=False)] or captions
        shown = list(images[:count])
        if sources := result.get("sources", {}).get(task):
            shown = [image for pair in zip(sources[:count], shown, strict=True) for image in pair]
            captions = [text for caption in captions for text in ("source", caption)]
        save_grid(folder / "samples" / f"{name}-{task}.png", shown, captions)


# ---------------------------------------------------------------------------------------------- table and report
def markdown_table(rows: Mapping[str, Mapping[str, float]], digits: int = 3) -> str:
    """{name: {column: number}} -> a markdown table of every column that some row has; missing numbers stay empty."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [f"| model | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for name, row in rows.items():
        cells = [f"{row[c]:.{digits}f}" if c in row else "" for c in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_report(folder: Path, title: str, rows: Mapping[str, dict], notes: Sequence[str] = ()) -> Path:
    """report.md of a run: the table, GenEval's tags, the curves and every grid in samples/; results.json beside it.

    rows: {name: {"scores": {column: number}, "tags": {tag: accuracy}}}.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = [f"# {title}", ""]
    if any(row["scores"] for row in rows.values()):
        parts += [markdown_table({name: row["scores"] for name, row in rows.items()}), ""]
    if any(row["tags"] for row in rows.values()):
        tags = {n: {t: r["tags"][t] for t in tiny.TEST_TAGS if t in r["tags"]} for n, r in rows.items()}
        parts += ["Composition by GenEval tag:", "", markdown_table(tags), ""]
    parts += [*notes, ""]
    pictures = [*plot_metrics(folder), *sorted((folder / "samples").glob("*.png"))]
    for picture in dict.fromkeys(pictures):
        parts += [f"![{picture.stem}](samples/{picture.name})", ""]
    write_atomic(folder / "report.md", "\n".join(parts))
    write_atomic(folder / "results.json", json.dumps(rows, indent=1) + "\n")
    return folder / "report.md"
