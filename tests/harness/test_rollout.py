"""Oracles for what a step draws: prompts that are whose they should be, noise that belongs to a row, micro-batches that
change nothing, guidance where it is asked for, and the ODE by hand.
"""

import json
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch

import settings
import train
from data import files as data
from data import written
from harness import distil, rollout, teach
from models import load as models
from tests.conftest import TASKS, close, flat, metrics, the_one_line, tiny_settings, with_adapter
from tiny import drawings as tiny
from tiny import edits as tiny_edit

SMALL = tiny_settings()
GRPO = ["--stage", "grpo", "--task", "text", "--rewards", "quality=1"]


@pytest.fixture(scope="module")
def prompts():
    """Five test prompts of each task."""
    return {task: tiny.make_prompts(task, "test", 5) for task in TASKS}


@pytest.fixture
def model(world):
    """The base with one teacher's adapter as its student, which is what is selected."""
    return with_adapter(world, world.teachers["text"])


# --------------------------------------------------------------------------------------------------------- the prompts
def test_own_prompts_replace_those_of_their_task_and_are_cut_for_tests_only(tmp_path):
    (tmp_path / "q.txt").write_text("a beautiful picture of a red circle\na circle\na square\n")
    s = tiny_settings(prompts={"quality": str(tmp_path / "q.txt")})
    test = rollout.load_prompts(s, "test", 2, ["text", "quality"])
    assert [p.text for p in test["quality"]] == ["a beautiful picture of a red circle", "a circle"]
    assert test["text"] == tiny.make_prompts("text", "test", 2)
    train = rollout.load_prompts(s, "train", 2, ["quality", "text"])
    assert list(train) == ["quality", "text"] and len(train["quality"]) == 3
    assert train["text"] == tiny.make_prompts("text", "train", 2)


def test_prompts_without_a_task_are_routed_one_by_one(tmp_path):
    lines = ['a sign that says "CAT"', "a beautiful picture of a red circle", 'a sign that says "HEX"']
    (tmp_path / "p.txt").write_text("\n".join(lines))
    s = tiny_settings(prompts={"auto": str(tmp_path / "p.txt")})
    found = rollout.load_prompts(s, "train", 3, TASKS)
    assert [p.text for p in found["text"]] == [lines[0], lines[2]]
    assert [p.text for p in found["quality"]] == [lines[1]]
    assert all(p.task == task for task in TASKS for p in found[task])
    assert found["composition"] == tiny.make_prompts("composition", "train", 3), "no such line: the world's own"


def test_composition_prompts_need_their_checklist(tmp_path):
    (tmp_path / "c.txt").write_text("a photo of a circle\n")
    s = tiny_settings(prompts={"composition": str(tmp_path / "c.txt")})
    with pytest.raises(data.DataError, match=r"c\.txt:1: composition is scored by GenEval metadata"):
        rollout.load_prompts(s, "test", 2, ["composition"])


def test_real_models_get_prompts_in_their_own_words_and_any_of_the_users(tmp_path):
    line = '{"tag": "colors", "include": [{"class": "dragon", "count": 1}], "prompt": "a photo of a mauve dragon"}'
    (tmp_path / "p.jsonl").write_text(line)
    s = settings.resolve({"prompts": {"composition": str(tmp_path / "p.jsonl")}})
    found = rollout.load_prompts(s, "train", 4, TASKS)
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
        rollout.load_prompts(s, "train", 1, ["quality"])


def test_more_prompts_than_there_are_is_an_error_that_names_the_flag():
    s = settings.resolve({})
    assert len(rollout.load_prompts(s, "test", 390, ["composition"])["composition"]) == 390
    with pytest.raises(data.DataError, match="^--eval-prompts 391: .*391 composition.*; ask for 0 to 390,") as e:
        rollout.load_prompts(s, "test", 391, ["composition"])
    assert "\n" not in str(e.value)


def test_batches_cut_a_list_without_loss():
    assert rollout.batches([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4], [5]]
    assert rollout.batches([1, 2, 3], 0) == [[1, 2, 3]] and rollout.batches([1, 2], 9) == [[1, 2]]
    assert rollout.batches([], 2) == []


def test_conditions_hold_the_empty_prompt_only_where_guidance_is_on(model):
    texts = ["a circle", "a square", "a cross"]
    some = [data.Prompt(text, "quality", {}, "here") for text in texts]
    cond, uncond = rollout.conditions(model, some, 1.0)
    assert uncond is None and torch.equal(cond.tokens, model.encode(texts).tokens)
    for cfg in (0.0, 2.0):
        uncond = rollout.conditions(model, some, cfg)[1]
        assert torch.equal(uncond.tokens, model.encode([""] * 3).tokens)


