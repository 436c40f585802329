"""Every suite runs end to end, on a tiny SD3.5 and a tiny Qwen-Image-Edit, with tiny judges of the real classes.

A judge that writes its answer is a stand-in behind an endpoint: a random network writes none.
"""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch

import eval as evaluation
from harness import suites
from scorers import registry
from scorers.clip import HEAD_FILE, head_of
from tests.helpers.clip import SIDE, save_clip, save_detector
from tests.helpers.far import Far, Served
from tests.helpers.qwen_hub import build_vlm
from tests.helpers.runs import command, the_one_line
from tests.helpers.vqa import save_blip_vqa

PAGE = (Path(__file__).parents[2] / "docs/RUNNING.md").read_text()
CHECKLIST = "## Realism\n- Physical Logic: is it?\n- Material Texture: is it?\n## Detail\n- Noise: none?"


def reply(body):
    """A judge's answer by what it is asked: F Fig. 6's tags, UnifiedReward's number, Q-Judger's JSON."""
    asked = json.dumps(body["messages"])
    if "QualityScore" in asked:
        said = "<QualityScore>2</QualityScore><InstructionScore>3</InstructionScore><OverallScore>4</OverallScore>"
    elif "most people prefer" in asked:
        said = "A"
    elif "Take the instruction apart" in asked:
        said = "4"
    elif "Final Score" in asked:
        said = "a cat (object): 1\nFinal Score: 3.5"
    else:
        marks = {"Realism": {"Physical Logic": {"score": 2}, "Noise": {"score": 1}}, "Detail": {}}
        silent = {"Detail": {"Noise": {"score": "N/A"}}}
        said = "<think>{}</think>" + json.dumps(marks if "Quality" in asked else silent)
    return {"choices": [{"message": {"content": said}, "finish_reason": "stop"}]}


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    """Folders of tiny judges."""
    root = tmp_path_factory.mktemp("judges")
    save_clip(root / "clip")
    (root / "head").mkdir()
    safetensors.torch.save_file(head_of(12).state_dict(), root / "head" / HEAD_FILE)
    save_blip_vqa(root / "blip")
    save_imagereward(root / "imagereward", root / "blip")
    build_vlm(root / "vlm", "qwen3_vl", words=("yes", "Yes"))
    form = '[{0}]\nask = "pillar"\nsystem = "s"\nlongest = 32\nuser = """{0}: {{prompt}}\n{{picture}}\n{1}"""\n'
    (root / "q_judger.toml").write_text("".join(form.format(name, CHECKLIST) for name in ("Quality", "Aesthetics")))
    return root


def save_imagereward(folder, blip):
    """An ImageReward of the tiny BLIP's halves, as `convert` lays it out."""
    from transformers import BertTokenizer, BlipForQuestionAnswering, BlipTextModel, CLIPImageProcessorPil

    model = BlipForQuestionAnswering.from_pretrained(blip)
    model.vision_model.save_pretrained(folder / "vision")
    BlipTextModel(model.config.text_config, add_pooling_layer=False).save_pretrained(folder / "text")
    safetensors.torch.save_file(head_of(24).state_dict(), folder / HEAD_FILE)
    CLIPImageProcessorPil(size=SIDE, crop_size=SIDE).save_pretrained(folder)
    BertTokenizer.from_pretrained(blip).save_pretrained(folder)


@pytest.fixture
def far(monkeypatch):
    """The written judge; random ones beside it pass no self-test."""
    monkeypatch.setattr(evaluation.scoring, "self_test", lambda scorer: False)
    with Far() as server:
        server.answer = reply
        yield server


