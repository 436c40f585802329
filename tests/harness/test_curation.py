"""The curation's files: whose lines count, Q 4.2's rule by hand, prompts that come back as they went in."""

import json
import math

import numpy as np
import pytest

from data import files as data
from data.files import Prompt
from data.pictures import PNG_URI, source_images
from harness import curation as C
from tiny import drawings as tiny
from tiny import edits as tiny_edit


def prompt(text, task="quality", **metadata):
    return Prompt(text, task, metadata, "mine:1")


A, B, D = prompt("a"), prompt("b"), prompt("b", "text")  # D has B's words and another task
GOOD, BAD, MIXED = [1.0, 1.0], [0.0, 0.0], [0.0, 1.0]


def ranges(folder, rank=0, run=7):
    return C.Ranges(folder / "ranges", rank, run)


def known(prompts, scores):
    return {C.key(p): {"scores": row} for p, row in zip(prompts, scores, strict=True) if row is not None}


def curated(folder, task):
    return data.read_prompts(folder / "prompts" / task, task)


# ------------------------------------------------------------------------------------------------------ the lines
def test_what_is_added_is_known_to_the_next_run_and_to_every_rank(tmp_path):
    odd = prompt('dog\u2028ü \x85 "q" \\ \x1c end', tag="colors")
    ranges(tmp_path, 0).add([A, D], np.array([[0.5, 1 / 3, 2.0], [0.0, math.nan, 1.0]]))
    ranges(tmp_path, 1).add([B, odd], np.array([[1.0, 2.0, 4.0], [0.0, 0.0, 0.0]]))
    (tmp_path / "ranges/notes.jsonl").write_text('{"run": 7, "task": "quality", "text": "x", "scores": [1]}')
    for rank in range(3):
        after = ranges(tmp_path, rank)
        assert after.known == after.all() and all(map(after.has, (A, B, D, odd)))
        assert not after.has(prompt("a", "text")) and not after.has(prompt("x"))
    assert {key: entry["scores"] for key, entry in after.known.items()} == {
        ("quality", "a", ""): [0.5, 0.333333, 2.0], ("text", "b", ""): [0.0, None, 1.0],
        ("quality", "b", ""): [1.0, 2.0, 4.0], ("quality", odd.text, ""): [0.0, 0.0, 0.0],
    }  # fmt: skip
    assert [after.known[C.key(p)]["category"] for p in (odd, D)] == ["colors", "text"]


def test_every_length_at_which_a_kill_may_cut_the_last_line_loses_that_line_alone(tmp_path):
    ranges(tmp_path).add([A, B], np.array([[1.0, 2.0], [3.0, 4.0]]))
    file = tmp_path / "ranges/rank-0.jsonl"
    whole = file.read_text()
    for length in range(whole.index("\n") + 1, len(whole) + 1):
        file.write_text(whole[:length])
        torn = ranges(tmp_path)
        assert torn.has(A) and torn.has(B) == (length >= len(whole) - 1), "without its end of line it is whole"
        torn.add([D], np.array([[5.0, 6.0]]))
        after = ranges(tmp_path)
        assert after.has(A) and after.has(D) and after.has(B) == torn.has(B), "what follows is a line of its own"


def test_lines_of_another_run_do_not_count_and_the_last_of_a_prompt_does(tmp_path):
    ranges(tmp_path).add([A], np.array([[1.0, 2.0]]))
    ranges(tmp_path, 0, run=8).add([A, B], np.array([[9.0, 9.0], [9.0, 9.0]]))
    assert ranges(tmp_path).known.keys() == {C.key(A)} and ranges(tmp_path, run=8).known.keys() == {C.key(A), C.key(B)}
    ranges(tmp_path).add([A], np.array([[3.0, 4.0]]))
    assert ranges(tmp_path).known[C.key(A)]["scores"] == [3.0, 4.0]


# ------------------------------------------------------------------------------------------------------- the rule
@pytest.mark.parametrize(("scores", "threshold", "middle", "said"), [
    ([0.5, 0.25, 0.375], 0.24, 0.5, "kept"),
    ([0.5, 0.25, 0.375], 0.25, 0.3, "always good"),  # the threshold itself is not above it
    ([0.5, 0.25, 0.375], 0.25, 0.4, "always bad"), ([0.5, 0.5], 0.0, 0.5, "always bad"),
    ([-3.0, -1.0], 1.5, 0.0, "kept"), ([-3.0, -1.0], 2.5, -2.5, "always good"),  # rewards may be negative
    ([0.0] * 15 + [1.0], 0.5, 0.5, "kept"),  # the range, not the standard deviation of 0.24
    ([0.0, None, 1.0], 0.05, 0.5, "not scored"), ([], 0.05, 0.5, "not scored"),  # half a group says nothing of it
])  # fmt: skip
def test_the_verdict_by_hand(scores, threshold, middle, said):
    assert C.verdict(scores, threshold, middle) == said and said in C.REASONS


# ------------------------------------------------------------------------------------------------------ the files
def test_what_is_kept_loads_again_with_its_words_order_and_metadata(tmp_path):
    prompts = {task: tiny.make_prompts(task, "train", 7) for task in tiny.TASKS}
    prompts["composition"][2].metadata["note"] = "of mine: ü"
    prompts["composition"][4].metadata["category"] = "hard"
    rows = [MIXED, BAD, MIXED, None, MIXED, GOOD, MIXED]
    lines = {k: v for some in prompts.values() for k, v in known(some, rows).items()}
    C.write(tmp_path, prompts, dict(reversed(lines.items())), 0.5)
    for task, some in prompts.items():
        kept, again = [some[i] for i in (0, 2, 4, 6)], curated(tmp_path, task)
        assert [(p.text, p.task) for p in again] == [(p.text, task) for p in kept]
        for before, after in zip(kept, again, strict=True):
            added = {"tag": task, "prompt": before.text} if before.metadata else {}
            assert after.metadata == {**added, **before.metadata}
            assert C.category(after) == C.category(before), "and its weights are the same"
    names = {task: [f.name for f in (tmp_path / "prompts" / task).iterdir()] for task in prompts}
    described = ["train_metadata.jsonl"]
    assert names == {"composition": described, "text": ["train.txt"], "quality": described}


