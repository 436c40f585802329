"""harness/compare.py: intervals against theory, Bradley-Terry by hand and at its slope."""

import math

import numpy as np
import pytest

from harness import compare


# -------------------------------------------------------------------------------------------------------- intervals
def test_an_interval_of_a_mean_is_the_central_limit_theorems_and_is_drawn_alike_every_time():
    mean_P = np.random.default_rng(3).normal(0.5, 0.2, 400)
    again, found = (compare.bootstrap(lambda index: mean_P[index].mean(), 400) for _ in range(2))
    middle, half = mean_P.mean(), 1.96 * mean_P.std(ddof=1) / math.sqrt(400)
    assert found == again and found[0] == pytest.approx(middle)
    assert found[1:] == pytest.approx((middle - half, middle + half), abs=0.15 * half)


def test_strata_are_drawn_from_themselves():
    """GenEval's mean over tags: if every tag is alike in itself, nothing is left to chance, however few its prompts."""
    tags, verdicts = np.array(["one", "two", "one", "one"]), np.array([1.0, 0.0, 1.0, 1.0])
    score = lambda index: np.mean([verdicts[index][tags[index] == tag].mean() for tag in set(tags[index])])  # noqa: E731
    assert [float(x) for x in compare.bootstrap(score, 4, tags)] == [0.5, 0.5, 0.5]
    assert compare.bootstrap(score, 4)[2] > 0.5, "without them a tag may be missing"


# ------------------------------------------------------------------------------------------------------------ arena
WEAK = 1e-7  # a prior that leaves the likelihood alone


def gaps(wins, prior):
    theta = compare.bradley_terry(np.array(wins, float), prior)
    assert theta.sum() == pytest.approx(0, abs=1e-9)
    return theta - theta[0]


def test_two_players_by_hand():
    # 3 : 1, P = 3/4: a gap of log 3. A prior of k drawn games of each with an average player: by symmetry theta is
    # +-t, and the slope 4 (3/4 - s(2t)) + k (1/2 - s(t)) is 0.
    assert gaps([[0, 3], [1, 0]], WEAK) == pytest.approx([0, -math.log(3)])
    assert gaps([[5, 3], [1, 9]], WEAK) == pytest.approx([0, -math.log(3)]), "nobody plays against himself"
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    t = -gaps([[0, 3], [1, 0]], 2.0)[1] / 2
    assert 4 * (0.75 - sigmoid(2 * t)) + 2 * (0.5 - sigmoid(t)) == pytest.approx(0, abs=1e-9)
    assert 0 < t < math.log(3) / 2
    assert gaps([[0, 2.5], [2.5, 0]], 1.0) == pytest.approx([0, 0]), "ties are half a win of both"


def test_three_players_by_hand():
    # Strengths 1, 2, 4: P(b beats a) = 2/3, P(c beats a) = 4/5, P(c beats b) = 2/3; wins are their exact shares.
    wins = [[0, 4, 3], [8, 0, 2], [12, 4, 0]]
    assert gaps(wins, WEAK) == pytest.approx([0, math.log(2), math.log(4)])
    # A chain: a and c never met, and their gap is the sum of the two that did.
    assert gaps([[0, 4, 0], [8, 0, 2], [0, 6, 0]], WEAK) == pytest.approx([0, math.log(2), math.log(6)])


@pytest.mark.parametrize("wins", [
    [[0, 50, 40], [0, 0, 5], [0, 5, 0]],  # one wins always
    [[0, 5, 0, 0], [5, 0, 0, 0], [0, 0, 0, 3], [0, 0, 1, 0]],  # two pairs that nobody compared
    [[0, 0], [0, 0]],  # no vote at all
    [[0, 10**7, 0], [0, 0, 10**7], [1, 0, 0]],  # far apart
])  # fmt: skip
def test_with_the_prior_every_arena_has_a_finite_answer_at_which_the_slope_vanishes(wins):
    wins = np.array(wins, float)
    theta = compare.bradley_terry(wins)
    shift = np.linspace(-3, 3, 60001)  # the mean is taken out: find where it was
    slope = lambda t: (wins - (wins + wins.T) / (1 + np.exp(t[None] - t[:, None]))).sum(1) + 0.5 - 1 / (1 + np.exp(-t))  # noqa: E731
    total = np.array([(0.5 - 1 / (1 + np.exp(-theta - c))).sum() for c in shift])
    assert np.isfinite(theta).all()
    assert abs(slope(theta + shift[abs(total).argmin()])).max() < 1e-3


def test_elo_is_400_points_a_factor_of_ten_and_a_category_has_votes_of_its_own():
    wins = np.zeros((40, 2, 2))
    wins[:, 0, 1], wins[:, 1, 0] = 10, 1  # strengths 10 : 1 in every prompt
    wins[30:] = wins[30:].transpose(0, 2, 1)  # but in the last ten
    found = compare.elo(wins * 1e6, ["rl", "base"], ["3D"] * 30 + ["photo"] * 10)
    assert list(found["rl"]) == ["overall", "3D", "photo"] and [c.n for c in found["rl"].values()] == [40, 30, 10]
    assert found["rl"]["3D"].value - found["base"]["3D"].value == pytest.approx(400, abs=0.01)
    assert found["rl"]["3D"].value + found["base"]["3D"].value == pytest.approx(2000)
    assert found["rl"]["photo"].value == pytest.approx(800, abs=0.01) and found["rl"]["photo"].high < 801
    overall = found["rl"]["overall"]  # 31 : 13 + 1/30 ... by hand: (30*10 + 10*1) : (30*1 + 10*10)
    assert overall.value - 1000 == pytest.approx(200 * math.log10(310 / 130), abs=0.01)
    assert overall.low < overall.value - 20 and overall.value + 20 < overall.high, "which prompts are drawn matters"
