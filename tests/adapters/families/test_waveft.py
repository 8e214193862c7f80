"""WaveFT against PEFT, mixed with LoRA and rows without adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
from torch import Tensor

Make = Callable[..., Any]

LINEAR = ["q_proj", "v_proj", "down_proj"]


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("llama", peft.WaveFTConfig(target_modules=LINEAR, n_frequency=20)),
        (
            "llama_bias",
            peft.WaveFTConfig(target_modules="all-linear", n_frequency=30, bias="waveft_only"),
        ),
        (
            "llama",
            peft.WaveFTConfig(
                target_modules=["k_proj", "lm_head"], n_frequency=15, random_loc_seed=3
            ),
        ),
        (
            "llama",
            peft.WaveFTConfig(
                target_modules=["up_proj", "q_proj"],
                n_frequency_pattern={"q_proj": 9},
                n_frequency=30,
            ),
        ),
        (
            "llama",
            peft.WaveFTConfig(
                target_modules=["up_proj", "q_proj"], n_frequency=30, proportional_parameters=True
            ),
        ),
        (
            "llama",
            peft.WaveFTConfig(
                target_modules=["o_proj"], n_frequency=40, use_idwt=False, wavelet_family="db3"
            ),
        ),
        ("gpt2", peft.WaveFTConfig(target_modules=["c_attn", "c_proj"], n_frequency=25)),
    ],
)
def test_sparse_deltas_beside_lora(name: str, config: peft.WaveFTConfig, beside_lora: Make) -> None:
    beside_lora(name, config)


def test_each_coefficient_makes_four_numbers_at_most(tune: Make, serve: Make) -> None:
    config = peft.WaveFTConfig(n_frequency=3, target_modules=["q_proj"])
    adapter = serve("llama").parse(tune("llama", config))
    (payload,) = adapter.payloads["model.layers.0.self_attn.q_proj"]
    assert 3 < len(payload.values) <= 12


@pytest.fixture
def folder(tune: Make) -> Path:
    return tune("llama", peft.WaveFTConfig(target_modules=["q_proj"], n_frequency=20))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"wavelet_family": "db2"}, "UNSUPPORTED_FEATURE"),
        ({"random_loc_seed": -1}, "BAD_FIELD"),
        ({"n_frequency": 19}, "BASE_MISMATCH"),
        ({"n_frequency_pattern": {"q_proj": 21}}, "BASE_MISMATCH"),
        ({"target_modules": ["k_proj"]}, "MISSING_TENSORS"),
        ({"a_new_field": 3}, "UNKNOWN_FIELD"),
    ],
)
def test_what_does_not_fit_is_refused(
    fields: dict[str, Any], reason: str, folder: Path, refusal: Make
) -> None:
    assert refusal("llama", folder, **fields).reason == reason


@pytest.mark.parametrize(
    ("part", "change", "reason"),
    [
        ("spectrum", lambda t: t.repeat(60), "BASE_MISMATCH"),
        ("spectrum", lambda t: t[:-1], "BASE_MISMATCH"),
        ("spectrum", lambda t: t[None], "SHAPE_MISMATCH"),
    ],
)
def test_wrong_tensors_are_refused(
    part: str,
    change: Callable[[Tensor], Tensor],
    reason: str,
    folder: Path,
    refusal_of_part: Make,
) -> None:
    assert refusal_of_part("llama", folder, part, change).reason == reason
