"""An engine process whose memory really runs out: the kernel refuses its allocations.

The base has a wide MLP, so that the activations of a long prompt are larger than what the limit
leaves, and those of a short one are not.
"""

from __future__ import annotations

import resource
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from deltamux.config import EngineConfig
from deltamux.launch.engine_process import EngineProcess
from deltamux.store.digest import content_digest
from deltamux.store.memory.adapter_cache import _FAILURE_SECONDS
from deltamux.wire.messages import Ready, Sampling, StartupFailed, Stopping, Submit

VOCABULARY = 128
WIDTH = 16384
# Bytes that the limit leaves: less than one activation of 1024 rows, 64 MiB.
SLACK = 48 << 20


@dataclass(frozen=True)
class Wide:
    folder: Path
    digest: str
    model: peft.PeftModel

    @property
    def base(self) -> str:
        return str(self.folder / "base")

    def greedy(self, prompt: tuple[int, ...], adapted: bool) -> list[int]:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            if adapted:
                return self._generate(ids)
            with self.model.disable_adapter():
                return self._generate(ids)

    def _generate(self, ids: torch.Tensor) -> list[int]:
        output = self.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False
        )
        return output[0, ids.shape[1] :].tolist()

    def submit(self, request_id: str, prompt: tuple[int, ...], adapted: bool = False) -> Submit:
        adapter = {"adapter": self.digest, "adapter_path": str(self.folder / "adapter")}
        return Submit(
            request_id,
            prompt,
            Sampling(),
            Stopping(max_tokens=4),
            **(adapter if adapted else {}),
        )


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Wide:
    """The adapter's tensors together are larger than the slack."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.2,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    base = LlamaForCausalLM(config).eval()
    base.save_pretrained(folder / "base")
    lora = peft.LoraConfig(
        r=512,
        target_modules=["gate_proj", "up_proj", "down_proj"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # PEFT asks transformers for an attribute by its old name.
        warnings.simplefilter("ignore", FutureWarning)
        model = peft.get_peft_model(base, lora).eval()
    model.save_pretrained(str(folder / "adapter"))
    return Wide(folder, content_digest(folder / "adapter"), model)


@contextmanager
def limited(pid: int) -> Iterator[None]:
    """The process can have SLACK more memory than it has, and no more."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + SLACK
    before = resource.prlimit(pid, resource.RLIMIT_AS)
    resource.prlimit(pid, resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_AS, before)


def prompt(seed: int, length: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(1, VOCABULARY, (length,), generator=generator).tolist())


def test_the_engine_outlives_a_lack_of_memory(wide: Wide, new_driver, monkeypatch) -> None:
    # Workers that cannot be started would end the process, whoever wanted them.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    config = EngineConfig(
        wide.base,
        threads=1,
        kv_cache_bytes=4 << 20,
        adapter_device_bytes=256 << 20,
        max_num_batched_tokens=1024,
        log_level="error",
    )
    driver = new_driver()
    process = driver.call(EngineProcess.start(config, driver.address))
    try:
        driver.until(lambda: driver.others)
        assert isinstance(driver.others[0], Ready), driver.others[0]
        long, short = prompt(1, 1000), prompt(2, 8)
        with limited(process.pid):
            answers = driver.run(wide.submit("long", long), wide.submit("short", short))
            assert [answer.tokens[0] for answer in answers] == [
                wide.greedy(long, adapted=False),
                wide.greedy(short, adapted=False),
            ]
            (refused,) = driver.run(wide.submit("adapted", short, adapted=True))
            assert refused.error is not None
            assert (refused.error.code, refused.error.reason) == (
                "RESOURCE_EXHAUSTED",
                "OUT_OF_MEMORY",
            )
            (answer,) = driver.run(wide.submit("base", short))
            assert answer.tokens[0] == wide.greedy(short, adapted=False)
        # Until then, requests for an adapter that has failed are refused unseen.
        time.sleep(_FAILURE_SECONDS)
        requests = wide.submit("again", long), wide.submit("late", short, adapted=True)
        answers = driver.run(*requests)
        assert [answer.tokens.get(0) for answer in answers] == [
            wide.greedy(long, adapted=False),
            wide.greedy(short, adapted=True),
        ]
        driver.refresh()
        assert driver.is_quiet()
    finally:
        driver.call(process.stop())
        driver.close()


def test_what_does_not_fit_is_told_at_the_start(wide: Wide, new_driver) -> None:
    config = EngineConfig(wide.base, kv_cache_bytes=1 << 50, log_level="error")
    driver = new_driver()
    process = driver.call(EngineProcess.start(config, driver.address))
    try:
        driver.until(lambda: driver.others)
        (failed,) = driver.others
        assert isinstance(failed, StartupFailed)
        assert "--kv-cache-bytes 1.05e+06 GiB are wanted" in failed.message
    finally:
        driver.call(process.stop())
        driver.close()
