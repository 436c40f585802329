"""Oracles for nft.py: hand numbers, plain flow matching as a limit, closed-form gradients and minimisers.

Run: python -m pytest tests/test_nft.py
"""

import pytest
import torch

import grpo
import nft


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch(B=3, D=(2, 5)):
    """v, v_old, v_target of shape (3, 2, 5) and r (3,) on both sides of 1/2."""
    return randn(B, *D), randn(B, *D, seed=1), randn(B, *D, seed=2), torch.tensor([0.1, 0.5, 0.8]).double()


# ------------------------------------------------------------------------------------------------- optimality


def test_optimality_by_hand():
    # A_max = 5: -7 -> -5 -> 0; -2.5 -> -0.25 + 0.5; 0 -> 0.5; 1 -> 0.1 + 0.5; 9 -> 5 -> 1.
    advantage = torch.tensor([-7.0, -2.5, 0.0, 1.0, 9.0])
    torch.testing.assert_close(nft.optimality(advantage, 5.0), torch.tensor([0.0, 0.25, 0.5, 0.6, 1.0]))
    torch.testing.assert_close(nft.optimality(advantage, 0.5), torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]))


def test_optimality_dtype_gradient_and_errors():
    advantage = torch.ones(3, requires_grad=True)
    assert not nft.optimality(advantage, 5.0).requires_grad
    assert nft.optimality(advantage.bfloat16(), 5.0).dtype == torch.float32
    assert nft.optimality(advantage.double(), 5.0).dtype == torch.float64
    for bad in (0.0, -5.0):
        with pytest.raises(ValueError, match=f"advantage_max must be > 0, got {bad}"):
            nft.optimality(advantage, bad)


# --------------------------------------------------------------------------------------------------- the loss


def test_nft_loss_by_hand():
    # beta 0.5, v = (3, 1), v_old = (1, 0), target = (2, 2), r = 0.75:
    # v+ = 0.5 (3, 1) + 0.5 (1, 0) = (2, 0.5), ||v+ - v*||^2 = 0 + 2.25
    # v- = 1.5 (1, 0) - 0.5 (3, 1) = (0, -0.5), ||v- - v*||^2 = 4 + 6.25
    # 0.75 * 2.25 + 0.25 * 10.25 = 4.25; divided by D = 2: 2.125
    v, old, target = (torch.tensor([x]) for x in ([3.0, 1.0], [1.0, 0.0], [2.0, 2.0]))
    r = torch.tensor([0.75])
    torch.testing.assert_close(nft.nft_loss(v, old, target, r, 0.5), torch.tensor([4.25]))
    torch.testing.assert_close(nft.nft_loss(v, old, target, r, 0.5, reduce="sum"), torch.tensor([4.25]))
    torch.testing.assert_close(nft.nft_loss(v, old, target, r, 0.5, reduce="mean"), torch.tensor([2.125]))


@pytest.mark.parametrize("beta", [0.1, 1.0, 2.5])
def test_loss_equals_its_expanded_form(beta):
    # Independent route: ||e||^2 + 2 beta (2r-1) <d, e> + beta^2 ||d||^2, d = v - v_old, e = v_old - v*.
    v, old, target, r = batch()
    d, e = (v - old).flatten(1), (old - target).flatten(1)
    expected = (e * e).sum(1) + 2 * beta * (2 * r - 1) * (d * e).sum(1) + beta**2 * (d * d).sum(1)
    torch.testing.assert_close(nft.nft_loss(v, old, target, r, beta), expected)


def test_good_images_at_beta_one_are_plain_flow_matching():
    v, old, target, _ = batch()
    loss = nft.nft_loss(v, old, target, torch.ones(3).double(), 1.0)
    torch.testing.assert_close(loss, (v - target).square().sum((1, 2)))
    # The old policy then plays no part at all.
    torch.testing.assert_close(loss, nft.nft_loss(v, old + 1, target, torch.ones(3).double(), 1.0))


