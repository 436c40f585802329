"""The world of published models: what an evaluation takes down of a panel's answers."""

import math

import pytest
import torch

from data import written
from data.pictures import sources
from rewards import Scorer
from scorers import world
from scorers.panel import Panel
from tiny import edits


def fixed(name, *answers, high=9.0):
    """A scorer with these answers, whatever it is shown."""
    return Scorer(name, lambda images, prompts, sources: torch.tensor(answers[: len(images)]), 0.0, high)


def test_every_scorer_that_is_asked_is_a_metric_and_a_prompt_without_weights_is_not_scored():
    prompts, images = written.make_prompts("text", "test", 3), torch.rand(4, 3, 16, 16)
    far = Scorer("far", lambda *_: pytest.fail("it counts for other prompts"), 0.0, 1.0)
    weights = {"text": {"a": 0.5, "b": 2.0}, "quality": {"far": 1.0}}
    panel = Panel([fixed("a", 1.0, 2.0, 6.0), fixed("b", 0.0, 1.0, 0.5), far], weights)
    other = written.make_prompts("composition", "test", 1)
    found = world.score(images, [prompts[0], *other, *prompts[1:]], "text", panel)
    assert list(found) == ["a", "b", "far"], "and its answers are told without weights"
    assert str(found["a"].tolist()) == "[1.0, nan, 2.0, 6.0]" and str(found["far"].tolist()) == str([math.nan] * 4)
    assert world.score(images[:1], other, "composition", panel) == {} == world.score(images[:3], prompts, "text", None)


def test_genevals_metric_is_the_verdict_whatever_it_trains_with():
    prompts = written.make_prompts("composition", "test", 3)
    both = fixed("mine", 1.0, 0.6, 0.8)._replace(verdict=fixed("", 1.0, 0.0, 0.0).score)
    panel = Panel([both], {"default": {"mine": 1.0}})
    assert world.score(torch.rand(3, 3, 16, 16), prompts, "composition", panel)["mine"].tolist() == [1, 0, 0]
    assert panel.scorers["mine"] is both, "training goes on with the graded reward"


def test_edits_are_scored_beside_their_sources():
    seen = []
    like = Scorer("like", lambda images, prompts, sources: seen.append(sources) or [0.5] * len(images), 0, 1)
    prompts = edits.make_prompts("edit", "test", 3)
    found = world.score(torch.zeros(3, 3, 8, 8), prompts, "edit", Panel([like], {"edit": {"like": 2.0}}))
    assert found["like"].tolist() == [0.5] * 3
    assert all(map(torch.equal, sum(seen[0], ()), sum(sources(prompts), ())))
