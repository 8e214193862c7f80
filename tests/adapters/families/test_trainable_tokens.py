"""Trainable tokens, alone and inside LoRA, against PEFT in one batch with LoRA and the base."""

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
from deltamux.errors import DeltamuxError

Make = Callable[..., Any]

# More than half of the vocabulary: whatever the prompt, some of its tokens are among them.
TOKENS = list(range(60, 20, -1))
FEW = [7, 3, 41]


@pytest.fixture
def trained(tune: Make) -> Callable[..., Path]:
    """trained(name, seed, **TrainableTokensConfig)"""

    def trained(name: str, seed: int = 0, **config: Any) -> Path:
        return tune(name, peft.TrainableTokensConfig(**config), seed)

    return trained


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gemma3", "gpt2", "gpt_neox"])
def test_rows_of_their_own_beside_lora(
    name: str, trained: Make, save: Make, as_in_peft: Make
) -> None:
    lora = save(name, target_modules="all-linear", r=4)
    as_in_peft(
        name,
        [trained(name, token_indices=TOKENS), lora, trained(name, 1, token_indices=TOKENS[5:])],
    )


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama", ["lm_head"]),
        ("llama", ["lm_head", "embed_tokens"]),
        ("llama_tied", ["lm_head"]),
        ("llama_tied", r".*embed_tokens"),
    ],
)
def test_rows_of_the_head_too(
    name: str, targets: list[str] | str, trained: Make, as_in_peft: Make
) -> None:
    as_in_peft(name, [trained(name, token_indices=TOKENS, target_modules=targets)])


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gemma3"])
@pytest.mark.parametrize(
    ("tokens", "tied"),
    [
        (TOKENS, False),
        ({"embed_tokens": TOKENS, "lm_head": FEW}, False),
        ({"embed_tokens": TOKENS, "lm_head": TOKENS}, True),
        ({"lm_head": FEW}, False),
    ],
)
def test_tokens_inside_lora(
    name: str, tokens: Any, tied: bool, tune: Make, save: Make, as_in_peft: Make
) -> None:
    config = peft.LoraConfig(
        r=4,
        target_modules=["q_proj", "down_proj"],
        trainable_token_indices=tokens,
        ensure_weight_tying=tied,
        bias="none",
    )
    as_in_peft(name, [tune(name, config), save(name, target_modules=["v_proj", "lm_head"])])


def test_the_device_holds_the_rows_only(trained: Make, serve: Make) -> None:
    served = serve("llama")
    adapter = served.load(0, trained("llama", token_indices=FEW))
    assert adapter.parameters == len(FEW) * 32
    assert adapter.host_bytes == len(FEW) * (32 * 4 + 4)
    assert served.sites.used_bytes < 61 * 32 * 4 / 8


PART = "base_model.model.model.embed_tokens.trainable_tokens_delta"
HEAD = "base_model.model.lm_head.trainable_tokens_delta"


@pytest.mark.parametrize(
    ("changes", "tensors", "reason"),
    [
        ({"token_indices": [3, 3, 5]}, {}, "BAD_FIELD"),
        ({"token_indices": [3, -1, 5]}, {}, "BAD_FIELD"),
        ({"token_indices": []}, {}, "BAD_FIELD"),
        ({"token_indices": [3, 62, 5]}, {}, "ADDED_TOKENS"),
        ({"token_indices": [3, 5]}, {}, "BASE_MISMATCH"),
        ({"target_modules": ["q_proj"]}, {}, "NO_TARGETS"),
        ({"a_new_field": 1}, {}, "UNKNOWN_FIELD"),
        ({}, {PART: torch.zeros(3, 31)}, "TIED_TENSORS_DIFFER"),
        ({}, {PART: torch.zeros(3, 31), HEAD: torch.zeros(3, 31)}, "BASE_MISMATCH"),
        ({}, {PART: torch.zeros(3)}, "SHAPE_MISMATCH"),
        ({}, {HEAD: torch.ones(3, 32)}, "TIED_TENSORS_DIFFER"),
        ({}, {HEAD: None}, "MISSING_TENSORS"),
    ],
)
def test_what_does_not_fit_is_refused(
    changes: dict[str, Any],
    tensors: dict[str, Tensor | None],
    reason: str,
    trained: Make,
    serve: Make,
    rewrite: Make,
) -> None:
    def changed(before: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: t for k, t in (before | tensors).items() if t is not None}

    folder = rewrite(trained("llama_tied", token_indices=FEW), changed)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))
    with pytest.raises(DeltamuxError) as caught:
        serve("llama_tied").parse(folder)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"trainable_token_indices": {"q_proj": FEW}}, "UNSUPPORTED_FEATURE"),
        ({"trainable_token_indices": {"proj": FEW}}, "UNSUPPORTED_FEATURE"),
        ({"trainable_token_indices": "3"}, "BAD_FIELD"),
        ({"target_modules": ["lm_head"]}, "MISSING_TENSORS"),
        (
            {
                "ensure_weight_tying": True,
                "trainable_token_indices": {"embed_tokens": FEW, "lm_head": [1]},
            },
            "BAD_FIELD",
        ),
    ],
)
def test_what_does_not_fit_inside_lora_is_refused(
    config: dict[str, Any], reason: str, tune: Make, serve: Make, rewrite: Make
) -> None:
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=FEW)
    folder = rewrite(tune("llama_tied", lora), dict)
    fields = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**fields, **config}))
    with pytest.raises(DeltamuxError) as caught:
        serve("llama_tied").parse(folder)
    assert caught.value.reason == reason


def test_a_head_that_lora_changes_cannot_have_tied_tokens_too(tune: Make, serve: Make) -> None:
    config = peft.LoraConfig(r=2, target_modules=["lm_head"], trainable_token_indices=FEW)
    with pytest.raises(DeltamuxError, match="lm_head") as caught:
        serve("llama_tied").parse(tune("llama_tied", config))
    assert caught.value.reason == "UNSUPPORTED_FEATURE"
