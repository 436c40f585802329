"""The tiny world's edits: perfect and lazy results by construction, known rates of error, detectors by hand."""

import math
import random
from collections import Counter

import numpy as np
import pytest
import torch

from data import files as data
from data.files import Prompt
from data.pictures import data_uri, sources
from rewards import RewardError, levenshtein
from tiny import canvas
from tiny import drawings as tiny
from tiny import edits as E

KINDS = list(E.EDITS)
EDITS = {kind: [E.sample("train", random.Random(f"{kind} {i}"), kind) for i in range(40)] for kind in KINDS}
EVERY = [edit for some in EDITS.values() for edit in some]


def tensor(picture):
    return torch.from_numpy(np.ascontiguousarray(picture)).float()


def faded(picture):
    """One of `canvas.spoil`'s two faults."""
    return 0.55 * picture + 0.45 * 0.62


def grainy(picture, seed=0):
    return (picture + 0.18 * np.random.default_rng(seed).standard_normal(picture.shape, np.float32)).clip(0, 1)


def prompt_of(edit):
    """The prompt of a sampled edit, without the picture, which the scorers are handed."""
    kind, _, _, text, asked = edit
    return Prompt(text, "edit", {"tag": kind, **asked, "prompt": text}, f"{kind}:1")


def scores(edits, scenes, print_=lambda picture: picture):
    """(instruction, identity) of results drawn from `scenes`, a list each."""
    images = torch.stack([tensor(print_(canvas.draw(scene))) for scene in scenes])
    prompts, before = [prompt_of(edit) for edit in edits], [(tensor(canvas.draw(edit[1])),) for edit in edits]
    return E.score_instruction(images, prompts), E.score_identity(images, prompts, before)


def changed(scene, cell, **fields):
    """The scene with other attributes of what stands in a cell."""
    return {**scene, "objects": [{**t, **fields} if t["cell"] == cell else t for t in scene["objects"]]}


# ----------------------------------------------------------------------------------------------- the two rewards
@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_result_scores_one_on_both_rewards_and_doing_nothing_keeps_only_the_identity(kind):
    instruction, identity = scores(EDITS[kind], [edit[2] for edit in EDITS[kind]])
    assert instruction == pytest.approx([1.0] * 40) and identity == pytest.approx([1.0] * 40, abs=1e-6)
    lazy, identity = scores(EDITS[kind], [edit[1] for edit in EDITS[kind]])
    assert identity == pytest.approx([1.0] * 40, abs=1e-6)
    if kind != "word":
        assert lazy == [0.0] * 40
        return
    for value, (_, source, result, _, _) in zip(lazy, EDITS[kind], strict=True):
        # By hand: core = 1 + 4 times the share of letters in common, other and coherence 5, and then Q's caps.
        core = 1 + 4 * (1 - levenshtein(source["word"], result["word"]) / 3)
        assert value == pytest.approx((min((core + 5 + 5) / 3, core) - 1) / 4)


@pytest.mark.parametrize("field", ["color", "class"])
@pytest.mark.parametrize("kind", ["recolor", "add", "remove", "background"])
def test_what_should_stay_and_drifts_costs_the_identity_and_not_the_core(kind, field):
    choices = {"color": sorted(canvas.COLORS), "class": canvas.CLASSES}[field]
    edits, scenes = [], []
    for edit in EDITS[kind]:
        there = edit[2]["objects"][0]
        others = {t[field] for t in (*edit[2]["objects"], *edit[1]["objects"])}  # not what is asked for or gone
        for value in (c for c in choices if c not in others):
            edits, scenes = [*edits, edit], [*scenes, changed(edit[2], there["cell"], **{field: value})]
    instruction, identity = scores(edits, scenes)
    kept = [len(edit[4]["keep"]) for edit in edits]
    assert identity == pytest.approx([(n - 1) / n for n in kept], abs=0.05), "of two things one is the same"
    assert min(instruction) > 0.3 and max(instruction) < 1, "a demand beside the core is missed"


