"""Cold start: how do several LoRA teachers become one starting adapter?

F §5.1 starts the student from a *merge* of its teachers and does not say which merge. A LoRA layer computes
W x + s B A x with A (r, in), B (out, r) and s = alpha / r. What teacher k adds to W, its *delta*, is

    delta_k = s_k B_k A_k          (out, in)

and the merge of K teachers with weights w_k (default 1/K) is

    delta = sum_k w_k delta_k.     (out, in), rank at most R = r_1 + .. + r_K

Seven answers, all of which return one adapter whose update is B A at scale 1:

    cat     stack the factors: exactly delta, but the rank adds up to R (and so does the cost of the student)
    svd     the best approximation of delta at a given rank (Eckart-Young): the default
    ties    TIES: trim each delta, elect a sign per entry, average those that agree; then the SVD to a rank
    knots   KnOTS: TIES in the basis that the SVD of all deltas side by side gives; then the SVD to a rank
    dare    DARE: drop entries of each delta at random, divide the others by the share that stays; then as svd
    iso     Iso-C: the same directions as svd, each as strong as their mean, so that no teacher's few strong ones rule
    factor  average A and B apart, as the released code does; not a merge of the deltas, kept for comparison

ERRATUM (F's code): mean(B) mean(A) is not mean(B A). It drags in the cross terms B_j A_k, j != k, which
belong to no teacher, and shrinks the true ones by 1/K. On random factors its relative distance from the mean
delta is sqrt(1 - 1/K): 71 % for two teachers, 82 % for three.

Everything here is exact linear algebra on a few small matrices; no gradient flows.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sde import full_precision

METHODS = ("cat", "svd", "ties", "knots", "dare", "iso", "factor")
SUFFIX_A, SUFFIX_B = ".lora_A.weight", ".lora_B.weight"


@torch.no_grad()
def merge_lora(
    adapters: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float] | None = None,
    method: str = "svd",
    rank: int | None = None,
    scales: Sequence[float] | None = None,
    density: float = 0.2,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Merge K LoRA adapters into one (F §5.1, "merging-as-initialization").

    adapters  K state dicts with the same modules, keys `<module>.lora_A.weight` (r, in) and
              `<module>.lora_B.weight` (out, r); ranks may differ between adapters (except under "factor").
    weights   K finite numbers, default 1/K each. They need not sum to 1; "ties" and "knots" use their ratios only.
    method    one of `METHODS`, see the top of this file.
    rank      of all but "cat" and "factor"; default the largest rank that goes in, module by module.
    scales    K numbers alpha_k / r_k, default 1: pass them, or a teacher trained at alpha = 2 r counts half.
    density   "ties", "knots" and "dare": the fraction of each delta's entries that stays, in (0, 1].
    generator on the CPU, draws what "dare" drops; by default the same entries every time.

    Returns a state dict with the keys of adapter 0 in its dtype; computed in float32 at least. Its update is
    B @ A at scale 1: SAVE IT WITH alpha = rank (module by module, where ranks differ). No gradient flows.
    Raises ValueError if adapters, weights, scales or rank do not fit together.
    """
    if method not in METHODS:
        raise ValueError(f"unknown merge method {method!r}; choose one of {METHODS}")
    if rank is not None and method in ("cat", "factor"):
        raise ValueError(f"rank={rank} was given, but {method!r} fixes the rank itself; use method='svd'")
    if not 0 < density <= 1:
        raise ValueError(f"density must lie in (0, 1], got {density}")
    K = len(adapters)
    weights = [1 / K for _ in adapters] if weights is None else [float(w) for w in weights]
    scales = [1.0] * K if scales is None else [float(s) for s in scales]
    if not K == len(weights) == len(scales) > 0 or not torch.tensor([weights, scales]).isfinite().all():
        raise ValueError(f"{K} adapters need as many finite weights and scales, not {weights} and {scales}")
    layers = [_layers(adapter) for adapter in adapters]
    updates = [{module: (len(b), a.shape[1]) for module, (a, b) in layer.items()} for layer in layers]  # (out, in)
    for k, update in enumerate(updates):
        if odd := sorted({module for module, _ in update.items() ^ updates[0].items()}):
            raise ValueError(f"adapters {k} and 0 do not update the same weights: {odd[0]!r}")

    generator = generator or torch.Generator().manual_seed(0)
    merged = {}
    for module, (first, _) in layers[0].items():
        a = [full_precision(layer[module][0]) for layer in layers]  # K x (r_k, in)
        b = [scale * full_precision(layer[module][1]) for layer, scale in zip(layers, scales)]  # K x (out, r_k)
        a_merged, b_merged = _merge_layer(a, b, weights, method, rank, density, generator, module)
        merged[module + SUFFIX_A] = a_merged.to(first.dtype)
        merged[module + SUFFIX_B] = b_merged.to(first.dtype)
    return merged


