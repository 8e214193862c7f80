"""Fills a sequence's first pages with the keys and values that its adapter brings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deltamux.adapters.primitives.virtual_tokens import KeyValuePrefixBank
from deltamux.engine.kv.kv_cache import KVCache
from deltamux.engine.transfer import to_device
from deltamux_kernels import write_kv


class PrefixPages:
    """Between the device storage of the adapters' prefixes and the KV cache."""

    def __init__(self, prefixes: KeyValuePrefixBank, cache: KVCache) -> None:
        self._prefixes = prefixes
        self._cache = cache

    def fill(self, slot: int, blocks: Sequence[int], first: int) -> None:
        """Writes the virtual tokens from number `first` on to their places in `blocks`.

        The keys are taken as they are: what they were trained to be at their positions.
        """
        states = self._prefixes.states(slot)[:, :, first:]
        places = np.arange(first, first + states.shape[2])
        size = self._cache.block_size
        mapping = np.array(blocks)[places // size] * size + places % size
        slots = to_device(mapping, self._cache.device)
        pages = zip(self._cache.keys, self._cache.values, strict=True)
        for (keys, values), (key_pages, value_pages) in zip(states, pages, strict=True):
            heads = (len(places), *key_pages.shape[2:])
            write_kv(keys.view(heads), values.view(heads), key_pages, value_pages, slots)
