"""Oracles for the evaluation: perfect drawings score 1 and blank pages 0, noise is fixed, tables say what was found."""

import json
import random
import re

import numpy as np
import pytest
import torch
from conftest import TASKS

import data
import eval as evaluation
import models
import rewards
import runtime
import tiny
from settings import Settings, resolve

SMALL = Settings(eval_steps=2, eval_prompts=5, threads=1)


@pytest.fixture(scope="module")
def prompts():
    """Five test prompts of each task."""
    return {task: tiny.make_prompts(task, "test", 5) for task in TASKS}


@pytest.fixture
def model(world):
    """The base with one teacher on it, which is what is selected."""
    model = models.load_tiny(world.base)
    state, config = models.load_adapter(world.teachers["text"], model)
    model.add_adapter("teacher:text", config, state)
    return model


def drawing(prompt):
    """What the prompt asks for, drawn without a mistake."""
    rng = random.Random(prompt.text)
    if prompt.task == "text":
        scene = {"word": prompt.text[-4:-1], "color": "black"}
    else:
        scene = tiny.scene_of(prompt.metadata, rng, error=0.0)
    return torch.from_numpy(tiny.draw(scene))


# --------------------------------------------------------------------------------------------------- the scores
@pytest.mark.parametrize("task", TASKS)
def test_perfect_drawings_score_one_and_blank_pages_nothing(task):
    prompts = tiny.make_prompts(task, "test", 12)
    total, each, _ = evaluation.score(torch.stack([drawing(p) for p in prompts]), prompts, task)
    assert total == pytest.approx(1, abs=1e-5) and each == pytest.approx([1.0] * 12, abs=1e-5)
    total, each, _ = evaluation.score(torch.ones(12, 3, 24, 24), prompts, task)
    assert total == 0 and each == [0.0] * 12


def test_composition_is_the_mean_over_tags_and_not_over_prompts():
    """Prompts 0-5 have six tags, 6 and 7 repeat the first two. Blank out 6: single_object 1/2, the others 1."""
    prompts = tiny.make_prompts("composition", "test", 8)
    images = torch.stack([drawing(p) for p in prompts])
    images[6] = 1.0
    total, each, tags = evaluation.score(images, prompts, "composition")
    assert each == [1, 1, 1, 1, 1, 1, 0, 1]
    assert total == pytest.approx((0.5 + 5) / 6) and total != pytest.approx(7 / 8)
    assert tags == {tag: (0.5 if tag == "single_object" else 1.0) for tag in tiny.TEST_TAGS}


def test_text_and_quality_are_plain_means_of_their_own_scorer():
    prompts = tiny.make_prompts("text", "test", 4)
    images = torch.stack([drawing(p) for p in prompts])
    images[0] = 1.0
    assert evaluation.score(images, prompts, "text")[:2] == (pytest.approx(0.75), [0.0, 1.0, 1.0, 1.0])
    grey = images * 0.5 + 0.2
    total, each, details = evaluation.score(grey, prompts, "quality")
    assert each == pytest.approx(tiny.quality(grey).tolist()) and details == {}
    assert total == pytest.approx(np.mean(each)) and total != pytest.approx(evaluation.score(grey, prompts, "text")[0])


# -------------------------------------------------------------------------------------------------- the pictures
def test_the_noise_of_a_picture_depends_on_the_seed_and_its_row_alone(model, prompts):
    """Not on the batch it is drawn in (only rounding does), nor on how many prompts follow."""
    some = [*prompts["text"], *prompts["quality"]]
    images = evaluation.draw(model, some, 2, 1.0, seed=3)
    assert images.shape == (10, 3, 24, 24) and 0 <= images.min() < images.max() <= 1
    assert torch.equal(images, evaluation.draw(model, some, 2, 1.0, seed=3))
    torch.testing.assert_close(evaluation.draw(model, some, 2, 1.0, seed=3, batch=3), images, rtol=0, atol=1e-5)
    torch.testing.assert_close(evaluation.draw(model, some[:3], 2, 1.0, seed=3), images[:3], rtol=0, atol=1e-5)
    assert not torch.allclose(evaluation.draw(model, some, 2, 1.0, seed=4), images, atol=1e-2)
    assert not torch.allclose(evaluation.draw(model, some, 2, 3.0, seed=3), images, atol=1e-3), "guidance counts"


