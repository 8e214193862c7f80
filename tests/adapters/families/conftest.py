"""Broken adapters, those that AdapterHub has answered for, and the engine's steps held to PEFT."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from deltamux.adapters.checkpoint.files import ADAPTERHUB_WEIGHTS, CONFIG
from deltamux.adapters.parse import parse_adapter
from deltamux.adapters.sites.device_sites import DeviceSites
from deltamux.adapters.sites.rows import Rows
from deltamux.adapters.task import Call
from deltamux.adapters.traits import Traits
from deltamux.base.load import adopt
from deltamux.config import EngineConfig
from deltamux.engine.kv.block_allocator import BlockAllocator
from deltamux.engine.kv.block_manager import BlockManager
from deltamux.engine.kv.kv_cache import KVCache
from deltamux.engine.kv.prefix_pages import PrefixPages
from deltamux.engine.limits import Limits
from deltamux.engine.scheduling.scheduler import Scheduler
from deltamux.engine.sequence import Scheduled
from deltamux.engine.sequence import Sequence as Request
from deltamux.engine.step.runner import ModelRunner
from deltamux.errors import DeltamuxError
from deltamux.wire.messages import Sampling, Stopping

CPU = torch.device("cpu")
# An adapter must move the base's logits by more, so that nothing is left to rounding.
LEAST_EFFECT = 0.1

GOLDENS = Path(__file__).parents[2] / "peers" / "adapterhub"

Tensors = dict[str, Tensor]


@pytest.fixture
def refusal(serve: Callable[..., Any], rewrite: Callable[..., Path]) -> Callable[..., Any]:
    """refusal(name, folder, change, **fields) -> why the adapter is refused with its tensors
    changed so and these fields in its config."""

    def refusal(
        name: str,
        folder: Path,
        change: Callable[[Tensors], Tensors] = lambda tensors: tensors,
        **fields: object,
    ) -> DeltamuxError:
        copied = rewrite(folder, change)
        config = json.loads((copied / CONFIG).read_text())
        (copied / CONFIG).write_text(json.dumps({**config, **fields}))
        with pytest.raises(DeltamuxError) as caught:
            serve(name).parse(copied)
        return caught.value

    return refusal


@pytest.fixture
def refusal_of_part(refusal: Callable[..., DeltamuxError]) -> Callable[..., DeltamuxError]:
    """refusal_of_part(name, folder, part, change) -> why the adapter is refused with the tensors
    of that part changed so."""

    def refusal_of_part(
        name: str, folder: Path, part: str, change: Callable[[Tensor], Tensor]
    ) -> DeltamuxError:
        def changed(tensors: Tensors) -> Tensors:
            return {name: change(t) if part in name else t for name, t in tensors.items()}

        return refusal(name, folder, changed)

    return refusal_of_part


@pytest.fixture
def beside_lora(
    tune: Callable[..., Path], save: Callable[..., Path], as_in_peft: Callable[..., None]
) -> Callable[[str, peft.PeftConfig], None]:
    """beside_lora(name, config): two adapters of that config and one of LoRA answer as in PEFT."""

    def beside_lora(name: str, config: peft.PeftConfig) -> None:
        lora = save(name, r=4, target_modules="all-linear")
        as_in_peft(name, [tune(name, config, 1), lora, tune(name, config, 2)])

    return beside_lora


# Logits behind each token of a request that was computed, by the token's number.
Logits = dict[int, Tensor]


@dataclass
class Paged:
    """A base and adapters behind the engine's scheduler, pages and runner; "" is the base."""

    model: PreTrainedModel
    folders: Sequence[Path]
    budget: int
    num_blocks: int
    block_size: int = 4

    def __post_init__(self) -> None:
        base = adopt(copy.deepcopy(self.model))
        rows = Rows(base.device)
        slots = max(len(self.folders), 1)
        sites = DeviceSites(base.model, base.structure, rows, slots, 8 << 20, base.dtype, CPU)
        self.adapters = {}
        for slot, folder in enumerate(self.folders):
            adapter = parse_adapter(folder, str(folder), base.structure, base.dtype)
            assert sites.reserve(slot, adapter)
            sites.write(slot, adapter)
            self.adapters[adapter.digest] = adapter
        cache = KVCache(base.layers, self.num_blocks + 1, self.block_size, base.dtype, CPU)
        self.runner = ModelRunner(base, cache, rows, sites.task_heads)
        prefixes = PrefixPages(sites.prefixes, cache)
        allocator = BlockAllocator(self.num_blocks + 1)
        self.blocks = BlockManager(allocator, self.block_size, prefixes)
        self.scheduler = Scheduler(
            EngineConfig("", max_num_batched_tokens=self.budget, block_size=self.block_size),
            Limits(base.vocab_size, base.max_model_len, self.num_blocks * self.block_size),
            self.blocks,
            self,
        )

    def acquire(self, digest: str, path: str, call: Call = "Generate") -> int:
        return list(self.adapters).index(digest)

    def traits(self, digest: str) -> Traits:
        return self.adapters[digest].traits

    def release(self, digest: str) -> None:
        """No adapter ever leaves."""

    def blocked(self, digest: str) -> bool:
        return False

    def request(self, adapter: str, prompt: list[int], max_tokens: int, salt: str) -> Request:
        request = Request(
            request_id=salt,
            index=0,
            tokens=list(prompt),
            num_prompt=len(prompt),
            sampling=Sampling(),
            stopping=Stopping(max_tokens=max_tokens),
            priority=0,
            arrival=0.0,
            deadline=None,
            adapter=adapter,
            adapter_path="",
            cache_salt=salt,
        )
        self.scheduler.add(request)
        return request

    def run(self) -> dict[Request, Logits]:
        """Steps until all requests have ended, with greedy tokens."""
        logits: dict[Request, Logits] = {}
        while scheduled := self.scheduler.schedule(0.0).scheduled:
            self._compute(scheduled, logits)
            sampling = [item.sequence for item in scheduled if item.yields]
            for item in scheduled:
                self.blocks.complete(item.sequence, item.num_tokens)
            for request in sampling:
                behind_last = logits[request][len(request.tokens) - 1]
                request.tokens.append(int(behind_last.argmax()))
                if request.num_generated == request.stopping.max_tokens:
                    self.scheduler.finish(request)
        assert not self.scheduler.waiting
        assert not self.blocks.num_used
        return logits

    def _compute(self, scheduled: list[Scheduled], logits: dict[Request, Logits]) -> None:
        """Item by item in one batch: the runner's order of rows is its own."""
        batch = self.runner.batch(scheduled)
        rows = self.runner.forward(batch, torch.arange(len(batch.input_ids)))
        by_place = dict(zip(batch.slot_mapping.tolist(), rows, strict=True))
        for item in scheduled:
            request = item.sequence
            for place in range(request.num_computed, request.num_computed + item.num_tokens):
                block, offset = divmod(place, self.block_size)
                row = by_place[request.blocks[block] * self.block_size + offset]
                if place >= request.virtual.tokens:
                    number = place - request.virtual.tokens
                    logits.setdefault(request, {})[number] = row


