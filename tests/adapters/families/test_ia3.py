"""IA3 against PEFT, mixed with LoRA and rows without adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest

from deltamux.adapters.checkpoint.files import CONFIG
from deltamux.errors import DeltamuxError

Make = Callable[..., Any]


@pytest.mark.parametrize(
    ("name", "targets", "feedforward", "lora"),
    [
        ("llama", ["k_proj", "v_proj", "down_proj"], ["down_proj"], ["q_proj", "down_proj"]),
        ("llama_bias", ["k_proj", "v_proj", "gate_proj"], ["gate_proj"], ["up_proj", "gate_proj"]),
        ("llama", ["k_proj", "lm_head"], ["lm_head"], ["lm_head"]),
        ("llama", ["q_proj", "lm_head"], [], ["lm_head", "k_proj"]),
        ("gpt2", ["c_attn", "c_proj"], r".*mlp.c_proj", ["c_attn"]),
        ("gpt_neox", r".*(query_key_value|4h_to_h)", r".*h_to_h", ["dense_h_to_4h"]),
    ],
)
def test_scales_of_outputs_and_inputs_beside_lora(
    name: str,
    targets: list[str] | str,
    feedforward: list[str] | str,
    lora: list[str],
    tune: Make,
    save: Make,
    as_in_peft: Make,
) -> None:
    config = peft.IA3Config(target_modules=targets, feedforward_modules=feedforward)
    folders = [tune(name, config, 1), save(name, r=4, target_modules=lora), tune(name, config, 2)]
    as_in_peft(name, folders)


@pytest.fixture
def folder(tune: Make, tmp_path: Path) -> Path:
    targets = ["k_proj", "down_proj"]
    config = peft.IA3Config(target_modules=targets, feedforward_modules=["down_proj"])
    return tune("llama", config)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"feedforward_modules": None}, "BAD_FIELD"),
        ({"feedforward_modules": ["k_proj"]}, "BASE_MISMATCH"),
        ({"target_modules": ["k_proj"]}, "EXTRA_TENSORS"),
        ({"target_modules": ["k_proj", "up_proj", "down_proj"]}, "MISSING_TENSORS"),
        ({"target_modules": ["norm"]}, "NO_TARGETS"),
        ({"modules_to_save": ["score"]}, "UNSUPPORTED_FEATURE"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "UNSUPPORTED_FEATURE"),
        ({"a_new_field": 3}, "UNKNOWN_FIELD"),
    ],
)
def test_what_does_not_fit_is_refused(
    changes: dict[str, Any], reason: str, folder: Path, serve: Make, rewrite: Make
) -> None:
    copied = rewrite(folder, lambda tensors: tensors)
    fields = json.loads((copied / CONFIG).read_text())
    (copied / CONFIG).write_text(json.dumps({**fields, **changes}))
    with pytest.raises(DeltamuxError) as caught:
        serve("llama").parse(copied)
    assert caught.value.reason == reason
