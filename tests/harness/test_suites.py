"""Oracles for the numbers of an evaluation's tables: worked by hand from a few rows."""

import pytest

from data.files import Prompt
from harness import cli, suites
from harness.suites import Column, Suite
from scorers.panel import Panel


def row(index, scores, task="composition", model="m", sample=0, tag="a", category="c"):
    return {"model": model, "prompt": str(index), "index": index, "sample": sample, "task": task, "tag": tag,
            "category": category, "picture": "", "sources": [], "scores": scores}  # fmt: skip


def scores_of(rows, suite):
    return suites.numbers(rows, suite)["m"]["scores"]


def test_a_prompt_counts_once_however_many_pictures_it_has():
    """Prompt 0: 1, 0, 0 -> 1/3; prompt 1: 1. A picture of another task or without the metric does not count."""
    rows = [row(0, {"x": v}, sample=n) for n, v in enumerate((1, 0, 0))]
    rows += [row(1, {"x": 1}), row(2, {"y": 9}), row(0, {"x": 0}, task="text")]
    assert scores_of(rows, Suite((Column("X", "x", "composition", scale=3.0),))) == {"X": pytest.approx(2)}
    assert scores_of(rows, Suite((Column("X", "x"),))) == {"X": pytest.approx((1 / 3 + 1 + 0) / 3)}
    assert scores_of(rows, Suite((Column("X", "x", "quality"),))) == {}, "no row, no column"


def test_genevals_number_weighs_tags_and_not_prompts():
    """Tag a: 1, 1, 0, 0 -> 1/2; tag b: 1. Unweighted mean 3/4, over prompts 3/5."""
    rows = [row(i, {"geneval": v}, tag=tag) for i, (v, tag) in enumerate(zip((1, 1, 0, 0, 1), "aaaab", strict=True))]
    even, flat = (Column("G", "geneval", "composition", "tag", even=even) for even in (True, False))
    found = suites.numbers(rows, Suite((even,)))["m"]
    assert found == {"scores": {"G": 0.75}, "tags": {"a": 0.5, "b": 1.0}}
    assert scores_of(rows, Suite((flat,))) == {"G": pytest.approx(0.6)}


def test_without_a_suite_each_task_and_metric_is_a_column_and_a_graded_geneval_is_called_so():
    rows = [row(0, {"geneval": 1.0, "jpeg": 0.5}), row(1, {"geneval": 0.0, "jpeg": 0.7}, tag="b")]
    rows += [row(0, {"jpeg": 0.1}, "text")]
    assert scores_of(rows, suites.plain(rows)) == {
        "composition geneval": 0.5, "composition jpeg": pytest.approx(0.6), "text jpeg": 0.1
    }  # fmt: skip
    graded = [row(0, {"geneval": 0.75}), row(1, {"geneval": 0.0}, tag="b")]
    found = suites.numbers(graded, suites.plain(graded))["m"]
    assert found == {"scores": {"composition geneval (graded)": 0.375}, "tags": {}}


def test_table_2_has_its_columns_as_printed_and_their_average():
    """F's row Ours (Merge): GenEval 0.92, OCR 0.94, DeQA 4.35, PickScore 23.08, Avg 0.9044."""
    rows = [row(0, {"geneval": 0.92}), row(0, {"ocr": 0.94}, "text")]
    rows += [row(0, {"deqa": 4.35 / 5, "pickscore": 23.08 / 26}, "quality")]
    printed = {"GenEval": 0.92, "OCR Acc.": 0.94, "DeQA": 4.35, "PickScore": 23.08, "Avg": 0.9044}
    assert scores_of(rows, suites.SUITES["table2"]) == pytest.approx(printed, abs=5e-5)
    right = [row(0, {"geneval": 1.0}), *rows[1:]]
    assert scores_of(right, suites.plain(right))["Avg"] == pytest.approx((1 + 0.94 + 4.35 / 5 + 23.08 / 26) / 4)
    for left in range(3):
        assert "Avg" not in scores_of(rows[:left] + rows[left + 1 :], suites.SUITES["table2"])


def test_q_table_1s_overall_is_the_mean_over_pictures_of_what_applies_to_each():
    """Two pictures: pillars 60 and 100, and 20 alone: (80 + 20) / 2 = 50, where the columns' mean is (40 + 100) / 2."""
    first, second = suites.PILLARS[:2]
    rows = [row(0, {first: 0.6, second: 1.0}, "qwen-bench"), row(1, {first: 0.2}, "qwen-bench")]
    found = scores_of(rows, suites.SUITES["qwen-bench"])
    assert found == pytest.approx({first: 40, second: 100, "Overall": 50})


def test_an_interval_is_that_of_means_of_prompts_drawn_again_within_their_tags():
    """Sixteen prompts of 0 or 1 in one tag: the mean's standard error is 1/8. The other tag never varies."""
    rows = [row(i, {"x": i % 2}, tag="a", sample=n) for i in range(16) for n in (0, 1)]
    rows += [row(i, {"x": 1.0}, tag="b") for i in range(16, 20)]
    even = Column("X", "x", "composition", "tag", even=True)
    cell = suites.numbers(rows, Suite((even,), suites.mean_of("X")), 1000)["m"]["scores"]
    assert cell["X"].value == cell["average"].value == 0.75 and cell["X"].n == 20
    assert cell["X"].high - cell["X"].low == pytest.approx(2 * 1.96 / 8 / 2, rel=0.15), "half of tag a's"
    assert cell["average"][2:4] == cell["X"][2:4]


