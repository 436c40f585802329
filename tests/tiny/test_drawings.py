"""Oracles for the tiny world: eyes that read its own drawings, faults of known rates, disjoint splits."""

import json
import math
import random
import re
from collections import Counter

import numpy as np
import pytest
import torch

import rewards
from data import files as data
from data.files import DataError, Prompt
from tiny import drawings as tiny

TRAIN_TAGS = tuple(tiny.TAG_MIX)


def batch(images):
    return torch.from_numpy(np.stack(images))


def random_scene(rng):
    """One to four objects of any class and colour in any cells."""
    cells = rng.sample([(0, 0), (1, 0), (0, 1), (1, 1)], rng.randint(1, 4))
    return {"objects": [{"class": rng.choice(tiny.CLASSES), "color": rng.choice(list(tiny.COLORS)), "cell": c}
                        for c in cells]}  # fmt: skip


def random_word(rng):
    return {"word": "".join(rng.choices(tiny.LETTERS, k=3)), "color": rng.choice(tiny.INKS)}


def contents(scene):
    return sorted((o["class"], o["color"], o["cell"]) for o in scene["objects"])


def seen(found):
    """The same triples as `contents`, from detections: the cell is where the centre of the box lies."""
    return sorted((d["class"], d["color"], tuple(int(sum(d["box"][i::2]) / 2) // tiny.CELL for i in (0, 1)))
                  for d in found)  # fmt: skip


class Dice(random.Random):
    """A generator whose `random()` is dictated; everything else comes from its seed."""

    def __init__(self, throws, seed):
        super().__init__(seed)
        self.throws = list(throws)

    def random(self):
        return self.throws.pop(0)


def grainy(image, seed):
    return tiny.spoil(image, Dice([0.0, 0.49], seed))


def faded(image):
    return tiny.spoil(image, Dice([0.0, 0.51], 0))


@pytest.fixture(scope="module")
def scenes():
    rng = random.Random(1)
    return [random_scene(rng) for _ in range(300)]


@pytest.fixture(scope="module")
def words():
    rng = random.Random(2)
    return [random_word(rng) for _ in range(300)]


def prints(things):
    """{how it was printed: images (B, 3, 24, 24)} of scenes or words."""
    clean = [tiny.draw(thing) for thing in things]
    spoilt = {"faded": [faded(i) for i in clean], "grainy": [grainy(i, seed) for seed, i in enumerate(clean)]}
    return {name: batch(images) for name, images in ({"clean": clean} | spoilt).items()}


# ---------------------------------------------------------------------------------------------------- drawing
def test_a_square_fills_ten_pixels_of_its_cell_and_the_rest_stays_paper():
    image = tiny.draw({"objects": [{"class": "square", "color": "red", "cell": (1, 0)}]})
    expected = np.ones((3, 24, 24), np.float32)
    # column 1 begins at x = 12, row 0 at y = 0; one pixel of margin
    expected[:, 1:11, 13:23] = np.array([0.86, 0.08, 0.08], np.float32)[:, None, None]
    np.testing.assert_allclose(image, expected, atol=1e-6)


def test_letters_stand_side_by_side_on_the_middle_line():
    image = tiny.draw({"word": "LET", "color": "black"})
    ink = image[0] < 0.5
    assert not ink[:7].any() and not ink[17:].any()
    for i, letter in enumerate("LET"):
        np.testing.assert_array_equal(ink[7:17, 8 * i : 8 * i + 8], tiny.letter_masks()[letter] == 1)


def test_all_shapes_and_letters_differ_by_more_than_a_few_pixels():
    for masks in (tiny.object_masks(), tiny.letter_masks()):
        shapes = list(masks.values())
        assert all(np.abs(a - b).sum() >= 5 for i, a in enumerate(shapes) for b in shapes[:i])
    assert all(mask.shape == (10, 8) for mask in tiny.letter_masks().values())


def test_a_spoilt_print_is_grain_or_a_blend_with_grey():
    image = tiny.draw({"objects": [{"class": "circle", "color": "blue", "cell": (0, 0)}]})
    np.testing.assert_allclose(faded(image), image + 0.45 * (0.62 - image), atol=1e-6)
    grain = grainy(np.full((3, 24, 24), 0.5, np.float32), 3) - 0.5
    # standard deviation 0.18 of 1,728 draws (2.8 sd from the clip at 0 and 1): standard error 0.18/sqrt(3456)
    assert abs(grain.std() - 0.18) < 4 * 0.0031 and abs(grain.mean()) < 4 * 0.0044
    assert tiny.spoil(image, Dice([tiny.DEFECT_RATE], 0)) is image, "at the rate itself a print is fine"


# ------------------------------------------------------------------------------------------------------- eyes
@pytest.mark.parametrize(("how", "accuracy"), [("clean", 0.99), ("faded", 0.99), ("grainy", 0.97)])
def test_the_detector_finds_class_colour_and_cell_of_everything_drawn(scenes, how, accuracy):
    found = tiny.detect(prints(scenes)[how])
    confident = [[d for d in some if d["score"] > rewards.COUNTING_CONFIDENCE] for some in found]
    right = [seen(some) == contents(scene) for some, scene in zip(confident, scenes, strict=True)]
    assert np.mean(right) >= accuracy
    if how == "clean":
        assert [len(some) for some in found] == [len(scene["objects"]) for scene in scenes], (
            "and nothing else"
        )
        assert min(d["score"] for some in found for d in some) > 0.999


def test_a_detection_is_a_geneval_detection_with_its_exact_box():
    (found,) = tiny.detect(
        batch([tiny.draw({"objects": [{"class": "cross", "color": "green", "cell": (0, 1)}]})])
    )
    assert found == [{"class": "cross", "score": 1.0, "box": (1.0, 13.0, 11.0, 23.0), "color": "green"}]


@pytest.mark.parametrize(("how", "accuracy"), [("clean", 0.99), ("faded", 0.99), ("grainy", 0.97)])
def test_the_reader_reads_every_word(words, how, accuracy):
    read = tiny.read_text(prints(words)[how])
    assert np.mean([text == word["word"] for text, word in zip(read, words, strict=True)]) >= accuracy


def test_the_reader_finds_the_line_wherever_it_stands():
    images = []
    for top in (0, 5, 14):
        images.append(np.ones((3, 24, 24), np.float32))
        for i, letter in enumerate("HAT"):
            tiny.paint(images[-1], tiny.letter_masks()[letter], 8 * i, top, "purple")
    assert tiny.read_text(batch(images)) == ["HAT"] * 3


def blanks():
    pages = [
        (1.0, 1.0, 1.0),
        (0.5, 0.5, 0.5),
        *tiny.COLORS.values(),
    ]  # white, grey, and every paint (black too)
    return torch.tensor(pages)[:, :, None, None].expand(-1, 3, 24, 24)


def noises():
    rng = torch.Generator().manual_seed(0)
    gauss = (0.5 + 0.3 * torch.randn(100, 3, 24, 24, generator=rng)).clamp(0, 1)
    binary = torch.rand(100, 3, 24, 24, generator=rng).round()
    return torch.cat([torch.rand(100, 3, 24, 24, generator=rng), gauss, binary])


def test_nothing_is_seen_or_read_on_blank_pages_and_in_noise():
    assert tiny.detect(blanks()) == [[]] * 8 and tiny.read_text(blanks()) == [""] * 8
    found = [d for some in tiny.detect(noises()) for d in some if d["score"] > rewards.CONFIDENCE]
    assert len(found) <= 1 and sum(map(len, tiny.read_text(noises()))) <= 3, "of 300 images"


def test_quality_is_one_for_clean_prints_and_near_zero_for_blank_pages_and_noise(scenes, words):
    for things in (scenes, words):
        torch.testing.assert_close(tiny.quality(prints(things)["clean"]), torch.ones(300), atol=1e-3, rtol=0)
    assert tiny.quality(blanks()).max() < 1e-6, "an empty page and a page of paint earn nothing"
    assert tiny.quality(noises()).max() < 0.2


def test_quality_falls_with_every_spoilt_print(scenes, words):
    for things in (scenes, words):
        quality = {how: tiny.quality(images) for how, images in prints(things).items()}
        assert (quality["clean"] > quality["grainy"] + 0.3).all()
        assert (quality["clean"] > quality["faded"] + 0.3).all()
        assert min(quality["grainy"].min(), quality["faded"].min()) > 0.02, "worse, but not hopeless"


def test_quality_is_monotone_in_the_strength_of_each_fault(scenes):
    clean = prints(scenes)["clean"][:50]
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(4))
    fades = torch.stack([tiny.quality(clean + a * (0.62 - clean)) for a in (0.0, 0.1, 0.2, 0.3, 0.45)])
    grains = torch.stack([tiny.quality((clean + a * noise).clamp(0, 1)) for a in (0.0, 0.05, 0.1, 0.18, 0.3)])
    assert (fades.diff(dim=0) < 0).all() and (grains.diff(dim=0) < 0).all()


def test_the_gate_of_quality_is_open_between_4_and_70_percent_of_ink():
    def page(inked):  # `inked` black pixels on white paper: no distance from the pure colours
        return (torch.arange(576) >= inked).float().reshape(1, 1, 24, 24).expand(1, 3, 24, 24)

    # 10/576 = 1.74 % of 4 %: 0.4340; 547/576 leaves 5.03 % of 30 % paper: 0.1678
    for inked, gate in ((0, 0), (10, 0.43403), (24, 1), (400, 1), (547, 0.16782), (576, 0)):
        assert tiny.quality(page(inked)).item() == pytest.approx(gate, abs=1e-4), inked


def test_every_image_of_a_batch_is_judged_alone(scenes, words):
    images = torch.cat([prints(scenes)["grainy"][:3], prints(words)["grainy"][:2]])
    other = images.clone()
    other[1] = images[4]
    keep = [0, 2, 3, 4]
    for eye in (tiny.detect, tiny.read_text, lambda x: tiny.quality(x).tolist()):
        before, after = eye(images), eye(other)
        assert [before[i] for i in keep] == [after[i] for i in keep] and before[1] != after[1]


def test_the_eyes_see_the_same_in_half_precision(scenes, words):
    things, texts = prints(scenes)["clean"][:20], prints(words)["clean"][:20]
    assert [seen(f) for f in tiny.detect(things.bfloat16())] == [seen(f) for f in tiny.detect(things)]
    assert tiny.read_text(texts.bfloat16()) == tiny.read_text(texts)
    assert tiny.quality(things.bfloat16()).dtype == torch.float32


# ------------------------------------------------------------------------ scenes: right, wrong, and how often
def verdicts(metas, scenes):
    prompts = [Prompt("", "composition", meta, "") for meta in metas]
    return tiny.score_verdict(batch([tiny.draw(scene) for scene in scenes]), prompts)


@pytest.mark.parametrize("tag", tiny.TEST_TAGS)
def test_without_errors_every_scene_is_what_its_caption_says(tag):
    rng = random.Random(5)
    metas = [tiny.composition_metadata(tag, rng) for _ in range(100)]
    assert all(verdicts(metas, [tiny.scene_of(meta, rng, 0.0) for meta in metas]))


# The chance that a caption of this tag is true. Either every attribute it names holds (each lies with
# probability e = ATTRIBUTE_ERROR), or two objects are swapped: each class lies and hits the other one's, e/3,
# and each named colour the other's, e/5, or the relation lies as well, e.
E = tiny.ATTRIBUTE_ERROR
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
    metas = [tiny.composition_metadata(tag, rng) for _ in range(count)]
    share = np.mean(verdicts(metas, [tiny.scene_of(meta, rng, E) for meta in metas]))
    assert abs(share - TRUE[tag]) < 4 * (TRUE[tag] * (1 - TRUE[tag]) / count) ** 0.5


def test_a_certain_lie_is_never_the_truth_and_takes_every_other_value_alike():
    rng, count = random.Random(7), 1200
    entry = tiny.include("circle", 2, color="red")
    lies = [tiny.scene_of({"tag": "counting", "include": [entry]}, rng, 1.0)["objects"] for _ in range(count)]
    drawn = {
        "class": (Counter(objects[0]["class"] for objects in lies), set(tiny.CLASSES) - {"circle"}),
        "color": (Counter(objects[0]["color"] for objects in lies), set(tiny.COLORS) - {"red"}),
        "count": (Counter(len(objects) for objects in lies), {1, 3, 4}),
    }
    for shares, others in drawn.values():
        assert set(shares) == others
        p = 1 / len(others)
        assert all(abs(n / count - p) < 4 * (p * (1 - p) / count) ** 0.5 for n in shares.values())
    assert all(len({(o["class"], o["color"]) for o in objects}) == 1 for objects in lies), "a group is alike"


def test_only_counting_prompts_lie_about_the_count():
    rng = random.Random(8)
    meta = {"include": [tiny.include("circle", 3)]}
    assert {len(tiny.scene_of(meta, rng, 1.0)["objects"]) for _ in range(50)} == {3}


def test_a_certain_lie_reverses_a_relation():
    rng = random.Random(9)
    for relation, opposite in tiny.OPPOSITE.items():
        meta = {"include": [tiny.include("cross"), tiny.include("circle", position=[relation, 0])]}
        for error, truth in ((0.0, relation), (1.0, opposite)):
            image = tiny.draw(tiny.scene_of(meta, rng, error))
            (found,) = tiny.detect(batch([image]))
            # the second entry's object: which class it has is a lie too, hence told by the box
            (a, b) = [d["box"] for d in found]
            assert truth in rewards.relative_position(a, b) | rewards.relative_position(b, a)
            if error == 0:
                boxes = {d["class"]: d["box"] for d in found}
                assert rewards.relative_position(boxes["circle"], boxes["cross"]) == {truth}


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
        patch.setattr(tiny, "DEFECT_RATE", 0.0)
        rng = random.Random(10)
        pairs = [tiny.training_example(rng) for _ in range(2500)]
    return [(image, text, meta) for (image, text), meta in zip(pairs, metas, strict=True)]


def test_a_training_word_has_wrong_letters_at_the_known_rate(examples):
    signs = [(image, text[-4:-1]) for image, text, _ in examples if '"' in text]
    read = tiny.read_text(batch([image for image, _ in signs]))
    wrong = [
        a != b for text, (_, word) in zip(read, signs, strict=True) for a, b in zip(text, word, strict=True)
    ]
    rate = tiny.LETTER_ERROR
    assert len(wrong) > 900 and abs(np.mean(wrong) - rate) < 4 * (rate * (1 - rate) / len(wrong)) ** 0.5


def test_a_training_picture_contradicts_its_caption_at_the_known_rate(examples):
    tagged = [(image, meta) for image, _, meta in examples if "tag" in meta]
    prompts = [Prompt("", "composition", meta, "") for _, meta in tagged]
    true = np.array(tiny.score_verdict(batch([image for image, _ in tagged]), prompts))
    expected = np.array([TRUE[meta["tag"]] for _, meta in tagged])
    deviation = np.sqrt((expected * (1 - expected)).sum())
    assert len(true) > 900 and abs((true - expected).sum()) < 4 * deviation


def test_half_of_the_training_pictures_are_spoilt_and_half_of_those_faded():
    rng, count = random.Random(11), 1000
    images = batch([tiny.training_example(rng)[0] for _ in range(count)])
    spoilt, grey = tiny.quality(images) < 0.9, images.amax((1, 2, 3)) < 0.9  # a faded print has no white left
    assert abs(spoilt.float().mean() - tiny.DEFECT_RATE) < 4 * (0.25 / count) ** 0.5
    assert abs(grey.float().mean() - tiny.DEFECT_RATE / 2) < 4 * (0.1875 / count) ** 0.5
    assert images.dtype == torch.float32 and images.min() >= 0 and images.max() <= 1


# ----------------------------------------------------------------------------------------- prompts and splits
@pytest.mark.parametrize("task", tiny.TASKS)
def test_train_and_test_prompts_never_meet(task):
    train = {p.text for p in tiny.make_prompts(task, "train", 3000)}
    test = {p.text for p in tiny.make_prompts(task, "test", 3000)}
    assert not train & test and len(train) > len(test) > 20


def test_pretraining_sees_no_test_caption_and_no_single_object(examples):
    test = {p.text for task in tiny.TASKS for p in tiny.make_prompts(task, "test", 3000)}
    singles = {tiny.composition_metadata("single_object", random.Random(i))["prompt"] for i in range(60)}
    captions = {text for _, text, _ in examples}
    assert len(singles) == 4 and singles <= test and not captions & test
    assert not any("single" in meta.get("tag", "") for _, _, meta in examples)
    assert {meta.get("tag") for _, _, meta in examples} == {None, *TRAIN_TAGS}


def test_composition_trains_on_genevals_mix_and_is_tested_on_all_six_tags_in_turn():
    count = 3000
    shares = Counter(p.metadata["tag"] for p in tiny.make_prompts("composition", "train", count))
    assert set(shares) == set(TRAIN_TAGS)
    for tag, weight in zip(("position", "counting", "color_attr", "colors", "two_object"), (7, 5, 3, 1, 1)):
        p = weight / 17
        assert abs(shares[tag] / count - p) < 4 * (p * (1 - p) / count) ** 0.5, tag
    tags = [p.metadata["tag"] for p in tiny.make_prompts("composition", "test", 13)]
    assert tags == [*tiny.TEST_TAGS, *tiny.TEST_TAGS, "single_object"]


def test_prompts_are_a_function_of_task_split_and_seed_alone():
    for task in tiny.TASKS:
        first = tiny.make_prompts(task, "train", 40)
        assert first == tiny.make_prompts(task, "train", 40, seed=0)
        assert first[:9] == tiny.make_prompts(task, "train", 9) and first != tiny.make_prompts(
            task, "train", 40, 1
        )
        assert first[4].source == f"tiny train {task}:5" and first[4].task == task


def test_every_generated_prompt_passes_the_parser_for_users_files_and_routes_to_its_task(tmp_path):
    for task in tiny.TASKS:
        for split in data.SPLITS:
            prompts = tiny.make_prompts(task, split, 400, seed=3)
            assert {data.task_of(p.text, p.metadata) for p in prompts} == {task}
            metadata = task == "composition"
            file = tmp_path / f"{task}-{split}.{'jsonl' if metadata else 'txt'}"
            file.write_text("".join((json.dumps(p.metadata) if metadata else p.text) + "\n" for p in prompts))
            read = data.read_prompts(file, task)
            assert [p.text for p in read] == [p.text for p in prompts]
            assert [p.metadata for p in read] == [p.metadata if metadata else {} for p in prompts]
            for prompt in (*prompts, *read):
                tiny.check_prompt(prompt)


def test_metadata_are_genevals_own_fields():
    rng = random.Random(12)
    for tag in tiny.TEST_TAGS:
        meta = tiny.composition_metadata(tag, rng)
        assert meta["tag"] == tag and set(meta) == {"tag", "include", "prompt"} | (
            {"exclude"} if tag == "counting" else set()
        )
    meta = {m["prompt"]: m for m in (tiny.composition_metadata("counting", rng) for _ in range(200))}
    assert meta["a photo of three crosses"] == {
        "tag": "counting",
        "include": [{"class": "cross", "count": 3}],
        "exclude": [{"class": "cross", "count": 4}],
        "prompt": "a photo of three crosses",
    }
    assert len(meta) == 12
    meta = {m["prompt"]: m for m in (tiny.composition_metadata("position", rng) for _ in range(999))}
    assert meta["a photo of a circle left of a cross"]["include"] == [
        {"class": "cross", "count": 1},
        {"class": "circle", "count": 1, "position": ["left of", 0]},
    ]


# ----------------------------------------------------------------------------------------------------- tokens
def test_tokens_spell_the_prompt_and_are_padded_at_the_end():
    ids = tiny.tokenize('a sign that says "CAT"')
    assert [tiny.VOCABULARY[i] for i in ids[:9]] == ["a", "sign", "that", "says", '"', "C", "A", "T", '"']
    assert ids[9:] == [0, 0, 0] and len(ids) == tiny.MAX_TOKENS == 12 and tiny.VOCABULARY[0] == "<pad>"
    assert len(set(tiny.VOCABULARY)) == len(tiny.VOCABULARY)
    assert tiny.tokenize("") == [0] * 12, "the empty prompt, guidance's other half"
    assert tiny.tokenize("a photo of a circle, and a square.") == tiny.tokenize(
        "a photo of a circle and a square"
    )


def test_every_generated_prompt_has_tokens_of_its_own():
    texts = {p.text for t in tiny.TASKS for s in data.SPLITS for p in tiny.make_prompts(t, s, 1000)}
    assert len({tuple(tiny.tokenize(text)) for text in texts}) == len(texts) > 1000


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (
            "a photo of a dog",
            r"^the tiny world has no word 'dog'; its vocabulary is: a photo of .* crosses A C E",
        ),
        ("A photo of a circle", r"no word 'A'"),  # a letter of the alphabet, but no word
        ('a sign that says "aCT"', r"no word 'a'"),  # a word, but no letter of the alphabet
        ('a sign that says "C T"', r"no word ' '"),
        ("a photo of a <pad>", r"no word '<pad>'"),
        ('a sign that says "CAT', r"^a double quote is not closed; its vocabulary is: a photo"),
        ('a sign that says "CATCH"', r"^the tiny world writes words of 3 letters, not 'CATCH'$"),
        ('a sign that says ""', r"^the tiny world writes words of 3 letters, not ''$"),
        ("a photo of" + " a" * 10, r"^13 tokens, and the tiny world reads at most 12: 'a photo of a a"),
    ],
)
def test_what_the_world_cannot_say_is_refused_by_name(prompt, message):
    with pytest.raises(ValueError, match=message):
        tiny.tokenize(prompt)