def test_prompts_of_which_some_have_no_checklist_become_plain_text_and_repeats_stay(tmp_path):
    described = prompt("one", include=[{"class": "cow", "count": 1}])
    some = [described, prompt("two\u2028still two"), prompt("drei Kühe"), A, A]
    C.write(tmp_path, {"quality": some[:1]}, known(some, [MIXED] * 5), 0.5)  # a file of metadata would be read first
    C.write(tmp_path, {"quality": some}, known(some, [MIXED] * 5), 0.5)
    assert [p.text for p in curated(tmp_path, "quality")] == ["one", "two\u2028still two", "drei Kühe", "a", "a"]
    assert [f.name for f in (tmp_path / "prompts/quality").iterdir()] == ["train.txt"]


def test_the_report_counts_every_prompt_once_by_task_category_and_reason(tmp_path):
    compositions = [prompt(f"c{i}", "composition", tag=tag) for i, tag in enumerate(("colors", "counting", "colors"))]
    texts = [prompt(f'"t{i}"', "text") for i in range(5)]
    lines = known(compositions, [MIXED, GOOD, BAD]) | known(texts, [GOOD, None, BAD, [None, 1.0], GOOD])
    lines |= known([B], [MIXED])  # asked for no more: it counts for nothing
    said = C.write(tmp_path, {"composition": compositions, "text": texts}, lines, 0.5)
    for row in ("| composition | colors | 1 | 0 | 1 | 0 |", "| composition | counting | 0 | 1 | 0 | 0 |",
                "| text | text | 0 | 2 | 1 | 2 |"):  # fmt: skip
        assert row in said and row in (tmp_path / "curation.md").read_text()


def test_good_and_bad_are_told_apart_at_each_tasks_own_mean(tmp_path):
    """0.4 is good where the others score 0.1 and bad where they score 0.9; a lost sample counts for neither."""
    some = {task: [prompt(f"{task} {i}", task) for i in range(2)] for task in ("composition", "quality")}
    lines = known(some["composition"], [[0.4, 0.4], [0.1, 0.1]]) | known(some["quality"], [[0.4, 0.4], [0.9, 0.9]])
    said = C.write(tmp_path, some, lines, 0.05)
    assert "| composition | composition | 0 | 1 | 1 | 0 |" in said and "| quality | quality | 0 | 1 | 1 | 0 |" in said
    alone = [prompt("x", "text"), prompt("y", "text"), prompt("z", "text")]
    said = C.write(tmp_path, {"text": alone}, known(alone, [[0.4, 0.4], [0.3, 0.3], [None, 9.0]]), 0.05)
    assert "| text | text | 0 | 0 | 2 | 1 |" in said, "the mean of what there is, 2.1, is above both"


def test_another_threshold_replaces_what_an_earlier_one_kept(tmp_path):
    some = [prompt("a", include=[{"class": "cow", "count": 1}]), prompt("b", include=[{"class": "cat", "count": 1}])]
    for threshold, kept in ((0.1, ["a", "b"]), (0.4, ["a"]), (0.7, None)):
        C.write(tmp_path, {"quality": some}, known(some, [[0.0, 0.6], [0.0, 0.2]]), threshold)
        if kept:
            assert [p.text for p in curated(tmp_path, "quality")] == kept
    with pytest.raises(data.DataError):
        curated(tmp_path, "quality")


def test_one_instruction_for_two_sources_and_one_text_in_two_tasks_are_two_prompts(tmp_path):
    """Or the range of the one would decide on the other: "make the circle red" where it is red already."""
    one, two = (prompt("make it red", "edit", image=f"/{name}.png", t2i_prompt="a fox") for name in "ab")
    assert C.key(one) != C.key(two) != C.key(prompt("make it red", "edit")) == ("edit", "make it red", "")
    ranges(tmp_path).add([one], np.array([[0.0, 1.0]]))
    assert ranges(tmp_path).has(one) and not ranges(tmp_path).has(two)
    ranges(tmp_path, 1).add([two], np.array([[0.5, 0.5]]))
    C.write(tmp_path, {"edit": [one, two]}, ranges(tmp_path).all(), 0.1)
    (kept,) = curated(tmp_path, "edit")
    assert kept.metadata == {"tag": "edit", **one.metadata, "prompt": "make it red"}
    C.write(tmp_path / "tasks", {"quality": [B], "text": [D]}, known([B, D], [MIXED, GOOD]), 0.5)
    assert [f.name for f in (tmp_path / "tasks/prompts").iterdir()] == ["quality"]


def test_a_source_in_the_line_itself_is_kept_and_not_written_again_with_its_ranges(tmp_path):
    edits = tiny_edit.make_prompts("edit", "train", 6)
    ranges(tmp_path).add(edits, np.array([MIXED] * 6))
    assert PNG_URI not in (tmp_path / "ranges/rank-0.jsonl").read_text()
    C.write(tmp_path, {"edit": edits}, ranges(tmp_path).all(), 0.1)
    for before, after in zip(edits, curated(tmp_path, "edit"), strict=True):
        assert after.text == before.text
        assert after.metadata == json.loads(json.dumps(before.metadata)), "boxes are lists in JSON"
        np.testing.assert_array_equal(source_images(after)[0], source_images(before)[0])
