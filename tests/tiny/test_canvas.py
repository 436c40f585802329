"""The tiny pictures: they are read back as they were drawn, in any print, and nothing is read from noise."""

import math
import random

import numpy as np
import pytest
import torch

import rewards
from tiny import canvas as C


def batch(images):
    return torch.from_numpy(np.stack(images))


def scene(*things):
    return {"objects": [{"class": name, "color": color, "cell": cell} for name, color, cell in things]}


def random_scene(rng):
    """One to four objects of any class and colour in any cells."""
    cells = rng.sample([(0, 0), (1, 0), (0, 1), (1, 1)], rng.randint(1, 4))
    return scene(*((rng.choice(C.CLASSES), rng.choice(list(C.COLORS)), cell) for cell in cells))


def contents(scene):
    return sorted((o["class"], o["color"], o["cell"]) for o in scene["objects"])


def seen(found):
    """The same triples as `contents`, from detections: the cell is where the centre of the box lies."""
    cell = lambda box: tuple(int(sum(box[i::2]) / 2) // C.CELL for i in (0, 1))  # noqa: E731
    return sorted((d["class"], d["color"], cell(d["box"])) for d in found)


class Dice(random.Random):
    """A generator whose `random()` is dictated; everything else comes from its seed."""

    def __init__(self, throws, seed):
        super().__init__(seed)
        self.throws = list(throws)

    def random(self):
        return self.throws.pop(0)


def grainy(image, seed):
    return C.spoil(image, Dice([0.0, 0.49], seed))


def faded(image):
    return C.spoil(image, Dice([0.0, 0.51], 0))


@pytest.fixture(scope="module")
def scenes():
    rng = random.Random(1)
    return [random_scene(rng) for _ in range(300)]


@pytest.fixture(scope="module")
def words():
    rng = random.Random(2)
    return [{"word": "".join(rng.choices(C.LETTERS, k=3)), "color": rng.choice(C.INKS)} for _ in range(300)]


def prints(things):
    """{how it was printed: images (B, 3, 24, 24)} of scenes or words."""
    clean = [C.draw(thing) for thing in things]
    spoilt = {"faded": [faded(i) for i in clean], "grainy": [grainy(i, seed) for seed, i in enumerate(clean)]}
    return {name: batch(images) for name, images in ({"clean": clean} | spoilt).items()}


# ---------------------------------------------------------------------------------------------------- drawing
def test_objects_and_letters_are_drawn_where_they_stand():
    expected = np.ones((3, 24, 24), np.float32)  # column 1 begins at x = 12, row 0 at y = 0; one pixel of margin
    expected[:, 1:11, 13:23] = np.array([0.86, 0.08, 0.08], np.float32)[:, None, None]
    np.testing.assert_allclose(C.draw(scene(("square", "red", (1, 0)))), expected, atol=1e-6)
    ink = C.draw({"word": "LET", "color": "black"})[0] < 0.5
    assert not ink[:7].any() and not ink[17:].any()
    for i, letter in enumerate("LET"):
        np.testing.assert_array_equal(ink[7:17, 8 * i : 8 * i + 8], C.letter_masks()[letter] == 1)
    for masks in (C.object_masks(), C.letter_masks()):
        shapes = list(masks.values())
        assert all(np.abs(a - b).sum() >= 5 for i, a in enumerate(shapes) for b in shapes[:i]), "all differ"


def test_a_spoilt_print_is_grain_or_a_blend_with_grey():
    image = C.draw(scene(("circle", "blue", (0, 0))))
    np.testing.assert_allclose(faded(image), image + 0.45 * (0.62 - image), atol=1e-6)
    grain = grainy(np.full((3, 24, 24), 0.5, np.float32), 3) - 0.5
    # standard deviation 0.18 of 1,728 draws (2.8 sd from the clip at 0 and 1): standard error 0.18/sqrt(3456)
    assert abs(grain.std() - 0.18) < 4 * 0.0031 and abs(grain.mean()) < 4 * 0.0044
    assert C.spoil(image, Dice([C.DEFECT_RATE], 0)) is image, "at the rate itself a print is fine"


# -------------------------------------------------------------------------------------------------- detectors
@pytest.mark.parametrize("how, accuracy", [("clean", 1), ("faded", 0.99), ("grainy", 0.97)])
def test_class_colour_cell_and_letters_of_everything_drawn_are_read(scenes, words, how, accuracy):
    found = C.detect(prints(scenes)[how])
    confident = [[d for d in some if d["score"] > rewards.COUNTING_CONFIDENCE] for some in found]
    assert np.mean([seen(some) == contents(one) for some, one in zip(confident, scenes, strict=True)]) >= accuracy
    if how == "clean":
        assert [seen(some) for some in found] == [contents(one) for one in scenes], "and nothing else"
    read = C.read_text(prints(words)[how])
    assert np.mean([text == word["word"] for text, word in zip(read, words, strict=True)]) >= accuracy


def test_a_detection_has_its_exact_box_and_a_word_is_read_on_any_line():
    (found,) = C.detect(batch([C.draw(scene(("cross", "green", (0, 1))))]))
    assert found == [{"class": "cross", "score": 1.0, "box": (1.0, 13.0, 11.0, 23.0), "color": "green"}]
    images = [np.ones((3, 24, 24), np.float32) for _ in range(3)]
    for image, top in zip(images, (0, 5, 14)):
        for i, letter in enumerate("HAT"):
            C.paint(image, C.letter_masks()[letter], 8 * i, top, "purple")
    assert C.read_text(batch(images)) == ["HAT"] * 3


def blanks():
    pages = [(1.0, 1.0, 1.0), (0.5, 0.5, 0.5), *C.COLORS.values()]  # white, grey, and every paint
    return torch.tensor(pages)[:, :, None, None].expand(-1, 3, 24, 24)


def noises():
    rng = torch.Generator().manual_seed(0)
    gauss = (0.5 + 0.3 * torch.randn(100, 3, 24, 24, generator=rng)).clamp(0, 1)
    binary = torch.rand(100, 3, 24, 24, generator=rng).round()
    return torch.cat([torch.rand(100, 3, 24, 24, generator=rng), gauss, binary])


def test_nothing_is_seen_or_read_on_blank_pages_and_in_noise():
    assert C.detect(blanks()) == [[]] * 8 and C.read_text(blanks()) == [""] * 8
    found = [d for some in C.detect(noises()) for d in some if d["score"] > rewards.CONFIDENCE]
    assert len(found) <= 1 and sum(map(len, C.read_text(noises()))) <= 3, "of 300 images"
    faint = 0.9 + 0.1 * torch.from_numpy(C.draw(scene(("square", "black", (0, 0)))))[None]
    assert C.detect(faint) == [[]], "a tenth of the contrast is no shape"
    assert C.quality(blanks()).max() < 1e-6 and C.quality(noises()).max() < 0.2


def test_quality_is_one_for_clean_prints_and_falls_with_the_strength_of_each_fault(scenes, words):
    for things in (scenes, words):
        quality = {how: C.quality(images) for how, images in prints(things).items()}
        torch.testing.assert_close(quality["clean"], torch.ones(300), atol=1e-3, rtol=0)
        assert max(quality["grainy"].max(), quality["faded"].max()) < 0.7
        assert min(quality["grainy"].min(), quality["faded"].min()) > 0.02, "worse, but not hopeless"
    clean = prints(scenes)["clean"][:50]
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(4))
    fades = torch.stack([C.quality(clean + a * (0.62 - clean)) for a in (0.0, 0.1, 0.2, 0.3, 0.45)])
    grains = torch.stack([C.quality((clean + a * noise).clamp(0, 1)) for a in (0.0, 0.05, 0.1, 0.18, 0.3)])
    assert (fades.diff(dim=0) < 0).all() and (grains.diff(dim=0) < 0).all()


