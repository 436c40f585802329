"""Oracles for the tiny world's edits: perfect and lazy results by construction, known rates of error, eyes by hand."""

import math
import random
import re
from collections import Counter

import numpy as np
import pytest
import torch

from data import files as data
from data.files import Prompt
from rewards import RewardError, capped_editing, check_scores
from tiny import drawings as tiny
from tiny import edits as E

KINDS = list(E.EDITS)
EDITS = {kind: [E._sample("train", random.Random(f"{kind} {i}"), kind) for i in range(40)] for kind in KINDS}
EVERY = [edit for some in EDITS.values() for edit in some]


def tensor(picture):
    return torch.from_numpy(np.ascontiguousarray(picture)).float()


def faded(picture):
    """One of `tiny.spoil`'s two faults."""
    return 0.55 * picture + 0.45 * 0.62


def grainy(picture, seed=0):
    return (picture + 0.18 * np.random.default_rng(seed).standard_normal(picture.shape, np.float32)).clip(0, 1)


def prompt_of(edit):
    """The prompt of a sampled edit, without the picture, which the scorers are handed."""
    kind, _, _, text, asked = edit
    return Prompt(text, "edit", {"tag": kind, **asked, "prompt": text}, f"{kind}:1")


def scores(edits, scenes, print_=lambda picture: picture):
    """(instruction, identity) of results drawn from `scenes`, a list each."""
    images = torch.stack([tensor(print_(E.draw(scene))) for scene in scenes])
    prompts, sources = [prompt_of(edit) for edit in edits], [tensor(E.draw(edit[1])) for edit in edits]
    return E.score_instruction(images, prompts), E.score_identity(images, prompts, sources)


def changed(scene, cell, **fields):
    """The scene with other attributes of what stands in a cell."""
    return {**scene, "objects": [{**t, **fields} if t["cell"] == cell else t for t in scene["objects"]]}


# ----------------------------------------------------------------------------------------------- the two rewards
@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_result_scores_one_on_both_rewards(kind):
    instruction, identity = scores(EDITS[kind], [edit[2] for edit in EDITS[kind]])
    assert instruction == pytest.approx([1.0] * 40) and identity == pytest.approx([1.0] * 40, abs=1e-6)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "word"])
def test_doing_nothing_follows_no_instruction_and_keeps_the_identity(kind):
    instruction, identity = scores(EDITS[kind], [edit[1] for edit in EDITS[kind]])
    assert instruction == [0.0] * 40 and identity == pytest.approx([1.0] * 40, abs=1e-6)


def test_an_old_word_is_worth_the_letters_that_it_has_in_common_with_the_new_one():
    """By hand, at most: core = 1 + 4 share, other and coherence 5, and then Q's caps."""
    edits = EDITS["word"]
    instruction, identity = scores(edits, [edit[1] for edit in edits])
    for value, (_, source, result, _, _) in zip(instruction, edits, strict=True):
        share = 1 - tiny.rewards.levenshtein(source["word"], result["word"]) / 3
        core = 1 + 4 * share
        assert value == pytest.approx((min((core + 5 + 5) / 3, core) - 1) / 4)
    assert 0.0 in instruction and max(instruction) < 0.7 and identity == pytest.approx([1.0] * 40, abs=1e-6)


@pytest.mark.parametrize("field", ["color", "class"])
@pytest.mark.parametrize("kind", ["recolor", "add", "remove", "background"])
def test_what_should_stay_and_drifts_costs_the_identity_and_not_the_core(kind, field):
    choices = {"color": sorted(E.COLORS), "class": E.CLASSES}[field]
    edits, scenes = [], []
    for edit in EDITS[kind]:
        result = edit[2]
        there = result["objects"][0]
        others = {t[field] for t in (*result["objects"], *edit[1]["objects"])}  # not what is asked for or gone
        for value in (c for c in choices if c not in others):
            edits, scenes = [*edits, edit], [*scenes, changed(result, there["cell"], **{field: value})]
    instruction, identity = scores(edits, scenes)
    kept = [len(edit[4]["keep"]) for edit in edits]
    assert identity == pytest.approx([(n - 1) / n for n in kept], abs=0.05), "of two things one is the same"
    assert min(instruction) > 0.3 and max(instruction) < 1, "a demand beside the core is missed"


