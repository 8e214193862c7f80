"""y plus x times a scaled matrix of signs transposed, each row with the matrix of its own slot."""

from __future__ import annotations

from typing import no_type_check

import numpy as np
import torch

from deltamux_kernels._triton import tl, triton
from deltamux_kernels.packed import PackedMatrices, as_elements
from deltamux_kernels.segments import TILE_ROWS, Segments
from deltamux_kernels.tiles import load_tile

BLOCK_N = 64
BLOCK_K = 64

# Row s: the eight signs that byte s stands for, lowest bit first.
_SIGNS = ((torch.arange(256)[:, None] >> torch.arange(8)) & 1).float() * 2 - 1


def pack_signs(positive: torch.Tensor) -> torch.Tensor:
    """int32 [out, in / 32, rounded up] of bool [out, in]: bit k % 32 of word k // 32 is column k.

    The bits behind the last column are 0. On the host, as `unpack_signs`.
    """
    packed = np.packbits(positive.contiguous().numpy(), axis=1, bitorder="little")
    padded = np.pad(packed, ((0, 0), (0, -packed.shape[1] % 4)))
    return torch.from_numpy(padded.view("<i4"))


def unpack_signs(words: torch.Tensor, in_features: int) -> torch.Tensor:
    """float32 [out, in] of 1 and -1, from what `pack_signs` made."""
    packed = words.numpy().view(np.uint8)
    bits = np.unpackbits(packed, axis=1, count=in_features, bitorder="little")
    return torch.from_numpy(bits).float() * 2 - 1


class SignMatrices:
    """One matrix of signs [out, in] and its scale per slot, for one site; a slot may have none.

    Both lie in the arena as `as_elements`: the int32 words of `pack_signs`, one bit a weight, and
    the float32 scale, which no serving dtype rounds.
    """

    def __init__(
        self, arena: torch.Tensor, slots: int, out_features: int, in_features: int
    ) -> None:
        self.words = PackedMatrices(arena, slots, 1)
        self.scales = PackedMatrices(arena, slots, 1)
        self.shape = (out_features, in_features)
        self.words_in_row = -(-in_features // 32)

    def elements(self, words: torch.Tensor, scale: torch.Tensor) -> list[torch.Tensor]:
        """What is to be written to `words` and `scales`; `scale` is float32 [1]."""
        dtype = self.words.arena.dtype
        return [as_elements(words, dtype), as_elements(scale.view(torch.int32), dtype)]

    def on_host(self, slot: int) -> tuple[torch.Tensor, float] | None:
        """The slot's signs as bytes [out, any] and its scale, for the torch form, or None."""
        words, scale = self.words.views[slot], self.scales.views[slot]
        if words is None or scale is None:
            return None
        signs = words.flatten().view(torch.uint8).view(self.shape[0], -1)
        return signs, float(scale.flatten().view(torch.float32))


def sign_delta(y: torch.Tensor, x: torch.Tensor, d: SignMatrices, segments: Segments) -> None:
    """y[t, n] += a_s sum_k x[t, k] D_s[n, k], in place, D_s of 1 and -1, s = slot of row t.

    y [T, N]; x [T, K]; D_s [N, K]. Rows whose slot has no matrix keep their bits.
    """
    if y.device.type == "cuda":
        sign_delta_triton(y, x, d, segments)
    else:
        sign_delta_torch(y, x, d, segments)


def sign_delta_torch(y: torch.Tensor, x: torch.Tensor, d: SignMatrices, segments: Segments) -> None:
    """`sign_delta` in plain torch: computed in float32 and rounded once."""
    pieces = zip(segments.spans, segments.pieces(x), segments.pieces(y), strict=True)
    for (slot, _, _), given, rows in pieces:
        if (matrix := d.on_host(slot)) is None:
            continue
        signs, scale = matrix
        for tile, target in zip(given.split(TILE_ROWS), rows.split(TILE_ROWS), strict=True):
            target.copy_(target.float() + scale * _signed_sums(tile.float(), signs))


def _signed_sums(x: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """x [T, K] times the signs in bytes [N, any], transposed: float32 [T, N].

    Each byte picks one of the 256 sums that eight numbers of a row have, so that an output costs
    K / 8 additions and the signs are never unpacked.
    """
    rows, columns = x.shape
    groups = signs.shape[1]
    # A table of one column takes a path of torch that is an order of magnitude slower.
    padded = x.new_zeros(max(rows, 2), groups * 8)
    padded[:rows, :columns] = x
    sums = torch.einsum("tgb,sb->gst", padded.view(-1, groups, 8), _SIGNS)
    picked = signs.int() + torch.arange(0, groups * 256, 256, dtype=torch.int32)
    table = sums.reshape(groups * 256, -1)
    return torch.nn.functional.embedding_bag(picked, table, mode="sum").t()[:rows]


def sign_delta_triton(
    y: torch.Tensor, x: torch.Tensor, d: SignMatrices, segments: Segments
) -> None:
    """`sign_delta` in one launch: a program per (tile of rows, block of N)."""
    if not segments.most_rows(d.words):
        return
    x = x if x.stride(1) == 1 else x.contiguous()
    out_width, in_width = d.shape
    _sign_delta_kernel[(segments.tiles.shape[0], -(-out_width // BLOCK_N))](
        y,
        x,
        d.words.arena,
        d.words.offsets,
        d.scales.offsets,
        d.words.rows,
        segments.tiles,
        in_width,
        out_width,
        d.words_in_row,
        y.stride(0),
        y.stride(1),
        x.stride(0),
        BLOCK_T=TILE_ROWS,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        num_warps=4,
        enable_fp_fusion=True,
        num_stages=3,
    )


@triton.jit
@no_type_check
def _sign_delta_kernel(
    y,
    x,
    arena,
    word_offsets,
    scale_offsets,
    word_counts,
    tiles,
    in_width,
    out_width,
    words_in_row,
    y_row,
    y_column,
    x_row,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile, block = tl.program_id(0), tl.program_id(1)
    slot, start, count = load_tile(tiles, tile)
    if tl.load(word_counts + slot) == 0:
        return
    i, n = tl.arange(0, BLOCK_T), block * BLOCK_N + tl.arange(0, BLOCK_N)
    live_i, live_n = i < count, n < out_width
    t = (start + i).to(tl.int64)
    words = (arena + tl.load(word_offsets + slot)).to(tl.pointer_type(tl.int32))
    words += n.to(tl.int64)[None, :] * words_in_row
    scale = tl.load((arena + tl.load(scale_offsets + slot)).to(tl.pointer_type(tl.float32)))
    total = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    for k0 in range(0, in_width, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        live_k = k < in_width
        rows = tl.load(
            x + t[:, None] * x_row + k[None, :], mask=live_i[:, None] & live_k[None, :], other=0.0
        )
        # The 32 loads of one word meet in the first-level cache; signs leave the registers never.
        word = tl.load(words + (k // 32)[:, None], mask=live_k[:, None] & live_n[None, :], other=0)
        signs = ((word >> (k % 32)[:, None]) & 1) * 2 - 1
        total = tl.dot(rows, signs.to(rows.dtype), total, input_precision="ieee")
    target = y + t[:, None] * y_row + n[None, :] * y_column
    live_y = live_i[:, None] & live_n[None, :]
    before = tl.load(target, mask=live_y, other=0.0).to(tl.float32)
    tl.store(target, (before + scale * total).to(y.dtype.element_ty), mask=live_y)
