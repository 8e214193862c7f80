"""Paged attention in plain torch: the CPU's path, and what the Triton form is held to."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch.nn.functional import scaled_dot_product_attention

from deltamux_kernels.attention_batch import AttentionBatch
from deltamux_kernels.scoring import Scoring

# A group of decoding sequences is padded to its longest; one that is shorter than this share of
# it opens the next group.
LEAST_FILL = 0.85
# Keys and values that a group gathers at most, unless one sequence alone has more: beyond this
# they fall out of the core's own cache before they are read. Of 1, 2, 4 and 16 sequences of 192
# tokens (384 KiB each) groups of 4 were fastest; at 1000 tokens (2 MiB) groups of 1 or 2.
GROUP_BYTES = 3 * 2**19

Plan = TypeVar("Plan")


@dataclass(frozen=True)
class DecodeGroup:
    """Sequences of about one length with one query row each, attended as one padded batch."""

    rows: slice | torch.Tensor  # their n query rows; a slice where they are neighbours
    blocks: torch.Tensor  # int32 [n * m], the blocks that they see
    mask: torch.Tensor | None  # [n, 1, 1, m * block_size], 0 or -inf; None: nothing is hidden
    unseen: torch.Tensor  # int64, gathered positions that the mask hides


def paged_attention_torch(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    batch: AttentionBatch,
    scoring: Scoring,
    key: torch.Tensor | None = None,
    value: torch.Tensor | None = None,
) -> torch.Tensor:
    """`paged_attention`: decoding sequences in padded groups, the others one by one."""
    out = query.new_empty(*query.shape[:2], value_cache.shape[-1])
    for group in _decode_groups(batch, scoring.window, key_cache, value_cache):
        out[group.rows] = _decode(query[group.rows], key_cache, value_cache, group, scoring)
    for b, length in enumerate(batch.query_lens):
        if length <= 1:
            continue
        rows = slice(batch.starts[b], batch.starts[b] + length)
        first = _first_seen(batch.context_lens[b] - length, scoring.window)
        if key is not None and value is not None and length == batch.context_lens[b]:
            keys, values = key[rows], value[rows]
        else:
            keys, values = _gather(key_cache, value_cache, batch, b, first)
        mask = _mask(batch, b, first, scoring.window, query.device)
        out[rows] = _attend_sequence(query[rows], keys, values, mask, scoring)
    return out


def _first_seen(position: int, window: int | None) -> int:
    """The first key that the query at `position` sees."""
    return 0 if window is None else max(0, position - window + 1)


def _once(batch: AttentionBatch, key: tuple[object, ...], make: Callable[[], Plan]) -> Plan:
    """The plan of that key, made in the step's first layer."""
    if key not in batch.plans:
        batch.plans[key] = make()
    plan: Plan = batch.plans[key]
    return plan


def _decode_groups(
    batch: AttentionBatch,
    window: int | None,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
) -> list[DecodeGroup]:
    block_size, kv_heads, key_dim = key_cache.shape[1:]
    token = kv_heads * (key_dim + value_cache.shape[3]) * key_cache.element_size()
    dtype = key_cache.dtype

    def make() -> list[DecodeGroup]:
        groups = _similar(batch, window, GROUP_BYTES // token)
        return [_decode_group(batch, sorted(g), window, block_size, dtype) for g in groups]

    return _once(batch, ("decode", window, block_size, token, dtype), make)


def _similar(batch: AttentionBatch, window: int | None, tokens: int) -> list[list[int]]:
    """Decoding sequences, longest first, in groups of about one length and `tokens` at most."""
    seen = {
        b: min(context, window or context)
        for b, context in enumerate(batch.context_lens)
        if batch.query_lens[b] == 1
    }
    groups: list[list[int]] = []
    for b in sorted(seen, key=lambda b: -seen[b]):
        longest = seen[groups[-1][0]] if groups else 0
        if seen[b] >= LEAST_FILL * longest > 0 and (len(groups[-1]) + 1) * longest <= tokens:
            groups[-1].append(b)
        else:
            groups.append([b])
    return groups


def _decode_group(
    batch: AttentionBatch,
    members: list[int],
    window: int | None,
    block_size: int,
    dtype: torch.dtype,
) -> DecodeGroup:
    device = batch.block_tables.device
    ends = torch.tensor([batch.context_lens[b] for b in members], device=device)[:, None]
    starts = torch.tensor(
        [_first_seen(batch.context_lens[b] - 1, window) for b in members], device=device
    )[:, None]
    first_blocks = starts // block_size
    count = int(((ends - 1) // block_size - first_blocks).max()) + 1
    columns = first_blocks + torch.arange(count, device=device)
    blocks = batch.block_tables[members].gather(
        1, columns.clamp_(max=batch.block_tables.shape[1] - 1)
    )
    positions = first_blocks * block_size + torch.arange(count * block_size, device=device)
    hidden = (positions < starts) | (positions >= ends)
    blocks = blocks.masked_fill(hidden.view(len(members), count, block_size).all(-1), 0)
    mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -math.inf)
    return DecodeGroup(
        rows=_rows([batch.starts[b] for b in members], device),
        blocks=blocks.flatten(),
        mask=mask[:, None, None, :] if hidden.any() else None,
        unseen=hidden.flatten().nonzero().flatten(),
    )


def _rows(rows: list[int], device: torch.device) -> slice | torch.Tensor:
    if rows[-1] - rows[0] == len(rows) - 1:
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, device=device)


def _decode(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    group: DecodeGroup,
    scoring: Scoring,
) -> torch.Tensor:
    """[n, Hq, Dv] of one query [n, Hq, Dk] for each sequence of the group.

    The query heads of one KV head become query rows of it: K and V are never repeated.
    """
    sequences, kv_heads = query.shape[0], key_cache.shape[2]
    keys = _seen(key_cache, group).view(sequences, -1, kv_heads, key_cache.shape[3])
    values = _seen(value_cache, group).view(sequences, -1, kv_heads, value_cache.shape[3])
    queries = query.reshape(sequences, kv_heads, -1, query.shape[-1])
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    if scoring.plain:
        out = scaled_dot_product_attention(
            queries, keys, values, attn_mask=group.mask, scale=scoring.scale
        )
    else:
        heads = queries.shape[2]
        sinks = None if scoring.sinks is None else scoring.sinks.view(1, kv_heads, heads, 1)
        out = _weigh(queries, keys, values, group.mask, scoring, sinks)
    return out.reshape(sequences, query.shape[1], -1)


def _seen(cache: torch.Tensor, group: DecodeGroup) -> torch.Tensor:
    """The group's pages; what no sequence may see is zero, since 0 weight times NaN is NaN."""
    pages = cache.index_select(0, group.blocks).flatten(0, 1)
    return pages if group.mask is None else pages.index_fill_(0, group.unseen, 0)


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

    def make() -> torch.Tensor:
        rows = torch.arange(context - length, context, device=device)[:, None]
        keys = torch.arange(first, context, device=device)
        return (keys <= rows) & (keys > rows - (window or context + 1))

    return _once(batch, ("mask", b, window), make)


def _attend_sequence(
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
