"""Oracles for the arena: who meets whom, in both orders, and what a vote is worth."""

import numpy as np
import pytest
import torch

from data.pictures import to_picture
from harness import arena
from rewards import Scorer


def row(model, index, score, sample=0, task="text", category="c"):
    return {"model": model, "prompt": f"p{index}", "index": index, "sample": sample, "task": task,
            "category": category, "picture": f"{model}-{index}.png", "sources": [], "scores": {"x": score}}  # fmt: skip


def test_every_pair_meets_twice_over_each_picture_and_the_rules_vote_alike_in_both_orders(tmp_path):
    rows = [row(model, i, s) for model, own in (("a", (1, 0)), ("b", (0, 0)), ("c", (1, 1))) for i, s in enumerate(own)]
    votes = arena.vote(rows, tmp_path, None)
    assert len(votes) == 2 * 2 * 3
    models, wins, categories = arena.wins(votes)
    assert models == ["a", "b", "c"] and categories == ["c", "c"]
    # Prompt 0: a beats b, a and c tie, c beats b. Prompt 1: a and b tie, c beats both. Each twice.
    assert wins.tolist() == [[[0, 2, 1], [0, 0, 0], [1, 2, 0]], [[0, 1, 0], [1, 0, 0], [2, 2, 0]]]


@pytest.fixture
def shown(tmp_path):
    """Rows of two models, whose pictures are of one grey each: a's 0.2, b's 0.8."""
    for name, grey in (("a", 0.2), ("b", 0.8)):
        to_picture(torch.full((3, 8, 8), grey)).save(tmp_path / f"{name}-0.png")
    return [row("a", 0, 0.0), row("b", 0, 0.0)]


def judge(prefers):
    """A judge whose expected rating / 5 is a function of (first, second), as rubric `arena` has it."""

    def score(images, prompts, firsts):
        return torch.tensor([prefers(a.mean().item(), b.mean().item()) for (a,), b in zip(firsts, images, strict=True)])

    return Scorer("arena", score, 0.2, 1.0)


def test_a_judge_sees_both_pictures_in_both_orders_and_one_that_likes_what_is_first_decides_nothing(shown, tmp_path):
    brighter = judge(lambda first, second: 0.9 if first > second else 0.3)  # 4.5 and 1.5 of 5
    votes = arena.vote(shown, tmp_path, brighter)
    assert [(v["order"], v["winner"]) for v in votes] == [(0, "b"), (1, "b")]
    _, wins, _ = arena.wins(arena.vote(shown, tmp_path, judge(lambda first, second: 1.0)))
    assert np.array_equal(wins[0], [[0, 1], [1, 0]])
    unsure = arena.vote(shown, tmp_path, judge(lambda first, second: 0.69 if first > second else 0.51))
    assert [v["winner"] for v in unsure] == ["tie", "tie"], "half a rating from the middle, 3, decides"
