"""Pictures in the layouts that official evaluators read: export/LAYOUT/MODEL/ below the run's folder.

    geneval    00000/{metadata.jsonl, samples/0000.png ...}      a folder a prompt, in their order
    compbench  CATEGORY/samples/PROMPT_000000.png                T2I-CompBench++; one number a picture
    dpg        ID.png                                            a 2 x 2 grid of a prompt's first four pictures
    gedit      fullset/TASK/{en,cn}/KEY.png                      GEdit-Bench; its results/METHOD is MODEL here
    flat       KEY.png or 00000-0.png, and paths.json            ImgEdit by the field `key`; GenEval 2 by {prompt: path}

Files are links to the drawn ones where the disk can link, and copies where it cannot.
"""

import filecmp
import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from PIL import Image

from data.benchmarks import COMPBENCH
from data.common import read_json, write_atomic
from harness.drawn import Picture
from settings import SettingsError

# T2I-CompBench++'s own code for the columns that need its detector, from its repository's root, and where it writes
# {"question_id": the file's number, "answer": the score} of each picture.
OFFICIAL = {
    "spatial": (["cd UniDet_eval && python 2D_spatial_eval.py --outpath={}"], "labels/annotation_obj_detection_2d"),
    "3d_spatial": (["cd UniDet_eval && python 3D_spatial_eval.py --outpath={}"], "labels/annotation_obj_detection_3d"),
    "numeracy": (["cd UniDet_eval && python numeracy_eval.py --outpath={}"], "annotation_num"),
    "complex": (
        ["cd BLIPvqa_eval && python BLIP_vqa.py --out_dir={}",
         "cd UniDet_eval && python 2D_spatial_eval.py --outpath={} --complex=True",
         "python CLIPScore_eval/CLIP_similarity.py --outpath={} --complex=True",
         "mkdir -p {}/annotation_obj_detection && "
         "cp {}/labels/annotation_obj_detection_2d/vqa_result.json {}/annotation_obj_detection",
         "cd 3_in_1_eval && python 3_in_1.py --outpath={}"], "annotation_3_in_1"),
}  # fmt: skip


def export(layout: str, where: Path, folder: Path, pictures: Sequence[Picture]) -> None:
    """Write a model's pictures, which are in `folder`, to `where` in a layout; those of an earlier command that are
    none of these go. SettingsError if it needs others."""
    files = places(layout, pictures)
    own = {f"{p.prompt.metadata['key']}.png" for p in files.values()} if layout == "dpg" else files
    for old in {*where.glob(LAYOUTS[layout][1])} - {where / place for place in own}:
        old.unlink()
    if layout == "dpg":
        return grids(where, folder, files)
    for place, picture in files.items():
        put(folder / picture.file, where / place)
        if layout == "geneval":
            line = json.dumps({**picture.prompt.metadata, "prompt": picture.prompt.text})
            write_atomic((where / place).parents[1] / "metadata.jsonl", line + "\n")
    if layout == "flat":
        paths = {p.prompt.text: str((where / place).absolute()) for place, p in files.items() if p.sample == 0}
        write_atomic(where / "paths.json", json.dumps(paths, indent=1, ensure_ascii=False) + "\n")


def places(layout: str, pictures: Sequence[Picture]) -> dict[str, Picture]:
    """{place: the picture that a layout has there}. SettingsError if there is none."""
    if not (found := LAYOUTS[layout][0](pictures)):
        raise SettingsError(f"--export {layout}: no test prompt has what this layout is made of, see docs/RUNNING.md")
    return found


def put(source: Path, target: Path) -> None:
    """The same file under another name; nothing is written if it is there, see `official`."""
    if target.exists() and (os.path.samefile(source, target) or filecmp.cmp(source, target, shallow=False)):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def geneval(pictures: Sequence[Picture]) -> dict[str, Picture]:
    own = [p for p in pictures if "include" in p.prompt.metadata and "tag" in p.prompt.metadata]
    return {f"{p.index:05}/samples/{p.sample:04}.png": p for p in own if p.task == own[0].task}


