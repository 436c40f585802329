"""The tiny world: detectors that read its own drawings, faults of known rates, disjoint splits, scores by hand."""

import json
import random
from collections import Counter

import numpy as np
import pytest
import torch

import rewards
from data import files as data
from data.checklists import include
from data.files import DataError, Prompt
from tiny import canvas
from tiny import drawings as tiny

E, TRAIN_TAGS = tiny.ATTRIBUTE_ERROR, tuple(tiny.TAG_MIX)


def batch(images):
    return torch.from_numpy(np.stack(images))


# ------------------------------------------------------------------------ scenes: right, wrong, and how often
def verdicts(metas, images):
    return tiny.score_verdict(batch(images), [Prompt("", "composition", meta, "") for meta in metas])


# The chance that a caption of this tag is true. Either every attribute it names holds (each is wrong with
# probability E), or two objects are swapped: each class is wrong and hits the other one's, E/3, and each named
# colour the other's, E/5, or the relation is wrong as well, E.
SWAP = (E / 3) ** 2
TRUE = {
    "single_object": 1 - E,
    "colors": (1 - E) ** 2,
    "counting": (1 - E) ** 2,
    "two_object": (1 - E) ** 2 + SWAP,
    "color_attr": (1 - E) ** 4 + SWAP * (E / 5) ** 2,
    "position": (1 - E) ** 3 + SWAP * E,
}


@pytest.mark.parametrize("tag", tiny.TEST_TAGS)
def test_captions_are_true_as_often_as_the_error_rate_says(tag):
    rng, count = random.Random(6), 800
    metas = [tiny.composition_prompt(tag, rng)[1] for _ in range(count)]
    assert all(verdicts(metas[:100], [canvas.draw(tiny.scene_of(meta, rng, 0.0)) for meta in metas[:100]]))
    share = np.mean(verdicts(metas, [canvas.draw(tiny.scene_of(meta, rng, E)) for meta in metas]))
    assert abs(share - TRUE[tag]) < 4 * (TRUE[tag] * (1 - TRUE[tag]) / count) ** 0.5


@pytest.fixture(scope="module")
def examples():
    """2,500 training pairs without printing faults, each with the metadata of its caption."""
    metas, original = [], tiny.sample_prompt

    def recorded(*arguments):
        drawn = original(*arguments)
        metas.append(drawn[1])
        return drawn

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "sample_prompt", recorded)
        patch.setattr(canvas, "DEFECT_RATE", 0.0)
        ((images, captions, none),) = tiny.training_batch(random.Random(10), 2500)
    assert none is None
    return list(zip(images.numpy(), captions, metas, strict=True))


def test_training_words_and_pictures_are_wrong_at_the_known_rates(examples):
    signs = [(image, text[-4:-1]) for image, text, _ in examples if '"' in text]
    read = canvas.read_text(batch([image for image, _ in signs]))
    wrong = [a != b for text, (_, word) in zip(read, signs, strict=True) for a, b in zip(text, word, strict=True)]
    rate = tiny.LETTER_ERROR
    assert len(wrong) > 900 and abs(np.mean(wrong) - rate) < 4 * (rate * (1 - rate) / len(wrong)) ** 0.5
    tagged = [(image, meta) for image, _, meta in examples if "tag" in meta]
    true = verdicts([meta for _, meta in tagged], [image for image, _ in tagged])
    expected = np.array([TRUE[meta["tag"]] for _, meta in tagged])
    assert len(true) > 900 and abs(sum(true - expected)) < 4 * np.sqrt((expected * (1 - expected)).sum())


# ----------------------------------------------------------------------------------------- prompts and splits
def test_train_and_test_prompts_never_meet_and_pretraining_sees_no_test_caption(examples):
    test = set()
    for task in tiny.TASKS:
        train, tested = ({p.text for p in tiny.make_prompts(task, split, 3000)} for split in data.SPLITS)
        assert not train & tested and len(train) > len(tested) > 20
        test |= tested
    singles = {f"a photo of a {name}" for name in canvas.CLASSES}
    assert singles <= test and not {text for _, text, _ in examples} & test
    assert {meta.get("tag") for _, _, meta in examples} == {None, *TRAIN_TAGS}


