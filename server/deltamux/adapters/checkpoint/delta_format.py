"""The words of deltamux's own checkpoint format, docs/formats.md; read and written by them."""

from __future__ import annotations

import torch
from torch import Tensor

TYPE = "delta"
VERSION = 1

# How a tensor is named: the parameter of the base that it changes, then what it is.
VALUE = "value"
SAMPLE = "base"
LOW_RANK_A, LOW_RANK_B = "low_rank.a", "low_rank.b"
SPARSE_VALUES, SPARSE_COLUMNS, SPARSE_STARTS, SPARSE_SHAPE = (
    "sparse.values",
    "sparse.columns",
    "sparse.starts",
    "sparse.shape",
)
ROW_IDS, ROW_VALUES = "rows.ids", "rows.values"
SIGNS, SIGN_SCALE, SIGN_SHAPE = "one_bit.signs", "one_bit.scale", "one_bit.shape"

PARTS = (
    VALUE,
    ROW_IDS,
    ROW_VALUES,
    SAMPLE,
    LOW_RANK_A,
    LOW_RANK_B,
    SPARSE_VALUES,
    SPARSE_COLUMNS,
    SPARSE_STARTS,
    SPARSE_SHAPE,
    SIGNS,
    SIGN_SCALE,
    SIGN_SHAPE,
)
INTEGERS = (ROW_IDS, SPARSE_COLUMNS, SPARSE_STARTS, SPARSE_SHAPE, SIGNS, SIGN_SHAPE)

_SAMPLES = 64


def base_sample(parameter: Tensor) -> Tensor:
    """Up to 64 numbers of a matrix [out, in] or vector [out], evenly spread, on the host.

    They tell two bases apart at no cost; a few numbers that happen to agree do no harm.
    """
    width = parameter.shape[-1]
    count = min(_SAMPLES, parameter.numel())
    places = torch.arange(count, device=parameter.device) * (parameter.numel() // count)
    if parameter.ndim == 1:
        return parameter.detach()[places].cpu()
    return parameter.detach()[places // width, places % width].cpu()