def test_a_word_in_another_ink_keeps_no_identity():
    scenes = [{**e[2], "color": next(c for c in E.INKS if c != e[2]["color"])} for e in EDITS["word"]]
    instruction, identity = scores(EDITS["word"], scenes)
    assert max(identity) < 0.05 and instruction == pytest.approx([1.0] * 40), "nobody asked for the ink to stay"


def wrong_results():
    """(edit, scene) of something else being done than what was asked, everything else as it should be."""
    for edit in EDITS["recolor"]:
        stays, named = edit[1]["objects"]
        yield edit, changed(edit[1], stays["cell"], color=edit[2]["objects"][1]["color"])  # the other one
        third = next(c for c in sorted(E.COLORS) if c not in (named["color"], edit[2]["objects"][1]["color"]))
        yield edit, changed(edit[1], named["cell"], color=third)
    for edit in EDITS["add"]:
        *_, new = edit[2]["objects"]
        for field, choices in (("color", sorted(E.COLORS)), ("class", E.CLASSES)):
            other = next(c for c in choices if c not in (new[field], edit[1]["objects"][0][field]))
            yield edit, changed(edit[2], new["cell"], **{field: other})
    for edit in EDITS["remove"]:
        yield edit, {**edit[1], "objects": edit[1]["objects"][1:]}
    for edit in EDITS["background"]:
        yield edit, {**edit[1], "paper": next(c for c in E.PAPERS if c not in (edit[1]["paper"], edit[2]["paper"]))}


def test_another_change_than_the_one_asked_for_is_worth_nothing_however_clean_it_is():
    edits, scenes = zip(*wrong_results(), strict=True)
    assert {edit[0] for edit in edits} == set(KINDS) - {"word"}
    assert scores(edits, scenes)[0] == [0.0] * len(edits)


def test_a_thing_that_is_gone_is_a_stranger():
    scenes = [{**e[2], "objects": e[2]["objects"][1:]} for e in EDITS["recolor"]]
    instruction, identity = scores(EDITS["recolor"], scenes)
    assert identity == [0.0] * 40 and max(instruction) < 1


def test_print_faults_cost_coherence_and_no_identity():
    edits, scenes = EVERY, [edit[2] for edit in EVERY]
    for print_ in (faded, grainy):
        instruction, identity = scores(edits, scenes, print_)
        assert np.mean(instruction) < 0.9 and np.mean(identity) > 0.97
        assert min(identity) > (0.95 if print_ is faded else 0.5)


def test_what_is_kept_is_judged_against_its_own_source_and_prompt():
    """Rows are independent: changing sample i leaves the scores of the others as they were."""
    edits = [EDITS[kind][i] for i, kind in enumerate(KINDS)]
    before = scores(edits, [edit[2] for edit in edits])
    for i, edit in enumerate(edits):
        scenes = [e[1 if e is edit else 2] for e in edits]  # the i-th does nothing
        after = scores(edits, scenes)
        for old, new in zip(before, after, strict=True):
            assert old[:i] + old[i + 1 :] == new[:i] + new[i + 1 :]
        assert after[0][i] < before[0][i]


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
    core, extra = E.demands(quoted, seen("circle"), "CAN")
    assert core == [1, pytest.approx(2 / 3)] and extra == [1, 0, 0]


