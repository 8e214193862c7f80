"""FourierFT against PEFT, mixed with LoRA and rows without adapter."""

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
        ("llama", peft.FourierFTConfig(target_modules=LINEAR, n_frequency=20)),
        ("llama", peft.FourierFTConfig(target_modules=LINEAR, n_frequency=4)),
        (
            "llama_bias",
            peft.FourierFTConfig(
                target_modules="all-linear", n_frequency=40, scaling=90, bias="fourier_only"
            ),
        ),
        (
            "llama",
            peft.FourierFTConfig(
                target_modules=["k_proj", "lm_head"], n_frequency=30, random_loc_seed=3
            ),
        ),
        ("gpt2", peft.FourierFTConfig(target_modules=["c_attn", "c_proj"], n_frequency=25)),
        (
            "gpt_neox",
            peft.FourierFTConfig(
                target_modules=["dense"],
                n_frequency=40,
                n_frequency_pattern={
                    # PEFT puts no brackets around a key here, so that this one has two ends.
                    "0.attention|dense": 5,
                    "gpt_neox.layers.1.attention.dense": 3,
                },
            ),
        ),
    ],
)
def test_deltas_beside_lora(name: str, config: peft.FourierFTConfig, beside_lora: Make) -> None:
    beside_lora(name, config)


@pytest.mark.parametrize(("number", "rank"), [(4, 8), (8, 0)])
def test_a_few_coefficients_are_of_low_rank(
    number: int, rank: int, tune: Make, serve: Make
) -> None:
    config = peft.FourierFTConfig(n_frequency=number, target_modules=["q_proj"])
    adapter = serve("llama").parse(tune("llama", config))
    assert adapter.rank == rank
    assert ("dense" in adapter.note) == (rank == 0)


@pytest.fixture
def folder(tune: Make) -> Path:
    return tune("llama", peft.FourierFTConfig(target_modules=["q_proj"], n_frequency=20))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"scaling": 0}, "BAD_FIELD"),
        ({"n_frequency": 21}, "BASE_MISMATCH"),
        ({"n_frequency_pattern": {"q_proj": 19}}, "BASE_MISMATCH"),
        ({"n_frequency_pattern": {"k_proj": 20}}, "BAD_FIELD"),
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
