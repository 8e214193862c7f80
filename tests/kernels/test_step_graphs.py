"""Captured steps of a tiny model, recorded once and replayed for other steps, bit for bit.

A recording is what a CUDA graph is: every operation with the memory and the numbers that it was
called with. Whatever the host has decided in it stays decided.
"""

from __future__ import annotations

import copy
import importlib
import pkgutil
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import AutoModelForCausalLM, LlamaConfig

import deltamux_kernels
from deltamux.adapters.adapter import Adapter
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
from deltamux.adapters.primitives.virtual_tokens import Virtual, VirtualTokens
from deltamux.adapters.rows import Rows
from deltamux.adapters.sites import DeviceSites
from deltamux.adapters.traits import Traits
from deltamux.base.load import Base, adopt
from deltamux.engine.batch import Pooling
from deltamux.engine.cuda_graphs import Step, StepGraphs
from deltamux.engine.kv_cache import KVCache
from deltamux.engine.rehearsal import replays_agree, trial_sequence
from deltamux.engine.runner import ModelRunner
from deltamux.engine.sequence import Scheduled, Sequence
from deltamux.engine.step_buffers import StepBuffers, StepShape
from deltamux.wire.messages import Sampling
from deltamux_kernels import native
from deltamux_kernels.shrink import _shrink_kernel
from deltamux_kernels.sign_delta import pack_signs

JITFunction: Any = type(_shrink_kernel)

TritonForms = Callable[[], AbstractContextManager[None]]

CPU = torch.device("cpu")
BLOCK, BLOCKS, SLOTS = 4, 64, 5
DECODING = (StepShape(1, 1, decodes=True), StepShape(4, 4, decodes=True))
MIXED = StepShape(12, 4)
SHAPES = (DECODING[1], MIXED)
VOCABULARY, HIDDEN = 48, 32
LAYER = "model.layers.0"
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
QUERY, VALUE = f"{LAYER}.self_attn.q_proj", f"{LAYER}.self_attn.v_proj"
NORM = f"{LAYER}.input_layernorm"
OUT, DOWN = f"{LAYER}.self_attn.o_proj", f"{LAYER}.mlp.down_proj"

pytestmark = [
    pytest.mark.parametrize("form", ["triton"], indirect=True),
    pytest.mark.skipif(torch.cuda.is_available(), reason="records the operations of a CPU"),
]


class Recording(TorchDispatchMode):
    """Records the operations of a step; `replay` repeats them in the memory that they used."""

    # What needs the host to know the device's numbers, or brings the host's own along.
    REFUSED = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "lift_fresh", "equal")

    def __init__(self, kernels: list[Any]) -> None:
        super().__init__()
        self._kernels = kernels
        self._done: list[Callable[[], object]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._take_launches()
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        assert name not in self.REFUSED, f"{name} cannot be captured"
        out = func(*args, **kwargs)
        given = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
        made = [t for t in tensors(out) if t.untyped_storage().data_ptr() not in given]

        def repeat() -> None:
            again = tensors(func(*args, **kwargs))
            for kept, value in zip(tensors(out), again, strict=True):
                if any(kept is t for t in made):
                    kept.copy_(value)

        self._done.append(repeat)
        return out

    def _take_launches(self) -> None:
        self._done += [launch.replay for launch in self._kernels]
        self._kernels.clear()

    def replay(self) -> None:
        self._take_launches()
        for repeat in self._done:
            repeat()


def tensors(tree: Any) -> list[Tensor]:
    """Those in memory that others can see."""
    leaves = torch.utils._pytree.tree_leaves(tree)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_mkldnn]


