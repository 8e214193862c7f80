"""Paged attention in plain torch, of half types on a CPU and where there is no C compiler."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import scaled_dot_product_attention

from deltamux_kernels.attention_batch import AttentionBatch
from deltamux_kernels.scoring import Scoring


def paged_attention_torch(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    batch: AttentionBatch,
    scoring: Scoring,
    key: torch.Tensor | None = None,
    value: torch.Tensor | None = None,
) -> torch.Tensor:
    """`paged_attention`, one sequence after the other."""
    out = query.new_empty(*query.shape[:2], value_cache.shape[-1])
    for b, length in enumerate(batch.query_lens):
        rows = slice(batch.starts[b], batch.starts[b] + length)
        first = _first_seen(batch.context_lens[b] - length, scoring.window)
        if key is not None and value is not None and length == batch.context_lens[b]:
            keys, values = key[rows], value[rows]
        else:
            keys, values = _gather(key_cache, value_cache, batch, b, first)
        if length == 1:
            out[rows] = _attend_row(query[rows], keys, values, scoring)
        else:
            mask = _mask(batch, b, first, scoring.window, query.device)
            out[rows] = _attend_rows(query[rows], keys, values, mask, scoring)
    return out


def _first_seen(position: int, window: int | None) -> int:
    """The first key that the query at `position` sees."""
    return 0 if window is None else max(0, position - window + 1)


def _gather(
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    batch: AttentionBatch,
    b: int,
    first: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [S, Hkv, D] of sequence b from token `first` to its last."""
    block_size, end = key_cache.shape[1], batch.context_lens[b]
    first_block = first // block_size
    blocks = batch.block_tables[b, first_block : -(-end // block_size)]
    tokens = slice(first - first_block * block_size, end - first_block * block_size)
    return (
        key_cache.index_select(0, blocks).flatten(0, 1)[tokens],
        value_cache.index_select(0, blocks).flatten(0, 1)[tokens],
    )


def _mask(
    batch: AttentionBatch, b: int, first: int, window: int | None, device: torch.device
) -> torch.Tensor | None:
    """True where query row i of sequence b sees key `first` + j; None: plainly causal."""
    length, context = batch.query_lens[b], batch.context_lens[b]
    if length == context and (window is None or window >= context):
        return None
    key = ("mask", b, window)
    if key not in batch.plans:
        rows = torch.arange(context - length, context, device=device)[:, None]
        keys = torch.arange(first, context, device=device)
        batch.plans[key] = (keys <= rows) & (keys > rows - (window or context + 1))
    mask: torch.Tensor = batch.plans[key]
    return mask


def _attend_row(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scoring: Scoring
) -> torch.Tensor:
    """[1, Hq, Dv] of query [1, Hq, Dk], which sees all of keys and values [S, Hkv, D].

    The query heads of one KV head become rows of it: K and V are never repeated.
    """
    queries = query.reshape(1, keys.shape[1], -1, query.shape[2])
    keys, values = (x.transpose(0, 1)[None] for x in (keys, values))
    if scoring.plain:
        out = scaled_dot_product_attention(queries, keys, values, scale=scoring.scale)
    else:
        sinks = None if scoring.sinks is None else scoring.sinks.view(*queries.shape[:3], 1)
        out = _weigh(queries, keys, values, None, scoring, sinks)
    return out.reshape(1, query.shape[1], -1)


def _attend_rows(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scoring: Scoring,
) -> torch.Tensor:
    """[L, Hq, Dv] of query [L, Hq, Dk] over keys and values [S, Hkv, D]."""
    queries, keys, values = (x.transpose(0, 1)[None] for x in (query, keys, values))
    if scoring.plain:
        out = scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scoring.scale,
            enable_gqa=keys.shape[1] != queries.shape[1],
        )
        return out[0].transpose(0, 1)
    if mask is None:
        mask = torch.ones(query.shape[0], keys.shape[2], dtype=torch.bool, device=query.device)
        mask = mask.tril()
    additive = torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, -math.inf)
    grouped = queries.unflatten(1, (keys.shape[1], -1))
    sinks = None if scoring.sinks is None else scoring.sinks.view(*grouped.shape[1:3], 1, 1)
    out = _weigh(grouped, keys[:, :, None], values[:, :, None], additive, scoring, sinks)
    return out.flatten(1, 2)[0].transpose(0, 1)


def _weigh(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scoring: Scoring,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention with a softcap or sinks, which torch's own has not; scores in float32.

    A sink is one more score of its head that takes weight and has no value.
    """
    scores = torch.matmul(queries.float(), keys.float().transpose(-1, -2)).mul_(scoring.scale)
    if scoring.softcap is not None:
        scores = scores.div_(scoring.softcap).tanh_().mul_(scoring.softcap)
    if mask is not None:
        scores += mask
    if sinks is None:
        weights = scores.softmax(-1)
    else:
        sink_scores = sinks.float().expand(*scores.shape[:-1], 1)
        weights = torch.cat((scores, sink_scores), -1).softmax(-1)[..., :-1]
    return torch.matmul(weights, values.float()).to(queries.dtype)