def test_twelve_tokens_are_read():
    assert 0 not in tiny.tokenize("a photo of" + " a" * 9)


def test_a_prompt_of_a_file_is_refused_by_file_and_line():
    def refusal(text, **metadata):
        with pytest.raises(DataError) as error:
            tiny.check_prompt(Prompt(text, "composition", metadata, "mine.jsonl:3"))
        return str(error.value)

    circle = "a photo of a circle"
    assert re.match(
        r"mine\.jsonl:3: the tiny world has no word 'dragon'; its", refusal("a photo of a dragon")
    )
    classes, colors = "circle, square, triangle, cross", "red, green, blue, yellow, purple, black"
    dog, pink = {"class": "dog", "count": 1}, {"class": "circle", "count": 1, "color": "pink"}
    wanted = f"mine.jsonl:3: the tiny world has no class 'dog': {classes}"
    assert refusal(circle, include=[tiny.include("circle"), dog]) == wanted
    assert refusal(circle, include=[tiny.include("circle")], exclude=[dog]) == wanted
    assert refusal(circle, include=[pink]) == f"mine.jsonl:3: the tiny world has no color 'pink': {colors}"


# ---------------------------------------------------------------------------------------------------- scorers
def perfect(prompt):
    """A flawless drawing of what a prompt asks for."""
    if prompt.task == "text":
        return tiny.draw({"word": prompt.text[-4:-1], "color": "black"})
    return tiny.draw(tiny.scene_of(prompt.metadata, random.Random(prompt.source), 0.0))