@pytest.fixture
def record(traced: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> Callable[[Step], Step]:
    def record(step: Step) -> Step:
        step()
        with traced() as launches, monkeypatch.context() as patch:
            run = JITFunction.run

            def unseen(*args: Any, **options: Any) -> Any:
                """What the interpreter does with torch is no operation of the step."""
                with _disable_current_modes():
                    return run(*args, **options)

            patch.setattr(JITFunction, "run", unseen)
            with Recording(launches) as recording:
                step()
        return recording.replay

    return record


@pytest.fixture
def triton_forms(monkeypatch: pytest.MonkeyPatch) -> TritonForms:
    """`with triton_forms():` every op takes its Triton form, as on a GPU."""

    @contextmanager
    def triton_forms() -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(native, "available", lambda: False)
            for info in pkgutil.iter_modules(deltamux_kernels.__path__):
                module = importlib.import_module(f"deltamux_kernels.{info.name}")
                for name in vars(module).copy():
                    form = getattr(module, name.replace("_torch", "_triton"), None)
                    if name.endswith("_torch") and callable(form):
                        patch.setattr(module, name, with_its_own_arguments(form))
            yield

    return triton_forms


def with_its_own_arguments(form: Callable[..., Any]) -> Callable[..., Any]:
    """The torch form of attention is given the step's own keys and values too."""
    count = form.__code__.co_argcount
    return lambda *args: form(*args[:count])


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
    return AutoModelForCausalLM.from_config(config)


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
        EMBEDDING: (OutputRotation(normal(8, HIDDEN)),),
    },
    "bottleneck, biases and head": lambda: {
        QUERY: (low_rank(40), RowBias(normal(HIDDEN))),
        DOWN: (bottleneck(before=normal(2, HIDDEN)),),
        NORM: (NormParameters(normal(HIDDEN)), RowBias(normal(HIDDEN))),
        HEAD: (Dense(normal(VOCABULARY, HIDDEN)), RowBias(normal(VOCABULARY))),
    },
}


def own_embeddings() -> Payloads:
    """What the host has a part in."""
    return {EMBEDDING: (DenseEmbedding(normal(VOCABULARY, HIDDEN)),)}


def adapter(payloads: Payloads) -> Adapter:
    return Adapter("", "", 0, 0, "", payloads)


class Engine:
    """A base with slots for adapters, and a runner."""

    def __init__(self, model: Any) -> None:
        self.base: Base = adopt(copy.deepcopy(model))
        rows = Rows(CPU)
        self.sites = DeviceSites(
            self.base.model, self.base.structure, rows, SLOTS, 4 << 20, torch.float32, CPU
        )
        cache = KVCache(self.base.layers, BLOCKS, BLOCK, torch.float32, CPU)
        self.runner = ModelRunner(self.base, cache, rows)

        self._loaded: set[int] = set()

    def load(self, slot: int, adapter: Adapter) -> None:
        """In place of what the slot has."""
        if slot in self._loaded:
            self.sites.release(slot)
        self._loaded.add(slot)
        assert self.sites.reserve(slot, adapter)
        self.sites.write(slot, adapter)


class Pair:
    """Two engines with the same adapters: one takes the torch forms, the other has graphs."""

    def __init__(
        self,
        model: Any,
        shapes: tuple[StepShape, ...],
        record: Callable[[Step], Step],
        triton_forms: TritonForms,
    ) -> None:
        self.eager, self.captured = Engine(model), Engine(model)
        self.triton_forms = triton_forms
        self.captures = 0

        def counted(step: Step) -> Step:
            self.captures += 1
            return record(step)

        self.graphs = step_graphs(self.captured, shapes, counted)
        with triton_forms():
            assert self.graphs.capture_base()
        self._blocks = iter(range(1, BLOCKS))

    def load(self, slot: int, payloads: Payloads) -> None:
        for engine in (self.eager, self.captured):
            engine.load(slot, adapter(payloads))

    def sequence(self, slot: int | None, *tokens: int, virtual: int = 0) -> Sequence:
        """A prompt, with blocks for 12 tokens."""
        blocks = [next(self._blocks) for _ in range(3)]
        sequence = trial_sequence(0, tokens, blocks, Sampling())
        sequence.slot = slot
        sequence.begin_with(Traits(virtual=Virtual(virtual)))
        return sequence

    def decoding(self, slot: int | None, first: int) -> Sequence:
        """One whose prompt is computed."""
        sequence = self.sequence(slot, first, 5, 7)
        self.step(sequence)
        return sequence

    def step(self, *parts: Sequence | Scheduled) -> bool:
        """Of a sequence everything uncomputed, on both engines alike; whether it was replayed."""
        return self.run(
            [s if isinstance(s, Scheduled) else Scheduled(s, s.num_uncomputed) for s in parts]
        )

    @torch.inference_mode()
    def run(self, scheduled: list[Scheduled]) -> bool:
        expected, batch = (e.runner.batch(scheduled) for e in (self.eager, self.captured))
        logits = self.eager.runner.forward(expected)
        with self.triton_forms():
            replayed = self.graphs.run(batch)
            given = replayed
            if given is None:
                given = self.captured.runner.forward(batch)
        torch.testing.assert_close(given, logits, atol=1e-5, rtol=1e-5)
        for item in scheduled:
            item.sequence.num_computed += item.num_tokens
        for row, sequence in enumerate(batch.sampled):
            sequence.tokens.append(int(logits[row].argmax()))
        return replayed is not None


