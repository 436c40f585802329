"""Oracles for the evaluation: perfect drawings score 1 and blank pages 0, and tables say what was found."""

import json
import re
from html import unescape

import pytest
import torch

import eval as evaluation
from data.pictures import decode
from harness import cli, drawn, suites, tables
from tests.helpers.clip import save_clip, save_detector
from tests.helpers.runs import TASKS, command, the_one_line, tiny_settings, with_adapter
from tiny import drawings as tiny
from tiny import edits as tiny_edit

SMALL = tiny_settings()


# ---------------------------------------------------------------------------------------------- an expert's evaluation
def test_a_panel_is_built_where_rewards_name_one_and_the_tiny_world_needs_none():
    assert evaluation.panel_of(tiny_settings(rewards="task=1"), "cpu") is None
    assert evaluation.panel_of(cli.resolve({}), "cpu") is None
    panel = evaluation.panel_of(cli.resolve({"rewards": "jpeg=2"}), "cpu")
    assert list(panel.scorers) == ["jpeg"] and not panel.drop, "an evaluation drops nothing: a table has no holes"


def test_evaluation_repeats_exactly_and_scores_the_adapter_that_is_selected(model, prompts, tmp_path):
    first, second = (evaluation.evaluate(model, "m", prompts, SMALL, 1.0, tmp_path / n) for n in "ab")
    assert first == second and [row["task"] for row in first] == [task for task in TASKS for _ in range(5)]
    for task, metric in zip(TASKS, ("geneval", "ocr", "quality"), strict=True):
        own = [row for row in first if row["task"] == task]
        images = torch.stack([torch.from_numpy(decode(tmp_path / "a" / r["picture"])) for r in own]).permute(0, 3, 1, 2)
        again = tiny.score(images / 255, prompts[task], task)
        assert [row["scores"] for row in own] == [{metric: value} for value in again[metric]]
    with model.adapter(None):
        base = evaluation.evaluate(model, "m", prompts, SMALL, 1.0, tmp_path / "a")
    assert [row["picture"] for row in base] == [row["picture"] for row in first], "the same files, drawn anew"
    quality = [[row["scores"]["quality"] for row in rows[10:]] for rows in (first, base)]
    assert quality[0] != quality[1]


# -------------------------------------------------------------------------------------------------------- whole tables
def test_eval_py_scores_base_teachers_and_whatever_is_compared(world, tmp_path, capsys):
    run = tmp_path / "run/checkpoints/step-000007"
    run.parent.mkdir(parents=True)
    run.symlink_to(world.teachers["text"])
    flags = command(world.flags, "--out", str(tmp_path), "--name", "table", stage="eval")
    flags += ["--compare", f"a run={tmp_path / 'run'}", f"adapter={world.teachers['text']}"]
    assert evaluation.main(flags) == 0
    out, text = capsys.readouterr().out, unescape((tmp_path / "table/report.html").read_text())
    rows = json.loads((tmp_path / "table/results.json").read_text())
    assert list(rows) == ["base", *(f"teacher {task}" for task in TASKS), "a run", "adapter"]
    assert all(row.keys() == {"scores", "tags"} and list(row["scores"]) == [*TASKS, "average"] for row in rows.values())
    assert rows["a run"] == rows["adapter"] == rows["teacher text"], "a run stands for its last checkpoint"
    assert len({json.dumps(rows[name]) for name in list(rows)[:4]}) == 4, "and each model is its own"
    plain = re.sub(r" \[[^]]*\]", "", out)  # without intervals
    table = tables.markdown(tables.of_evaluation(rows, "scores"))
    assert table in plain and "[" in out and str(tmp_path / "table/report.html") in out
    assert all(f"{value:.3f}" in text for row in rows.values() for value in row["scores"].values())
    own = sum(rows[f"teacher {task}"]["scores"][task] for task in TASKS) / 3
    assert f"Mean of the teachers' own-task scores: {own:.3f}." in text
    assert text.count("<img ") == 6 * 3 * 6, "models, tasks, prompts"


