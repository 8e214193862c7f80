"""A tiny random Llama with adapters made by PEFT, and the real engine process over its socket."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from deltamux.config import EngineConfig
from deltamux.demo.server import Server
from deltamux.demo.tasks import weights_path
from deltamux.engine.build import build_engine
from deltamux.launch.engine_process import EngineProcess
from deltamux.store.digest import content_digest
from deltamux.wire.channel import EngineEnd, FrontendEnd
from deltamux.wire.messages import (
    Cancel,
    FirstToken,
    FromEngine,
    Ready,
    RequestFailed,
    Sampling,
    Shutdown,
    Stats,
    StepDone,
    Stopping,
    Submit,
    ToEngine,
)

VOCABULARY = 128
# Adapter name -> rank; they differ in what they target, too.
RANKS = {"small": 2, "plain": 4, "scaled": 8, "large": 16}
TARGETS = {
    "small": ["q_proj", "v_proj"],
    "plain": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "scaled": ["gate_proj", "up_proj", "down_proj"],
    "large": "all-linear",
}
# Seconds after which a message that does not come is a failure.
PATIENCE = 120.0


@dataclass
class Answer:
    """All that came back for one request, by choice where it says so."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    finish: dict[int, str] = field(default_factory=dict)
    first: dict[int, FirstToken] = field(default_factory=dict)
    error: RequestFailed | None = None


class EngineDriver:
    """The front end's side of one engine, for tests that are plain functions."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.loop = asyncio.new_event_loop()
        self.pid = 0
        self.stats: Stats | None = None
        self.answers: dict[str, Answer] = {}
        self.others: list[FromEngine] = []
        self._end = self.call(self._bind(address))

    async def _bind(self, address: str) -> FrontendEnd:
        return FrontendEnd(address)

    def call(self, coroutine):
        return self.loop.run_until_complete(coroutine)

    def send(self, *messages: ToEngine) -> None:
        for message in messages:
            if isinstance(message, Submit):
                self.answers[message.request_id] = Answer()
            self.call(self._end.send(message))

    def until(self, condition: Callable[[], object]) -> None:
        """Takes in messages until the condition holds."""
        while not condition():
            self._take_in(self.call(asyncio.wait_for(self._end.receive(), PATIENCE)))

    def told(self, kind: type[FromEngine]) -> list[FromEngine]:
        return [message for message in self.others if isinstance(message, kind)]

    def run(self, *submits: Submit) -> list[Answer]:
        """Sends requests at once and waits for all of them."""
        self.send(*submits)
        answers = [self.answers[submit.request_id] for submit in submits]
        wanted = list(zip(answers, submits, strict=True))
        self.until(lambda: all(a.error or len(a.finish) == s.n for a, s in wanted))
        return answers

    def refresh(self) -> None:
        """Waits for the state after all that was sent so far."""
        self.stats = None
        self.send(Cancel("nobody"))
        self.until(lambda: self.stats)

    def is_quiet(self) -> bool:
        """Nothing runs, waits or holds a block."""
        stats = self.stats
        return stats is not None and not (stats.running or stats.waiting or stats.kv_blocks_used)

    def close(self) -> None:
        self.call(self._close())
        self.loop.close()

    async def _close(self) -> None:
        self._end.close()

    def _take_in(self, message: FromEngine) -> None:
        if isinstance(message, RequestFailed):
            self.answers[message.request_id].error = message
        elif isinstance(message, StepDone):
            self.stats = message.stats
            for progress in message.progress:
                answer = self.answers[progress.request_id]
                answer.tokens.setdefault(progress.index, []).extend(progress.token_ids)
                if progress.finish:
                    answer.finish[progress.index] = progress.finish
                if progress.first is not None:
                    answer.first[progress.index] = progress.first
        else:
            self.others.append(message)


@dataclass(frozen=True)
class AdapterFolder:
    path: Path
    digest: str


@dataclass(frozen=True)
class World:
    """A base model's folder, adapters for it, and what transformers and PEFT say."""

    base: Path
    adapters: dict[str, AdapterFolder]
    model: peft.PeftModel

    def greedy(self, prompt: tuple[int, ...], max_tokens: int, adapter: str = "") -> list[int]:
        ids = torch.tensor([prompt])
        kwargs = {
            "attention_mask": torch.ones_like(ids),
            "max_new_tokens": max_tokens,
            "do_sample": False,
        }
        with torch.inference_mode():
            if adapter:
                self.model.set_adapter(adapter)
                output = self.model.generate(input_ids=ids, **kwargs)
            else:
                with self.model.disable_adapter():
                    output = self.model.generate(input_ids=ids, **kwargs)
        return output[0, len(prompt) :].tolist()


