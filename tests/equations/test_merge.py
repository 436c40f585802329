"""Is the merged adapter the weighted sum of its teachers' updates?

Proven here: `cat` is exact, `svd` the Eckart-Young truncation, `ties` worked by hand on 2 x 2 matrices, and both agree
with PEFT's own merge; the released average of the factors is shown to be no merge at all, and by how much.
"""

import math

import pytest
import torch

import merge
from merge import merge_lora

A, B = merge.SUFFIX_A, merge.SUFFIX_B
SHAPES = {"block.0.to_q": (7, 5), "block.1.to_out.0": (6, 9)}  # module -> (out, in)


def make(seed, rank=2, shapes=SHAPES):
    g = torch.Generator().manual_seed(seed)
    state = {}
    for module, (out, inn) in shapes.items():
        state[module + A] = torch.randn(rank, inn, generator=g, dtype=torch.float64)
        state[module + B] = torch.randn(out, rank, generator=g, dtype=torch.float64)
    return state


def dense(adapters, weights, scales, module):
    """sum_k w_k s_k B_k A_k, (out, in): what a merge is asked for."""
    return sum(w * s * a[module + B].double() @ a[module + A].double() for a, w, s in zip(adapters, weights, scales))


def delta(merged, module="m"):
    return dense([merged], [1], [1], module)


def truncated(matrix, rank):
    u, s, vh = torch.linalg.svd(matrix)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def relative(a, b):
    return float((a - b).norm() / b.norm())


def test_cat_is_the_dense_weighted_sum_and_its_rank_adds_up():
    adapters, weights, scales = [make(1, 2), make(2, 3), make(3, 1)], [0.2, -0.5, 1.7], [2.0, 0.5, 3.0]
    merged = merge_lora(adapters, weights, "cat", scales=scales)
    assert set(merged) == set(adapters[0])
    for module, (out, inn) in SHAPES.items():
        assert merged[module + A].shape == (6, inn) and merged[module + B].shape == (out, 6)
        assert relative(delta(merged, module), dense(adapters, weights, scales, module)) < 1e-12