def test_planted_rules_with_a_wrong_core_or_without_exclude_are_caught():
    """The scores of the tests above tell them apart."""
    edits, scenes = zip(*wrong_results(), strict=True)

    def planted(**fields):
        wrong = [(*e[:4], {**e[4], **{k: v for k, v in fields.items() if k in e[4]}}) for e in edits]
        return scores(wrong, scenes)[0]

    by_core = {e[0]: s for e, s in zip(edits, planted(core=[1]), strict=True)}
    assert all(by_core[kind] > 0 for kind in ("add", "background")), "what stays is no core demand"
    removed = [s for e, s in zip(edits, planted(exclude=[{"class": "circle", "count": 9}]), strict=True)
               if e[0] == "remove"]  # fmt: skip
    assert min(removed) > 0, "the named thing is still there"


def test_a_missed_core_is_worth_nothing_and_a_part_of_it_caps_the_rest():
    """Q 3.3 by `judges`, from the demands of a picture: nothing done, and one of two cores done."""
    edit = EDITS["remove"][0]
    text = prompt_of(edit)
    both = text._replace(metadata={**text.metadata, "core": [0], "keep": []})  # the one that stays is core, too
    images = torch.stack([tensor(E.draw(edit[1])), tensor(E.draw(edit[2]))])
    half, whole = E.score_instruction(images, [both] * 2)
    assert whole == pytest.approx(1) and half == pytest.approx((capped_editing([1, 0], [1], 5.0) - 1) / 4)
    assert half == pytest.approx(0.5), "(1 + 4/2) is the cap"


def test_a_line_without_core_asks_for_everything_and_without_keep_has_no_identity():
    plain = DEMANDS._replace(metadata={k: v for k, v in DEMANDS.metadata.items() if k != "core"})
    assert E.demands(plain, seen("square"), "") == ([0, 1, 0, 1], [])
    image = torch.ones(1, 3, 24, 24)
    for keep in ({}, {"keep": []}):
        bare = plain._replace(metadata={**plain.metadata, **keep})
        with pytest.raises(RewardError, match="^mine:1: identity needs the field 'keep'"):
            E.score_identity(image, [bare], [image[0]])
    with pytest.raises(RewardError, match="^mine:1: no demand to score an edit by"):
        E.score_instruction(image, [Prompt("make", "edit", {}, "mine:1")])


@pytest.mark.parametrize("name", E.SCORERS)
def test_the_scorers_have_the_signature_of_all_scorers(name):
    edits = [EDITS[kind][0] for kind in KINDS]
    scorer = E.scorer(name)
    images, sources = (torch.stack([tensor(E.draw(e[i])) for e in edits]) for i in (2, 1))
    prompts = [prompt_of(edit) for edit in edits]
    found = scorer.score(images, prompts, list(sources))
    assert (scorer.name, scorer.low, scorer.high) == (name, 0.0, 1.0) and found.shape == (5,)
    check_scores(name, np.asarray(found), [p.text for p in prompts], 0.0, 1.0)
    if name == "identity":
        with pytest.raises(RewardError, match="^scorer 'identity': needs the source pictures"):
            scorer.score(images, prompts)
    with pytest.raises(ValueError, match="no eyes for 'other' here, only for instruction, identity"):
        E.scorer("other")


# -------------------------------------------------------------------------------------------- the identity network
def thing(name="circle", color="red", paper="white", cell=(0, 0)):
    return tensor(E.draw({"objects": [{"class": name, "color": color, "cell": cell}], "paper": paper}))


def test_the_embedding_by_hand():
    """A red circle on white: the choices are soft, exp(-20 d) and exp(20 fit), hence not quite 0 and 1."""
    found = E.embedding(thing(), E.BOXES[0])
    assert found.shape == (11,) and np.linalg.norm(found) == pytest.approx(math.sqrt(2))
    assert found[:6].argmax() == list(E.COLORS).index("red") and found[6:].argmax() == E.CLASSES.index("circle")
    masks = [np.pad(m, 1).flatten() for m in tiny.object_masks().values()]
    fits = np.array([*np.corrcoef(masks)[0], 0.5])
    shape = np.exp(20 * (fits - 1))
    np.testing.assert_allclose(found[6:], shape / np.linalg.norm(shape), rtol=1e-3, atol=1e-7)
    letters = E.embedding(tensor(E.draw({"word": "CAT", "color": "blue"})), E.WORD_BOX)
    assert letters[:6].argmax() == 2 and letters[6:] == pytest.approx([0, 0, 0, 0, 1], abs=1e-3)


