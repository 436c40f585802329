"""Each layout is read as its official evaluator does it, by a reader written from the layout's description."""

import json
import os
import re
import subprocess
import time

import pytest
from PIL import Image

from data.files import Prompt
from harness import drawn, export
from settings import SettingsError

EDIT = {"task_type": "color_alter", "instruction_language": "en", "image": "x.png"}


@pytest.fixture
def made(tmp_path):
    """made(LAYOUT, prompts by task, samples): (the export's folder, the pictures), each of a colour of its own."""

    def make(layout, prompts, samples):
        pictures, folder = drawn.listed(prompts, samples), tmp_path / "drawn"
        folder.mkdir(exist_ok=True)
        for number, p in enumerate(pictures):
            Image.new("RGB", (6, 4), (number, 0, 0)).save(folder / p.file)
        export.export(layout, tmp_path / layout, folder, pictures)
        return tmp_path / layout, {(p.prompt.text, p.sample): number for number, p in enumerate(pictures)}

    return make


def color(file):
    return Image.open(file).getpixel((0, 0))[0]


def prompt(text, task="composition", **meta):
    return Prompt(text, task, meta, "p:1")


def test_geneval_has_a_folder_a_prompt_with_its_metadata_and_four_samples(made):
    lines = [{"tag": "counting", "include": [{"class": c, "count": 2}]} for c in ("cat", "dog")]
    prompts = [prompt(f"two {line['include'][0]['class']}s", **line) for line in lines]
    where, number = made("geneval", {"composition": prompts, "text": [prompt('"A"', "text")]}, 4)
    folders = sorted(p for p in where.iterdir() if p.name.isdigit())
    assert [p.name for p in folders] == ["00000", "00001"]
    for folder, line in zip(folders, lines, strict=True):
        told = json.loads((folder / "metadata.jsonl").read_text())
        assert {**line, "prompt": told["prompt"]} == told
        files = sorted((folder / "samples").iterdir())
        assert [f.name for f in files] == ["0000.png", "0001.png", "0002.png", "0003.png"]
        assert [color(f) for f in files] == [number[told["prompt"], n] for n in range(4)]


def test_compbench_has_its_prompt_and_number_in_each_name_and_takes_the_official_results_back(made):
    asked = {"color": ["a green bench and a blue bowl.", "a_b/c"], "numeracy": ["two cats", "one dog"]}
    prompts = {c: [prompt(t, "t2i", category=c) for t in texts] for c, texts in asked.items()}
    where, number = made("compbench", prompts, 3)
    for category, texts in asked.items():
        files = list((where / category / "samples").iterdir())
        files.sort(key=lambda f: int(f.name.split("_")[-1].split(".")[0]))  # as BLIP_vqa.py sorts them
        assert [int(f.name.split("_")[1].split(".png")[0]) for f in files] == [0, 1, 2, 3, 4, 5]  # as UniDet reads
        words = [re.sub("[_/]", " ", text.rstrip(".")) for text in texts for _ in range(3)]
        assert [f.name.split("_")[0] for f in files] == words
        assert [color(f) for f in files] == [number[text, n] for text in texts for n in range(3)]
    lines = export.commands(where)
    assert lines == [f"(cd UniDet_eval && python numeracy_eval.py --outpath={where.absolute()}/numeracy)"]
    result = where / "numeracy/annotation_num/vqa_result.json"
    result.parent.mkdir()
    result.write_text(json.dumps([{"question_id": n, "answer": n / 10} for n in (4, 0)]))
    told = export.official(where, drawn.listed(prompts, 3))
    assert told == {("numeracy", 1, 1): 0.4, ("numeracy", 0, 0): 0.0}
    assert not export.commands(where, told)
    for samples, is_there in ((3, True), (2, False)):  # the same pictures again; others, and none of the old ones
        os.utime(result, ns=(time.time_ns(),) * 2)
        made("compbench", prompts, samples)
        assert bool(export.official(where, drawn.listed(prompts, samples))) == is_there
    assert len([*where.rglob("*.png")]) == 4 * 2


