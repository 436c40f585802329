"""Oracles for test pictures on disk: what names one, what noise it has, who draws it, and what a kill costs."""

import json
from itertools import count
from pathlib import Path

import pytest
import torch

import eval as evaluation
from data.files import Prompt
from harness import drawn
from tests.helpers.ranks import torchrun
from tests.helpers.runs import command, tiny_settings, with_adapter
from tiny import edits


def prompt(text, task="quality", **metadata):
    return Prompt(text, task, metadata, "p:1")


def bytes_in(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*.png"))}


# --------------------------------------------------------------------------------------------------- what is listed
def test_a_prompt_has_its_pictures_one_after_the_other_and_a_repeated_line_is_more_pictures_of_one_prompt():
    a, b = prompt("a cat"), prompt("two dogs")
    pictures = drawn.listed({"quality": [a, b, a]}, samples=2)
    assert [(p.prompt.text, p.index, p.sample) for p in pictures] == [
        ("a cat", 0, 0), ("two dogs", 1, 0), ("a cat", 0, 1), ("two dogs", 1, 1), ("a cat", 0, 2), ("a cat", 0, 3)
    ]  # fmt: skip
    assert len({p.file for p in pictures}) == 6


def test_lines_of_equal_words_and_other_metadata_are_prompts_of_their_own_with_the_same_pictures():
    a, b = prompt("two cats", "composition", tag="counting"), prompt("two cats", "composition", tag="two_object")
    pictures = drawn.listed({"composition": [a, b]}, samples=2)
    assert [(p.prompt.metadata["tag"], p.index, p.sample) for p in pictures] == [
        ("counting", 0, 0), ("two_object", 1, 0), ("counting", 0, 1), ("two_object", 1, 1)
    ]  # fmt: skip
    assert len({p.file for p in pictures}) == 2


def test_a_pictures_file_follows_from_words_source_and_number_and_not_from_the_list_or_the_task(tmp_path):
    source, other = (edits.make_prompts("edit", "test", 2)[i].metadata["image"] for i in (0, 1))
    names = {
        drawn.Picture(p, task, index, n).file
        for p, task, index, n in (
            (prompt("A cat!"), "quality", 0, 0), (prompt("A cat!", "text", tag="x"), "text", 7, 0),
            (prompt("A cat!"), "quality", 0, 1), (prompt("a cat!"), "quality", 0, 0),
            *((prompt("A cat!", "edit", image=image), "edit", 0, 0) for image in (source, other)),
        )
    }  # fmt: skip
    assert len(names) == 5, "the first two are one picture"
    long = drawn.Picture(prompt("../" + "x" * 300 + "\N{CAT}"), "quality", 0, 0).file
    assert "/" not in long and len(long) < 80


# ------------------------------------------------------------------------------------------------------ what is drawn
def kept(model, prompts, s, cfg=1.0, there=()):
    """{file: picture} of what is drawn."""
    found = {}
    drawn.draw(model, drawn.listed(prompts, s.samples), s, cfg, set(there).__contains__, found.__setitem__)
    return found


def test_a_picture_has_its_own_noise_in_whatever_list_it_stands(world, prompts):
    """Only rounding depends on the micro-batch."""
    model, some = with_adapter(world, world.teachers["text"]), prompts["text"]
    alone = kept(model, {"text": some}, tiny_settings(samples=2))
    shuffled = kept(model, {"quality": prompts["quality"], "x": some[::-1]}, tiny_settings(samples=3, micro_batch=4))
    assert len(alone) == 10 and len(shuffled) == 30
    for file, image in alone.items():
        torch.testing.assert_close(shuffled[file], image, rtol=0, atol=1e-5)
    first, second = ([image for file, image in alone.items() if file.endswith(f"-{n}.png")] for n in (0, 1))
    assert not any(torch.allclose(a, b, atol=1e-2) for a, b in zip(first, second, strict=True))
    other = kept(model, {"text": some}, tiny_settings(seed=1, samples=2))
    assert not any(torch.allclose(other[file], image, atol=1e-2) for file, image in alone.items())


def test_a_prompt_of_two_tasks_is_drawn_once_and_what_is_there_is_not_drawn(world, prompts, spy):
    model, some = with_adapter(world, world.teachers["text"]), prompts["text"]
    s = tiny_settings(micro_batch=2)
    parts = spy(drawn.rollout, "sampled")
    found = kept(model, {"text": some, "again": some}, s)
    assert len(found) == 5 and [len(call.args[1]) for call in parts] == [2, 2, 1]
    parts.clear()
    files = [p.file for p in drawn.listed({"text": some})]
    again = kept(model, {"text": some}, s, there=files[:3])
    assert [len(call.args[1]) for call in parts] == [2, 1] and list(again) == files[3:]
    assert all(torch.equal(again[file], found[file]) for file in again), "a micro-batch is the same, whatever is there"


# ------------------------------------------------------------------------------------------------------- whole folders
@pytest.fixture
def flags(world, tmp_path):
    """An evaluation of the small world, of 4 models x 18 distinct pictures in micro-batches of 4."""
    found = command(world.flags, "--out", str(tmp_path), "--micro-batch", "4", stage="eval")
    return [*found, "--compare", f"student={world.teachers['text']}"]


def test_two_ranks_draw_the_folder_that_one_draws(flags, tmp_path, no_pictures):
    assert evaluation.main([*flags, "--name", "one"]) == 0
    code, output, _ = torchrun("eval.py", *flags, "--name", "two")
    assert code == 0, output[-3000:]
    one, two = bytes_in(tmp_path / "one/pictures"), bytes_in(tmp_path / "two/pictures")
    assert len(one) == 4 * 18 and one == two
    rows = [[json.loads(line) for line in (tmp_path / name / "rows.jsonl").open()] for name in ("one", "two")]
    assert rows[0] == rows[1] and len(rows[0]) == 5 * 18, "the student is the text teacher, and is not drawn again"


def test_a_stop_costs_one_micro_batch_at_most_and_the_folder_becomes_the_same(
    flags, tmp_path, no_pictures, spy, monkeypatch
):
    """Of 72 pictures the 31st is not written. A picture has its name when it is whole, so a kill leaves no more."""
    assert evaluation.main([*flags, "--name", "whole"]) == 0
    real, calls = drawn.to_picture, count()
    with monkeypatch.context() as patch:
        patch.setattr(drawn, "to_picture", lambda image: real(image) if next(calls) < 30 else interrupt())
        assert evaluation.main([*flags, "--name", "cut"]) == 130
    assert len(bytes_in(tmp_path / "cut/pictures")) == 30, "one whole model, and three micro-batches of the next"
    kept, parts = spy(drawn, "to_picture"), spy(drawn.rollout, "sampled")
    assert evaluation.main([*flags, "--name", "cut"]) == 0
    assert len(kept) == 42 and sum(len(call.args[1]) for call in parts) == 42
    assert bytes_in(tmp_path / "cut/pictures") == bytes_in(tmp_path / "whole/pictures")


def interrupt():
    raise KeyboardInterrupt


def test_scores_are_made_from_the_files_without_a_model_and_other_settings_are_drawn_elsewhere(
    flags, tmp_path, no_pictures, monkeypatch
):
    flags = [*flags, "--eval-prompts", "2"]
    assert evaluation.main(flags) == 0
    report = (tmp_path / "eval/results.json").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(evaluation.load, "base_model", lambda *_: pytest.fail("there is nothing to draw"))
        assert evaluation.main(flags) == 0
        assert (tmp_path / "eval/results.json").read_text() == report
        with pytest.raises(pytest.fail.Exception):
            evaluation.main([*flags, "--seed", "1"])
    folder = next(Path(tmp_path / "eval/pictures").glob("base-*"))
    for file in folder.glob("*.png"):
        file.write_bytes(file.read_bytes()[:-1])
        break
    assert evaluation.main([*flags, "--eval-steps", "3"]) == 0
    assert len([*(tmp_path / "eval/pictures").glob("base-*")]) == 3 and not drawn.is_whole(file)
    assert evaluation.main(flags) == 0
    assert drawn.is_whole(file) and (tmp_path / "eval/results.json").read_text() == report
