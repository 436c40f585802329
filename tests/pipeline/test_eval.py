"""Oracles for the evaluation: perfect drawings score 1 and blank pages 0, and tables say what was found."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import eval as evaluation
import rewards
import settings
from data import files as data
from data import written
from harness import report, rollout
from scorers import panel as scoring
from tests.helpers.runs import TASKS, command, the_one_line, tiny_settings, with_adapter
from tiny import drawings as tiny
from tiny import edits as tiny_edit

SMALL = tiny_settings()


@pytest.fixture(scope="module")
def prompts():
    """Five test prompts of each task."""
    return {task: tiny.make_prompts(task, "test", 5) for task in TASKS}


@pytest.fixture
def model(world):
    """The base with one teacher's adapter as its student, which is what is selected."""
    return with_adapter(world, world.teachers["text"])


def drawing(prompt):
    """What the prompt asks for, drawn without a mistake."""
    rng = random.Random(prompt.text)
    if prompt.task == "text":
        scene = {"word": prompt.text[-4:-1], "color": "black"}
    else:
        scene = tiny.scene_of(prompt.metadata, rng, error=0.0)
    return torch.from_numpy(tiny.draw(scene))


# ---------------------------------------------------------------------------------------------------------- the scores
def tiny_score(images, prompts, task):
    return evaluation.score(images, prompts, task, None, True)


@pytest.mark.parametrize("task", TASKS)
def test_perfect_drawings_score_one_and_blank_pages_nothing(task):
    prompts = tiny.make_prompts(task, "test", 12)
    named, each, _ = tiny_score(torch.stack([drawing(p) for p in prompts]), prompts, task)
    assert named == {task: pytest.approx(1, abs=1e-5)} and each == pytest.approx([1.0] * 12, abs=1e-5)
    named, each, _ = tiny_score(torch.ones(12, 3, 24, 24), prompts, task)
    assert named == {task: 0} and each == [0.0] * 12


def test_composition_is_the_mean_over_tags_and_not_over_prompts():
    """Prompts 0-5 have six tags, 6 and 7 repeat the first two. Blank out 6: single_object 1/2, the others 1."""
    prompts = tiny.make_prompts("composition", "test", 8)
    images = torch.stack([drawing(p) for p in prompts])
    images[6] = 1.0
    named, each, tags = tiny_score(images, prompts, "composition")
    assert each == [1, 1, 1, 1, 1, 1, 0, 1]
    assert named["composition"] == pytest.approx((0.5 + 5) / 6) and named["composition"] != pytest.approx(7 / 8)
    assert tags == {tag: (0.5 if tag == "single_object" else 1.0) for tag in tiny.TEST_TAGS}


def test_text_and_quality_are_plain_means_of_their_own_scorer():
    prompts = tiny.make_prompts("text", "test", 4)
    images = torch.stack([drawing(p) for p in prompts])
    images[0] = 1.0
    assert tiny_score(images, prompts, "text")[:2] == ({"text": 0.75}, [0.0, 1.0, 1.0, 1.0])
    named, each, _ = tiny_score(images * 0.5 + 0.2, prompts, "quality")
    assert each == pytest.approx(tiny.quality(images * 0.5 + 0.2).tolist()) and named == {"quality": np.mean(each)}


def fixed(name, *answers, high=9.0):
    """A scorer with these answers, whatever it is shown."""
    return rewards.Scorer(name, lambda images, prompts, sources: torch.tensor(answers[: len(images)]), 0.0, high)


def test_every_scorer_that_is_asked_has_a_column_and_a_weight_in_the_sum():
    prompts, images = written.make_prompts("text", "test", 3), torch.rand(3, 3, 16, 16)
    far = rewards.Scorer("far", lambda *_: pytest.fail("it counts for other prompts"), 0.0, 1.0)
    weights = {"text": {"a": 0.5, "b": 2.0}, "quality": {"far": 1.0}}
    panel = scoring.Panel([fixed("a", 1.0, 2.0, 6.0), fixed("b", 0.0, 1.0, 0.5), far], weights)
    named, each, tags = evaluation.score(images, prompts, "text", panel, False)
    assert named == {"text a": 3, "text b": 0.5} and tags == {}, "columns show rewards without weights"
    assert each == [0.5, 3.0, 4.0]
    others = written.make_prompts("composition", "test", 3)
    assert evaluation.score(images, others, "composition", panel, False) == ({}, [], {}), "no weights: no scores"
    assert evaluation.score(images, prompts, "text", None, False) == ({}, [], {})