def compbench(pictures: Sequence[Picture]) -> dict[str, Picture]:
    own = numbered(pictures)
    # The evaluators read the prompt before the first "_" of the name.
    words = lambda p: p.prompt.text.rstrip(".").replace("_", " ").replace("/", " ")[:240]  # noqa: E731
    return {f"{category}/samples/{words(p)}_{number:06}.png": p for (category, number), p in own.items()}


def numbered(pictures: Sequence[Picture]) -> dict[tuple[str, int], Picture]:
    """{(category, number): picture} of T2I-CompBench++: numbers run prompt by prompt, as its own sampler counts."""
    own = [p for p in pictures if p.task in COMPBENCH]
    samples = 1 + max((p.sample for p in own), default=0)
    return {(p.task, p.index * samples + p.sample): p for p in own}


def gedit(pictures: Sequence[Picture]) -> dict[str, Picture]:
    found = {}
    for p in pictures:
        meta = p.prompt.metadata
        if p.sample == 0 and {"key", "task_type", "instruction_language"} <= set(meta):
            found[f"fullset/{meta['task_type']}/{meta['instruction_language']}/{meta['key']}.png"] = p
    return found


def flat(pictures: Sequence[Picture]) -> dict[str, Picture]:
    keys = [p.prompt.metadata.get("key") if p.sample == 0 else None for p in pictures]
    names = (str(k) if k and keys.count(k) == 1 else "" for k in keys)  # GEdit has a key in two languages
    return {f"{name or f'{p.task}-{p.index:05}-{p.sample}'}.png": p for name, p in zip(names, pictures, strict=True)}


def dpg(pictures: Sequence[Picture]) -> dict[str, Picture]:
    """The parts of the grids."""
    found = {f"{p.prompt.metadata['key']}-{p.sample}": p for p in pictures if p.task == "dpg" and p.sample < 4}
    if any(f"{p.prompt.metadata['key']}-3" not in found for p in found.values()):
        raise SettingsError("--export dpg: its grids have four pictures a prompt; add --samples 4")
    return found


def grids(where: Path, folder: Path, parts: Mapping[str, Picture]) -> None:
    """ID.png of each prompt: its four pictures, two a row."""
    where.mkdir(parents=True, exist_ok=True)
    for key in {p.prompt.metadata["key"] for p in parts.values()}:
        four = [Image.open(folder / parts[f"{key}-{n}"].file) for n in range(4)]
        width, height = four[0].size
        sheet = Image.new("RGB", (2 * width, 2 * height))
        for n, part in enumerate(four):
            sheet.paste(part, (n % 2 * width, n // 2 * height))
        sheet.save(where / f"{key}.png")


LAYOUTS: dict[str, tuple[Callable[[Sequence[Picture]], dict[str, Picture]], str]] = {  # and all places of pictures
    "geneval": (geneval, "*/samples/*.png"), "compbench": (compbench, "*/samples/*.png"), "dpg": (dpg, "*.png"),
    "gedit": (gedit, "fullset/*/*/*.png"), "flat": (flat, "*.png"),
}  # fmt: skip


# ---------------------------------------------------------------------------------- what official code says of them
def commands(where: Path, told: Collection[tuple[str, int, int]] = ()) -> list[str]:
    """The lines that score the categories in `where` (an export in the layout compbench) by the official code, but for
    those of which it has told scores."""
    known = {category for category, _, _ in told}
    there = {name: str((where / name).absolute()) for name in OFFICIAL if (where / name).is_dir() and name not in known}
    return [f"({line.replace('{}', place)})" for name, place in there.items() for line in OFFICIAL[name][0]]


def official(where: Path, pictures: Sequence[Picture]) -> dict[tuple[str, int, int], float]:
    """{(category, index, sample): the official score}, of the result files that are there and not older than the
    pictures, of which others may have been there before. DataError as `read_json`."""
    found, own = {}, numbered(pictures)
    for category, (_, place) in OFFICIAL.items():
        file, samples = where / category / place / "vqa_result.json", where / category / "samples"
        if file.is_file() and samples.is_dir() and file.stat().st_mtime_ns >= samples.stat().st_mtime_ns:
            for entry in read_json(file):
                p = own[category, int(entry["question_id"])]
                found[category, p.index, p.sample] = float(entry["answer"])
    return found