def test_another_ink_a_thing_that_is_gone_and_a_spoilt_print():
    inks = [{**e[2], "color": next(c for c in canvas.INKS if c != e[2]["color"])} for e in EDITS["word"]]
    instruction, identity = scores(EDITS["word"], inks)
    assert max(identity) < 0.05 and instruction == pytest.approx([1.0] * 40), "nobody asked for the ink to stay"
    gone = [{**e[2], "objects": e[2]["objects"][1:]} for e in EDITS["recolor"]]
    instruction, identity = scores(EDITS["recolor"], gone)
    assert identity == [0.0] * 40 and max(instruction) < 1
    for print_, least in ((faded, 0.95), (grainy, 0.5)):
        instruction, identity = scores(EVERY, [edit[2] for edit in EVERY], print_)
        assert np.mean(instruction) < 0.9 and np.mean(identity) > 0.97 and min(identity) > least


def wrong_results():
    """(edit, scene) of something else being done than what was asked, everything else as it should be."""
    for edit in EDITS["recolor"]:
        (stays, named), (_, new) = edit[1]["objects"], edit[2]["objects"]
        yield edit, changed(edit[1], stays["cell"], color=new["color"])  # the other one
        third = next(c for c in sorted(canvas.COLORS) if c not in (named["color"], new["color"]))
        yield edit, changed(edit[1], named["cell"], color=third)
    for edit in EDITS["add"]:
        *_, new = edit[2]["objects"]
        for field, choices in (("color", sorted(canvas.COLORS)), ("class", canvas.CLASSES)):
            other = next(c for c in choices if c not in (new[field], edit[1]["objects"][0][field]))
            yield edit, changed(edit[2], new["cell"], **{field: other})
    for edit in EDITS["remove"]:
        yield edit, {**edit[1], "objects": edit[1]["objects"][1:]}
    for edit in EDITS["background"]:
        others = (edit[1]["paper"], edit[2]["paper"])
        yield edit, {**edit[1], "paper": next(c for c in canvas.PAPERS if c not in others)}


def test_another_change_is_worth_nothing_and_planted_rules_that_forget_core_or_exclude_are_caught():
    edits, scenes = zip(*wrong_results(), strict=True)
    assert {edit[0] for edit in edits} == set(KINDS) - {"word"} and scores(edits, scenes)[0] == [0.0] * len(edits)

    def planted(kinds, **fields):
        wrong = [(*e[:4], {**e[4], **{k: v for k, v in fields.items() if k in e[4]}}) for e in edits]
        return min(s for e, s in zip(edits, scores(wrong, scenes)[0], strict=True) if e[0] in kinds)

    assert planted(("add", "background"), core=[1]) > 0, "what stays is no core demand"
    assert planted(("remove",), exclude=[{"class": "circle", "count": 9}]) > 0, "the named thing is still there"


# ---------------------------------------------------------------------------------------------------- the demands
DEMANDS = Prompt("", "edit", {
    "include": [{"class": "circle", "count": 1, "color": "red"}, {"class": "square", "count": 1}, {"class": "cross",
                "count": 1}], "exclude": [{"class": "triangle", "count": 2}], "core": [1]}, "mine:1")  # fmt: skip


def seen(*names, color="red"):
    return [{"class": n, "score": 1.0, "box": (0, 0, 9, 9), "color": color} for n in names]


def test_the_demands_by_hand():
    table = {
        (): ([0, 1], [0, 0]), ("square",): ([1, 1], [0, 0]), ("circle", "triangle"): ([0, 1], [1, 0]),
        ("circle", "square", "cross"): ([1, 1], [1, 1]), ("square", "triangle", "triangle"): ([1, 0], [0, 0]),
    }  # fmt: skip
    for names, expected in table.items():
        assert E.demands(DEMANDS, seen(*names), "") == expected
    assert E.demands(DEMANDS, seen("circle", color="blue"), "") == ([0, 1], [0, 0]), "in another colour"
    quoted = DEMANDS._replace(text='write "CAT"', metadata={**DEMANDS.metadata, "core": []})
    assert E.demands(quoted, seen("circle"), "CAN") == ([1, pytest.approx(2 / 3)], [1, 0, 0])
    plain = DEMANDS._replace(metadata={k: v for k, v in DEMANDS.metadata.items() if k != "core"})
    assert E.demands(plain, seen("square"), "") == ([0, 1, 0, 1], []), "without core everything is asked for"
    with pytest.raises(RewardError, match="^mine:1: "):
        E.demands(Prompt("make", "edit", {}, "mine:1"), [], "")