def test_strict_geneval_is_counted_by_tag_and_a_graded_one_is_not():
    prompts = written.make_prompts("composition", "test", 3)
    prompts = [p._replace(metadata={**p.metadata, "tag": tag}) for p, tag in zip(prompts, "aab", strict=True)]
    images = torch.rand(3, 3, 16, 16)
    for answers, score, tags in (((1.0, 0.0, 0.0), 0.25, {"a": 0.5, "b": 0.0}), ((1.0, 0.5, 0.0), 0.5, {})):
        panel = scoring.Panel([fixed("geneval", *answers)], {"default": {"geneval": 1.0}})
        named, _, by_tag = evaluation.score(images, prompts, "composition", panel, False)
        assert named == {"composition geneval": score} and by_tag == tags


def test_the_four_metrics_of_table_2_have_their_average(monkeypatch):
    """F's row Ours (Merge): GenEval 0.92, OCR 0.94, DeQA 4.35, PickScore 23.08, Avg 0.9044."""
    columns = {"composition": {"geneval": 0.92}, "text": {"ocr": 0.94}}
    columns["quality"] = {"deqa": 4.35 / 5, "pickscore": 23.08 / 26}
    tags = {"composition": {"counting": 0.92}}

    def score(images, prompts, task, *_):
        return {f"{task} {name}": value for name, value in columns[task].items()}, [], tags.get(task, {})

    monkeypatch.setattr(evaluation, "score", score)
    monkeypatch.setattr(evaluation.rollout, "draw", lambda *_: torch.zeros(1))
    monkeypatch.setattr(evaluation.rollout, "encode_all", lambda *_: None)
    model = SimpleNamespace(device="cpu", decode=lambda x: x)
    s, prompts = settings.resolve({"device": "cpu"}), {task: [] for task in TASKS}

    def average():
        return evaluation.evaluate(model, prompts, s, 1.0, "a panel")["scores"].get("Avg")

    assert average() == pytest.approx(0.9044, abs=5e-5)
    tags.clear()
    assert average() is None, "a graded reward is not GenEval"
    tags["composition"] = {"counting": 0.92}
    del columns["quality"]["deqa"]
    assert average() is None


def test_a_panel_is_built_where_rewards_name_one_and_the_tiny_world_needs_none():
    assert evaluation.panel_of(tiny_settings(rewards="task=1"), "cpu") is None
    assert evaluation.panel_of(settings.resolve({}), "cpu") is None
    panel = evaluation.panel_of(settings.resolve({"rewards": "jpeg=2"}), "cpu")
    assert list(panel.scorers) == ["jpeg"] and not panel.drop, "an evaluation drops nothing: a table has no holes"


# ---------------------------------------------------------------------------------------------- an expert's evaluation
def test_evaluation_repeats_exactly_and_scores_the_adapter_that_is_selected(model, prompts):
    first, second = evaluation.evaluate(model, prompts, SMALL, 1.0), evaluation.evaluate(model, prompts, SMALL, 1.0)
    scores = first["scores"]
    assert scores == second["scores"] and list(scores) == [*TASKS, "average"]
    for task in TASKS:
        images, each = first["images"][task]
        assert torch.equal(images, second["images"][task][0]) and 0 <= images.min() < images.max() <= 1
        named, again, _ = tiny_score(images, prompts[task], task)
        assert scores[task] == named[task] and each == again
    assert scores["average"] == pytest.approx(sum(scores[task] for task in TASKS) / 3)
    assert set(first["tags"]) == set(tiny.TEST_TAGS[:5]), "five prompts, five tags"
    with model.adapter(None):
        base = evaluation.evaluate(model, prompts, SMALL, 1.0)
    assert not torch.allclose(base["images"]["text"][0], first["images"]["text"][0], atol=1e-3)
    assert base["scores"]["quality"] != scores["quality"]


