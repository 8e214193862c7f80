"""OFT against PEFT, mixed with LoRA at modules that share its input and rows without adapter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
from torch import Tensor

from deltamux.adapters.checkpoint.files import CONFIG

Make = Callable[..., Any]


@pytest.mark.parametrize(
    ("name", "targets", "settings"),
    [
        ("llama", ["q_proj", "down_proj"], {"oft_block_size": 8}),
        ("llama", ["k_proj", "o_proj"], {"oft_block_size": 4, "use_cayley_neumann": False}),
        ("llama", ["q_proj", "v_proj"], {"oft_block_size": 0, "r": 2, "block_share": True}),
        ("llama", ["gate_proj", "down_proj"], {"oft_block_size": 7}),
        ("llama", ["up_proj", "down_proj"], {"oft_block_size": 0, "r": 5}),
        ("llama", ["q_proj", "lm_head"], {"oft_block_size": 40}),
        ("llama", ["q_proj"], {"oft_block_size": 8, "coft": True, "eps": 0.7}),
        ("gemma3", ["embed_tokens", "q_proj"], {"oft_block_size": 8}),
        ("llama_bias", "all-linear", {"oft_block_size": 8, "bias": "oft_only"}),
        ("llama_bias", ["q_proj"], {"oft_block_size": 8, "bias": "all"}),
        ("gpt_neox", ["query_key_value", "dense_h_to_4h"], {"oft_block_size": 8}),
        *[
            ("llama", r".*\.1\..*_proj", {"oft_block_size": 8, "num_cayley_neumann_terms": terms})
            for terms in (2, 3, 4, 6)
        ],
    ],
)
def test_rotated_inputs_beside_lora(
    name: str,
    targets: list[str] | str,
    settings: dict[str, Any],
    beside_lora: Make,
) -> None:
    beside_lora(name, peft.OFTConfig(target_modules=targets, **settings))


def test_blocks_of_unequal_size_in_one_batch(tune: Make, as_in_peft: Make) -> None:
    configs = [peft.OFTConfig(target_modules=["q_proj"], oft_block_size=b) for b in (2, 16, 32)]
    as_in_peft("llama", [tune("llama", config) for config in configs])


@pytest.fixture
def folder(tune: Make) -> Path:
    return tune("llama", peft.OFTConfig(target_modules=["q_proj"], oft_block_size=8))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"oft_block_size": None}, "UNSUPPORTED_FEATURE"),
        ({"peft_version": "0.17.1"}, "UNSUPPORTED_FEATURE"),
        ({"peft_version": "0.18.0.dev0"}, "UNSUPPORTED_FEATURE"),
        ({"peft_version": None}, "UNSUPPORTED_FEATURE"),
        ({"r": 4}, "BAD_FIELD"),
        ({"oft_block_size": 0}, "BAD_FIELD"),
        ({"oft_block_size": 16}, "BASE_MISMATCH"),
        ({"block_share": True}, "BASE_MISMATCH"),
        ({"num_cayley_neumann_terms": 0}, "BAD_FIELD"),
        ({"use_cayley_neumann": 0}, "BAD_FIELD"),
        ({"target_modules": ["q_proj", "k_proj"]}, "MISSING_TENSORS"),
        ({"target_modules": ["k_proj"]}, "MISSING_TENSORS"),
        ({"bias": "lora_only"}, "BAD_FIELD"),
        ({"a_new_field": 3}, "UNKNOWN_FIELD"),
    ],
)
def test_what_does_not_fit_is_refused(
    changes: dict[str, Any], reason: str, folder: Path, refusal: Make
) -> None:
    assert refusal("llama", folder, **changes).reason == reason


def test_a_null_is_off_as_in_peft(folder: Path, tmp_path: Path, as_in_peft: Make) -> None:
    copied = shutil.copytree(folder, tmp_path / "copied")
    fields = json.loads((copied / CONFIG).read_text())
    (copied / CONFIG).write_text(json.dumps({**fields, "use_cayley_neumann": None}))
    as_in_peft("llama", [folder, copied])


def test_an_exact_transform_is_the_same_in_older_versions(
    tune: Make, serve: Make, rewrite: Make
) -> None:
    settings = {"oft_block_size": 8, "use_cayley_neumann": False}
    config = peft.OFTConfig(target_modules=["q_proj"], **settings)
    copied = rewrite(tune("llama", config), lambda tensors: tensors)
    fields = json.loads((copied / CONFIG).read_text())
    (copied / CONFIG).write_text(json.dumps({**fields, "peft_version": None}))
    assert serve("llama").parse(copied).parameters == 2 * 4 * 28


def test_wrong_blocks_are_refused(folder: Path, refusal: Make) -> None:
    def changed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor[:-1] for name, tensor in tensors.items()}

    assert refusal("llama", folder, changed).reason == "BASE_MISMATCH"
