"""A small arena, packed stores in it, and the segments of a step of ten rows."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from deltamux_kernels.packed import ALIGNMENT, PackedMatrices
from deltamux_kernels.segments import Segments

SLOTS = 4


@pytest.fixture
def arena() -> torch.Tensor:
    return torch.zeros(1 << 14)


@pytest.fixture
def store(arena: torch.Tensor) -> Callable[[int], PackedMatrices]:
    return lambda width: PackedMatrices(arena, SLOTS, width)


@pytest.fixture
def place() -> Callable[..., None]:
    """place(bank, {slot: payload}): what DeviceSites does, for a bank that is alone."""
    end = 0

    def place(bank: object, payloads: dict[int, object]) -> None:
        nonlocal end
        for slot, payload in payloads.items():
            for target, matrix in bank.pieces(payload):  # type: ignore[attr-defined]
                extent = math.lcm(ALIGNMENT, target.width)
                offset = -(-end // extent) * extent
                target.write(slot, offset, matrix)
                end = offset + matrix.numel()
            bank.placed(slot, [0] * 2)  # type: ignore[attr-defined]

    return place


@pytest.fixture
def segments() -> Segments:
    """Rows 2..4 of slot 1, 4..5 of slot 3 (empty in the tests), 6..10 of slot 0."""
    return Segments.build([(1, 2, 4), (3, 4, 5), (0, 6, 10)], torch.device("cpu"))