# -------------------------------------------------------------------------------------------------------- whole tables
@pytest.fixture
def no_pictures(monkeypatch):
    """Empty files in the place of grids, which take longer than such small models do."""
    empty = lambda file, *_: file.parent.mkdir(parents=True, exist_ok=True) or file.touch()  # noqa: E731
    monkeypatch.setattr(report, "save_grid", empty)


def test_eval_py_scores_base_teachers_and_whatever_is_compared(world, tmp_path, no_pictures, capsys):
    run = tmp_path / "run/checkpoints/step-000007"
    run.parent.mkdir(parents=True)
    run.symlink_to(world.teachers["text"])
    flags = command(world.flags, "--out", str(tmp_path), "--name", "table", stage="eval")
    flags += ["--compare", f"a run={tmp_path / 'run'}", f"adapter={world.teachers['text']}"]
    assert evaluation.main(flags) == 0
    out, text = capsys.readouterr().out, (tmp_path / "table/report.md").read_text()
    rows = json.loads((tmp_path / "table/results.json").read_text())
    assert list(rows) == ["base", *(f"teacher {task}" for task in TASKS), "a run", "adapter"]
    assert all(row.keys() == {"scores", "tags"} and list(row["scores"]) == [*TASKS, "average"] for row in rows.values())
    assert rows["a run"] == rows["adapter"] == rows["teacher text"], "a run stands for its last checkpoint"
    assert len({json.dumps(rows[name]) for name in list(rows)[:4]}) == 4, "and each model is its own"
    table = report.markdown_table({name: row["scores"] for name, row in rows.items()})
    assert table in out and table in text and str(tmp_path / "table/report.md") in out
    own = sum(rows[f"teacher {task}"]["scores"][task] for task in TASKS) / 3
    assert f"Mean of the teachers' own-task scores: {own:.3f}." in text
    assert text.count("![") == 6 * 3 and (tmp_path / "table/samples/a-run-text.png").is_file()


def test_eval_py_draws_and_scores_sd35_with_teachers_of_every_kind(sd35, tmp_path, no_pictures, monkeypatch):
    drawn, panels, real = {}, [], evaluation.evaluate

    def evaluate(model, prompts, s, cfg, panel):
        result = real(model, prompts, s, cfg, panel)
        panels.append(panel)
        drawn[len(drawn)] = torch.cat([images for images, _ in result["images"].values()])
        return result

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    flags = command(sd35.flags, "--out", str(tmp_path), "--compare", f"lora={sd35.lora}", stage="eval")
    assert evaluation.main([*flags, "--name", "scored", "--rewards", "jpeg=1"]) == 0
    rows = json.loads((tmp_path / "scored/results.json").read_text())
    assert list(rows) == ["base", *(f"teacher {task}" for task in TASKS), "lora"]
    assert all(list(row["scores"]) == [f"{task} jpeg" for task in TASKS] and not row["tags"] for row in rows.values())
    assert len(drawn) == 5 and all(images.shape == (3, 3, 64, 64) for images in drawn.values())
    for a in range(5):
        for b in range(a):
            assert not torch.allclose(drawn[a], drawn[b], atol=1e-3), "every model draws its own pictures"
    assert len({id(panel) for panel in panels}) == 1 and list(panels[0].scorers) == ["jpeg"], "loaded once for all"
    assert evaluation.main([*flags, "--name", "unscored"]) == 0
    assert panels[5:] == [None] * 5
    assert all(torch.equal(drawn[i], drawn[i + 5]) for i in range(5)), "and the same ones again"
    rows = json.loads((tmp_path / "unscored/results.json").read_text())
    assert rows == dict.fromkeys(rows, {"scores": {}, "tags": {}}) and len(rows) == 5
    assert (tmp_path / "unscored/report.md").read_text().count("![") == 5 * 3, "pictures all the same"


