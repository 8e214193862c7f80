"""BOFT against PEFT, mixed with LoRA at modules that share its input and rows without adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import peft
import peft.tuners.boft.layer as boft_layer
import pytest
import torch
from torch import Tensor

Make = Callable[..., Any]


class BlockDiagonal:
    """What PEFT's CUDA extension computes; without it PEFT trains one factor, whatever is asked."""

    @staticmethod
    def forward(blocks: Tensor) -> list[Tensor]:
        return [torch.stack([torch.block_diag(*factor) for factor in blocks])]


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(boft_layer, "_FBD_CUDA", BlockDiagonal)
    yield


@pytest.mark.parametrize(
    ("name", "targets", "settings"),
    [
        ("llama", ["q_proj", "down_proj"], {"boft_block_size": 4}),
        ("llama", ["v_proj", "lm_head"], {"boft_block_size": 0, "boft_block_num": 4}),
        ("llama", ["k_proj", "up_proj"], {"boft_n_butterfly_factor": 2}),
        ("llama", ["q_proj", "down_proj"], {"boft_n_butterfly_factor": 3}),
        ("llama_bias", "all-linear", {"boft_block_size": 8, "bias": "boft_only"}),
        ("llama_bias", ["o_proj"], {"boft_block_size": 8, "bias": "all"}),
        ("gpt_neox", ["query_key_value"], {"boft_block_size": 8, "boft_n_butterfly_factor": 3}),
    ],
)
def test_rotated_inputs_and_scaled_outputs_beside_lora(
    name: str,
    targets: list[str] | str,
    settings: dict[str, Any],
    beside_lora: Make,
    extension: None,
) -> None:
    beside_lora(name, peft.BOFTConfig(target_modules=targets, **settings))


def test_one_factor_is_served_where_more_were_asked_of_peft(
    tune: Make, as_in_peft: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boft_layer, "get_fbd_cuda", lambda: None)
    config = peft.BOFTConfig(target_modules=["q_proj"], boft_n_butterfly_factor=2)
    as_in_peft("llama", [tune("llama", config)])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"boft_block_size": 8}, "BASE_MISMATCH"),
        ({"boft_block_size": 0, "boft_block_num": 5}, "BASE_MISMATCH"),
        ({"boft_n_butterfly_factor": 3}, "BASE_MISMATCH"),
        ({"boft_block_num": 8}, "BAD_FIELD"),
        ({"boft_block_size": 0}, "BAD_FIELD"),
        ({"target_modules": ["q_proj", "k_proj"]}, "MISSING_TENSORS"),
        ({"a_new_field": 3}, "UNKNOWN_FIELD"),
    ],
)
def test_what_does_not_fit_is_refused(
    changes: dict[str, Any], reason: str, tune: Make, refusal: Make, extension: None
) -> None:
    config = peft.BOFTConfig(target_modules=["q_proj"], boft_n_butterfly_factor=2)
    assert refusal("llama", tune("llama", config), **changes).reason == reason


@pytest.mark.parametrize(
    ("part", "change", "factors"),
    [
        ("boft_s", lambda t: t[:-1], 1),
        ("boft_R", lambda t: t[:, :, :2, :2], 1),
        ("boft_R", lambda t: t.repeat(5, 1, 1, 1), 1),
        ("boft_R", lambda t: t.repeat(5, 1, 1, 1), 5),
    ],
)
def test_wrong_tensors_are_refused(
    part: str, change: Callable[[Tensor], Tensor], factors: int, tune: Make, refusal: Make
) -> None:
    def changed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: change(t) if part in name else t for name, t in tensors.items()}

    folder = tune("llama", peft.BOFTConfig(target_modules=["q_proj"]))
    error = refusal("llama", folder, changed, boft_n_butterfly_factor=factors)
    assert error.reason == "BASE_MISMATCH"