# --------------------------------------------------------------------------------------- rows, micro-batches and ranks
def test_the_trained_steps_lie_in_the_stochastic_window():
    def steps(seed=0, **changes):
        generator = torch.Generator().manual_seed(seed)
        s = settings.resolve({"preset": "tiny", "num_steps": 6, **changes})
        return rollout.trained_steps(SimpleNamespace(s=s, generator=lambda *_: generator))

    assert steps(window="2:5", train_steps="all") == [2, 3, 4]
    assert steps(window="2:5", train_steps="first", train_count=2) == [2, 3]
    assert steps(window="2:5", train_steps="first", train_count=9) == [2, 3, 4], "not more than there are"
    drawn = {tuple(steps(seed, window="1:5", train_steps="random", train_count=2)) for seed in range(200)}
    assert drawn == set(combinations((1, 2, 3, 4), 2)), "every pair of the window comes, and no other"
    assert steps(window="2:5", train_steps="all", estimator="velocity") == [0, 1, 2, 3, 4, 5]
    assert steps(window="2:5", train_steps="all", estimator="velocity", stage="grpo", task="text") == [2, 3, 4]


def share(rank=0, world=1, step=0, **changes):
    """The rows of one rank's step, as rollout.rows_of draws them from twelve prompts a task."""
    s = settings.resolve({"preset": "tiny", "prompts_per_step": 3, "group_size": 2, **changes})
    prompts = {task: tiny.make_prompts(task, "train", 12) for task in TASKS}
    run = SimpleNamespace(s=s, rank=rank, world=world)
    return rollout.rows_of(run, prompts if s.stage != "grpo" or s.task == "mix" else {s.task: prompts[s.task]}, step)


def test_a_batch_is_shared_evenly_and_the_first_tasks_take_the_rest():
    for size, sizes in ((5, [2, 2, 1]), (3, [1, 1, 1]), (2, [1, 1, 0]), (1, [1, 0, 0])):
        tasks = [row.prompt.task for row in share(stage="sft", prompts_per_step=size)]
        assert [tasks.count(task) for task in TASKS] == [2 * n for n in sizes]
        assert tasks == sorted(tasks, key=TASKS.index), "task by task: a micro-batch mostly has one teacher"
    rows = share(group_size=3)
    assert [row.prompt for row in rows[::3]] == [row.prompt for row in rows[2::3]], "a group's rows side by side"
    assert len({row.seed for row in rows}) == 9, "and each with noise of its own"


@pytest.mark.parametrize("changes", [{}, {"stage": "grpo", "task": "text"}, {"stage": "grpo", "task": "mix"}])
@pytest.mark.parametrize("step", [0, 4])
def test_two_ranks_with_half_the_prompts_draw_together_what_one_draws(changes, step):
    changes = {"updates": 1, **changes}
    alone = share(step=step, prompts_per_step=6, **changes)
    halves = [share(rank, 2, step, prompts_per_step=3, **changes) for rank in (0, 1)]
    assert len(alone) == len(set(alone_ := [(row.prompt.text, row.seed) for row in alone])) == 12
    both = [(row.prompt.text, row.seed) for half in halves for row in half]
    assert sorted(both) == sorted(alone_)
    assert not {text for text, _ in both[:6]} & {text for text, _ in both[6:]}, "a prompt's group lives on one rank"


def test_the_noise_of_a_row_is_named_by_what_it_is_for_and_by_nothing_else():
    base = share()
    seeds = {row.seed for row in base}
    for other in ({"step": 1}, {"seed": 1}, {"stage": "grpo", "task": "text", "updates": 1}):
        drawn = {row.seed for row in share(**other)}
        assert len(drawn) == 6 and not drawn & seeds
        seeds |= drawn
    expected = [data.seed_for("row", 0, "opd", "", 0, task, 0, g) for task in TASKS for g in (0, 1)]
    assert [row.seed for row in base] == expected
    same_rows = share(micro_batch=2, num_steps=3, window="0:2", lr=0.5, cfg=3.0, rank=0)
    assert same_rows == base
    a, b = (row.source() for row in base[:2])
    again = base[0].source()
    assert torch.equal(x := torch.randn(3, generator=a), torch.randn(3, generator=again)), "fresh each time"
    assert not torch.equal(x, torch.randn(3, generator=b))


