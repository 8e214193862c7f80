"""Pages of keys and values, one pair of tensors a layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deltamux.base.probe import AttentionLayer


class KVCache:
    """`keys[layer]` [num_blocks, block_size, kv_heads, key_dim], `values[layer]` with value_dim.

    Block 0 belongs to nobody: block tables are padded with it. Blocks are not cleared when they
    change hands: attention reads no slot beyond a sequence's length, whatever stands in it.
    """

    def __init__(
        self,
        layers: Sequence[AttentionLayer],
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.block_size = block_size
        self.device = device

        def pages_of(layer: AttentionLayer, dim: int) -> torch.Tensor:
            shape = (num_blocks, block_size, layer.kv_heads, dim)
            # Of a CPU's memory, only the blocks that were ever used are really taken.
            pages = torch.empty(shape, dtype=dtype, device=device)
            pages[0] = 0
            return pages

        self.keys = [pages_of(layer, layer.key_dim) for layer in layers]
        self.values = [pages_of(layer, layer.value_dim) for layer in layers]


def block_bytes(layers: Sequence[AttentionLayer], block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers."""
    numbers = sum(layer.kv_heads * (layer.key_dim + layer.value_dim) for layer in layers)
    return numbers * block_size * dtype.itemsize