def test_composition_trains_on_genevals_mix_and_is_tested_on_all_six_tags_in_turn():
    shares = Counter(p.metadata["tag"] for p in tiny.make_prompts("composition", "train", 3000))
    assert set(shares) == set(TRAIN_TAGS)
    for tag, weight in {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}.items():
        p = weight / 17
        assert abs(shares[tag] / 3000 - p) < 4 * (p * (1 - p) / 3000) ** 0.5, tag
    tags = [p.metadata["tag"] for p in tiny.make_prompts("composition", "test", 13)]
    assert tags == [*tiny.TEST_TAGS, *tiny.TEST_TAGS, "single_object"]


@pytest.mark.parametrize("task", tiny.TASKS)
def test_every_generated_prompt_is_a_line_of_a_users_file_of_its_task_with_tokens_of_its_own(tmp_path, task):
    listed = task == "composition"
    for split in data.SPLITS:
        prompts = tiny.make_prompts(task, split, 400, seed=3)
        assert prompts[:9] == tiny.make_prompts(task, split, 9, 3) != tiny.make_prompts(task, split, 9)
        assert {data.task_of(p.text, p.metadata) for p in prompts} == {task}
        file = tmp_path / f"{split}.{'jsonl' if listed else 'txt'}"
        file.write_text("".join((json.dumps(p.metadata) if listed else p.text) + "\n" for p in prompts))
        read = data.read_prompts(file, task)
        assert [(p.text, p.metadata) for p in read] == [(p.text, p.metadata if listed else {}) for p in prompts]
        for prompt in (*prompts, *read):
            tiny.check_prompt(prompt)
        texts = {p.text for p in prompts}
        assert len({tuple(tiny.tokenize(text)) for text in texts}) == len(texts)
    for wrong in (("edit", "train"), (task, "dev")):
        with pytest.raises(ValueError, match="unknown"):
            tiny.make_prompts(*wrong, 1)


# ----------------------------------------------------------------------------------------------------- tokens
def test_tokens_spell_the_prompt_and_are_padded_at_the_end():
    ids = tiny.tokenize('a sign that says "CAT"')
    assert [tiny.VOCABULARY[i] for i in ids[:9]] == ["a", "sign", "that", "says", '"', "C", "A", "T", '"']
    assert ids[9:] == [0, 0, 0] and tiny.VOCABULARY[0] == "<pad>"
    assert len(set(tiny.VOCABULARY)) == len(tiny.VOCABULARY)
    assert tiny.tokenize("") == [0] * 12, "the empty prompt of guidance"
    assert tiny.tokenize("a circle, and a square.") == tiny.tokenize("a circle and a square")
    assert 0 not in tiny.tokenize("a photo of" + " a" * 9), "twelve tokens are read"
    more = [*tiny.VOCABULARY, "make"]
    assert tiny.tokenize("make a circle", more)[:3] == [len(more) - 1, *tiny.tokenize("a circle")[:2]]


@pytest.mark.parametrize("text, named", [
    ("a photo of a dog", "'dog'"), ("A photo of a circle", "'A'"), ('a sign that says "aCT"', "'a'"),
    ('a sign that says "C T"', "' '"), ("a photo of a <pad>", "'<pad>'"), ("make a circle", "'make'"),
    ('a sign that says "CAT', "quote"), ('a sign that says "CATCH"', "'CATCH'"), ('a sign that says ""', "''"),
    ("a photo of" + " a" * 10, "13 tokens"),
])  # fmt: skip
def test_what_the_world_cannot_say_is_refused_by_name(text, named):
    with pytest.raises(ValueError, match=named):
        tiny.tokenize(text)
    with pytest.raises(DataError, match=f"^mine.jsonl:3: .*{named}"):
        tiny.check_prompt(Prompt(text, "quality", {}, "mine.jsonl:3"))