def step_graphs(
    engine: Engine, shapes: tuple[StepShape, ...], capture: Callable[[Step], Step]
) -> StepGraphs:
    buffers = StepBuffers(MIXED.rows, MIXED.sequences, 8, VOCABULARY, CPU)
    return StepGraphs(shapes, engine.runner.logits, buffers, engine.sites, capture)


@pytest.fixture
def pair(form: str, model: Any, record: Callable[[Step], Step], triton_forms: TritonForms) -> Pair:
    """Captured are steps that decode."""
    torch.manual_seed(1)
    return Pair(model, DECODING, record, triton_forms)


@pytest.fixture
def mixed(form: str, model: Any, record: Callable[[Step], Step], triton_forms: TritonForms) -> Pair:
    """Captured are a shape of steps that decode, and one of any."""
    torch.manual_seed(1)
    return Pair(model, SHAPES, record, triton_forms)


def test_what_a_replay_reads_stays(form: str, model: Any, triton_forms: TritonForms) -> None:
    captured: list[weakref.ref[Step]] = []

    def forgetting(step: Step) -> Step:
        """A CUDA graph knows addresses only."""
        step()
        captured.append(weakref.ref(step))
        return lambda: None

    graphs = step_graphs(Engine(model), SHAPES, forgetting)
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


def test_a_step_of_which_hidden_states_are_wanted_is_eager(form: str, mixed: Pair) -> None:
    item = Scheduled(mixed.sequence(None, 5, 7), 2)
    batch = mixed.captured.runner.batch([item])
    pooled = replace(batch, pooled=(Pooling(item.sequence, 0, 0, 2, None),))
    with mixed.triton_forms(), torch.inference_mode():
        assert mixed.graphs.run(batch) is not None
        assert mixed.graphs.run(pooled) is None


@pytest.mark.parametrize("stale", [None, *SHAPES])
def test_replays_are_held_to_their_steps(
    form: str,
    model: Any,
    record: Callable[[Step], Step],
    triton_forms: TritonForms,
    stale: StepShape | None,
) -> None:
    engine = Engine(model)
    order = iter(sorted(SHAPES, key=lambda shape: -shape.rows))

    def capture(step: Step) -> Step:
        replay = record(step)
        return (lambda: None) if next(order) == stale else replay

    graphs = step_graphs(engine, SHAPES, capture)
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
    late = adapter({OUT: (low_rank(24),)})
    pair.eager.load(1, late)
    assert pair.captured.sites.reserve(1, late)
    # Captured again at once, with no eager step before.
    assert pair.step(running)
    captures = pair.captures
    pair.captured.sites.write(1, late)
    assert pair.step(pair.decoding(1, 6)) and pair.captures == captures


def test_steps_in_which_the_host_has_a_part_are_eager(form: str, pair: Pair) -> None:
    pair.load(0, low_ranks(4))
    pair.load(1, own_embeddings())
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
    payloads = own_embeddings()
    for engine in (pair.eager, pair.captured):
        bank = engine.base.model.get_submodule(EMBEDDING).banks[DenseEmbedding]
        for store, _ in bank.pieces(payloads[EMBEDDING][0]):
            store.host_read = False
    pair.load(0, payloads)
    with capture_logs() as logs:
        adapted, plain = pair.decoding(0, 5), pair.decoding(None, 5)
        assert not pair.step(adapted)
        assert not pair.step(adapted)
    assert [log["rows"] for log in logs] == [[1, 4]] and logs[0]["log_level"] == "warning"
    assert pair.step(plain)