def test_eval_py_refuses_in_one_line(world, tmp_path, capsys):
    flags = command(world.flags, "--out", str(tmp_path), stage="eval")
    for wrong, named in (["--compare", f"x={tmp_path / 'no'}"], "/no: "), (["--eval-prompts", "0"], "--eval-prompts 0"):
        assert evaluation.main([*flags, *wrong]) == 2
        assert named in the_one_line(capsys)


def test_each_shipped_teacher_is_the_best_at_its_own_task(tmp_path, no_pictures):
    """The checkpoints in assets/ are what the README says: a mediocre base, and specialists that beat it at home."""
    shipped = {"preset": "tiny", "name": "shipped", "mar": 0.0, "out": str(tmp_path), "eval_prompts": 36, "threads": 1}
    rows, _ = evaluation.compare(settings.resolve({**shipped, "device": "cpu"}))
    scores = {name: row["scores"] for name, row in rows.items()}
    for task in tiny.TASKS:
        own = scores[f"teacher {task}"][task]
        assert own == max(row[task] for row in scores.values()), task
        assert own > scores["base"][task] + 0.1, task
    assert 0.45 < scores["base"]["average"] < 0.7


# ------------------------------------------------------------------------------------- Q's tasks in the tiny world
def qwen_score(images, prompts, task):
    return evaluation.score(torch.as_tensor(images), prompts, task, None, True)


def test_two_sides_are_averaged_and_the_first_of_them_counted_by_category(monkeypatch):
    """Four edits of kinds a, a, b, b; instruction 1, 0, 1/2, 1 and identity 0, 1, 1, 1/2: all worked by hand."""
    meta = {"keep": [tiny_edit.WORD_BOX], "category": "no"}
    prompts = [data.Prompt("x", "edit", {**meta, "tag": tag}, "here") for tag in ("a", "a", "b", "b")]
    monkeypatch.setattr(tiny_edit, "score_instruction", lambda *_: [1.0, 0.0, 0.5, 1.0])
    monkeypatch.setattr(tiny_edit, "score_identity", lambda images, prompts, sources: [0.0, 1.0, 1.0, 0.5])
    named, each, tags = qwen_score(torch.zeros(4, 3, 24, 24), prompts, "edit")
    assert named == {"edit": 0.625, "edit instruction": 0.625, "edit identity": 0.625}
    assert each == [0.5, 0.5, 0.75, 0.75] and tags == {"a": 0.5, "b": 0.75}
    untold = [*prompts[:3], prompts[3]._replace(metadata={})]  # a user's own, which says neither kind nor what stays
    named, each, tags = qwen_score(torch.zeros(4, 3, 24, 24), untold, "edit")
    assert named == {"edit": 0.625, "edit instruction": 0.625} and each == [1.0, 0.0, 0.5, 1.0]
    assert tags == {"a": 0.5, "b": 0.5, "edit": 1.0}
    prompts = [data.Prompt("x", "t2i", {"tag": "no", "category": c}, "here") for c in ("open", "typography", "open")]
    monkeypatch.setattr(tiny_edit, "score_alignment", lambda *_: [1.0, 0.0, 0.0])
    monkeypatch.setattr(tiny, "score_quality", lambda *_: [0.5, 0.25, 0.75])
    named, each, tags = qwen_score(torch.zeros(3, 3, 24, 24), prompts, "t2i")
    assert named == {"t2i": pytest.approx((1 / 3 + 0.5) / 2), "t2i alignment": pytest.approx(1 / 3),
                     "t2i aesthetic": 0.5}  # fmt: skip
    assert each == pytest.approx([0.75, 0.125, 0.375]) and tags == {"open": 0.5, "typography": 0.0}


