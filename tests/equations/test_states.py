"""Are drawn states, weighed by 1 / p_n, the mean over all states? And is the draw the best one?"""

import pytest
import torch

import opd
from tests.helpers import linear_gaussian as flow

P = torch.tensor([0.05, 0.4, 0.15, 0.3, 0.1], dtype=torch.float64)  # S = 5


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_weights_average_to_one_over_s_at_every_state(count):
    """By the integral over u: the weights are steps of u, so a fine grid is exact up to its width."""
    u = (torch.arange(20_000) + 0.5) / 20_000
    weights = opd.state_weights(P, count, u)
    assert weights.shape == (5, 20_000)
    torch.testing.assert_close(weights.double().mean(1), torch.full((5,), 0.2, dtype=torch.float64), rtol=1e-3, atol=0)
    drawn = (weights * count * 5 * P[:, None]).round()
    assert (drawn.sum(0) == count).all(), "every row learns from `count` states, counted with their repeats"
    for n, p in enumerate(P.tolist()):
        assert set(drawn[n].tolist()) <= {float(int(count * p)), float(int(count * p) + 1)}, "systematic: no clumps"


def test_a_draw_by_hand():
    """Cumulated p is .05 .45 .6 .9 1; u = 0.5 and two draws: places .25 and .75, states 1 and 3."""
    weights = opd.state_weights(P, 2, torch.tensor([0.5, 0.0]))
    assert weights[:, 0].tolist() == pytest.approx([0, 1 / (2 * 5 * 0.4), 0, 1 / (2 * 5 * 0.3), 0])
    assert weights[:, 1].tolist() == pytest.approx([1 / (2 * 5 * 0.05), 0, 1 / (2 * 5 * 0.15), 0, 0])  # .0 and .5
    with pytest.raises(ValueError):
        opd.state_weights(P, 0, torch.zeros(1))


def test_probabilities_follow_the_sizes_down_to_a_floor():
    size = torch.tensor([1.0, 3.0, 4.0])
    expected = [0.9 / 8 + 0.1 / 3, 2.7 / 8 + 0.1 / 3, 3.6 / 8 + 0.1 / 3]
    for scale in (1, 7):
        assert opd.state_probabilities(scale * size).tolist() == pytest.approx(expected)
    assert opd.state_probabilities(size, 0.0).tolist() == pytest.approx([0.125, 0.375, 0.5])
    unknown = opd.state_probabilities(torch.tensor([2.0, 0.0, 4.0]), 0.0)
    assert unknown.tolist() == pytest.approx([2 / 9, 3 / 9, 4 / 9]), "one that is not known counts as the mean"
    assert opd.state_probabilities(torch.zeros(3)).tolist() == pytest.approx([1 / 3] * 3)


def test_sizes_are_a_running_root_mean_square_of_the_gradient():
    size, total, count = torch.tensor([0.5, 0.0, 3.0]), torch.tensor([54.0, 4.0, 0.0]), torch.tensor([6.0, 1.0, 0.0])
    found = opd.running_size(size, total, count)  # .9 .25 + .1 9; 4 / 1; as it was
    assert found.tolist() == pytest.approx([1.125**0.5, 2.0, 3.0])
    assert opd.running_size(size, 2 * total, count, 0.5).tolist() == pytest.approx([9.125**0.5, 8**0.5, 3.0])
    (at,) = flow.walk(5, torch.Generator().manual_seed(2), start=2, stop=3)
    v = (at.v_target + 0.3 * at.step.x).requires_grad_()
    (by_v,) = torch.autograd.grad(opd.kl_t(at, v).sum(), v)
    by_hand = by_v.square().sum(1) * flow.DIMS / 4
    torch.testing.assert_close(opd.state_size_sq(at, v), by_hand)


def gradients(weights_SB, per_state_SBM):
    return (weights_SB.double()[:, :, None] * per_state_SBM).sum(0)  # (B, M)


def test_on_the_linear_gaussian_flow_the_mean_is_kept_and_the_best_p_has_least_variance():
    """`analytic` on the flow whose gradients are known: drawn states have the mean gradient of all of them.

    Planted: without the weights the mean is another. The variance with p_n by size is below that of equal p_n, as
    Cauchy-Schwarz says; a p that is turned round is worse than both.
    """
    walk = flow.walk(20_000, torch.Generator().manual_seed(0))
    per_state = torch.stack([flow.trajectory_gradients([at], "analytic") for at in walk])  # (S, B, 2D)
    S, B, _ = per_state.shape
    whole = per_state.mean(0)  # (B, 2D), each row's mean over all states
    size = per_state.square().sum(2).mean(1).sqrt()
    best = opd.state_probabilities(size, floor=0.01)
    u = torch.rand(B, generator=torch.Generator().manual_seed(1))

    def moments(p, count=1):
        drawn = gradients(opd.state_weights(p, count, u), per_state)
        gap = drawn - whole
        return flow.distance(gap, torch.zeros_like(gap[0])), float(drawn.var(0).sum())

    even = torch.full((S,), 1 / S, dtype=torch.float64)
    turned = opd.state_probabilities(1 / size, floor=0.01)
    for p in (best, even, turned):
        for count in (1, 2, 3):
            assert moments(p, count)[0] < 40, "chi-squared with 16 degrees of freedom: 1 in 1,000 is above 39"
    assert moments(best)[1] < 0.9 * moments(even)[1] < 0.9 * moments(turned)[1]
    unweighted = gradients((opd.state_weights(best, 1, u) > 0).float(), per_state)
    gap = unweighted - whole
    assert flow.distance(gap, torch.zeros_like(gap[0])) > 400
