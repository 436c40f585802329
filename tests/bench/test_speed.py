"""bench/speed.py: what it counts is counted here by hand, on shapes that take a blink."""

import pytest

from bench import speed as bench

SMALL = {
    "_class_name": "SD3Transformer2DModel",
    "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "caption_projection_dim": 32,
    "joint_attention_dim": 48, "pooled_projection_dim": 32, "patch_size": 2, "in_channels": 16, "out_channels": 16,
    "dual_attention_layers": (), "qk_norm": None, "pos_embed_max_size": 12, "sample_size": 8,
}  # fmt: skip
SMALL_QWEN = {
    "_class_name": "QwenImageTransformer2DModel", "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16,
    "joint_attention_dim": 48, "patch_size": 2, "in_channels": 64, "out_channels": 16, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip


SMALL_21 = {
    "_class_name": "QwenImage21Transformer2DModel", "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16,
    "context_in_dim": 48, "patch_size": 1, "in_channels": 6, "out_channels": 6, "mlp_ratio": 3,
    "axes_dims_rope": (4, 6, 6), "causal_condition": True,
}  # fmt: skip


def counted(config, line, *args):
    return bench.forward_flops(bench.parsed(*"--resolution 64 --text-length".split(), *line.split()), config, *args)


def test_the_flops_of_a_forward_are_those_of_its_products():
    """Two FLOPs a multiplication of every linear layer and of attention's two products, by hand."""
    w, image, text = 32, 16, 77 + 10
    tokens = image + text
    expected = 2 * image * 16 * 4 * w  # patches in
    expected += 2 * (256 * w + w * w) + 2 * (w * w + w * w)  # time, pooled text
    expected += 2 * text * 48 * w
    for last in (False, True):
        expected += 2 * w * 6 * w + 2 * w * (2 if last else 6) * w  # adaptive norms
        expected += 2 * image * 4 * w * w + 2 * text * (3 if last else 4) * w * w  # projections
        expected += 2 * 2 * tokens * tokens * w  # q k^T and its product with v
        expected += 2 * (image if last else tokens) * 2 * 4 * w * w  # feed-forward
    expected += 2 * w * 2 * w + 2 * image * w * 4 * 16  # last norm, patches out
    assert counted(SMALL, "10") == expected


def test_the_flops_of_a_qwen_forward_are_those_of_its_products_sources_included():
    """As above; the tokens of an edit's source go all the way, and the last block does as much as the others."""
    w, image = 32, 16
    found = []
    for source, text in ((0, 21), (16, 21 + 196)):  # 48 pixels a side are 64: 4 x 4 tokens, and 196 in the text
        pictures, flops = image + source, 2 * (256 * w + w * w)
        flops += 2 * pictures * 64 * w + 2 * text * 48 * w  # patches and text in
        flops += 2 * 2 * 2 * w * 6 * w  # two layers' norms of both streams
        flops += 2 * 2 * 4 * (pictures + text) * w * w  # projections
        flops += 2 * 2 * 2 * (pictures + text) ** 2 * w  # q k^T and its product with v
        flops += 2 * 2 * (pictures + text) * 2 * 4 * w * w  # feed-forward
        flops += 2 * w * 2 * w + 2 * pictures * w * 64  # last norm, patches out
        found.append(flops)
    assert [counted(SMALL_QWEN, "21 --preset qwen-rl --source-resolution 48", edit) for edit in (0, 1)] == found


def test_the_flops_of_a_forward_of_qwen_2_1_with_and_without_a_known_prefix():
    """Of a known prefix only the way in is computed again. Attention is masked: a token of the text sees those of the
    text before it, and here the whole run is multiplied."""
    w, image, text, source, slots = 32, 16, 21, 36, 9  # a source of 96 pixels a side
    for edit, known in ((0, 0), (0, 1), (1, 0), (1, 1)):
        prefix = text + source * edit
        runs = [(source, source), (text, prefix)] if edit else [(text, text)]  # (queries, keys) of the prefix
        tokens, runs = (image, []) if known else (image + prefix, runs)
        expected = 2 * (image + source * edit) * 6 * w + 2 * (text + slots * edit) * (48 * w + w * w)  # pictures, text
        expected += (
            2 * 2 * (256 * w + w * w) + 2 * 2 * w * 4 * w + 2 * 2 * w * w
        )  # times t and 0: embedded, modulations
        expected += 2 * 2 * tokens * (4 * w * w + 3 * w * 3 * w)  # two layers' projections, feed-forward with a gate
        expected += 2 * 2 * 2 * w * (image * (image + prefix) + sum(q * k for q, k in runs))
        expected += 2 * tokens * w * 6
        assert counted(SMALL_21, "21 --preset qwen-rl --source-resolution 96", edit, known) == expected, (edit, known)


def test_a_step_of_qwen_2_1_is_timed_with_and_without_kept_prefixes(capsys):
    flags = "--preset qwen-rl --resolution 64 --text-length 21 --num-steps 3 --prompts-per-step 2 --group-size 2"
    flags += " --micro-batch 2 --rank 4 --device cpu --precision float32"
    found = bench.step(*flags.split(), config=SMALL_21, rounds=1)
    whole, rest = (
        sum(counted(SMALL_21, "21 --preset qwen-rl", edit, known) for edit in (0, 1)) / 2 for known in (0, 1)
    )
    assert [(row["states"], row["kept"]) for row in found] == [(0, True), (0, False), (1, True), (1, False)]
    # Two rows of each task, three ODE steps, all teach. Of the guided teachers' forwards the first ones are whole.
    assert found[0]["flops"] == pytest.approx(4 * (3 * 2 * whole + 2 * (whole + 2 * rest)))
    assert found[1]["flops"] == pytest.approx(4 * (3 * 2 + 3 * 2) * whole)
    said = capsys.readouterr().out
    assert said.count("prefixes kept") == said.count("every forward whole") == 2


@pytest.mark.parametrize("more", [[], ["--parameters", "full"], ["--precision", "bfloat16", "--estimator", "path"]])
def test_a_step_of_real_shapes_is_timed_on_random_weights(capsys, more):
    flags = "--anchor quality --resolution 64 --text-length 10 --num-steps 3 --window 0:2 --prompts-per-step 3"
    flags += " --group-size 2"
    flags = [*flags.split(), *"--micro-batch 3 --device cpu --precision float32".split(), *more]
    found = bench.step(*flags, config=SMALL, rounds=1)
    a_row = counted(SMALL, "10")
    # 12 rows (6 trajectories with guidance), three steps of which two train: the student's, the teachers' 4 rows of 6
    # that the anchor does not teach, and the anchor's 6; in a stored trajectory the student walks those two before.
    free = 2 if "path" in more else 0
    back = 2 if "full" in more else 1
    assert found[0]["flops"] == a_row * 2 * (6 * 2 * (1 + back) + 6 * free + 4 * 2 + 6 * 2)
    assert all(0 < some["bare"] < 60 and 0 < some["seconds"] < 60 for some in found)
    assert "processor, 6 trajectories a step and rank" in capsys.readouterr().out
