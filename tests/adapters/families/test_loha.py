"""LoHa against PEFT, mixed with LoRA and rows without adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest

from deltamux.adapters.primitives.dense import DenseDelta
from deltamux.adapters.primitives.low_rank import LowRank

Make = Callable[..., Any]

TARGETS = ["q_proj", "v_proj", "down_proj"]


def test_hadamard_products_beside_lora(tune: Make, save: Make, as_in_peft: Make) -> None:
    configs = [
        peft.LoHaConfig(r=2, alpha=3, target_modules=TARGETS),
        peft.LoHaConfig(
            r=3,
            alpha=8,
            target_modules=[*TARGETS, "lm_head"],
            rank_pattern={"v_proj": 2},
            alpha_pattern={"layers.1.mlp.down_proj": 5},
        ),
        peft.LoHaConfig(r=7, target_modules="all-linear", exclude_modules=["up_proj"]),
    ]
    folders = [tune("llama", config, seed) for seed, config in enumerate(configs)]
    as_in_peft("llama", [*folders, save("llama", r=4, target_modules=TARGETS)])


def test_a_dense_delta_where_it_is_smaller(tune: Make, serve: Make) -> None:
    for rank, kind in ((3, LowRank), (4, DenseDelta)):
        folder = tune("llama", peft.LoHaConfig(r=rank, target_modules=["q_proj"]))
        (payload,) = serve("llama").parse(folder).payloads["model.layers.0.self_attn.q_proj"]
        assert isinstance(payload, kind)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"r": 3}, "BASE_MISMATCH"),
        ({"alpha": None}, "BAD_FIELD"),
        ({"rank_pattern": {"k_proj": 3}}, "BAD_FIELD"),
        ({"alpha_pattern": {"k_proj": 3}}, "BAD_FIELD"),
        ({"target_modules": ["q_proj"]}, "EXTRA_TENSORS"),
        ({"target_modules": [*TARGETS, "up_proj"]}, "MISSING_TENSORS"),
        ({"use_rslora": True}, "UNKNOWN_FIELD"),
    ],
)
def test_what_does_not_fit_is_refused(
    changes: dict[str, Any], reason: str, tune: Make, refusal: Make
) -> None:
    folder = tune("llama", peft.LoHaConfig(r=2, target_modules=TARGETS))
    assert refusal("llama", folder, **changes).reason == reason
