"""bench.py makes the figures of the README: what it counts is counted here by hand, on shapes that take a blink."""

import math

import pytest

import bench

SMALL = {
    "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "caption_projection_dim": 32,
    "joint_attention_dim": 48, "pooled_projection_dim": 32, "patch_size": 2, "in_channels": 16, "out_channels": 16,
    "dual_attention_layers": (), "qk_norm": None, "pos_embed_max_size": 12, "sample_size": 8,
}  # fmt: skip


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
    assert bench.forward_flops(SMALL, 64, 10) == flops


@pytest.mark.parametrize("more", [[], ["--parameters", "full"], ["--precision", "bfloat16", "--no-single-pass"]])
def test_a_step_of_real_shapes_is_timed_on_random_weights(capsys, more):
    flags = "--resolution 64 --text-length 10 --num-steps 3 --window 0:2 --prompts-per-step 3 --group-size 2"
    flags = [*flags.split(), *"--micro-batch 3 --threads 1 --rank 4 --device cpu --precision float32".split(), *more]
    found = bench.step(*flags, config=SMALL, rounds=1)
    a_row = bench.forward_flops(SMALL, 64, 10)
    # 12 rows (6 trajectories with guidance), three steps of which two train: the student's, the teachers' 4 rows of 6
    # that the anchor does not teach, and the anchor's 6; in a stored trajectory the student walks all three before.
    free = 3 if "--no-single-pass" in more else 1
    back = 2 if "full" in more else 1
    assert found["flops"] == a_row * 2 * (6 * 2 * (1 + back) + 6 * free + 4 * 2 + 6 * 2)
    assert 0 < found["seconds"] < 60 and math.isfinite(found["seconds"])
    assert "processor, 6 trajectories a step and rank" in capsys.readouterr().out


def test_a_spread_is_the_mean_and_the_sample_deviation():
    assert bench.spread([1.0, 2.0, 3.0]) == "2.000 ± 1.000"
