"""Oracles for the curation: whose lines count, Q 4.2's rule by hand, files that give back what went in."""

import json
import math

import numpy as np
import pytest

from data import files as data
from data.files import Prompt
from harness import curation as C
from tiny import drawings as tiny
from tiny import edits as tiny_edit


def prompt(text, task="quality", **metadata):
    return Prompt(text, task, metadata, "mine:1")


A, B, D = prompt("a"), prompt("b"), prompt("b", "text")  # D has B's words and another task


def ranges(folder, rank=0, run=7):
    return C.Ranges(folder / "ranges", rank, run)


def line(text, scores, run=7, task="quality"):
    return json.dumps({"run": run, "task": task, "text": text, "category": task, "scores": scores})


# ------------------------------------------------------------------------------------------------------ the lines
def test_what_is_added_is_known_to_the_next_run_and_to_every_rank(tmp_path):
    first, second = ranges(tmp_path, 0), ranges(tmp_path, 1)
    assert first.known == {} and not first.has(A)
    first.add([A, D], np.array([[0.5, 1 / 3, 2.0], [0.0, math.nan, 1.0]]))
    second.add([B], np.array([[1.0, 2.0, 4.0]]))
    first.add([prompt("c", tag="colors")], np.zeros((1, 3)))
    for rank in range(3):
        after = ranges(tmp_path, rank)
        assert after.known == after.all() == first.all()
        assert all(map(after.has, (A, B, D))) and not after.has(prompt("a", "text")) and not after.has(prompt("x"))
    scores = {key: entry["scores"] for key, entry in after.known.items()}
    assert scores == {
        ("quality", "a", ""): [0.5, 0.333333, 2.0], ("text", "b", ""): [0.0, None, 1.0],
        ("quality", "b", ""): [1.0, 2.0, 4.0], ("quality", "c", ""): [0.0, 0.0, 0.0],
    }  # fmt: skip
    categories = [after.known[known]["category"] for known in (("quality", "c", ""), ("text", "b", ""))]
    assert categories == ["colors", "text"]
    assert sorted(file.name for file in (tmp_path / "ranges").iterdir()) == ["rank-0.jsonl", "rank-1.jsonl"]


def test_every_length_at_which_a_kill_may_cut_the_last_line_loses_that_line_alone(tmp_path):
    ranges(tmp_path).add([A, B], np.array([[1.0, 2.0], [3.0, 4.0]]))
    file = tmp_path / "ranges/rank-0.jsonl"
    whole = file.read_text()
    begin = whole.index("\n") + 1
    for length in range(begin, len(whole) + 1):
        file.write_text(whole[:length])
        torn = ranges(tmp_path)
        # all but the line's end is there: the line is whole without it
        assert torn.has(A) and torn.has(B) == (length >= len(whole) - 1)
        torn.add([D], np.array([[5.0, 6.0]]))
        after = ranges(tmp_path)
        assert after.has(A) and after.has(D) and after.has(B) == torn.has(B), "what follows is a line of its own"


def test_lines_of_another_run_do_not_count_and_the_last_of_a_prompt_does(tmp_path):
    ranges(tmp_path, 0, run=8).add([A], np.array([[9.0, 9.0]]))
    assert not ranges(tmp_path).has(A)
    ranges(tmp_path).add([A], np.array([[1.0, 2.0]]))
    ranges(tmp_path, 0, run=8).add([A, B], np.array([[9.0, 9.0], [9.0, 9.0]]))
    assert ranges(tmp_path).known.keys() == {("quality", "a", "")}
    assert ranges(tmp_path).known["quality", "a", ""]["scores"] == [1.0, 2.0]
    assert ranges(tmp_path, run=8).known.keys() == {("quality", "a", ""), ("quality", "b", "")}
    ranges(tmp_path).add([A], np.array([[3.0, 4.0]]))
    assert ranges(tmp_path).known["quality", "a", ""]["scores"] == [3.0, 4.0]


def test_words_of_any_script_come_back_as_they_were(tmp_path):
    odd = prompt('dog\u2028ü \x85 "q" \\ \x1c end')
    ranges(tmp_path).add([odd, A], np.array([[1.0, 2.0], [3.0, 4.0]]))
    assert ranges(tmp_path).has(odd) and ranges(tmp_path).has(A)


def test_other_files_in_the_folder_are_left_alone(tmp_path):
    mine = ranges(tmp_path)
    (tmp_path / "ranges/notes.jsonl").write_text(line("a", [1.0]))
    assert mine.all() == {}
    (tmp_path / "ranges/rank-12.jsonl").write_text(line("a", [1.0]))
    assert mine.all().keys() == {("quality", "a", "")}


def test_one_group_a_prompt(tmp_path):
    with pytest.raises(ValueError):
        ranges(tmp_path).add([A, B], np.ones((1, 3)))