def entries(judges, far):
    """--rewards' definitions of every suite's scorers, of tiny ones."""
    clip = str(judges / "clip")
    written = {"kind": "judge", "model": "m", "endpoints": [f"{far.url}/v1"]}
    return {
        "pickscore": {"kind": "pickscore", "model": clip, "processor": ""}, "hps": {"kind": "hps", "model": clip},
        "aesthetic": {"kind": "aesthetic", "model": clip, "head": str(judges / "head")},
        "imagereward": {"kind": "imagereward", "model": str(judges / "imagereward")},
        "qwenvl": {**written, "rubric": "judge"}, "unifiedreward": {**written, "rubric": "unifiedreward"},
        "blipvqa": {"kind": "blipvqa", "model": str(judges / "blip")}, "clip": {"kind": "clipscore", "model": clip},
        **{name: {"kind": "softtifa", "model": str(judges / "vlm"), "dtype": "float32", "mean": mean}
           for name, mean in (("tifa_am", "arithmetic"), ("tifa_gm", "geometric"))},
        **{name: {**written, "rubric": f"{judges}/q_judger.toml:{name}"} for name in ("Quality", "Aesthetics")},
        "diversity": {"kind": "diversity", "model": clip}, "instruction": {**written, "rubric": "editing"},
        "arena": {**written, "rubric": "arena"},
    }  # fmt: skip


def rewards(file, names, known, **own):
    """A file for --rewards that defines these scorers, with a weight where their suite wants it."""
    weights: dict[str, dict] = {}
    for suite in suites.SUITES.values():
        for category, row in suite.weights.items():
            weights.setdefault(category, {}).update({n: 1.0 for n in row if n in names or n in own})
    scorers = {name: known[name] for name in names} | own
    file.write_text(json.dumps({"scorers": scorers, "weights": weights, "watch": [n for n in names if n == "arena"]}))
    return str(file)


def benchmark_files(root):
    """T2I-CompBench++'s folder, GenEval 2's and Qwen-Image-Bench's lines, DPG's folder -> --prompts."""
    (root / "compbench").mkdir()
    for category in ("color", "shape", "texture", "spatial", "3d_spatial", "numeracy", "non_spatial", "complex"):
        (root / "compbench" / f"{category}_val.txt").write_text(f"a {category} cat\ttag\n")
    atoms = [["Is it a cat?", "Yes"], ["How many?", "1"]]
    (root / "g2.jsonl").write_text(json.dumps({"prompt": "one cat", "vqa_list": atoms, "skills": []}) + "\n")
    (root / "qib.jsonl").write_text('{"prompt": "a cat at night"}\n')
    (root / "dpg").mkdir()
    (root / "dpg/7.txt").write_text("a cat\nand a dog")
    named = {"table3": "compbench", "geneval2": "g2.jsonl", "qwen-bench": "qib.jsonl", "dpg": "dpg"}
    return [f"{name}={root / where}" for name, where in named.items()]


def scores(folder):
    return json.loads((folder / "results.json").read_text())