def test_the_scorers_are_scorers_like_any_other_and_identity_needs_a_source_and_what_to_keep():
    edits = [EDITS[kind][0] for kind in KINDS]
    images, before = (torch.stack([tensor(canvas.draw(e[i])) for e in edits]) for i in (2, 1))
    prompts = [prompt_of(edit) for edit in edits]
    for name in ("instruction", "identity"):
        scorer = E.scorer(name)
        assert scorer.score(images, prompts, [(b,) for b in before]).tolist() == pytest.approx([1] * 5)
        assert (scorer.name, scorer.low, scorer.high) == (name, 0.0, 1.0)
    untold = [p._replace(metadata={**p.metadata, "keep": []}) for p in prompts]
    for some, pictures in ((prompts, None), (untold, [(b,) for b in before])):
        with pytest.raises(RewardError, match="identity"):
            scorer.score(images, some, pictures)


# ------------------------------------------------------------------------------------------------- drawing, seeing
@pytest.mark.parametrize("paper", canvas.PAPERS)
def test_the_papers_colour_and_what_stands_on_it_are_drawn_and_seen_in_any_print(paper):
    scenes = [{**e[1], "paper": paper} for e in EVERY]
    inside = np.zeros((24, 24), bool)
    inside[1:11, 13:23] = True
    drawn = canvas.draw({"objects": [{"class": "square", "color": "green", "cell": (1, 0)}], "paper": paper})
    np.testing.assert_allclose(drawn[:, inside].T, [canvas.COLORS["green"]] * 100, atol=1e-6)
    np.testing.assert_allclose(drawn[:, ~inside].T, [canvas.PAPERS[paper]] * 476, atol=1e-6)
    for print_ in (faded, grainy, lambda picture: picture):
        images = torch.stack([tensor(print_(canvas.draw(scene))) for scene in scenes])
        found = E.detect(images)
        backs = [[d for d in some if d["class"] == "background"] for some in found]
        assert all(len(back) == 1 and back[0]["color"] == paper and back[0]["score"] == 1 for back in backs)
    for scene, some, word in zip(scenes, found, canvas.read_text(images), strict=True):  # of the clean prints
        if "objects" in scene:
            things = sorted((d["class"], d["color"]) for d in some if d["class"] != "background")
            assert things == sorted((t["class"], t["color"]) for t in scene["objects"])
        else:
            assert word == scene["word"]


# ------------------------------------------------------------------------------------------------------ the prompts
def key(p):
    return p.text, p.metadata.get("image")


@pytest.mark.parametrize("task", E.TASKS)
def test_prompts_can_be_said_drawn_and_scored_and_the_splits_share_none(task):
    train, test = ({key(p) for p in E.make_prompts(task, split, 1500)} for split in data.SPLITS)
    assert len(test) > 100 and not train & test
    assert E.make_prompts(task, "train", 30, 4)[:9] == E.make_prompts(task, "train", 9, 4)
    assert E.make_prompts(task, "train", 9, 4) != E.make_prompts(task, "train", 9, 5)
    for p in (p for split in data.SPLITS for p in E.make_prompts(task, split, 150)):
        E.check_prompt(p)
        assert len(E.tokenize(p.text)) == tiny.MAX_TOKENS and p.task == task
    assert E.VOCABULARY[: len(tiny.VOCABULARY)] == tiny.VOCABULARY, "F's words keep their numbers"
    for wrong in (("text", "train"), (task, "dev")):
        with pytest.raises(ValueError, match="unknown"):
            E.make_prompts(*wrong, 1)


def test_the_test_split_runs_through_kinds_and_categories_in_turn_and_train_has_the_mix():
    assert [p.metadata["tag"] for p in E.make_prompts("edit", "test", 7)] == [*KINDS, *KINDS[:2]]
    test = E.make_prompts("t2i", "test", 36)
    assert [p.metadata["category"] for p in test] == ["composition", "typography", "open"] * 12
    assert [p.metadata["tag"] for p in test[::3]] == list(tiny.TEST_TAGS) * 2
    categories = {"composition": 6, "typography": 2, "open": 3}
    for task, field, mix in (("edit", "tag", E.EDITS), ("t2i", "category", categories)):
        counts = Counter(p.metadata[field] for p in E.make_prompts(task, "train", 1100))
        assert all(near(counts[name], 1100, share / 11) for name, share in mix.items())
    words = [E.sample("train", random.Random(i), "word") for i in range(400)]
    assert all(source["word"] != result["word"] for _, source, result, _, _ in words)
    assert max(Counter(result["word"] for _, _, result, _, _ in words).values()) <= 6, "none is preferred"


