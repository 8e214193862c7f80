"""The self-test passes what agrees and refuses what does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, MistralConfig

from deltamux.base.load import Base, adopt
from deltamux.base.self_test import self_test
from deltamux.engine.rehearsal import packed_logits, rehearse
from deltamux.engine.step.attention import PagedAttention
from deltamux.errors import StartupError

WINDOW = 24


@pytest.fixture(scope="module")
def base() -> Base:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=WINDOW,
        max_position_embeddings=512,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4.0)
    return adopt(model)


def test_sound_model_passes(base: Base) -> None:
    rehearse(base, 16)


def test_prompts_are_longer_than_the_window_and_of_unequal_length(base: Base) -> None:
    lengths: list[int] = []

    def packed(prompts: list[list[int]]) -> list[Tensor]:
        lengths.extend(map(len, prompts))
        return packed_logits(base, prompts, 16)

    self_test(base, packed)
    assert max(lengths) >= 2 * WINDOW and len(set(lengths)) == 2


@pytest.mark.parametrize("lost", ["sliding_window", "scaling"])
def test_attention_that_loses_an_argument_is_refused(
    base: Base, lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = PagedAttention.__call__

    def forgetful(self: PagedAttention, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return call(self, *args, **{**kwargs, lost: 1.0 if lost == "scaling" else None})

    monkeypatch.setattr(PagedAttention, "__call__", forgetful)
    with pytest.raises(StartupError, match="'mistral' model: its packed logits differ"):
        rehearse(base, 16)


def test_nan_is_no_agreement(base: Base) -> None:
    def packed(prompts: list[list[int]]) -> list[Tensor]:
        return [torch.full((len(prompt), 64), torch.nan) for prompt in prompts]

    with pytest.raises(StartupError, match="differ from those of transformers by nan"):
        self_test(base, packed)


def test_sixteen_bit_model_passes_with_its_own_tolerance() -> None:
    config = MistralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=WINDOW,
    )
    rehearse(adopt(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)), 16)
