"""aLoRA against PEFT: asleep before its invocation, awake after it, beside LoRA and the base."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from deltamux.adapters.parse import parse_adapter
from deltamux.adapters.sites.device_sites import DeviceSites
from deltamux.adapters.sites.rows import Rows
from deltamux.adapters.traits import Traits
from deltamux.base.load import adopt
from deltamux.config import EngineConfig
from deltamux.engine.activation import NEVER, first_adapted
from deltamux.engine.kv.block_allocator import BlockAllocator
from deltamux.engine.kv.block_manager import BlockManager
from deltamux.engine.kv.kv_cache import KVCache
from deltamux.engine.limits import Limits
from deltamux.engine.sampling.sampler import SampledToken
from deltamux.engine.scheduling.scheduler import Scheduler
from deltamux.engine.sequence import Sequence
from deltamux.engine.step.runner import ModelRunner

INVOCATION = [7, 8, 7]
TWICE = [1, 7, 8, 7, 2, 3, 4, 5, 6, 9, 7, 8, 7, 11, 12]
AT_THE_START = [*INVOCATION, 20, 21]
NOWHERE = [7, 8, 9, 7, 8, 30, 31]
BLOCK, BLOCKS = 4, 60


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def save(base: PreTrainedModel, tmp_path_factory: Any) -> Callable[..., Path]:
    """save(seed, **LoraConfig) -> the folder of an adapter with random numbers in it."""

    def save(seed: int, **config: object) -> Path:
        torch.manual_seed(seed)
        folder = tmp_path_factory.mktemp("adapter")
        lora = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **config)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(copy.deepcopy(base), lora)
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn_like(parameter) * 0.2)
            model.save_pretrained(folder)
        return folder

    return save


@dataclass
class Served:
    """The engine's own scheduler, cache and runner around a copy of the base."""

    base: PreTrainedModel
    known: dict[str, Traits] = field(default_factory=dict)
    slots: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        adopted = adopt(copy.deepcopy(self.base))
        device, rows = adopted.device, Rows(adopted.device)
        self.adopted = adopted
        self.sites = DeviceSites(
            adopted.model, adopted.structure, rows, 4, 1 << 20, adopted.dtype, device
        )
        cache = KVCache(adopted.layers, BLOCKS, BLOCK, adopted.dtype, device)
        self.runner = ModelRunner(adopted, cache, rows)
        config = EngineConfig(model="", block_size=BLOCK, max_num_batched_tokens=6)
        self.blocks = BlockManager(BlockAllocator(BLOCKS), BLOCK, self)
        self.scheduler = Scheduler(config, Limits(64, 64, 64), self.blocks, self)

    def load(self, folder: Path) -> str:
        digest, slot = folder.name, len(self.slots)
        structure, dtype = self.adopted.structure, self.adopted.dtype
        adapter = parse_adapter(folder, digest, structure, dtype)
        assert self.sites.reserve(slot, adapter)
        self.sites.write(slot, adapter)
        self.slots[digest] = slot
        self.known[digest] = adapter.traits
        return digest

    def acquire(self, digest: str, path: str, call: object) -> int | None:
        return self.slots[digest]

    def traits(self, digest: str) -> Traits:
        return self.known[digest]

    def release(self, digest: str) -> None:
        pass

    def blocked(self, digest: str) -> bool:
        return False

    def fill(self, slot: int, blocks: list[int], first: int) -> None:
        raise AssertionError("no adapter here brings keys and values")

    def generate(self, sequences: list[Sequence]) -> list[list[int]]:
        """What each sequence generates, all in the same steps, prompts in chunks."""
        for sequence in sequences:
            self.scheduler.add(sequence)
        while self.scheduler.waiting or self.scheduler.running:
            scheduled = self.scheduler.schedule(0.0).scheduled
            outcomes = iter(self.runner.run(scheduled))
            samples = [item.yields for item in scheduled]
            for item, sampled in zip(scheduled, samples, strict=True):
                self.blocks.complete(item.sequence, item.num_tokens)
                if sampled:
                    outcome = next(outcomes)
                    assert isinstance(outcome, SampledToken)
                    item.sequence.tokens.append(outcome.token_id)
                    if item.sequence.num_generated == item.sequence.stopping.max_tokens:
                        self.scheduler.finish(item.sequence)
        return [sequence.tokens[sequence.num_prompt :] for sequence in sequences]


