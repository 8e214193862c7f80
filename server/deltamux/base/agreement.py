"""Whether two forms of one computation agree on random input."""

from __future__ import annotations

import torch
from torch import Tensor

# The largest error of a row, relative to the row, in units of its dtype's precision. Float32 may be
# summed in another order; of 16 bits only few numbers may round to the neighbour of what they were.
_TOLERANCE = {torch.float32: 8.0, torch.float16: 0.25, torch.bfloat16: 0.25}


def agree(rows: Tensor, expected: Tensor) -> bool:
    """Whether rows [..., N] are what the other form gives, in shape, dtype and numbers."""
    if rows.shape != expected.shape or rows.dtype != expected.dtype:
        return False
    errors = (rows.double() - expected.double()).norm(dim=-1) / expected.double().norm(dim=-1)
    return bool((errors <= _TOLERANCE.get(rows.dtype, 0.0) * torch.finfo(rows.dtype).eps).all())


def random_rows(like: Tensor, *shape: int) -> Tensor:
    """Numbers whose first row is small enough for a norm's epsilon to count in it."""
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    numbers[..., 0, :] *= 1e-3
    return numbers.to(like.device, like.dtype)
