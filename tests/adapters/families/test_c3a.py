"""C3A against PEFT, mixed with LoRA and rows without adapter."""

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
        ("llama", peft.C3AConfig(target_modules=LINEAR, block_size=8)),
        (
            "llama",
            peft.C3AConfig(
                target_modules=["q_proj", "up_proj"],
                block_size=16,
                block_size_pattern={"q_proj": 4},
            ),
        ),
        ("llama_bias", peft.C3AConfig(target_modules="all-linear", block_size=16, bias="c3a_only")),
        ("gpt_neox", peft.C3AConfig(target_modules=["query_key_value"], block_size=32, bias="all")),
    ],
)
def test_circulant_deltas_beside_lora(name: str, config: peft.C3AConfig, beside_lora: Make) -> None:
    beside_lora(name, config)


def test_a_reader_is_told_of_the_dense_form(tune: Make, serve: Make) -> None:
    config = peft.C3AConfig(block_size=8, target_modules=["q_proj"])
    adapter = serve("llama").parse(tune("llama", config))
    assert adapter.note == f"converted to dense matrices at 2 modules, {2 * 32 * 32 * 4} bytes"
    assert adapter.host_bytes == 2 * 32 * 32 * 4


@pytest.fixture
def folder(tune: Make) -> Path:
    return tune("llama", peft.C3AConfig(target_modules=["q_proj"], block_size=8))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
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
        ("c3a_kernel", lambda t: t[:-1], "BASE_MISMATCH"),
        ("c3a_kernel", lambda t: t[:, :, :4], "BASE_MISMATCH"),
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
