"""The attention function as transformers calls it, against the formula in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deltamux.base.probe import AttentionLayer
from deltamux.engine.kv.kv_cache import KVCache
from deltamux.engine.rehearsal import trial_sequence
from deltamux.engine.sequence import Scheduled
from deltamux.engine.step.attention import PagedAttention
from deltamux.engine.step.batch import StepBatch, StepInputs
from deltamux.engine.transfer import Upload
from deltamux.wire.messages import Sampling

HEADS, KV_HEADS, KEY_DIM, VALUE_DIM, BLOCK = 4, 2, 8, 6, 4
LENGTHS = (11, 3, 6)
CPU = torch.device("cpu")


class Layer(nn.Module):
    layer_idx = 1
    is_causal = True


def cache() -> KVCache:
    """Two layers full of NaN: nothing may be read that was not written."""
    layers = [AttentionLayer(i, KV_HEADS, KEY_DIM, VALUE_DIM, None) for i in range(2)]
    pages = KVCache(layers, 16, BLOCK, torch.float32, CPU)
    for tensor in (*pages.keys, *pages.values):
        tensor[1:] = torch.nan
    return pages


def steps() -> list[StepInputs]:
    """All but the last two tokens of each sequence, then those two one by one."""
    blocks = iter([13, 4, 9, 1, 11, 2])
    sequences = [
        trial_sequence(i, [0] * n, [next(blocks) for _ in range(-(-n // BLOCK))], Sampling())
        for i, n in enumerate(LENGTHS)
    ]
    batches = []
    for last in (2, 1, 0):
        items = [Scheduled(s, s.num_uncomputed - last) for s in sequences]
        batches.append(StepBatch.build(items, BLOCK, CPU).send(Upload(CPU)))
        for item in items:
            item.sequence.num_computed += item.num_tokens
    return batches


def exact(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """[L, H, Dv] of one whole sequence, query [L, H, Dk]."""
    q, k, v = q.double(), k.double(), v.double()
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * options.get("scaling", KEY_DIM**-0.5)
    if softcap := options.get("softcap"):
        scores = torch.tanh(scores / softcap) * softcap
    places = torch.arange(len(q))
    seen = places[None] <= places[:, None]
    if window := options.get("sliding_window"):
        seen &= places[None] > places[:, None] - window
    scores = scores.masked_fill(~seen, -torch.inf)
    sinks = options.get("s_aux")
    if sinks is not None:
        scores = torch.cat((scores, sinks.double().view(-1, 1, 1).expand(-1, len(q), 1)), -1)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., : len(q)], v)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaling": {"scaling": 1.0},
    "window": {"sliding_window": 3},
    "softcap": {"softcap": 2.0},
    "sinks": {"s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "all": {"sliding_window": 4, "softcap": 3.0, "s_aux": torch.ones(HEADS), "scaling": 0.7},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_chunks_over_pages_equal_whole_sequences(name: str) -> None:
    torch.manual_seed(0)
    options = OPTIONS[name]
    sequences = [
        (
            torch.randn(n, HEADS, KEY_DIM),
            torch.randn(n, KV_HEADS, KEY_DIM),
            torch.randn(n, KV_HEADS, VALUE_DIM),
        )
        for n in LENGTHS
    ]
    pages = cache()
    attention = PagedAttention(pages)
    done = [0] * len(LENGTHS)
    outputs: list[list[Tensor]] = [[] for _ in LENGTHS]
    for batch in steps():
        lens = batch.attention.query_lens
        rows = [slice(d, d + n) for d, n in zip(done, lens, strict=True)]
        query, key, value = (
            torch.cat([s[part][r] for s, r in zip(sequences, rows, strict=True)]).transpose(0, 1)[
                None
            ]
            for part in range(3)
        )
        attention.begin(batch.attention, batch.slot_mapping)
        out, weights = attention(Layer(), query, key, value, None, dropout=0.0, **options)
        assert out.shape == (1, sum(lens), HEADS, VALUE_DIM) and weights is None
        for parts, piece in zip(outputs, out[0].split(lens), strict=True):
            parts.append(piece)
        done = [d + n for d, n in zip(done, lens, strict=True)]
    for parts, sequence in zip(outputs, sequences, strict=True):
        torch.testing.assert_close(
            torch.cat(parts).double(), exact(*sequence, **options), atol=1e-5, rtol=1e-5
        )
    assert pages.keys[0][1:].isnan().all(), "another layer's pages were written"
