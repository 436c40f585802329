"""Does the forward-process loss of nft.py pull the velocity towards good images and away from bad ones?

Proven here: numbers worked by hand, the expanded form as a second route, plain flow matching as a limit, the closed
form of the gradient and of the minimiser, and a model that moves towards the reward by as much as the theory says.
"""

import pytest
import torch

import grpo
import kl
import nft


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch(B=3, D=(2, 5)):
    """v, v_old, v_target of shape (3, 2, 5) and r (3,) on both sides of 1/2."""
    return randn(B, *D), randn(B, *D, seed=1), randn(B, *D, seed=2), torch.tensor([0.1, 0.5, 0.8]).double()


def test_optimality_by_hand():
    # A_max = 5: -7 -> -5 -> 0; -2.5 -> -0.25 + 0.5; 0 -> 0.5; 1 -> 0.1 + 0.5; 9 -> 5 -> 1.
    advantage = torch.tensor([-7.0, -2.5, 0.0, 1.0, 9.0], requires_grad=True)
    torch.testing.assert_close(nft.optimality(advantage, 5.0), torch.tensor([0.0, 0.25, 0.5, 0.6, 1.0]))
    torch.testing.assert_close(nft.optimality(advantage, 0.5), torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]))
    assert not nft.optimality(advantage, 5.0).requires_grad
    with pytest.raises(ValueError):
        nft.optimality(advantage, 0.0)


# --------------------------------------------------------------------------------------------------- the loss
def test_nft_loss_by_hand():
    # beta 0.5, v = (3, 1), v_old = (1, 0), target = (2, 2), r = 0.75:
    # v+ = 0.5 (3, 1) + 0.5 (1, 0) = (2, 0.5), ||v+ - v*||^2 = 0 + 2.25
    # v- = 1.5 (1, 0) - 0.5 (3, 1) = (0, -0.5), ||v- - v*||^2 = 4 + 6.25
    # 0.75 * 2.25 + 0.25 * 10.25 = 4.25; divided by D = 2: 2.125
    v, old, target, r = (torch.tensor(x) for x in ([[3.0, 1.0]], [[1.0, 0.0]], [[2.0, 2.0]], [0.75]))
    assert nft.nft_loss(v, old, target, r, 0.5).tolist() == [4.25]
    assert nft.nft_loss(v, old, target, r, 0.5, reduce="mean").tolist() == [2.125]


@pytest.mark.parametrize("beta", [0.1, 1.0, 2.5])
def test_loss_equals_its_expanded_form(beta):
    # Independent route: ||e||^2 + 2 beta (2r-1) <d, e> + beta^2 ||d||^2, d = v - v_old, e = v_old - v*.
    v, old, target, r = batch()
    d, e = (v - old).flatten(1), (old - target).flatten(1)
    expected = (e * e).sum(1) + 2 * beta * (2 * r - 1) * (d * e).sum(1) + beta**2 * (d * d).sum(1)
    torch.testing.assert_close(nft.nft_loss(v, old, target, r, beta), expected)


def test_good_images_at_beta_one_are_plain_flow_matching_and_bad_ones_its_mirror_image():
    v, old, target, r = batch()
    good = torch.ones(3).double()
    loss = nft.nft_loss(v, old, target, good, 1.0)
    torch.testing.assert_close(loss, (v - target).square().sum((1, 2)))
    torch.testing.assert_close(loss, nft.nft_loss(v, old + 1, target, good, 1.0))  # the old policy plays no part
    mirrored = 2 * old - v
    torch.testing.assert_close(nft.nft_loss(v, old, target, 1 - r, 0.7), nft.nft_loss(mirrored, old, target, r, 0.7))


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_gradient_at_the_old_policy_pulls_towards_good_and_pushes_away_from_bad(beta):
    # grad = 2 beta (2r-1) (v_old - v*): a descent step moves along (2r-1) (v* - v_old).
    _, old, target, _ = batch()
    r, v = torch.tensor([0.0, 0.5, 1.0]).double(), old.clone().requires_grad_()
    nft.nft_loss(v, old, target, r, beta).sum().backward()
    torch.testing.assert_close(v.grad, 2 * beta * (2 * r - 1)[:, None, None] * (old - target))
    towards_target = (-v.grad * (target - old)).sum((1, 2))
    assert towards_target[0] < 0 and towards_target[1].abs() < 1e-12 and towards_target[2] > 0
    # Planted bug: a negative branch that adds beta v instead of subtracting it pulls towards bad images too.
    v.grad = None
    wrong_minus = (1 - beta) * old + beta * v
    ((1 - r)[:, None, None] * (wrong_minus - target).square()).sum().backward()
    assert (-v.grad * (target - old)).sum((1, 2))[0] > 0


