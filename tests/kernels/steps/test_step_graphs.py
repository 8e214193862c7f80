"""Captured steps of a tiny model, recorded once and replayed for other steps and adapters."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from deltamux.adapters.adapter import Adapter
from deltamux.adapters.primitives.added_tokens import AddedTokens
from deltamux.adapters.primitives.block_rotation import InputRotation, OutputRotation
from deltamux.adapters.primitives.bottleneck import OutputBottleneck
from deltamux.adapters.primitives.dense import Dense, DenseDelta, DenseEmbedding
from deltamux.adapters.primitives.embedding_low_rank import EmbeddingLowRank
from deltamux.adapters.primitives.input_scale import InputScale
from deltamux.adapters.primitives.low_rank import LowRank
from deltamux.adapters.primitives.norm_parameters import NormParameters
from deltamux.adapters.primitives.pair_rotation import PairRotation
from deltamux.adapters.primitives.payload import Payload
from deltamux.adapters.primitives.row_bias import RowBias
from deltamux.adapters.primitives.row_scale import RowScale
from deltamux.adapters.primitives.sign_delta import SignDelta
from deltamux.adapters.primitives.sparse_delta import SparseDelta
from deltamux.adapters.primitives.token_rows import TokenRows
from deltamux.adapters.primitives.virtual_tokens import VirtualTokens
from deltamux.engine.rehearsal import replays_agree
from deltamux.engine.replay.cuda_graphs import Step
from deltamux.engine.replay.step_buffers import StepShape
from deltamux.engine.sequence import Scheduled
from deltamux.engine.step.batch import PooledRows
from deltamux_kernels.sign_delta import pack_signs

# What the conftest makes.
Pair = Any

DECODING = (StepShape(1, 1, decodes=True), StepShape(4, 4, decodes=True))
MIXED = StepShape(12, 4)
SHAPES = (DECODING[1], MIXED)
VOCABULARY, HIDDEN = 48, 32
LAYER = "model.layers.0"
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
QUERY, VALUE = f"{LAYER}.self_attn.q_proj", f"{LAYER}.self_attn.v_proj"
NORM, UNUSUAL = f"{LAYER}.input_layernorm", f"{LAYER}.post_attention_layernorm"
OUT, DOWN = f"{LAYER}.self_attn.o_proj", f"{LAYER}.mlp.down_proj"

pytestmark = [
    pytest.mark.parametrize("form", ["triton"], indirect=True),
    pytest.mark.skipif(torch.cuda.is_available(), reason="records the operations of a CPU"),
]


class SquaredWeight(LlamaRMSNorm):
    """A norm of no form that a kernel has."""

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = super().forward(x) * self.weight
        return normed


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    model = AutoModelForCausalLM.from_config(config)
    model.set_submodule(UNUSUAL, SquaredWeight(HIDDEN))
    return model


def normal(*shape: int) -> Tensor:
    return torch.randn(shape) * 0.3


def low_rank(rank: int, out: int = HIDDEN) -> LowRank:
    return LowRank(normal(rank, HIDDEN), normal(rank, out))


def bottleneck(before: Tensor | None = None, after: Tensor | None = None) -> OutputBottleneck:
    down, bias, up = normal(3, HIDDEN), normal(3), normal(4, HIDDEN)
    return OutputBottleneck(down, bias, "gelu", up, before, after)


Payloads = dict[str, tuple[Payload, ...]]


def low_ranks(rank: int) -> Payloads:
    return {
        QUERY: (low_rank(rank),),
        VALUE: (low_rank(rank + 1, HIDDEN // 2),),
        DOWN: (low_rank(2),),
        EMBEDDING: (EmbeddingLowRank(normal(rank, VOCABULARY), normal(rank, HIDDEN)),),
    }


# Every primitive that kernels compute, in adapters of several.
KINDS: dict[str, Callable[[], Payloads]] = {
    "low rank": lambda: low_ranks(4),
    "scales and tokens": lambda: {
        QUERY: (RowScale(normal(HIDDEN)),),
        DOWN: (InputScale(normal(HIDDEN)), PairRotation(normal(2, HIDDEN), 8)),
        EMBEDDING: (TokenRows.of([7, 3, 9], normal(3, HIDDEN)), VirtualTokens(normal(2, HIDDEN))),
        HEAD: (TokenRows.of([7, 3, 9], normal(3, HIDDEN)),),
    },
    "deltas and rotations": lambda: {
        QUERY: (
            InputRotation(normal(4, HIDDEN)),
            SparseDelta.of(*torch.randint(HIDDEN, (2, 30)), normal(30), HIDDEN),
        ),
        VALUE: (DenseDelta(normal(HIDDEN // 2, HIDDEN)),),
        DOWN: (bottleneck(after=normal(2, HIDDEN)),),
        OUT: (SignDelta(pack_signs(normal(HIDDEN, HIDDEN) > 0), torch.tensor([0.1])),),
        EMBEDDING: (DenseEmbedding(normal(VOCABULARY, HIDDEN)), OutputRotation(normal(8, HIDDEN))),
    },
    "bottleneck, biases and head": lambda: {
        QUERY: (low_rank(40), RowBias(normal(HIDDEN))),
        DOWN: (bottleneck(before=normal(2, HIDDEN)),),
        NORM: (NormParameters(normal(HIDDEN)), RowBias(normal(HIDDEN))),
        HEAD: (Dense(normal(VOCABULARY, HIDDEN)), RowBias(normal(VOCABULARY))),
    },
}


def added(tokens: int) -> Payloads:
    """Tokens of its own behind the base's."""
    ids = range(VOCABULARY, VOCABULARY + tokens)
    return {site: (AddedTokens.of(ids, normal(tokens, HIDDEN)),) for site in (EMBEDDING, HEAD)}


