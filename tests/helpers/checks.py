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


def parity(what: str, found, expected) -> None:
    """Two results of the same arithmetic in float32; the largest difference is printed (`pytest -s`)."""
    size = max(1.0, expected.abs().max().item())
    print(f"\nparity {what}: {gap(found, expected):.1e} of {size:.2f}")
    assert gap(found, expected) < 1e-5 * size


def edit_tensors(file, change) -> None:
    """Rewrite a weight file: `change` edits {key: tensor} in place; the metadata stays."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file(tensors, file, metadata=metadata)


def edit_json(file, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
