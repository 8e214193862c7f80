"""LN tuning against PEFT, mixed with LoRA and rows without adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from deltamux.errors import DeltamuxError
from deltamux_kernels import native

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


def test_norms_of_queries_and_keys_by_head(tune: Make, save: Make, as_in_peft: Make) -> None:
    config = peft.LNTuningConfig(target_modules=["q_norm", "k_norm", "norm"])
    as_in_peft("qwen3", [tune("qwen3", config), save("qwen3", target_modules=["q_proj"])])


@pytest.mark.parametrize(
    ("name", "targets"),
    [("llama", LLAMA), ("qwen3", ["q_norm", "k_norm"]), ("gpt2", ["ln_1"]), ("gemma2", LLAMA)],
)
def test_captured_steps_stand_for_norms(
    name: str, targets: list[str], tune: Make, serve: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "available", lambda: False)
    served = serve(name)
    served.load(0, tune(name, peft.LNTuningConfig(target_modules=targets)))
    assert not served.sites.eager_slots


def test_norms_that_see_heads_before_tokens(
    tune: Make, serve: Make, reference: Make, ids: Tensor
) -> None:
    served = serve("gemma3")
    folder = tune("gemma3", peft.LNTuningConfig(target_modules=["q_norm", "k_norm"]))
    served.load(0, folder)
    assert served.structure.sites["model.layers.0.self_attn.q_norm"].token_axis == 2
    expected = reference("gemma3", folder, ids[:1])
    assert (expected - served.logits(ids[:1], [None])).abs().max() > 0.01
    torch.testing.assert_close(served.logits(ids[:1], [0]), expected, atol=3e-5, rtol=1e-5)


def test_copies_of_other_modules_are_refused(tune: Make, serve: Make) -> None:
    folder = tune("qwen3", peft.LNTuningConfig(target_modules=["norm", "q_proj"]))
    with pytest.raises(DeltamuxError, match="q_proj") as caught:
        serve("qwen3").parse(folder)
    assert caught.value.reason == "EXTRA_TENSORS"


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