@pytest.mark.parametrize("rank", [None, 1, 2, 4, 5])
def test_svd_is_the_eckart_young_truncation_of_the_dense_sum(rank):
    adapters, weights, scales = [make(5, 2), make(6, 3)], [0.3, 0.9], [2.0, 0.5]
    merged = merge_lora(adapters, weights, rank=rank, scales=scales)  # "svd" is the default
    kept = rank or 3  # the largest rank that goes in
    for module, (out, inn) in SHAPES.items():
        matrix = dense(adapters, weights, scales, module)
        assert merged[module + A].shape == (kept, inn) and merged[module + B].shape == (out, kept)
        assert relative(delta(merged, module), truncated(matrix, kept)) < 1e-12
        # Eckart-Young: what is lost is exactly the tail of the singular values; nothing at the sum of the ranks
        tail = torch.linalg.svdvals(matrix)[kept:].square().sum().sqrt()
        torch.testing.assert_close((delta(merged, module) - matrix).norm(), tail, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("out, inn", [(2, 3), (9, 3)])
def test_svd_works_where_the_stacked_rank_exceeds_the_layer(out, inn):
    # Rank 5 stacked: QR factors are wide, and only min(out, in) singular values can remain.
    adapters = [make(1, 2, {"m": (out, inn)}), make(2, 3, {"m": (out, inn)})]
    merged = merge_lora(adapters)
    assert len(merged["m" + A]) == min(out, inn)
    assert relative(delta(merged), dense(adapters, [0.5, 0.5], [1, 1], "m")) < 1e-12  # the default: the unscaled mean


def test_iso_keeps_the_directions_of_svd_and_makes_them_equally_strong():
    adapters, weights, scales = [make(5, 2), make(6, 3)], [0.3, 0.9], [2.0, 0.5]
    merged = merge_lora(adapters, weights, "iso", rank=4, scales=scales)
    for module in SHAPES:
        u, s, vh = torch.linalg.svd(dense(adapters, weights, scales, module))
        assert relative(delta(merged, module), s[:4].mean() * u[:, :4] @ vh[:4]) < 1e-12


def test_knots_is_ties_in_the_basis_of_all_deltas_side_by_side():
    adapters, weights = [make(5, 2), make(6, 3)], [0.3, 0.9]
    for density in (0.3, 1.0):
        merged = merge_lora(adapters, weights, "knots", rank=5, density=density)
        for module, (_, inn) in SHAPES.items():
            deltas = [dense([adapter], [1], [1], module) for adapter in adapters]
            u, s, vh = torch.linalg.svd(torch.cat(deltas, 1), full_matrices=False)
            parts = [(s[:, None] * vh)[:5, k * inn : (k + 1) * inn] for k in (0, 1)]  # the deltas have rank 5 together
            kept = [p * (p.abs() >= p.abs().flatten().topk(round(density * p.numel())).values[-1]) for p in parts]
            total = sum(w * p for w, p in zip(weights, kept))
            agree = [(w * p * total > 0).double() for w, p in zip(weights, kept)]
            size = sum(w * a for w, a in zip(weights, agree))
            right = u[:, :5] @ torch.where(size > 0, sum(w * p * a for w, p, a in zip(weights, kept, agree)) / size, 0)
            assert relative(delta(merged, module), right) < 1e-12
    one = merge_lora(adapters[:1] * 3, method="knots", density=1.0)
    assert relative(delta(one, "block.0.to_q"), dense(adapters, [1, 0], [1, 1], "block.0.to_q")) < 1e-12, "of equals"


def test_dare_keeps_entries_at_random_and_is_the_weighted_sum_in_the_mean():
    module = "block.0.to_q"
    adapters, weights, scales = [make(5, 2, {module: (7, 5)}), make(6, 3, {module: (7, 5)})], [0.3, 0.9], [2.0, 0.5]
    alone, own = merge_lora(adapters[:1], [1], "dare", rank=5, density=0.25), dense(adapters, [1], [1], module)
    dropped = delta(alone, module).abs() < 1e-9
    assert 0 < dropped.sum() < 35 and relative(delta(alone, module), torch.where(dropped, 0, own / 0.25)) < 1e-12
    found = torch.stack([
        delta(merge_lora(adapters, weights, "dare", 5, scales, 0.5, torch.Generator().manual_seed(seed)), module)
        for seed in range(400)
    ])  # fmt: skip
    error = found.mean(0) - dense(adapters, weights, scales, module)
    assert (error.abs() < 5 * found.std(0) / 400**0.5).all()
    again = [merge_lora(adapters, method="dare")[module + A] for _ in range(2)]
    assert torch.equal(*again), "by default the same entries are dropped"


@pytest.mark.parametrize("method", ["svd", "ties", "knots"])
def test_the_factors_are_balanced_and_their_signs_are_fixed(method):
    adapters = [make(7, 3), make(8, 2)]
    merged = merge_lora(adapters, method=method, rank=2)
    for module in SHAPES:
        a, b = merged[module + A], merged[module + B]
        singular = torch.diag(torch.linalg.svdvals(b @ a)[:2])
        torch.testing.assert_close(a @ a.T, singular)  # |A_i|^2 = |B_i|^2 = s_i, orthogonal
        torch.testing.assert_close(b.T @ b, singular)
        assert all(column[column.abs().argmax()] > 0 for column in b.T)
    negated = [{key: -value for key, value in adapter.items()} for adapter in adapters]  # (-B)(-A) = B A
    for key, value in merge_lora(negated, method=method, rank=2).items():
        torch.testing.assert_close(value, merged[key])


def test_factor_is_the_average_of_each_factor_by_hand_and_no_average_of_deltas():
    # rank 1: A = (1, 0), (0, 1); B = (2, 0)^T, (0, 4)^T. Mean of the deltas = diag(1, 2).
    # mean A = (1/2, 1/2), mean B = (1, 2)^T: their product [[.5, .5], [1, 1]].
    one = {"m" + A: torch.tensor([[1.0, 0.0]]), "m" + B: torch.tensor([[2.0], [0.0]])}
    two = {"m" + A: torch.tensor([[0.0, 1.0]]), "m" + B: torch.tensor([[0.0], [4.0]])}
    assert delta(merge_lora([one, two], method="factor")).tolist() == [[0.5, 0.5], [1, 1]]
    assert delta(merge_lora([one, two], method="cat")).tolist() == [[1, 0], [0, 2]]
    # weights (1, 2) and scales (3, 1/4): A = (1, 2); B = 1 * 3 * (2, 0) + 2 * 1/4 * (0, 4) = (6, 2)
    merged = merge_lora([one, two], [1, 2], "factor", scales=[3, 0.25])
    assert merged["m" + A].tolist() == [[1, 2]] and merged["m" + B].tolist() == [[6], [2]]


@pytest.mark.parametrize("count", [2, 3])
def test_the_error_of_factor_on_random_factors_is_sqrt_one_minus_one_over_k(count):
    # Independent random factors make the K^2 products B_j A_k orthogonal to O(1 / sqrt(out in)): 1 % here.
    adapters = [make(seed, 4, {"m": (120, 110)}) for seed in range(count)]
    error = relative(
        delta(merge_lora(adapters, method="factor")), dense(adapters, [1 / count] * count, [1] * count, "m")
    )
    assert abs(error - math.sqrt(1 - 1 / count)) < 0.03


def ties(*matrices, weights=None, rank=2, **options):
    """TIES of square matrices as adapters of full rank: B = matrix, A = identity."""
    adapters = [{"m" + A: torch.eye(len(m)).double(), "m" + B: torch.tensor(m).double()} for m in matrices]
    return delta(merge_lora(adapters, weights, "ties", rank=rank, **options))


def test_ties_by_hand_on_conflicting_signs():
    first, second = [[4.0, -1.0], [0.5, 3.0]], [[1.5, 5.0], [-2.0, -1.0]]
    for options, expected in [
        # weights 1/2 each. Signs of the sums (5.5, 4, -1.5, 2): +, +, -, +. Averages of those that agree:
        # (4 + 1.5) / 2 = 2.75; 5 alone; -2 alone; 3 alone.
        ({"density": 1}, [[2.75, 5.0], [-2.0, 3.0]]),
        # density 1/2: the first keeps 4 and 3, the second 5 and -2
        ({"density": 0.5}, [[4.0, 5.0], [-2.0, 3.0]]),
        # weights (1, 4): sums (4 + 6, -1 + 20, 0.5 - 8, 3 - 4) elect +, +, -, -; (4 + 4 * 1.5) / 5 = 2; 5; -2; -1
        ({"density": 1, "weights": [1, 4]}, [[2.0, 5.0], [-2.0, -1.0]]),
        ({"density": 1, "weights": [0.2, 0.8]}, [[2.0, 5.0], [-2.0, -1.0]]),  # only their ratio counts
        # weights (1, -4) turn the second around: (4 - 6, -1 - 20, 0.5 + 8, 3 + 4) elect -, -, +, +. The first
        # agrees everywhere but in the corner: -6 / 4 = -1.5; -21 / 5; 8.5 / 5; 7 / 5
        ({"density": 1, "weights": [1, -4]}, [[-1.5, -4.2], [1.7, 1.4]]),
    ]:
        torch.testing.assert_close(ties(first, second, **options), torch.tensor(expected).double())
    # An entry that nobody has, and exactly opposite entries, elect no sign: zero, and no 0/0.
    got = ties([[1.0, 0.0], [0.0, 2.0]], [[-1.0, 0.0], [0.0, 4.0]], density=1)
    torch.testing.assert_close(got, torch.tensor([[0.0, 0.0], [0.0, 3.0]]).double())


def test_ties_keeps_a_fifth_by_default_and_never_less_than_one_entry():
    values = torch.arange(1.0, 26.0, dtype=torch.float64).view(5, 5)
    for options, least in (({}, 20), ({"density": 0.001}, 24)):  # 25 entries, 0.2 * 25 = 5 kept
        got = ties(values.tolist(), rank=5, **options)
        torch.testing.assert_close(got, torch.where(values > least, values, 0), atol=1e-10, rtol=1e-10)


def test_ties_truncates_its_dense_answer_and_may_use_its_full_rank():
    adapters = [make(1, 1, {"m": (4, 3)}), make(2, 2, {"m": (4, 3)})]
    exact = merge_lora(adapters, method="ties", rank=3, density=0.5)  # 3 = min(4, 3), above what went in
    for rank in (None, 1):
        merged = merge_lora(adapters, method="ties", rank=rank, density=0.5)
        assert len(merged["m" + A]) == (rank or 2)
        torch.testing.assert_close(delta(merged), truncated(delta(exact), rank or 2))


@pytest.mark.parametrize("method", merge.METHODS)
def test_one_adapter_comes_back_with_its_own_delta_and_the_order_of_many_does_not_matter(method):
    adapters, weights, scales = [make(k, 2) for k in (1, 2, 3)], [0.5, 0.2, 0.3], [1.5, 2.0, 0.5]
    alone = merge_lora(adapters[:1], method=method, density=1, scales=[1.5])
    forward = merge_lora(adapters, weights, method, scales=scales)
    backward = merge_lora(adapters[::-1], weights[::-1], method, scales=scales[::-1])
    for module in SHAPES:
        own = dense(adapters, [1], [1.5], module)
        assert relative(delta(alone, module), own) < 1e-12 or method == "iso"  # which changes its spectrum
        if method != "dare":  # which draws for one adapter after the other
            torch.testing.assert_close(delta(forward, module), delta(backward, module))


@pytest.mark.parametrize("method", merge.METHODS)
def test_the_result_has_the_dtype_of_the_first_adapter_and_is_computed_in_float32(method):
    low, exact = {key: value.bfloat16() for key, value in make(1).items()}, make(2)
    merged = merge_lora([low, exact], method=method, density=1)
    full = merge_lora([{key: value.double() for key, value in low.items()}, exact], method=method, density=1)
    for key, value in full.items():
        assert (merged[key].dtype, value.dtype) == (torch.bfloat16, torch.float64)
        torch.testing.assert_close(merged[key], value.bfloat16(), atol=1e-2, rtol=1e-2)
    tracked = {key: value.requires_grad_() for key, value in make(3).items()}
    assert not any(value.requires_grad for value in merge_lora([tracked], method=method).values())


def test_adapters_that_do_not_fit_together_are_refused_by_key():
    good = make(1)
    for other, key in [
        ({key: value for key, value in good.items() if key != "block.0.to_q" + B}, "block.0.to_q"),  # no partner
        (good | {"block.0.to_q.bias": torch.zeros(7)}, "bias"),
        (good | {"block.0.to_q" + A: torch.zeros(3, 5)}, "block.0.to_q"),  # rank 3 against 2
        (good | {"block.0.to_q" + A: torch.zeros(2, 5, 1, 1)}, "block.0.to_q"),  # a convolution
        (make(2, shapes={"block.0.to_q": (7, 5)}), "block.1.to_out.0"),  # a module less, another, other sizes
        (make(2, shapes=SHAPES | {"extra": (2, 2)}), "extra"),
        (make(2, shapes=SHAPES | {"block.0.to_q": (8, 5)}), "block.0.to_q"),
        (make(2, shapes=SHAPES | {"block.0.to_q": (7, 4)}), "block.0.to_q"),
    ]:
        with pytest.raises(ValueError, match=key):
            merge_lora([good, other])


def test_options_that_fit_no_merge_are_refused():
    two = [make(1, 2), make(2, 2)]
    bad = [
        {"method": "mean"},
        {"weights": [1, 2, 3]},
        {"scales": [1]},
        {"weights": [1, math.nan]},
        {"scales": [math.inf, 1]},
    ]
    bad += [{"method": method, "rank": 2} for method in ("cat", "factor")] 
    bad += [{"method": method, "rank": rank} for method in ("svd", "iso", "knots") for rank in (0, 5)]
    bad += [{"method": "ties", "rank": 6}] + [{"method": "ties", "density": density} for density in (0, 1.5)]
    for options in bad:
        with pytest.raises(ValueError):
            merge_lora(two, **options)
    with pytest.raises(ValueError):
        merge_lora([make(1, 2, {"m": (2, 3)}), make(2, 3, {"m": (2, 3)})], rank=3)  # of 2 rows
    with pytest.raises(ValueError):
        merge_lora([])
    with pytest.raises(ValueError, match="ranks"):
        merge_lora([make(1, 2), make(2, 3)], method="factor")


def test_cat_and_svd_agree_with_peft_and_linear_is_shown_wrong():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    configs = [
        peft.LoraConfig(r=2, lora_alpha=alpha, target_modules=["0"], init_lora_weights=False) for alpha in (4, 3)
    ]  # scales alpha / r = 2 and 1.5
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(5, 7, bias=False)), configs[0], adapter_name="one")
    model.add_adapter("two", configs[1])
    states = [peft.get_peft_model_state_dict(model, adapter_name=name) for name in ("one", "two")]
    module = next(iter(states[0])).removesuffix(A)
    weights, scales, x = [0.7, 0.4], [2.0, 1.5], torch.randn(11, 5)
    base = model.base_model.model[0].base_layer(x)
    exact = dense(states, weights, scales, module).float()
    for ours, theirs in (("cat", "cat"), ("svd", "svd"), ("factor", "linear")):
        model.add_weighted_adapter(["one", "two"], weights, "merged_" + theirs, combination_type=theirs)
        model.set_adapter("merged_" + theirs)
        update = (model(x) - base).detach()  # (11, 7), PEFT's own forward with its own scaling
        merged = delta(merge_lora(states, weights, ours, scales=scales), module).float()
        if ours == "factor":  # neither average of factors is the average of the updates
            assert relative(update, x @ exact.T) > 0.4 and relative(merged, exact) > 0.4
        else:
            torch.testing.assert_close(x @ merged.T, update, atol=1e-5, rtol=1e-5)
            assert relative(update, x @ (truncated(exact, 2) if ours == "svd" else exact).T) < 1e-5
