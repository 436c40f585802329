"""How does a vision-language model (VLM) become a reward, from the marks that people gave to pictures?

    Q Eq. 12   R = sum over s in {1..5} of s p(s | x, c)    `expected_score`: what the model says of a picture
    Q Eq. 11   (R - y)^2                                    `pointwise_loss`: a picture has a mark y
    Q Eq. 10   -log sigma(R_w - R_l)                        `pairwise_loss`: picture w is preferred to picture l
    Q 3.1      agreement with people                        `pearson`, `ranked` (Spearman), `pair_accuracy`

The model sees the picture x and a question about the prompt c. The probabilities of the tokens "1" to "5" at the place
of its answer are its opinion. Both losses are about the same R, so that the two objectives differ in what they learn
from and in nothing else, as Q Fig. 2 asks. A share of the prompts is never trained on; agreement is measured there.
`train.py --stage reward` is the loop.

DEVIATION (Q 3.1): Q fine-tunes with chain-of-thought reasoning, of which it publishes no texts and no loss. Here the
score token is the first one of the answer, so that one forward pass is one score.
"""

import math
from collections.abc import Hashable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rewards import HIGHEST_RATING as HIGHEST
from rewards import LOWEST_RATING as LOWEST


# ------------------------------------------------------------------------------------------------ score and losses
def expected_score(logits_BV: Tensor, token_ids: Sequence[int]) -> Tensor:
    """R = sum over s of s p(s), Q Eq. 12: next-token logits (B, V) -> (B,) float32 in [1, 5].

    token_ids are the V-indices of the tokens "1" to "5", in this order. The gradient flows to their logits:
    dR/dz_s = p_s (s - R). Raises ValueError unless the indices are five different ones.
    `rewards.expected_score` is the same rule for the log-probs that a server returns.

    DEVIATION (Q Eq. 12): printed, p is the model's whole distribution, and an answer that is no number is a mark of 0.
    Here p is normalised over the five tokens: a model that hesitates how to begin its answer has not judged anything.
    """
    if len(set(token_ids)) != HIGHEST or len(token_ids) != HIGHEST:
        raise ValueError(f"the tokens 1 to {HIGHEST} must be {HIGHEST} different ones, got {list(token_ids)}")
    p_B5 = logits_BV[:, list(token_ids)].float().softmax(-1)
    return p_B5 @ torch.arange(LOWEST, HIGHEST + 1, dtype=p_B5.dtype, device=p_B5.device)


def pointwise_loss(scores_B: Tensor, targets_B: Tensor) -> Tensor:
    """mean of (R - y)^2, Q Eq. 11: scores and marks (B,) -> a scalar. Raises ValueError for other shapes.

    DEVIATION (Q Eq. 10-11): they sum over the data. The mean has the same minimum, and a learning rate that does not
    depend on the size of the batch.
    ERRATUM (Q Eq. 11): it lets y be any real number, but the R of Eq. 12 lies in [1, 5]: a mark beyond would pull all
    probability to one token for ever. `data.preferences.read` refuses such marks.
    """
    _one_each(scores_B, targets_B)
    return (scores_B - targets_B).square().mean()


def pairwise_loss(scores_w_B: Tensor, scores_l_B: Tensor) -> Tensor:
    """mean of -log sigma(R_w - R_l), Q Eq. 10 (Bradley-Terry): scores (B,) of the preferred pictures and of the others
    -> a scalar. Raises ValueError for other shapes.

    Only differences count: where on the scale a picture stands is free. But the R of Eq. 12 is bounded, R_w - R_l <= 4,
    and the loss stays above log(1 + exp(-4)) = 0.018: pairs that are in order go on pushing R towards 1 and 5.
    """
    _one_each(scores_w_B, scores_l_B)
    return F.softplus(scores_l_B - scores_w_B).mean()  # -log sigma(d) = log(1 + e^-d), without overflow


def _one_each(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.ndim != 1:  # (B,) with (B, 1) would broadcast to (B, B)
        raise ValueError(f"one number a picture is needed, got shapes {tuple(a.shape)} and {tuple(b.shape)}")


# ------------------------------------------------------------------------------------------- agreement with people
def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of two arrays (N,), in [-1, 1] (Q 3.1); nan if one of them is constant."""
    a, b = a - a.mean(), b - b.mean()
    norm = math.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm > 0 else math.nan


def ranked(values: np.ndarray) -> np.ndarray:
    """The rank of each of (N,) values, from 1. Equal values share the mean of their ranks.

    Spearman's correlation (Q 3.1) is Pearson's of the ranks.
    """
    _, group, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[group]


def pair_accuracy(scores: np.ndarray, targets: np.ndarray, groups: Sequence[Hashable]) -> float:
    """Share of the pairs within a group that scores order as targets do, (N,) each; a tie of scores is half right.

    Pairs whose targets are equal do not count; nan if no pair is left. A group is a prompt: pictures of one prompt are
    what GRPO compares.
    """
    members: dict[Hashable, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    right, total = 0.0, 0
    for rows in members.values():
        s, t = scores[rows], targets[rows]
        for i in range(1, len(rows)):  # row i with all rows before it
            order = np.sign(t[i] - t[:i])
            right += ((order * np.sign(s[i] - s[:i]) + 1) / 2)[order != 0].sum()
            total += int((order != 0).sum())
    return right / total if total else math.nan