def test_every_suite_of_pictures_from_text_runs_on_sd35(sd35, judges, far, tmp_path, no_pictures, monkeypatch, capsys):
    pytest.importorskip("scipy", reason="extra geneval")
    from scorers import vqa

    monkeypatch.setattr(vqa, "phrases_of", lambda p: p.text.split()[:2])  # spaCy's part
    own = tmp_path / "own.py"
    own.write_text("ocr, deqa = (lambda p, *_, value=v: [value] * len(p) for v in (0.94, 0.87))")
    mine = {name: {"kind": f"{own}:{name}"} for name in ("ocr", "deqa")}
    mine["geneval"] = {"kind": "geneval", "short_side": 64, "detector": str(save_detector(tmp_path / "detector")),
                       "clip": str(judges / "clip")}  # fmt: skip
    known = entries(judges, far)
    file = rewards(tmp_path / "r.json", [name for name in known if name != "instruction"], known, **mine)
    flags = command(sd35.flags, "--out", str(tmp_path), "--name", "all", "--samples", "4", stage="eval")
    flags[flags.index("--teachers") : flags.index("--teachers") + 4] = []
    flags += ["--suite", "table2,table3,table4,geneval2,qwen-bench,dpg,arena,diversity", "--rewards", file,
              "--prompts", *benchmark_files(tmp_path), "--compare", "base", f"teacher.text={sd35.lora}",
              "--export", "geneval,dpg,flat"]  # fmt: skip
    assert evaluation.main(flags) == 0
    found, folder = scores(tmp_path / "all"), tmp_path / "all"
    assert list(found) == ["base", "teacher text"]
    row = found["base"]["scores"]
    assert row.keys() == {
        "GenEval", "OCR Acc.", "DeQA", "PickScore", "Avg", "Color", "Shape", "Texture", "Non-Spatial", "ImageReward",
        "Aesthetic", "UnifiedReward", "HPS-v2.1", "QwenVL Score", "Soft-TIFA AM", "Soft-TIFA GM", "Quality", "Overall",
        "diversity",
    }  # fmt: skip
    assert (row["OCR Acc."], row["DeQA"]) == pytest.approx((0.94, 4.35))
    average = (row["GenEval"] + 0.94 + 0.87 + row["PickScore"] / 26) / 4
    assert row["Avg"] == pytest.approx(average) and row["diversity"] > 0
    assert (row["UnifiedReward"], row["QwenVL Score"]) == pytest.approx((3.5, 4.0)), "as printed"
    assert row["Quality"] == row["Overall"] == pytest.approx(80), "100 and 60; all of Aesthetics is N/A"
    assert 0 < row["Soft-TIFA GM"] <= row["Soft-TIFA AM"] < 100 and 0 < row["Color"] < 1
    assert found["teacher text"]["scores"]["PickScore"] != row["PickScore"]
    votes = [json.loads(line) for line in (folder / "votes.jsonl").open()]
    assert len(votes) == 2 * 4 * (3 + 8 + 3) and {v["order"] for v in votes} == {0, 1}
    said = "a judge that likes what is shown first decides nothing"
    assert "| 1000 [1000, 1000] |" in (folder / "arena.md").read_text(), said
    for made in ("dpg/base/7.png", "geneval/base/00000/metadata.jsonl", "flat/base/paths.json"):
        assert (folder / "export" / made).is_file()
    printed = capsys.readouterr().out
    line = re.search(r"\(cd UniDet_eval && python numeracy_eval.py --outpath=(\S+/base/numeracy)\)", printed)
    result = Path(line[1]) / "annotation_num/vqa_result.json"
    result.parent.mkdir()
    result.write_text(json.dumps([{"question_id": n, "answer": v} for n, v in enumerate((0.5, 0.0, 1.0, 0.5))]))
    monkeypatch.setattr(evaluation.load, "base_model", lambda *_: pytest.fail("nothing is left to draw"))
    assert evaluation.main(flags) == 0
    assert scores(folder)["base"]["scores"]["Numeracy"] == pytest.approx(0.5), "read back from the official code"