@pytest.fixture
def ask(new_sequence: Callable[..., Sequence]) -> Callable[..., Sequence]:
    """ask(prompt, adapter) -> a sequence that shares blocks with all others."""

    def ask(prompt: list[int], adapter: str = "") -> Sequence:
        sequence = new_sequence(len(prompt), max_tokens=6, adapter=adapter, salt="")
        sequence.tokens = list(prompt)
        return sequence

    return ask


def generated_by_peft(base: PreTrainedModel, prompt: list[int], folder: Path | None) -> list[int]:
    model: Any = copy.deepcopy(base)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        if folder is not None:
            model = peft.PeftModel.from_pretrained(model, folder).eval()
        ids = torch.tensor([prompt])
        out: Tensor = model.generate(
            input_ids=ids, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None
        )
    return out[0, len(prompt) :].tolist()


def test_each_prompt_is_answered_as_in_peft_in_one_batch(
    base: PreTrainedModel, save: Callable[..., Path], ask: Callable[..., Sequence]
) -> None:
    folders = [
        save(1, r=4, alora_invocation_tokens=INVOCATION),
        save(2, r=8, alora_invocation_tokens=INVOCATION, use_rslora=True, lora_bias=True),
        save(3, r=4),
    ]
    served = Served(base)
    digests = [served.load(folder) for folder in folders]
    asked = [
        (prompt, adapter)
        for prompt in (TWICE, AT_THE_START, NOWHERE)
        for adapter in (None, 0, 1, 2)
    ]
    sequences = [ask(p, "" if a is None else digests[a]) for p, a in asked]
    answers = served.generate(sequences)
    expected = [generated_by_peft(base, p, None if a is None else folders[a]) for p, a in asked]
    assert answers == expected
    by_prompt = [expected[i : i + 4] for i in (0, 4, 8)]
    assert all(len(set(map(tuple, group))) == 4 for group in by_prompt[:2])
    plain, asleep, also_asleep, _ = by_prompt[2]
    assert plain == asleep == also_asleep


@pytest.mark.parametrize("first", ["base", "adapter"])
def test_blocks_before_the_invocation_are_shared_with_the_base(
    first: str, base: PreTrainedModel, save: Callable[..., Path], ask: Callable[..., Sequence]
) -> None:
    folder = save(1, r=4, alora_invocation_tokens=INVOCATION)
    served = Served(base)
    digest = served.load(folder)
    plain, adapted = ask(TWICE), ask(TWICE, digest)
    expected = generated_by_peft(base, TWICE, None), generated_by_peft(base, TWICE, folder)
    order = [plain, adapted] if first == "base" else [adapted, plain]
    for sequence in order:
        served.generate([sequence])
    answers = plain.tokens[len(TWICE) :], adapted.tokens[len(TWICE) :]
    assert answers == expected
    # The invocation begins at place 10, in the third block of four.
    assert order[1].num_cached == 8
    again = ask(TWICE, digest)
    served.generate([again])
    assert again.num_cached == 12 and again.tokens == adapted.tokens


@pytest.mark.parametrize(
    ("prompt", "invocation", "place"),
    [
        (TWICE, (7, 8, 7), 10),
        ([7, 8, 7, 8, 7], (7, 8, 7), 2),
        ([7, 8], (7, 8, 7), NEVER),
        ([7, 8, 7], (7, 8, 7), 0),
        ([1, 2], (), 0),
    ],
)
def test_the_last_occurrence_in_the_prompt_counts(
    prompt: list[int], invocation: tuple[int, ...], place: int
) -> None:
    assert first_adapted(prompt, invocation) == place
