"""The gate of a transformer's MLP: SiLU of one product times another."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import no_type_check

import torch
from torch.nn import functional

from deltamux_kernels import native
from deltamux_kernels._triton import tl, triton
from deltamux_kernels.native.library import INTEGER, POINTER, function

BLOCK_N = 1024


def gated_silu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """y[t, n] = up[t, n] · gate[t, n] / (1 + exp(-gate[t, n])).

    gate and up [..., T, N] of one dtype; their rows may be columns of a wider product. The result
    is contiguous. In half types the quotient is rounded before it is multiplied, as torch does.
    """
    if gate.device.type == "cuda":
        return gated_silu_triton(gate, up)
    if gate.dtype == torch.float32 and native.available():
        return gated_silu_native(gate, up)
    return gated_silu_torch(gate, up)


def gated_silu_native(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`gated_silu` in C, in float32."""
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    _native()(gate.data_ptr(), up.data_ptr(), y.data_ptr(), y.numel())
    return y


@cache
def _native() -> Callable[..., None]:
    return function("gated_silu", POINTER, POINTER, POINTER, INTEGER)


def gated_silu_torch(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`gated_silu` in plain torch."""
    return functional.silu(gate) * up


def gated_silu_triton(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`gated_silu` in one launch: a program per (row, block of N)."""
    width = gate.shape[-1]
    gates, ups = (_rows(part) for part in (gate, up))
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _gated_silu_kernel[(gates.shape[0], -(-width // BLOCK_N))](
        gates,
        ups,
        y,
        gates.stride(0),
        ups.stride(0),
        WIDTH=width,
        BLOCK_N=BLOCK_N,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return y


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x [..., N] as [T, N] whose rows lie in one piece; a view where that is possible."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


@triton.jit
@no_type_check
def _gated_silu_kernel(gate, up, y, gate_row, up_row, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = n < WIDTH
    g = tl.load(gate + t * gate_row + n, mask=live, other=0.0).to(tl.float32)
    u = tl.load(up + t * up_row + n, mask=live, other=0.0).to(tl.float32)
    silu = (g / (1.0 + tl.exp(-g))).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + t * WIDTH + n, (silu * u).to(y.dtype.element_ty), mask=live)
