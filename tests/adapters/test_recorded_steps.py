"""Decode steps that are recorded and replayed, beside an engine that runs each anew."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import nan
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from structlog.testing import capture_logs
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

from deltamux.adapters.parse import parse_adapter
from deltamux.adapters.sites.device_sites import DeviceSites
from deltamux.adapters.sites.rows import Rows
from deltamux.base.load import adopt
from deltamux.engine.kv.kv_cache import KVCache
from deltamux.engine.rehearsal import recorded_agree, trial_sequence
from deltamux.engine.replay import recorded_steps
from deltamux.engine.replay.recorded_steps import STEPS_BEFORE, RecordedSteps
from deltamux.engine.sequence import Scheduled, Sequence
from deltamux.engine.step.batch import PooledRows
from deltamux.engine.step.runner import ModelRunner
from deltamux.wire.messages import Sampling
from deltamux_kernels import native, paged_attention_native

pytestmark = pytest.mark.skipif(not native.available(), reason="needs a C compiler")

CPU = torch.device("cpu")
BLOCK, BLOCKS, SLOTS = 4, 512, 24
# Of keys that are weighed together: contexts soon have several.
PART = 16

TARGETS: dict[str, Any] = {"target_modules": ["q_proj", "v_proj", "up_proj"]}
DOWN: dict[str, Any] = {"target_modules": ["down_proj"]}
FAMILIES: dict[str, peft.PeftConfig] = {
    "lora": peft.LoraConfig(r=5, target_modules="all-linear"),
    "dora": peft.LoraConfig(r=3, use_dora=True, **TARGETS),
    "bias": peft.LoraConfig(r=2, bias="lora_only", **TARGETS),
    "head": peft.LoraConfig(r=2, modules_to_save=["lm_head"], **TARGETS),
    "tokens": peft.LoraConfig(r=2, trainable_token_indices={"embed_tokens": [5, 7]}, **TARGETS),
    "embedding": peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]),
    "vera": peft.VeraConfig(r=8, **DOWN),
    "ia3": peft.IA3Config(
        target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "shira": peft.ShiraConfig(r=2, **TARGETS),
    "ln": peft.LNTuningConfig(),
    "loha": peft.LoHaConfig(r=2, **TARGETS),
    "miss": peft.MissConfig(r=4, **TARGETS),
    "oft": peft.OFTConfig(r=0, oft_block_size=8, **TARGETS),
    "boft": peft.BOFTConfig(boft_block_size=8, boft_n_butterfly_factor=1, **TARGETS),
    "hra": peft.HRAConfig(r=4, **TARGETS),
    "road": peft.RoadConfig(group_size=8, **TARGETS),
    "vblora": peft.VBLoRAConfig(r=2, num_vectors=9, vector_length=4, topk=2, **TARGETS),
}


class Engine:
    """A base with slots for adapters; steps run eagerly, and are `recorded` where asked for."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.base = adopt(copy.deepcopy(model))
        rows = Rows(CPU)
        self.sites = DeviceSites(
            self.base.model, self.base.structure, rows, SLOTS, 8 << 20, torch.float32, CPU
        )
        cache = KVCache(self.base.layers, BLOCKS, BLOCK, torch.float32, CPU)
        self.runner = ModelRunner(self.base, cache, rows)
        self.recorded = RecordedSteps(self.runner.logits, self.sites)

    def load(self, slot: int, folder: Path) -> None:
        adapter = parse_adapter(folder, folder.name, self.base.structure, torch.float32)
        assert self.sites.reserve(slot, adapter)
        self.sites.write(slot, adapter)


