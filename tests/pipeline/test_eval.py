"""Oracles for the evaluation: perfect drawings score 1 and blank pages 0, and tables say what was found."""

import json
import re
from html import unescape

import pytest

import eval as evaluation
from data.pictures import stacked
from harness import cli, drawn, suites
from tests.helpers.runs import TASKS, command, the_one_line, tiny_settings, with_adapter
from tiny import drawings as tiny
from tiny import edits as tiny_edit

SMALL = tiny_settings()


# ---------------------------------------------------------------------------------------------- an expert's evaluation
def test_evaluation_repeats_exactly_and_scores_the_adapter_that_is_selected(model, prompts, tmp_path):
    first, second = (evaluation.evaluate(model, "m", prompts, SMALL, 1.0, tmp_path / n) for n in "ab")
    assert first == second and [row["task"] for row in first] == [task for task in TASKS for _ in range(5)]
    for task, metric in zip(TASKS, ("geneval", "ocr", "quality"), strict=True):
        own = [row for row in first if row["task"] == task]
        images = stacked(tmp_path / "a" / r["picture"] for r in own)
        again = tiny.score(images, prompts[task], task)
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
    assert ["above" in row for row in rows.values()] == [False, True, True, True, True, True]
    assert all(row["above"][t] == pytest.approx(row["scores"][t] - rows["base"]["scores"][t])
               for row in [*rows.values()][1:] for t in (*TASKS, "average"))  # fmt: skip
    assert "minus base" in text and "| a run |" in (tmp_path / "table/differences.md").read_text()
    assert all({"scores", "tags"} <= row.keys() and list(row["scores"]) == [*TASKS, "average"] for row in rows.values())
    assert rows["a run"] == rows["adapter"] == rows["teacher text"], "a run stands for its last checkpoint"
    assert len({json.dumps(rows[name]) for name in list(rows)[:4]}) == 4, "and each model is its own"
    lines = [re.split("  +", line) for line in re.sub(r" \[[^]]*\]", "", out).splitlines()]  # without intervals
    assert all([name, *(f"{x:.3f}" for x in row["scores"].values())] in lines for name, row in rows.items())
    assert "[" in out and str(tmp_path / "table/report.html") in out
    assert all(f"{value:.3f}" in text for row in rows.values() for value in row["scores"].values())
    own = sum(rows[f"teacher {task}"]["scores"][task] for task in TASKS) / 3
    assert f"Mean of the teachers' own-task scores: {own:.3f}." in text
    assert text.count("<img ") == 6 * 3 * 6, "models, tasks, prompts"


def test_rules_vote_by_the_worlds_scores_alone_and_teachers_are_outside_of_every_comparison(
    world, tmp_path, no_pictures
):
    flags = command(world.flags, "--out", str(tmp_path), "--name", "run", "--samples", "2", stage="eval")
    votes = []
    for more in ("", ",diversity"):
        assert evaluation.main([*flags, "--suite", f"arena{more}"]) == 0
        votes.append((tmp_path / "run/votes.jsonl").read_text())
    assert votes[0] == votes[1] and votes[0].count("winner") == 6 * 18 * 2 * 2
    for name in ("arena", "differences"):
        rows = (tmp_path / f"run/{name}.md").read_text().splitlines()
        assert not any(re.search(r"\*\*\d|[^*]<u>", row) for row in rows if row.startswith("| teacher")), name
    at = flags.index("--teachers")
    assert evaluation.main([*flags[:at], *flags[at + 4 :], "--suite", "arena", "--compare", "base"]) == 2, "no pair"


def test_teachers_of_every_kind_draw_pictures_of_their_own_without_a_score_too(sd35, tmp_path):
    flags = command(sd35.flags, "--out", str(tmp_path), "--compare", f"lora={sd35.lora}", stage="eval")
    assert evaluation.main([*flags, "--name", "run"]) == 0
    drawn = {file.read_bytes() for file in (tmp_path / "run").rglob("*.png")}
    assert len(drawn) == 5 * 3, "every model draws its own"
    rows = json.loads((tmp_path / "run/results.json").read_text())
    assert rows == dict.fromkeys(["base", *(f"teacher {task}" for task in TASKS), "lora"], {"scores": {}, "tags": {}})
    assert (tmp_path / "run/report.html").read_text().count("<img ") == 5 * 3, "pictures all the same"


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
    base = command(world2.flags, "--out", str(tmp_path), "--eval-prompts", "2", stage="eval")
    for name, flags, expected in (("a", [], [2.0] * 3 + [1.0]), ("b", ["--guidance", "both"], [2.0] * 4)):
        draws.clear()
        assert evaluation.main([*base, "--name", name, *flags, *compared]) == 0
        assert [call.args[4] for call in draws] == expected
    rows = json.loads((tmp_path / "b/results.json").read_text())
    assert list(rows) == ["base", "teacher t2i", "teacher edit", "student"]
    assert rows["student"] == rows["teacher t2i"] and rows["student"] != rows["teacher edit"]
    unlike = json.loads((tmp_path / "a/results.json").read_text())["student"]
    assert unlike != rows["student"], "without guidance its pictures are others"