def test_an_untouched_source_keeps_its_identity_and_follows_no_instruction():
    prompts = tiny_edit.make_prompts("edit", "test", 10)
    sources = torch.stack(rollout.sources(prompts))
    named, _, tags = qwen_score(sources, prompts, "edit")
    assert named["edit identity"] == pytest.approx(1, abs=1e-3) and named["edit instruction"] < 0.5
    assert set(tags) == set(tiny_edit.EDITS), "each kind of edit has its own number"
    named, each, _ = qwen_score(torch.ones(10, 3, 24, 24), prompts, "edit")
    assert named["edit identity"] == 0 and max(each) < 1
    shuffled = qwen_score(sources.roll(1, 0), prompts, "edit")[0]
    assert shuffled["edit identity"] < 0.9, "each row is held against its own source"


def test_perfect_drawings_of_the_first_task_are_aligned():
    prompts = tiny_edit.make_prompts("t2i", "test", 12)
    by_task = {"typography": "text", "composition": "composition", "open": "quality"}
    images = torch.stack([drawing(p._replace(task=by_task[p.metadata["category"]])) for p in prompts])
    named, each, tags = qwen_score(images, prompts, "t2i")
    assert named == pytest.approx({"t2i": 1, "t2i alignment": 1, "t2i aesthetic": 1}, abs=1e-4)
    assert each == pytest.approx([1] * 12, abs=1e-4) and set(tags) == set(by_task)


def test_an_evaluation_of_qs_tasks_has_their_columns_their_average_and_their_sources(world2):
    model = with_adapter(world2, world2.teachers["edit"])
    some = {task: tiny_edit.make_prompts(task, "test", 4) for task in ("t2i", "edit")}
    s = tiny_settings(preset="tiny-qwen")
    result = evaluation.evaluate(model, some, s, 2.0)
    scores = result["scores"]
    columns = ["t2i", "t2i alignment", "t2i aesthetic", "edit", "edit instruction", "edit identity", "average"]
    assert list(scores) == columns
    assert scores["average"] == pytest.approx((scores["t2i"] + scores["edit"]) / 2)
    assert list(result["sources"]) == ["edit"]
    assert torch.equal(torch.stack(result["sources"]["edit"]), torch.stack(rollout.sources(some["edit"])))
    plain = evaluation.evaluate(model, some, s, 1.0)
    for task in some:
        assert not torch.allclose(plain["images"][task][0], result["images"][task][0], atol=1e-3), "guidance counts"
    named, each, _ = qwen_score(result["images"]["edit"][0], some["edit"], "edit")
    assert each == result["images"]["edit"][1] and named.items() <= scores.items()


def test_real_edits_are_scored_beside_their_sources():
    seen = []
    like = rewards.Scorer("like", lambda images, prompts, sources: seen.append(sources) or [0.5] * len(images), 0, 1)
    panel = scoring.Panel([like], {"edit": {"like": 2.0}})
    edits = tiny_edit.make_prompts("edit", "test", 3)
    named, each, _ = evaluation.score(torch.zeros(3, 3, 8, 8), edits, "edit", panel, False)
    assert named == {"edit like": 0.5} and each == [1.0] * 3
    assert torch.equal(torch.stack(seen[0]), torch.stack(rollout.sources(edits)))


def test_eval_py_guides_base_and_teachers_and_a_compared_student_only_where_it_is_asked(
    world2, tmp_path, monkeypatch, no_pictures
):
    cfgs, real = [], evaluation.evaluate
    monkeypatch.setattr(evaluation, "evaluate", lambda *args: cfgs.append(args[3]) or real(*args))
    compared = ["--compare", f"student={world2.teachers['t2i']}"]
    base = command(world2.flags, "--out", str(tmp_path), stage="eval")
    for name, flags, expected in (("a", [], [2.0] * 3 + [1.0]), ("b", ["--guidance", "both"], [2.0] * 4)):
        cfgs.clear()
        assert evaluation.main([*base, "--name", name, *flags, *compared]) == 0
        assert cfgs == expected
    rows = json.loads((tmp_path / "b/results.json").read_text())
    assert list(rows) == ["base", "teacher t2i", "teacher edit", "student"]
    assert rows["student"] == rows["teacher t2i"] and rows["student"] != rows["teacher edit"]
    unlike = json.loads((tmp_path / "a/results.json").read_text())["student"]
    assert unlike != rows["student"], "without guidance its pictures are others"
