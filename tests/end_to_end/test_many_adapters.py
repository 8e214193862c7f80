"""Far more adapters than device slots, all wanted at once."""

from __future__ import annotations

import random
from dataclasses import replace

import peft
import pytest
import torch
from msgspec import structs
from safetensors.torch import load_file, save_file

from deltamux.store.digest import content_digest

NUM_ADAPTERS = 64
SLOTS = 8
PROMPT = tuple(range(50, 60))


@pytest.fixture(scope="module")
def crowd(world, tmp_path_factory):
    """Folders of 64 adapters, each another random change of one that PEFT made."""
    source = world.adapters["large"].path
    weights = load_file(source / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(5)
    folders = []
    for number in range(NUM_ADAPTERS):
        folder = tmp_path_factory.mktemp(f"adapter-{number}")
        (folder / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
        changed = {
            name: tensor * (1 + 0.5 * torch.randn(tensor.shape, generator=generator))
            for name, tensor in weights.items()
        }
        save_file(changed, folder / "adapter_model.safetensors")
        folders.append(folder)
    return folders


@pytest.fixture(scope="module")
def engine(engine_config, engine_in_thread):
    config = replace(
        engine_config,
        max_adapter_slots=SLOTS,
        # About twenty of the crowd: the others are read from disk again and again.
        adapter_host_bytes=20 * 120_000,
    )
    with engine_in_thread(config) as driver:
        yield driver


def peft_answers(world, crowd):
    """One adapter of PEFT's, filled with the weights of one after the other."""
    world.model.load_adapter(str(crowd[0]), "crowd")
    answers = []
    for folder in crowd:
        weights = load_file(folder / "adapter_model.safetensors")
        peft.set_peft_model_state_dict(world.model, weights, adapter_name="crowd")
        answers.append(world.greedy(PROMPT, 8, "crowd"))
    world.model.set_adapter("large")
    world.model.delete_adapter("crowd")
    return answers


def test_every_answer_is_its_adapters_own(engine, world, crowd, submit):
    """Each adapter is wanted three times, in a shuffled order, beside the base."""
    numbers = [number for number in range(NUM_ADAPTERS) for _ in range(3)]
    random.Random(0).shuffle(numbers)
    digests = [content_digest(folder) for folder in crowd]
    submits = [
        structs.replace(
            submit(f"crowd-{n}", PROMPT), adapter=digests[number], adapter_path=str(crowd[number])
        )
        for n, number in enumerate(numbers)
    ]
    answers = engine.run(*submits, *(submit(f"base-{n}", PROMPT) for n in range(8)))

    wanted = peft_answers(world, crowd)
    assert len({tuple(tokens) for tokens in wanted}) > NUM_ADAPTERS / 2
    got = [answer.tokens.get(0) for answer in answers]
    assert got == [wanted[n] for n in numbers] + [world.greedy(PROMPT, 8)] * 8

    engine.refresh()
    assert engine.is_quiet()
    assert engine.stats.device_evictions > NUM_ADAPTERS - SLOTS
    assert engine.stats.host_evictions > 0