@pytest.mark.parametrize("paper", E.PAPERS)
def test_a_thing_is_itself_on_any_paper_in_any_print_and_nothing_else(paper):
    same, other = [], []
    reference = {(n, c): E.embedding(thing(n, c), E.BOXES[0]) for n in E.CLASSES for c in E.COLORS}
    for name, color in reference:
        picture = thing(name, color, paper)
        for seen_as in (picture, faded(picture)):
            found = E.embedding(seen_as, E.BOXES[0])
            for key, one in reference.items():
                value = E.rewards.similarity(found, one, E.STRANGER)
                (same if key == (name, color) else other).append(value)
        assert E.embedding(picture, E.BOXES[1]).any() == np.False_, "the next cell is empty"
    assert min(same) > 0.95 and max(other) < 0.05


def test_a_cell_of_solid_paint_is_of_no_shape_and_is_no_fault():
    """A policy that paints all over the cell: the ink does not vary, and a correlation would be 0/0."""
    picture = torch.ones(3, 24, 24)
    picture[:, :12, :12] = tensor(E.COLORS["red"])[:, None, None]
    found = E.embedding(picture, E.BOXES[0])
    assert np.isfinite(found).all() and found[6:].argmax() == 4
    for name in E.CLASSES:
        assert E.rewards.similarity(E.embedding(thing(name), E.BOXES[0]), found, E.STRANGER) < 0.01


# ------------------------------------------------------------------------------------------------- drawing, seeing
def test_a_scene_is_drawn_on_its_paper_and_on_white_as_tiny_draws_it():
    scene = {"objects": [{"class": "square", "color": "green", "cell": (1, 0)}]}
    np.testing.assert_array_equal(E.draw(scene), tiny.draw(scene))
    for paper, color in E.PAPERS.items():
        drawn = E.draw({**scene, "paper": paper})
        inside = np.zeros((24, 24), bool)
        inside[1:11, 13:23] = True
        assert drawn.shape == (3, 24, 24) and drawn.dtype == np.float32
        for channel in range(3):
            np.testing.assert_allclose(drawn[channel][inside], E.COLORS["green"][channel], atol=1e-6)
            np.testing.assert_allclose(drawn[channel][~inside], color[channel], atol=1e-6)


@pytest.mark.parametrize("paper", E.PAPERS)
def test_the_papers_colour_and_what_stands_on_it_are_seen_in_any_print(paper):
    scenes = [{**e[1], "paper": paper} for e in EVERY]
    for print_ in (lambda picture: picture, faded, grainy):
        found = E.detect(torch.stack([tensor(print_(E.draw(scene))) for scene in scenes]))
        backs = [[d for d in some if d["class"] == "background"] for some in found]
        assert all(len(back) == 1 and back[0]["color"] == paper and back[0]["score"] == 1 for back in backs)
    found = E.detect(torch.stack([tensor(E.draw(scene)) for scene in scenes]))
    for scene, some in zip(scenes, found, strict=True):
        if "objects" in scene:
            things = sorted((d["class"], d["color"]) for d in some if d["class"] != "background")
            assert things == sorted((t["class"], t["color"]) for t in scene["objects"])


def test_words_are_read_on_any_paper():
    scenes = [{**e[2], "paper": paper} for e in EDITS["word"] for paper in E.PAPERS]
    pictures = [E.draw(scene) for scene in scenes]
    assert tiny.read_text(torch.stack([tensor(p) for p in pictures])) == [scene["word"] for scene in scenes]


