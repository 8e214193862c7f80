"""One pass over the pages of a sequence with a running softmax."""

from __future__ import annotations

from typing import no_type_check

from deltamux_kernels._triton import tl, triton


@triton.jit
@no_type_check
def _softcapped(scores, softcap):
    """softcap tanh(scores / softcap), from exp so that it stands for every backend."""
    return softcap * (1.0 - 2.0 / (tl.exp(2.0 * scores / softcap) + 1.0))


@triton.jit
@no_type_check
def _of_all_parts(
    rows,
    own,
    parts,
    GROUP_ROWS: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Sum and weight over the parts of the keys, in their order, whoever was the last."""
    dv = tl.arange(0, VALUE_BLOCK)
    most = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    weight = tl.zeros((ROWS,), dtype=tl.float32)
    total = tl.zeros((ROWS, VALUE_BLOCK), dtype=tl.float32)
    for _ in range(parts):
        # Past the first-level cache: other programs have stored.
        part = tl.load(
            rows[:, None] + dv[None, :], mask=own[:, None], other=0.0, cache_modifier=".cg"
        )
        part_weight = tl.load(rows + VALUE_BLOCK, mask=own, other=0.0, cache_modifier=".cg")
        part_most = tl.load(
            rows + VALUE_BLOCK + 1, mask=own, other=float("-inf"), cache_modifier=".cg"
        )
        next_most = tl.maximum(most, part_most)
        shift = tl.where(next_most == float("-inf"), 0.0, next_most)
        decay, growth = tl.exp(most - shift), tl.exp(part_most - shift)
        total = total * decay[:, None] + part * growth[:, None]
        weight = weight * decay + part_weight * growth
        most = next_most
        rows += GROUP_ROWS * (VALUE_BLOCK + 2)
    return total, weight


# One kernel however long the longest sequence of a step is.
@triton.jit(do_not_specialize=["table_row"])
@no_type_check
def paged_attention_kernel(
    query,
    key_cache,
    value_cache,
    out,
    partial,
    counters,
    sinks,
    tiles,
    query_starts,
    seq_lens,
    block_tables,
    scale,
    softcap,
    window,
    blocks,
    query_row,
    query_head,
    out_row,
    out_head,
    table_row,
    SPLITS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
):
    kv_head = tl.program_id(1)
    b = tl.load(tiles + tl.program_id(0) * 2)
    first = tl.load(tiles + tl.program_id(0) * 2 + 1)
    start = tl.load(query_starts + b)
    length = tl.load(query_starts + b + 1) - start
    if first >= length:
        return
    context = tl.load(seq_lens + b)

    m = tl.arange(0, ROWS)
    i, g = first + m // GROUP_ROWS, m % GROUP_ROWS
    live = (i < length) & (i < first + TILE) & (g < GROUP)
    position = context - length + i
    head = kv_head * GROUP + g
    t = (start + i).to(tl.int64)
    dk, dv = tl.arange(0, KEY_BLOCK), tl.arange(0, VALUE_BLOCK)
    q = tl.load(
        query + t[:, None] * query_row + head[:, None] * query_head + dk[None, :],
        mask=live[:, None] & (dk < KEY_DIM)[None, :],
        other=0.0,
    )

    end = tl.minimum(context, context - length + first + TILE)
    begin = 0
    if window is not None:
        begin = tl.maximum(0, context - length + first - window + 1) // KEYS * KEYS
    part, parts = 0, 1
    if SPLITS > 1:
        keys = tl.cdiv(tl.cdiv(end - begin, SPLITS), KEYS) * KEYS
        part, parts = tl.program_id(2), tl.cdiv(end - begin, keys)
        if part >= parts:
            return
        begin += part * keys
        end = tl.minimum(end, begin + keys)

    most = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    weight = tl.zeros((ROWS,), dtype=tl.float32)
    total = tl.zeros((ROWS, VALUE_BLOCK), dtype=tl.float32)
    if sinks is not None:
        # It enters the running softmax as a key that was already seen and has no value.
        sink = tl.load(sinks + head, mask=live, other=0.0).to(tl.float32)
        most = tl.where(part == 0, sink, most)
        weight += tl.where(part == 0, 1.0, 0.0)
    for p0 in range(begin, end, KEYS):
        p = p0 + tl.arange(0, KEYS)
        block = tl.load(block_tables + b * table_row + p // BLOCK_SIZE, mask=p < end, other=-1)
        held = (block >= 0) & (block < blocks)
        slot = (block.to(tl.int64) * BLOCK_SIZE + p % BLOCK_SIZE) * KV_HEADS + kv_head
        k = tl.load(
            key_cache + slot[None, :] * KEY_DIM + dk[:, None],
            mask=held[None, :] & (dk < KEY_DIM)[:, None],
            other=0.0,
        )
        scores = tl.dot(q, k, input_precision="ieee") * scale
        if softcap is not None:
            scores = _softcapped(scores, softcap)
        seen = held[None, :] & (p[None, :] <= position[:, None])
        if window is not None:
            seen = seen & (p[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
        next_most = tl.maximum(most, tl.max(scores, 1))
        # A row that has seen nothing yet subtracts 0: -inf less -inf would be NaN.
        shift = tl.where(next_most == float("-inf"), 0.0, next_most)
        weights = tl.exp(scores - shift[:, None])
        decay = tl.exp(most - shift)
        v = tl.load(
            value_cache + slot[:, None] * VALUE_DIM + dv[None, :],
            mask=held[:, None] & (dv < VALUE_DIM)[None, :],
            other=0.0,
        )
        total = tl.dot(weights.to(v.dtype), v, total * decay[:, None], input_precision="ieee")
        weight = weight * decay + tl.sum(weights, 1)
        most = next_most

    if SPLITS > 1:
        pair = tl.program_id(0) * KV_HEADS + kv_head
        if parts > 1:
            rows = partial + (pair * SPLITS * GROUP_ROWS + m).to(tl.int64) * (VALUE_BLOCK + 2)
            own, mine = m < GROUP_ROWS, rows + part * GROUP_ROWS * (VALUE_BLOCK + 2)
            tl.store(mine[:, None] + dv[None, :], total, mask=own[:, None])
            tl.store(mine + VALUE_BLOCK, weight, mask=own)
            tl.store(mine + VALUE_BLOCK + 1, most, mask=own)
            # All threads have stored before the one that counts says so.
            tl.debug_barrier()
            if tl.atomic_add(counters + pair, 1, sem="acq_rel", scope="gpu") < parts - 1:
                return
            tl.store(counters + pair, 0)
            total, weight = _of_all_parts(rows, own, parts, GROUP_ROWS, VALUE_BLOCK, ROWS)

    total = total / tl.where(weight > 0.0, weight, 1.0)[:, None]
    tl.store(
        out + t[:, None] * out_row + head[:, None] * out_head + dv[None, :],
        total.to(out.dtype.element_ty),
        mask=live[:, None] & (dv < VALUE_DIM)[None, :],
    )