def test_bad_images_are_good_images_with_the_update_mirrored_at_the_old_policy():
    v, old, target, r = batch()
    mirrored = 2 * old - v
    torch.testing.assert_close(
        nft.nft_loss(v, old, target, 1 - r, 0.7), nft.nft_loss(mirrored, old, target, r, 0.7)
    )


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_gradient_at_the_old_policy_pulls_towards_good_and_pushes_away_from_bad(beta):
    # grad = 2 beta (2r-1) (v_old - v*): a descent step moves along (2r-1) (v* - v_old).
    _, old, target, _ = batch()
    r = torch.tensor([0.0, 0.5, 1.0]).double()
    v = old.clone().requires_grad_()
    nft.nft_loss(v, old, target, r, beta).sum().backward()
    closed_form = 2 * beta * (2 * r - 1)[:, None, None] * (old - target)
    torch.testing.assert_close(v.grad, closed_form)
    towards_target = (-v.grad * (target - old)).sum((1, 2))
    assert towards_target[0] < 0 and towards_target[1].abs() < 1e-12 and towards_target[2] > 0
    # Planted bug: a negative branch that adds beta v instead of subtracting it pulls towards bad images too.
    v.grad = None
    wrong_minus = (1 - beta) * old + beta * v
    ((1 - r)[:, None, None] * (wrong_minus - target).square()).sum().backward()
    assert (-v.grad * (target - old)).sum((1, 2))[0] > 0


def test_closed_form_minimiser_of_a_two_sample_expectation():
    # One x_t from which two images came, targets 0 (r = 1, good) and 4 (r = 0.25, poor), old velocity 2.
    # argmin = 2 + 1/beta * mean[(2-1)(0-2), (0.5-1)(4-2)] = 2 + 1/beta * (-2 - 1)/2 = 2 - 1.5/beta.
    target, r, old = torch.tensor([[0.0], [4.0]]), torch.tensor([1.0, 0.25]), torch.full((2, 1), 2.0)
    for beta, best in [(1.0, 0.5), (0.5, -1.0)]:
        v = torch.tensor([best], requires_grad=True)
        expectation = nft.nft_loss(v.expand(2, 1), old, target, r, beta).mean()
        (grad,) = torch.autograd.grad(expectation, v)
        assert grad.item() == pytest.approx(0.0, abs=1e-6)
        for other in (best - 0.1, best + 0.1):
            assert nft.nft_loss(torch.full((2, 1), other), old, target, r, beta).mean() > expectation


def test_a_common_shift_of_r_changes_nothing_when_the_old_policy_fits_its_own_samples():
    # E[v* - v_old] = 0 there, so only the covariance of r with the target matters: no baseline is needed.
    target = randn(5, 2)
    old = target.mean(0).expand(5, 2)
    r = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]).double()
    grads = []
    for shift in (0.0, 0.4):
        v = old[0].clone().requires_grad_()
        nft.nft_loss(v.expand(5, 2), old, target, r + shift, 0.3).mean().backward()
        grads.append(v.grad)
    torch.testing.assert_close(*grads)
    assert grads[0].abs().max() > 0.01