def test_a_source_comes_back_from_its_line_exactly_but_for_the_eight_bits():
    for edit in EVERY[::17]:
        picture = E.draw(edit[1])
        meta = {"image": E.data_uri(picture)}
        back = data.source_image(Prompt("", "edit", meta, "x:1"))
        assert back.dtype == np.uint8 and back.shape == (24, 24, 3)
        np.testing.assert_array_equal(back.transpose(2, 0, 1), np.round(picture * 255))
        np.testing.assert_array_equal(E.data_uri(back.transpose(2, 0, 1) / 255), meta["image"], "once and for all")


# ------------------------------------------------------------------------------------------------------ the prompts
def test_every_prompt_can_be_said_is_accepted_and_fits():
    for task in E.TASKS:
        for split in data.SPLITS:
            for p in E.make_prompts(task, split, 150):
                E.check_prompt(p)
                assert len(E.tokenize(p.text)) == tiny.MAX_TOKENS and p.task == task
    assert E.VOCABULARY[: len(tiny.VOCABULARY)] == tiny.VOCABULARY, "F's words keep their numbers"
    assert len(set(E.VOCABULARY)) == len(E.VOCABULARY)


def key(p):
    return p.text, p.metadata.get("image")


@pytest.mark.parametrize("task", E.TASKS)
def test_the_splits_share_no_prompt_and_are_functions_of_their_seed(task):
    train, test = ({key(p) for p in E.make_prompts(task, split, 1500)} for split in data.SPLITS)
    assert len(test) > 100 and not train & test
    assert E.make_prompts(task, "train", 9, 4) == E.make_prompts(task, "train", 30, 4)[:9]
    assert E.make_prompts(task, "train", 9, 4) != E.make_prompts(task, "train", 9, 5)


def test_what_is_pretrained_on_is_never_tested():
    test = {key(p) for p in E.make_prompts("edit", "test", 400)}
    trained = [E.training_edit(random.Random(i)) for i in range(400)]
    assert not {(text, E.data_uri(source)) for source, _, text in trained} & test


def test_the_test_split_runs_through_kinds_and_categories_in_turn_and_train_has_the_mix():
    assert [p.metadata["tag"] for p in E.make_prompts("edit", "test", 7)] == [*KINDS, *KINDS[:2]]
    test = E.make_prompts("t2i", "test", 36)
    assert [p.metadata["category"] for p in test] == ["composition", "typography", "open"] * 12
    assert [p.metadata["tag"] for p in test[::3]] == list(tiny.TEST_TAGS) * 2
    for task, field, mix in (("edit", "tag", E.EDITS), ("t2i", "category", dict(zip(E.CATEGORY_NAMES.values(),
                             E.CATEGORIES.values(), strict=True)))):  # fmt: skip
        counts = Counter(p.metadata[field] for p in E.make_prompts(task, "train", 1100))
        for name, share in mix.items():
            p = share / 11
            assert abs(counts[name] - 1100 * p) < 4 * math.sqrt(1100 * p * (1 - p))


def test_a_word_is_changed_to_any_other_and_none_is_preferred():
    words = [e[2]["word"] for e in (E._sample("train", random.Random(i), "word") for i in range(400))]
    assert max(Counter(words).values()) <= 6, "of about 1000 words 400 are drawn: 6 of one kind happens once in 1e4"
    assert all(e[1]["word"] != e[2]["word"] for e in EDITS["word"])


def test_other_tasks_and_splits_are_refused():
    with pytest.raises(ValueError, match="this world has no task 'text', only t2i, edit"):
        E.make_prompts("text", "train", 1)
    with pytest.raises(ValueError, match="this world has no split 'dev', only train, test"):
        E.make_prompts("edit", "dev", 1)


