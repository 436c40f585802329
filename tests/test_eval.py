"""Oracles for the evaluation: perfect drawings score 1 and blank pages 0, noise is fixed, tables say what was found."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TASKS

import adapters
import data
import eval as evaluation
import flow
import models
import prompts as written
import recipe
import report
import rewards
import scoring
import settings
import tiny


def small(**changes):
    """Settings of the tiny world, two sampling steps."""
    return settings.resolve({"preset": "tiny", "eval_steps": 2, "eval_prompts": 5, "threads": 1, **changes})


SMALL = small()


@pytest.fixture(scope="module")
def prompts():
    """Five test prompts of each task."""
    return {task: tiny.make_prompts(task, "test", 5) for task in TASKS}


@pytest.fixture
def model(world):
    """The base with one teacher's adapter as its student, which is what is selected."""
    model = models.load_tiny(world.base)
    state, config = model.read_adapter(world.teachers["text"])
    model.add_adapter(flow.STUDENT, config, state)
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
    grey = images * 0.5 + 0.2
    named, each, details = tiny_score(grey, prompts, "quality")
    assert each == pytest.approx(tiny.quality(grey).tolist()) and details == {}
    assert named == {"quality": pytest.approx(np.mean(each))}
    assert named["quality"] != pytest.approx(tiny_score(grey, prompts, "text")[0]["text"])


def real_pictures(count):
    """(prompts, images): noise, the last one plain, which nothing compresses better than."""
    images = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    images[-1] = 0.5
    return written.make_prompts("text", "test", count), images


def test_real_pictures_are_scored_by_what_rewards_names_and_by_nothing_else():
    prompts, images = real_pictures(3)
    alone = rewards.score_jpeg(images, prompts)
    jpeg = scoring.build(recipe.read(settings.resolve({"rewards": "jpeg=0.5"})), "cpu", False, False)
    named, each, tags = evaluation.score(images, prompts, "text", jpeg, False)
    assert named == {"text jpeg": pytest.approx(np.mean(alone))}, "a column shows a reward as it is, without a weight"
    assert each == pytest.approx([0.5 * value for value in alone]) and tags == {} and np.argmax(each) == 2
    assert evaluation.score(images, prompts, "text", None, False) == ({}, [], {})


def test_every_scorer_has_a_column_where_it_is_asked_and_none_where_it_is_not():
    prompts, images = real_pictures(3)
    alone = rewards.score_jpeg(images, prompts)
    other = rewards.Scorer("other", lambda images, prompts, sources: torch.tensor([1.0, 2.0, 6.0]), 0.0, 9.0)
    far = rewards.Scorer("far", lambda *_: pytest.fail("it counts for other prompts"), 0.0, 1.0)
    weights = {"default": {"jpeg": 0.5, "other": 2.0}, "quality": {"far": 1.0}}
    jpeg = rewards.Scorer("jpeg", lambda images, prompts, sources: rewards.score_jpeg(images, prompts), -9.0, 1.0)
    panel = scoring.Panel([jpeg, other, far], weights)
    named, each, _ = evaluation.score(images, prompts, "text", panel, False)
    assert list(named) == ["text jpeg", "text other"] and named["text other"] == pytest.approx(3)
    assert each == pytest.approx([0.5 * value + 2 * other for value, other in zip(alone, (1, 2, 6), strict=True)])


def test_a_task_that_a_teachers_rewards_say_nothing_about_is_drawn_unscored():
    prompts, images = real_pictures(3)
    panel = scoring.build(recipe.Recipe({"jpeg": {"kind": "jpeg"}}, {"text": {"jpeg": 1.0}}, {}), "cpu", False, False)
    assert list(evaluation.score(images, prompts, "text", panel, False)[0]) == ["text jpeg"]
    others = written.make_prompts("quality", "test", 3)
    assert evaluation.score(images, others, "quality", panel, False) == ({}, [], {})


def test_a_panel_is_built_where_rewards_name_one_and_the_tiny_world_needs_none(monkeypatch):
    built = []
    monkeypatch.setattr(scoring, "build", lambda *args: built.append(args) or "a panel")
    assert evaluation.panel_of(small(rewards="task=1"), "cpu") is None
    assert evaluation.panel_of(settings.resolve({}), "cpu") is None and built == []
    s = settings.resolve({"rewards": "jpeg=2", "on_reward_failure": "drop"})
    assert evaluation.panel_of(s, "cpu") == "a panel"
    assert built == [(recipe.read(s), "cpu", False, False)], "an evaluation drops nothing: a table has no holes"


