"""The attention function that a model's layers call: write keys and values, attend over pages."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from deltamux.engine.kv.kv_cache import KVCache
from deltamux_kernels import AttentionBatch, paged_attention, write_kv


class PagedAttention:
    """Serves one model from one cache. The runner says before each forward what the step is."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._batch: AttentionBatch | None = None
        self._slot_mapping: Tensor | None = None

    def begin(self, batch: AttentionBatch, slot_mapping: Tensor) -> None:
        """`slot_mapping` int64 [T]: the place of each packed row in the flattened cache."""
        self._batch, self._slot_mapping = batch, slot_mapping

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """query [1, Hq, T, Dk], key [1, Hkv, T, Dk], value [1, Hkv, T, Dv] -> [1, T, Hq, Dv].

        The mask is None: causality, window and the limits of each sequence come from the step.
        """
        assert self._batch is not None and self._slot_mapping is not None
        layer = module.layer_idx
        assert isinstance(layer, int)
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        packed_query, packed_key, packed_value = (
            heads[0].transpose(0, 1) for heads in (query, key, value)
        )
        write_kv(packed_key, packed_value, keys, values, self._slot_mapping)
        attended = paged_attention(
            packed_query,
            keys,
            values,
            self._batch,
            scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
            window=sliding_window,
            softcap=softcap,
            sinks=s_aux,
            key=packed_key,
            value=packed_value,
        )
        return attended[None], None
