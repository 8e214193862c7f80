"""Root mean square norm of rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import no_type_check

import torch

from deltamux_kernels import native
from deltamux_kernels._triton import tl, triton
from deltamux_kernels.native.library import INTEGER, POINTER, as_word, function

# Elements of the short rows that one program norms together.
_PROGRAM = 1024


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, offset: float = 0.0, once: bool = False
) -> torch.Tensor:
    """y[..., n] = (weight[n] + offset) x[..., n] / sqrt(mean over m of x[..., m]² + epsilon).

    x [..., R, N], of any strides; weight [N] -> like x. The quotient is computed in float32. As
    most of transformers' norms do, it is rounded to the dtype of x, then the product to that of
    both; `once`, as Gemma's do, the product is rounded alone, to the dtype of x.
    """
    if x.device.type == "cuda":
        return rms_norm_triton(x, weight, epsilon, offset, once)
    if x.dtype == weight.dtype == torch.float32 and native.available():
        return rms_norm_native(x, weight, epsilon, offset, once)
    return rms_norm_torch(x, weight, epsilon, offset, once)


def rms_norm_native(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, offset: float = 0.0, once: bool = False
) -> torch.Tensor:
    """`rms_norm` in C, in float32, which is rounded to no other type, at `once` or not."""
    rows, weight = _rows(x), weight.contiguous()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    _native()(
        rows.data_ptr(),
        rows.stride(0),
        rows.stride(1),
        weight.data_ptr(),
        y.data_ptr(),
        *rows.shape,
        as_word(epsilon),
        as_word(offset),
    )
    return y


@cache
def _native() -> Callable[..., None]:
    return function("rms_norm", POINTER, *[INTEGER] * 2, *[POINTER] * 2, *[INTEGER] * 5)


def rms_norm_torch(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, offset: float = 0.0, once: bool = False
) -> torch.Tensor:
    """`rms_norm` in plain torch."""
    wide = x.float()
    quotient = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    if not once:
        quotient = quotient.to(x.dtype)
    scale = weight.float() + offset if offset else weight
    return (scale * quotient).to(_result_dtype(x, weight, once))


def rms_norm_triton(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, offset: float = 0.0, once: bool = False
) -> torch.Tensor:
    """`rms_norm` in one launch: a program per row, or per few short ones."""
    rows = _rows(x)
    y = torch.empty_like(rows, dtype=_result_dtype(x, weight, once))
    outer, inner, width = rows.shape
    blocks = norm_blocks(width)
    _rms_norm_kernel[(outer, -(-inner // blocks["BLOCK_R"]))](
        rows,
        weight,
        y,
        epsilon,
        inner,
        rows.stride(0),
        rows.stride(1),
        y.stride(0),
        y.stride(1),
        WIDTH=width,
        OFFSET=offset,
        ONCE=once,
        **blocks,
        enable_fp_fusion=True,
    )
    return y.view(x.shape)


def _result_dtype(x: torch.Tensor, weight: torch.Tensor, once: bool) -> torch.dtype:
    return x.dtype if once else torch.promote_types(x.dtype, weight.dtype)


def norm_blocks(width: int) -> dict[str, int]:
    """What a program norms, and with how many warps: a row of so many numbers, or short ones."""
    block = triton.next_power_of_2(width)
    return {
        "BLOCK_R": max(1, _PROGRAM // block),
        "BLOCK_N": block,
        "num_warps": min(16, max(4, block // 512)),
    }


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x [..., R, N] as [O, R, N] whose rows lie in one piece; a view where that is possible."""
    rows = x if x.dim() == 3 else x.flatten(0, -3) if x.dim() > 3 else x[None]
    return rows if rows.stride(2) == 1 else rows.contiguous()


@triton.jit(do_not_specialize=["inner"])
@no_type_check
def _rms_norm_kernel(
    x,
    weight,
    y,
    epsilon,
    inner,
    x_outer,
    x_inner,
    y_outer,
    y_inner,
    WIDTH: tl.constexpr,
    OFFSET: tl.constexpr,
    ONCE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    o = tl.program_id(0).to(tl.int64)
    i = (tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    live = (i < inner)[:, None] & (n < WIDTH)[None, :]
    source = x + o * x_outer + i[:, None] * x_inner + n[None, :]
    value = tl.load(source, mask=live, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=1) / WIDTH + epsilon)
    normed = value * scale[:, None]
    if not ONCE:
        normed = normed.to(x.dtype.element_ty).to(tl.float32)
    w = tl.load(weight + n, mask=n < WIDTH, other=0.0).to(tl.float32)
    if OFFSET != 0:
        w += OFFSET
    target = y + o * y_outer + i[:, None] * y_inner + n[None, :]
    tl.store(target, (w[None, :] * normed).to(y.dtype.element_ty), mask=live)
