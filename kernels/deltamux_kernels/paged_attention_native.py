"""Paged attention in C, for float32 on a CPU: the pages are read in place."""

from __future__ import annotations

import ctypes
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from deltamux_kernels.attention_batch import AttentionBatch
from deltamux_kernels.native.library import INTEGER, POINTER, function
from deltamux_kernels.scoring import Scoring

# Rows of a sequence that one thread takes at a time; the keys of one with no more rows are divided.
ROWS = 16
# Keys that are weighed together, in whole vectors. A row's parts are joined in order, whoever has
# computed them.
PART = 256


class _Attention(ctypes.Structure):
    """What the C code reads."""

    _fields_: ClassVar = [
        *[(name, POINTER) for name in ("query", "keys", "values", "sinks", "states", "out")],
        *[(name, POINTER) for name in ("starts", "lengths", "tables")],
        *[(name, POINTER) for name in ("splits", "units", "firsts")],
        *[(name, INTEGER) for name in ("sequences", "table_row", "block_size", "rows", "part")],
        *[(name, INTEGER) for name in ("window", "query_row", "query_head")],
        *[(name, INTEGER) for name in ("kv_heads", "group", "key_dim", "value_dim")],
        *[(name, ctypes.c_float) for name in ("scale", "softcap")],
    ]


class _Step(NamedTuple):
    """All that the layers of a step with the same shapes have in common."""

    given: _Attention
    # Of each sequence: among how many its keys are divided, and what comes before it.
    tables: tuple[np.ndarray[Any, np.dtype[np.int64]], ...]
    states: torch.Tensor


def paged_attention_native(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    batch: AttentionBatch,
    scoring: Scoring,
) -> torch.Tensor:
    """`paged_attention`; the bits of a row depend on nothing but its own keys."""
    query = query if query.stride(2) == 1 else query.contiguous()
    sinks = None if scoring.sinks is None else scoring.sinks.float().contiguous()
    common = scoring._replace(sinks=None)
    shapes = ("native", query.shape, query.stride(), value_cache.shape, common)
    if shapes not in batch.plans:
        batch.plans[shapes] = _plan(query, value_cache, batch, common)
    given = batch.plans[shapes].given
    out = query.new_empty(*query.shape[:2], value_cache.shape[3])
    given.query, given.out = query.data_ptr(), out.data_ptr()
    given.keys, given.values = key_cache.data_ptr(), value_cache.data_ptr()
    given.sinks = None if sinks is None else sinks.data_ptr()
    function("attention", POINTER)(ctypes.byref(given))
    return out


def _plan(
    query: torch.Tensor, value_cache: torch.Tensor, batch: AttentionBatch, scoring: Scoring
) -> _Step:
    _, heads, key_dim = query.shape
    block_size, kv_heads, value_dim = value_cache.shape[1:]
    splits, units, firsts = tables = _cut(batch, scoring.window)
    states = query.new_empty(int(firsts[-1]), heads, value_dim + 2)
    given = _Attention(
        states=states.data_ptr(),
        starts=batch.query_starts.data_ptr(),
        lengths=batch.seq_lens.data_ptr(),
        tables=batch.block_tables.data_ptr(),
        splits=splits.ctypes.data,
        units=units.ctypes.data,
        firsts=firsts.ctypes.data,
        sequences=len(batch.query_lens),
        table_row=batch.block_tables.stride(0),
        block_size=block_size,
        rows=ROWS,
        part=PART,
        window=scoring.window or 0,
        query_row=query.stride(0),
        query_head=query.stride(1),
        kv_heads=kv_heads,
        group=heads // kv_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        scale=scoring.scale,
        softcap=scoring.softcap or 0,
    )
    return _Step(given, tables, states)


def _cut(
    batch: AttentionBatch, window: int | None
) -> tuple[np.ndarray[Any, np.dtype[np.int64]], ...]:
    """Splits [B]; units and states [B + 1]."""
    lengths, contexts = np.array(batch.query_lens), np.array(batch.context_lens)
    first = np.maximum(contexts - lengths + 1 - window, 0) if window else 0
    splits = np.where(lengths <= ROWS, -(-contexts // PART) - first // PART, 1)
    units, firsts = np.zeros((2, len(lengths) + 1), np.int64)
    np.cumsum(-(-lengths // ROWS) * splits, out=units[1:])
    np.cumsum(lengths * splits, out=firsts[1:])
    return splits, units, firsts
