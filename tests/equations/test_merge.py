"""Oracles for merge.py: dense algebra, Eckart-Young, PEFT's own merge, and worked 2 x 2 examples."""

import math

import pytest
import torch

import merge
from merge import delta, merge_lora

A, B = merge.SUFFIX_A, merge.SUFFIX_B
SHAPES = {"block.0.to_q": (7, 5), "block.1.to_out.0": (6, 9)}  # module -> (out, in)


def make(seed, rank=2, shapes=SHAPES, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    state = {}
    for module, (out, inn) in shapes.items():
        state[module + A] = torch.randn(rank, inn, generator=g, dtype=torch.float64).to(dtype)
        state[module + B] = torch.randn(out, rank, generator=g, dtype=torch.float64).to(dtype)
    return state


def pair(matrix):
    """A square matrix as an adapter of full rank: B = matrix, A = identity."""
    matrix = torch.tensor(matrix, dtype=torch.float64)
    return {"m" + A: torch.eye(len(matrix), dtype=torch.float64), "m" + B: matrix}


def dense(adapters, weights, scales, module):
    return sum(w * s * a[module + B].double() @ a[module + A].double() for a, w, s in zip(adapters, weights, scales))


def truncated(matrix, rank):
    u, s, vh = torch.linalg.svd(matrix)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def relative(a, b):
    return float((a - b).norm() / b.norm())


def test_delta_is_scale_times_b_times_a_by_hand():
    # B = (1, 2)^T, A = (3, 4, 5): B A = [[3, 4, 5], [6, 8, 10]]
    adapter = {"m" + A: torch.tensor([[3.0, 4.0, 5.0]]), "m" + B: torch.tensor([[1.0], [2.0]])}
    assert delta(adapter)["m"].tolist() == [[3, 4, 5], [6, 8, 10]]
    assert delta(adapter, 0.5)["m"].tolist() == [[1.5, 2, 2.5], [3, 4, 5]]
    half = {key: value.bfloat16() for key, value in adapter.items()}
    assert delta(half)["m"].dtype == torch.float32
    adapter["m" + B].requires_grad_()
    delta(adapter)["m"].sum().backward()
    assert adapter["m" + B].grad.tolist() == [[12], [12]]  # d/dB_o sum = 3 + 4 + 5


def test_cat_is_the_dense_weighted_sum_and_its_rank_adds_up():
    adapters, weights, scales = [make(1, 2), make(2, 3), make(3, 1)], [0.2, -0.5, 1.7], [2.0, 0.5, 3.0]
    merged = merge_lora(adapters, weights, "cat", scales=scales)
    assert set(merged) == set(adapters[0])
    for module, (out, inn) in SHAPES.items():
        assert merged[module + A].shape == (6, inn) and merged[module + B].shape == (out, 6)
        assert relative(delta(merged)[module], dense(adapters, weights, scales, module)) < 1e-6


def test_the_default_is_the_unscaled_mean_by_svd_at_the_largest_input_rank():
    adapters = [make(1, 2), make(2, 3), make(4, 1)]
    merged = merge_lora(adapters)
    for module in SHAPES:
        mean = dense(adapters, [1 / 3] * 3, [1] * 3, module)
        assert len(merged[module + A]) == 3
        assert relative(delta(merged)[module], truncated(mean, 3)) < 1e-12


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_svd_is_the_eckart_young_truncation_of_the_dense_sum(rank):
    adapters, weights, scales = [make(5, 2), make(6, 3)], [0.3, 0.9], [2.0, 0.5]
    merged = merge_lora(adapters, weights, "svd", rank=rank, scales=scales)
    for module, (out, inn) in SHAPES.items():
        matrix = dense(adapters, weights, scales, module)
        assert merged[module + A].shape == (rank, inn) and merged[module + B].shape == (out, rank)
        assert relative(delta(merged)[module], truncated(matrix, rank)) < 1e-12
        # Eckart-Young: what is lost is exactly the tail of the singular values
        tail = torch.linalg.svdvals(matrix)[rank:].square().sum().sqrt()
        torch.testing.assert_close((delta(merged)[module] - matrix).norm(), tail, atol=1e-12, rtol=1e-12)


def test_svd_at_the_sum_of_the_ranks_is_exact():
    adapters = [make(5, 2), make(6, 3)]
    for module, merged in delta(merge_lora(adapters, rank=5)).items():
        assert relative(merged, dense(adapters, [0.5, 0.5], [1, 1], module)) < 1e-12


def test_svd_works_where_the_stacked_rank_exceeds_the_layer():
    # out = 2 and in = 3 against a stacked rank of 5: both QR factors are wide, and only 2 singular values
    # can remain
    shapes = {"m": (2, 3)}
    adapters = [make(1, 2, shapes), make(2, 3, shapes)]
    merged = merge_lora(adapters)
    assert merged["m" + A].shape == (2, 3) and merged["m" + B].shape == (2, 2)
    assert relative(delta(merged)["m"], dense(adapters, [0.5, 0.5], [1, 1], "m")) < 1e-12
    tall = [make(1, 2, {"m": (9, 3)}), make(2, 3, {"m": (9, 3)})]  # in = 3 only
    assert relative(delta(merge_lora(tall))["m"], dense(tall, [0.5, 0.5], [1, 1], "m")) < 1e-12


@pytest.mark.parametrize("method", ["svd", "ties"])
def test_the_factors_are_balanced_and_their_signs_are_fixed(method):
    adapters = [make(7, 3), make(8, 2)]
    merged = merge_lora(adapters, method=method, rank=2)
    for module in SHAPES:
        a, b = merged[module + A], merged[module + B]
        singular = torch.linalg.svdvals(b @ a)[:2]
        torch.testing.assert_close(a @ a.T, torch.diag(singular))  # |A_i|^2 = |B_i|^2 = s_i, orthogonal
        torch.testing.assert_close(b.T @ b, torch.diag(singular))
        for column in b.T:
            assert column[column.abs().argmax()] > 0
    negated = [{key: -value for key, value in adapter.items()} for adapter in adapters]  # (-B)(-A) = B A
    for key, value in merge_lora(negated, method=method, rank=2).items():
        torch.testing.assert_close(value, merged[key])


def test_factor_is_the_average_of_each_factor_by_hand_and_no_average_of_deltas():
    # rank 1: A = (1, 0), (0, 1); B = (2, 0)^T, (0, 4)^T. Mean of the deltas = diag(1, 2).
    # mean A = (1/2, 1/2), mean B = (1, 2)^T: their product [[.5, .5], [1, 1]].
    one = {"m" + A: torch.tensor([[1.0, 0.0]]), "m" + B: torch.tensor([[2.0], [0.0]])}
    two = {"m" + A: torch.tensor([[0.0, 1.0]]), "m" + B: torch.tensor([[0.0], [4.0]])}
    assert delta(merge_lora([one, two], method="factor"))["m"].tolist() == [[0.5, 0.5], [1, 1]]
    assert delta(merge_lora([one, two], method="cat"))["m"].tolist() == [[1, 0], [0, 2]]
    # weights (1, 2) and scales (3, 1/4): A = (1, 2); B = 1 * 3 * (2, 0) + 2 * 1/4 * (0, 4) = (6, 2)
    merged = merge_lora([one, two], [1, 2], "factor", scales=[3, 0.25])
    assert merged["m" + A].tolist() == [[1, 2]] and merged["m" + B].tolist() == [[6], [2]]


@pytest.mark.parametrize("count", [2, 3])
def test_the_error_of_factor_on_random_factors_is_sqrt_one_minus_one_over_k(count):
    # Independent random factors make the K^2 products B_j A_k orthogonal to O(1 / sqrt(out in)): 1 % here.
    shapes = {"m": (120, 110)}
    adapters = [make(seed, 4, shapes) for seed in range(count)]
    mean = dense(adapters, [1 / count] * count, [1] * count, "m")
    error = relative(delta(merge_lora(adapters, method="factor"))["m"], mean)
    assert error > 0.5
    assert abs(error - math.sqrt(1 - 1 / count)) < 0.03
    assert relative(delta(merge_lora(adapters, method="cat"))["m"], mean) < 1e-12


def ties(*matrices, weights=None, **options):
    return delta(merge_lora([pair(m) for m in matrices], weights, "ties", rank=2, **options))["m"]


def test_ties_by_hand_on_conflicting_signs():
    first, second = [[4.0, -1.0], [0.5, 3.0]], [[2.0, 5.0], [-2.0, -1.0]]
    # density 1, weights 1/2 each. Signs of the sums (6, 4, -1.5, 2): +, +, -, +. Averages of those that
    # agree: (4 + 2) / 2 = 3; 5 alone; -2 alone; 3 alone.
    torch.testing.assert_close(ties(first, second, density=1), torch.tensor([[3.0, 5.0], [-2.0, 3.0]]).double())
    # density 1/2: the first keeps 4 and 3, the second (1.5 for its 2, so that no two magnitudes tie) 5 and -2
    second = [[1.5, 5.0], [-2.0, -1.0]]
    torch.testing.assert_close(ties(first, second, density=0.5), torch.tensor([[4.0, 5.0], [-2.0, 3.0]]).double())
    # weights (1, 4): sums (4 + 6, -1 + 20, 0.5 - 8, 3 - 4) elect +, +, -, -; (4 + 4 * 1.5) / 5 = 2; 5; -2; -1
    got = ties(first, second, weights=[1, 4], density=1)
    torch.testing.assert_close(got, torch.tensor([[2.0, 5.0], [-2.0, -1.0]]).double())
    # weights (1, -4) turn the second around: (4 - 6, -1 - 20, 0.5 + 8, 3 + 4) elect -, -, +, +. The first
    # agrees everywhere but in the corner: -6 / 4 = -1.5; -21 / 5; 8.5 / 5; 7 / 5
    got = ties(first, second, weights=[1, -4], density=1)
    torch.testing.assert_close(got, torch.tensor([[-1.5, -4.2], [1.7, 1.4]]).double())


def test_ties_uses_the_ratios_of_the_weights_only_and_leaves_untouched_entries_zero():
    first, second = [[4.0, 0.0], [0.5, 3.0]], [[2.0, 0.0], [-2.0, -1.0]]
    once, thrice = (ties(first, second, weights=w, density=1) for w in ([0.2, 0.4], [0.6, 1.2]))
    torch.testing.assert_close(once, thrice)
    assert abs(float(once[0, 1])) < 1e-12 and torch.isfinite(once).all()
    # exactly opposite entries elect no sign: nobody agrees and the entry is zero
    assert float(ties([[1.0, 0.0], [0.0, 2.0]], [[-1.0, 0.0], [0.0, 2.0]], density=1)[0, 0]) == pytest.approx(0)


def test_ties_keeps_a_fifth_by_default_and_never_less_than_one_entry():
    values = torch.arange(1.0, 26.0, dtype=torch.float64).view(5, 5)
    adapter = pair(values.tolist())
    by_default = delta(merge_lora([adapter], method="ties", rank=5))["m"]
    expected = torch.where(values > 20, values, 0)  # 25 entries, 0.2 * 25 = 5 kept
    torch.testing.assert_close(by_default, expected, atol=1e-10, rtol=1e-10)
    single = delta(merge_lora([adapter], method="ties", rank=5, density=0.001))["m"]
    torch.testing.assert_close(single, torch.where(values > 24, values, 0), atol=1e-10, rtol=1e-10)


def test_ties_truncates_its_dense_answer_and_may_use_its_full_rank():
    shapes = {"m": (4, 3)}
    adapters = [make(1, 1, shapes), make(2, 2, shapes)]
    exact = delta(merge_lora(adapters, method="ties", rank=3, density=0.5))["m"]  # rank 3 = min(4, 3) < 4
    for rank, merged in ((2, merge_lora(adapters, method="ties", density=0.5)), (1, None)):
        merged = merged or merge_lora(adapters, method="ties", rank=rank, density=0.5)
        assert len(merged["m" + A]) == rank
        torch.testing.assert_close(delta(merged)["m"], truncated(exact, rank))


def test_ties_may_raise_the_rank_above_the_sum_of_the_ranks_where_svd_has_nothing_to_add():
    adapter = make(1, 1, {"m": (4, 3)})
    assert len(merge_lora([adapter], method="ties", rank=3)["m" + A]) == 3
    with pytest.raises(ValueError, match="rank=3 is out of range: m allows 1 to 1 under 'svd'"):
        merge_lora([adapter], method="svd", rank=3)


@pytest.mark.parametrize("method", merge.METHODS)
def test_one_adapter_comes_back_with_its_own_delta(method):
    adapter = make(3, 2)
    merged = merge_lora([adapter], method=method, density=1, scales=[1.5])
    for module, value in delta(adapter, 1.5).items():
        assert relative(delta(merged)[module], value) < 1e-12


@pytest.mark.parametrize("method", merge.METHODS)
def test_the_order_of_the_adapters_does_not_matter(method):
    adapters, weights, scales = [make(k, 2) for k in (1, 2, 3)], [0.5, 0.2, 0.3], [1.0, 2.0, 0.5]
    forward = delta(merge_lora(adapters, weights, method, scales=scales))
    backward = delta(merge_lora(adapters[::-1], weights[::-1], method, scales=scales[::-1]))
    for module in forward:
        torch.testing.assert_close(forward[module], backward[module])


@pytest.mark.parametrize("method", merge.METHODS)
def test_the_result_has_the_dtype_of_the_first_adapter_and_is_computed_in_float32(method):
    exact = [make(k, 2) for k in (1, 2)]
    half = [{key: value.bfloat16() for key, value in adapter.items()} for adapter in exact]
    merged = merge_lora([half[0], exact[1]], method=method, density=1)
    assert {value.dtype for value in merged.values()} == {torch.bfloat16}
    as_float = [{key: value.double() for key, value in adapter.items()} for adapter in half]
    for key, value in merge_lora([as_float[0], exact[1]], method=method, density=1).items():
        torch.testing.assert_close(merged[key], value.bfloat16(), atol=1e-2, rtol=1e-2)
    merged = merge_lora([exact[0], half[1]], method=method)
    assert {value.dtype for value in merged.values()} == {torch.float64}
    assert not any(
        value.requires_grad
        for value in merge_lora(
            [{key: value.clone().requires_grad_() for key, value in exact[0].items()}], method=method
        ).values()
    )


def test_half_precision_factors_multiply_in_float32():
    adapter = {"m" + A: torch.tensor([[1.0, 1 + 2**-7]]).bfloat16(), "m" + B: torch.tensor([[1 + 2**-7]]).bfloat16()}
    assert delta(adapter)["m"].tolist() == [[1 + 2**-7, (1 + 2**-7) ** 2]]  # (1 + 2^-7)^2 does not fit bfloat16


def test_mismatched_adapters_are_refused_by_name():
    good = make(1)
    with pytest.raises(ValueError, match="at least one adapter"):
        merge_lora([])
    with pytest.raises(ValueError, match=r"adapters 1 and 0 have different modules.*block\.1\.to_out\.0"):
        merge_lora([good, make(2, shapes={"block.0.to_q": (7, 5)})])
    with pytest.raises(ValueError, match=r"adapters 1 and 0 have different modules.*'extra'"):
        merge_lora([good, make(2, shapes=SHAPES | {"extra": (2, 2)})])
    for missing, left in ((A, B), (B, A)):
        unpaired = {key: value for key, value in good.items() if key != "block.0.to_q" + missing}
        with pytest.raises(ValueError, match=f"adapter 1: 'block.0.to_q{left}' has no partner"):
            merge_lora([good, unpaired])
    with pytest.raises(ValueError, match="adapter 2: 'block.0.to_q.bias' is no LoRA factor"):
        merge_lora([good, good, good | {"block.0.to_q.bias": torch.zeros(7)}])
    with pytest.raises(ValueError, match="adapter 0: 'alpha' is no LoRA factor"):
        delta({"alpha": torch.ones(())})
    for out, inn in ((8, 5), (7, 4)):
        with pytest.raises(ValueError, match=rf"adapter 1: 'block.0.to_q' updates \({out}, {inn}\) .* 0's \(7, 5\)"):
            merge_lora([good, make(2, shapes=SHAPES | {"block.0.to_q": (out, inn)})])
    with pytest.raises(ValueError, match=r"adapter 0: 'm' needs A .*, got \(3, 4\), \(5, 2\)"):
        merge_lora([{"m" + A: torch.zeros(3, 4), "m" + B: torch.zeros(5, 2)}])
    with pytest.raises(ValueError, match=r"adapter 0: 'm' needs A .*, got \(3, 4, 1, 1\), \(5, 3\)"):
        merge_lora([{"m" + A: torch.zeros(3, 4, 1, 1), "m" + B: torch.zeros(5, 3)}])
    with pytest.raises(ValueError, match=r"adapter 0: 'm' needs A .*, got \(3, 4\), \(5, 3, 1\)"):
        merge_lora([{"m" + A: torch.zeros(3, 4), "m" + B: torch.zeros(5, 3, 1)}])


def test_bad_options_are_refused_by_name():
    two = [make(1, 2), make(2, 2)]
    with pytest.raises(ValueError, match=r"unknown merge method 'mean'; choose one of \('cat', 'svd', 'ties', 'fac"):
        merge_lora(two, method="mean")
    with pytest.raises(ValueError, match="3 weights for 2 adapters"):
        merge_lora(two, [1, 2, 3])
    with pytest.raises(ValueError, match="1 scales for 2 adapters"):
        merge_lora(two, scales=[1])
    with pytest.raises(ValueError, match="weights must be finite"):
        merge_lora(two, [1, float("nan")])
    with pytest.raises(ValueError, match="scales must be finite"):
        merge_lora(two, scales=[float("inf"), 1])
    for method in ("cat", "factor"):
        with pytest.raises(ValueError, match=f"rank=2 was given, but '{method}' fixes the rank"):
            merge_lora(two, method=method, rank=2)
    for rank in (0, 5):
        with pytest.raises(ValueError, match=f"rank={rank} is out of range: block.0.to_q allows 1 to 4 under 'svd'"):
            merge_lora(two, rank=rank)
    with pytest.raises(ValueError, match="rank=6 is out of range: block.0.to_q allows 1 to 5 under 'ties'"):
        merge_lora(two, method="ties", rank=6)
    with pytest.raises(ValueError, match=r"'factor' cannot average unequal ranks: block.0.to_q has \[2, 3\]"):
        merge_lora([make(1, 2), make(2, 3)], method="factor")
    for density in (0, -0.5, 1.5):
        with pytest.raises(ValueError, match=r"density must lie in \(0, 1\]"):
            merge_lora(two, method="ties", density=density)


def test_cat_and_svd_agree_with_peft_and_linear_is_shown_wrong():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7, bias=False))
    configs = [
        peft.LoraConfig(r=2, lora_alpha=alpha, target_modules=["0"], init_lora_weights=False) for alpha in (4, 3)
    ]  # scales alpha / r = 2 and 1.5
    model = peft.get_peft_model(model, configs[0], adapter_name="one")
    model.add_adapter("two", configs[1])
    states = [peft.get_peft_model_state_dict(model, adapter_name=name) for name in ("one", "two")]
    (module,) = delta(states[0])
    weights, scales, x = [0.7, 0.4], [2.0, 1.5], torch.randn(11, 5)
    base = model.base_model.model[0].base_layer(x)
    exact = dense(states, weights, scales, module).float()
    for ours, theirs, close in (("cat", "cat", True), ("svd", "svd", True), ("factor", "linear", False)):
        name = "merged_" + theirs
        model.add_weighted_adapter(["one", "two"], weights, name, combination_type=theirs)
        model.set_adapter(name)
        update = (model(x) - base).detach()  # (11, 7), PEFT's own forward with its own scaling
        merged = delta(merge_lora(states, weights, ours, scales=scales))[module]
        target = truncated(exact, 2) if ours == "svd" else exact
        if close:
            torch.testing.assert_close(x @ merged.T, update, atol=1e-5, rtol=1e-5)
            assert relative(update, x @ target.T) < 1e-5
        else:  # neither average of factors is the average of the updates
            assert relative(update, x @ exact.T) > 0.4 and relative(merged, exact) > 0.4