def test_the_official_lines_give_the_same_result_when_they_are_run_again(tmp_path):
    """3_in_1.py reads annotation_obj_detection/vqa_result.json, where UniDet's scores have to be put each time."""
    labels = tmp_path / "complex/labels/annotation_obj_detection_2d"
    labels.mkdir(parents=True)
    line = next(line for line in export.commands(tmp_path) if "cp " in line)
    for scores in ("old", "new"):
        (labels / "vqa_result.json").write_text(scores)
        subprocess.run(line, shell=True, check=True)
        assert (tmp_path / "complex/annotation_obj_detection/vqa_result.json").read_text() == scores


def test_prompts_of_equal_words_have_a_place_each_by_their_keys(made):
    prompts = {"dpg": [prompt("a", "dpg", key=key) for key in ("1", "2")]}
    assert sorted(f.name for f in made("dpg", prompts, 4)[0].iterdir()) == ["1.png", "2.png"]
    edits = [prompt("make it red", "edit", key=key, **EDIT) for key in ("k1", "k2")]
    files = [f.name for f in made("gedit", {"edit": edits}, 1)[0].rglob("*.png")]
    assert sorted(files) == ["k1.png", "k2.png"]
    beside = {"edit": edits, "t2i": [prompt("a cat", "t2i")]}
    assert {"k1.png", "k2.png"} < {f.name for f in made("flat", beside, 2)[0].glob("*.png")}, "a first picture each"
    both = [edits[0], edits[1]._replace(metadata={**edits[0].metadata, "instruction_language": "cn"})]
    assert len([*made("flat", {"edit": both}, 1)[0].glob("*.png")]) == 2, "no key names two"


def test_dpg_has_a_grid_of_four_and_says_that_it_needs_four(made):
    prompts = {"dpg": [prompt(text, "t2i", key=key, category="dpg") for text, key in (("a", "17"), ("b", "x2"))]}
    where, number = made("dpg", prompts, 5)
    assert sorted(f.name for f in where.iterdir()) == ["17.png", "x2.png"]
    grid = Image.open(where / "17.png")
    assert grid.size == (12, 8)
    corners = [grid.getpixel(at)[0] for at in ((0, 0), (6, 0), (0, 4), (6, 4))]
    assert corners == [number["a", n] for n in range(4)]
    with pytest.raises(SettingsError, match="--samples 4"):
        made("dpg", prompts, 3)


def test_gedit_has_task_language_and_key_in_its_path(made):
    prompts = {"edit": [prompt("make it red", "edit", key="k1", **EDIT),
                        prompt("染红", "edit", key="k1", **{**EDIT, "instruction_language": "cn"})]}  # fmt: skip
    where, number = made("gedit", prompts, 1)
    assert color(where / "fullset/color_alter/en/k1.png") == number["make it red", 0]
    assert color(where / "fullset/color_alter/cn/k1.png") == number["染红", 0]


def test_flat_has_imgedits_keys_and_geneval_2s_paths(made):
    where, number = made("flat", {"edit": [prompt("a", "edit", key="7"), prompt("b", "edit", key="9")]}, 1)
    assert {f.stem: color(f) for f in where.glob("*.png")} == {"7": number["a", 0], "9": number["b", 0]}
    where, number = made("flat", {"text": [prompt("a", "text"), prompt("b", "text")]}, 2)
    paths = json.loads((where / "paths.json").read_text())
    assert {text: color(path) for text, path in paths.items()} == {"a": number["a", 0], "b": number["b", 0]}


@pytest.mark.parametrize("layout", ["geneval", "compbench", "gedit", "dpg"])
def test_prompts_without_what_a_layout_is_made_of_are_refused(made, layout):
    with pytest.raises(SettingsError, match=f"--export {layout}"):
        made(layout, {"quality": [prompt("a cat", "quality")]}, 4)
