"""Causal attention of packed queries over a paged key/value cache."""

from __future__ import annotations

import torch

from deltamux_kernels import native
from deltamux_kernels.attention_batch import AttentionBatch
from deltamux_kernels.paged_attention_native import paged_attention_native
from deltamux_kernels.paged_attention_torch import paged_attention_torch
from deltamux_kernels.paged_attention_triton import paged_attention_triton
from deltamux_kernels.scoring import Scoring


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    key: torch.Tensor | None = None,
    value: torch.Tensor | None = None,
) -> torch.Tensor:
    """o[i] = sum_p w[i, p] v[p], w[i, :] = softmax over the p that i sees of scale q[i] . k[p].

    Query i of a sequence sits at position context_len - query_len + i and sees the keys up to
    itself, with `window` only p > position - window. `softcap` c makes a score s into
    c tanh(s / c). `sinks` [Hq] adds one score per head that takes weight and has no value.

    query [T, Hq, Dk]; caches [num_blocks, block_size, Hkv, Dk or Dv], this step's keys and values
    already written; Hq a multiple of Hkv, head h reads KV head h // (Hq / Hkv). Returns
    [T, Hq, Dv]. `key`, `value` [T, Hkv, D], this step's own, are optional and never change the
    result: they spare the torch form a gather in the first chunk of a prompt.
    """
    scoring = Scoring(scale, window, softcap, sinks)
    if query.device.type == "cuda":
        return paged_attention_triton(query, key_cache, value_cache, batch, scoring)
    if query.dtype == torch.float32 and native.available():
        return paged_attention_native(query, key_cache, value_cache, batch, scoring)
    return paged_attention_torch(query, key_cache, value_cache, batch, scoring, key, value)
