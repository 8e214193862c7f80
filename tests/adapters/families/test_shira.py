"""SHiRA against PEFT, mixed with LoRA and rows without adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from deltamux.errors import DeltamuxError

Make = Callable[..., Any]


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama", ["q_proj", "v_proj", "down_proj"]),
        ("llama_bias", "all-linear"),
        ("gpt_neox", ["query_key_value", "dense_h_to_4h"]),
        ("llama", ["lm_head"]),
    ],
)
def test_sparse_deltas_beside_lora(
    name: str, targets: list[str] | str, tune: Make, save: Make, as_in_peft: Make
) -> None:
    configs = [peft.ShiraConfig(r=r, random_seed=r, target_modules=targets) for r in (2, 5)]
    folders = [tune(name, config, seed) for seed, config in enumerate(configs)]
    as_in_peft(name, [*folders, save(name, r=4, target_modules=targets)])


def test_the_device_holds_the_non_zeros_only(tune: Make, serve: Make) -> None:
    served = serve("llama")
    config = peft.ShiraConfig(r=1, random_seed=0, target_modules=["down_proj"])
    adapter = served.load(0, tune("llama", config))
    non_zeros, outputs = 48 + 32, 32
    assert adapter.parameters == 2 * non_zeros
    assert adapter.host_bytes == 2 * (8 * non_zeros + 4 * (outputs + 1))
    assert served.sites.used_bytes < 2 * 4 * 48 * 32 / 2


PREFIX = "base_model.model.model.layers.0.self_attn.q_proj."


@pytest.mark.parametrize(
    ("part", "change", "reason"),
    [
        ("shira_weight", lambda t: t[:-1], "RANK_MISMATCH"),
        ("shira_indices", lambda t: t[:, :-1], "RANK_MISMATCH"),
        ("shira_indices", lambda t: t[:1], "RANK_MISMATCH"),
        ("shira_indices", lambda t: t - 40, "BASE_MISMATCH"),
        ("shira_indices", lambda t: t + 1, "BASE_MISMATCH"),
        ("shira_indices", lambda t: t.float(), "MALFORMED_WEIGHTS"),
        ("shira_weight", lambda t: t.int(), "MALFORMED_WEIGHTS"),
        ("shira_indices", None, "MISSING_TENSORS"),
        ("shira_weight", lambda t: t * torch.inf, "NON_FINITE"),
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
        tensor = tensors.pop(PREFIX + part)
        return tensors if change is None else {**tensors, PREFIX + part: change(tensor)}

    config = peft.ShiraConfig(r=4, random_seed=0, target_modules=["q_proj"])
    with pytest.raises(DeltamuxError) as caught:
        serve("llama").parse(rewrite(tune("llama", config), changed))
    assert caught.value.reason == reason
