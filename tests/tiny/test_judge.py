"""The tiny world's reward model: what it learns from, and that it sees the whole picture and the whole prompt."""

import random

import numpy as np
import pytest
import torch

from rewards import RewardError
from tests.helpers.runs import same
from tiny import drawings
from tiny import judge as J


@pytest.fixture(scope="module")
def items():
    return {objective: J.marked_prints(240, objective, 3, 0.2) for objective in ("pointwise", "pairwise")}


def test_both_objectives_learn_from_the_same_pictures_and_are_measured_on_the_same_others(items):
    (samples, held), (pairs, held_pairs) = items["pointwise"], items["pairwise"]
    pictures = {s.image.numpy().tobytes() for s in samples}
    assert pictures == {image.numpy().tobytes() for p in pairs for image in (p.winner, p.loser)}
    assert len(samples) == 2 * len(pairs) and len(samples) + len(held) == 480
    assert pictures.isdisjoint(s.image.numpy().tobytes() for s in J.marked_prints(24, "pointwise", 4, 0.2)[0]), "seed"
    assert all(torch.equal(a.image, b.image) and a[1:] == b[1:] for a, b in zip(held, held_pairs, strict=True))
    assert not {s.prompt for s in samples} & {s.prompt for s in held}
    assert all(not drawings.in_test_split("quality", s.prompt) for s in samples if "beautiful" in s.prompt)


def test_the_annotator_errs_a_little_on_a_scale_that_is_all_used(items):
    (samples, held), (pairs, _) = items["pointwise"], items["pairwise"]
    assert {s.score for s in samples} == {1.0, 2.0, 3.0, 4.0, 5.0}
    error = torch.tensor([s.score for s in samples]) - 1 - 4 * drawings.quality(torch.stack([s.image for s in samples]))
    assert 0.2 < error.std() < 0.5, "0.25 of error and the rounding's 0.29"
    true = 1 + 4 * drawings.quality(torch.stack([s.image for s in held]))
    torch.testing.assert_close(torch.tensor([s.score for s in held]), true)
    winner, loser = (drawings.quality(torch.stack(some)) for some in zip(*(p[:2] for p in pairs), strict=True))
    gap = winner - loser
    assert 0.85 < (gap > 0).float().mean() < 1, "mostly the better one, not always"
    assert (gap[gap.abs() > 0.25] > 0).all(), "an error of four standard deviations is none of these"


@pytest.mark.parametrize("fault", ["grain", "fade", "blur", "tint"])
def test_every_printing_fault_lowers_the_quality_and_stays_in_range(monkeypatch, fault):
    clean = drawings.draw({"objects": [{"class": "circle", "color": "red", "cell": (0, 0)}]})
    monkeypatch.setattr(J, "FAULTS", ((fault,),))
    rng = random.Random(0)
    found = torch.from_numpy(np.stack([J.print_fault(clean, rng) for _ in range(20)]))
    quality = drawings.quality(found)
    assert found.dtype == torch.float32 and found.min() >= 0 and found.max() <= 1
    assert quality.max() < 1 and quality.min() < 0.7 and quality.std() > 0.05, "of many strengths"


@torch.no_grad()
def test_the_judge_reads_picture_and_prompt_row_by_row():
    judge, images = J.TinyJudge(width=16, layers=1, seed=1), torch.rand(3, 3, 24, 24)
    prompts = ["a photo of two circles", 'a sign that says "CAT"', "a photo of a red cross"]
    scores = judge.scores(images, prompts)
    assert scores.shape == (3,) and ((scores > 1) & (scores < 5)).all()
    one_picture, one_prompt = images.clone(), [*prompts[:2], "a photo of a blue cross"]
    one_picture[2] = 1 - one_picture[2]
    for other in (judge.scores(one_picture, prompts), judge.scores(images, one_prompt)):
        assert torch.equal(other[:2], scores[:2]) and other[2] != scores[2]
    assert torch.equal(judge.scores(list(images), prompts), scores), "a list of pictures will do"
    pixel = images.clone()
    pixel[0, 1, 23, 23] += 0.5
    assert judge.scores(pixel, prompts)[0] != scores[0], "it sees the last corner"
    with pytest.raises(RewardError, match="a dragon"):
        judge.scores(images, [*prompts[:2], "a dragon"])
    with pytest.raises(RewardError, match="32"):
        judge.scores(torch.rand(3, 3, 32, 32), prompts)


def test_the_judge_starts_from_its_seed_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    a, b, c = (J.TinyJudge(16, 1, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected)
    assert same(dict(a.state_dict()), dict(b.state_dict())) and not torch.equal(a.place, c.place)
