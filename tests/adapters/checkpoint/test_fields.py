"""What a field that is missing says, and what one that is null does."""

from __future__ import annotations

import pytest

from deltamux.adapters.checkpoint.fields import Fields
from deltamux.errors import DeltamuxError


@pytest.mark.parametrize("default", [True, False])
def test_a_missing_switch_has_its_default_and_null_is_off(default: bool) -> None:
    assert Fields({}).take_bool("on", default) is default
    assert Fields({"on": None}).take_bool("on", default) is False


@pytest.mark.parametrize("value", [0, 1, "", "true", []])
def test_a_switch_is_true_or_false(value: object) -> None:
    with pytest.raises(DeltamuxError) as caught:
        Fields({"on": value}).take_bool("on", True)
    assert caught.value.reason == "BAD_FIELD"


def test_a_field_that_nobody_took_may_be_null_alone() -> None:
    Fields({"new": None}).require_none_left()
    with pytest.raises(DeltamuxError) as caught:
        Fields({"new": False}).require_none_left()
    assert caught.value.reason == "UNKNOWN_FIELD"
