"""Steps of a tiny model, recorded once and replayed for others, beside an engine that runs them.

A recording is what a CUDA graph is: every operation with the memory and the numbers that it was
called with. Whatever the host has decided in it stays decided.
"""

from __future__ import annotations

import copy
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

import deltamux_kernels
from deltamux.adapters.adapter import Adapter
from deltamux.adapters.primitives.payload import Payload
from deltamux.adapters.primitives.virtual_tokens import Virtual
from deltamux.adapters.sites.device_sites import DeviceSites
from deltamux.adapters.sites.rows import Rows
from deltamux.adapters.traits import Traits
from deltamux.base.load import Base, adopt
from deltamux.engine.kv.kv_cache import KVCache
from deltamux.engine.rehearsal import trial_sequence
from deltamux.engine.replay.cuda_graphs import Step, StepGraphs
from deltamux.engine.replay.recording import Recording
from deltamux.engine.replay.scratch import Scratch
from deltamux.engine.replay.step_buffers import StepBuffers, StepShape
from deltamux.engine.sequence import Scheduled, Sequence
from deltamux.engine.step.batch import StepBatch
from deltamux.engine.step.last_draw import NOTHING_DRAWN, LastDraw
from deltamux.engine.step.runner import ModelRunner
from deltamux.wire.messages import Sampling
from deltamux_kernels import native
from deltamux_kernels.shrink import _shrink_kernel

JITFunction: Any = type(_shrink_kernel)

TritonForms = Callable[[], AbstractContextManager[None]]
Capture = Callable[[Step], Step]
Payloads = dict[str, tuple[Payload, ...]]

CPU = torch.device("cpu")
BLOCK, BLOCKS, SLOTS = 4, 64, 5


class LaunchRecording(Recording):
    """Launches of kernels too, which no operation of torch shows."""

    def __init__(self, launches: list[Any]) -> None:
        super().__init__(Scratch(1 << 26))
        self._launches = launches

    def __torch_dispatch__(self, *given: Any, **options: Any) -> Any:
        self._take_launches()
        return super().__torch_dispatch__(*given, **options)

    def _take_launches(self) -> None:
        self.calls += [launch.replay for launch in self._launches]
        self._launches.clear()

    def replay(self) -> None:
        self._take_launches()
        super().replay()


@pytest.fixture(autouse=True)
def no_native_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """What C computes is nothing that a recording sees."""
    monkeypatch.setattr(native, "available", lambda: False)


@pytest.fixture
def record(traced: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> Capture:
    def record(step: Step) -> Step:
        step()
        with traced() as launches, monkeypatch.context() as patch:
            run = JITFunction.run

            def unseen(*args: Any, **options: Any) -> Any:
                """What the interpreter does with torch is no operation of the step."""
                with _disable_current_modes():
                    return run(*args, **options)

            patch.setattr(JITFunction, "run", unseen)
            with LaunchRecording(launches) as recording:
                step()
        return recording.replay

    return record


@pytest.fixture
def triton_forms(monkeypatch: pytest.MonkeyPatch) -> TritonForms:
    """`with triton_forms():` every op takes the form that it has on a GPU."""

    @contextmanager
    def triton_forms() -> Iterator[None]:
        with monkeypatch.context() as patch:
            for info in pkgutil.iter_modules(deltamux_kernels.__path__):
                module = importlib.import_module(f"deltamux_kernels.{info.name}")
                for name in vars(module).copy():
                    op = name.removesuffix("_torch")
                    form = vars(module).get(f"{op}_triton") or vars(module).get(f"{op}_cuda")
                    if op != name and form:
                        patch.setattr(module, name, with_its_own_arguments(form))
            # Rows of padding hold whatever their memory held: the interpreter would warn of it.
            with np.errstate(over="ignore", invalid="ignore"):
                yield

    return triton_forms


def with_its_own_arguments(form: Callable[..., Any]) -> Callable[..., Any]:
    """The torch form of attention is given the step's own keys and values too."""
    count = form.__code__.co_argcount
    return lambda *args: form(*args[:count])


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
        record: Capture,
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
        self._last = NOTHING_DRAWN

    def load(self, slot: int, payloads: Payloads) -> None:
        for engine in (self.eager, self.captured):
            engine.load(slot, Adapter("", "", 0, 0, "", payloads))

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
        expected, batch = self.eager.runner.batch(scheduled), self._batch_ahead(scheduled)
        logits = self.eager.runner.forward(expected)
        with self.triton_forms():
            replayed = self.graphs.run(batch)
            given = replayed
            if given is None:
                given = self.captured.runner.forward(batch)
        torch.testing.assert_close(given, logits, atol=1e-5, rtol=1e-5)
        for item in scheduled:
            item.sequence.num_computed += item.num_tokens
        # Tokens that everybody knows.
        tokens = logits[:, : self.eager.base.vocab_size].argmax(-1)
        for item, token in zip(batch.sampled, tokens.tolist(), strict=True):
            item.sequence.tokens.append(token)
        self._last = LastDraw(batch.sampled, tokens)
        return replayed is not None

    def _batch_ahead(self, scheduled: list[Scheduled]) -> StepBatch:
        """As it is made before the host knows what the step before has drawn."""
        drawn = {item.sequence for item in self._last.sampled}
        coming = [item.sequence for item in scheduled if item.sequence in drawn]
        tokens = [sequence.tokens.pop() for sequence in coming]
        batch = StepBatch.build(scheduled, BLOCK, CPU, self._last)
        for sequence, token in zip(coming, tokens, strict=True):
            sequence.tokens.append(token)
        assert batch.awaiting.shape == (2, len(coming))
        return batch


def step_graphs(engine: Engine, shapes: tuple[StepShape, ...], capture: Capture) -> StepGraphs:
    rows, sequences = (max(getattr(s, n) for s in shapes) for n in ("rows", "sequences"))
    buffers = StepBuffers(rows, sequences, 8, engine.base.vocab_size, CPU)
    return StepGraphs(shapes, engine.runner.logits, buffers, engine.sites, capture)


@pytest.fixture
def pair_of(
    form: str, model: Any, record: Capture, triton_forms: TritonForms
) -> Callable[[tuple[StepShape, ...]], Pair]:
    """Of the `model` of the test's file, with captured steps of the given shapes."""
    torch.manual_seed(1)
    return lambda shapes: Pair(model, shapes, record, triton_forms)


@pytest.fixture
def graphs_of(
    model: Any,
) -> Callable[[tuple[StepShape, ...], Capture], tuple[Engine, StepGraphs]]:
    """An engine of its own, and its graphs."""

    def made(shapes: tuple[StepShape, ...], capture: Capture) -> tuple[Engine, StepGraphs]:
        engine = Engine(model)
        return engine, step_graphs(engine, shapes, capture)

    return made