@pytest.mark.parametrize("task, metadata, named", [
    ("t2i", {}, "'t2i'"), ("composition", {}, "include"),
    ("composition", {"include": [include("circle"), include("dog")]}, "'dog'"),
    ("composition", {"include": [include("circle")], "exclude": [include("dog")]}, "'dog'"),
    ("composition", {"include": [include("circle", color="pink")]}, "'pink'"),
])  # fmt: skip
def test_a_prompt_that_the_world_cannot_draw_is_refused_by_file_and_line(task, metadata, named):
    with pytest.raises(DataError, match=f"^mine.jsonl:3: .*{named}"):
        tiny.check_prompt(Prompt("a photo of a circle", task, metadata, "mine.jsonl:3"))


# ----------------------------------------------------------------------------------------- scorers and evaluation
def perfect(prompt):
    """A flawless drawing of what a prompt asks for."""
    if '"' in prompt.text:
        return canvas.draw({"word": prompt.text[-4:-1], "color": "black"})
    return canvas.draw(tiny.scene_of(prompt.metadata, random.Random(prompt.source), 0.0))


@pytest.mark.parametrize("task", tiny.TASKS)
def test_perfect_drawings_score_one_and_blank_pages_nothing(task):
    prompts = tiny.make_prompts(task, "test", 120)
    images = batch([perfect(p) for p in prompts])
    for found in (tiny.score_task, tiny.score_quality, tiny.score_preference):
        assert found(images, prompts) == pytest.approx([1.0] * 120, abs=1e-3)
    (metric,) = tiny.score(images, prompts, task)
    assert tiny.score(images, prompts, task)[metric] == pytest.approx([1.0] * 120, abs=1e-3)
    assert tiny.score(torch.ones(120, 3, 24, 24), prompts, task) == {metric: [0.0] * 120}


def test_a_wrong_letter_costs_a_third_and_a_prompt_without_a_word_has_no_score():
    prompt = Prompt('a sign that says "CAT"', "text", {}, "")
    images = batch([canvas.draw({"word": word, "color": "red"}) for word in ("CAT", "HAT", "HEX")])
    assert tiny.score_ocr(images, [prompt] * 3) == pytest.approx([1, 2 / 3, 0])
    for score in (tiny.score_ocr, tiny.score_preference):
        with pytest.raises(ValueError, match="no target text"):
            score(images, [prompt._replace(text="a circle")] * 3)


def mixed():
    """Six prompts of three tasks, interleaved, and images that are right, wrong or faded."""
    prompts = [p for trio in zip(*(tiny.make_prompts(t, "test", 2) for t in tiny.TASKS)) for p in trio]
    images = [perfect(p) for p in prompts]
    images[1], images[3], images[5] = perfect(prompts[4]), perfect(prompts[2]), 0.55 * images[5] + 0.28
    return batch(images), prompts


def test_each_prompt_is_scored_by_its_own_tasks_scorer():
    images, prompts = mixed()
    scores = tiny.score_task(images, prompts)
    own = {"composition": tiny.score_geneval, "text": tiny.score_ocr, "quality": tiny.score_quality}
    assert scores == pytest.approx([own[p.task](images[i : i + 1], [p])[0] for i, p in enumerate(prompts)])
    assert len(set(scores)) > 3 and tiny.score_task(images.flip(0), prompts[::-1])[::-1] == pytest.approx(scores)
    with pytest.raises(rewards.RewardError, match="^mine:1: .*'t2i'"):
        tiny.score_task(images[:1], [Prompt("a photo of a circle", "t2i", {}, "mine:1")])


def test_compositions_metric_is_the_strict_verdict():
    prompts = tiny.make_prompts("composition", "test", 8)
    images = batch([perfect(p) for p in prompts])
    images[6] = 1.0
    one, two = tiny.scene_of(prompts[7].metadata, random.Random(0), 0.0)["objects"]
    images[7] = torch.from_numpy(canvas.draw({"objects": [one | {"cell": two["cell"]}, two | {"cell": one["cell"]}]}))
    assert tiny.score(images, prompts, "composition") == {"geneval": [1, 1, 1, 1, 1, 1, 0, 0]}
    assert 0 < tiny.score_geneval(images, prompts)[7] < 1, "the reward is graded"
