"""The world of published models: what an evaluation counts of a panel's answers, and F Table 2's average."""

import math

import numpy as np
import pytest
import torch

from data import written
from data.pictures import sources
from rewards import Scorer
from scorers import common, world
from scorers.panel import Panel
from tiny import edits


def fixed(name, *answers, high=9.0):
    """A scorer with these answers, whatever it is shown."""
    return Scorer(name, lambda images, prompts, sources: torch.tensor(answers[: len(images)]), 0.0, high)


def test_every_scorer_that_is_asked_has_a_column_and_a_weight_in_the_sum():
    prompts, images = written.make_prompts("text", "test", 3), torch.rand(3, 3, 16, 16)
    far = Scorer("far", lambda *_: pytest.fail("it counts for other prompts"), 0.0, 1.0)
    weights = {"text": {"a": 0.5, "b": 2.0}, "quality": {"far": 1.0}}
    panel = Panel([fixed("a", 1.0, 2.0, 6.0), fixed("b", 0.0, 1.0, 0.5), far], weights)
    named, each, tags = world.score(images, prompts, "text", panel)
    assert named == {"text a": 3, "text b": 0.5} and tags == {}, "columns show rewards without weights"
    assert each == [0.5, 3.0, 4.0]
    others = written.make_prompts("composition", "test", 3)
    assert world.score(images, others, "composition", panel) == ({}, [], {}), "no weights: no scores"
    assert world.score(images, prompts, "text", None) == ({}, [], {})


def test_genevals_column_is_the_mean_over_tags_of_verdicts_whatever_it_trains_with():
    """Three pictures, of which the first is right, by hand: 1/2 over tags; 1/3 over pictures, 0.8 of graded rewards."""
    prompts = written.make_prompts("composition", "test", 3)
    prompts = [p._replace(metadata={**p.metadata, "tag": tag}) for p, tag in zip(prompts, "abb", strict=True)]
    verdicts = fixed("geneval", 1.0, 0.0, 0.0)
    both = fixed("mine", 1.0, 0.6, 0.8)._replace(verdict=verdicts.score)
    far = fixed("geneval", 1.0, 0.6, 0.8)  # of which nothing but its answers is known
    tags = {"a": 1.0, "b": 0.0}
    for scorer, column, by_tag in (
        (both, {"mine": 0.5}, tags), (verdicts, {"geneval": 0.5}, tags), (far, {"geneval (graded)": 0.8}, {})
    ):  # fmt: skip
        panel = Panel([scorer], {"default": {scorer.name: 1.0}})
        named, each, found = world.score(torch.rand(3, 3, 16, 16), prompts, "composition", panel)
        assert named == {f"composition {name}": pytest.approx(value) for name, value in column.items()}
        assert found == by_tag and each == ([1.0, 0.0, 0.0] if by_tag else pytest.approx([1.0, 0.6, 0.8]))
        assert panel.scorers[scorer.name] is scorer, "training goes on with the graded reward"


def test_edits_are_scored_beside_their_sources():
    seen = []
    like = Scorer("like", lambda images, prompts, sources: seen.append(sources) or [0.5] * len(images), 0, 1)
    prompts = edits.make_prompts("edit", "test", 3)
    named, each, _ = world.score(torch.zeros(3, 3, 8, 8), prompts, "edit", Panel([like], {"edit": {"like": 2.0}}))
    assert named == {"edit like": 0.5} and each == [1.0] * 3
    assert all(map(torch.equal, sum(seen[0], ()), sum(sources(prompts), ())))


def test_the_four_metrics_of_table_2_have_their_average():
    """F's row Ours (Merge): GenEval 0.92, OCR 0.94, DeQA 4.35, PickScore 23.08, Avg 0.9044."""
    scores = {"composition geneval": 0.92, "text ocr": 0.94, "quality deqa": 4.35 / 5, "quality pickscore": 23.08 / 26}
    assert world.average(scores | {"text jpeg": 3.0}) == {"Avg": pytest.approx(0.9044, abs=5e-5)}
    for column in scores:
        assert world.average({name: scores[name] for name in scores if name != column}) == {}, "graded GenEval is none"


def test_diversity_is_the_mean_distance_of_pairs_and_zero_for_a_collapsed_mode():
    x = np.array([[0.0, 0.0], [0.6, 0.8], [0.0, 0.0]])  # distances 1, 0, 1 over sqrt(2)
    assert common.diversity(x) == pytest.approx(2 / 3 / math.sqrt(2))
    assert common.diversity(np.full((4, 3, 2, 2), 0.3)) == 0
    rng = np.random.default_rng(2)  # two independent numbers of variance s^2 are sqrt(2) s apart, in the quadratic mean
    assert common.diversity(rng.normal(0, 0.1, (6, 3, 40, 40))) == pytest.approx(0.1 * math.sqrt(2), rel=0.01)
    with pytest.raises(ValueError):
        common.diversity(x[:1])
