"""What a step draws: prompts that are whose they should be, noise that belongs to a row, micro-batches that change
nothing, guidance where it is asked for, and the ODE by hand.
"""

import json
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch

import train
from data import files as data
from data import written
from data.batches import batches, seed_for
from data.pictures import data_uri, places, source_images, sources, sources_of
from harness import cli, load, rollout
from harness.counting import CountingModel
from models import flow
from models import load as models
from models.tiny import load_tiny
from tests.helpers.runs import TASKS, flat, metrics, the_one_line, tiny_settings
from tiny import drawings as tiny
from tiny import edits as tiny_edit

GRPO = ["--stage", "grpo", "--task", "text", "--rewards", "quality=1"]


# --------------------------------------------------------------------------------------------------------- the prompts
def test_own_prompts_replace_those_of_their_task_and_are_cut_for_tests_only(tmp_path):
    (tmp_path / "q.txt").write_text("a beautiful picture of a red circle\na circle\na square\n")
    s = tiny_settings(prompts={"quality": str(tmp_path / "q.txt")})
    test = load.load_prompts(s, "test", 2, ["text", "quality"])
    assert [p.text for p in test["quality"]] == ["a beautiful picture of a red circle", "a circle"]
    assert test["text"] == tiny.make_prompts("text", "test", 2)
    found = load.load_prompts(s, "train", 2, ["quality", "text"])
    assert list(found) == ["quality", "text"] and len(found["quality"]) == 3
    assert found["text"] == tiny.make_prompts("text", "train", 2)
    real = cli.resolve({"prompts": {"quality": str(tmp_path / "q.txt")}})
    found = load.load_prompts(real, "train", 4, ["quality", "text"])
    assert len(found["quality"]) == 3 and found["text"] == written.make_prompts("text", "train", 4)


def test_test_prompts_that_are_training_prompts_are_said(tmp_path):
    files = {"q": "abc", "two/train": "abcd", "two/test": "bdx", "new/train": "ab", "new/test": "c"}
    for name, lines in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.txt").write_text("\n".join(f"a {letter}" for letter in lines))
    said = {name: load.seen_in_training(tiny_settings(prompts={"quality": str(tmp_path / name)}))
            for name in ("q.txt", "two", "new")}  # fmt: skip
    assert len(said["q.txt"]) == 1 and "quality=" in said["q.txt"][0] and said["new"] == []
    assert len(said["two"]) == 1 and " 2 of 3 " in said["two"][0], "b and d"


def test_prompts_without_a_task_are_routed_one_by_one(tmp_path):
    """F Eq. 7's R(c): words in quotes are F's text; an edit has a picture; Q draws everything else as t2i."""
    lines = ['a sign that says "CAT"', "a beautiful picture of a red circle", 'a sign that says "HEX"']
    (tmp_path / "p.txt").write_text("\n".join(lines))
    found = load.load_prompts(tiny_settings(prompts={"auto": str(tmp_path / "p.txt")}), "train", 3, TASKS)
    assert [p.text for p in found["text"]] == [lines[0], lines[2]]
    assert [p.text for p in found["quality"]] == [lines[1]]
    assert all(p.task == task for task in TASKS for p in found[task])
    assert found["composition"] == tiny.make_prompts("composition", "train", 3), "no such line: the world's own"

    drawn, edits = edits_and_others()
    mixed = [{"prompt": p.text, **p.metadata} for p in (drawn[0], edits[0], drawn[1], edits[1])]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in mixed))
    s = cli.resolve({"preset": "tiny-qwen", "prompts": {"auto": str(tmp_path / "q.jsonl")}})
    found = load.load_prompts(s, "train", 5, ["t2i", "edit"])
    assert {task: [p.text for p in some] for task, some in found.items()} == {
        "t2i": [p.text for p in drawn[:2]], "edit": [p.text for p in edits[:2]]
    }  # fmt: skip


