"""A real engine on a tiny Llama, stepped by the test itself, and what each of its steps does.

Nothing here takes a time: the numbers are the same on every machine and under any load.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import zmq
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from deltamux.config import EngineConfig
from deltamux.engine.build import build_engine
from deltamux.store.digest import content_digest
from deltamux.wire.channel import EngineEnd
from deltamux.wire.messages import (
    AdapterLoaded,
    Cancel,
    FromEngine,
    LoadAdapter,
    Outbound,
    Sampling,
    StartupFailed,
    Stopping,
    Submit,
    ToEngine,
)

LAYERS, BLOCK_SIZE, RANK, MAX_ADAPTERS = 2, 16, 4, 16
# Of a layer, by the input that they read.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# One block holds it and all that the tests generate behind it.
PROMPT = (5, 6, 7, 8)


class Recorder(TorchDispatchMode):
    """What torch is asked to do while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []
        # Tensors with memory of their own, which none of the operation's arguments has.
        self.allocations = 0
        # Tensors made of numbers that Python or NumPy held.
        self.from_host = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = _memories((args, kwargs))
        result = func(*args, **(kwargs or {}))
        self.operations.append(str(func))
        self.allocations += len(_memories(result) - given)
        self.from_host += func is torch.ops.aten.lift_fresh.default
        return result


def _memories(values: object) -> set[int]:
    return {
        value.untyped_storage()._cdata
        for value in tree_leaves(values)
        if isinstance(value, Tensor) and value.layout == torch.strided
    }


@dataclass(frozen=True)
class StepCounts:
    """One step of the engine."""

    operations: list[str]
    allocations: int
    from_host: int
    # As they came out of the socket.
    messages: list[FromEngine]


# Ends what was sent before a step, and what was sent in it. The engine ignores the one.
_END_OF_ORDERS, _END_OF_STEP = Cancel("end"), StartupFailed("end")


class WholeLink(EngineEnd):
    """Waits for all that was sent before the step, so that no step begins with a part of it."""

    def receive(self) -> list[ToEngine]:
        messages = super().receive()
        while not messages or messages[-1] != _END_OF_ORDERS:
            self.wait(None)
            messages += super().receive()
        return messages


class CountedEngine:
    """An engine in this very thread with its adapters in their slots, behind a real socket."""

    def __init__(
        self, base: Path, adapters: Sequence[Path], address: str, *, enforce_eager: bool
    ) -> None:
        self._adapters = [(content_digest(folder), str(folder)) for folder in adapters]
        self._running: list[str] = []
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(Outbound).decode
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.bind(address)
        self._link = WholeLink(address)
        config = EngineConfig(
            model=str(base),
            max_num_seqs=MAX_ADAPTERS,
            max_num_batched_tokens=MAX_ADAPTERS * len(PROMPT),
            block_size=BLOCK_SIZE,
            kv_cache_bytes=1 << 19,
            adapter_device_bytes=1 << 20,
            max_adapter_slots=MAX_ADAPTERS,
            threads=1,
            enforce_eager=enforce_eager,
        )
        self._engine, _ = build_engine(config, self._link)
        self._load()

    def decode(self, adapters: Sequence[int | None], sampling: Sampling | None = None) -> None:
        """Ends what runs; then each number's adapter, None for the base, has a sequence that
        decodes. All are of one length and have generated two tokens."""
        for request_id in self._running:
            self._send(Cancel(request_id))
        self._running = [f"request-{place}" for place in range(len(adapters))]
        for request_id, adapter in zip(self._running, adapters, strict=True):
            digest, folder = ("", "") if adapter is None else self._adapters[adapter]
            self._send(
                Submit(
                    request_id=request_id,
                    prompt=PROMPT,
                    sampling=sampling or Sampling(),
                    stopping=Stopping(max_tokens=BLOCK_SIZE - len(PROMPT)),
                    adapter=digest,
                    adapter_path=folder,
                    cache_salt=request_id,
                )
            )
        self.step()
        self.step()

    def step(self) -> StepCounts:
        self._send(_END_OF_ORDERS)
        with Recorder() as recorder:
            self._engine.step()
        return StepCounts(
            recorder.operations, recorder.allocations, recorder.from_host, self._received()
        )

    def close(self) -> None:
        self._link.close()
        self._socket.close()
        self._context.term()

    def _load(self) -> None:
        for digest, folder in self._adapters:
            self._send(LoadAdapter(digest, folder, to_device=True))
        loaded = 0
        while loaded < len(self._adapters):
            loaded += sum(isinstance(message, AdapterLoaded) for message in self.step().messages)

    def _send(self, message: ToEngine) -> None:
        self._socket.send(self._encode(message))

    def _received(self) -> list[FromEngine]:
        self._link.send(_END_OF_STEP)
        return list(iter(lambda: self._decode(self._socket.recv()), _END_OF_STEP))


def _write_adapter(folder: Path, model: LlamaForCausalLM, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in model.named_modules():
        if name.endswith(TARGETS):
            a, b = (RANK, module.in_features), (module.out_features, RANK)
            for part, shape in (("A", a), ("B", b)):
                key = f"base_model.model.{name}.lora_{part}.weight"
                tensors[key] = torch.randn(shape, generator=generator)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": TARGETS}
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture(scope="session")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        eos_token_id=None,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def counted(
    model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., CountedEngine]:
    """counted(enforce_eager=...): MAX_ADAPTERS different LoRA adapters on all linear layers."""
    folder = tmp_path_factory.mktemp("counts")
    model.save_pretrained(folder / "base")
    adapters = [
        _write_adapter(folder / f"adapter-{seed}", model, seed) for seed in range(MAX_ADAPTERS)
    ]

    def counted(enforce_eager: bool) -> CountedEngine:
        address = f"ipc://{folder}/socket-{enforce_eager}"
        return CountedEngine(folder / "base", adapters, address, enforce_eager=enforce_eager)

    return counted


@pytest.fixture(scope="session")
def engine(counted: Callable[..., CountedEngine]) -> Iterator[CountedEngine]:
    """One that runs each step anew."""
    engine = counted(enforce_eager=True)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def replaying(counted: Callable[..., CountedEngine]) -> Iterator[CountedEngine]:
    """One that replays the steps that come again."""
    engine = counted(enforce_eager=False)
    yield engine
    engine.close()


@pytest.fixture
def recorder() -> type[Recorder]:
    return Recorder
