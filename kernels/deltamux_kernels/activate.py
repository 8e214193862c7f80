"""A bias and an activation function on a shrunk product, each row with those of its own slot."""

from __future__ import annotations

from collections.abc import Callable
from typing import no_type_check

import torch
from torch.nn import functional

from deltamux_kernels._triton import tl, triton
from deltamux_kernels.packed import PackedMatrices
from deltamux_kernels.products import NativeProducts
from deltamux_kernels.segments import TILE_ROWS, Segments
from deltamux_kernels.shrink import Shrunk, new_products
from deltamux_kernels.tiles import load_tile

BLOCK_J = 32

# A function's place here is its number in the arena: the kernel below knows them by it.
_FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "linear": lambda x: x,
    "relu": functional.relu,
    "leaky_relu": functional.leaky_relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
ACTIVATIONS = tuple(_FUNCTIONS)


class Activations:
    """A bias and one of `ACTIVATIONS` per slot, for one site; a slot may have none.

    Both lie in `packed` as one column, [width + 1, 1]: the bias, then the function's number.
    """

    def __init__(self, arena: torch.Tensor, slots: int) -> None:
        self.packed = PackedMatrices(arena, slots, 1)
        self._functions: dict[int, Callable[[torch.Tensor], torch.Tensor]] = {}

    @staticmethod
    def column(bias: torch.Tensor, activation: str) -> torch.Tensor:
        """What is written to `packed` for a `bias` [width]."""
        return torch.cat((bias, bias.new_tensor([ACTIVATIONS.index(activation)])))[:, None]

    def placed(self, slot: int) -> None:
        """To be called when the slot's column has been written; waits for it."""
        column = self.packed.views[slot]
        assert column is not None
        self._functions[slot] = _FUNCTIONS[ACTIVATIONS[int(column[-1].item())]]

    def apply(self, slot: int, product: torch.Tensor) -> torch.Tensor:
        """f(product + bias) of the slot, for the torch form; in the dtype of `product`."""
        column = self.packed.views[slot]
        assert column is not None
        return self._functions[slot](product + column[:-1, 0])


def activate(h: Shrunk, activations: Activations, segments: Segments) -> Shrunk:
    """a[t, j] = f_s(h[t, j] + b_s[j]) for j < width of b_s, and a[t, width] = 1.

    The 1 lets a bias follow: `expand` adds the last row of its matrix as it is. s is the slot of
    row t; `h` is from `shrink`, and the result is what it would give for one rank more.
    """
    if isinstance(h, torch.Tensor):
        return activate_triton(h, activations, segments)
    products = h.pieces() if isinstance(h, NativeProducts) else h
    return activate_torch(products, activations, segments)


def activate_torch(
    h: list[torch.Tensor | None], activations: Activations, segments: Segments
) -> list[torch.Tensor | None]:
    """`activate` in plain torch."""
    return [
        None
        if product is None
        else functional.pad(activations.apply(slot, product), (0, 1), value=1.0)
        for (slot, _, _), product in zip(segments.spans, h, strict=True)
    ]


def activate_triton(h: torch.Tensor, activations: Activations, segments: Segments) -> torch.Tensor:
    """`activate` in one launch: a program per (tile of rows, block of columns)."""
    packed = activations.packed
    most = segments.most_rows(packed)
    a = new_products(h, most)
    if not most:
        return a
    _activate_kernel[(segments.tiles.shape[0], -(-most // BLOCK_J))](
        h,
        a,
        packed.arena,
        packed.offsets,
        packed.rows,
        segments.tiles,
        h.stride(0),
        a.stride(0),
        BLOCK_T=TILE_ROWS,
        BLOCK_J=BLOCK_J,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return a


@triton.jit
@no_type_check
def _activate_kernel(
    h,
    a,
    arena,
    offsets,
    rows,
    tiles,
    h_row,
    a_row,
    BLOCK_T: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    tile, block = tl.program_id(0), tl.program_id(1)
    slot, start, count = load_tile(tiles, tile)
    width = tl.load(rows + slot) - 1
    if block * BLOCK_J > width:
        return
    i, j = tl.arange(0, BLOCK_T), block * BLOCK_J + tl.arange(0, BLOCK_J)
    live_i, live_j = i < count, j < width
    t = (start + i).to(tl.int64)
    column = arena + tl.multiple_of(tl.load(offsets + slot), 64)
    bias = tl.load(column + j, mask=live_j, other=0.0).to(tl.float32)
    function = tl.load(column + width).to(tl.int32)
    live = live_i[:, None] & live_j[None, :]
    x = tl.load(h + t[:, None] * h_row + j[None, :], mask=live, other=0.0) + bias[None, :]
    if function == 1:
        x = tl.maximum(x, 0.0)
    elif function == 2:
        x = tl.where(x >= 0, x, 0.01 * x)
    elif function == 3:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif function == 4:
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif function == 5:
        x = x * tl.sigmoid(x)
    elif function == 6:
        x = 2.0 * tl.sigmoid(2.0 * x) - 1.0
    elif function == 7:
        x = tl.sigmoid(x)
    x = tl.where(j[None, :] == width, 1.0, x)
    tl.store(a + t[:, None] * a_row + j[None, :], x, mask=live_i[:, None] & (j <= width)[None, :])