EDIT = E.make_prompts("edit", "test", 1)[0]._replace(source="mine.jsonl:7")  # a recolor
WORD = E.make_prompts("edit", "test", 4)[3]._replace(source="mine.jsonl:7")
GROSS = E.data_uri(np.zeros((3, 24, 25), np.float32))
REFUSED = [
    (EDIT, {"core": [3]}, r"core is \[3\]; it must be a list of indices of the include list"),
    (EDIT, {"core": [-1]}, r"core is \[-1\]; it must be a list of indices.*"),
    (EDIT, {"core": [True]}, r"core is \[True\]; it must be a list of indices.*"),
    (EDIT, {"core": 0}, r"core is 0; it must be a list of indices.*"),
    (EDIT, {"core": []}, r"core is empty; name at least one entry of the include list"),
    (EDIT, {"keep": [[0, 0, 24, 24]]}, r"keep is \[\[0, 0, 24, 24\]\]; it must be a list of places.*"),
    (EDIT, {"keep": [list(b) for b in E.BOXES[:4]]}, r"keep is .*; it must be a list of places with some.*"),
    (EDIT, {"keep": "all"}, r"keep is 'all'; it must be a list of places.*"),
    (EDIT, {"keep": [3]}, r"keep is \[3\]; it must be a list of places.*"),
    (EDIT, {"image": GROSS}, r"its image is not 24 x 24 pixels; give one of that size"),
    (EDIT, {"image": "/none.png"}, r"image /none.png: No such file.*"),
    (EDIT, {"include": [{"class": "cow", "count": 1}]}, r"the tiny world has no class 'cow': circle.*background"),
    (EDIT, {"include": [{"class": "circle", "count": 1, "color": "pink"}]}, r".* has no color 'pink': red.*"),
    (EDIT, {"include": [{"class": "background", "count": 1, "color": "red"}]}, r".* has no color 'red': white.*"),
    (EDIT, {"include": [*EDIT.metadata["include"], {"class": "circle", "count": 1, "position": ["above", 0]}]},
     r"an edit's checklist knows no position in this world; leave it out"),
    (EDIT, {"include": []}, r"nothing to score by; give it an include list, or quote a word"),
]  # fmt: skip


@pytest.mark.parametrize(("prompt", "fields", "message"), REFUSED, ids=[str(f)[:40] for _, f, _ in REFUSED])
def test_a_users_edit_that_cannot_be_scored_is_refused_by_its_line(prompt, fields, message):
    E.check_prompt(prompt)
    with pytest.raises(data.DataError) as error:
        E.check_prompt(prompt._replace(metadata={**prompt.metadata, **fields}))
    assert re.fullmatch(f"mine.jsonl:7: {message}", str(error.value))


def test_a_users_line_needs_neither_core_nor_keep():
    for prompt in (EDIT, WORD):
        bare = {k: v for k, v in prompt.metadata.items() if k not in ("core", "keep")}
        E.check_prompt(prompt._replace(metadata=bare))
    E.check_prompt(Prompt('a sign that says "CAT"', "t2i", {}, "x:1"))


@pytest.mark.parametrize("prompt, message", [
    (Prompt("a photo of a circle", "composition", {}, "x:1"), "has no task 'composition', only t2i, edit"),
    (Prompt("a photo of a circle", "t2i", {}, "x:1"), "nothing to score by"),
    (Prompt("a photo of a cow", "t2i", {}, "x:1"), "has no word 'cow'"),
    (Prompt("a circle", "t2i", {"include": [{"class": "background", "count": 1}]}, "x:1"), "has no class 'background'"),
])  # fmt: skip
def test_a_users_prompt_of_the_first_task_that_cannot_be_scored_is_refused(prompt, message):
    with pytest.raises(data.DataError, match=f"^x:1: .*{message}"):
        E.check_prompt(prompt)


# ------------------------------------------------------------------------------------- what the base learns from
def corrupted(kind, count=1500):
    rng = random.Random(f"corrupted {kind}")
    for _ in range(count):
        _, source, result, _, _ = E._sample("train", rng, kind)
        yield source, result, E.corrupted(kind, source, result, rng)


def near(hits, count, p):
    return abs(hits - count * p) < 4 * math.sqrt(count * p * (1 - p))