def test_a_picture_is_the_ode_integrated_by_hand(model, prompts):
    some = prompts["text"][:2]
    x = torch.randn((2, 3, 24, 24), generator=torch.Generator().manual_seed(7))
    cond, empty = model.encode([p.text for p in some]), model.encode(["", ""])
    with torch.no_grad():
        for t in (1.0, 0.75, 0.5, 0.25):  # Euler with dt = 1/4 and guidance 2: v_empty + 2 (v - v_empty)
            v, v_empty = model.velocity(x, t, cond), model.velocity(x, t, empty)
            x = x - 0.25 * (v_empty + 2 * (v - v_empty))
    drawn = evaluation.draw(model, some, 4, 2.0, seed=7)
    torch.testing.assert_close(drawn, (x / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)


def test_conditions_hold_the_empty_prompt_only_where_guidance_is_on(model):
    texts = ["a circle", "a square", "a cross"]
    cond, uncond = evaluation.conditions(model, texts, 1.0)
    assert uncond is None and torch.equal(cond.tokens, model.encode(texts).tokens)
    for cfg in (0.0, 2.0):
        uncond = evaluation.conditions(model, texts, cfg)[1]
        assert torch.equal(uncond.tokens, model.encode([""] * 3).tokens)


def test_batches_cut_a_list_without_loss():
    assert evaluation.batches([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4], [5]]
    assert evaluation.batches([], 2) == []


def test_evaluation_repeats_exactly_and_scores_the_adapter_that_is_selected(model, prompts):
    first, second = evaluation.evaluate(model, prompts, SMALL), evaluation.evaluate(model, prompts, SMALL)
    for task in TASKS:
        assert first[task] == second[task] and torch.equal(first["images"][task][0], second["images"][task][0])
        total, each, _ = evaluation.score(first["images"][task][0], prompts[task], task)
        assert first[task] == total and first["images"][task][1] == each
    assert first["average"] == pytest.approx(sum(first[task] for task in TASKS) / 3)
    assert set(first["tags"]) == set(tiny.TEST_TAGS[:5]), "five prompts, five tags"
    with model.adapter(None):
        base = evaluation.evaluate(model, prompts, SMALL)
    assert not torch.allclose(base["images"]["text"][0], first["images"]["text"][0], atol=1e-3)
    assert base["quality"] != first["quality"]


def test_every_task_has_its_own_noise(model, prompts):
    result = evaluation.evaluate(model, {"text": prompts["text"], "quality": prompts["text"]}, SMALL)["images"]
    assert not torch.allclose(result["text"][0], result["quality"][0], atol=1e-2)


# --------------------------------------------------------------------------------------------------- the prompts
def test_own_prompts_replace_those_of_their_task_and_are_cut_for_tests_only(tmp_path):
    (tmp_path / "q.txt").write_text("a beautiful picture of a red circle\na circle\na square\n")
    s = Settings(prompts={"quality": str(tmp_path / "q.txt")})
    test = evaluation.load_prompts(s, "test", 2, ["text", "quality"])
    assert [p.text for p in test["quality"]] == ["a beautiful picture of a red circle", "a circle"]
    assert test["text"] == tiny.make_prompts("text", "test", 2)
    train = evaluation.load_prompts(s, "train", 2, ["quality", "text"])
    assert list(train) == ["quality", "text"] and len(train["quality"]) == 3
    assert train["text"] == tiny.make_prompts("text", "train", 2)


def test_prompts_without_a_task_are_routed_one_by_one(tmp_path):
    lines = ['a sign that says "CAT"', "a beautiful picture of a red circle", 'a sign that says "HEX"']
    (tmp_path / "p.txt").write_text("\n".join(lines))
    s = Settings(prompts={"auto": str(tmp_path / "p.txt")})
    found = evaluation.load_prompts(s, "train", 3, TASKS)
    assert [p.text for p in found["text"]] == [lines[0], lines[2]]
    assert [p.text for p in found["quality"]] == [lines[1]]
    assert all(p.task == task for task in TASKS for p in found[task])
    assert found["composition"] == tiny.make_prompts("composition", "train", 3), "no such line: the world's own"


def test_composition_prompts_need_their_checklist(tmp_path):
    (tmp_path / "c.txt").write_text("a photo of a circle\n")
    s = Settings(prompts={"composition": str(tmp_path / "c.txt")})
    with pytest.raises(data.DataError, match=r"c\.txt:1: composition is scored by GenEval metadata"):
        evaluation.load_prompts(s, "test", 2, ["composition"])


# ------------------------------------------------------------------------------------------ tables and reports
def test_a_table_is_aligned_markdown_and_missing_numbers_stay_empty():
    rows = {"base": {"text": 0.12345, "quality": 1}, "student": {"text": 0.5}}
    assert evaluation.markdown_table(rows, ["text", "quality"]).split("\n") == [
        "| model | text | quality |",
        "|---|---:|---:|",
        "| base | 0.123 | 1.000 |",
        "| student | 0.500 |  |",
    ]
    assert "| base | 0.1 |" in evaluation.markdown_table(rows, ["text"], digits=1)


def test_a_report_shows_every_picture_and_every_number(tmp_path, prompts):
    images = torch.rand(5, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    result = {"text": 0.25, "average": 0.25, "tags": {}, "images": {"text": (images, [0.1] * 5)}}
    evaluation.save_samples(tmp_path, "final", result, prompts, count=3)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5}\n')
    report = evaluation.write_report(tmp_path, "my run", {"student": result}, ["text"], ["A note."]).read_text()
    assert report.startswith("# my run\n") and "A note." in report and "| student | 0.250 | 0.250 |" in report
    assert "GenEval tag" not in report, "nothing was scored by tags"
    shown = re.findall(r"!\[.*?\]\((.*?)\)", report)
    assert sorted(shown) == sorted(f"samples/{p.name}" for p in (tmp_path / "samples").glob("*.png"))
    assert sorted(shown) == ["samples/curves.png", "samples/final-text.png"]
    numbers = json.loads((tmp_path / "results.json").read_text())
    assert numbers == {"student": {"text": 0.25, "average": 0.25, "tags": {}}}
    result["tags"] = {"counting": 0.5, "single_object": 1.0}
    report = evaluation.write_report(tmp_path, "r", {"a": result, "b": {**result, "tags": {}}}, ["text"]).read_text()
    assert "| model | single_object | counting |\n" in report and "| a | 1.000 | 0.500 |\n| b |  |  |" in report


def test_eval_py_scores_base_teachers_and_whatever_is_compared(world, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run/checkpoints/step-000007"
    run.parent.mkdir(parents=True)
    run.symlink_to(world.teachers["text"])
    monkeypatch.setattr(
        runtime, "save_grid", lambda file, *_: file.parent.mkdir(parents=True, exist_ok=True) or file.touch()
    )
    flags = [*world.flags, "--out", str(tmp_path), "--name", "table"]
    flags += ["--compare", f"a run={tmp_path / 'run'}", f"adapter={world.teachers['text']}"]
    assert evaluation.main(flags) == 0
    out, report = capsys.readouterr().out, (tmp_path / "table/report.md").read_text()
    rows = json.loads((tmp_path / "table/results.json").read_text())
    assert list(rows) == ["base", *(f"teacher {task}" for task in TASKS), "a run", "adapter"]
    assert rows["a run"] == rows["adapter"] == rows["teacher text"], "a run stands for its last checkpoint"
    assert len({json.dumps(rows[name]) for name in list(rows)[:4]}) == 4, "and each model is its own"
    table = evaluation.markdown_table(rows, [*TASKS, "average"])
    assert table in out and table in report and str(tmp_path / "table/report.md") in out
    own = sum(rows[f"teacher {task}"][task] for task in TASKS) / 3
    assert f"Mean of the teachers' own-task scores: {own:.3f}." in report
    assert report.count("![") == 6 * 3 and (tmp_path / "table/samples/a-run-text.png").is_file()


def test_eval_py_refuses_in_one_line(world, tmp_path, capsys):
    assert evaluation.main([*world.flags, "--out", str(tmp_path), "--compare", f"x={tmp_path / 'no'}"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and "no/adapter_config.json: missing" in err
    assert evaluation.main(["--compare", "nameless"]) == 2
    assert "--compare nameless" in capsys.readouterr().err


def test_teachers_and_anchor_share_one_backbone(world):
    teachers = {task: str(folder) for task, folder in world.teachers.items()}
    for stage, mar, anchor, expected in (
        ("opd", 0.02, "quality", "teacher:quality"),  # a teacher's task: no second copy
        ("opd", 0.02, teachers["text"], "anchor"),
        ("opd", 0.0, "quality", None),
        ("sft", 0.02, "quality", None),
    ):
        model = models.load_tiny(world.base)
        experts = evaluation.load_teachers(model, Settings(stage=stage, mar=mar, anchor=anchor, teachers=teachers))
        assert experts.pop("anchor", None) == expected
        assert experts == {task: f"teacher:{task}" for task in TASKS}
        assert len(model.adapters) == 3 + (expected == "anchor")


def test_user_errors_are_the_ones_that_name_something_of_the_users():
    assert rewards.RewardError in evaluation.USER_ERRORS and ValueError not in evaluation.USER_ERRORS


def test_each_shipped_teacher_is_the_best_at_its_own_task(tmp_path):
    """The checkpoints in assets/ are what the README says: a mediocre base, and specialists that beat it at home."""
    s = resolve({"name": "shipped", "mar": 0.0, "out": str(tmp_path), "eval_prompts": 48, "threads": 1})
    rows, _ = evaluation.compare(s)
    for task in tiny.TASKS:
        own = rows[f"teacher {task}"][task]
        assert own == max(row[task] for row in rows.values()), task
        assert own > rows["base"][task] + 0.1, task
    assert 0.45 < rows["base"]["average"] < 0.7
