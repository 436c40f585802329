"""What tests of user errors share."""

import pytest

from models.hub import ModelError


def refusal(call, *arguments, error=ModelError, **more) -> str:
    """The message of the error that a call gives; it is one line."""
    with pytest.raises(error) as raised:
        call(*arguments, **more)
    assert "\n" not in str(raised.value)
    return str(raised.value)