EDIT, WORD = (E.make_prompts("edit", "test", 4)[i]._replace(source="mine.jsonl:7") for i in (0, 3))
REFUSED = [
    *({"core": bad} for bad in ([3], [-1], [True], 0, [])),
    *({"keep": bad} for bad in ([[0, 0, 24, 24]], [list(b) for b in canvas.BOXES[:4]], "all", [3])),
    {"image": data_uri(torch.zeros(3, 24, 25))}, {"image": "/none.png"},
    {"include": []}, {"include": [{"class": "cow", "count": 1}]},
    {"include": [{"class": "circle", "count": 1, "color": "pink"}]},
    {"include": [{"class": "background", "count": 1, "color": "red"}]},
    {"include": [*EDIT.metadata["include"], {"class": "circle", "count": 1, "position": ["above", 0]}]},
]  # fmt: skip


@pytest.mark.parametrize("fields", REFUSED, ids=[str(fields)[:40] for fields in REFUSED])
def test_a_users_edit_that_cannot_be_scored_is_refused_by_its_line(fields):
    E.check_prompt(EDIT)
    with pytest.raises(data.DataError, match="^mine.jsonl:7: "):
        E.check_prompt(EDIT._replace(metadata={**EDIT.metadata, **fields}))


def test_a_users_line_needs_neither_core_nor_keep_but_something_to_score_by():
    for prompt in (EDIT, WORD):
        bare = {k: v for k, v in prompt.metadata.items() if k not in ("core", "keep")}
        E.check_prompt(prompt._replace(metadata=bare))
    E.check_prompt(Prompt('a sign that says "CAT"', "t2i", {}, "x:1"))
    for text, meta in (("a circle", {}), ("a circle", {"include": [{"class": "background", "count": 1}]})):
        with pytest.raises(data.DataError, match="^x:1: "):
            E.check_prompt(Prompt(text, "t2i", meta, "x:1"))


# ------------------------------------------------------------------------------------- what the base learns from
def near(hits, count, p):
    return abs(hits - count * p) < 4 * math.sqrt(count * p * (1 - p))


def corrupted(kind, count=1500):
    rng = random.Random(f"corrupted {kind}")
    for _ in range(count):
        _, source, result, _, _ = E.sample("train", rng, kind)
        yield source, result, E.corrupted(kind, source, result, rng)


@pytest.mark.parametrize("kind, rate", [
    ("recolor", tiny.ATTRIBUTE_ERROR), ("add", tiny.ATTRIBUTE_ERROR), ("background", tiny.ATTRIBUTE_ERROR),
    ("remove", tiny.ATTRIBUTE_ERROR * 2 / 3), ("word", tiny.LETTER_ERROR),
])  # fmt: skip
def test_edits_are_wrong_and_what_should_stay_drifts_as_often_as_the_constants_say(kind, rate):
    wrong = drifted = recolored = 0
    for source, result, drawn in corrupted(kind):
        if kind == "word":
            wrong += sum(a != b for a, b in zip(drawn["word"], result["word"], strict=True)) / 3
            drifted += drawn["color"] != result["color"]
            assert drawn["color"] in canvas.INKS and drawn["paper"] == result["paper"]
            continue
        cells = {t["cell"]: t for t in drawn["objects"]}
        if kind == "background":
            wrong += drawn["paper"] != result["paper"]
            moved = [cells[t["cell"]] != t for t in result["objects"]]
            assert sum(moved) < 2 and drawn["paper"] in canvas.PAPERS
            drifted += any(moved)
            continue
        assert drawn["paper"] == source["paper"]
        before = stays = result["objects"][0]
        if kind == "remove":
            (left,) = cells.values()
            wrong += left["cell"] != stays["cell"]
            before = next(t for t in source["objects"] if t["cell"] == left["cell"])
        else:
            named, left = result["objects"][1], cells[stays["cell"]]
            wrong += cells[named["cell"]] != named
        drifted += left != before
        recolored += left["color"] != before["color"]
        assert left["color"] == before["color"] or left["class"] == before["class"], "one attribute at a time"
    assert near(wrong, 1500, rate) and near(drifted, 1500, E.DRIFT)
    assert kind in ("background", "word") or near(recolored, drifted, 0.7)


