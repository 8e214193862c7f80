"""RoAd against PEFT, mixed with LoRA and rows without adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
from torch import Tensor

Make = Callable[..., Any]


@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama", ["q_proj", "v_proj", "down_proj"]),
        ("llama_bias", "all-linear"),
        ("gpt_neox", ["query_key_value"]),
    ],
)
def test_rotated_outputs_beside_lora(
    variant: str, name: str, targets: list[str] | str, tune: Make, save: Make, as_in_peft: Make
) -> None:
    configs = [
        peft.RoadConfig(variant=variant, group_size=group, target_modules=targets)
        for group in (8, 16)
    ]
    lora = save(name, r=4, target_modules="all-linear")
    as_in_peft(name, [tune(name, configs[0], 1), lora, tune(name, configs[1], 2)])


@pytest.fixture
def folder(tune: Make) -> Path:
    return tune("llama", peft.RoadConfig(group_size=8, target_modules=["q_proj"]))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"variant": "road_2"}, "BASE_MISMATCH"),
        ({"variant": "road_3"}, "BAD_FIELD"),
        ({"group_size": 24}, "BASE_MISMATCH"),
        ({"group_size": 7}, "BAD_FIELD"),
        ({"target_modules": ["k_proj"]}, "MISSING_TENSORS"),
        ({"a_new_field": 3}, "UNKNOWN_FIELD"),
    ],
)
def test_what_does_not_fit_is_refused(
    changes: dict[str, Any], reason: str, folder: Path, refusal: Make
) -> None:
    assert refusal("llama", folder, **changes).reason == reason


@pytest.mark.parametrize("part", ["road_theta", "road_alpha"])
def test_wrong_tensors_are_refused(part: str, folder: Path, refusal: Make) -> None:
    def changed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: t[:-1] if part in name else t for name, t in tensors.items()}

    assert refusal("llama", folder, changed).reason == "BASE_MISMATCH"
