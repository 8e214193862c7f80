"""The batch in which each adapter is held to PEFT."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

# Leave nothing of the base's answer to rounding: an adapter must move its logits by more.
LEAST_EFFECT = 0.1


@pytest.fixture
def as_in_peft(
    serve: Callable[..., Any], reference: Callable[..., Tensor], ids: Tensor
) -> Callable[[str, Sequence[Path]], None]:
    """as_in_peft(name, folders): asserts it of each in one batch with a row without adapter."""

    def as_in_peft(name: str, folders: Sequence[Path]) -> None:
        served = serve(name)
        for slot, folder in enumerate(folders):
            served.load(slot, folder)
        slots = [None, *range(len(folders))]
        plain = served.logits(ids[: len(slots)], [None] * len(slots))
        mixed = served.logits(ids[: len(slots)], slots)
        assert torch.equal(mixed[0], plain[0])
        for row, folder in enumerate(folders, start=1):
            expected = reference(name, folder, ids[row : row + 1])[0]
            assert (expected - plain[row]).abs().max() > LEAST_EFFECT
            torch.testing.assert_close(mixed[row], expected, atol=3e-5, rtol=1e-5)

    return as_in_peft
