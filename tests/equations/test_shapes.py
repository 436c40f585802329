"""What every equation function keeps: precision, one term a sample, and no silent broadcasting.

One table of calls, f(x, y, s, t): x and y have shape (3, 2, 5), s and t (3,). All numbers lie between 0.1 and 1, so
that they may stand for a time, a standard deviation or a credit. Results have a row for each sample.
"""

import pytest
import torch

import grpo
import kl
import nft
import opd
import sde


def visit(x, s, t):
    # flips instead of products: in bfloat16 a product would be rounded before the function sees it
    step = sde.Transition(0, t, t - s, s, s, x, x.flip(2), x.flip(1, 2), s, x.flip(1))
    return opd.Visit(step, x.flip(2), None, s, "kl_dt", "mean", clip=0.9, credit_clip=0.8)


def drawn(x, s, t):
    return sde.Transition(0, t, s, s, s, x, x, mean=x, std=s, x_next=x.flip(1))


CALLS = {
    "interpolate": lambda x, y, s, t: sde.interpolate(x, y, t),
    "flow_matching_loss": lambda x, y, s, t: sde.flow_matching_loss(x, y, y.flip(2)),
    "noise_scale": lambda x, y, s, t: sde.noise_scale(t, s, 0.7),
    "ode_step": lambda x, y, s, t: sde.ode_step(x, y, t),
    "sde_mean": lambda x, y, s, t: sde.sde_mean(x, y, t, s, s),
    "sde_step": lambda x, y, s, t: sde.sde_step(x, y, t, s, s)[2],
    "cps_mean": lambda x, y, s, t: sde.cps_mean(x, y, t, s, 0.7),
    "cps_step": lambda x, y, s, t: sde.cps_step(x, y, t, s, 0.7)[2],
    "log_prob": lambda x, y, s, t: sde.log_prob(x, y, s),
    "gaussian_kl": lambda x, y, s, t: kl.gaussian_kl(x, y, s),
    "kl_weight": lambda x, y, s, t: kl.kl_weight(t, s, s),
    "velocity_kl": lambda x, y, s, t: kl.velocity_kl(x, y, t, s, s),
    "group_advantages": lambda x, y, s, t: grpo.group_advantages(x[:, 0]),
    "multi_reward_advantages": lambda x, y, s, t: grpo.multi_reward_advantages(x.transpose(0, 1), [0.3, 0.7]),
    "clipped_objective": lambda x, y, s, t: grpo.clipped_objective(s, t, 0.9),
    "policy_loss": lambda x, y, s, t: grpo.policy_loss(drawn(x, s, t), y, t, 0.9, mean_ref=y.flip(2), beta=0.1)[0],
    "policy_loss, guarded": lambda x, y, s, t: grpo.policy_loss(drawn(x, s, t), y, t, 0.9, 5, "sum", guard=True)[0],
    "log_ratio": lambda x, y, s, t: grpo.log_ratio(drawn(x, s, t), y),
    "guard_ratio": lambda x, y, s, t: grpo.guard_ratio(t, x, y, s),
    "optimality": lambda x, y, s, t: nft.optimality(s, 1.5),
    "nft_loss": lambda x, y, s, t: nft.nft_loss(x, y, y.flip(2), t, 0.5),
    "velocity_penalty": lambda x, y, s, t: nft.velocity_penalty(x, y),
    "velocity_matching": lambda x, y, s, t: opd.velocity_matching(x, y),
    "dense_reward": lambda x, y, s, t: opd.dense_reward(x, y, t, s, s),
    "mar_penalty": lambda x, y, s, t: opd.mar_penalty(x, y, t, s, s, weight="kl_dt"),
    "sampled_reward": lambda x, y, s, t: opd.sampled_reward(visit(x, s, t)._replace(v_target=y)),
    "target_velocity": lambda x, y, s, t: opd.target_velocity(
        {"a": torch.tensor([2, 0]), "b": torch.tensor([1])}, lambda expert, rows, x, t: sde.per_sample(t, x) * x, x, t
    ),
    **{name: lambda x, y, s, t, f=f: f(visit(x, s, t), y)[0] for name, f in opd.ESTIMATORS.items()},
}
EVERY = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
ONE_ARGUMENT = {"noise_scale", "group_advantages", "multi_reward_advantages", "optimality", "target_velocity"}


def arguments(seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    shapes = ((3, 2, 5), (3, 2, 5), (3,), (3,))
    return [(0.1 + 0.9 * torch.rand(shape, generator=g, dtype=torch.float64)).to(dtype) for shape in shapes]


@EVERY
def test_bfloat16_is_computed_in_float32_and_float64_is_kept(call):
    low = arguments(dtype=torch.bfloat16)
    full = call(*(x.double() for x in low))
    assert (call(*low).dtype, full.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(call(*low).double(), full, rtol=1e-4, atol=1e-5)


@EVERY
def test_a_sample_has_its_own_times_and_does_not_see_another_sample(call):
    some, other = arguments(), arguments(seed=1)
    before = call(*some)
    assert len(before) == 3
    after = call(*(torch.cat([a[:1], b[1:2], a[2:]]) for a, b in zip(some, other)))  # another sample 1
    assert torch.equal(after[[0, 2]], before[[0, 2]]) and not torch.isclose(after[1], before[1]).all()
    if call is not CALLS["target_velocity"]:
        for i in range(3):
            torch.testing.assert_close(call(*(x[i : i + 1] for x in some)), before[i : i + 1])


@pytest.mark.parametrize("name", [name for name in CALLS if name not in ONE_ARGUMENT | {"sde_step", "cps_step"}])
def test_a_column_or_a_row_in_the_place_of_a_batch_is_refused(name):
    """A (B, 1) against a (B,) broadcasts to (B, B): in the released loss every sample is credited with the batch's
    mean, and nothing complains."""
    call, some = CALLS[name], arguments()
    before = call(*some)
    rows, columns = [x[:1] for x in some], [x[:, None] for x in some[2:]]
    for i, wrong in (*enumerate(rows), *enumerate(columns, 2)):
        if not torch.equal(call(*some[:i], some[i] * 0.99, *some[i + 1 :]), before):  # the argument is read
            with pytest.raises(ValueError):
                call(*some[:i], wrong, *some[i + 1 :])


@pytest.mark.parametrize(
    "name", ["log_prob", "gaussian_kl", "kl_weight", "velocity_kl", "policy_loss", "guard_ratio", *opd.ESTIMATORS]
)
def test_a_step_without_noise_has_no_density_no_kl_and_no_ratio_but_qs_loss(name):
    x, y, s, t = arguments()
    s[1] = 0.0
    if name == "velocity":
        assert CALLS[name](x, y, s, t).shape == (3,)
    else:
        with pytest.raises(ValueError):
            CALLS[name](x, y, s, t)


def test_the_released_broadcast_gives_every_sample_the_batchs_mean_credit():
    # The released code: reward (B, 1), ratio (B,). With rewards 1, 2, 6 and B = 3 every ratio is credited 3.
    reward, ratio = torch.tensor([[1.0], [2.0], [6.0]]), torch.ones(3, requires_grad=True)
    (reward * ratio).mean().backward()  # (3, 3)
    assert ratio.grad.tolist() == [1, 1, 1]  # mean credit 3, / B = 3 for everyone; should be 1/3, 2/3, 6/3