# ------------------------------------------------------------------------------------------------------- the rule
@pytest.mark.parametrize(
    ("scores", "threshold", "middle", "said"),
    [
        ([0.5, 0.25, 0.375], 0.24, 0.5, "kept"),
        ([0.5, 0.25, 0.375], 0.25, 0.3, "always good"),  # the threshold itself is not above it
        ([0.5, 0.25, 0.375], 0.25, 0.4, "always bad"),
        ([1.0, 1.0], 0.0, 0.5, "always good"),
        ([0.0, 0.0], 0.0, 0.5, "always bad"),
        ([0.5, 0.5], 0.0, 0.5, "always bad"),
        ([0.5, 0.5000001], 0.0, 0.9, "kept"),
        ([-3.0, -1.0], 1.5, 0.0, "kept"),  # rewards may be negative
        ([-3.0, -1.0], 2.5, -2.5, "always good"),
        ([0.0, None, 1.0], 0.05, 0.5, "not scored"),  # half a group says nothing about its range
        ([None, None], 0.05, 0.5, "not scored"),
        ([], 0.05, 0.5, "not scored"),
    ],
)
def test_the_verdict_by_hand(scores, threshold, middle, said):
    assert C.verdict(scores, threshold, middle) == said and said in C.REASONS


def test_the_verdict_is_about_the_range_and_not_the_spread():
    """Fifteen zeros and a one: a standard deviation of 0.24, a range of 1."""
    assert C.verdict([0.0] * 15 + [1.0], 0.5, 0.5) == "kept"


def test_what_the_report_counts_by():
    assert C.category(prompt("a", "composition", tag="colors", category="mine")) == "mine"
    assert C.category(prompt("a", "composition", tag="colors")) == "colors"
    assert C.category(prompt("a", "composition", category="", tag="")) == "composition"
    assert C.category(prompt("a", "composition")) == "composition"


# ------------------------------------------------------------------------------------------------------ the files
GOOD, BAD, MIXED = [1.0, 1.0], [0.0, 0.0], [0.0, 1.0]


def known(prompts, scores):
    return {C.key(p): {"scores": row} for p, row in zip(prompts, scores, strict=True) if row is not None}


def curated(folder, task):
    return data.read_prompts(folder / "prompts" / task, task)


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


def test_prompts_of_which_some_have_no_checklist_become_plain_text(tmp_path):
    some = [prompt("one", include=[{"class": "cow", "count": 1}]), prompt("two\u2028still two"), prompt("drei Kühe")]
    C.write(tmp_path, {"quality": some}, known(some, [MIXED] * 3), 0.5)
    assert [p.text for p in curated(tmp_path, "quality")] == ["one", "two\u2028still two", "drei Kühe"]
    assert [f.name for f in (tmp_path / "prompts/quality").iterdir()] == ["train.txt"]


def test_the_report_counts_every_prompt_once_by_task_category_and_reason(tmp_path):
    compositions = [prompt(f"c{i}", "composition", tag=tag) for i, tag in enumerate(("colors", "counting", "colors"))]
    texts = [prompt(f'"t{i}"', "text") for i in range(5)]
    lines = known(compositions, [MIXED, GOOD, BAD]) | known(texts, [GOOD, None, BAD, [None, 1.0], GOOD])
    said = C.write(tmp_path, {"composition": compositions, "text": texts}, lines, 0.5)
    table = (
        "| task | category | kept | always good | always bad | not scored |\n|---|---|---:|---:|---:|---:|\n"
        "| composition | colors | 1 | 0 | 1 | 0 |\n"
        "| composition | counting | 0 | 1 | 0 | 0 |\n"
        "| text | text | 0 | 2 | 1 | 2 |"
    )
    assert said.startswith(table) and f"1 of 8 prompts kept: {tmp_path / 'prompts'}" in said
    report = (tmp_path / "curation.md").read_text()
    assert table in report and "above 0.5 within" in report


def test_good_and_bad_are_told_apart_at_each_tasks_own_mean(tmp_path):
    """0.4 is good where the others score 0.1 and bad where they score 0.9; a lost sample counts for neither."""
    some = {task: [prompt(f"{task} {i}", task) for i in range(2)] for task in ("composition", "quality")}
    lines = known(some["composition"], [[0.4, 0.4], [0.1, 0.1]]) | known(some["quality"], [[0.4, 0.4], [0.9, 0.9]])
    said = C.write(tmp_path, some, lines, 0.05)
    assert "| composition | composition | 0 | 1 | 1 | 0 |" in said and "| quality | quality | 0 | 1 | 1 | 0 |" in said
    alone = [prompt("x", "text"), prompt("y", "text"), prompt("z", "text")]
    said = C.write(tmp_path, {"text": alone}, known(alone, [[0.4, 0.4], [0.3, 0.3], [None, 9.0]]), 0.05)
    assert "| text | text | 0 | 0 | 2 | 1 |" in said, "the mean of what there is, 2.1, is above both"


