"""What the tests of models share: the error of one line, differences to stock pipelines, and changed files."""

import json

import pytest
import safetensors.torch
from safetensors import safe_open

from models.hub import ModelError


def refusal(call, *arguments, error=ModelError, **more) -> str:
    """The message of the error that a call gives; it is one line."""
    with pytest.raises(error) as raised:
        call(*arguments, **more)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def gap(a, b) -> float:
    return (a - b).abs().max().item()


def shown(*images):
    """Pictures (3, H, W) as the sources of an edit."""
    from data.pictures import Source

    return tuple(Source(f"{tuple(i.shape)} {hash(i.numpy().tobytes())}", lambda i=i: i) for i in images)


def relative(found, expected) -> float:
    """The largest distance of a row, as a share of the expected row's length."""
    return ((found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)).max().item()


def five_velocities(model, rounded=False):
    """v of five samples at five times, without gradient, float32.

    bfloat16 would round all of the times. `rounded`: the times that the stock Qwen-Image makes of them in bfloat16.
    """
    import torch

    from models.flow import Cond

    config, rng = model.transformer.config, torch.Generator().manual_seed(0)
    x = torch.randn(5, *model.latent_shape, generator=rng)
    width = config["context_in_dim" if "context_in_dim" in config else "joint_attention_dim"]
    tokens, pooled = torch.randn(5, 7, width, generator=rng), None
    if "pooled_projection_dim" in config:
        pooled = torch.randn(5, config.pooled_projection_dim, generator=rng)
    t = torch.tensor([0.9009, 0.7071, 0.5005, 0.2777, 0.0091])
    t = ((1000 * t).bfloat16() / 1000).float() if rounded else t
    with torch.no_grad():
        return model.velocity(x, t, Cond(tokens, pooled))


def parity(what: str, found, expected) -> None:
    """Two results of the same arithmetic in float32; the largest difference is printed (`pytest -s`)."""
    size = max(1.0, expected.abs().max().item())
    print(f"\nparity {what}: {gap(found, expected):.1e} of {size:.2f}")
    assert gap(found, expected) < 1e-5 * size


def edit_tensors(file, change, **more) -> None:
    """Rewrite a weight file: `change` edits {key: tensor} in place; the metadata stays, but for `more`."""
    with safe_open(file, "pt") as opened:
        metadata = {**(opened.metadata() or {}), **more}
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file(tensors, file, metadata=metadata)


def edit_json(file, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
