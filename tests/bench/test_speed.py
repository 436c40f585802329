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
X = (16, 8, 8)  # the latents of 64 x 64 pixels


def test_the_flops_of_a_forward_are_those_of_its_products():
    """Two FLOPs a multiplication of every linear layer and of attention's two products, by hand."""
    w, image, text = 32, 16, 77 + 10
    tokens = image + text
    flops = 2 * image * 16 * 4 * w  # patches in
    flops += 2 * (256 * w + w * w) + 2 * (w * w + w * w)  # time, pooled text
    flops += 2 * text * 48 * w
    for last in (False, True):
        flops += 2 * w * 6 * w + 2 * w * (2 if last else 6) * w  # adaptive norms
        flops += 2 * image * 4 * w * w + 2 * text * (3 if last else 4) * w * w  # projections
        flops += 2 * 2 * tokens * tokens * w  # q k^T and its product with v
        flops += 2 * (image if last else tokens) * 2 * 4 * w * w  # feed-forward
    flops += 2 * w * 2 * w + 2 * image * w * 4 * 16  # last norm, patches out
    assert bench.forward_flops(SMALL, X, text) == flops


def test_the_flops_of_a_qwen_forward_are_those_of_its_products_sources_included():
    """As above; the tokens of an edit's source go all the way, and the last block does as much as the others."""
    w, image, text = 32, 16, 21
    found = []
    for source in (0, 9):  # 48 pixels a side: 3 x 3 tokens
        pictures, flops = image + source, 2 * (256 * w + w * w)
        flops += 2 * pictures * 64 * w + 2 * text * 48 * w  # patches and text in
        flops += 2 * 2 * 2 * w * 6 * w  # two layers' norms of both streams
        flops += 2 * 2 * 4 * (pictures + text) * w * w  # projections
        flops += 2 * 2 * 2 * (pictures + text) ** 2 * w  # q k^T and its product with v
        flops += 2 * 2 * (pictures + text) * 2 * 4 * w * w  # feed-forward
        flops += 2 * w * 2 * w + 2 * pictures * w * 64  # last norm, patches out
        found.append(flops)
    assert [bench.forward_flops(SMALL_QWEN, X, text, shape) for shape in (None, (16, 6, 6))] == found


def test_a_step_on_both_of_qs_tasks_is_timed_on_random_weights(capsys):
    flags = "--preset qwen-rl --resolution 64 --source-resolution 48 --text-length 10 --num-steps 3"
    flags += " --prompts-per-step 2 --group-size 3 --micro-batch 3 --rank 4 --device cpu"
    found = bench.step(*flags.split(), "--precision", "float32", config=SMALL_QWEN, rounds=1)
    text = 10 + bench.qwen.picture_tokens(bench.EDITOR)
    a_row = (bench.forward_flops(SMALL_QWEN, X, 10) + bench.forward_flops(SMALL_QWEN, X, text, X)) / 2  # 48 is 64
    # Three rows of each task, three ODE steps: the student walks and learns without guidance, the teachers are guided.
    assert found[0]["flops"] == pytest.approx(a_row * 3 * (6 * 2 + 6 * 2))
    assert 0 < found[1]["bare"] < 60 and "processor, 6 trajectories a step and rank" in capsys.readouterr().out


@pytest.mark.parametrize("more", [[], ["--parameters", "full"], ["--precision", "bfloat16", "--estimator", "path"]])
def test_a_step_of_real_shapes_is_timed_on_random_weights(capsys, more):
    flags = "--anchor quality --resolution 64 --text-length 10 --num-steps 3 --window 0:2 --prompts-per-step 3"
    flags += " --group-size 2"
    flags = [*flags.split(), *"--micro-batch 3 --device cpu --precision float32".split(), *more]
    found = bench.step(*flags, config=SMALL, rounds=1)
    a_row = bench.forward_flops(SMALL, X, 77 + 10)
    # 12 rows (6 trajectories with guidance), three steps of which two train: the student's, the teachers' 4 rows of 6
    # that the anchor does not teach, and the anchor's 6; in a stored trajectory the student walks those two before.
    free = 2 if "path" in more else 0
    back = 2 if "full" in more else 1
    assert found[0]["flops"] == a_row * 2 * (6 * 2 * (1 + back) + 6 * free + 4 * 2 + 6 * 2)
    assert all(0 < some["bare"] < 60 and 0 < some["seconds"] < 60 for some in found.values())
    assert "processor, 6 trajectories a step and rank" in capsys.readouterr().out