CATS = """{"tag": "single_object", "include": [{"class": "cat", "count": 12}], "prompt": "twelve cats"}
{"tag": "counting", "include": [{"class": "cat", "count": 16}], "prompt": "sixteen cats"}
{"tag": "counting", "include": [{"class": "cat", "count": 15}], "prompt": "fifteen cats"}
"""


def pictures_of(run):
    """{model's folder: {file: bytes}} of a run."""
    return {f.name: {p.name: p.read_bytes() for p in f.iterdir()} for f in (run / "pictures").iterdir()}


@pytest.fixture
def table2(tmp_path, monkeypatch):
    """Flags for F Table 2's four metrics: GenEval on a tiny detector that sees twelve cats in every picture of 64
    pixels, so that its graded rewards are 1, 0.75 and 0.8, and three functions of a user's own."""
    pytest.importorskip("scipy", reason="extra geneval")
    from scorers import geneval

    cat = {"class": "cat", "score": 0.95, "box": (0, 0, 9, 9)}
    monkeypatch.setattr(geneval, "instances", lambda *given: [cat] * 12 if given[2] == (64, 64) else [])
    own, rewards = tmp_path / "own.py", tmp_path / "rewards.json"
    own.write_text("ocr, deqa, pickscore = (lambda p, *_, value=v: [value] * len(p) for v in (.94, .87, .91))")
    mine = {name: {"kind": f"{own}:{name}"} for name in ("ocr", "deqa", "pickscore")}
    options = {"detector": str(save_detector(tmp_path / "detector")), "clip": str(save_clip(tmp_path / "clip"))}
    weights = {"composition": ["geneval"], "text": ["ocr"], "quality": ["deqa", "pickscore"]}
    rewards.write_text(json.dumps({
        "scorers": {"geneval": {"kind": "geneval", "short_side": 64, **options}, **mine},
        "weights": {category: dict.fromkeys(names, 1.0) for category, names in weights.items()},
    }))  # fmt: skip
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts/test_metadata.jsonl").write_text(CATS)
    return ["--rewards", str(rewards), "--prompts", f"composition={tmp_path / 'prompts'}", "--eval-prompts", "3"]


def test_eval_py_has_table_2s_columns_and_the_tags_for_sd35_with_teachers_of_every_kind(
    sd35, table2, tmp_path, monkeypatch, spy, capsys
):
    built = spy(evaluation.scoring, "build")
    flags = command(sd35.flags, "--out", str(tmp_path), "--compare", f"lora={sd35.lora}", stage="eval")
    assert evaluation.main([*flags, "--name", "scored", *table2]) == 0
    rows = json.loads((tmp_path / "scored/results.json").read_text())
    assert list(rows) == ["base", *(f"teacher {task}" for task in TASKS), "lora"]
    # GenEval 1/2: of its two tags one is right. 0.85 is the mean of its graded rewards, 1/3 that of its verdicts.
    row = {"composition geneval": 0.5, "text ocr": 0.94, "quality deqa": 0.87, "quality pickscore": 0.91, "Avg": 0.805}
    tags = {"counting": 0.0, "single_object": 1.0}
    assert all(found == {"scores": pytest.approx(row), "tags": tags} for found in rows.values())
    printed = re.sub(r" \[[^]]*\]", "", capsys.readouterr().out)
    for table in ("| base | 0.500 | 0.940 | 0.870 | 0.910 | 0.805 |", "By tag:", "| base | 1.000 | 0.000 |"):
        assert table in printed
    drawn = pictures_of(tmp_path / "scored")
    assert len(drawn) == 5 and all(len(own) == 9 for own in drawn.values())
    assert len({picture for own in drawn.values() for picture in own.values()}) == 45, "every model draws its own"
    assert len(built) == 1, "the scorers are loaded once for all"
    assert evaluation.main([*flags, "--name", "unscored", *table2[2:]]) == 0
    assert len(built) == 1 and pictures_of(tmp_path / "unscored") == drawn, "and the same ones again"
    rows = json.loads((tmp_path / "unscored/results.json").read_text())
    assert rows == dict.fromkeys(rows, {"scores": {}, "tags": {}}) and len(rows) == 5
    assert (tmp_path / "unscored/report.html").read_text().count("<img ") == 5 * 9, "pictures all the same"


