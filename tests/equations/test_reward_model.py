"""Q Eq. 10-12 by hand, by autograd and by torch's own losses; agreement with people counted by brute force."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import reward_model as R
import rewards

IDS = (4, 1, 6, 0, 3)  # where the tokens 1 to 5 stand in a vocabulary of seven


def draws(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------------------------- Q Eq. 12
def test_the_expected_score_is_the_mean_mark_under_the_five_tokens_probabilities():
    # p(1..5) = .1 .2 .3 .4 0 -> .1 + .4 + .9 + 1.6 = 3.0; the other tokens' logits, however large, do not count.
    logits = torch.full((1, 7), 50.0)
    logits[0, list(IDS)] = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.0]).log()
    torch.testing.assert_close(R.expected_score(logits, IDS), torch.tensor([3.0]))
    whole = logits.softmax(-1)[0, list(IDS)] @ torch.arange(1.0, 6)
    assert whole < 1e-9, "Eq. 12 as printed: the probability that is elsewhere counts as a mark of 0"


def test_the_expected_score_is_the_rule_for_a_servers_log_probs():
    logits = 3 * draws(8, 7)
    for row, score in zip(logits.log_softmax(-1), R.expected_score(logits, IDS), strict=True):
        served = {str(mark): row[token].item() for mark, token in enumerate(IDS, 1)}
        assert score.item() == pytest.approx(rewards.expected_score(served), abs=1e-5)


def test_the_gradient_of_the_expected_score_moves_mass_towards_marks_above_it():
    logits = draws(3, 7).requires_grad_()
    scores = R.expected_score(logits, IDS)
    (gradient,) = torch.autograd.grad(scores[1], logits)
    p = logits.detach()[1, list(IDS)].softmax(-1)
    by_hand = torch.zeros(3, 7)
    by_hand[1, list(IDS)] = p * (torch.arange(1.0, 6) - scores[1].detach())  # dR/dz_s = p_s (s - R)
    torch.testing.assert_close(gradient, by_hand)


def test_a_certain_model_says_its_mark_and_an_undecided_one_says_three():
    logits = torch.zeros(6, 7)
    for mark, token in enumerate(IDS):
        logits[mark, token] = 200.0
    assert R.expected_score(logits, IDS).tolist() == pytest.approx([1, 2, 3, 4, 5, 3])
    assert R.expected_score(logits.bfloat16(), IDS).dtype == torch.float32


@pytest.mark.parametrize("ids", [(4, 1, 6, 0), (4, 1, 6, 0, 3, 2), (4, 1, 6, 0, 4)])
def test_five_different_score_tokens_are_needed(ids):
    with pytest.raises(ValueError):
        R.expected_score(torch.zeros(2, 7), ids)


# ---------------------------------------------------------------------------------------------------- Q Eq. 11 and 10
def test_the_pointwise_loss_is_the_mean_squared_error():
    scores, targets = torch.tensor([1.5, 4.0, 2.0]), torch.tensor([1.0, 4.0, 5.0])
    assert R.pointwise_loss(scores, targets).item() == pytest.approx((0.25 + 0 + 9) / 3)
    twice = R.pointwise_loss(scores.repeat(2), targets.repeat(2))
    assert twice.item() == pytest.approx(9.25 / 3), "a mean: a batch twice as large has the same loss"
    scores, targets = draws(5).requires_grad_(), draws(5, seed=1)
    loss = R.pointwise_loss(scores, targets)
    torch.testing.assert_close(loss, F.mse_loss(scores, targets))
    (gradient,) = torch.autograd.grad(loss, scores)
    torch.testing.assert_close(gradient, 2 * (scores.detach() - targets) / 5)


def test_the_pairwise_loss_is_bradley_terrys():
    # Differences 0 and ln 3: -log(1/2) and -log(3/4), whose mean is half of log(8/3).
    scores_w, scores_l = torch.tensor([2.0, 2.0 + math.log(3)]), torch.tensor([2.0, 2.0])
    assert R.pairwise_loss(scores_w, scores_l).item() == pytest.approx(math.log(8 / 3) / 2)
    w, b = draws(6).requires_grad_(), draws(6, seed=1).requires_grad_()
    loss = R.pairwise_loss(w, b)
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(w - b, torch.ones(6)))
    to_w, to_l = torch.autograd.grad(loss, (w, b))
    torch.testing.assert_close(to_w, -(1 - torch.sigmoid(w - b)).detach() / 6)
    torch.testing.assert_close(to_l, -to_w)
    assert abs(loss.item() - R.pairwise_loss(b, w).item()) > 0.1, "a swapped pair is another loss"


def test_the_pairwise_loss_has_no_scale_of_its_own_but_a_floor_on_the_scale_of_one_to_five():
    w, b = draws(4), draws(4, seed=1)
    torch.testing.assert_close(R.pairwise_loss(w + 9, b + 9), R.pairwise_loss(w, b))
    assert R.pairwise_loss(torch.tensor([5.0]), torch.tensor([1.0])).item() == pytest.approx(0.018150, abs=1e-6)
    far = torch.tensor([500.0])
    assert R.pairwise_loss(far, -far).item() == 0.0 and R.pairwise_loss(-far, far).item() == 1000.0, "no overflow"


@pytest.mark.parametrize("loss", [R.pointwise_loss, R.pairwise_loss])
def test_a_loss_has_one_term_a_picture_and_refuses_to_broadcast(loss):
    for a, b in ((3, (3, 1)), ((3, 1), (3, 1)), (3, 2), ((), ())):
        with pytest.raises(ValueError):
            loss(torch.zeros(a), torch.zeros(b))
    scores, targets = draws(4), draws(4, seed=1)

    def gradient(values):
        values = values.clone().requires_grad_()
        return torch.autograd.grad(loss(values, targets), values)[0]

    changed = scores.clone()
    changed[1] += 2
    assert torch.equal(gradient(scores)[[0, 2, 3]], gradient(changed)[[0, 2, 3]]), "sample 1 leaves the others' terms"
    assert gradient(scores)[1] != gradient(changed)[1]


# ------------------------------------------------------------------------------------------------ agreement, Q 3.1
def test_ranks_and_correlations_by_hand():
    values = np.array([10.0, 30.0, 20.0, 30.0, -5.0])
    assert R.ranked(values).tolist() == [2, 4.5, 3, 4.5, 1], "equal values share the mean of their ranks"
    a, b = np.random.default_rng(0).normal(size=(2, 11))
    assert R.pearson(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert R.pearson(a, 3 * a + 2) == pytest.approx(1) and R.pearson(a, -a) == pytest.approx(-1)
    d = R.ranked(a) - R.ranked(b)
    spearman = 1 - 6 * (d @ d) / (11 * (11**2 - 1))  # Spearman's own formula, for ranks without ties
    assert R.pearson(R.ranked(a), R.ranked(b)) == pytest.approx(spearman)
    assert R.pearson(R.ranked(a), R.ranked(np.exp(a))) == pytest.approx(1), "ranks see the order only"
    assert math.isnan(R.pearson(a, np.ones(11)))


def test_pair_accuracy_counts_pairs_of_one_prompt_and_half_of_ties():
    # prompt a: 1<2 right, 1<3 right, 2<3 a tie; prompt b: wrong; prompt c: equal marks, no pair. (1 + 1 + .5 + 0) / 4
    targets = np.array([1.0, 5, 2, 3, 2, 4, 4])
    scores = np.array([0.1, 0.2, 0.5, 0.5, 0.9, 0.3, 0.7])
    prompts = ["a", "b", "a", "a", "b", "c", "c"]
    assert R.pair_accuracy(scores, targets, prompts) == pytest.approx(2.5 / 4)
    assert math.isnan(R.pair_accuracy(scores, targets, range(7))), "no prompt has two pictures"


def test_pair_accuracy_is_what_a_loop_over_all_pairs_counts():
    rng = np.random.default_rng(1)
    scores, targets, groups = rng.integers(0, 9, 60), rng.integers(1, 6, 60), rng.integers(0, 4, 60)
    found = []
    for i, j in itertools.combinations(range(60), 2):
        if groups[i] == groups[j] and targets[i] != targets[j]:
            order = (scores[i] - scores[j]) * (targets[i] - targets[j])
            found.append(1.0 if order > 0 else 0.5 if order == 0 else 0.0)
    assert R.pair_accuracy(scores, targets, groups.tolist()) == pytest.approx(np.mean(found))