@pytest.mark.parametrize("beta, best", [(1.0, 0.5), (0.5, -1.0)])
def test_closed_form_minimiser_of_a_two_sample_expectation(beta, best):
    # One x_t from which two images came, targets 0 (r = 1, good) and 4 (r = 0.25, poor), old velocity 2.
    # argmin = 2 + 1/beta * mean[(2-1)(0-2), (0.5-1)(4-2)] = 2 + 1/beta * (-2 - 1)/2 = 2 - 1.5/beta.
    target, r, old = torch.tensor([[0.0], [4.0]]), torch.tensor([1.0, 0.25]), torch.full((2, 1), 2.0)
    v = torch.tensor([best], requires_grad=True)
    expectation = nft.nft_loss(v.expand(2, 1), old, target, r, beta).mean()
    assert torch.autograd.grad(expectation, v)[0].item() == pytest.approx(0.0, abs=1e-6)
    for other in (best - 0.1, best + 0.1):
        assert nft.nft_loss(torch.full((2, 1), other), old, target, r, beta).mean() > expectation


def test_training_on_nft_moves_samples_towards_the_reward():
    # Velocity model at t = 1 (x_t = eps, independent of x_0): v = eps - m, one parameter m, images x_0 = m_old + z.
    # The minimiser moves m to m_old + 1/beta * E[(2r-1) z]; with reward x_0 that covariance is positive:
    # 2r - 1 = clip(A)/5, A = (x0 - mean)/std, so that E[A z]/5 is about 1/5.
    n, m_old = 4000, 0.3
    x0, eps = m_old + randn(n, 1, seed=4), randn(n, 1, seed=5)
    r = nft.optimality(grpo.group_advantages(x0.T).flatten(), 5.0)
    m = torch.tensor(m_old, dtype=torch.float64, requires_grad=True)
    for _ in range(40):
        (grad,) = torch.autograd.grad(nft.nft_loss(eps - m, eps - m_old, eps - x0, r, 1.0).mean(), m)
        m = (m - 0.25 * grad).detach().requires_grad_()
    assert m.item() == pytest.approx(m_old + ((2 * r - 1) * (x0[:, 0] - m_old)).mean().item(), abs=1e-6)
    assert m.item() - m_old == pytest.approx(0.2, abs=5 * 0.3 / n**0.5)


def test_a_sample_does_not_see_another_and_only_the_student_gets_a_gradient():
    inputs = [x.requires_grad_() for x in batch()]
    before = nft.nft_loss(*inputs, 0.5)
    assert [g is None for g in torch.autograd.grad(before.sum(), inputs, allow_unused=True)] == [
        False,
        True,
        True,
        True,
    ]
    for i in range(4):
        moved = [x.detach().clone() for x in inputs]
        moved[i][1] += 0.1
        after = nft.nft_loss(*moved, 0.5)
        assert torch.equal(after[[0, 2]], before[[0, 2]]) and after[1] != before[1]