@dataclass
class Comparison:
    """Requests through each adapter and the base, all at once, and PEFT's answers."""

    name: str
    base: Callable[[str], PreTrainedModel]
    reference: Callable[..., Tensor]

    def run(
        self,
        folders: Sequence[Path],
        prompts: Sequence[list[int]],
        *,
        budget: int = 9,
        num_blocks: int = 200,
        max_tokens: int = 4,
        options: dict[Path, dict[str, object]] | None = None,
    ) -> Paged:
        """Asserts that logits and tokens are PEFT's; two rounds, the second meets a full cache."""
        paged = Paged(self.base(self.name), folders, budget, num_blocks)
        for _ in range(2):
            requests = {
                paged.request(adapter, prompt, max_tokens, salt=f"{number}"): adapter
                for number, prompt in enumerate(prompts)
                for adapter in ("", *paged.adapters)
            }
            for request, logits in paged.run().items():
                adapter = requests[request]
                expected = self._expected(
                    adapter, request.tokens, (options or {}).get(Path(adapter))
                )
                self._check(request, logits, expected)
        return paged

    def _expected(
        self, adapter: str, tokens: list[int], options: dict[str, object] | None
    ) -> Tensor:
        ids = torch.tensor([tokens[:-1]])
        plain: Tensor = self.base(self.name)(ids).logits[0]
        if not adapter:
            return plain
        tuned = self.reference(self.name, Path(adapter), ids, **(options or {}))[0][-len(plain) :]
        assert (tuned - plain).abs().max() > LEAST_EFFECT
        return tuned

    def _check(self, request: Request, logits: Logits, expected: Tensor) -> None:
        numbers = sorted(logits)
        # What was not computed was found, but never the token that the answer begins with.
        assert numbers == list(range(numbers[0], len(request.tokens) - 1))
        assert numbers[0] < request.num_prompt
        computed = torch.stack([logits[number] for number in numbers])
        torch.testing.assert_close(computed, expected[numbers], atol=3e-5, rtol=1e-5)
        greedy = expected[request.num_prompt - 1 :].argmax(-1)
        assert request.tokens[request.num_prompt :] == greedy.tolist()