@pytest.mark.parametrize("kind, rate", [
    ("recolor", tiny.ATTRIBUTE_ERROR), ("add", tiny.ATTRIBUTE_ERROR), ("background", tiny.ATTRIBUTE_ERROR),
    ("remove", tiny.ATTRIBUTE_ERROR * 2 / 3),
])  # fmt: skip
def test_edits_are_wrong_and_what_should_stay_drifts_as_often_as_the_constants_say(kind, rate):
    wrong = drifted = recolored = 0
    for source, result, drawn in corrupted(kind):
        cells = {t["cell"]: t for t in drawn["objects"]}
        if kind == "background":
            wrong += drawn["paper"] != result["paper"]
            moved = [cells[t["cell"]] != t for t in result["objects"]]
            assert sum(moved) < 2 and drawn["paper"] in E.PAPERS
            drifted += any(moved)
            continue
        assert drawn["paper"] == source["paper"]
        stays = result["objects"][0]
        if kind == "remove":
            left = next(iter(cells.values()))
            assert len(cells) == 1
            wrong += left["cell"] != stays["cell"]
            before = next(t for t in source["objects"] if t["cell"] == left["cell"])
        else:
            named = result["objects"][1]
            wrong += cells[named["cell"]] != named
            before, left = stays, cells[stays["cell"]]
        drifted += left != before
        recolored += left["color"] != before["color"]
        assert left["color"] == before["color"] or left["class"] == before["class"], "one attribute at a time"
    assert near(wrong, 1500, rate) and near(drifted, 1500, E.DRIFT)
    assert kind == "background" or near(recolored, drifted, 0.7)


def test_letters_and_inks_are_wrong_as_often_as_the_constants_say():
    letters = inks = 0
    for _, result, drawn in corrupted("word"):
        letters += sum(a != b for a, b in zip(drawn["word"], result["word"], strict=True))
        inks += drawn["color"] != result["color"]
        assert drawn["color"] in E.INKS and drawn["paper"] == result["paper"]
    assert near(letters, 4500, tiny.LETTER_ERROR) and near(inks, 1500, E.DRIFT)


def test_half_of_the_results_and_no_source_are_spoilt():
    def clean(picture):
        return float(tiny.purity(tensor(picture)[None], [*E.PAPERS.values(), *E.COLORS.values()])) > 0.999

    triples = [E.training_edit(random.Random(i)) for i in range(400)]
    assert all(clean(source) for source, _, _ in triples)
    assert near(sum(not clean(result) for _, result, _ in triples), 400, tiny.DEFECT_RATE)
    assert all(a.shape == b.shape == (3, 24, 24) for a, b, _ in triples)


# --------------------------------------------------------------------------------------------------- the evaluation
def test_the_first_task_is_counted_by_genevals_verdict_or_the_ocr_rule_each_row_by_its_own():
    prompts = E.make_prompts("t2i", "test", 30)
    scenes = [{"word": p.text[-4:-1], "color": "black"} if '"' in p.text else
              tiny.scene_of(p.metadata, random.Random(i), 0) for i, p in enumerate(prompts)]  # fmt: skip
    images = torch.stack([tensor(tiny.draw(scene)) for scene in scenes])
    assert E.score_alignment(images, prompts) == [1.0] * 30
    wrong = torch.ones_like(images)
    wrong[::2] = images[::2]
    assert E.score_alignment(wrong, prompts) == [1.0, 0.0] * 15
    near_miss = tensor(tiny.draw({"word": prompts[1].text[-4:-2] + ("A" if prompts[1].text[-2] != "A" else "C"),
                                  "color": "black"}))[None]  # fmt: skip
    assert E.score_alignment(near_miss, [prompts[1]]) == [pytest.approx(2 / 3)]
    two = Prompt("two red circles", "t2i", {"include": [{"class": "circle", "count": 2, "color": "red"}]}, "x:1")
    assert E.score_alignment(thing()[None], [two]) == [0.0], "strict: half of it counts for nothing"