def test_an_advantage_in_the_place_of_r_and_unequal_shapes_are_refused():
    v, old, target, r = batch()
    nft.nft_loss(v, old, target, torch.tensor([0.0, 1.0, 0.5]), 0.5)  # r = 0 and 1 are legal
    bad = [(v, old, target, torch.tensor(x), 0.5) for x in ([-0.1, 0.5, 0.9], [0.1, 0.5, 1.1])]
    bad += [(v, old, target, r, beta) for beta in (0.0, -0.5)]
    bad += [(v, old[:1], target, r, 0.5), (v, old, target[:, :1], r, 0.5)]
    bad += [(v, old, target, x, 0.5) for x in (r[:, None], r[:1])]  # the (B, 1) * (B,) that would make a (B, B)
    for arguments in bad:
        with pytest.raises(ValueError):
            nft.nft_loss(*arguments)


# ------------------------------------------------------------------------------------------------ the penalty
def test_velocity_penalty_by_hand_and_by_gradient():
    # (3-1)^2 + (1-4)^2 = 13, over D = 2: 6.5; gradient 2 (v - v_ref).
    v, ref = torch.tensor([[3.0, 1.0], [2.0, 2.0]], requires_grad=True), torch.tensor([[1.0, 4.0], [2.0, 2.0]])
    assert nft.velocity_penalty(v, ref.requires_grad_()).tolist() == [13.0, 0.0]
    assert nft.velocity_penalty(v, ref, reduce="mean").tolist() == [6.5, 0.0]
    nft.velocity_penalty(v, ref).sum().backward()
    assert v.grad.tolist() == [[4.0, -6.0], [0.0, 0.0]] and ref.grad is None
    with pytest.raises(ValueError):
        nft.velocity_penalty(v, ref[:1])


def test_velocity_penalty_is_a_gaussian_kl_only_after_the_weight_of_f_eq_9():
    v, ref, _, _ = batch()
    t, dt, sigma = 0.6, 0.1, 0.5
    weighted = kl.kl_weight(t, dt, sigma) * nft.velocity_penalty(v, ref)
    torch.testing.assert_close(weighted, kl.velocity_kl(v, ref, t, dt, sigma))
    assert not torch.allclose(nft.velocity_penalty(v, ref), kl.velocity_kl(v, ref, t, dt, sigma), rtol=0.5)


# --------------------------------------------------------------------------------------------- the old policy
def test_ema_update_by_hand_in_place_and_as_a_geometric_series():
    # 0.75 * 4 + 0.25 * 8 = 5; 0.75 * 0 + 0.25 * -4 = -1. The old policy keeps its own precision.
    old, new = (
        [torch.tensor([4.0]), torch.tensor([[0.0]]).requires_grad_()],
        [torch.tensor([8.0]), torch.tensor([[-4.0]])],
    )
    nft.ema_update(old, [x.bfloat16() for x in new], 0.75)
    assert [x.item() for x in (*old, *new)] == [5.0, -1.0, 8.0, -4.0] and old[1].is_leaf and old[1].requires_grad
    for decay, steps in ((0.0, 1), (1.0, 1), (0.8, 10)):
        old, new = [torch.zeros(3, 2).double()], [randn(3, 2)]
        for _ in range(steps):
            nft.ema_update(old, new, decay)
        torch.testing.assert_close(old[0], (1 - decay**steps) * new[0])


def test_ema_update_refuses_mismatches_before_it_writes_anything():
    old = [torch.zeros(2), torch.zeros(3)]
    for new in ([torch.ones(2), torch.ones(3, 1)], [torch.ones(2)], [torch.ones(2), torch.ones(1)]):
        with pytest.raises(ValueError):
            nft.ema_update(old, new, 0.5)
    for decay in (-0.5, 1.5):
        with pytest.raises(ValueError):
            nft.ema_update(old, [x + 1 for x in old], decay)
    assert not any(x.any() for x in old)


def test_old_policy_decay_rises_from_zero_to_its_cap():
    # min(0.001 step, 0.5): 0 at 0, 0.001 at 1, 0.3 at 300, 0.5 from 500 on.
    assert [nft.old_policy_decay(s) for s in (0, 1, 300, 500, 900)] == pytest.approx([0.0, 0.001, 0.3, 0.5, 0.5])
