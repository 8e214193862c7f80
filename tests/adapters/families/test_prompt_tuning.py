"""Prompts of virtual tokens against PEFT, in steps with LoRA and the base: chunked and paged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

Make = Callable[..., Any]

TASK = {"task_type": "CAUSAL_LM"}
PROMPTS = [[5, 9, 33, 2, 17, 40, 8], [7], [5, 9, 33, 2, 50]]
# More than one block of four; the others have less than one, and whole blocks.
NUM_VIRTUAL = 6


def prompt_config(**fields: object) -> peft.PeftConfig:
    return peft.PromptTuningConfig(num_virtual_tokens=NUM_VIRTUAL, **TASK, **fields)


CONFIGS: dict[str, Callable[[], peft.PeftConfig]] = {
    "prompt_tuning": prompt_config,
    "p_tuning": lambda: peft.PromptEncoderConfig(
        num_virtual_tokens=3, encoder_hidden_size=16, **TASK
    ),
    "p_tuning_lstm": lambda: peft.PromptEncoderConfig(
        num_virtual_tokens=8,
        encoder_hidden_size=16,
        encoder_reparameterization_type="LSTM",
        **TASK,
    ),
    "cpt": lambda: peft.CPTConfig(
        cpt_token_ids=[3, 4, 5, 6, 7],
        cpt_tokens_type_mask=[1, 2, 2, 3, 4],
        opt_projection_epsilon=9.0,
        opt_projection_format_epsilon=9.0,
        **TASK,
    ),
}


def multitask(tasks: int) -> peft.PeftConfig:
    return peft.MultitaskPromptTuningConfig(
        num_virtual_tokens=5, num_tasks=tasks, num_ranks=2, **TASK
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gemma3", "qwen3", "gpt_neox"])
def test_prompts_beside_lora_and_the_base(
    name: str, tune: Make, save: Make, paged_as_in_peft: Make
) -> None:
    lora = {"gpt2": ["c_attn"], "gpt_neox": ["query_key_value"]}.get(name, ["q_proj", "v_proj"])
    folders = [tune(name, config()) for config in CONFIGS.values()]
    paged_as_in_peft(name, [*folders, save(name, target_modules=lora)], PROMPTS)


@pytest.mark.parametrize("seed", [0, 1])
def test_one_task_is_folded_into_the_prompt(seed: int, tune: Make, paged_as_in_peft: Make) -> None:
    """Before folding, the prompt would be another: each task's factors multiply it."""
    folder = tune("llama", multitask(1), seed)
    options = {folder: {"task_ids": torch.tensor([0])}}
    paged_as_in_peft("llama", [folder, tune("llama", prompt_config())], PROMPTS, options=options)


def test_preempted_requests_are_computed_again(
    tune: Make, save: Make, paged_as_in_peft: Make
) -> None:
    folders = [tune("llama", prompt_config()), save("llama", target_modules=["q_proj"])]
    paged = paged_as_in_peft("llama", folders, PROMPTS, num_blocks=12, max_tokens=12)
    assert paged.scheduler.num_preemptions > 0


def test_what_an_adapter_with_a_prompt_is_said_to_be(tune: Make, serve: Make) -> None:
    served = serve("llama")
    adapter = served.load(0, tune("llama", prompt_config()))
    assert (adapter.family, adapter.rank, adapter.note) == (
        "prompt_tuning",
        0,
        "6 virtual tokens",
    )
    assert adapter.parameters == 6 * 32 and adapter.host_bytes == 4 * 6 * 32
    assert 4 * 6 * 32 <= served.sites.used_bytes < 4 * 6 * 32 + 512


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"num_virtual_tokens": 5}, "SHAPE_MISMATCH"),
        ({"num_virtual_tokens": 0}, "BAD_FIELD"),
        ({"num_virtual_tokens": None}, "BAD_FIELD"),
        ({"num_transformer_submodules": 2}, "BAD_FIELD"),
        ({"task_type": "FEATURE_EXTRACTION"}, "UNSUPPORTED_FEATURE"),
        ({"task_type": "SEQ_CLS"}, "MISSING_TENSORS"),
        ({"task_type": None}, "UNSUPPORTED_FEATURE"),
        ({"modules_to_save": ["lm_head"]}, "MISSING_TENSORS"),
        ({"trust_remote_code": True}, "EXECUTABLE_FIELD"),
        ({"encoder_hidden_size": 4}, "UNKNOWN_FIELD"),
        ({"surprise": 1}, "UNKNOWN_FIELD"),
    ],
)
def test_wrong_fields_are_refused(
    fields: dict[str, object], reason: str, tune: Make, refusal: Make
) -> None:
    assert refusal("llama", tune("llama", prompt_config()), **fields).reason == reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: {"prompt_embeddings": t["prompt_embeddings"][:-1]}, "SHAPE_MISMATCH"),
        (lambda t: {"prompt_embeddings": t["prompt_embeddings"][0]}, "SHAPE_MISMATCH"),
        (lambda t: {"prompt_embeddings": t["prompt_embeddings"][:, 1:]}, "BASE_MISMATCH"),
        (lambda t: {"prompt_embeddings": t["prompt_embeddings"].int()}, "MALFORMED_WEIGHTS"),
        (lambda t: {"prompt_embeddings": t["prompt_embeddings"] / 0}, "NON_FINITE"),
        (lambda t: {"embedding.weight": t["prompt_embeddings"]}, "EXTRA_TENSORS"),
        (lambda t: {}, "MISSING_TENSORS"),
        (lambda t: {**t, "prefix_task_cols": torch.ones(1, 6, 1)}, "EXTRA_TENSORS"),
    ],
)
def test_wrong_tensors_are_refused(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    reason: str,
    tune: Make,
    refusal: Make,
) -> None:
    assert refusal("llama", tune("llama", prompt_config()), change).reason == reason


def test_several_tasks_are_refused(tune: Make, refusal: Make) -> None:
    error = refusal("llama", tune("llama", multitask(3)))
    assert error.reason == "UNSUPPORTED_FEATURE" and "cannot name its task" in error.message


@pytest.mark.parametrize(
    ("part", "change"),
    [
        *((part, lambda t: t[..., 1:]) for part in ("prefix_task_cols", "prefix_task_rows")),
        *((part, lambda t: t.repeat(2, 1, 1)) for part in ("prefix_task_cols", "prefix_task_rows")),
        ("prompt_embeddings", lambda t: t[1:]),
        ("prompt_embeddings", lambda t: t[0]),
    ],
)
def test_factors_of_another_shape_are_refused(
    part: str, change: Callable[[Tensor], Tensor], tune: Make, refusal: Make
) -> None:
    error = refusal("llama", tune("llama", multitask(1)), lambda t: {**t, part: change(t[part])})
    assert error.reason == "SHAPE_MISMATCH"