def test_training_on_nft_moves_samples_towards_the_reward():
    # Velocity model at t = 1 (x_t = eps, independent of x_0): v = eps - m, one parameter m, images x_0 =
    # m_old + z. The minimiser moves m to m_old + 1/beta * E[(2r-1) z]; with reward x_0 that covariance is
    # positive.
    n, beta, m_old = 4000, 1.0, 0.3
    x0, eps = m_old + randn(n, 1, seed=4), randn(n, 1, seed=5)
    r = nft.optimality(grpo.group_advantages(x0.T).flatten(), 5.0)
    m = torch.tensor(m_old, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.SGD([m], lr=0.25)
    for _ in range(40):
        optimiser.zero_grad()
        nft.nft_loss(eps - m, eps - m_old, eps - x0, r, beta).mean().backward()
        optimiser.step()
    # 2r - 1 = clip(A)/5, A = (x0 - mean)/std: E[A z]/5 is about 1/5 (exactly std/5 for these samples, clip
    # apart).
    assert m.item() == pytest.approx(m_old + ((2 * r - 1) * (x0[:, 0] - m_old)).mean().item(), abs=1e-6)
    assert m.item() - m_old == pytest.approx(0.2, abs=5 * 0.3 / n**0.5)


def test_only_the_student_gets_a_gradient():
    inputs = [x.requires_grad_() for x in batch()]
    nft.nft_loss(*inputs, 0.5).sum().backward()
    assert inputs[0].grad is not None and all(x.grad is None for x in inputs[1:])


def test_loss_of_a_sample_does_not_see_its_neighbours():
    inputs = list(batch())
    before = nft.nft_loss(*inputs, 0.5)
    assert before.shape == (3,)
    for i in range(4):
        moved = [x.clone() for x in inputs]
        moved[i][1] += 0.1
        after = nft.nft_loss(*moved, 0.5)
        assert torch.equal(after[[0, 2]], before[[0, 2]]) and after[1] != before[1]


def test_nft_loss_dtype_and_errors():
    v, old, target, r = batch()
    half = [x.bfloat16() for x in (v, old, target, r)]
    assert nft.nft_loss(*half, 0.5).dtype == torch.float32
    assert nft.nft_loss(v, old, target, r, 0.5).dtype == torch.float64
    # Each r in {0, 1} is legal; beyond is not.
    nft.nft_loss(v, old, target, torch.tensor([0.0, 1.0, 0.5]), 0.5)
    for bad in ([-0.1, 0.5, 0.9], [0.1, 0.5, 1.1]):
        with pytest.raises(ValueError, match=r"r must lie in \[0, 1\], got"):
            nft.nft_loss(v, old, target, torch.tensor(bad), 0.5)
    with pytest.raises(ValueError, match=r"got -0\.1\.\.0\.9"):
        nft.nft_loss(v, old, target, torch.tensor([-0.1, 0.5, 0.9]), 0.5)
    for bad in (0.0, -0.5):
        with pytest.raises(ValueError, match=f"beta must be > 0, got {bad}"):
            nft.nft_loss(v, old, target, r, bad)
    with pytest.raises(ValueError, match="v_old"):
        nft.nft_loss(v, old[:1], target, r, 0.5)
    with pytest.raises(ValueError, match="v_target"):
        nft.nft_loss(v, old, target[:, :1], r, 0.5)
    for bad in (r[:, None], r[:1]):  # the (B, 1) * (B,) that would make a (B, B)
        with pytest.raises(ValueError, match="r.*positive"):
            nft.nft_loss(v, old, target, bad, 0.5)
    with pytest.raises(ValueError, match="median"):
        nft.nft_loss(v, old, target, r, 0.5, reduce="median")


# ------------------------------------------------------------------------------------------------ the penalty


def test_velocity_penalty_by_hand_and_by_gradient():
    # (3-1)^2 + (1-4)^2 = 13, over D = 2: 6.5; gradient 2 (v - v_ref).
    v, ref = torch.tensor([[3.0, 1.0]], requires_grad=True), torch.tensor([[1.0, 4.0]], requires_grad=True)
    assert nft.velocity_penalty(v, ref).item() == nft.velocity_penalty(v, ref, reduce="sum").item() == 13.0
    assert nft.velocity_penalty(v, ref, reduce="mean").item() == 6.5
    nft.velocity_penalty(v, ref).sum().backward()
    assert torch.equal(v.grad, torch.tensor([[4.0, -6.0]])) and ref.grad is None


def test_velocity_penalty_is_zero_at_the_reference_and_per_sample():
    v, ref, _, _ = batch()
    assert torch.equal(nft.velocity_penalty(v, v), torch.zeros(3).double())
    before = nft.velocity_penalty(v, ref)
    v[1] += 0.1
    after = nft.velocity_penalty(v, ref)
    assert torch.equal(after[[0, 2]], before[[0, 2]]) and after[1] != before[1]
    assert nft.velocity_penalty(v.bfloat16(), ref.bfloat16()).dtype == torch.float32
    with pytest.raises(ValueError, match="v_ref"):
        nft.velocity_penalty(v, ref[:1])


def test_velocity_penalty_is_a_gaussian_kl_only_after_the_weight_of_f_eq_9():
    import kl

    v, ref, _, _ = batch()
    t, dt, sigma = 0.6, 0.1, 0.5
    weighted = kl.kl_weight(t, dt, sigma) * nft.velocity_penalty(v, ref)
    torch.testing.assert_close(weighted, kl.velocity_kl(v, ref, t, dt, sigma))
    assert not torch.allclose(nft.velocity_penalty(v, ref), kl.velocity_kl(v, ref, t, dt, sigma), rtol=0.5)


# --------------------------------------------------------------------------------------------- the old policy


def test_ema_update_by_hand_in_place_for_mappings_and_sequences():
    # 0.75 * 4 + 0.25 * 8 = 5; 0.75 * 0 + 0.25 * -4 = -1.
    for wrap in (list, tuple, lambda pair: {"a": pair[0], "b": pair[1]}):
        old = [torch.tensor([4.0]), torch.tensor([[0.0]])]
        new = [torch.tensor([8.0]), torch.tensor([[-4.0]])]
        assert nft.ema_update(wrap(old), wrap(new), 0.75) is None
        assert old[0].item() == 5.0 and old[1].item() == -1.0
        assert new[0].item() == 8.0 and new[1].item() == -4.0


def test_ema_update_at_its_two_ends_and_after_many_steps():
    new = [randn(3, 2)]
    for decay, expected in [(0.0, new[0]), (1.0, torch.zeros(3, 2).double())]:
        old = [torch.zeros(3, 2).double()]
        nft.ema_update(old, new, decay)
        assert torch.equal(old[0], expected)
    old = [torch.zeros(3, 2).double()]
    for _ in range(10):
        nft.ema_update(old, new, 0.8)
    torch.testing.assert_close(old[0], (1 - 0.8**10) * new[0])  # geometric series


def test_ema_update_works_on_parameters_without_recording_a_gradient():
    old, new = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    nft.ema_update(list(old.parameters()), list(new.parameters()), 0.0)
    assert torch.equal(old.weight, new.weight) and old.weight.is_leaf and old.weight.requires_grad
    half = [torch.zeros(2)]
    nft.ema_update(half, [torch.ones(2).bfloat16()], 0.5)
    assert torch.equal(half[0], torch.full((2,), 0.5))  # the old policy keeps its own precision


def test_ema_update_refuses_mismatches_before_it_writes_anything():
    old, new = {"a": torch.zeros(2), "b": torch.zeros(3)}, {"a": torch.ones(2), "b": torch.ones(3, 1)}
    with pytest.raises(ValueError, match=r"b: old has shape \(3,\), new \(3, 1\)"):
        nft.ema_update(old, new, 0.5)
    with pytest.raises(ValueError, match=r"differ in keys \['b', 'c'\]"):
        nft.ema_update(old, {"a": torch.ones(2), "c": torch.ones(3)}, 0.5)
    with pytest.raises(ValueError, match=r"differ in keys \['1'\]"):
        nft.ema_update([torch.zeros(2), torch.zeros(2)], [torch.ones(2)], 0.5)
    for decay in (-0.5, 1.5):
        with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\], got"):
            nft.ema_update(old, old, decay)
    assert torch.equal(old["a"], torch.zeros(2))


def test_old_policy_decay_rises_from_zero_to_its_cap():
    # Default min(0.001 step, 0.5): 0 at 0, 0.001 at 1, 0.3 at 300, 0.5 from 500 on.
    steps = (0, 1, 300, 500, 900)
    assert [nft.old_policy_decay(s) for s in steps] == pytest.approx([0.0, 0.001, 0.3, 0.5, 0.5])
    # The delayed one: min(0.0075 (step - 75), 0.999): 0 until 75, 0.1875 at 100, capped from 208.2 on.
    delayed = [nft.old_policy_decay(s, 0.0075, 0.999, 75) for s in (0, 75, 100, 209)]
    assert delayed == pytest.approx([0.0, 0.0, 0.1875, 0.999])