@pytest.fixture
def paged_as_in_peft(
    base: Callable[[str], PreTrainedModel], reference: Callable[..., Tensor]
) -> Callable[..., Paged]:
    """paged_as_in_peft(name, folders, prompts, ...): asserts it of each in one mixed batch."""

    def compare(name: str, *args: Any, **options: Any) -> Paged:
        with torch.no_grad():
            return Comparison(name, base, reference).run(*args, **options)

    return compare


@pytest.fixture
def golden() -> Callable[[str], dict[str, Tensor]]:
    """golden(base) -> `ids`, and AdapterHub's logits by adapter; those of "base" are without."""
    return lambda base: load_file(GOLDENS / base / "logits.safetensors")


@pytest.fixture
def paged_as_golden(
    base: Callable[[str], PreTrainedModel], golden: Callable[[str], dict[str, Tensor]]
) -> Callable[[str, Sequence[Path]], None]:
    """paged_as_golden(base, folders): AdapterHub's logits of each, in steps with the base."""

    def compare(name: str, folders: Sequence[Path]) -> None:
        expected = golden(name)
        paged = Paged(base(f"adapterhub/{name}"), folders, budget=7, num_blocks=200)
        prompt = expected["ids"][0].tolist()
        requests = {
            paged.request(adapter, prompt, 1, salt=adapter): Path(adapter).name or "base"
            for adapter in ("", *paged.adapters)
        }
        with torch.no_grad():
            answers = paged.run()
        for request, logits in answers.items():
            computed = torch.stack([logits[number] for number in range(len(prompt))])
            wanted = expected[requests[request]][0]
            torch.testing.assert_close(computed, wanted, atol=3e-5, rtol=1e-5)

    return compare


@pytest.fixture
def changed(tmp_path: Path) -> Callable[..., Path]:
    """changed(adapter, outer, tensors=, base=, more=, **fields): a copy of one of AdapterHub's with
    other fields, names and tensors."""

    def changed(
        adapter: str,
        outer: dict[str, Any] | None = None,
        tensors: Callable[[str], str] = str,
        base: str = "llama",
        more: dict[str, Tensor] | None = None,
        **fields: Any,
    ) -> Path:
        folder = shutil.copytree(GOLDENS / base / adapter, tmp_path / "changed")
        config = json.loads((folder / CONFIG).read_text())
        config["config"].update(fields)
        config.update(outer or {})
        kept = {name: value for name, value in config.items() if value is not None}
        (folder / CONFIG).write_text(json.dumps(kept))
        weights = load_file(folder / ADAPTERHUB_WEIGHTS)
        renamed = {tensors(name): tensor for name, tensor in weights.items()}
        save_file(renamed | (more or {}), folder / ADAPTERHUB_WEIGHTS)
        return folder

    return changed


@pytest.fixture
def reason() -> Callable[[Any, Path], str | None]:
    """reason(served, folder) -> the reason, None where the adapter is served."""

    def reason(served: Any, folder: Path) -> str | None:
        try:
            served.parse(folder)
        except DeltamuxError as error:
            return error.reason
        return None

    return reason
