"""Oracles for measures that need no judge, by hand: distances within a prompt, and what an edit left as it was."""

import pytest
import torch

from rewards import RewardError
from scorers.measures import diversity, untouched
from tests.helpers.clip import pictures, prompt, save_clip


def flat(*values):
    return torch.tensor(values, dtype=torch.float32)[:, None, None, None].expand(len(values), 3, 4, 6)


def test_diversity_compares_the_pictures_of_a_prompt_only_wherever_they_lie():
    """Pixels 0, 1, 1/2 of one prompt: distances 1, 1/2, 1/2. Two alike of another."""
    images, a, b = flat(0, 0.3, 1, 0.3, 0.5), prompt("a"), prompt("b")
    scores = diversity(model="").score(images, [a, b, a, b, a])
    assert scores.tolist() == pytest.approx([2 / 3, 0, 2 / 3, 0, 2 / 3], abs=1e-6)
    with pytest.raises(RewardError, match="one picture"):
        diversity(model="").score(images[:2], [a, b])


def test_published_pictures_are_compared_by_clips_features(tmp_path):
    from scorers.clip import clip_features
    from scorers.common import pixels_of

    model, images = str(save_clip(tmp_path)), pictures(3)
    seen = clip_features("x", model, "", "cpu", torch.float32)[0](pixels_of(images))
    gaps = [(seen[i] - seen[j]).square().mean().sqrt().item() for i, j in ((0, 1), (0, 2), (1, 2))]
    scores = diversity(model=model, batch=2).score(images, [prompt("a")] * 3)
    assert scores.tolist() == pytest.approx([sum(gaps) / 3] * 3, rel=1e-4) and gaps[0] > 0


def test_untouched_is_the_mean_difference_inside_of_the_kept_boxes():
    """Of 4 x 6 pixels two columns are kept, and one of them has changed by 0.4 in one of three colours."""
    source, result = flat(0.2)[0], flat(0.2)[0].clone()
    result[1, :, 2] += 0.4
    result[:, :, 4:] = 1.0
    kept = prompt("x", keep=[[1, 0, 3, 4]])
    assert untouched().score(result[None], [kept], [(source,)]).item() == pytest.approx(1 - 0.4 / 6, abs=2e-3)
    assert untouched().score(source[None], [kept], [(source,)]).item() == 1
    larger = source.repeat_interleave(2, 1).repeat_interleave(2, 2)
    twice = prompt("x", keep=[[2, 0, 6, 8]])
    assert untouched().score(result[None], [twice], [(larger,)]).item() == pytest.approx(1 - 0.4 / 6, abs=2e-3)
    for wrong, sources in ((kept, None), (prompt("x"), [(source,)])):
        with pytest.raises(RewardError, match="keep"):
            untouched().score(result[None], [wrong], sources)
