"""Pages of layers with unequal shapes."""

from __future__ import annotations

import torch

from deltamux.base.probe import AttentionLayer
from deltamux.engine.kv.kv_cache import KVCache, block_bytes

LAYERS = (
    AttentionLayer(0, kv_heads=2, key_dim=8, value_dim=8, window=None),
    AttentionLayer(1, kv_heads=4, key_dim=16, value_dim=8, window=32),
)


def test_each_layer_has_pages_of_its_own_shape() -> None:
    cache = KVCache(LAYERS, 5, 16, torch.bfloat16, torch.device("cpu"))
    assert [tuple(pages.shape) for pages in cache.keys] == [(5, 16, 2, 8), (5, 16, 4, 16)]
    assert [tuple(pages.shape) for pages in cache.values] == [(5, 16, 2, 8), (5, 16, 4, 8)]
    assert not any(pages[0].any() for pages in (*cache.keys, *cache.values))


def test_bytes_of_a_block_are_those_that_the_cache_takes() -> None:
    cache = KVCache(LAYERS, 5, 16, torch.bfloat16, torch.device("cpu"))
    taken = sum(pages.nbytes for pages in (*cache.keys, *cache.values))
    assert taken == 5 * block_bytes(LAYERS, 16, torch.bfloat16)