def _layers(adapter: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """{module: (A, B)}. Raises ValueError for a key that is no LoRA factor, has no partner or another shape."""
    layers = {}
    for key in adapter:
        module = key.removesuffix(SUFFIX_A).removesuffix(SUFFIX_B)
        a, b = adapter.get(module + SUFFIX_A), adapter.get(module + SUFFIX_B)
        if a is None or b is None or not a.ndim == b.ndim == 2 or a.shape[0] != b.shape[1]:
            raise ValueError(f"{key!r}: expected a pair of matrices *{SUFFIX_A} (r, in) and *{SUFFIX_B} (out, r)")
        layers[module] = a, b
    return layers


def _merge_layer(a, b, weights, method, rank, density, generator, module) -> tuple[Tensor, Tensor]:
    """One module: K factors a (r_k, in) and b (out, r_k) -> the merged (rank, in) and (out, rank)."""
    if method == "factor":
        if len({len(a_k) for a_k in a}) > 1:
            raise ValueError(f"'factor' cannot average unequal ranks: {module} has {[len(a_k) for a_k in a]}")
        # As released: sum_k w_k A_k and sum_k w_k B_k multiply to sum_jk w_j w_k B_j A_k, cross terms and all.
        # The true merge is the sum over j = k with weight w_k instead of w_k^2.
        return sum(w * a_k for w, a_k in zip(weights, a)), sum(w * b_k for w, b_k in zip(weights, b))

    # [w_1 B_1 .. w_K B_K] [A_1; ..; A_K] = sum_k w_k B_k A_k: block multiplication *is* the weighted sum.
    a_stack = torch.cat(a)  # (R, in)
    b_stack = torch.cat([w * b_k for w, b_k in zip(weights, b)], dim=1)  # (out, R)
    if method == "cat":
        return a_stack, b_stack

    sizes = (b_stack.shape[0], a_stack.shape[1]) + (() if method in ("ties", "dare") else (len(a_stack),))
    limit = min(sizes)  # no more singular values than this: beyond it come zero pairs, which never train
    if rank is None:
        rank = min(max(len(a_k) for a_k in a), limit)
    if not 1 <= rank <= limit:
        raise ValueError(f"rank={rank} is out of range: {module} allows 1 to {limit} under {method!r}")
    if method in ("svd", "iso"):
        u, s, vh = _svd_of_product(b_stack, a_stack)
        return _truncate(u, s if method == "svd" else s[:rank].mean().expand(rank), vh, rank)
    if method == "knots":  # Stoica et al. 2024: [delta_1 .. delta_K] = U [S V_1^T .. S V_K^T], and TIES of the S V_k^T
        u, s, vh = _svd_of_product(torch.cat(b, dim=1), torch.block_diag(*a))  # (out, R), (R,), (R, K in)
        return _truncate(*_svd_of_product(u, _ties((s[:, None] * vh).chunk(len(a), dim=1), weights, density)), rank)
    deltas = [b_k @ a_k for a_k, b_k in zip(a, b)]
    if method == "dare":  # Yu et al. 2024: over all that may be dropped, the mean stays sum_k w_k delta_k
        stays = [(torch.rand(d.shape, generator=generator) < density).to(d) / density for d in deltas]
        dense = sum(w * d * m for w, d, m in zip(weights, deltas, stays))
    else:
        dense = _ties(deltas, weights, density)
    return _truncate(*torch.linalg.svd(dense, full_matrices=False), rank)


def _svd_of_product(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """SVD of b @ a, b (out, R), a (R, in), without the (out, in) product.

    With b = Q_b R_b and a^T = Q_a R_a, b a = Q_b (R_b R_a^T) Q_a^T. The Q are orthonormal, so the SVD of the
    small core (at most R, R) is the SVD of the whole: O((out + in) R^2) instead of O(out in min(out, in)).
    """
    q_b, r_b = torch.linalg.qr(b)  # (out, R), (R, R)
    q_a, r_a = torch.linalg.qr(a.T)  # (in, R), (R, R)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)  # (R, R), (R,), (R, R)
    return q_b @ u, s, vh @ q_a.T  # (out, R), (R,), (R, in)


def _truncate(u: Tensor, s: Tensor, vh: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The leading `rank` triples as balanced factors: A = sqrt(S) V^T (rank, in), B = U sqrt(S) (out, rank).

    Both start at the same size, so that one learning rate suits both. A singular pair is unique only up to a
    common sign; the largest entry of each column of U is made positive, so that the same teachers give, up to
    rounding, the same factors whatever their order or the library used.
    """
    u, root, vh = u[:, :rank], s[:rank].sqrt(), vh[:rank]
    sign = u.gather(0, u.abs().argmax(dim=0, keepdim=True)).sign().squeeze(0)  # (rank,), +1 or -1
    return (sign * root)[:, None] * vh, u * (sign * root)


def _ties(deltas: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """TIES merging (Yadav et al. 2023) of K dense deltas (out, in) -> (out, in).

    1. Trim: keep the `density` largest entries by magnitude of each delta, zero the rest (small entries are
       mostly noise, yet they dilute a mean).
    2. Elect, per entry, the sign of the weighted sum.
    3. Average, per entry, only the teachers that agree with it: sum_agree w_k d_k / sum_agree |w_k|.

    DEVIATION (TIES): the paper trims over the whole model at once; here each module keeps its own share, so that a
    module with small updates is not silenced and memory stays at one layer.
    """
    shares = [w * _trim(d, density) for w, d in zip(weights, deltas)]
    elected = sum(shares).sign()  # (out, in)
    share = torch.stack(shares)  # (K, out, in)
    agree = (share.sign() == elected) & (share != 0)  # (K, out, in)
    size = torch.tensor(weights, dtype=share.dtype, device=share.device).abs()[:, None, None]  # |w_k|
    total = torch.where(agree, size, 0).sum(dim=0)  # (out, in), 0 where nobody has an entry
    return torch.where(total > 0, torch.where(agree, share, 0).sum(dim=0) / total, 0)


def _trim(matrix: Tensor, density: float) -> Tensor:
    """Zero all but the round(density * size) largest entries by magnitude, at least one."""
    kept = max(1, round(density * matrix.numel()))
    index = matrix.abs().flatten().topk(kept).indices
    mask = torch.zeros_like(matrix, dtype=torch.bool).flatten()
    mask[index] = True
    return matrix * mask.view_as(matrix)
