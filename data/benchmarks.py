"""Prompts of published benchmarks, as their authors publish them: `--prompts BENCHMARK=PATH` with `--suite BENCHMARK`.

    table3      a folder with CATEGORY_val.txt, T2I-CompBench++ (F Table 3)
    geneval2    geneval2_data.jsonl: "prompt" and "vqa_list", questions with their right answers
    qwen-bench  a .jsonl or .json with a "prompt" a line (Q Table 1)
    dpg         a folder with ID.txt, one prompt each
"""

from collections.abc import Callable
from pathlib import Path

from data.common import DataError, read_objects, read_text
from data.files import Prompt

COMPBENCH = ("color", "shape", "texture", "spatial", "3d_spatial", "numeracy", "non_spatial", "complex")


def parts(name: str) -> tuple[str, ...]:
    """What a benchmark calls the parts of its prompts."""
    return COMPBENCH if name == "table3" else (name,)


def read(name: str, path: str, count: int) -> dict[str, list[Prompt]]:
    """{task: its first `count` prompts}; a prompt's task and category are the key. DataError names the file."""
    return READERS[name](Path(path), count)


def _prompt(text: object, category: str, source: str, **metadata) -> Prompt:
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{source}: the field 'prompt' is {text!r}; it must be a non-empty string")
    return Prompt(text.strip(), category, {"category": category, **metadata}, source)


def _table3(folder: Path, count: int) -> dict[str, list[Prompt]]:
    found = {}
    for category in COMPBENCH:
        file = folder / f"{category}_val.txt"
        lines = [(n, line.split("\t")[0]) for n, line in enumerate(read_text(file).split("\n"), 1) if line.strip()]
        found[category] = [_prompt(line, category, f"{file}:{n}", line=n) for n, line in lines[:count]]
    return found


def _geneval2(file: Path, count: int) -> dict[str, list[Prompt]]:
    found = []
    for source, line in read_objects(file)[:count]:
        atoms = line.get("vqa_list") if isinstance(line, dict) else None
        pairs = isinstance(atoms, list) and atoms and all(isinstance(a, list) and len(a) == 2 for a in atoms)
        if not pairs or not all(isinstance(text, str) and text for atom in atoms for text in atom):
            raise DataError(f"{source}: the field 'vqa_list' is {atoms!r}; it must be a list of [question, answer]")
        found.append(_prompt(line.get("prompt"), "geneval2", source, vqa_list=atoms))
    return {"geneval2": found}


def _lines(file: Path, count: int) -> dict[str, list[Prompt]]:
    found = read_objects(file)[:count]
    if not all(isinstance(line, dict) for _, line in found):
        raise DataError(f"{file}:0: not all of its values are JSON objects")
    return {"qwen-bench": [_prompt(line.get("prompt"), "qwen-bench", source) for source, line in found]}


def _dpg(folder: Path, count: int) -> dict[str, list[Prompt]]:
    files = sorted(folder.glob("*.txt"))[:count]
    if not files:
        raise DataError(f"{folder}:0: no ID.txt in this folder")
    return {"dpg": [_prompt(read_text(file).replace("\n", " "), "dpg", f"{file}:1", key=file.stem) for file in files]}


READERS: dict[str, Callable[[Path, int], dict[str, list[Prompt]]]] = {
    "table3": _table3, "geneval2": _geneval2, "qwen-bench": _lines, "dpg": _dpg,
}  # fmt: skip