def own_norm() -> Payloads:
    """What the host has a part in."""
    return {UNUSUAL: (NormParameters(normal(HIDDEN)),)}


@pytest.fixture
def pair(pair_of: Callable[..., Pair]) -> Pair:
    """Captured are steps that decode."""
    return pair_of(DECODING)


@pytest.fixture
def mixed(pair_of: Callable[..., Pair]) -> Pair:
    """Captured are a shape of steps that decode, and one of any."""
    return pair_of(SHAPES)


def test_what_a_replay_reads_stays(
    form: str, graphs_of: Callable[..., Any], triton_forms: Callable[[], Any]
) -> None:
    captured: list[weakref.ref[Step]] = []

    def forgetting(step: Step) -> Step:
        """A CUDA graph knows addresses only."""
        step()
        captured.append(weakref.ref(step))
        return lambda: None

    _, graphs = graphs_of(SHAPES, forgetting)
    with triton_forms():
        assert graphs.capture_base()
    assert len(captured) == len(SHAPES)
    assert all(step() is not None for step in captured)


def test_steps_without_adapters(form: str, pair: Pair) -> None:
    assert pair.captures == len(DECODING)
    first = pair.decoding(None, 5)
    assert pair.step(first)
    others = [pair.decoding(None, token) for token in (8, 9, 10)]
    for step in ((first, *others[:2]), others, (first, *others)):
        assert pair.step(*step)
    assert pair.captures == len(DECODING)


def test_any_division_of_the_rows_among_sequences(form: str, mixed: Pair) -> None:
    a, b = mixed.sequence(None, 5, 7), mixed.sequence(None, *range(3, 10))
    assert mixed.step(a)
    assert mixed.step(Scheduled(b, 3), a)
    # More of a prompt, and nothing that is sampled.
    assert mixed.step(Scheduled(b, 2))
    c = mixed.sequence(None, 8, 9, 10, 11, 12)
    assert mixed.step(a, b, Scheduled(c, 4), mixed.sequence(None, 4, 4))
    assert mixed.step(c, b, mixed.sequence(None, 30))
    assert mixed.step(mixed.sequence(None, *range(12)))
    assert mixed.step(a, c)
    assert mixed.captures == len(SHAPES)
    assert not mixed.step(mixed.sequence(None, *range(11)), a, c)
    assert not mixed.step(mixed.sequence(None, 1), a, b, c, mixed.sequence(None, 2))


