"""Captured decode steps of a tiny model, recorded once and replayed for other steps, bit for bit.

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
from deltamux.adapters.primitives.virtual_tokens import VirtualTokens
from deltamux.adapters.rows import Rows
from deltamux.adapters.sites import DeviceSites
from deltamux.base.load import Base, adopt
from deltamux.engine.cuda_graphs import DecodeGraphs, Step
from deltamux.engine.decode_buffers import DecodeBuffers
from deltamux.engine.kv_cache import KVCache
from deltamux.engine.rehearsal import replays_agree, trial_sequence
from deltamux.engine.runner import ModelRunner
from deltamux.engine.sequence import Scheduled, Sequence
from deltamux.wire.messages import Sampling
from deltamux_kernels import native
from deltamux_kernels.shrink import _shrink_kernel
from deltamux_kernels.sign_delta import pack_signs

JITFunction: Any = type(_shrink_kernel)

TritonForms = Callable[[], AbstractContextManager[None]]

CPU = torch.device("cpu")
BLOCK, BLOCKS, SLOTS, SIZES = 4, 64, 5, (1, 4)
VOCABULARY, HIDDEN = 48, 32
LAYER = "model.layers.0"
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
QUERY, VALUE = f"{LAYER}.self_attn.q_proj", f"{LAYER}.self_attn.v_proj"
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


def bottleneck(norm: Tensor | None = None) -> OutputBottleneck:
    return OutputBottleneck(normal(3, HIDDEN), normal(3), "gelu", normal(4, HIDDEN), norm)


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
        OUT: (SignDelta(pack_signs(normal(HIDDEN, HIDDEN) > 0), torch.tensor([0.1])),),
        EMBEDDING: (OutputRotation(normal(8, HIDDEN)),),
    },
    "bottleneck and head": lambda: {
        DOWN: (bottleneck(),),
        HEAD: (Dense(normal(VOCABULARY, HIDDEN)),),
    },
}
# What the host has a part in.
EAGER: dict[str, Callable[[], Payloads]] = {
    "norm": lambda: {f"{LAYER}.input_layernorm": (NormParameters(normal(HIDDEN)),)},
    "bias": lambda: {QUERY: (low_rank(40), RowBias(normal(HIDDEN)))},
    "bottleneck with a norm": lambda: {DOWN: (bottleneck(normal(2, HIDDEN)),)},
    "embeddings": lambda: {EMBEDDING: (DenseEmbedding(normal(VOCABULARY, HIDDEN)),)},
}


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
        self, model: Any, record: Callable[[Step], Step], triton_forms: TritonForms
    ) -> None:
        self.eager, self.captured = Engine(model), Engine(model)
        self.triton_forms = triton_forms
        self.captures = 0

        def counted(step: Step) -> Step:
            self.captures += 1
            return record(step)

        self.graphs = DecodeGraphs(
            SIZES,
            self.captured.runner.forward,
            DecodeBuffers(SIZES[-1], 8, VOCABULARY, CPU),
            self.captured.sites,
            counted,
        )
        with triton_forms():
            assert self.graphs.capture_base()
        self._blocks = iter(range(1, BLOCKS))

    def load(self, slot: int, payloads: Payloads) -> None:
        for engine in (self.eager, self.captured):
            engine.load(slot, adapter(payloads))

    def sequence(self, slot: int | None, first: int) -> Sequence:
        """A prompt of three tokens, with blocks for 12."""
        blocks = [next(self._blocks) for _ in range(3)]
        sequence = trial_sequence(0, [first, 5, 7], blocks, Sampling())
        sequence.slot = slot
        return sequence

    def decoding(self, slot: int | None, first: int) -> Sequence:
        """One whose prompt is computed."""
        sequence = self.sequence(slot, first)
        assert not self.step(sequence)
        return sequence

    @torch.inference_mode()
    def step(self, *sequences: Sequence) -> bool:
        """Everything uncomputed, on both engines alike; whether it was replayed."""
        scheduled = [Scheduled(s, s.num_uncomputed) for s in sequences]
        expected, batch = (e.runner.batch(scheduled) for e in (self.eager, self.captured))
        logits = self.eager.runner.forward(expected, expected.sampled_rows)
        with self.triton_forms():
            replayed = self.graphs.run(batch)
            given = replayed
            if given is None:
                given = self.captured.runner.forward(batch, batch.sampled_rows)
        torch.testing.assert_close(given, logits, atol=1e-5, rtol=1e-5)
        for row, sequence in enumerate(batch.sampled):
            sequence.num_computed = sequence.num_places
            sequence.tokens.append(int(logits[row].argmax()))
        return replayed is not None


@pytest.fixture
def pair(form: str, model: Any, record: Callable[[Step], Step], triton_forms: TritonForms) -> Pair:
    torch.manual_seed(1)
    return Pair(model, record, triton_forms)


def test_what_a_replay_reads_stays(form: str, model: Any, triton_forms: TritonForms) -> None:
    engine = Engine(model)
    captured: list[weakref.ref[Step]] = []

    def forgetting(step: Step) -> Step:
        """A CUDA graph knows addresses only."""
        step()
        captured.append(weakref.ref(step))
        return lambda: None

    buffers = DecodeBuffers(SIZES[-1], 8, VOCABULARY, CPU)
    graphs = DecodeGraphs(SIZES, engine.runner.forward, buffers, engine.sites, forgetting)
    with triton_forms():
        assert graphs.capture_base()
    assert len(captured) == len(SIZES)
    assert all(step() is not None for step in captured)


def test_steps_without_adapters(form: str, pair: Pair) -> None:
    assert pair.captures == len(SIZES)
    first = pair.decoding(None, 5)
    assert pair.step(first)
    others = [pair.decoding(None, token) for token in (8, 9, 10)]
    for step in ((first, *others[:2]), others, (first, *others)):
        assert pair.step(*step)
    assert pair.captures == len(SIZES)
    with pair.triton_forms():
        assert replays_agree(pair.graphs, pair.captured.runner, pair.captured.base)


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
    other = pair.decoding(0, 7)
    for slot, kind in enumerate(EAGER.values(), start=1):
        pair.load(slot, kind())
        eager = pair.decoding(slot, 5)
        assert not pair.step(eager)
        assert not pair.step(eager, other)
    assert pair.step(other)
    pair.load(1, low_ranks(3))
    assert pair.step(pair.decoding(1, 9), other)


def test_prompts_and_mixed_and_large_steps_are_eager(form: str, pair: Pair) -> None:
    decoding = [pair.decoding(None, token) for token in range(5)]
    assert not pair.step(*decoding)
    prompt = pair.sequence(None, 6)
    one_of_three = [Scheduled(decoding[0], 1), Scheduled(prompt, 1)]
    assert pair.graphs.run(pair.captured.runner.batch(one_of_three)) is None
    assert not pair.step(decoding[0], prompt)
    assert pair.step(decoding[0], prompt)


def test_what_cannot_be_captured_is_eager(form: str, pair: Pair) -> None:
    """Here a bank that the host has a part in, and that does not say so."""
    payloads = {QUERY: (low_rank(3), RowBias(normal(HIDDEN)))}
    for engine in (pair.eager, pair.captured):
        bias = engine.base.model.get_submodule(QUERY).banks[RowBias]
        for store, _ in bias.pieces(payloads[QUERY][1]):
            store.host_read = False
    pair.load(0, payloads)
    with capture_logs() as logs:
        adapted, plain = pair.decoding(0, 5), pair.decoding(None, 5)
        assert not pair.step(adapted)
        assert not pair.step(adapted)
    assert [log["rows"] for log in logs] == [1] and logs[0]["log_level"] == "warning"
    assert pair.step(plain)
