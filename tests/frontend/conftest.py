"""The real gRPC server and the real sockets; the engine at the other end is the test itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from deltamux.config import FrontendConfig
from deltamux.errors import Unavailable
from deltamux.frontend.defaults import GenerationDefaults
from deltamux.frontend.engine_client import EngineClient
from deltamux.frontend.server import Servers, build_servers
from deltamux.frontend.tokenizer import Tokenizer
from deltamux.metrics import Metrics
from deltamux.store.catalog.catalog import Catalog
from deltamux.store.catalog.disk_tier import DiskTier
from deltamux.v1 import adapters_pb2_grpc, control_pb2_grpc, inference_pb2_grpc
from deltamux.v1 import inference_pb2 as v1
from deltamux.wire.channel import EngineEnd, FrontendEnd
from deltamux.wire.messages import (
    AdapterDropped,
    AdapterInfo,
    AdapterLoaded,
    AdapterMoved,
    DropAdapter,
    FirstToken,
    FromEngine,
    LoadAdapter,
    PinAdapter,
    Pooled,
    Progress,
    Ready,
    Stats,
    StepDone,
    Submit,
    ToEngine,
    TokenLogprobs,
)

SPECIAL = ("<s>", "</s>", "<|turn|>")
END = 1
VOCABULARY = len(SPECIAL) + 256
CONTEXT = 2048
TEMPLATE = (
    "<s>{% for m in messages %}<|turn|>{{ m['role'] }}\n{{ m['content'] | trim }}</s>{% endfor %}"
    "{% if messages[-1]['role'] == 'assistant' %}"
    "{{ raise_exception('the last turn must not be the assistant\\'s') }}{% endif %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
INFO = AdapterInfo("lora", 4, 100, 1000, 2000, "a note")
# Seconds after which what does not come is a failure.
PATIENCE = 60.0
STATS = Stats(1, 0, 1, 100, 0, 0, 0, 1, 1, 0.001, 0, 0, 0, 0, 0)

Message = TypeVar("Message", bound=ToEngine)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, behind three special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: number for number, piece in enumerate((*SPECIAL, *alphabet))}
    backend = RustTokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=["<|turn|>"],
        chat_template=TEMPLATE,
    )


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's tokenizer files; nothing else is needed on this side."""
    folder = tmp_path_factory.mktemp("model")
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def reference(model_folder: Path) -> PreTrainedTokenizerFast:
    """The oracle: transformers' own tokenizer."""
    return AutoTokenizer.from_pretrained(model_folder)


@pytest.fixture(scope="session")
def tokenizer(model_folder: Path) -> Tokenizer:
    return Tokenizer.load(str(model_folder))


@pytest.fixture
def ids(reference: PreTrainedTokenizerFast) -> Callable[[str], list[int]]:
    """Text to token ids, by transformers."""
    return lambda text: reference.encode(text, add_special_tokens=False)


class ScriptedEngine:
    """Speaks the engine's side of the socket, word for word as the test says."""

    def __init__(self, address: str) -> None:
        self._end = EngineEnd(address)
        self._inbox: list[ToEngine] = []
        self._pilot: asyncio.Task[None] | None = None

    def ready(self, **overrides: object) -> None:
        facts: dict[str, object] = {
            "model": "tiny",
            "device": "cpu",
            "dtype": "float32",
            "kernel_backend": "torch",
            "vocab_size": VOCABULARY,
            "max_model_len": CONTEXT,
            "kv_cache_tokens": 16 * CONTEXT,
            "adapter_slots": 4,
            "families": ("lora",),
        }
        self.send(Ready(**(facts | overrides)))

    def send(self, message: FromEngine) -> None:
        self._end.send(message)

    def say(
        self,
        submit: Submit,
        token_ids: list[int],
        *,
        index: int = 0,
        finish: str = "",
        first: FirstToken | None = None,
        logprobs: tuple[TokenLogprobs, ...] = (),
    ) -> None:
        """One step that made these tokens for one choice."""
        self.step(Progress(submit.request_id, index, tuple(token_ids), logprobs, finish, first))

    def step(self, *progress: Progress) -> None:
        """One step that did all of this."""
        self.send(StepDone(progress, STATS))

    def pool(self, submit: Submit, pooled: Pooled, tier: str = "") -> None:
        """The one step of a request that wants no tokens."""
        first = FirstToken(0.25, 0.0, tier)
        self.step(Progress(submit.request_id, 0, finish="stop", first=first, pooled=pooled))

    async def receive(self, kind: type[Message]) -> Message:
        """The next message of this kind; those before it stay."""
        async with asyncio.timeout(PATIENCE):
            while True:
                self._inbox += self._end.receive()
                for message in self._inbox:
                    if isinstance(message, kind):
                        self._inbox.remove(message)
                        return message
                await asyncio.sleep(0.001)

    def received(self) -> list[ToEngine]:
        self._inbox += self._end.receive()
        return self._inbox

    def loaded(self, digest: str) -> None:
        """Answers a load or a pin."""
        self.send(AdapterMoved(digest, "device", INFO, 0.5))
        self.send(AdapterLoaded(digest, INFO))

    def answer_all(self, tier: str = "") -> None:
        """From now on, requests are answered with their own prompt, and loads succeed."""
        self._pilot = asyncio.create_task(self._fly(tier))

    async def _fly(self, tier: str) -> None:
        while True:
            match await self.receive(ToEngine):
                case Submit() as submit:
                    self._repeat(submit, tier)
                case LoadAdapter(digest=digest) | PinAdapter(digest=digest):
                    self.loaded(digest)
                case DropAdapter(digest=digest):
                    self.send(AdapterDropped(digest))

    def _repeat(self, submit: Submit, tier: str) -> None:
        for position, token_id in enumerate(submit.prompt):
            first = FirstToken(0.0, 0.0, tier) if position == 0 else None
            last = position == len(submit.prompt) - 1
            self.say(submit, [token_id], first=first, finish="length" if last else "")

    def close(self) -> None:
        if self._pilot is not None:
            self._pilot.cancel()
        self._end.close()


