"""LoKr against PEFT, its matrices whole and in factors, mixed with LoRA and plain rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest

from deltamux.adapters.primitives.dense import DenseDelta
from deltamux.adapters.primitives.low_rank import LowRank

Make = Callable[..., Any]

TARGETS = ["q_proj", "v_proj", "down_proj"]


def test_kronecker_products_beside_lora(tune: Make, save: Make, as_in_peft: Make) -> None:
    configs = [
        peft.LoKrConfig(r=1, alpha=3, decompose_factor=2, target_modules=TARGETS),
        peft.LoKrConfig(
            r=1,
            alpha=2,
            decompose_both=True,
            target_modules=[*TARGETS, "lm_head"],
            alpha_pattern={"v_proj": 4},
        ),
        peft.LoKrConfig(
            r=8, alpha=20, target_modules="all-linear", rank_pattern={"k_proj": 1, "up_proj": 2}
        ),
    ]
    folders = [tune("llama", config, seed) for seed, config in enumerate(configs)]
    as_in_peft("llama", [*folders, save("llama", r=4, target_modules=TARGETS)])


def test_the_smaller_of_two_exact_forms(tune: Make, serve: Make) -> None:
    for rank, factor, kind in ((1, 4, LowRank), (8, 4, DenseDelta)):
        config = peft.LoKrConfig(r=rank, decompose_factor=factor, target_modules=["q_proj"])
        (payload,) = (
            serve("llama").parse(tune("llama", config)).payloads["model.layers.0.self_attn.q_proj"]
        )
        assert isinstance(payload, kind)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"r": 2}, "BASE_MISMATCH"),
        ({"r": 9}, "MISSING_TENSORS"),
        ({"decompose_both": True}, "MISSING_TENSORS"),
        ({"decompose_factor": 2}, "BASE_MISMATCH"),
        ({"decompose_factor": "-1"}, "BAD_FIELD"),
        ({"alpha": None}, "BAD_FIELD"),
        ({"rank_pattern": {"k_proj": 3}}, "BAD_FIELD"),
        ({"target_modules": ["q_proj"]}, "EXTRA_TENSORS"),
        ({"target_modules": [*TARGETS, "up_proj"]}, "MISSING_TENSORS"),
    ],
)
def test_what_does_not_fit_is_refused(
    changes: dict[str, Any], reason: str, tune: Make, refusal: Make
) -> None:
    folder = tune("llama", peft.LoKrConfig(r=1, target_modules=TARGETS))
    assert refusal("llama", folder, **changes).reason == reason


def test_a_product_of_another_size_is_refused(tune: Make, refusal: Make) -> None:
    folder = tune("llama", peft.LoKrConfig(r=1, target_modules=TARGETS))
    error = refusal(
        "llama", folder, lambda ts: {k: t[1:] if "lokr_w1" in k else t for k, t in ts.items()}
    )
    assert error.reason == "BASE_MISMATCH"
