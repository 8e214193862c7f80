"""The rows of a step beside each of their experts, sorted by expert and by slot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import no_type_check

import torch

from deltamux_kernels._triton import tl, triton
from deltamux_kernels.captured_table import most_tiles
from deltamux_kernels.device_segments import DeviceSegments
from deltamux_kernels.segments import TILE_ROWS, Segments

BLOCK_P = 128
BLOCK_TILES = 16


@dataclass(frozen=True, eq=False)
class ExpertPairs:
    """Pairs of a row and an expert: by expert, those of one expert by slot, the base's last.

    `order` int64 [P] is theirs among the pairs as the rows have them, `experts` int64 [P] the
    expert of each, `ends` int32 [experts] where the pairs of each expert end. To the `segments`
    each expert of each slot is a slot of its own, slot * experts + expert.
    """

    order: torch.Tensor
    experts: torch.Tensor
    ends: torch.Tensor
    segments: Segments


def expert_pairs(chosen: torch.Tensor, segments: Segments, slots: int, experts: int) -> ExpertPairs:
    """The pairs of rows [T] with their experts `chosen` int64 [T, k], of `experts` each.

    The Triton form leaves all on the device and waits for nothing, so that it can be captured.
    """
    form = expert_pairs_triton if chosen.is_cuda else expert_pairs_torch
    return form(chosen, segments, slots, experts)


def expert_pairs_torch(
    chosen: torch.Tensor, segments: Segments, slots: int, experts: int
) -> ExpertPairs:
    """`expert_pairs` in plain torch."""
    slot_of_row = chosen.new_full(chosen.shape[:1], slots)
    for slot, start, end in segments.spans:
        slot_of_row[start:end] = slot
    keys = (chosen * (slots + 1) + slot_of_row[:, None]).flatten()
    keys, order = keys.sort(stable=True)
    spans, start = [], 0
    groups = torch.unique_consecutive(keys, return_counts=True)
    for key, count in zip(*(numbers.tolist() for numbers in groups), strict=True):
        expert, slot = divmod(key, slots + 1)
        if slot < slots:
            spans.append((slot * experts + expert, start, start + count))
        start += count
    own = Segments(tuple(spans), chosen.device)
    return ExpertPairs(order, keys // (slots + 1), _ends(keys, slots, experts), own)


def expert_pairs_triton(
    chosen: torch.Tensor, segments: Segments, slots: int, experts: int
) -> ExpertPairs:
    """`expert_pairs` as a sort between two launches: of its keys, and of what they are cut into."""
    pairs, k = chosen.numel(), chosen.shape[1]
    keys = chosen.new_empty(pairs, dtype=torch.int32)
    grid = (-(-pairs // BLOCK_P),)
    _pair_keys_kernel[grid](
        chosen.contiguous(),
        segments.tiles,
        keys,
        pairs,
        segments.tiles.shape[0],
        k,
        slots,
        BLOCK_P=BLOCK_P,
        BLOCK_TILES=BLOCK_TILES,
        num_warps=4,
    )
    keys, order = keys.sort(stable=True)
    nobody = slots * experts
    tiles = keys.new_full((most_tiles(pairs, nobody, TILE_ROWS), 3), nobody)
    _pair_tiles_kernel[grid](
        keys,
        tiles,
        keys.new_zeros(1),
        pairs,
        pairs.bit_length(),
        slots,
        experts,
        BLOCK_P=BLOCK_P,
        BLOCK_T=TILE_ROWS,
        num_warps=4,
    )
    own = DeviceSegments(tiles, nobody)
    return ExpertPairs(order, keys // (slots + 1), _ends(keys, slots, experts), own)


def _ends(keys: torch.Tensor, slots: int, experts: int) -> torch.Tensor:
    step = slots + 1
    following = torch.arange(step, experts * step + 1, step, dtype=keys.dtype, device=keys.device)
    return torch.searchsorted(keys, following, out_int32=True)


# One kernel each, however many rows a step has.
@triton.jit(do_not_specialize=["num_pairs", "num_tiles"])
@no_type_check
def _pair_keys_kernel(
    chosen,
    tiles,
    keys,
    num_pairs,
    num_tiles,
    k,
    slots,
    BLOCK_P: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    """expert * (slots + 1) + slot, or + slots where no tile has the row."""
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    live = p < num_pairs
    t = (p // k)[:, None]
    slot = tl.zeros((BLOCK_P,), dtype=tl.int32) + slots
    for first in range(0, num_tiles, BLOCK_TILES):
        tile = first + tl.arange(0, BLOCK_TILES)
        known = tile < num_tiles
        own = tl.load(tiles + tile * 3, mask=known, other=0)[None, :]
        start = tl.load(tiles + tile * 3 + 1, mask=known, other=0)[None, :]
        count = tl.load(tiles + tile * 3 + 2, mask=known, other=0)[None, :]
        inside = (t >= start) & (t < start + count)
        slot += tl.sum(tl.where(inside, own - slots, 0), axis=1)
    expert = tl.load(chosen + p, mask=live, other=0).to(tl.int32)
    tl.store(keys + p, expert * (slots + 1) + slot, mask=live)


@triton.jit(do_not_specialize=["num_pairs", "search_steps"])
@no_type_check
def _pair_tiles_kernel(
    keys,
    tiles,
    used,
    num_pairs,
    search_steps,
    slots,
    experts,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """The tiles of the runs of one key, in any order: no row's result depends on it."""
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    live = p < num_pairs
    key = tl.load(keys + p, mask=live, other=-1)
    low, high = tl.zeros((BLOCK_P,), dtype=tl.int32), p
    for _ in range(0, search_steps):
        middle = (low + high) // 2
        between = live & (low < high)
        below = tl.load(keys + middle, mask=between, other=0) < key
        high = tl.where(between & (below == 0), middle, high)
        low = tl.where(between & below, middle + 1, low)
    slot, expert = key % (slots + 1), key // (slots + 1)
    begins = live & (slot < slots) & ((p - low) % BLOCK_T == 0)
    rest = p[:, None] + tl.arange(0, BLOCK_T)[None, :]
    reached = begins[:, None] & (rest < num_pairs)
    same = tl.load(keys + rest, mask=reached, other=-1) == key[:, None]
    number = begins.to(tl.int32)
    place = tl.atomic_add(used, tl.sum(number, axis=0)) + tl.cumsum(number, axis=0) - 1
    target = tiles + place * 3
    tl.store(target, slot * experts + expert, mask=begins)
    tl.store(target + 1, p, mask=begins)
    tl.store(target + 2, tl.sum(same.to(tl.int32), axis=1), mask=begins)
