"""Paged attention against the formula in float64, over shuffled blocks in a poisoned cache."""

import random
from dataclasses import dataclass

import pytest
import torch

from deltamux_kernels import AttentionBatch
from deltamux_kernels.paged_attention_torch import paged_attention_torch
from deltamux_kernels.paged_attention_triton import paged_attention_triton
from deltamux_kernels.scoring import Scoring


@dataclass
class Step:
    """A batch of sequences, their pages, and the same keys and values in a row."""

    batch: AttentionBatch
    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    keys: list[torch.Tensor]  # per sequence [context, Hkv, Dk]
    values: list[torch.Tensor]

    def own(self, sequences: list[torch.Tensor]) -> torch.Tensor:
        """This step's rows of `keys` or `values`, packed."""
        lengths = self.batch.query_lens
        return torch.cat([s[len(s) - n :] for s, n in zip(sequences, lengths, strict=True)])


def draw(seed: int, device: torch.device, dtype: torch.dtype, sequences: int = 0) -> Step:
    pick, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).to(device)

    block_size, kv_heads, group = pick.choice((16, 32)), pick.choice((1, 2)), pick.choice((1, 3, 4))
    key_dim = pick.choice((8, 20, 64))
    value_dim = pick.choice((key_dim, 12))
    contexts = [
        pick.choice((1, 2, 15, 16, 17, 40, 70)) for _ in range(sequences or pick.randint(1, 4))
    ]
    decoding = pick.random() < 0.4
    if decoding:
        contexts[0] += 230  # keys of several parts
    lengths = [1 if decoding else pick.choice((1, n, pick.randint(1, n))) for n in contexts]
    columns = -(-max(contexts) // block_size) + 1
    blocks = torch.randperm(len(contexts) * columns, generator=generator)
    table = blocks.view(len(contexts), columns).int()
    # 0 times NaN is NaN: whatever no sequence holds must not even be multiplied.
    shape = (len(blocks), block_size, kv_heads)
    key_cache = torch.full((*shape, key_dim), torch.nan, dtype=dtype, device=device)
    value_cache = torch.full((*shape, value_dim), torch.nan, dtype=dtype, device=device)
    keys = [normal(n, kv_heads, key_dim) for n in contexts]
    values = [normal(n, kv_heads, value_dim) for n in contexts]
    for row, k, v in zip(table, keys, values, strict=True):
        for p in range(len(k)):
            key_cache[row[p // block_size], p % block_size] = k[p]
            value_cache[row[p // block_size], p % block_size] = v[p]
        row[-(-len(k) // block_size) :] = pick.choice((-1, 10**6))
    starts = torch.tensor([0, *lengths]).cumsum(0)
    batch = AttentionBatch(
        tuple(lengths),
        tuple(contexts),
        starts.int().to(device),
        torch.tensor(contexts, dtype=torch.int32, device=device),
        table.to(device),
    )
    query = normal(sum(lengths), kv_heads * group, key_dim)
    return Step(batch, query, key_cache, value_cache, keys, values)


def formula(step: Step, scoring: Scoring) -> torch.Tensor:
    """One query at a time, in float64."""
    rows = []
    for b, (k, v) in enumerate(zip(step.keys, step.values, strict=True)):
        length, group = step.batch.query_lens[b], step.query.shape[1] // k.shape[1]
        k, v = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
        for i in range(length):
            position = len(k) - length + i
            first = 0 if scoring.window is None else max(0, position - scoring.window + 1)
            seen = slice(first, position + 1)
            scores = torch.einsum("hd,phd->hp", step.query[len(rows)].double(), k[seen])
            scores = scores * scoring.scale
            if scoring.softcap is not None:
                scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
            if scoring.sinks is not None:
                scores = torch.cat((scores, scoring.sinks.double()[:, None]), dim=1)
            weights = scores.softmax(-1)[:, : position + 1 - first]
            rows.append(torch.einsum("hp,phd->hd", weights, v[seen]))
    return torch.stack(rows)


def attend(step: Step, scoring: Scoring, form: str) -> torch.Tensor:
    form_of_op = paged_attention_torch if form == "torch" else paged_attention_triton
    return form_of_op(step.query, step.key_cache, step.value_cache, step.batch, scoring)


@pytest.mark.parametrize("seed", range(16))
def test_random_steps_agree_with_the_formula(
    seed: int, form: str, dtype: torch.dtype, device: torch.device
) -> None:
    step, pick = draw(seed, device, dtype), random.Random(seed)
    scoring = Scoring(
        scale=pick.choice((step.query.shape[-1] ** -0.5, 0.3)),
        window=pick.choice((None, 1, 5, 33)),
        softcap=pick.choice((None, None, 2.0)),
        sinks=pick.choice((None, torch.randn(step.query.shape[1]).to(dtype).to(device))),
    )
    error = (attend(step, scoring, form) - formula(step, scoring)).abs().max()
    assert error <= 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("form", ["torch"], indirect=True)
@pytest.mark.parametrize("window", [None, 5])
def test_this_steps_own_keys_do_not_change_the_result(
    window: int | None, form: str, dtype: torch.dtype, device: torch.device
) -> None:
    """A first chunk reads them in place of the pages, which are poisoned to show it."""
    step = draw(5, device, dtype)
    assert any(
        q == c > 1 for q, c in zip(step.batch.query_lens, step.batch.context_lens, strict=True)
    )
    scoring = Scoring(0.3, window, None, None)
    expected = attend(step, scoring, form)
    for b, length in enumerate(step.batch.query_lens):
        if length == step.batch.context_lens[b] > 1:
            held = step.batch.block_tables[b][: -(-length // step.key_cache.shape[1])]
            step.key_cache[held] = torch.nan
    out = paged_attention_torch(
        step.query,
        step.key_cache,
        step.value_cache,
        step.batch,
        scoring,
        step.own(step.keys),
        step.own(step.values),
    )
    assert torch.allclose(out, expected, atol=4 * torch.finfo(dtype).eps)


def test_one_sequences_nan_stays_its_own(
    form: str, dtype: torch.dtype, device: torch.device
) -> None:
    step = draw(7, device, dtype, sequences=4)
    scoring = Scoring(0.3, None, None, None)
    expected = attend(step, scoring, form)
    step.value_cache[step.batch.block_tables[0, 0]] = torch.nan
    out, rows = attend(step, scoring, form), step.batch.query_lens[0]
    assert out[:rows].isnan().any()
    assert torch.equal(out[rows:], expected[rows:])


@pytest.mark.parametrize("form", ["triton"], indirect=True)
@pytest.mark.parametrize("dtype", ["float32"], indirect=True)
def test_a_block_beyond_the_cache_is_never_read(
    form: str, dtype: torch.dtype, device: torch.device
) -> None:
    step = draw(2, device, dtype)
    step.batch.block_tables[0, 0] = 10**6
    out = attend(step, Scoring(0.3, None, None, None), form)
    assert out.isfinite().all()