def test_any_division_of_the_rows_among_adapters(form: str, mixed: Pair) -> None:
    for slot, payloads in enumerate(KINDS.values()):
        mixed.load(slot, payloads())
    a, b, c, d = (
        mixed.sequence(slot, slot, 7, 3, 9, 2, virtual=2 * (slot == 1))
        for slot in range(len(KINDS))
    )
    plain = mixed.sequence(None, 7, 3)
    assert mixed.step(Scheduled(a, 2), Scheduled(b, 5), c)
    assert mixed.step(a, b, plain)
    assert mixed.step(Scheduled(d, 4), plain, c)
    assert mixed.step(plain, mixed.sequence(None, 7))
    assert mixed.step(mixed.sequence(1, 9, virtual=2), d, a)
    # No id of a virtual token is left to it.
    assert mixed.step(plain, mixed.sequence(None, 7, 8))
    assert mixed.captures == len(SHAPES) + 1


def test_rows_with_more_columns_than_the_base(form: str, mixed: Pair) -> None:
    mixed.load(0, added(3))
    mixed.load(1, added(5))
    mixed.load(2, low_ranks(2))
    a, b = mixed.sequence(0, 50, 7, 48), mixed.sequence(1, 52, 3)
    c, plain = mixed.sequence(2, 5, 7), mixed.sequence(None, 7, 3)
    assert mixed.step(Scheduled(a, 2), b, c)
    captures = mixed.captures
    assert mixed.step(a, plain)
    # No row of this step has more.
    assert mixed.step(mixed.sequence(2, 7, 8), mixed.sequence(None, 3, 4))
    assert mixed.step(mixed.sequence(None, 3, 4))
    assert mixed.captures == captures
    assert mixed.step(a, b, plain)
    assert mixed.step(c, plain)
    assert mixed.captures == captures + 1
    # More than those that were captured have room for.
    mixed.load(2, added(20))
    assert mixed.step(mixed.sequence(2, 67, 3), b) and mixed.captures == captures + 2


def test_a_step_of_which_hidden_states_are_wanted_is_eager(form: str, mixed: Pair) -> None:
    item = Scheduled(mixed.sequence(None, 5, 7), 2)
    batch = mixed.captured.runner.batch([item])
    pooled = replace(batch, pooled=(PooledRows(item.sequence, 0, 0, 2, None),))
    with mixed.triton_forms(), torch.inference_mode():
        assert mixed.graphs.run(batch) is not None
        assert mixed.graphs.run(pooled) is None


@pytest.mark.parametrize("stale", [None, *SHAPES])
def test_replays_are_held_to_their_steps(
    form: str,
    graphs_of: Callable[..., Any],
    record: Callable[[Step], Step],
    triton_forms: Callable[[], Any],
    stale: StepShape | None,
) -> None:
    order = iter(sorted(SHAPES, key=lambda shape: -shape.rows))

    def capture(step: Step) -> Step:
        replay = record(step)
        return (lambda: None) if next(order) == stale else replay

    engine, graphs = graphs_of(SHAPES, capture)
    with triton_forms(), capture_logs() as logs:
        assert graphs.capture_base()
        assert replays_agree(graphs, engine.runner, engine.base, 10) == (stale is None)
    differing = [log["rows"] for log in logs if log["log_level"] == "warning"]
    assert differing == ([] if stale is None else [stale.rows])


def test_any_mix_of_adapters_with_one_capture_a_size(form: str, pair: Pair) -> None:
    for slot, payloads in enumerate(KINDS.values()):
        pair.load(slot, payloads())
    a, b, c, d = (pair.decoding(slot, 5 + slot) for slot in range(len(KINDS)))
    plain, captures = pair.decoding(None, 3), pair.captures
    for step in ((a, b, c, d), (d, c, plain), (plain, b, a), (c, plain, d, a), (b, d, c)):
        assert pair.step(*step)
    assert pair.captures == captures + 1
    for one in (plain, d, a):
        assert pair.step(one)
    assert pair.captures == captures + 2


