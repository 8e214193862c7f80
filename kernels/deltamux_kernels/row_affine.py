"""A scale per output feature around the bias, each row with the scale of its own slot."""

from __future__ import annotations

import torch

from deltamux_kernels.packed import PackedMatrices
from deltamux_kernels.segments import Segments


def row_affine(
    y: torch.Tensor, bias: torch.Tensor | None, g: PackedMatrices, segments: Segments
) -> None:
    """y[t, n] = (y[t, n] - bias[n]) g_s[n] + bias[n], in place, s = slot of row t.

    y [T, N]; bias [N] or None for zero; g_s [1, N]. Rows whose slot has no g keep their bits.
    """
    row_affine_torch(y, bias, g, segments)


def row_affine_torch(
    y: torch.Tensor, bias: torch.Tensor | None, g: PackedMatrices, segments: Segments
) -> None:
    """`row_affine` in plain torch; half types are computed in float32 and rounded once."""
    wide = y.dtype in (torch.float16, torch.bfloat16)
    for (slot, _, _), rows in zip(segments.spans, segments.pieces(y), strict=True):
        scale = g.views[slot]
        if scale is None:
            continue
        if wide:
            rows.copy_(_scaled(rows.float(), None if bias is None else bias.float(), scale.float()))
        else:
            _scaled(rows, bias, scale)


def _scaled(rows: torch.Tensor, bias: torch.Tensor | None, scale: torch.Tensor) -> torch.Tensor:
    if bias is None:
        return rows.mul_(scale)
    return rows.sub_(bias).mul_(scale).add_(bias)
