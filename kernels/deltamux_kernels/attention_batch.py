"""The sequences of one step, as attention sees them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import torch

from deltamux_kernels.device_table import device_table


@dataclass(frozen=True)
class AttentionBatch:
    """Packed queries of B sequences and the cache blocks that hold their keys and values.

    Sequence b has `query_lens[b]` query rows, from row `query_starts[b]` on, and
    `context_lens[b]` keys, this step's own among them. Token p of it lies in block
    `block_tables[b, p // block_size]` of the cache, at offset `p % block_size`. Entries of the
    table past the last block are never read.
    """

    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    query_starts: torch.Tensor  # int32 [B + 1]
    seq_lens: torch.Tensor  # int32 [B], context_lens on the device
    block_tables: torch.Tensor  # int32 [B, M]
    # What the forms work out once a step and read again in every layer.
    plans: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """`query_starts` on the host, without the total."""
        starts, row = [], 0
        for length in self.query_lens:
            starts.append(row)
            row += length
        return tuple(starts)

    @cached_property
    def decodes(self) -> bool:
        """Every sequence has one query."""
        return max(self.query_lens) == 1

    def counters(self, count: int) -> torch.Tensor:
        """int32 [count], zero before and after every launch that counts in it."""
        key = ("counters", count)
        if key not in self.plans:
            device = self.query_starts.device
            self.plans[key] = torch.zeros(count, dtype=torch.int32, device=device)
        counters: torch.Tensor = self.plans[key]
        return counters

    def query_tiles(self, rows: int) -> torch.Tensor:
        """`tile_list` on the device: int32 [tiles, 2]."""
        key = ("query_tiles", rows)
        if key not in self.plans:
            device = self.query_starts.device
            self.plans[key] = device_table(
                tile_list(self.query_lens, rows), columns=2, device=device
            )
        plan: torch.Tensor = self.plans[key]
        return plan


# Steps that decode are alike; layers of two kinds may want tiles of two sizes.
@lru_cache(maxsize=4)
def tile_list(query_lens: tuple[int, ...], rows: int) -> tuple[tuple[int, int], ...]:
    """`(sequence, first query)` of every tile of at most `rows` queries."""
    return tuple(
        [(b, first) for b, length in enumerate(query_lens) for first in range(0, length, rows)]
    )