def test_eval_py_refuses_in_one_line(world, tmp_path, capsys):
    flags = command(world.flags, "--out", str(tmp_path), stage="eval")
    for wrong, named in (["--compare", f"x={tmp_path / 'no'}"], "/no: "), (["--eval-prompts", "0"], "--eval-prompts 0"):
        assert evaluation.main([*flags, *wrong]) == 2
        assert named in the_one_line(capsys)


def test_each_shipped_teacher_is_the_best_at_its_own_task(tmp_path):
    """The checkpoints in assets/ are what the README says: a mediocre base, and specialists that beat it at home."""
    shipped = {"preset": "tiny", "name": "shipped", "mar": 0.0, "out": str(tmp_path), "eval_prompts": 18}
    rows, _ = evaluation.compare(cli.resolve({**shipped, "device": "cpu"}))
    scores = {name: {key: cell.value for key, cell in row["scores"].items()} for name, row in rows.items()}
    for task in tiny.TASKS:
        own = scores[f"teacher {task}"][task]
        assert own == max(row[task] for row in scores.values()), task
        assert own > scores["base"][task] + 0.1, task
    assert 0.45 < scores["base"]["average"] < 0.7


# ------------------------------------------------------------------------------------- Q's tasks in the tiny world
def test_an_evaluation_of_qs_tasks_has_their_columns_their_average_and_their_sources(world2, tmp_path):
    model = with_adapter(world2, world2.teachers["edit"])
    some = {task: tiny_edit.make_prompts(task, "test", 4) for task in ("t2i", "edit")}
    s = tiny_settings(preset="tiny-qwen")
    rows = evaluation.evaluate(model, "m", some, s, 2.0, tmp_path)
    scores = suites.numbers(rows, suites.WORLDS[s.preset])["m"]["scores"]
    columns = ["t2i", "t2i alignment", "t2i aesthetic", "edit", "edit instruction", "edit identity", "average"]
    assert list(scores) == columns
    assert scores["average"] == pytest.approx((scores["t2i"] + scores["edit"]) / 2)
    assert [row["sources"] for row in rows] == [[]] * 4 + [[p.metadata["image"]] for p in some["edit"]]
    files = [(tmp_path / row["picture"]).read_bytes() for row in rows]
    evaluation.evaluate(model, "m", some, s, 1.0, tmp_path)
    unguided = [(tmp_path / row["picture"]).read_bytes() for row in rows]
    assert all(a != b for a, b in zip(files, unguided, strict=True)), "guidance counts"


def test_eval_py_guides_base_and_teachers_and_a_compared_student_only_where_it_is_asked(
    world2, tmp_path, spy
):
    draws = spy(drawn, "draw_to")
    compared = ["--compare", f"student={world2.teachers['t2i']}"]
    base = command(world2.flags, "--out", str(tmp_path), stage="eval")
    for name, flags, expected in (("a", [], [2.0] * 3 + [1.0]), ("b", ["--guidance", "both"], [2.0] * 4)):
        draws.clear()
        assert evaluation.main([*base, "--name", name, *flags, *compared]) == 0
        assert [call.args[4] for call in draws] == expected
    rows = json.loads((tmp_path / "b/results.json").read_text())
    assert list(rows) == ["base", "teacher t2i", "teacher edit", "student"]
    assert rows["student"] == rows["teacher t2i"] and rows["student"] != rows["teacher edit"]
    unlike = json.loads((tmp_path / "a/results.json").read_text())["student"]
    assert unlike != rows["student"], "without guidance its pictures are others"
