"""Keys and values of an adapter in the pages of a sequence."""

from __future__ import annotations

import torch

from deltamux.adapters.primitives.virtual_tokens import KeyValuePrefix, KeyValuePrefixBank
from deltamux.base.probe import AttentionLayer
from deltamux.engine.kv.kv_cache import KVCache
from deltamux.engine.kv.prefix_pages import PrefixPages
from deltamux_kernels.packed import PackedMatrices

CPU = torch.device("cpu")
LAYERS, TOKENS, HEADS, DIM, BLOCK = 3, 6, 2, 4, 4


def test_states_go_to_their_places_and_nowhere_else() -> None:
    torch.manual_seed(0)
    states = torch.randn(LAYERS, 2, TOKENS, HEADS * DIM)
    layers = [AttentionLayer(i, HEADS, DIM, DIM, None) for i in range(LAYERS)]
    cache = KVCache(layers, 6, BLOCK, torch.float32, CPU)
    for pages in (*cache.keys, *cache.values):
        pages.fill_(torch.nan)
    store = PackedMatrices(torch.zeros(1000), 3, HEADS * DIM)
    bank = KeyValuePrefixBank(store, LAYERS)
    ((target, matrix),) = bank.pieces(KeyValuePrefix(states))
    target.write(2, 64, matrix)
    PrefixPages(bank, cache).fill(2, [5, 3], first=0)
    PrefixPages(bank, cache).fill(2, [5, 1], first=4)
    for layer in range(LAYERS):
        for kind, pages in enumerate((cache.keys[layer], cache.values[layer])):
            expected = states[layer, kind].view(TOKENS, HEADS, DIM)
            assert torch.equal(pages[5], expected[:4])
            assert torch.equal(pages[3, :2], expected[4:])
            assert torch.equal(pages[1, :2], expected[4:])
            assert pages[[0, 2, 4]].isnan().all() and pages[[1, 3], 2:].isnan().all()
