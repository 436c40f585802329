"""What does a run leave for its reader: report.html (harness/page.py), and the same numbers for programs?

`save_grid` draws the picture of README.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from data.common import write_atomic
from data.pictures import to_picture
from harness import page, tables
from settings import Settings


# ------------------------------------------------------------------------------------------------------ pictures
def save_grid(file: Path, images: Sequence[Tensor], captions: Sequence[str]) -> None:
    """A grid of N images (3, H, W) in [0, 1], each with a caption (prompt and score) below.

    Small pictures, those of the tiny world, are enlarged until they can be seen. Real ones are shrunk to 256 pixels.
    The last image is as large as the model draws. Others, the sources of edits, may have another size and shape.
    """
    from harness import fonts  # and with it matplotlib: a twentieth of a start, paid when pictures are saved

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


def write_report(
    folder: Path, s: Settings, found: Mapping[str, dict], rows: Sequence[Mapping] = (), notes: Sequence[str] = (),
    warnings: Sequence[str] = (), more: Mapping[str, tables.Table] = {},  # noqa: B006
) -> Path:  # fmt: skip
    """A run's report.html (harness/page.py) -> its path; beside it the tables, results.json, and rows.jsonl if any.

    found: {name: {"scores": {column: number}, "tags": {tag: accuracy}}}; rows: one a picture (harness/suites.py);
    more: other tables, by name.
    """
    if rows:
        write_atomic(folder / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    shown = {**tables_of(found), **more}
    for key, table in shown.items():
        tables.write(folder, key, table)
    plain = {
        name: {key: {column: getattr(v, "value", v) for column, v in numbers.items()} for key, numbers in row.items()}
        for name, row in found.items()
    }
    write_atomic(folder / "results.json", json.dumps(plain, indent=1) + "\n")
    return page.write(folder, s, shown, rows, notes, warnings)
