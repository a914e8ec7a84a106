"""What the soak says of memory."""

from typing import Any

import pytest

from faults.soak import MB, Soak


def rising(i: int) -> int:
    return (100 + i) * MB


def levelling_off(i: int) -> int:
    return (100 + min(i, 20)) * MB


@pytest.mark.parametrize(
    ("held", "told"), [(rising, ["generator grew from 137 to 187 MB; it may by 30"]), (levelling_off, [])]
)
def test_memory_that_grows_for_ever_is_told(held: Any, told: list[str]) -> None:
    nothing: Any = None
    soak = Soak(nothing, nothing, nothing)
    soak.memory = [(20 * MB, held(i), 80 * MB) for i in range(100)]
    assert soak.grown() == told
