"""Low-rank matrices in 16 bits where these hold the same numbers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from deltamux.adapters.primitives.low_rank import LowRank
from deltamux.adapters.primitives.payload import Payload


def in_exact_halves(
    payloads: Mapping[str, tuple[Payload, ...]],
) -> dict[str, tuple[Payload, ...]]:
    """The same payloads, float32 matrices of bfloat16 numbers as bfloat16: nothing is rounded."""
    return {name: tuple(_in_half(payload) for payload in each) for name, each in payloads.items()}


def _in_half(payload: Payload) -> Payload:
    if not isinstance(payload, LowRank):
        return payload
    return LowRank(_narrowest(payload.a), _narrowest(payload.b))


def _narrowest(matrix: Tensor) -> Tensor:
    if matrix.dtype != torch.float32:
        return matrix
    # A bfloat16 number is the upper half of a float whose lower half is zero.
    lower = matrix.view(torch.int32) & 0xFFFF
    return matrix if lower.any() else matrix.bfloat16()