def test_every_suite_that_fits_q_runs_on_qwen_image_edit(qwen, judges, far, tmp_path, no_pictures, capsys):
    lines = [json.loads(line) for line in qwen.prompts["edit"].read_text().splitlines()]
    edits = tmp_path / "edits.jsonl"
    kept = [{**line, "image": str(qwen.root / line["image"]), "keep": [[0, 0, 32, 64]]} for line in lines]
    edits.write_text("".join(json.dumps(line) + "\n" for line in kept))
    own = tmp_path / "own.py"
    own.write_text("def identity(images, prompts, sources): return [0.25] * len(images)")
    names = ("qwenvl", "unifiedreward", "hps", "instruction", "diversity", "Quality", "arena")
    known = entries(judges, far)
    file = rewards(tmp_path / "r.json", names, known, identity={"kind": f"{own}:identity"})
    flags = command(qwen.flags, "--out", str(tmp_path), "--name", "all", "--samples", "2", stage="eval")
    flags = flags[: flags.index("--prompts")] + flags[flags.index("--prompts") + 3 :]
    (tmp_path / "qib.jsonl").write_text('{"prompt": "a cat at night"}\n')
    flags += ["--suite", "table4,qwen-bench,edit,diversity,arena", "--rewards", file, "--prompts", f"edit={edits}",
              f"t2i={qwen.prompts['t2i']}", f"qwen-bench={tmp_path / 'qib.jsonl'}"]  # fmt: skip
    assert evaluation.main(flags) == 0
    found = scores(tmp_path / "all")
    assert list(found) == ["base", "teacher t2i", "teacher edit"]
    row = found["base"]["scores"]
    assert (row["identity"], row["instruction"]) == pytest.approx((0.25, 0.8)) and 0 < row["untouched"] < 1
    assert (row["UnifiedReward"], row["Quality"]) == pytest.approx((3.5, 80)) and row["diversity"] > 0
    assert "its column is left out" in (tmp_path / "all/report.html").read_text(), "ImageReward is not defined"
    assert "teacher edit" in (tmp_path / "all/arena.md").read_text()


def test_the_recipe_for_deqa_serves_it_to_table_2(tmp_path, monkeypatch):
    """The page's own file, with a stand-in for the checkpoint that rates 1 to 5 by brightness."""
    import transformers

    code = next(block for block in re.findall(r"```python\n(.*?)```", PAGE, re.S) if "DeQA" in block)
    (tmp_path / "deqa.py").write_text(code)

    def from_pretrained(where, **options):
        assert where == "zhiyuanyou/DeQA-Score-Mix3" and options["trust_remote_code"]
        rate = lambda shown: torch.tensor([1 + 4 * p.getpixel((0, 0))[0] / 255 for p in shown]).half()  # noqa: E731
        return SimpleNamespace(score=rate)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    files = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", PAGE, re.S)]
    (entry,) = (file["scorers"]["deqa"] for file in files if "deqa" in file.get("scorers", ()))
    monkeypatch.setenv(entry["key_env"], "secret")
    with Served(registry.make(f"{tmp_path}/deqa.py:deqa", {}), token="secret") as server:
        kind, options = entry["kind"], {k: v for k, v in entry.items() if k != "kind"}
        scorer = registry.make(kind, {**options, "endpoints": [server.url]})
        from tests.helpers.clip import prompt

        images = torch.tensor([0.0, 1.0, 0.2])[:, None, None, None].expand(3, 3, 8, 8)
        assert scorer.score(images, [prompt("a cat")] * 3, None).tolist() == pytest.approx([0.2, 1.0, 0.36], abs=1e-3)


@pytest.mark.parametrize("wrong, named", [
    (["--suite", "table9"], "table9"), (["--suite", "table3"], "--prompts table3"), (["--export", "zip"], "zip"),
    (["--suite", "edit"], "edit"), (["--suite", "diversity"], "--samples"), (["--prompts", "table3=x"], "table3"),
    (["--compare", "base", "teacher.text=x"], "--teachers"), (["--compare", "student"], "--compare student"),
    (["--suite", "geneval2", "--prompts", "geneval2=SOME.jsonl"], "SOME.jsonl:1"),
    (["--export", "gedit"], "--export gedit"),
])  # fmt: skip
def test_what_cannot_be_asked_for_is_refused_in_one_line(wrong, named, sd35, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluation.load, "base_model", lambda *_: pytest.fail("nothing is drawn for it"))
    some = tmp_path / "SOME.jsonl"
    some.write_text('{"prompt": "a cat", "vqa_list": [["one"]]}\n')
    flags = command(sd35.flags, "--out", str(tmp_path), stage="eval")
    assert evaluation.main([*flags, *(word.replace("SOME.jsonl", str(some)) for word in wrong)]) == 2
    assert named in the_one_line(capsys)
