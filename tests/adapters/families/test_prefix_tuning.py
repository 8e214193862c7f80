"""Prefixes of keys and values against PEFT, in steps with prompts, LoRA and the base."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from deltamux.errors import DeltamuxError
from deltamux.wire.messages import Embed

Make = Callable[..., Any]

TASK = {"task_type": "CAUSAL_LM"}
PROMPTS = [[5, 9, 33, 2, 17, 40, 8], [7], [5, 9, 33, 2, 50]]


def prefix(tokens: int = 6, **fields: object) -> peft.PeftConfig:
    return peft.PrefixTuningConfig(num_virtual_tokens=tokens, **TASK, **fields)


def prompt(tokens: int) -> peft.PeftConfig:
    return peft.PromptTuningConfig(num_virtual_tokens=tokens, **TASK)


def cartridge(tokens: int) -> peft.PeftConfig:
    return peft.CartridgeConfig(num_virtual_tokens=tokens, num_frozen_tokens=1, **TASK)


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "gemma2", "gemma3", "qwen3", "gpt_neox", "mistral"]
)
def test_prefixes_beside_prompts_lora_and_the_base(
    name: str, tune: Make, save: Make, paged_as_in_peft: Make
) -> None:
    """The longest is longer than the sliding windows of 8."""
    lora = {"gpt2": ["c_attn"], "gpt_neox": ["query_key_value"]}.get(name, ["q_proj", "v_proj"])
    configs = (
        prefix(),
        prefix(4, prefix_projection=True, encoder_hidden_size=16),
        cartridge(11),
        prompt(3),
    )
    folders = [tune(name, config) for config in configs]
    paged_as_in_peft(name, [*folders, save(name, target_modules=lora)], PROMPTS)


def test_preempted_requests_are_filled_and_computed_again(
    tune: Make, save: Make, paged_as_in_peft: Make
) -> None:
    folders = [tune("llama", prefix()), save("llama", target_modules=["q_proj"])]
    paged = paged_as_in_peft("llama", folders, PROMPTS, num_blocks=12, max_tokens=12)
    assert paged.scheduler.num_preemptions > 0


@pytest.mark.parametrize("rule", ["first", "mean", "last"])
@pytest.mark.parametrize("config", [prefix(), prompt(6)])
def test_embeddings_pool_the_prompts_own_tokens(
    rule: str, config: peft.PeftConfig, base: Make, tune: Make, paged_as_in_peft: Make
) -> None:
    folder = tune("llama", config)
    paged = paged_as_in_peft("llama", [folder], PROMPTS[:1], budget=4)
    request = paged.request(str(folder), PROMPTS[0], 1, salt="")
    request.pooling = Embed(rule, normalize=False)
    outcomes = []
    while not outcomes:
        scheduled = paged.scheduler.schedule(0.0).scheduled
        outcomes = paged.runner.run(scheduled)
        for item in scheduled:
            paged.blocks.complete(item.sequence, item.num_tokens)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(copy.deepcopy(base("llama")), folder).eval()
        states = model(torch.tensor(PROMPTS[:1]), output_hidden_states=True).hidden_states[-1][0]
    own = states[-len(PROMPTS[0]) :]
    expected = {"first": own[0], "mean": own.mean(0), "last": own[-1]}[rule]
    numbers = torch.frombuffer(bytearray(outcomes[0].numbers), dtype=torch.float32)
    torch.testing.assert_close(numbers, expected, atol=3e-5, rtol=1e-5)


def test_what_an_adapter_with_a_prefix_is_said_to_be(tune: Make, serve: Make) -> None:
    """Two layers, two heads of eight: 64 numbers a token."""
    served = serve("llama")
    adapter = served.load(0, tune("llama", cartridge(7)))
    assert (adapter.family, adapter.rank, adapter.note) == ("cartridge", 0, "7 virtual tokens")
    assert adapter.parameters == 7 * 64 and adapter.host_bytes == 4 * 7 * 64
    assert served.sites.used_bytes == adapter.host_bytes
    served.sites.release(0)
    assert served.sites.used_bytes == 0


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"num_virtual_tokens": 5}, "SHAPE_MISMATCH"),
        ({"num_attention_heads": 4}, "UNSUPPORTED_FEATURE"),
        ({"task_type": None}, "UNSUPPORTED_FEATURE"),
        ({"num_frozen_tokens": 1}, "UNKNOWN_FIELD"),
    ],
)
def test_wrong_fields_are_refused(
    fields: dict[str, object], reason: str, tune: Make, refusal: Make
) -> None:
    assert refusal("llama", tune("llama", prefix()), **fields).reason == reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t[:, :-1], "BASE_MISMATCH"),
        (lambda t: t[:, :32], "BASE_MISMATCH"),
        (lambda t: t[:-1], "SHAPE_MISMATCH"),
        (lambda t: t[..., None], "SHAPE_MISMATCH"),
        (lambda t: t * torch.nan, "NON_FINITE"),
    ],
)
def test_wrong_tensors_are_refused(
    change: Callable[[Tensor], Tensor], reason: str, tune: Make, refusal: Make
) -> None:
    def changed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: change(tensor) for name, tensor in tensors.items()}

    assert refusal("llama", tune("llama", prefix()), changed).reason == reason


@pytest.mark.parametrize("changed", [{"kv_heads": 1}, {"key_dim": 16}, {"value_dim": 4}])
@pytest.mark.parametrize("number", [0, 1])
def test_layers_that_are_unlike_are_refused(
    changed: dict[str, int], number: int, tune: Make, serve: Make
) -> None:
    served = serve("llama")
    layers = list(served.structure.layers)
    layers[number] = replace(layers[number], **changed)
    served.structure.layers = tuple(layers)
    with pytest.raises(DeltamuxError, match="unlike") as caught:
        served.parse(tune("llama", prefix()))
    assert caught.value.reason == "UNSUPPORTED_FEATURE"


def test_keys_and_values_of_unlike_width_are_refused(tune: Make, serve: Make) -> None:
    served = serve("llama")
    served.structure.layers = tuple(
        replace(layer, value_dim=4) for layer in served.structure.layers
    )
    with pytest.raises(DeltamuxError, match="unlike"):
        served.parse(tune("llama", prefix()))


@pytest.mark.parametrize("config", [prefix(), prompt(3)])
def test_a_base_whose_embedding_is_out_of_reach_is_refused(
    config: peft.PeftConfig, tune: Make, serve: Make
) -> None:
    served = serve("llama")
    served.structure = served.structure.without(["model.embed_tokens"])
    with pytest.raises(DeltamuxError) as caught:
        served.parse(tune("llama", config))
    assert caught.value.reason == "UNSUPPORTED_FEATURE"


def test_adaption_prompts_are_refused_with_the_reason(tune: Make, refusal: Make) -> None:
    config = peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=1, **TASK)
    error = refusal("llama", tune("llama", config))
    assert error.reason == "UNSUPPORTED_TYPE"
    assert "softmax of its own" in error.message