# -------------------------------------------------------------------------------------------------- the pictures
def test_the_noise_of_a_picture_depends_on_the_seed_and_its_row_alone(model, prompts):
    """Not on the batch it is drawn in (only rounding does), nor on how many prompts follow."""
    some = [*prompts["text"], *prompts["quality"]]
    drawn = evaluation.draw(model, some, SMALL, seed=3)
    assert drawn.shape == (10, 3, 24, 24) and drawn.dtype == torch.float32 and not drawn.requires_grad
    assert torch.equal(drawn, evaluation.draw(model, some, SMALL, seed=3))
    for size in (1, 3, 4):
        again = evaluation.draw(model, some, small(micro_batch=size), seed=3)
        torch.testing.assert_close(again, drawn, rtol=0, atol=1e-5)
    torch.testing.assert_close(evaluation.draw(model, some[:3], SMALL, seed=3), drawn[:3], rtol=0, atol=1e-5)
    repeated = evaluation.draw(model, [some[0]] * 3, SMALL, seed=3)
    assert not torch.allclose(repeated[0], repeated[1], atol=1e-2), "one prompt, other noise in each row"
    assert not torch.allclose(evaluation.draw(model, some, SMALL, seed=4), drawn, atol=1e-2)
    assert not torch.allclose(evaluation.draw(model, some, small(cfg=3.0), seed=3), drawn, atol=1e-3), "guidance counts"
    assert not torch.allclose(evaluation.draw(model, some, small(eval_steps=3), seed=3), drawn, atol=1e-3)