def test_quality_by_hand():
    def page(inked):  # `inked` black pixels on white paper: no distance from the pure colours
        return (torch.arange(576) >= inked).float().reshape(1, 1, 24, 24).expand(1, 3, 24, 24)

    # The gate is open between 4 and 70 % of ink. 10/576 = 1.74 % of 4 %: 0.4340; 547/576 leaves 5.03 % of 30 %: 0.1678
    for inked, gate in ((0, 0), (10, 0.43403), (24, 1), (400, 1), (547, 0.16782), (576, 0)):
        assert C.quality(page(inked)).item() == pytest.approx(gate, abs=1e-4), inked
    image, pure = torch.zeros(2, 3, 24, 24), [(0.0, 0.0, 0.0), (1.0, 1.0, 1.0)]
    image[0, :, :12] = 1.0  # half white, half black
    image[1, 0] = 0.3  # 0.3 from black everywhere
    np.testing.assert_allclose(C.purity(image, pure), [1, math.exp(-6 * 0.3)], rtol=1e-5)
    np.testing.assert_allclose(C.purity(image, pure[:1]), [math.exp(-6 * 3**0.5 / 2), math.exp(-1.8)], rtol=1e-5)


def test_every_image_of_a_batch_is_read_alone_and_alike_in_half_precision(scenes, words):
    images = torch.cat([prints(scenes)["grainy"][:3], prints(words)["grainy"][:2]])
    other = images.clone()
    other[1] = images[4]
    for read in (C.detect, C.read_text, lambda x: C.quality(x).tolist()):
        before, after = read(images), read(other)
        assert [i for i in range(5) if before[i] != after[i]] == [1]
    clean = prints(scenes)["clean"][:20]
    assert [seen(f) for f in C.detect(clean.bfloat16())] == [contents(one) for one in scenes[:20]]
    assert C.quality(clean.bfloat16()).dtype == torch.float32


