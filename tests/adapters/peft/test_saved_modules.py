"""modules_to_save against PEFT, mixed with plain LoRA and rows without adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from deltamux.adapters.peft.saved_modules import saved_sites
from deltamux.errors import DeltamuxError

Make = Callable[..., Any]


@pytest.mark.parametrize(
    ("name", "targets", "saved"),
    [
        ("llama", ["q_proj", "v_proj"], ["lm_head"]),
        ("llama", ["q_proj", "v_proj"], ["embed_tokens", "norm", "k_proj"]),
        ("llama_bias", ["o_proj"], ["mlp"]),
        ("llama", "all-linear", ["up_proj"]),
        ("llama_tied", ["q_proj"], ["embed_tokens"]),
        ("llama_tied", ["q_proj"], ["lm_head"]),
        ("gemma3", ["q_proj"], ["embed_tokens", "post_attention_layernorm"]),
        ("gpt2", ["c_attn"], ["ln_f", "c_fc", "wpe"]),
    ],
)
def test_whole_modules_beside_lora(
    name: str, targets: list[str] | str, saved: list[str], tune: Make, save: Make, as_in_peft: Make
) -> None:
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, modules_to_save=saved)
    as_in_peft(
        name, [tune(name, config, 1), save(name, r=4, target_modules=targets), tune(name, config)]
    )


@pytest.mark.parametrize("name", ["llama_bias", "qwen3", "gpt2"])
def test_whole_layers(name: str, tune: Make, save: Make, as_in_peft: Make) -> None:
    targets, layer = (["c_attn"], "h.1") if name == "gpt2" else (["q_proj"], "layers.1")
    config = peft.LoraConfig(r=3, target_modules=targets, modules_to_save=[layer])
    as_in_peft(name, [save(name, r=16, target_modules="all-linear"), tune(name, config)])


@pytest.mark.parametrize(
    "config",
    [
        peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        peft.LNTuningConfig(target_modules=["input_layernorm"]),
        peft.ShiraConfig(r=2, random_seed=0, target_modules=["q_proj"]),
    ],
)
def test_whole_modules_beside_any_family(
    config: peft.PeftConfig, tune: Make, save: Make, as_in_peft: Make
) -> None:
    config.modules_to_save = ["lm_head", "embed_tokens", "post_attention_layernorm", "0.mlp"]
    as_in_peft("llama", [tune("llama", config), save("llama", target_modules=["q_proj"])])


def test_layers_with_nothing_beside_them(tune: Make, save: Make, as_in_peft: Make) -> None:
    config = peft.LoraConfig(target_modules="dummy-target-modules", modules_to_save=["layers.0"])
    as_in_peft("qwen3", [tune("qwen3", config), save("qwen3", target_modules=["v_proj"])])


def test_names_end_a_modules_path_or_that_of_a_module_around_it(serve: Make) -> None:
    structure = serve("llama").structure
    mlp = saved_sites(["1.mlp"], structure)
    assert [name.rpartition(".")[2] for name in mlp] == ["gate_proj", "up_proj", "down_proj"]
    assert list(saved_sites(["head"], structure)) == ["lm_head"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda head: head[:-1], "BASE_MISMATCH"),
        (lambda head: torch.cat((head, head[:3])), "ADDED_TOKENS"),
        (lambda head: head[0], "SHAPE_MISMATCH"),
        (None, "MISSING_TENSORS"),
    ],
)
def test_wrong_modules_are_refused(
    change: Callable[[Tensor], Tensor] | None, reason: str, save: Make, serve: Make, rewrite: Make
) -> None:
    name = "base_model.model.lm_head.weight"

    def changed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        head = tensors.pop(name)
        return tensors if change is None else {**tensors, name: change(head)}

    folder = save("llama", r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(DeltamuxError) as caught:
        serve("llama").parse(rewrite(folder, changed))
    assert caught.value.reason == reason


def test_a_bias_that_the_base_does_not_have_is_refused(
    save: Make, serve: Make, rewrite: Make
) -> None:
    bias = {"base_model.model.lm_head.bias": torch.zeros(61)}
    folder = save("llama", r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(DeltamuxError, match=r"lm_head\.bias") as caught:
        serve("llama").parse(rewrite(folder, lambda tensors: tensors | bias))
    assert caught.value.reason == "EXTRA_TENSORS"


@pytest.mark.parametrize(
    ("name", "saved"),
    [("gpt2", ["attn"]), ("llama", ["self_attn", "k_proj"]), ("llama", ["layers.0", "norm"])],
)
def test_a_module_inside_another_is_refused_as_peft_fails_at_it(
    name: str, saved: list[str], tune: Make, serve: Make, reference: Make, ids: Tensor
) -> None:
    target = "c_proj" if name == "gpt2" else "up_proj"
    folder = tune(name, peft.LoraConfig(target_modules=[target], modules_to_save=saved))
    with pytest.raises(KeyError):
        reference(name, folder, ids)
    with pytest.raises(DeltamuxError, match=" in it is not served") as caught:
        serve(name).parse(folder)
    assert caught.value.reason == "UNSUPPORTED_FEATURE"


def test_a_name_that_means_no_site_is_refused(serve: Make) -> None:
    with pytest.raises(DeltamuxError, match="score") as caught:
        saved_sites(["lm_head", "score"], serve("llama").structure)
    assert caught.value.reason == "UNSUPPORTED_FEATURE"