def test_a_picture_is_the_ode_integrated_by_hand(model, prompts):
    some = prompts["text"][:2]
    sources = [torch.Generator().manual_seed(data.seed_for("draw", 7, row)) for row in range(2)]
    x = torch.stack([torch.randn(3, 24, 24, generator=source) for source in sources])
    cond, empty = model.encode([p.text for p in some]), model.encode(["", ""])
    with torch.no_grad():
        for t in (1.0, 0.75, 0.5, 0.25):  # Euler with dt = 1/4 and guidance 2: v_empty + 2 (v - v_empty)
            v, v_empty = model.velocity(x, t, cond), model.velocity(x, t, empty)
            x = x - 0.25 * (v_empty + 2 * (v - v_empty))
    drawn = evaluation.draw(model, some, small(eval_steps=4, cfg=2.0), seed=7)
    torch.testing.assert_close(drawn, x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("count, size", [(5, 2), (4, 2), (5, 3), (2, 3), (1, 2)])
def test_ranks_share_the_rows_and_every_one_gets_what_one_alone_draws(model, prompts, monkeypatch, count, size):
    some = prompts["text"][:count]
    alone = evaluation.draw(model, some, SMALL, seed=3)
    shares, rounds = [], -(-count // size)
    for rank in range(size):
        monkeypatch.setattr(evaluation.ranks, "rank_and_world", lambda rank=rank: (rank, size))
        shares.append(evaluation.draw(model, some, SMALL, seed=3))
    assert [len(share) for share in shares] == [rounds] * size, "under FSDP all must run as many forwards"

    def all_gather(parts, mine):
        assert torch.equal(mine, shares[size - 1])
        for part, share in zip(parts, shares, strict=True):
            part.copy_(share)

    fake = SimpleNamespace(is_initialized=lambda: True, all_gather=all_gather)
    monkeypatch.setattr(evaluation, "dist", fake)
    together = evaluation.draw(model, some, SMALL, seed=3)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_conditions_hold_the_empty_prompt_only_where_guidance_is_on(model):
    texts = ["a circle", "a square", "a cross"]
    cond, uncond = evaluation.conditions(model, texts, 1.0)
    assert uncond is None and torch.equal(cond.tokens, model.encode(texts).tokens)
    for cfg in (0.0, 2.0):
        uncond = evaluation.conditions(model, texts, cfg)[1]
        assert torch.equal(uncond.tokens, model.encode([""] * 3).tokens)


def test_batches_cut_a_list_without_loss():
    assert evaluation.batches([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4], [5]]
    assert evaluation.batches([1, 2, 3], 0) == [[1, 2, 3]] and evaluation.batches([1, 2], 9) == [[1, 2]]
    assert evaluation.batches([], 2) == []


def test_evaluation_repeats_exactly_and_scores_the_adapter_that_is_selected(model, prompts):
    first, second = evaluation.evaluate(model, prompts, SMALL), evaluation.evaluate(model, prompts, SMALL)
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
        base = evaluation.evaluate(model, prompts, SMALL)
    assert not torch.allclose(base["images"]["text"][0], first["images"]["text"][0], atol=1e-3)
    assert base["scores"]["quality"] != scores["quality"]


def test_every_task_has_its_own_noise(model, prompts):
    result = evaluation.evaluate(model, {"text": prompts["text"], "quality": prompts["text"]}, SMALL)["images"]
    assert not torch.allclose(result["text"][0], result["quality"][0], atol=1e-2)


def test_only_rank_zero_decodes_and_scores_but_all_draw(model, prompts, monkeypatch):
    drawn, real = [], evaluation.draw
    monkeypatch.setattr(evaluation, "draw", lambda *args: drawn.append(args[3]) or real(*args))
    whole = evaluation.evaluate(model, prompts, SMALL)
    monkeypatch.setattr(evaluation.ranks, "rank_and_world", lambda: (1, 2))
    monkeypatch.setattr(model, "decode", lambda x: pytest.fail("another rank's pictures are nobody's"))
    assert whole and evaluation.evaluate(model, prompts, SMALL) is None
    assert drawn[:3] == drawn[3:] and len(set(drawn)) == 3, "the same three draws"


# --------------------------------------------------------------------------------------------------- the prompts
def test_own_prompts_replace_those_of_their_task_and_are_cut_for_tests_only(tmp_path):
    (tmp_path / "q.txt").write_text("a beautiful picture of a red circle\na circle\na square\n")
    s = small(prompts={"quality": str(tmp_path / "q.txt")})
    test = evaluation.load_prompts(s, "test", 2, ["text", "quality"])
    assert [p.text for p in test["quality"]] == ["a beautiful picture of a red circle", "a circle"]
    assert test["text"] == tiny.make_prompts("text", "test", 2)
    train = evaluation.load_prompts(s, "train", 2, ["quality", "text"])
    assert list(train) == ["quality", "text"] and len(train["quality"]) == 3
    assert train["text"] == tiny.make_prompts("text", "train", 2)


def test_prompts_without_a_task_are_routed_one_by_one(tmp_path):
    lines = ['a sign that says "CAT"', "a beautiful picture of a red circle", 'a sign that says "HEX"']
    (tmp_path / "p.txt").write_text("\n".join(lines))
    s = small(prompts={"auto": str(tmp_path / "p.txt")})
    found = evaluation.load_prompts(s, "train", 3, TASKS)
    assert [p.text for p in found["text"]] == [lines[0], lines[2]]
    assert [p.text for p in found["quality"]] == [lines[1]]
    assert all(p.task == task for task in TASKS for p in found[task])
    assert found["composition"] == tiny.make_prompts("composition", "train", 3), "no such line: the world's own"


def test_composition_prompts_need_their_checklist(tmp_path):
    (tmp_path / "c.txt").write_text("a photo of a circle\n")
    s = small(prompts={"composition": str(tmp_path / "c.txt")})
    with pytest.raises(data.DataError, match=r"c\.txt:1: composition is scored by GenEval metadata"):
        evaluation.load_prompts(s, "test", 2, ["composition"])


def test_real_models_get_prompts_in_their_own_words_and_any_of_the_users(tmp_path):
    line = '{"tag": "colors", "include": [{"class": "dragon", "count": 1}], "prompt": "a photo of a mauve dragon"}'
    (tmp_path / "p.jsonl").write_text(line)
    s = settings.resolve({"prompts": {"composition": str(tmp_path / "p.jsonl")}})
    found = evaluation.load_prompts(s, "train", 4, TASKS)
    assert [p.text for p in found["composition"]] == ["a photo of a mauve dragon"]
    for task in ("text", "quality"):
        assert found[task] == written.make_prompts(task, "train", 4) != tiny.make_prompts(task, "train", 4)


def test_a_prompt_of_a_task_that_the_model_does_not_know_is_refused(tmp_path):
    edit = {"tag": "color", "include": [{"class": "cow", "count": 1}], "prompt": "paint it red", "image": "cow.png"}
    (tmp_path / "e.jsonl").write_text(json.dumps({**edit, "t2i_prompt": "a red cow"}))
    s = settings.resolve({"prompts": {"auto": str(tmp_path / "e.jsonl")}})
    with pytest.raises(
        data.DataError, match=r"e\.jsonl:1: a prompt of the task 'edit'; this model knows comp.*quality$"
    ):
        evaluation.load_prompts(s, "train", 1, ["quality"])


def test_more_prompts_than_there_are_is_an_error_that_names_the_flag():
    s = settings.resolve({})
    assert len(evaluation.load_prompts(s, "test", 390, ["composition"])["composition"]) == 390
    with pytest.raises(data.DataError, match="^--eval-prompts 391: .*391 composition.*; ask for 0 to 390,") as e:
        evaluation.load_prompts(s, "test", 391, ["composition"])
    assert "\n" not in str(e.value)


# ------------------------------------------------------------------------------------------------- whole tables
@pytest.fixture
def no_pictures(monkeypatch):
    """Empty files in the place of grids, which take longer than such small models do."""
    empty = lambda file, *_: file.parent.mkdir(parents=True, exist_ok=True) or file.touch()  # noqa: E731
    monkeypatch.setattr(report, "save_grid", empty)


def test_eval_py_scores_base_teachers_and_whatever_is_compared(world, tmp_path, no_pictures, capsys):
    run = tmp_path / "run/checkpoints/step-000007"
    run.parent.mkdir(parents=True)
    run.symlink_to(world.teachers["text"])
    flags = [*world.flags, "--out", str(tmp_path), "--name", "table"]
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

    def evaluate(model, prompts, s, panel):
        result = real(model, prompts, s, panel)
        panels.append(panel)
        drawn[len(drawn)] = torch.cat([images for images, _ in result["images"].values()])
        return result

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    flags = [*sd35.flags, "--out", str(tmp_path), "--compare", f"lora={sd35.lora}"]
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


def the_one_line(capsys):
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


def test_eval_py_refuses_in_one_line(world, tmp_path, capsys):
    flags = [*world.flags, "--out", str(tmp_path)]
    assert evaluation.main([*flags, "--compare", f"x={tmp_path / 'no'}"]) == 2
    assert "/no: no such file or folder; give a path or a Hub id" in the_one_line(capsys)
    assert evaluation.main(["--compare", "nameless"]) == 2
    assert "--compare nameless" in the_one_line(capsys)
    assert evaluation.main([*flags, "--eval-prompts", "0"]) == 2
    assert "--eval-prompts 0" in the_one_line(capsys)


def test_teachers_and_anchor_share_one_backbone(world):
    teachers = {task: str(folder) for task, folder in world.teachers.items()}
    for stage, mar, anchor, expected in (
        ("opd", 0.02, "quality", "teacher:quality"),  # a teacher's task: no second copy
        ("opd", 0.02, teachers["text"], "anchor"),
        ("opd", 0.0, "quality", None),
        ("sft", 0.02, "quality", None),
    ):
        model = models.load_tiny(world.base)
        experts = evaluation.load_teachers(model, small(stage=stage, mar=mar, anchor=anchor, teachers=teachers))
        assert experts.pop("anchor", None) == expected
        assert experts == {task: f"teacher:{task}" for task in TASKS}
        assert len(model.adapters) == 3 + (expected == "anchor")


@pytest.mark.parametrize("what", ["model", "teachers", "anchor", "init", "compare"])
def test_everything_is_found_before_anything_is_loaded(world, tmp_path, monkeypatch, what):
    good = {"model": str(world.base), "teachers": {"text": str(world.teachers["text"])}, "tasks": "text"}
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("nothing may be loaded yet"))
    missing = {"teachers": {"text": "./no"}, "compare": {"x": "./no"}}.get(what, "./no")
    evaluation.locate_all(small(**good, mar=0.0, anchor="./no"))  # an anchor that nobody asks for
    with pytest.raises(adapters.ModelError, match=r"^\./no: no such file or folder"):
        evaluation.locate_all(small(**{**good, "anchor": "text", what: missing}))


def test_one_rank_a_node_looks_first(world, monkeypatch):
    """What it fetches, the others find in the cache."""
    s = small(model=str(world.base), teachers={task: str(folder) for task, folder in world.teachers.items()})
    for local, expected in ((0, ["locate"] * 4 + ["wait"]), (1, ["wait"] + ["locate"] * 4)):
        order, real = [], adapters.locate
        with monkeypatch.context() as patch:
            patch.setattr(adapters, "locate", lambda *args, o=order, real=real: o.append("locate") or real(*args))
            patch.setattr(evaluation.ranks, "wait", lambda o=order: o.append("wait"))
            patch.setattr(evaluation.ranks, "local_rank", lambda local=local: local)
            evaluation.locate_all(s)
        assert order == expected


def test_user_errors_are_the_ones_that_name_something_of_the_users():
    assert rewards.RewardError in evaluation.USER_ERRORS and ValueError not in evaluation.USER_ERRORS


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