class Pair:
    """The same steps of two engines with the same adapters, equal to the bit."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.eager, self.other = Engine(model), Engine(model)
        self._blocks = iter(range(1, BLOCKS))
        self._taken: set[int] = set()

    def load(self, slot: int, folder: Path) -> None:
        """In place of what the slot has."""
        for engine in (self.eager, self.other):
            if slot in self._taken:
                engine.sites.release(slot)
            engine.load(slot, folder)
        self._taken.add(slot)

    def decoding(self, slot: int | None, *prompt: int) -> Sequence:
        """One whose prompt is computed, with blocks for 40 tokens."""
        blocks = [next(self._blocks) for _ in range(10)]
        sequence = trial_sequence(0, prompt, blocks, Sampling())
        sequence.slot = slot
        self.step(sequence)
        return sequence

    @torch.inference_mode()
    def step(self, *sequences: Sequence) -> bool:
        """Everything of them that is uncomputed; whether it was replayed or recorded."""
        scheduled = [Scheduled(sequence, sequence.num_uncomputed) for sequence in sequences]
        expected = self.eager.runner.forward(batch := self.eager.runner.batch(scheduled))
        logits = replayed = self.other.recorded.run(self.other.runner.batch(scheduled))
        if logits is None:
            logits = self.other.runner.forward(self.other.runner.batch(scheduled))
        assert torch.equal(logits, expected)
        for item, token in zip(batch.sampled, expected.argmax(-1).tolist(), strict=True):
            item.sequence.num_computed += item.num_tokens
            item.sequence.tokens.append(token)
        return replayed is not None

    def steps(self, count: int, *sequences: Sequence) -> list[bool]:
        return [self.step(*sequences) for _ in range(count)]


AS_A_RULE = [False] * STEPS_BEFORE + [True] * 6


@pytest.fixture
def pair(base: Callable[[str], PreTrainedModel], monkeypatch: pytest.MonkeyPatch) -> Pair:
    monkeypatch.setattr(paged_attention_native, "PART", PART)
    return Pair(base("llama"))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_of_every_family(pair: Pair, tune: Callable[..., Path], family: str) -> None:
    pair.load(0, tune("llama", FAMILIES[family]))
    sequences = pair.decoding(0, 5, 9, 11), pair.decoding(None, 7), pair.decoding(0, 12, 5)
    assert pair.steps(8, *sequences) == AS_A_RULE


def test_all_families_in_one_step(pair: Pair, tune: Callable[..., Path]) -> None:
    for slot, config in enumerate(FAMILIES.values()):
        pair.load(slot, tune("llama", config, seed=slot))
    sequences = [pair.decoding(slot, 5, 9 + slot, 7) for slot in range(len(FAMILIES))]
    assert pair.steps(8, *sequences, pair.decoding(None, 7)) == AS_A_RULE


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "qwen3"])
def test_other_architectures(
    base: Callable[[str], PreTrainedModel], tune: Callable[..., Path], name: str
) -> None:
    pair = Pair(base(name))
    pair.load(0, tune(name, peft.LoraConfig(r=5, target_modules="all-linear")))
    assert pair.steps(8, pair.decoding(0, 5, 9, 11), pair.decoding(None, 7)) == AS_A_RULE


def test_contexts_that_grow_by_whole_parts(pair: Pair) -> None:
    long, short = pair.decoding(None, *range(3, 3 + PART)), pair.decoding(None, 7)
    assert all(pair.steps(PART + 5, long, short)[STEPS_BEFORE:])


def test_sequences_that_come_and_go(pair: Pair, tune: Callable[..., Path]) -> None:
    for slot in range(2):
        pair.load(slot, tune("llama", FAMILIES["shira"], seed=slot))
    a, b, c = pair.decoding(0, 5, 6), pair.decoding(1, 7), pair.decoding(None, 8, 9)
    assert pair.steps(3, a, b, c)[-1] and pair.steps(3, a, c)[-1]
    # A prompt in between, and back to what was recorded.
    d = pair.decoding(1, 4, 3)
    assert pair.step(a, c) and pair.step(a, b, c)
    # As many rows of the same adapters, other sequences.
    assert pair.step(a, d, c)
    # Another division of as many rows among the same adapters.
    assert not pair.step(a, b, d)


def test_another_adapter_in_a_slot(pair: Pair, tune: Callable[..., Path]) -> None:
    for seed in range(2):
        pair.load(0, tune("llama", FAMILIES["shira"], seed=seed))
        assert pair.steps(8, pair.decoding(0, 5, 9)) == AS_A_RULE


def test_a_step_of_what_is_found_by_slot_serves_any_adapters(
    pair: Pair, tune: Callable[..., Path]
) -> None:
    configs = [
        peft.LoraConfig(r=16, **TARGETS),
        peft.LoraConfig(r=3, use_dora=True, target_modules=["q_proj", "down_proj"]),
        peft.LoraConfig(r=8, bias="lora_only", target_modules=["up_proj"]),
        FAMILIES["ia3"],
    ]
    for slot, config in enumerate(configs):
        pair.load(slot, tune("llama", config, seed=slot))
    a, b, c, d = (pair.decoding(slot, 5, 6 + slot) for slot in range(4))
    e, f = pair.decoding(0, 4, 3), pair.decoding(None, 8, 9)
    assert pair.steps(3, a, b, c) == [False, False, True]
    assert pair.step(b, c, d) and pair.step(a, e, f) and pair.step(d, f, a)
    # Another one in a slot, and one that lies elsewhere.
    pair.load(1, tune("llama", configs[2], seed=7))
    pair.load(SLOTS - 1, tune("llama", configs[1], seed=8))
    assert pair.step(a, b, pair.decoding(SLOTS - 1, 7, 5))
    # One that only fills pages, before its first step.
    prefix = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    pair.load(4, tune("llama", prefix))
    assert pair.step(a, b, pair.decoding(4, 7, 5))
    # More rows in one slot than a tile has.
    many = [pair.decoding(2, 5, token) for token in range(20)]
    assert pair.steps(3, *many)[-1]
    assert pair.step(a, b, c, d, e, f, *many[:14])


def test_a_step_is_recorded_again_for_more_than_ever_was_found_by_slot(
    pair: Pair, tune: Callable[..., Path]
) -> None:
    pair.load(0, tune("llama", peft.LoraConfig(r=4, target_modules=["q_proj"])))
    a = pair.decoding(0, 5, 6)
    assert pair.steps(3, a)[-1]
    taller = peft.LoraConfig(r=17, target_modules=["q_proj"])
    wider = peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj"])
    for slot, config in enumerate((taller, wider), start=1):
        pair.load(slot, tune("llama", config))
        assert pair.steps(4, pair.decoding(slot, 7, 5)) == [False, False, True, True]
        assert pair.step(a)


def test_what_is_found_by_slot_is_recorded_for_other_adapters_alone_beside_them(
    pair: Pair, tune: Callable[..., Path]
) -> None:
    for slot, family in enumerate(("lora", "lora", "shira")):
        pair.load(slot, tune("llama", FAMILIES[family], seed=slot))
    a, b, c = (pair.decoding(slot, 5, 6 + slot) for slot in range(3))
    assert pair.steps(3, a, b)[-1] and pair.steps(3, a, c)[-1]
    assert not pair.step(b, c)
    # What has other parts comes to a slot that had none, and goes again.
    pair.load(1, tune("llama", FAMILIES["shira"], seed=5))
    assert not pair.step(a, b)
    pair.load(1, tune("llama", FAMILIES["lora"], seed=6))
    assert pair.step(a, b)


def test_adapters_that_come_to_other_slots(pair: Pair, tune: Callable[..., Path]) -> None:
    folders = [tune("llama", FAMILIES[family]) for family in ("lora", "dora", "oft")]
    pair.load(0, folders[0])
    sequence = pair.decoding(0, 5, 9)
    assert pair.steps(3, sequence)[-1]
    for slot, folder in enumerate(folders, start=1):
        pair.load(slot, folder)
        pair.step(pair.decoding(slot, 3))
        # What the recorded step alone knows the address of would be gone now.
        gc.collect()
        assert pair.step(sequence)
        pair.load(slot, folders[0])
        assert pair.step(sequence)


def test_steps_with_prompts_and_chunks_are_not_replayed(pair: Pair) -> None:
    decoding = pair.decoding(None, 5)
    for _ in range(2 * STEPS_BEFORE):
        prompt = trial_sequence(0, [6, 7], [BLOCKS - 1], Sampling())
        assert not pair.step(decoding, prompt)
    chunk = trial_sequence(0, [6, 7], [BLOCKS - 1], Sampling())
    for _ in range(2 * STEPS_BEFORE):
        batch = pair.other.runner.batch([Scheduled(chunk, 1)])
        assert pair.other.recorded.run(batch) is None


def test_a_step_that_takes_too_much_memory_runs_eagerly(pair: Pair) -> None:
    for most, replayed in ((8 << 20, True), (1 << 20, False)):
        pair.other.recorded = RecordedSteps(pair.other.runner.logits, pair.other.sites, most)
        assert pair.steps(4, pair.decoding(None, 5, 6))[-1] == replayed


def test_of_the_recorded_steps_those_used_last_stay(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorded_steps, "_MOST_STEPS", 2)
    a, b, c = (pair.decoding(None, token, 5) for token in (5, 6, 7))
    assert pair.steps(3, a)[-1] and pair.steps(3, a, b)[-1] and pair.step(a)
    assert pair.steps(3, a, b, c)[-1]
    assert pair.step(a) and not pair.step(a, b)


def test_a_step_of_which_hidden_states_are_wanted_runs_eagerly(pair: Pair) -> None:
    sequence = pair.decoding(None, 5)
    assert pair.steps(3, sequence)[-1]
    batch = pair.other.runner.batch([Scheduled(sequence, 1)])
    pooled = replace(batch, pooled=(PooledRows(sequence, 0, 0, 1, None),))
    assert pair.other.recorded.run(batch) is not None
    assert pair.other.recorded.run(pooled) is None


def test_a_step_that_memory_does_not_suffice_to_record_runs_eagerly_until_it_does(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def starved(*args: Any) -> Tensor:
        raise MemoryError

    sequence = pair.decoding(None, 5)
    with monkeypatch.context() as patch:
        patch.setattr(pair.other.recorded, "_forward", starved)
        assert not any(pair.steps(6, sequence))
    assert pair.steps(STEPS_BEFORE + 1, sequence)[-1]


class Deciding(nn.Module):
    """Does something else for the largest of the numbers that it is given."""

    def __init__(self, inner: nn.Module, decide: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.inner, self.decide = inner, decide

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y * 2 if self.decide(x) else y


@pytest.fixture
def agrees(
    base: Callable[[str], PreTrainedModel],
) -> Iterator[Callable[[Callable[[Tensor], bool] | None], tuple[bool, list[str]]]]:
    """agrees(decide): whether recorded steps of such a model are used, and what is logged."""

    def agrees(decide: Callable[[Tensor], bool] | None) -> tuple[bool, list[str]]:
        model = copy.deepcopy(base("llama"))
        assert isinstance(model, LlamaForCausalLM)
        engine = Engine(model)
        if decide is not None:
            norm = engine.base.model.model.norm
            engine.base.model.model.norm = Deciding(norm, decide)
        with capture_logs() as logs:
            agree = recorded_agree(engine.recorded, engine.runner, engine.base, 60)
        return agree, [log["log_level"] for log in logs if log["log_level"] != "debug"]

    yield agrees


@pytest.fixture
def used_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for memory gets what is full of NaN."""
    empty = torch.empty

    def used(*args: Any, **options: Any) -> Tensor:
        memory = empty(*args, **options)
        return memory.fill_(nan) if memory.is_floating_point() else memory

    monkeypatch.setattr(torch, "empty", used)


@pytest.mark.usefixtures("used_memory")
def test_a_cache_in_memory_that_was_used_before_is_no_reason_against_recording(agrees: Any) -> None:
    assert agrees(None) == (True, [])


def test_what_a_base_has_decided_once_is_found_out_at_startup(agrees: Any) -> None:
    assert agrees(None) == (True, [])
    assert agrees(lambda x: bool(x.sum() > 0)) == (False, ["info"])
    calls = iter(range(100))
    # The host has its own reason, which no operation shows.
    assert agrees(lambda x: next(calls) > 0) == (False, ["warning"])