@pytest.mark.parametrize("prompts, task, split, count, named", [
    ({"composition": "c.txt"}, "composition", "test", 2, "c.txt:1"),  # no checklist to be scored by
    ({"auto": "e.jsonl"}, "quality", "train", 1, "e.jsonl:1"),  # an edit, for a model that only draws
    ({}, "composition", "test", 391, "--eval-prompts 391"),  # more than there are
])  # fmt: skip
def test_prompts_that_cannot_be_used_are_one_line_that_names_them(tmp_path, prompts, task, split, count, named):
    (tmp_path / "c.txt").write_text("a photo of a circle\n")
    edit = {"tag": "color", "include": [{"class": "cow", "count": 1}], "prompt": "paint it red", "image": "cow.png"}
    (tmp_path / "e.jsonl").write_text(json.dumps({**edit, "t2i_prompt": "a red cow"}))
    preset = "tiny" if "composition" in prompts else "flow-opd"
    s = cli.resolve({"preset": preset, "prompts": {k: str(tmp_path / v) for k, v in prompts.items()}})
    with pytest.raises(data.DataError) as e:
        load.load_prompts(s, split, count, [task])
    assert named in str(e.value) and "\n" not in str(e.value)


def test_edits_without_pictures_are_one_line_before_a_model_loads(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("nothing may be loaded"))
    for stage in (["opd"], ["grpo", "--task", "edit", "--rewards", "jpeg=1"], ["curate", "--rewards", "jpeg=1"]):
        flags = ["--preset", "qwen-rl", "--stage", *stage, "--out", str(tmp_path), "--device", "cpu"]
        assert train.main(flags) == 2
        assert "--prompts edit=FILE.jsonl" in the_one_line(capsys)
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------- rows, micro-batches and ranks
def test_the_trained_steps_lie_in_the_stochastic_window_if_the_loss_needs_noise():
    def steps(seed=0, **changes):
        s = cli.resolve({"preset": "tiny", "num_steps": 6, "window": "2:5", "train_steps": "all", **changes})
        return rollout.trained_steps(s, torch.Generator().manual_seed(seed))

    assert steps() == steps(stage="grpo", task="text") == [2, 3, 4]
    grpo = {"stage": "grpo", "task": "text"}
    assert steps(**grpo, train_steps="first", train_count=2) == [2, 3]
    assert steps(**grpo, train_steps="first", train_count=9) == [2, 3, 4], "not more than there are"
    drawn = {tuple(steps(seed, **grpo, window="1:5", train_steps="random", train_count=2)) for seed in range(200)}
    assert drawn == set(combinations((1, 2, 3, 4), 2)), "every pair of the window comes, and no other"
    for no_noise in ({"estimator": "velocity"}, {"stage": "nft", "task": "text"}):
        assert steps(**no_noise) == [0, 1, 2, 3, 4, 5]
    assert steps(**no_noise, train_steps="first", train_count=2) == [0, 1]


def share(rank=0, world=1, step=0, **changes):
    """The rows of one rank's step, as rollout.rows_of draws them from thirty prompts a task."""
    s = cli.resolve({"preset": "tiny", "prompts_per_step": 3, "group_size": 2, **changes})
    prompts = {task: tiny.make_prompts(task, "train", 30) for task in TASKS}
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