@dataclass(frozen=True)
class Refusal:
    """A status as the client got it, taken apart."""

    code: str
    message: str
    reason: str
    fields: tuple[str, ...]
    retry_after: float | None
    quotas: tuple[str, ...]

    @classmethod
    def of(cls, error: grpc.RpcError) -> Refusal:
        status = rpc_status.from_call(error)
        assert status is not None, f"{error.code()} {error.details()!r} came without details"
        info = _detail(status, error_details_pb2.ErrorInfo)
        retry = _detail(status, error_details_pb2.RetryInfo)
        bad = _detail(status, error_details_pb2.BadRequest)
        quota = _detail(status, error_details_pb2.QuotaFailure)
        assert info is not None and info.domain == "deltamux"
        return cls(
            error.code().name,
            status.message,
            info.reason,
            tuple(violation.field for violation in bad.field_violations) if bad else (),
            retry.retry_delay.ToTimedelta().total_seconds() if retry else None,
            tuple(violation.subject for violation in quota.violations) if quota else (),
        )


def _detail(status, kind):
    for packed in status.details:
        detail = kind()
        if packed.Unpack(detail):
            return detail
    return None


async def _refusal(call: Awaitable[object]) -> Refusal:
    with pytest.raises(grpc.RpcError) as caught:
        await call
    return Refusal.of(caught.value)


@pytest.fixture
def refusal() -> Callable[[Awaitable[object]], Awaitable[Refusal]]:
    """Awaits a call that must fail, and returns how it did."""
    return _refusal


@dataclass
class Harness:
    """A running server, its engine, and stubs to call it."""

    engine: ScriptedEngine
    client: EngineClient
    catalog: Catalog
    servers: Servers
    metrics: Metrics
    channel: grpc.aio.Channel
    connect: Callable[[], ScriptedEngine]

    def __post_init__(self) -> None:
        self.inference = inference_pb2_grpc.InferenceServiceStub(self.channel)
        self.control = control_pb2_grpc.ControlServiceStub(self.channel)
        self.adapters = adapters_pb2_grpc.AdapterServiceStub(self.channel)

    async def collect(self, request: v1.GenerateRequest) -> list[v1.GenerateResponse]:
        return [response async for response in self.inference.Generate(request, timeout=PATIENCE)]

    def sample(self, series: str, **labels: str) -> float | None:
        """What a scrape of the metrics would show now."""
        labels["model_name"] = "tiny"
        return self.metrics.registry.get_sample_value(f"deltamux_{series}", labels)

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not condition():
                await asyncio.sleep(0.001)

    async def restart_engine(self, **overrides: object) -> None:
        """A new engine takes the place of one that has died."""
        self.engine.close()
        self.engine = self.connect()
        self.engine.ready(**overrides)
        await self.client.ready()


@pytest.fixture
def config() -> FrontendConfig:
    return FrontendConfig(model="tiny", port=0, metrics_port=None, max_waiting_requests=8)


@pytest.fixture
async def harness(
    config: FrontendConfig, tokenizer: Tokenizer, tmp_path: Path
) -> AsyncIterator[Harness]:
    metrics = Metrics("tiny")
    client = EngineClient(config.max_waiting_requests, metrics)
    lives = iter(range(100))

    def connect() -> ScriptedEngine:
        address = f"ipc://{tmp_path}/engine-{next(lives)}"
        client.attach(FrontendEnd(address))
        return ScriptedEngine(address)

    engine = connect()
    defaults = GenerationDefaults(end_of_sequence=(END,))
    disk = DiskTier(tmp_path / "cache", 1 << 20, 1 << 20, check=lambda folder: None)
    catalog = Catalog(disk, client)
    client.on_adapter_moved, client.on_adapter_failed = catalog.moved, catalog.failed
    servers = await build_servers(config, client, catalog, tokenizer, defaults, metrics)
    await servers.start()
    engine.ready()
    await client.ready()
    await servers.health.set_serving(True)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{servers.port}") as channel:
        made = Harness(engine, client, catalog, servers, metrics, channel, connect)
        yield made
    await servers.stop(None)
    made.engine.close()
    client.fail_all(Unavailable("the test is over"))
    catalog.close()