def test_taller_matrices_and_new_sites_are_captured_again(form: str, pair: Pair) -> None:
    pair.load(0, low_ranks(4))
    assert pair.step(pair.decoding(0, 5))
    captures = pair.captures
    for rank, new in ((3, 0), (20, 1), (18, 0)):
        pair.load(1, low_ranks(rank))
        captures += new
        assert pair.step(pair.decoding(1, 7)) and pair.captures == captures
    pair.load(2, {OUT: (low_rank(3),)})
    assert pair.step(pair.decoding(2, 8)) and pair.captures == captures + 1
    # The adapter that had it goes; what was captured for it stays.
    pair.load(2, low_ranks(2))
    pair.load(3, {OUT: (low_rank(3),)})
    assert pair.step(pair.decoding(2, 9), pair.decoding(3, 9))
    pair.load(1, {OUT: (low_rank(3),)})
    assert pair.step(pair.decoding(1, 9)) and pair.captures == captures + 2


def test_an_adapter_that_is_written_after_a_capture(form: str, pair: Pair) -> None:
    """A loader writes while steps of others go on and are captured."""
    pair.load(0, low_ranks(4))
    running = pair.decoding(0, 5)
    assert pair.step(running)
    late = Adapter("", "", 0, 0, "", {OUT: (low_rank(24),)})
    pair.eager.load(1, late)
    assert pair.captured.sites.reserve(1, late)
    # Captured again at once, with no eager step before.
    assert pair.step(running)
    captures = pair.captures
    pair.captured.sites.write(1, late)
    assert pair.step(pair.decoding(1, 6)) and pair.captures == captures


def test_what_is_captured_at_rest(form: str, mixed: Pair) -> None:
    """It leaves the keys and values of what ran before as they are, and steps find it."""
    for rank in (4, 20):
        mixed.load(0, low_ranks(rank))
        running = mixed.decoding(0, 5)
        with mixed.triton_forms():
            while capture := mixed.graphs.next_capture():
                capture()
        captures = mixed.captures
        assert mixed.step(running)
        assert mixed.step(running, mixed.sequence(0, 7, 8, 9), mixed.sequence(None, 7, 8))
        assert mixed.captures == captures


def test_steps_in_which_the_host_has_a_part_are_eager(form: str, pair: Pair) -> None:
    pair.load(0, low_ranks(4))
    pair.load(1, own_norm())
    other, eager = pair.decoding(0, 7), pair.decoding(1, 5)
    assert not pair.step(eager)
    assert not pair.step(eager, other)
    assert pair.step(other)
    pair.load(1, low_ranks(3))
    assert pair.step(pair.decoding(1, 9), other)


def test_steps_without_a_shape_are_eager(form: str, pair: Pair) -> None:
    decoding = [pair.decoding(None, token) for token in range(5)]
    assert not pair.step(*decoding)
    prompt = pair.sequence(None, 6, 5, 7)
    one_of_three = [Scheduled(decoding[0], 1), Scheduled(prompt, 1)]
    assert pair.graphs.run(pair.captured.runner.batch(one_of_three)) is None
    assert not pair.step(decoding[0], prompt)
    assert pair.step(decoding[0], prompt)


def test_what_cannot_be_captured_is_eager(form: str, pair: Pair) -> None:
    """Here a bank that the host has a part in, and that does not say so."""
    payloads = own_norm()
    for engine in (pair.eager, pair.captured):
        bank = engine.base.model.get_submodule(UNUSUAL).banks[NormParameters]
        for store, _ in bank.pieces(payloads[UNUSUAL][0]):
            store.host_read = False
    pair.load(0, payloads)
    with capture_logs() as logs:
        adapted, plain = pair.decoding(0, 5), pair.decoding(None, 5)
        assert not pair.step(adapted)
        assert not pair.step(adapted)
    assert [log["rows"] for log in logs] == [[1, 4]] and logs[0]["log_level"] == "warning"
    assert pair.step(plain)
