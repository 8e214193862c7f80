"""PEFT's LoraConfig field by field: what is read, what is harmless, what is refused and how."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import peft
import pytest

from deltamux.adapters.peft.lora_config import LoraConfig, read_lora_config
from deltamux.adapters.peft.per_module import MAX_RANK
from deltamux.errors import DeltamuxError

PLAIN = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}


def read(**changes: Any) -> LoraConfig:
    return read_lora_config({**PLAIN, **changes})


def refusal(**changes: Any) -> DeltamuxError:
    with pytest.raises(DeltamuxError) as caught:
        read(**changes)
    return caught.value


def saved_by_peft(**changes: Any) -> dict[str, Any]:
    """The fields of adapter_config.json as the installed PEFT writes them."""
    fields = peft.LoraConfig(**{**PLAIN, **changes}).to_dict()
    fields = json.loads(json.dumps(fields, default=list))
    del fields["peft_type"]
    return fields


def test_a_config_that_peft_saves_is_understood() -> None:
    config = read_lora_config(saved_by_peft(inference_mode=True, lora_dropout=0.1))
    assert (config.ranks.of("q_proj"), config.alphas.of("q_proj")) == (8, 16.0)
    assert not (config.dora or config.bias or config.rank_stabilized)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(peft.LoraConfig)])
def test_no_field_of_peft_is_unknown(field: str) -> None:
    """A new PEFT brings new fields: each must be decided on."""
    # The first three are taken before any family reads; the last is never saved.
    if field in ("peft_type", "task_type", "modules_to_save", "runtime_config"):
        return
    try:
        read(**{field: "an odd value"})
    except DeltamuxError as error:
        assert error.reason != "UNKNOWN_FIELD"


def test_rank_and_alpha_patterns_decide_module_by_module() -> None:
    config = read(rank_pattern={"v_proj": 4}, alpha_pattern={"layers.0.v_proj": 2, "v_proj": 6.5})
    assert config.ranks.of("layers.0.v_proj") == 4
    assert config.scale_of("layers.0.v_proj") == 2 / 4
    assert config.scale_of("layers.1.v_proj") == 6.5 / 4
    assert config.scale_of("layers.1.q_proj") == 16 / 8


def test_rslora_divides_by_the_root_of_the_rank() -> None:
    config = read(use_rslora=True, rank_pattern={"v_proj": 2})
    assert config.scale_of("q_proj") == 16 / math.sqrt(8)
    assert config.scale_of("v_proj") == 16 / math.sqrt(2)


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_inits_that_leave_the_base_alone_are_plain_lora(init: Any) -> None:
    assert read(init_lora_weights=init).ranks.of("q_proj") == 8


@pytest.mark.parametrize(
    ("field", "value", "code", "reason"),
    [
        *(
            pytest.param("r", value, "INVALID_ARGUMENT", "BAD_FIELD", id=f"BI-34 {value!r}")
            for value in (0, -1, 2**31, 8.5, 8.0, True, "8", None, [8])
        ),
        *(
            pytest.param(
                "lora_alpha", value, "INVALID_ARGUMENT", "BAD_FIELD", id=f"BI-35 {value!r}"
            )
            for value in (-1, 0, 1e9, True, "16", None)
        ),
        *(
            pytest.param("target_modules", value, "INVALID_ARGUMENT", reason, id=f"BI-39 {value!r}")
            for value, reason in (
                ([], "NO_TARGETS"),
                (None, "NO_TARGETS"),
                ("", "NO_TARGETS"),
                ([1], "BAD_FIELD"),
                ([""], "BAD_FIELD"),
                ([["q"]], "BAD_FIELD"),
                ({"q": 1}, "BAD_FIELD"),
                (7, "BAD_FIELD"),
            )
        ),
        ("target_modules", "(?!x).*", "INVALID_ARGUMENT", "UNSUPPORTED_PATTERN"),
        ("exclude_modules", "(?<=x)y", "INVALID_ARGUMENT", "UNSUPPORTED_PATTERN"),
        ("exclude_modules", [3], "INVALID_ARGUMENT", "BAD_FIELD"),
        ("rank_pattern", {"q_proj": 0}, "INVALID_ARGUMENT", "BAD_FIELD"),
        ("rank_pattern", {"q_proj": True}, "INVALID_ARGUMENT", "BAD_FIELD"),
        ("rank_pattern", {"(": 8}, "INVALID_ARGUMENT", "UNSUPPORTED_PATTERN"),
        ("rank_pattern", [8], "INVALID_ARGUMENT", "BAD_FIELD"),
        ("alpha_pattern", {"q_proj": "8"}, "INVALID_ARGUMENT", "BAD_FIELD"),
        ("layers_to_transform", "1", "INVALID_ARGUMENT", "BAD_FIELD"),
        ("layers_to_transform", [True], "INVALID_ARGUMENT", "BAD_FIELD"),
        ("layers_to_transform", -1, "INVALID_ARGUMENT", "BAD_FIELD"),
        ("layers_pattern", "h", "INVALID_ARGUMENT", "BAD_FIELD"),
        ("use_dora", "yes", "INVALID_ARGUMENT", "BAD_FIELD"),
        ("bias", "boft_only", "INVALID_ARGUMENT", "BAD_FIELD"),
        ("bias", True, "INVALID_ARGUMENT", "BAD_FIELD"),
        ("use_rslora", 1, "INVALID_ARGUMENT", "BAD_FIELD"),
        pytest.param("r", MAX_RANK + 1, "FAILED_PRECONDITION", "RANK_TOO_LARGE", id="BI-22"),
        *(
            pytest.param(
                field, value, "FAILED_PRECONDITION", "UNSUPPORTED_FEATURE", id=f"BI-37 {field}"
            )
            for field, value in {
                "arrow_config": {"top_k": 3},
                "layer_replication": [[0, 1]],
                "loftq_config": {"loftq_bits": 4},
                "monteclora_config": {"x": 1},
                "velora_config": {"num_groups": 2},
            }.items()
        ),
        *(
            ("init_lora_weights", init, "FAILED_PRECONDITION", "UNSUPPORTED_FEATURE")
            for init in ("pissa_niter_4", "corda", "loftq", "lora_ga", "new", 1)
        ),
        *(
            pytest.param(field, value, "INVALID_ARGUMENT", "EXECUTABLE_FIELD", id=f"BI-42 {field}")
            for field, value in {
                "auto_mapping": {"base_model_class": "X", "parent_library": "evil"},
                "megatron_config": {"hidden_size": 8},
                "megatron_core": "evil.core",
                "trust_remote_code": True,
            }.items()
        ),
        ("kasa_config", {"rank": 3}, "INVALID_ARGUMENT", "BAD_FIELD"),
        ("use_bdlora", True, "INVALID_ARGUMENT", "BAD_FIELD"),
        ("use_bdlora", {"nblocks": 0}, "INVALID_ARGUMENT", "BAD_FIELD"),
        ("use_bdlora", {"blocks": 2}, "INVALID_ARGUMENT", "BAD_FIELD"),
        pytest.param(
            "use_magic", True, "FAILED_PRECONDITION", "UNKNOWN_FIELD", id="BI-43 semantic"
        ),
        pytest.param(
            "use_magic", False, "FAILED_PRECONDITION", "UNKNOWN_FIELD", id="BI-43 boolean"
        ),
    ],
)
def test_what_is_wrong_or_not_served_is_refused_by_name(
    field: str, value: Any, code: str, reason: str
) -> None:
    error = refusal(**{field: value})
    assert (error.code, error.reason) == (code, reason)
    assert field in error.message or reason == "UNSUPPORTED_PATTERN"


@pytest.mark.parametrize(
    "harmless",
    [
        {"base_model_name_or_path": "https://example.com/model", "revision": "x"},
        {"a_field_of_a_newer_peft": None},
        {
            "loftq_config": {},
            "bias": "none",
            "megatron_core": "megatron.core",
        },
        {"corda_config": {"corda_method": "ipm"}, "eva_config": {"rho": 2.0}},
        {"enable_lora": None, "merge_weights": False},
        {
            "auto_mapping": {
                "base_model_class": "LlamaForCausalLM",
                "parent_library": "transformers.models.llama.modeling_llama",
            }
        },
    ],
)
def test_what_does_not_change_the_arithmetic_is_accepted(harmless: dict[str, Any]) -> None:
    assert read(**harmless).ranks.of("q_proj") == 8


def test_the_largest_rank_is_told() -> None:
    assert str(MAX_RANK) in refusal(r=MAX_RANK + 1).message


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True, "lora_bias": True},
        {"target_modules": ".*", "layers_to_transform": [1]},
        {"layers_pattern": ["layers"]},
    ],
)
def test_contradictions_that_peft_refuses_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        peft.LoraConfig(**{**PLAIN, **changes})
    assert refusal(**changes).code == "INVALID_ARGUMENT"


def test_an_invocation_counts_without_a_task() -> None:
    """PEFT itself forgets it in silence where none is named."""
    assert read(alora_invocation_tokens=[5, 5, 0]).invocation == (5, 5, 0)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"alora_invocation_tokens": []}, "BAD_FIELD"),
        ({"alora_invocation_tokens": "ab"}, "BAD_FIELD"),
        ({"alora_invocation_tokens": [1, -1]}, "BAD_FIELD"),
        ({"use_dora": True}, "UNSUPPORTED_FEATURE"),
        ({"bias": "all"}, "UNSUPPORTED_FEATURE"),
        ({"init_lora_weights": "olora"}, "UNSUPPORTED_FEATURE"),
        ({"trainable_token_indices": [3]}, "UNSUPPORTED_FEATURE"),
    ],
)
def test_what_cannot_sleep_until_an_invocation_is_refused(
    fields: dict[str, Any], reason: str
) -> None:
    with pytest.raises(DeltamuxError) as caught:
        read(**{"alora_invocation_tokens": [1, 2], **fields})
    assert caught.value.reason == reason