@pytest.mark.parametrize("task", tiny.TASKS)
def test_perfect_drawings_score_one(task):
    prompts = tiny.make_prompts(task, "test", 120)
    images = batch([perfect(p) for p in prompts])
    assert tiny.score_task(images, prompts) == pytest.approx([1.0] * 120, abs=1e-3)
    assert tiny.score_quality(images, prompts) == pytest.approx([1.0] * 120, abs=1e-3)
    if task != "text":
        assert tiny.score_geneval(images, prompts) == tiny.score_verdict(images, prompts) == [1.0] * 120


def thing(name, color="black", cell=(0, 0)):
    return {"class": name, "color": color, "cell": cell}


WRONG = {  # include, what is drawn, GenEval's graded reward by hand
    # the count is right, the colour is not: (1 + 0)/2
    "colour": ([tiny.include("circle", color="red")], [thing("circle", "blue")], 1 / 2),
    # 3 for 2: 1 - 1/2
    "count": ([tiny.include("cross", 2)], [thing("cross", cell=c) for c in ((0, 0), (1, 0), (0, 1))], 1 / 2),
    # both counts are right, the relation is not: (1 + 1 + 0)/3
    "relation": (
        [tiny.include("square"), tiny.include("circle", position=["left of", 0])],
        [thing("square", cell=(0, 0)), thing("circle", cell=(1, 0))],
        2 / 3,
    ),
    "class": ([tiny.include("triangle")], [thing("square")], 0.0),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_colour_count_relation_or_class_scores_less(what):
    include, objects, graded = WRONG[what]
    exclude = {"exclude": [tiny.include("cross", 3)]} if what == "count" else {}
    prompt = Prompt("", "composition", {"tag": "x", "include": include, **exclude}, "")
    images = batch([tiny.draw({"objects": objects})])
    assert tiny.score_geneval(images, [prompt]) == pytest.approx([graded])
    assert tiny.score_verdict(images, [prompt]) == [0.0]


def test_a_wrong_letter_costs_a_third():
    prompt = Prompt('a sign that says "CAT"', "text", {}, "")
    images = batch([tiny.draw({"word": word, "color": "red"}) for word in ("CAT", "HAT", "HEX")])
    assert tiny.score_ocr(images, [prompt] * 3) == pytest.approx([1, 2 / 3, 0])


def mixed():
    """Six prompts of three tasks, interleaved, and images that are right, wrong or grainy."""
    prompts = [p for trio in zip(*(tiny.make_prompts(t, "test", 2) for t in tiny.TASKS)) for p in trio]
    images = [perfect(p) for p in prompts]
    images[1], images[3], images[5] = perfect(prompts[4]), perfect(prompts[2]), grainy(images[5], 0)
    return batch(images), prompts


def test_each_prompt_is_scored_by_its_own_tasks_scorer():
    images, prompts = mixed()
    scores = tiny.score_task(images, prompts)
    own = {"composition": tiny.score_geneval, "text": tiny.score_ocr, "quality": tiny.score_quality}
    expected = [own[p.task](images[i : i + 1], [p])[0] for i, p in enumerate(prompts)]
    assert scores == pytest.approx(expected) and len(set(scores)) > 3
    back = tiny.score_task(images.flip(0), prompts[::-1])
    assert back[::-1] == pytest.approx(scores)
    assert tiny.score_task(images[1:2], prompts[1:2]) == pytest.approx(scores[1:2])


def test_a_prompt_of_another_task_has_no_reward_of_its_own_and_no_silent_zero():
    with pytest.raises(rewards.RewardError, match="^mine:1: the task 't2i' has no own reward; name some in --rewards$"):
        tiny.score_task(torch.ones(1, 3, 24, 24), [Prompt("a photo of a circle", "t2i", {}, "mine:1")])


def test_the_distance_of_a_faded_colour_is_to_itself_and_by_hand_for_a_full_one():
    black, white = torch.zeros(3), torch.ones(3)
    palette = {"black": (0.0, 0.0, 0.0), "white": (1.0, 1.0, 1.0)}
    # unfaded black is nearest to white as it fades most, to 1 - 0.5 (1 - 0.62) = 0.81
    np.testing.assert_allclose(tiny.color_distances(black, palette), [0, 3 * 0.81**2], atol=1e-6)
    np.testing.assert_allclose(tiny.color_distances(white, palette), [3 * (1 - 0.31) ** 2, 0], atol=1e-6)
    for i, color in enumerate(tiny.COLORS.values()):
        for share in (0, 0.1, 0.5):
            distances = tiny.color_distances(torch.tensor(color) * (1 - share) + 0.62 * share, tiny.COLORS)
            assert distances[i] < 1e-9 and (distances > 0.01).sum() == 5


def test_purity_by_hand():
    image = torch.zeros(2, 3, 24, 24)
    image[0, :, :12] = 1.0  # half white, half black
    image[1, 0] = 0.3  # 0.3 from black everywhere
    pure = [(0.0, 0.0, 0.0), (1.0, 1.0, 1.0)]
    np.testing.assert_allclose(tiny.purity(image, pure), [1, math.exp(-6 * 0.3)], rtol=1e-5)
    np.testing.assert_allclose(tiny.purity(image, pure[:1]), [math.exp(-6 * 3**0.5 / 2), math.exp(-1.8)], rtol=1e-5)


def test_other_words_are_read_with_another_vocabulary_and_numbers_stay():
    more = [*tiny.VOCABULARY, "make"]
    assert tiny.tokenize("make a circle", more)[:3] == [len(more) - 1, *tiny.tokenize("a circle")[:2]]
    for text in ("make a circle", "A circle"):  # a letter is no word in any vocabulary
        with pytest.raises(ValueError, match=f"no word '{text.split()[0]}'"):
            tiny.tokenize(text, tiny.VOCABULARY if text[0] == "m" else more)


@pytest.mark.parametrize("name", [*tiny.SCORERS, "task"])
def test_every_scorer_of_the_tiny_world_is_a_scorer_like_any_other(name):
    images, prompts = mixed()
    needs = {"ocr": lambda p: p.task == "text", "geneval": lambda p: "include" in p.metadata}.get(name, bool)
    rows = [i for i, p in enumerate(prompts) if needs(p)]
    images, prompts = images[rows], [prompts[i] for i in rows]
    scorer = tiny.scorer(name)
    found = scorer.score(images, prompts, None)
    assert isinstance(scorer, rewards.Scorer) and (scorer.name, scorer.low, scorer.high) == (name, 0.0, 1.0)
    assert found.shape == (len(rows),) and found.dtype == torch.float32 and found.device.type == "cpu"
    own = tiny.score_task if name == "task" else getattr(tiny, f"score_{name}")
    assert found.tolist() == pytest.approx(own(images, prompts)) and len(set(found.tolist())) > 1
    assert torch.equal(scorer.score(images, prompts), found), "sources may be left out"
    assert torch.equal(scorer.score(images, prompts, list(images.flip(0))), found), "and are not looked at"


def test_there_is_no_scorer_of_another_name_and_none_for_a_prompt_without_a_target():
    images, prompts = mixed()
    with pytest.raises(KeyError, match="jpeg"):
        tiny.scorer("jpeg")
    with pytest.raises(ValueError, match="no target text"):
        tiny.scorer("ocr").score(images, prompts)
