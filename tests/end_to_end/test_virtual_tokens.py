"""Prompts and prefixes through the engine process: fewer slots than adapters, few blocks."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from msgspec import structs
from transformers import LlamaForCausalLM

from deltamux.store.digest import content_digest

TASK = {"task_type": "CAUSAL_LM"}
CONFIGS: dict[str, Callable[[], peft.PeftConfig]] = {
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=10, **TASK),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=6, **TASK),
    "cartridge": lambda: peft.CartridgeConfig(num_virtual_tokens=21, **TASK),
}
PROMPTS = [tuple(range(start, start + length)) for start, length in ((3, 5), (40, 23), (9, 34))]


@pytest.fixture(scope="module")
def folders(world, tmp_path_factory) -> dict[str, Path]:
    base = LlamaForCausalLM.from_pretrained(world.base)
    found = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model = peft.get_peft_model(copy.deepcopy(base), config())
            found[name] = tmp_path_factory.mktemp(name)
            model.save_pretrained(found[name])
    return found


@pytest.fixture(scope="module")
def greedy(world, folders) -> Callable[..., list[int]]:
    """PEFT's answer, each token by a forward pass of its own."""
    models = {}
    for name, folder in folders.items():
        base = LlamaForCausalLM.from_pretrained(world.base)
        with warnings.catch_warnings():
            # PEFT asks transformers for an attribute by its old name.
            warnings.simplefilter("ignore", FutureWarning)
            models[name] = peft.PeftModel.from_pretrained(base, folder).eval()

    def greedy(prompt: tuple[int, ...], max_tokens: int, adapter: str) -> list[int]:
        if adapter not in models:
            return world.greedy(prompt, max_tokens, adapter)
        tokens = list(prompt)
        with torch.inference_mode():
            for _ in range(max_tokens):
                logits = models[adapter](torch.tensor([tokens])).logits
                tokens.append(int(logits[0, -1].argmax()))
        return tokens[len(prompt) :]

    return greedy


@pytest.fixture(scope="module")
def ask(folders):
    """ask(submit, ...) -> the request, through one of these adapters where it names one."""

    def ask(submit, request_id, prompt, adapter="", **fields):
        request = submit(request_id, prompt, adapter, **fields)
        if adapter not in folders:
            return request
        folder = folders[adapter]
        return structs.replace(request, adapter=content_digest(folder), adapter_path=str(folder))

    return ask


def test_answers_are_those_of_peft_in_any_company(engine, submit, ask, greedy):
    cases = [(p, a) for p in PROMPTS for a in ("", "plain", *CONFIGS)]
    for turn in ("first", "again"):
        submits = [ask(submit, f"{turn}-{n}", *case) for n, case in enumerate(cases)]
        for (prompt, adapter), answer in zip(cases, engine.run(*submits), strict=True):
            assert answer.tokens == {0: greedy(prompt, 8, adapter)}, (len(prompt), adapter)
    # Virtual tokens never count: a hit is of the prompt's own tokens.
    (answer,) = engine.run(ask(submit, "hit", PROMPTS[1], "prompt"))
    assert 0 < answer.first[0].cached_prompt_tokens < len(PROMPTS[1])
    assert engine.stats.device_evictions > 0
    assert engine.is_quiet()


def test_recomputation_after_preemption_changes_nothing(engine, submit, ask, greedy):
    """A sliver of the cache: together they need more blocks than there are."""
    before = engine.stats.preemptions
    adapters = ["prompt", "", "cartridge", "prompt", "cartridge", "", "prompt", "cartridge"]
    submits = [
        ask(submit, f"pressed-{n}", tuple(range(n, n + 12)), adapter, max_tokens=90)
        for n, adapter in enumerate(adapters)
    ]
    answers = engine.run(*submits)
    assert engine.stats.preemptions > before
    for request, adapter, answer in zip(submits, adapters, answers, strict=True):
        assert answer.tokens[0] == greedy(request.prompt, 90, adapter)
    assert engine.is_quiet()


def test_the_context_holds_the_virtual_tokens_too(engine, submit, ask):
    """256 positions, 21 of them virtual."""
    fitting = ask(submit, "fits", tuple(range(100)) * 2, "cartridge", max_tokens=50)
    too_long = ask(submit, "long", (5,) * 235, "cartridge", max_tokens=1)
    (answer,) = engine.run(fitting)
    assert len(answer.tokens[0]) == 256 - 21 - 200
    assert answer.finish == {0: "length"}
    (answer,) = engine.run(too_long)
    assert (answer.error.code, answer.error.reason) == ("INVALID_ARGUMENT", "PROMPT_LENGTH")
    assert "21 virtual tokens" in answer.error.message
