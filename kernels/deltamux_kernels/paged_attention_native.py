"""Paged attention in C, for float32 on a CPU: the pages are read in place."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar

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

_NONE = torch.empty(0)


class _Attention(ctypes.Structure):
    """What the C code reads of a step; the layer's own pointers come with each call."""

    _fields_: ClassVar = [
        *[(name, POINTER) for name in ("query", "keys", "values", "sinks", "out")],
        *[(name, POINTER) for name in ("states", "starts", "lengths", "tables")],
        *[(name, POINTER) for name in ("splits", "units", "firsts")],
        *[(name, INTEGER) for name in ("sequences", "table_row", "block_size", "rows", "part")],
        *[(name, INTEGER) for name in ("window", "query_row", "query_head")],
        *[(name, INTEGER) for name in ("kv_heads", "group", "key_dim", "value_dim")],
        *[(name, ctypes.c_float) for name in ("scale", "softcap")],
    ]


class NativePlan:
    """All that the layers of a step with the same shapes have in common."""

    def __init__(self, query: torch.Tensor, value_cache: torch.Tensor, scoring: Scoring) -> None:
        """`query` and `value_cache` as they are for `paged_attention`; `read` says the step."""
        _, heads, key_dim = query.shape
        block_size, kv_heads, value_dim = value_cache.shape[1:]
        self._window = scoring.window
        self._state_row = heads * (value_dim + 2)
        self._states = _NONE
        # What the C code reads, for as long as it does.
        self._read: tuple[object, ...] = ()
        self._given = _Attention(
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
        self.pointer = ctypes.pointer(self._given)

    def read(self, batch: AttentionBatch) -> None:
        """From now on the sequences are those of `batch`."""
        tables = _cut(batch, self._window)
        size = int(tables[-1][-1]) * self._state_row
        if size > len(self._states):
            self._states = self._states.new_empty(size)
        given = self._given
        given.states = self._states.data_ptr()
        given.starts, given.lengths = batch.query_starts.data_ptr(), batch.seq_lens.data_ptr()
        given.tables, given.table_row = batch.block_tables.data_ptr(), batch.block_tables.stride(0)
        given.splits, given.units, given.firsts = (table.ctypes.data for table in tables)
        given.sequences = len(batch.query_lens)
        self._read = batch, tables


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
    plan = batch.plans.get(shapes)
    if plan is None:
        plan = batch.plans[shapes] = NativePlan(query, value_cache, common)
        plan.read(batch)
    out = query.new_empty(*query.shape[:2], value_cache.shape[3])
    _native()(
        plan.pointer,
        query.data_ptr(),
        key_cache.data_ptr(),
        value_cache.data_ptr(),
        None if sinks is None else sinks.data_ptr(),
        out.data_ptr(),
    )
    return out


@cache
def _native() -> Callable[..., None]:
    return function("attention", *[POINTER] * 6)


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
