"""LN tuning against PEFT, mixed with LoRA and rows without adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
from torch import Tensor

from deltamux.errors import DeltamuxError

Make = Callable[..., Any]

LLAMA = ["input_layernorm", "post_attention_layernorm", "norm"]


@pytest.mark.parametrize(
    ("name", "targets", "lora"),
    [
        ("llama", LLAMA, ["q_proj", "up_proj"]),
        ("gemma2", [*LLAMA, "pre_feedforward_layernorm"], ["v_proj"]),
        ("gpt2", ["ln_1", "ln_2", "ln_f"], ["c_attn"]),
        ("gpt_neox", r".*(input|post_attention|final)_?layer_?norm", ["query_key_value"]),
    ],
)
def test_own_norms_beside_lora(
    name: str, targets: list[str] | str, lora: list[str], tune: Make, save: Make, as_in_peft: Make
) -> None:
    config = peft.LNTuningConfig(target_modules=targets)
    as_in_peft(name, [tune(name, config, 1), save(name, target_modules=lora), tune(name, config)])


def test_some_layers_only(tune: Make, as_in_peft: Make) -> None:
    targets = r"model\.layers\.1\.input_layernorm"
    as_in_peft("llama", [tune("llama", peft.LNTuningConfig(target_modules=targets))])


@pytest.mark.parametrize("targets", [["q_norm", "norm"], ["q_norm"], ["norm", "q_proj"]])
def test_copies_of_other_modules_are_refused(targets: list[str], tune: Make, serve: Make) -> None:
    folder = tune("qwen3", peft.LNTuningConfig(target_modules=targets))
    with pytest.raises(DeltamuxError) as caught:
        serve("qwen3").parse(folder)
    assert caught.value.reason in ("BASE_MISMATCH", "EXTRA_TENSORS")
    assert targets[targets[0] == "norm"] in caught.value.message


@pytest.mark.parametrize(
    ("part", "change", "reason"),
    [
        ("ln_1.ln_tuning_layers.bias", None, "MISSING_TENSORS"),
        ("ln_1.ln_tuning_layers.weight", lambda t: t[:-1], "BASE_MISMATCH"),
        ("ln_1.ln_tuning_layers.weight", lambda t: t[None], "SHAPE_MISMATCH"),
    ],
)
def test_wrong_tensors_are_refused(
    part: str,
    change: Callable[[Tensor], Tensor] | None,
    reason: str,
    tune: Make,
    serve: Make,
    rewrite: Make,
) -> None:
    def changed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        name = f"base_model.model.transformer.h.0.{part}"
        tensor = tensors.pop(name)
        return tensors if change is None else {**tensors, name: change(tensor)}

    folder: Path = tune("gpt2", peft.LNTuningConfig(target_modules=["ln_1"]))
    with pytest.raises(DeltamuxError) as caught:
        serve("gpt2").parse(rewrite(folder, changed))
    assert caught.value.reason == reason
