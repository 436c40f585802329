"""What the tests of models share: the error of one line, and the largest difference to a stock pipeline."""

import pytest

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
