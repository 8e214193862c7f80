"""LoRA's inits that shift the base, BD-LoRA and QALoRA against PEFT."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

Make = Callable[..., Any]

KASA = {"kasa_config": peft.KasaConfig()}
SHIFTS = [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, KASA]


def lora(**config: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **config})


@pytest.mark.parametrize("shift", SHIFTS, ids=["pissa", "olora", "kasa"])
@pytest.mark.parametrize("name", ["llama", "llama_bias"])
def test_inits_that_shift_the_base_beside_plain_lora(
    name: str, shift: dict[str, Any], tune: Make, save: Make, as_in_peft: Make
) -> None:
    targets = ["q_proj", "k_proj", "down_proj"]
    patterns = {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 3}}
    configs = [
        lora(target_modules=targets, **shift),
        lora(target_modules=targets, r=7, **patterns, **shift),
        lora(target_modules=["v_proj"], r=5, use_rslora=True, **shift),
    ]
    folders = [tune(name, config, seed) for seed, config in enumerate(configs)]
    as_in_peft(name, [*folders, save(name, r=3, target_modules=targets)])


def test_pissa_with_dora_and_at_conv1d(tune: Make, as_in_peft: Make) -> None:
    config = {"target_modules": ["c_attn", "c_proj"], "init_lora_weights": "pissa"}
    as_in_peft("gpt2", [tune("gpt2", lora(**config, use_dora=dora)) for dora in (False, True)])


def test_an_embedding_beside_a_shifted_module_is_plain(tune: Make, as_in_peft: Make) -> None:
    config = lora(target_modules=["embed_tokens", "v_proj"], init_lora_weights="pissa")
    as_in_peft("llama", [tune("llama", config)])


def test_the_served_rank_is_that_of_both_parts(tune: Make, serve: Make) -> None:
    config = lora(target_modules=["q_proj"], init_lora_weights="pissa")
    assert serve("llama").parse(tune("llama", config)).rank == 8


def test_a_converted_adapter_is_plain_lora(
    base: Make, serve: Make, tmp_path: Path, ids: Tensor
) -> None:
    torch.manual_seed(0)
    initial, converted = tmp_path / "initial", tmp_path / "converted"
    config = lora(target_modules=["q_proj", "up_proj"], init_lora_weights="pissa_niter_2")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(copy.deepcopy(base("llama")), config)
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(initial)
        model.peft_config["default"].init_lora_weights = "pissa_niter_2"
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
        model.save_pretrained(converted, path_initial_model_for_weight_conversion=initial)
        expected = model.eval()(ids[:1]).logits
    served = serve("llama")
    served.load(0, converted)
    torch.testing.assert_close(served.logits(ids[:1], [0]), expected, atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("init", "why"),
    [
        ("pissa_niter_4", "cannot be repeated"),
        ("corda", "training data"),
        ("lora_ga", "training gradients"),
        ("loftq", "quantised"),
    ],
)
def test_a_shift_that_is_not_known_is_refused_with_its_reason(
    init: str, why: str, save: Make, refusal: Make
) -> None:
    error = refusal("llama", save("llama", target_modules=["q_proj"]), init_lora_weights=init)
    assert error.reason == "UNSUPPORTED_FEATURE"
    assert why in error.message


def test_a_saved_head_that_was_shifted_is_refused(tune: Make, refusal: Make) -> None:
    folder = tune("llama", lora(target_modules=["lm_head"], init_lora_weights="pissa"))
    error = refusal("llama", folder)
    assert error.reason == "UNSUPPORTED_FEATURE"
    assert "lm_head.base_layer.weight" in error.message


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_shift_of_a_weight_that_two_modules_share_is_refused(
    init: str, save: Make, refusal: Make
) -> None:
    folder = save("llama_tied", r=4, target_modules=["lm_head"])
    error = refusal("llama_tied", folder, init_lora_weights=init)
    assert error.reason == "UNSUPPORTED_FEATURE"
    assert "embed_tokens" in error.message


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("gpt2", {"init_lora_weights": "olora"}, "UNSUPPORTED_FEATURE"),
        ("llama", {"kasa_config": {"beta": 1e-4}}, "MISSING_TENSORS"),
        (
            "llama",
            {"kasa_config": {"beta": 1e-4}, "init_lora_weights": "pissa"},
            "UNSUPPORTED_FEATURE",
        ),
        ("llama", {"kasa_config": {"beta": 1e-4}, "use_dora": True}, "UNSUPPORTED_FEATURE"),
    ],
)
def test_what_peft_does_not_make_is_refused(
    name: str, changes: dict[str, Any], reason: str, save: Make, refusal: Make
) -> None:
    folder = save(name, r=4, target_modules=["c_attn" if name == "gpt2" else "q_proj"])
    assert refusal(name, folder, **changes).reason == reason


BLOCKS = peft.BdLoraConfig(
    target_modules_bd_a=["down_proj"], target_modules_bd_b=["q_proj", "v_proj"], nblocks=2
)


def test_block_diagonal_lora_beside_plain_lora(tune: Make, save: Make, as_in_peft: Make) -> None:
    targets = ["q_proj", "v_proj", "down_proj"]
    loose = peft.BdLoraConfig(target_modules_bd_b=["v_proj"], nblocks=4, match_strict=False)
    folders = [
        tune("llama", lora(target_modules=targets, use_bdlora=BLOCKS), 1),
        tune("llama", lora(target_modules=targets, r=8, use_bdlora=loose), 2),
    ]
    as_in_peft("llama", [*folders, save("llama", r=3, target_modules=targets)])


@pytest.mark.parametrize(
    ("blocks", "reason"),
    [
        ({"nblocks": 2, "target_modules_bd_b": ["q_proj"]}, "BAD_FIELD"),
        ({"nblocks": 2, "target_modules_bd_a": ["proj"]}, "SHAPE_MISMATCH"),
        (
            {"nblocks": 2, "target_modules_bd_a": ["proj"], "target_modules_bd_b": ["q_proj"]},
            "BAD_FIELD",
        ),
        ({"nblocks": 3, "target_modules_bd_b": ["q_proj", "down_proj"]}, "BAD_FIELD"),
        ({"nblocks": 1, "match_strict": False}, "SHAPE_MISMATCH"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(
    blocks: dict[str, Any], reason: str, tune: Make, refusal: Make
) -> None:
    config = lora(target_modules=["q_proj", "down_proj"], use_bdlora=BLOCKS)
    assert refusal("llama", tune("llama", config), use_bdlora=blocks).reason == reason


def test_blocks_beside_another_variant_are_refused(tune: Make, refusal: Make) -> None:
    folder = tune("llama", lora(target_modules=["q_proj"], use_bdlora=BLOCKS))
    assert refusal("llama", folder, init_lora_weights="pissa").reason == "UNSUPPORTED_FEATURE"


def test_qalora_on_a_base_that_is_not_quantised_is_plain_lora(
    tune: Make, as_in_peft: Make, refusal: Make
) -> None:
    folder = tune("llama", lora(target_modules=["q_proj"], use_qalora=True, qalora_group_size=8))
    as_in_peft("llama", [folder])

    def pooled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: t[:, ::8] if "lora_A" in k else t for k, t in tensors.items()}

    assert refusal("llama", folder, pooled).reason == "BASE_MISMATCH"
