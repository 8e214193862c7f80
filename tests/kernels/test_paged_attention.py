"""Paged attention against the formula in float64, over shuffled blocks in a poisoned cache."""

import random
from dataclasses import dataclass, replace

import pytest
import torch

from deltamux_kernels import AttentionBatch
from deltamux_kernels.paged_attention_native import PART, ROWS, paged_attention_native
from deltamux_kernels.paged_attention_torch import paged_attention_torch
from deltamux_kernels.paged_attention_triton import paged_attention_triton
from deltamux_kernels.scoring import Scoring

FORMS = {
    "torch": paged_attention_torch,
    "native": paged_attention_native,
    "triton": paged_attention_triton,
}
all_forms = pytest.mark.parametrize("form", FORMS, indirect=True)
native_form = pytest.mark.parametrize("form", ["native"], indirect=True)


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


@dataclass(frozen=True)
class Shape:
    block_size: int
    kv_heads: int
    group: int
    key_dim: int
    value_dim: int


def draw(seed: int, device: torch.device, dtype: torch.dtype, sequences: int = 0) -> Step:
    pick = random.Random(seed)
    block_size, kv_heads, group = pick.choice((16, 32)), pick.choice((1, 2)), pick.choice((1, 3, 4))
    key_dim = pick.choice((8, 20, 64))
    shape = Shape(block_size, kv_heads, group, key_dim, pick.choice((key_dim, 12)))
    contexts = [
        pick.choice((1, 2, 15, 16, 17, 40, 70)) for _ in range(sequences or pick.randint(1, 4))
    ]
    decoding = pick.random() < 0.4
    if decoding:
        contexts[0] += 230  # keys of several parts
    lengths = [1 if decoding else pick.choice((1, n, pick.randint(1, n))) for n in contexts]
    return build(seed, shape, lengths, contexts, device, dtype)


def build(
    seed: int,
    shape: Shape,
    lengths: list[int],
    contexts: list[int],
    device: torch.device,
    dtype: torch.dtype,
) -> Step:
    """Random numbers; where no sequence has a key, the cache is NaN and the table wrong."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).to(device)

    columns = -(-max(contexts) // shape.block_size) + 1
    blocks = torch.randperm(len(contexts) * columns, generator=generator)
    table = blocks.view(len(contexts), columns).int()
    # 0 times NaN is NaN: whatever no sequence holds must not even be multiplied.
    pages = (len(blocks), shape.block_size, shape.kv_heads)
    key_cache = torch.full((*pages, shape.key_dim), torch.nan, dtype=dtype, device=device)
    value_cache = torch.full((*pages, shape.value_dim), torch.nan, dtype=dtype, device=device)
    keys = [normal(n, shape.kv_heads, shape.key_dim) for n in contexts]
    values = [normal(n, shape.kv_heads, shape.value_dim) for n in contexts]
    for row, k, v in zip(table, keys, values, strict=True):
        for p in range(len(k)):
            key_cache[row[p // shape.block_size], p % shape.block_size] = k[p]
            value_cache[row[p // shape.block_size], p % shape.block_size] = v[p]
        row[-(-len(k) // shape.block_size) :] = (-1, 10**6)[seed % 2]
    batch = attention_batch(lengths, contexts, table.to(device))
    query = normal(sum(lengths), shape.kv_heads * shape.group, shape.key_dim)
    return Step(batch, query, key_cache, value_cache, keys, values)


def attention_batch(lengths: list[int], contexts: list[int], table: torch.Tensor) -> AttentionBatch:
    starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    lens = torch.tensor(contexts, dtype=torch.int32)
    device = table.device
    return AttentionBatch(
        tuple(lengths), tuple(contexts), starts.to(device), lens.to(device), table
    )


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
    return FORMS[form](step.query, step.key_cache, step.value_cache, step.batch, scoring)


@all_forms
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


@all_forms
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


# Contexts of several parts, on both sides of their borders; few rows and many.
LENGTHS, CONTEXTS = [1, 1, 15, ROWS + 9, 3, 1], [2 * PART + 90, 30, PART + 9, PART + 20, 3, PART]
LONG = [
    Scoring(0.2, None, None, None),
    Scoring(0.2, PART - 5, None, torch.arange(6.0)),
    Scoring(0.2, 7, 3.0, None),
]
long_steps = pytest.mark.parametrize("scoring", LONG, ids=["plain", "window, sinks", "window, cap"])
dims = pytest.mark.parametrize("dims", [(64, 64), (20, 12), (16, 144)])


@native_form
@pytest.mark.parametrize("dtype", ["float32"], indirect=True)
@long_steps
@dims
def test_long_steps_agree_with_the_formula(
    dims: tuple[int, int],
    scoring: Scoring,
    form: str,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    step = build(0, Shape(16, 2, 3, *dims), LENGTHS, CONTEXTS, device, dtype)
    torch.testing.assert_close(
        attend(step, scoring, form).double(), formula(step, scoring), atol=2e-6, rtol=0
    )


@native_form
@pytest.mark.parametrize("dtype", ["float32"], indirect=True)
@long_steps
@dims
def test_a_rows_bits_depend_on_neither_neighbours_nor_the_chunk_of_its_prompt(
    dims: tuple[int, int],
    scoring: Scoring,
    form: str,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    step = build(0, Shape(16, 2, 3, *dims), LENGTHS, CONTEXTS, device, dtype)
    together, row = attend(step, scoring, form), 0
    for b, (length, context) in enumerate(zip(LENGTHS, CONTEXTS, strict=True)):
        for seen in range(context - length + 1, context + 1):
            batch = attention_batch([1], [seen], step.batch.block_tables[b : b + 1])
            alone = replace(step, batch=batch, query=step.query[row : row + 1])
            assert torch.equal(attend(alone, scoring, form)[0], together[row]), (b, seen)
            row += 1


@native_form
@pytest.mark.parametrize("dtype", ["float32"], indirect=True)
@long_steps
def test_a_rows_bits_do_not_depend_on_the_threads(
    scoring: Scoring, form: str, dtype: torch.dtype, device: torch.device
) -> None:
    step = build(0, Shape(16, 2, 3, 64, 64), LENGTHS, CONTEXTS, device, dtype)
    answers, threads = [], torch.get_num_threads()
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        answers.append(attend(step, scoring, form))
    torch.set_num_threads(threads)
    assert all(torch.equal(answer, answers[0]) for answer in answers)


@native_form
@pytest.mark.parametrize("dtype", ["float32"], indirect=True)
def test_a_query_whose_numbers_are_apart_is_attended_all_the_same(
    form: str, dtype: torch.dtype, device: torch.device
) -> None:
    step, scoring = draw(3, device, dtype), Scoring(0.3, None, None, None)
    apart = replace(step, query=step.query.transpose(0, 2).contiguous().transpose(0, 2))
    assert torch.equal(attend(apart, scoring, form), attend(step, scoring, form))