def states(calls):
    """x and x_next of all rows, in their order, at each trained step: {index: (x, x_next)}."""
    steps = {call.args[1].index: [] for call in calls}
    for call in calls:
        steps[call.args[1].index].append(call.args[1])
    return {n: (torch.cat([p.x for p in parts]), torch.cat([p.x_next for p in parts])) for n, parts in steps.items()}


@pytest.mark.parametrize(
    "flags",
    [["--stage", "opd"], ["--estimator", "path"], ["--cfg", "2"], [*GRPO, "--beta", "0.1"]],
    ids=["opd", "path", "guided", "grpo"],
)
def test_micro_batches_change_neither_the_noise_nor_the_gradient(go, spy, updates, world, flags):
    calls, found = spy(teach, "policy_step") if flags[:2] == GRPO[:2] else spy(distil, "learn"), []
    for size in (0, 1, 4, 6):
        folder = go(f"of{size}", *flags, "--micro-batch", str(size), "--init", str(world.teachers["text"]))
        found.append((states(calls), flat(updates[-1].grads), metrics(folder)[0]))
        assert len(calls) == 2 * -(-6 // (size or 6)), "two trained steps"
        calls.clear()
    whole, gradient, line = found[0]
    assert gradient.norm() > 0
    for path, grads, metric in found[1:]:
        assert torch.equal(path[0][0], whole[0][0]), "the noise that a trajectory begins with, to the bit"
        for n in whole:
            assert close(path[n][0], whole[n][0]) and close(path[n][1], whole[n][1]), "and along it"
        assert (grads - gradient).abs().max() < 2e-6 * gradient.abs().max(), "float32's rounding, no more"
        assert metric == pytest.approx(line, rel=1e-3, abs=1e-6)


# --------------------------------------------------------------------------------------------------- plain ODE samples
def test_the_noise_of_a_picture_depends_on_the_seed_and_its_row_alone(model, prompts):
    """Not on the batch it is drawn in (only rounding does), nor on how many prompts follow."""
    some = [*prompts["text"], *prompts["quality"]]
    drawn = rollout.draw(model, some, SMALL, 3, 1.0)
    assert drawn.shape == (10, 3, 24, 24) and drawn.dtype == torch.float32 and not drawn.requires_grad
    assert torch.equal(drawn, rollout.draw(model, some, SMALL, 3, 1.0))
    for size in (1, 3, 4):
        again = rollout.draw(model, some, tiny_settings(micro_batch=size), 3, 1.0)
        torch.testing.assert_close(again, drawn, rtol=0, atol=1e-5)
    torch.testing.assert_close(rollout.draw(model, some[:3], SMALL, 3, 1.0), drawn[:3], rtol=0, atol=1e-5)
    repeated = rollout.draw(model, [some[0]] * 3, SMALL, 3, 1.0)
    assert not torch.allclose(repeated[0], repeated[1], atol=1e-2), "one prompt, other noise in each row"
    assert not torch.allclose(rollout.draw(model, some, SMALL, 4, 1.0), drawn, atol=1e-2)
    assert not torch.allclose(rollout.draw(model, some, SMALL, 3, 3.0), drawn, atol=1e-3), "guidance counts"
    assert not torch.allclose(rollout.draw(model, some, tiny_settings(eval_steps=3), 3, 1.0), drawn, atol=1e-3)


def test_a_picture_is_the_ode_integrated_by_hand(model, prompts):
    some = prompts["text"][:2]
    sources = [torch.Generator().manual_seed(data.seed_for("draw", 7, row)) for row in range(2)]
    x = torch.stack([torch.randn(3, 24, 24, generator=source) for source in sources])
    cond, empty = model.encode([p.text for p in some]), model.encode(["", ""])
    with torch.no_grad():
        for t in (1.0, 0.75, 0.5, 0.25):  # Euler with dt = 1/4 and guidance 2: v_empty + 2 (v - v_empty)
            v, v_empty = model.velocity(x, t, cond), model.velocity(x, t, empty)
            x = x - 0.25 * (v_empty + 2 * (v - v_empty))
    drawn = rollout.draw(model, some, tiny_settings(eval_steps=4), 7, 2.0)
    torch.testing.assert_close(drawn, x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("count, size", [(5, 2), (4, 2), (5, 3), (2, 3), (1, 2)])
def test_ranks_share_the_rows_and_every_one_gets_what_one_alone_draws(model, prompts, monkeypatch, count, size):
    some = prompts["text"][:count]
    alone = rollout.draw(model, some, SMALL, 3, 1.0)
    shares, rounds = [], -(-count // size)
    for rank in range(size):
        monkeypatch.setattr(rollout.ranks, "rank_and_world", lambda rank=rank: (rank, size))
        shares.append(rollout.draw(model, some, SMALL, 3, 1.0))
    assert [len(share) for share in shares] == [rounds] * size, "under FSDP all must run as many forwards"

    def all_gather(parts, mine):
        assert torch.equal(mine, shares[size - 1])
        for part, share in zip(parts, shares, strict=True):
            part.copy_(share)

    fake = SimpleNamespace(is_initialized=lambda: True, all_gather=all_gather)
    monkeypatch.setattr(rollout, "dist", fake)
    together = rollout.draw(model, some, SMALL, 3, 1.0)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


# -------------------------------------------------------------------------------- edits beside prompts without a source
def edits_and_others(count=3):
    """Prompts of Q's two tasks, task by task."""
    return tiny_edit.make_prompts("t2i", "test", count), tiny_edit.make_prompts("edit", "test", count)


def test_micro_batches_keep_the_order_and_no_part_has_both_edits_and_others():
    drawn, edits = edits_and_others()
    rows = [rollout.Row(p, number) for number, p in enumerate([*drawn, *edits[:2], drawn[0]])]
    assert [p.task for p in (row.prompt for row in rows)] == ["t2i"] * 3 + ["edit"] * 2 + ["t2i"]
    for size, sizes in ((0, [3, 2, 1]), (1, [1] * 6), (2, [2, 1, 2, 1]), (9, [3, 2, 1])):
        parts = rollout.micro_batches(rows, size)
        assert [len(part) for part in parts] == sizes
        assert [row for part in parts for row in part] == rows
        assert all(len({row.prompt.task for row in part}) == 1 for part in parts)
    assert rollout.micro_batches([], 3) == []
    untagged = rows[0]._replace(prompt=drawn[0]._replace(metadata={"image": "x.png"}))
    assert len(rollout.micro_batches([untagged, rows[0]], 0)) == 2, "the picture decides, not the task's name"


def test_sources_are_the_pictures_of_edits_in_their_places():
    drawn, edits = edits_and_others()
    assert rollout.sources(drawn) is None
    found = rollout.sources([edits[0], drawn[0], edits[1]])
    assert found[1] is None and [image.shape for image in (found[0], found[2])] == [(3, 24, 24)] * 2
    for image, prompt in zip((found[0], found[2]), edits):
        expected = torch.from_numpy(data.source_image(prompt).copy()).permute(2, 0, 1).float() / 255
        assert image.dtype == torch.float32 and torch.equal(image, expected) and image.max() <= 1
    assert not torch.equal(found[0], found[2])


def test_the_empty_prompt_of_an_edit_sees_the_same_picture(world2):
    model, (drawn, edits) = models.load_tiny(world2.base), edits_and_others()
    for some in (edits, drawn):
        images = rollout.sources(some)
        cond, uncond = rollout.conditions(model, some, 3.0)
        assert rollout.conditions(model, some, 1.0)[1] is None
        expected = model.encode([model.empty] * 3, images)
        assert torch.equal(uncond.tokens, expected.tokens) and not uncond.mask.any() and cond.mask.any(1).all()
        if some is edits:
            assert torch.equal(uncond.source, cond.source)
            assert torch.equal(cond.source, torch.stack(images) * 2 - 1), "each row its own"
        else:
            assert uncond.source is cond.source is None


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_another_source_or_prompt_changes_its_own_rows_velocity_only(world2, cfg):
    model, (_, edits) = with_adapter(world2, world2.teachers["edit"]), edits_and_others(4)
    x = torch.randn(4, 3, 24, 24, generator=torch.Generator().manual_seed(1))

    def velocity(prompts):
        with torch.no_grad():
            return model.velocity(x, 0.6, *rollout.conditions(model, prompts, cfg), cfg)

    before = velocity(edits)
    picture = edits[1]._replace(metadata={**edits[1].metadata, "image": edits[3].metadata["image"]})
    text = edits[1]._replace(text=edits[3].text)
    for changed in (picture, text):
        after = velocity([edits[0], changed, *edits[2:]])
        assert close(after[[0, 2, 3]], before[[0, 2, 3]], 1e-5)
        assert (after[1] - before[1]).norm() > 1e-3 * before[1].norm()


def test_every_prompt_is_encoded_once_with_its_picture_and_the_empty_one_once_a_picture():
    asked, (drawn, edits) = [], edits_and_others()
    twice = edits[0]._replace(metadata={**edits[0].metadata, "image": edits[1].metadata["image"]})

    class Model:
        empty = " "

        def prepare(self, texts, images):
            asked.extend(zip(texts, images, strict=True))

    for guided in (False, True):
        asked.clear()
        rollout.encode_all(Model(), [*drawn, drawn[0], *edits, edits[2], twice], guided)
        texts = [text for text, _ in asked]
        assert texts == [p.text for p in (*drawn, *edits, twice)] + [" "] * 4 * guided
        for (_, image), prompt in zip(asked, [*drawn, *edits, twice], strict=False):
            expected = rollout.sources([prompt])
            assert image is None if expected is None else torch.equal(image, expected[0])
        empties = [image for text, image in asked if text == " "]
        assert sum(image is None for image in empties) == guided, "once without a picture, once with each of three"


def test_an_edit_is_drawn_from_its_source_and_the_same_in_micro_batches(world2):
    model, (_, edits) = with_adapter(world2, world2.teachers["edit"]), edits_and_others(4)
    drawn = rollout.draw(model, edits, SMALL, 3, 2.0)
    for size in (1, 3):
        torch.testing.assert_close(rollout.draw(model, edits, tiny_settings(micro_batch=size), 3, 2.0), drawn,
                                   rtol=0, atol=1e-4)  # fmt: skip
    other = [edits[1]._replace(metadata=edits[0].metadata) if i == 1 else p for i, p in enumerate(edits)]
    again = rollout.draw(model, other, SMALL, 3, 2.0)
    torch.testing.assert_close(again[[0, 2, 3]], drawn[[0, 2, 3]], rtol=0, atol=1e-4)
    assert not torch.allclose(again[1], drawn[1], atol=1e-2)


def test_joint_mixing_has_every_task_in_every_step_and_turns_have_one(go2, spy):
    rows = spy(rollout, "rows_of")
    for mix in ("joint", "turns"):
        lines = metrics(go2(mix, "--stage", "grpo", "--task", "mix", "--mix", mix, "--steps", "3"))
        tasks = [[row.prompt.task for row in call.result] for call in rows]
        rows.clear()
        if mix == "joint":
            assert tasks == [["t2i"] * 4 + ["edit"] * 4] * 3
            assert all({"reward/identity", "reward/quality"} <= set(line) for line in lines)
        else:
            assert tasks == [["t2i"] * 8, ["edit"] * 8, ["t2i"] * 8], "equal shares where F says nothing"
            assert ["reward/identity" in line for line in lines] == [False, True, False]


def test_forward_process_losses_may_train_any_time():
    def steps(**changes):
        s = settings.resolve({"preset": "tiny", "num_steps": 6, "window": "2:5", "train_steps": "all", **changes})
        return rollout.trained_steps(SimpleNamespace(s=s, generator=lambda *_: torch.Generator()))

    assert steps(stage="nft", task="text") == [0, 1, 2, 3, 4, 5], "it needs no noisy transition"
    assert steps(stage="nft", task="text", train_steps="first", train_count=2) == [0, 1]
    assert steps(stage="grpo", task="text") == [2, 3, 4]


def test_edits_without_pictures_are_one_line_before_a_model_loads(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("nothing may be loaded"))
    for stage in (["opd"], ["grpo", "--task", "edit", "--rewards", "jpeg=1"], ["curate", "--rewards", "jpeg=1"]):
        flags = ["--preset", "qwen-rl", "--stage", *stage, "--out", str(tmp_path), "--device", "cpu"]
        assert train.main(flags) == 2
        assert "edits need source pictures: --prompts edit=FILE.jsonl, or --tasks without edit" in the_one_line(capsys)
        assert train.main([*flags, "--dry-run"]) == 0, "a plan needs none"
        assert '"preset": "qwen-rl"' in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_auto_routes_edits_by_their_picture_and_all_else_to_the_first_task(tmp_path):
    drawn, edits = edits_and_others()
    lines = [{"prompt": p.text, **p.metadata} for p in (drawn[0], edits[0], drawn[1], edits[1])]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    s = settings.resolve({"preset": "tiny-qwen", "prompts": {"auto": str(tmp_path / "p.jsonl")}})
    found = rollout.load_prompts(s, "train", 5, ["t2i", "edit"])
    assert {task: [(p.text, p.task) for p in some] for task, some in found.items()} == {
        "t2i": [(p.text, "t2i") for p in drawn[:2]], "edit": [(p.text, "edit") for p in edits[:2]]
    }  # fmt: skip
    s = settings.resolve({"preset": "tiny-qwen", "tasks": "edit", "prompts": {"auto": str(tmp_path / "p.jsonl")}})
    with pytest.raises(data.DataError, match=r"p\.jsonl:1: "):
        rollout.load_prompts(s, "train", 5, ["edit"])