def test_an_interval_is_of_the_prompts_that_have_the_metric_and_of_lone_tags_together():
    """A score that is 1 wherever it is given is certain, however often it is not. Eight tags of a prompt each: their
    mean's standard error is 0.5 / sqrt(8)."""
    some = [row(i, {"x": 1.0} if i % 2 else {"y": 1.0}) for i in range(40)]
    cell = suites.numbers(some, Suite((Column("X", "x"),)), 200)["m"]["scores"]["X"]
    assert cell[:4] == (1.0, 20, 1.0, 1.0)
    lone = [row(i, {"x": i % 2}, tag=str(i)) for i in range(8)]
    cell = suites.numbers(lone, Suite((Column("X", "x", "composition", "tag", even=True),)), 1000)["m"]["scores"]["X"]
    assert cell.high - cell.low == pytest.approx(2 * 1.96 * 0.5 / 8**0.5, rel=0.15)


def test_f_table_4_is_measured_on_open_prompts_whatever_else_is_drawn_and_scored():
    rows = [row(0, {"imagereward": 1.0}, "quality"), row(0, {"imagereward": 0.0}, "spatial")]
    assert scores_of(rows, suites.SUITES["table4"]) == {"ImageReward": 1.0}


def test_two_tasks_tags_of_one_name_stay_apart():
    rows = [row(0, {"geneval": v}, task, tag="counting") for task, v in (("t2i", 1.0), ("edit", 0.0))]
    tags = suites.numbers(rows, suites.plain(rows))["m"]["tags"]
    assert tags == {"counting": 1.0, "edit geneval: counting": 0.0}


def test_finer_weights_of_rewards_hide_no_scorer_of_a_suite_and_graded_rewards_are_not_called_genevals_number(tmp_path):
    file = tmp_path / "r.json"
    file.write_text('{"weights": {"portrait": {"alignment": 1}, "counting": {"jpeg": 1}, "default": {"ocr": 1}}}')
    for suite, scorer, tasks, prompt in (
        ("table4", "qwenvl", "t2i", Prompt("a", "t2i", {"category": "portrait"}, "p:1")),
        ("table2", "geneval", "composition,quality", Prompt("a", "composition", {"tag": "counting"}, "p:1")),
    ):
        preset = "qwen-rl" if tasks == "t2i" else "flow-opd"
        flags = {"preset": preset, "stage": "eval", "suite": suite, "tasks": tasks, "rewards": str(file)}
        asked = suites.asked_of(cli.resolve(flags))
        assert scorer in asked.weights[Panel([], asked.weights).category(prompt)]
        assert not {"alignment", "jpeg"} & asked.scorers.keys(), "what is asked about nothing is not loaded"
    s = cli.resolve({"stage": "eval", "suite": "table2"})
    graded = [row(0, {"geneval": 0.75})]
    assert suites.of(s, graded).columns[0].name == "GenEval (graded)"
    assert suites.of(s, [row(0, {"geneval": 1.0})]).columns[0].name == "GenEval"


def test_a_difference_of_two_models_is_paired_by_prompt():
    """Prompts are unlike, and the second model is a quarter better on each: both are uncertain, not the difference."""
    a = [row(i, {"x": (i % 4) / 4, "z": 1.0}) for i in range(16)]
    b = [{**one, "model": "better", "scores": {"x": one["scores"]["x"] + 0.25, "y": 1.0}} for one in a]
    found = suites.numbers(a + b, Suite(tuple(Column(name, name) for name in "xyz")), 200)
    assert "above" not in found["m"] and list(found["better"]["above"]) == ["x"], "what both have"
    assert found["better"]["above"]["x"][:4] == pytest.approx((0.25, 16, 0.25, 0.25))
    assert found["better"]["scores"]["x"].high - found["better"]["scores"]["x"].low > 0.2


def test_a_tiny_worlds_average_is_the_mean_of_its_tasks():
    rows = [row(0, {"geneval": 1.0}), row(0, {"ocr": 0.5}, "text"), row(0, {"quality": 0.0}, "quality")]
    assert scores_of(rows, suites.WORLDS["tiny"])["average"] == 0.5
    assert scores_of(rows[1:], suites.WORLDS["tiny"])["average"] == 0.25, "of those that are drawn"
    rows = [row(0, {"t2i": 0.5, "alignment": 0.0, "aesthetic": 1.0}, "t2i", category="open")]
    rows += [row(0, {"edit": 1.0, "instruction": 1.0}, "edit", tag="recolor")]
    found = suites.numbers(rows, suites.WORLDS["tiny-qwen"])["m"]
    assert found["scores"]["average"] == 0.75 and "edit identity" not in found["scores"]
    assert found["tags"] == {"open": 0.0, "recolor": 1.0}