# -------------------------------------------------------------------------------------------- the identity network
def thing(name="circle", color="red", paper="white", cell=(0, 0)):
    return torch.from_numpy(C.draw({"objects": [{"class": name, "color": color, "cell": cell}], "paper": paper}))


def test_the_embedding_by_hand():
    """A red circle on white: the choices are soft, exp(-20 d) and exp(20 fit), hence not quite 0 and 1."""
    found = C.embedding(thing(), C.BOXES[0])
    assert found.shape == (11,) and np.linalg.norm(found) == pytest.approx(math.sqrt(2))
    assert found[:6].argmax() == list(C.COLORS).index("red") and found[6:].argmax() == C.CLASSES.index("circle")
    masks = [np.pad(m, 1).flatten() for m in C.object_masks().values()]
    shape = np.exp(20 * (np.array([*np.corrcoef(masks)[0], 0.5]) - 1))
    np.testing.assert_allclose(found[6:], shape / np.linalg.norm(shape), rtol=1e-3, atol=1e-7)
    letters = C.embedding(torch.from_numpy(C.draw({"word": "CAT", "color": "blue"})), C.WORD_BOX)
    assert letters[:6].argmax() == 2 and letters[6:] == pytest.approx([0, 0, 0, 0, 1], abs=1e-3)
    paint = torch.ones(3, 24, 24)
    paint[:, :12, :12] = torch.tensor(C.COLORS["red"])[:, None, None]  # it does not vary: a correlation would be 0/0
    found = C.embedding(paint, C.BOXES[0])
    assert np.isfinite(found).all() and found[6:].argmax() == 4, "of no shape"


@pytest.mark.parametrize("paper", C.PAPERS)
def test_a_thing_is_itself_on_any_paper_in_any_print_and_nothing_else(paper):
    same, other = [], []
    reference = {(n, c): C.embedding(thing(n, c), C.BOXES[0]) for n in C.CLASSES for c in C.COLORS}
    for name, color in reference:
        picture = thing(name, color, paper)
        for seen_as in (picture, faded(picture)):
            found = C.embedding(seen_as, C.BOXES[0])
            for key, one in reference.items():
                (same if key == (name, color) else other).append(rewards.similarity(found, one, C.STRANGER))
        assert not C.embedding(picture, C.BOXES[1]).any(), "the next cell is empty"
    assert min(same) > 0.95 and max(other) < 0.05
