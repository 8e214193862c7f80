"""MiSS in its variants against PEFT, mixed with LoRA and rows without adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from deltamux.adapters.checkpoint.files import CONFIG

Make = Callable[..., Any]

TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.mark.parametrize("name", ["llama", "llama_bias"])
def test_every_variant_beside_lora(name: str, tune: Make, save: Make, as_in_peft: Make) -> None:
    configs = [
        peft.MissConfig(r=4, target_modules=TARGETS),
        peft.MissConfig(r=5, target_modules=[*TARGETS, "lm_head"], init_weights=False),
        peft.MissConfig(r=6, mini_r=8, init_weights="mini", target_modules=TARGETS),
        peft.MissConfig(r=8, init_weights="bat", target_modules=TARGETS, bias="MiSS_only"),
    ]
    folders = [tune(name, config, seed) for seed, config in enumerate(configs)]
    as_in_peft(name, folders[:2])
    as_in_peft(name, [*folders[2:], save(name, r=4, target_modules=TARGETS)])


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("miss_block", "bone_block"): t for name, t in tensors.items()}


@pytest.mark.parametrize("variant", [True, "bat"])
def test_bone_is_miss_by_its_old_name(
    variant: bool | str, tune: Make, serve: Make, rewrite: Make
) -> None:
    folder = tune("llama", peft.MissConfig(r=4, init_weights=variant, target_modules=TARGETS))
    bone = rewrite(folder, renamed)
    fields = json.loads((bone / CONFIG).read_text())
    del fields["mini_r"], fields["miss_dropout"]
    (bone / CONFIG).write_text(json.dumps({**fields, "peft_type": "BONE"}))
    served = serve("llama")
    expected, found = served.parse(folder).payloads, served.parse(bone).payloads
    assert found.keys() == expected.keys()
    for site, (payload,) in found.items():
        pairs = zip(payload.tensors, expected[site][0].tensors, strict=True)
        assert all(torch.equal(mine, theirs) for mine, theirs in pairs)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"r": 5}, "BASE_MISMATCH"),
        ({"r": 40}, "BASE_MISMATCH"),
        ({"init_weights": "bat"}, "SHAPE_MISMATCH"),
        ({"init_weights": "mini"}, "BASE_MISMATCH"),
        ({"init_weights": "mini", "mini_r": 5}, "BASE_MISMATCH"),
        ({"init_weights": "bone"}, "BAD_FIELD"),
        ({"peft_type": "BONE"}, "EXTRA_TENSORS"),
        ({"bias": "lora_only"}, "BAD_FIELD"),
    ],
)
def test_what_does_not_fit_is_refused(
    changes: dict[str, Any], reason: str, tune: Make, refusal: Make
) -> None:
    folder: Path = tune("llama", peft.MissConfig(r=4, target_modules=TARGETS))
    assert refusal("llama", folder, **changes).reason == reason


@pytest.mark.parametrize(
    ("variant", "fields", "shape"),
    [("bat", {"r": 12}, (2, 12, 12)), ("mini", {"mini_r": 5}, (8, 5))],
)
def test_blocks_that_do_not_divide_the_module_are_refused(
    variant: str, fields: dict[str, Any], shape: tuple[int, ...], tune: Make, refusal: Make
) -> None:
    config = peft.MissConfig(r=8, mini_r=8, init_weights=variant, target_modules=["q_proj"])
    error = refusal(
        "llama",
        tune("llama", config),
        lambda tensors: {name: torch.ones(shape) for name in tensors},
        **fields,
    )
    assert error.reason == "BASE_MISMATCH"