@pytest.mark.parametrize("changes", [
    {}, {"stage": "grpo", "task": "text"},
    *({"stage": "grpo", "task": "mix", "mix": mix} for mix in ("turns", "joint")),
])  # fmt: skip
@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("each", [4, 6, 8])  # prompts a rank: with three tasks, some remainder everywhere
def test_ranks_draw_in_each_update_what_one_rank_with_their_prompts_draws(monkeypatch, changes, updates, world, each):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    if changes:
        changes = {**changes, "updates": updates}
    else:
        updates = 1  # distillation

    def shares(rank, world, size):
        rows = [(row.prompt, row.seed) for row in share(rank, world, 4, prompts_per_step=size, **changes)]
        return batches(rows, len(rows) // updates)

    alone, ranks = shares(0, 1, each * world), [shares(rank, world, each) for rank in range(world)]
    for u in range(updates):
        both = [row for rank in ranks for row in rank[u]]
        assert len({seed for _, seed in both}) == 2 * each * world // updates
        assert sorted(both, key=lambda row: row[1]) == sorted(alone[u], key=lambda row: row[1])
        assert len({len(rank[u]) for rank in ranks}) == 1, "all ranks have as many rows"
        assert all(a[0] == b[0] for r in ranks for a, b in zip(r[u][::2], r[u][1::2])), "a group lives on one rank"
        tasks = [prompt.task for prompt, _ in alone[u]]
        if changes.get("mix") == "joint" or not changes:
            assert max(map(tasks.count, TASKS)) - min(map(tasks.count, TASKS)) <= 2, "each update has all tasks"


def test_the_noise_of_a_row_is_named_by_what_it_is_for_and_by_nothing_else():
    base = share()
    seeds = {row.seed for row in base}
    for other in ({"step": 1}, {"seed": 1}, {"stage": "grpo", "task": "text", "updates": 1}):
        drawn = {row.seed for row in share(**other)}
        assert len(drawn) == 6 and not drawn & seeds
        seeds |= drawn
    assert [row.seed for row in base] == [seed_for("row", 0, "opd", "", 0, t, 0, g) for t in TASKS for g in (0, 1)]
    assert share(micro_batch=2, num_steps=3, window="0:2", lr=0.5, cfg=3.0) == base
    x, again, other = (torch.randn(3, generator=row.generator()) for row in (base[0], base[0], base[1]))
    assert torch.equal(x, again), "fresh each time"
    assert not torch.equal(x, other)


@pytest.mark.parametrize("flags", [["--cfg", "2"], ["--drawn-states", "1"], ["--estimator", "path"],
                                   [*GRPO, "--beta", "0.1"], [*GRPO, "--stage", "nft", "--beta", "0.1"]],
                         ids=["opd", "drawn", "path", "grpo", "nft"])  # fmt: skip
def test_micro_batches_change_neither_the_noise_nor_the_gradient(go, spy, updates, world, flags):
    walked, found, drawn = spy(rollout.sde, "rollout"), [], "--drawn-states" in flags
    for size in (0, 1, 4):
        folder = go(f"of{size}", *flags, "--micro-batch", str(size), "--init", str(world.teachers["text"]))
        starts = torch.cat([call.args[1] for call in walked])
        assert drawn or len(walked) == -(-6 // (size or 6))
        found.append((starts, flat(updates[-1].grads), metrics(folder)[0]))
        walked.clear()
    starts, gradient, line = found[0]
    assert gradient.norm() > 0
    for other_starts, other, other_line in found[1:]:
        assert torch.equal(other_starts, starts), "the noise that a trajectory begins with, to the bit"
        assert (other - gradient).abs().max() < 2e-6 * gradient.abs().max(), "float32's rounding, no more"
        assert other_line == pytest.approx(line, rel=1e-3, abs=1e-6)


# --------------------------------------------------------------------------------------------------- plain ODE samples
def test_a_picture_is_the_ode_integrated_by_hand(model, prompts):
    some = prompts["text"][:2]
    sources = [torch.Generator().manual_seed(seed_for("draw", 7, row)) for row in range(2)]
    x = torch.stack([torch.randn(3, 24, 24, generator=source) for source in sources])
    cond, empty = model.encode([p.text for p in some]), model.encode(["", ""])
    with torch.no_grad():
        for t in (1.0, 0.75, 0.5, 0.25):  # Euler with dt = 1/4 and guidance 2: v_empty + 2 (v - v_empty)
            v, v_empty = model.velocity(x, t, cond), model.velocity(x, t, empty)
            x = x - 0.25 * (v_empty + 2 * (v - v_empty))
    drawn = rollout.draw(model, some, 4, 0, 7, 2.0)
    torch.testing.assert_close(drawn, x, rtol=0, atol=1e-5)
    assert drawn.dtype == torch.float32 and not drawn.requires_grad


def test_the_noise_of_a_picture_depends_on_the_seed_and_its_row_alone(model, prompts):
    """Not on the batch it is drawn in (only rounding does), nor on how many prompts follow."""
    some = [*prompts["text"], *prompts["quality"]]
    drawn = rollout.draw(model, some, 2, 0, 3, 1.0)
    assert torch.equal(drawn, rollout.draw(model, some, 2, 0, 3, 1.0))
    for size in (1, 3, 4):
        torch.testing.assert_close(rollout.draw(model, some, 2, size, 3, 1.0), drawn, rtol=0, atol=1e-5)
    torch.testing.assert_close(rollout.draw(model, some[:3], 2, 0, 3, 1.0), drawn[:3], rtol=0, atol=1e-5)
    repeated = rollout.draw(model, [some[0]] * 3, 2, 0, 3, 1.0)
    assert not torch.allclose(repeated[0], repeated[1], atol=1e-2), "one prompt, other noise in each row"
    assert not torch.allclose(rollout.draw(model, some, 2, 0, 4, 1.0), drawn, atol=1e-2)


@pytest.mark.parametrize("count, size", [(5, 2), (2, 3)])
@pytest.mark.parametrize("edits", [0, 2])
def test_ranks_share_the_rows_and_every_one_gets_what_one_alone_draws(world2, monkeypatch, count, size, edits):
    """Edits stand before a drawing, so that their order is not that of the turns."""
    model, (drawn, changed) = load_tiny(world2.base), edits_and_others(5)
    some = [*changed[: edits // 2], *drawn[: count - edits], *changed[edits // 2 : edits]]
    alone = rollout.draw(model, some, 2, 0, 3, 1.0)
    shares, forwards, real = [], [], flow.FlowModel._forward
    monkeypatch.setattr(flow.FlowModel, "_forward", lambda *args: forwards.append(1) or real(*args))

    def gathered(mine):  # the ranks one after the other; only the last has heard of all
        shares.append(mine)
        return shares if len(shares) == size else [mine] * size

    monkeypatch.setattr(rollout.ranks, "gathered", gathered)
    monkeypatch.setattr(rollout.ranks, "most", lambda numbers: [2 if edits else 1])
    for rank in range(size):
        monkeypatch.setattr(rollout.ranks, "rank_and_world", lambda rank=rank: (rank, size))
        found = rollout.draw(model, some, 2, 0, 3, 1.0)
    assert len({len(share) for share in shares}) == 1 and len(forwards) == 2 * size * (2 if edits else 1)
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-5)


# -------------------------------------------------------------------------------- edits beside prompts without a source
def edits_and_others(count=3):
    """Prompts of Q's two tasks."""
    return tiny_edit.make_prompts("t2i", "test", count), tiny_edit.make_prompts("edit", "test", count)


def test_micro_batches_keep_the_order_and_a_part_has_sources_of_one_shape():
    drawn, edits = edits_and_others()
    rows = [rollout.Row(p, number) for number, p in enumerate([*drawn, *edits[:2], drawn[0]])]
    for size, sizes in ((0, [3, 2, 1]), (1, [1] * 6), (2, [2, 1, 2, 1]), (9, [3, 2, 1])):
        parts = rollout.micro_batches(CountingModel(), rows, size)
        assert [len(part) for part in parts] == sizes
        assert [row for part in parts for row in part] == rows
        assert all(len({row.prompt.task for row in part}) == 1 for part in parts)
    shown = [data_uri(torch.zeros(3, *shape)) for shape in ((8, 8), (16, 16), (16, 8))]
    one, large, tall, two, turned = (
        rows[0]._replace(prompt=drawn[0]._replace(metadata={"image": [shown[i] for i in some]}))
        for some in ((0,), (1,), (2,), (0, 2), (2, 0))
    )
    parts = rollout.micro_batches(CountingModel(), [one, large, rows[0], tall, two, two, turned, one], 0)
    assert list(map(len, parts)) == [2, 1, 1, 2, 1, 1], "the pictures' number and shapes decide, not the task's name"


def test_a_rank_with_fewer_parts_repeats_a_row_that_does_not_count(monkeypatch):
    drawn, edits = edits_and_others()
    rows = [rollout.Row(p, number) for number, p in enumerate([*drawn, *edits])]
    parts = rollout.micro_batches(CountingModel(), rows, 2)
    assert rollout.in_step(parts) == parts
    monkeypatch.setattr(rollout.ranks, "most", lambda numbers: [numbers[0] + 2])
    assert rollout.in_step(parts) == [*parts, *[[rows[5]._replace(counts=False)]] * 2]


def test_conditions_are_the_prompts_with_their_pictures_and_the_empty_prompt_if_guidance_is_on(world2):
    model, (drawn, edits) = load_tiny(world2.base), edits_and_others()
    assert sources(drawn) is None and sources([drawn[0], edits[0]])[0] is None
    (one,), (same,) = sources([edits[0], edits[0]])
    assert one is same, "the rows of a picture share one tensor"
    for some in (edits, drawn):
        images = [sources_of(p) for p in some]
        cond, uncond = rollout.conditions(model, some, 3.0)
        assert rollout.conditions(model, some, 1.0)[1] is None
        assert torch.equal(cond.tokens, model.encode([p.text for p in some], images).tokens)
        assert torch.equal(uncond.tokens, model.encode([model.empty] * 3, images).tokens)
        assert not uncond.mask.any() and cond.mask.any(1).all()
        if some is drawn:
            assert uncond.sources == cond.sources == ()
            continue
        for source, prompt in zip(*cond.sources, edits, strict=True):  # each row its own, in [-1, 1]
            picture = torch.from_numpy(source_images(prompt)[0].copy()).permute(2, 0, 1) / 255
            assert torch.equal(source, picture * 2 - 1)
        assert torch.equal(*uncond.sources, *cond.sources)


def test_prompts_that_are_longer_than_the_encoder_reads_are_counted_by_file_once(qwen, capsys):
    prompts = [data.Prompt(f"{'a long one ' * n}{n}", "t2i", {}, f"{file}.txt:{i}") for file in "ab"
               for i, n in enumerate((1, 30, 40), 1)]  # fmt: skip
    prompts += [prompts[1]._replace(source="a.txt:9"), prompts[4]]
    model = models.load(str(qwen.base), size=(64, 64), text_length=20)
    for _ in range(2):
        rollout.encode_all(model, prompts, guided=True)
    said = [line for line in capsys.readouterr().err.splitlines() if "longer" in line]  # between bars
    cut = "prompts are longer than --text-length 20 tokens and are cut there, the first is"
    assert said == [f"a.txt: 3 {cut} a.txt:2", f"b.txt: 2 {cut} b.txt:2"]
    whole = models.load(str(qwen.base), size=(64, 64), text_length=500)
    tokens, long = (each.encode([prompts[5].text]).tokens for each in (model, whole))
    assert tokens.shape[1] == 20 < long.shape[1] and torch.allclose(tokens, long[:, :20], atol=1e-5)


def test_every_prompt_is_encoded_once_with_its_picture_and_the_empty_one_once_a_picture():
    asked, (drawn, edits) = [], edits_and_others()
    twice = edits[0]._replace(metadata={**edits[0].metadata, "image": [*places(edits[1]), *places(edits[2])]})
    model = SimpleNamespace(empty=" ", most_sources=2, source="m")
    model.prepare = lambda texts, images: asked.extend(zip(texts, images, strict=True)) or set()
    for guided in (False, True):
        asked.clear()
        rollout.encode_all(model, [*drawn, drawn[0], *edits, twice, edits[2]], guided)
        told = {(p.text, places(p)) for p in (*drawn, *edits, twice)}
        told |= {(" ", images) for _, images in told} if guided else set()
        found = [(text, tuple(image.where for image in images)) for text, images in asked]
        assert set(found) == told and len(found) == len(told)
        shown = [images for _, images in found]
        assert shown == sorted(shown, key=shown.index), "picture by picture, so that each is decoded once"
        assert torch.equal(asked[-1][1][-1].pixels(), *sources([edits[2]])[0])