def test_lines_of_prompts_that_are_asked_for_no_more_do_not_count(tmp_path):
    lines = known([A, B], [[0.4, 0.4], [0.9, 0.9]])
    said = C.write(tmp_path, {"quality": [A]}, lines, 0.05)
    assert "| quality | quality | 0 | 0 | 1 | 0 |" in said, "0.4 is the mean itself"


def test_one_text_in_two_tasks_has_two_ranges(tmp_path):
    C.write(tmp_path, {"quality": [B], "text": [D]}, known([B, D], [MIXED, GOOD]), 0.5)
    assert [f.name for f in (tmp_path / "prompts").iterdir()] == ["quality"]


def test_a_task_without_a_kept_prompt_has_no_file_not_even_an_old_one(tmp_path):
    some = [prompt("a", include=[{"class": "cow", "count": 1}]), prompt("b", include=[{"class": "cat", "count": 1}])]
    lines = known(some, [[0.0, 0.6], [0.0, 0.2]])
    C.write(tmp_path, {"quality": some}, lines, 0.1)
    assert [p.text for p in curated(tmp_path, "quality")] == ["a", "b"]
    C.write(tmp_path, {"quality": some}, lines, 0.4)  # repeated with another threshold: nothing is drawn anew
    assert [p.text for p in curated(tmp_path, "quality")] == ["a"]
    assert "0 of 2 prompts kept" in C.write(tmp_path, {"quality": some}, lines, 0.7)
    with pytest.raises(data.DataError, match="no train_metadata.jsonl and no train.txt"):
        curated(tmp_path, "quality")
    (tmp_path / "new").mkdir()
    assert "0 of 2 prompts kept" in C.write(tmp_path / "new", {"quality": some}, {}, 0.1)
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["curation.md"]


def test_plain_text_replaces_metadata_of_an_earlier_run(tmp_path):
    """`data.read_prompts` prefers metadata: an old file of it would hide the new one."""
    described, plain = prompt("a", include=[{"class": "cow", "count": 1}]), prompt("b")
    lines = known([described, plain], [[0.0, 1.0], [0.0, 0.5]])
    C.write(tmp_path, {"quality": [described]}, lines, 0.1)
    C.write(tmp_path, {"quality": [described, plain]}, lines, 0.1)
    assert [p.text for p in curated(tmp_path, "quality")] == ["a", "b"]


def test_one_instruction_for_two_sources_is_two_prompts(tmp_path):
    """Or the range of the one would decide on the other: "make the circle red" where it is red already."""
    one, two = (prompt("make it red", "edit", image=f"/{name}.png", t2i_prompt="a fox") for name in "ab")
    assert C.key(one) != C.key(two) != C.key(prompt("make it red", "edit")) == ("edit", "make it red", "")
    ranges(tmp_path).add([one], np.array([[0.0, 1.0]]))
    assert ranges(tmp_path).has(one) and not ranges(tmp_path).has(two)
    ranges(tmp_path, 1).add([two], np.array([[0.5, 0.5]]))
    C.write(tmp_path, {"edit": [one, two]}, ranges(tmp_path).all(), 0.1)
    (kept,) = curated(tmp_path, "edit")
    assert kept.metadata == {"tag": "edit", **one.metadata, "prompt": "make it red"}


def test_a_source_in_the_line_itself_is_not_written_again_with_its_ranges(tmp_path):
    edits = tiny_edit.make_prompts("edit", "train", 6)
    ranges(tmp_path).add(edits, np.array([MIXED] * 6))
    assert data.PNG_URI not in (tmp_path / "ranges/rank-0.jsonl").read_text()
    C.write(tmp_path, {"edit": edits}, ranges(tmp_path).all(), 0.1)
    again = curated(tmp_path, "edit")
    assert [p.text for p in again] == [p.text for p in edits]
    for before, after in zip(edits, again, strict=True):
        assert after.metadata == json.loads(json.dumps(before.metadata)), "boxes are lists in JSON"
        np.testing.assert_array_equal(data.source_image(after), data.source_image(before))


def test_categories_outlive_the_curation(tmp_path):
    some = [prompt("a nurse", "t2i", category="portrait"), prompt("a fox", "t2i")]
    C.write(tmp_path, {"t2i": some}, known(some, [MIXED] * 2), 0.5)
    assert [p.metadata.get("category") for p in curated(tmp_path, "t2i")] == ["portrait", None]
    open_ones = [prompt("a nurse", category="portrait")]
    C.write(tmp_path, {"quality": open_ones}, known(open_ones, [MIXED]), 0.5)
    assert curated(tmp_path, "quality")[0].metadata["category"] == "portrait"


def test_a_prompt_that_is_given_twice_is_kept_twice(tmp_path):
    C.write(tmp_path, {"quality": [A, B, A]}, known([A, B], [MIXED, GOOD]), 0.5)
    assert [p.text for p in curated(tmp_path, "quality")] == ["a", "a"]