def _with_peft(base: LlamaForCausalLM, lora: peft.LoraConfig, name: str) -> peft.PeftModel:
    with warnings.catch_warnings():
        # PEFT asks transformers for an attribute by its old name.
        warnings.simplefilter("ignore", FutureWarning)
        return peft.get_peft_model(base, lora, adapter_name=name)


@pytest.fixture(scope="session")
def endless_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's base, told that it may go on for longer: requests that last until stopped."""
    folder = tmp_path_factory.mktemp("model") / "base"
    shutil.copytree(weights_path() / "base", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 65536}))
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    base = LlamaForCausalLM(config).eval()
    base.save_pretrained(folder / "base")
    model = None
    for name, rank in RANKS.items():
        lora = peft.LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=TARGETS[name],
            init_lora_weights=False,
            use_rslora=name == "scaled",
            task_type="CAUSAL_LM",
        )
        if model is None:
            model = _with_peft(base, lora, name)
        else:
            model.add_adapter(name, lora)
    assert model is not None
    model.eval()
    model.save_pretrained(str(folder / "adapters"))
    folders = {name: folder / "adapters" / name for name in RANKS}
    adapters = {name: AdapterFolder(p, content_digest(p)) for name, p in folders.items()}
    return World(folder / "base", adapters, model)


@pytest.fixture(scope="session")
def engine_config(world: World) -> EngineConfig:
    """Two device slots for four adapters, and blocks for a few sequences."""
    return EngineConfig(
        model=str(world.base),
        max_num_seqs=8,
        max_num_batched_tokens=32,
        block_size=4,
        kv_cache_bytes=1 << 18,
        adapter_device_bytes=1 << 20,
        max_adapter_slots=2,
        threads=1,
    )


@pytest.fixture(scope="session")
def demo_adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `--adapter-dir` of `demo_server`: a test may put folders there, and unloads them then."""
    folder = tmp_path_factory.mktemp("demo") / "adapters"
    return Path(shutil.copytree(weights_path() / "adapters", folder))


@pytest.fixture(scope="session")
def demo_server(demo_adapters: Path) -> Iterator[Server]:
    """The server that README and demo talk of, for all tests that leave it as it was."""
    with Server(
        *("--model", str(weights_path() / "base"), "--adapter-dir", str(demo_adapters)),
        *("--adapter-cache-dir", str(demo_adapters.with_name("cache"))),
        *("--device", "cpu", "--threads", "1"),
    ) as server:
        yield server


@pytest.fixture(scope="session")
def new_driver(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], EngineDriver]:
    return lambda: EngineDriver(f"ipc://{tmp_path_factory.mktemp('socket')}/engine")


@pytest.fixture(scope="module")
def engine(
    engine_config: EngineConfig, new_driver: Callable[[], EngineDriver]
) -> Iterator[EngineDriver]:
    """The engine process, ready."""
    driver = new_driver()
    process = driver.call(EngineProcess.start(engine_config, driver.address))
    try:
        driver.until(lambda: driver.others)
        assert isinstance(driver.others[0], Ready), driver.others[0]
        driver.pid = process.pid
        driver.refresh()
        yield driver
    finally:
        driver.call(process.stop())
        driver.close()


@pytest.fixture(scope="session")
def engine_in_thread(
    new_driver: Callable[[], EngineDriver],
) -> Callable[[EngineConfig], AbstractContextManager[EngineDriver]]:
    """The engine in a thread of the test's own process, which may then hold what it leans on."""

    def serve(address: str, config: EngineConfig) -> None:
        link = EngineEnd(address)
        engine, _ = build_engine(config, link)
        engine.run()
        link.close()

    @contextmanager
    def run(config: EngineConfig) -> Iterator[EngineDriver]:
        driver, others = new_driver(), set(threading.enumerate())
        thread = threading.Thread(target=serve, args=(driver.address, config))
        thread.start()
        try:
            driver.refresh()
            yield driver
        finally:
            driver.send(Shutdown())
            thread.join()
            driver.close()
        for own in set(threading.enumerate()) - others:
            own.join(PATIENCE)
            assert not own.is_alive(), own

    return run


@pytest.fixture
def submit(world: World) -> Callable[..., Submit]:
    """A greedy request, unless told otherwise, through the adapter of this name."""

    def make(
        request_id: str,
        prompt: tuple[int, ...],
        adapter: str = "",
        max_tokens: int = 8,
        sampling: Sampling | None = None,
        **fields,
    ) -> Submit:
        folder = world.adapters.get(adapter)
        return Submit(
            request_id=request_id,
            prompt=prompt,
            sampling=sampling or Sampling(),
            stopping=Stopping(max_tokens=max_tokens),
            adapter=folder.digest if folder else "",
            adapter_path=str(folder.path) if folder else "",
            **fields,
        )

    return make