def test_half_of_a_training_batch_are_edits_half_of_whose_results_and_no_sources_are_spoilt():
    def clean(pictures):
        return canvas.purity(pictures, [*canvas.PAPERS.values(), *canvas.COLORS.values()]) > 0.999

    drawn, (after, captions, before) = E.training_batch(random.Random(0), 801)
    assert drawn[0].shape == (401, 3, 24, 24) and drawn[2] is None and after.shape == (400, 3, 24, 24)
    assert clean(torch.stack(before)).all() and near(int((~clean(after)).sum()), 400, canvas.DEFECT_RATE)
    test = {key(p) for p in E.make_prompts("edit", "test", 400)}
    assert not {(text, data_uri(source)) for source, text in zip(before, captions, strict=True)} & test
    assert len(list(E.training_batch(random.Random(0), 4, ("t2i",)))) == 1


# --------------------------------------------------------------------------------------------------- the evaluation
def drawing(prompt, seed=0):
    """What a prompt of the first task asks for, drawn without a mistake."""
    if '"' in prompt.text:
        return tensor(canvas.draw({"word": prompt.text[-4:-1], "color": "black"}))
    return tensor(canvas.draw(tiny.scene_of(prompt.metadata, random.Random(seed), 0)))


def test_the_first_task_is_aligned_by_genevals_verdict_or_the_ocr_rule_each_row_by_its_own():
    prompts = E.make_prompts("t2i", "test", 30)
    images = torch.stack([drawing(p, i) for i, p in enumerate(prompts)])
    found = E.score(images, prompts, "t2i")
    assert all(found[name] == pytest.approx([1] * 30, abs=1e-4) for name in ("t2i", "alignment", "aesthetic"))
    wrong = torch.ones_like(images)
    wrong[::2] = images[::2]
    assert E.score(wrong, prompts, "t2i")["t2i"] == pytest.approx([1, 0] * 15, abs=1e-4)
    one = tensor(canvas.draw({"objects": [{"class": "circle", "color": "red", "cell": (0, 0)}]}))
    two = Prompt("two red circles", "t2i", {"include": [{"class": "circle", "count": 2, "color": "red"}]}, "x:1")
    assert E.score(one[None], [two], "t2i")["alignment"] == [0], "strict: half of it counts for nothing"


def test_an_edits_score_is_the_mean_of_two_sides_or_the_first_if_it_does_not_say_what_it_keeps(monkeypatch):
    """Four edits; instruction 1, 0, 1/2, 1 and identity 0, 1, 1, untold: all worked by hand."""
    told = {"keep": [canvas.WORD_BOX], "image": data_uri(torch.ones(3, 24, 24))}
    prompts = [Prompt("x", "edit", meta, "x:1") for meta in (told, told, told, {})]
    monkeypatch.setattr(E, "score_instruction", lambda *_: [1.0, 0.0, 0.5, 1.0])
    monkeypatch.setattr(E, "score_identity", lambda images, prompts, before: [0.0, 1.0, 1.0][: len(before)])
    found = E.score(torch.zeros(4, 3, 24, 24), prompts, "edit")
    assert found["edit"].tolist() == [0.5, 0.5, 0.75, 1.0] and str(found["identity"].tolist()) == "[0.0, 1.0, 1.0, nan]"
    assert E.score(torch.zeros(4, 3, 24, 24), prompts[3:] * 4, "edit")["edit"].tolist() == [1.0, 0.0, 0.5, 1.0]


def test_each_row_is_held_against_its_own_source():
    prompts = E.make_prompts("edit", "test", 10)
    before = torch.stack(sum(sources(prompts), ()))
    found = E.score(before, prompts, "edit")
    assert found["identity"] == pytest.approx([1] * 10, abs=1e-3) and np.mean(found["instruction"]) < 0.5
    assert E.score(before.roll(1, 0), prompts, "edit")["identity"].mean() < 0.9
    assert not E.score(torch.ones(10, 3, 24, 24), prompts, "edit")["identity"].any()
