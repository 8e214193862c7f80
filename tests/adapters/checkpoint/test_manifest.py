"""adapter_config.json as a file: bounded, strict, and of a known type."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest

from deltamux.adapters.checkpoint.files import CONFIG
from deltamux.adapters.checkpoint.manifest import read_manifest
from deltamux.errors import InvalidArgument


def write(folder: Path, **fields: Any) -> Path:
    (folder / CONFIG).write_text(json.dumps(fields))
    return folder


def test_the_type_and_the_other_fields_are_read(tmp_path: Path) -> None:
    manifest = read_manifest(write(tmp_path, peft_type="LORA", r=8, target_modules=["q"]))
    assert (manifest.library, manifest.type) == ("peft", "LORA")
    assert manifest.fields == {"r": 8, "target_modules": ["q"]}


@pytest.mark.parametrize("peft_type", [member.value for member in peft.PeftType])
def test_every_type_of_peft_is_known(tmp_path: Path, peft_type: str) -> None:
    assert read_manifest(write(tmp_path, peft_type=peft_type)).peft_type == peft_type


@pytest.mark.parametrize("peft_type", ["LORA2", "lora", "", None, 7, ["LORA"], {"a": "LORA"}])
def test_bi_36_an_unknown_type_is_refused_by_name(tmp_path: Path, peft_type: Any) -> None:
    with pytest.raises(InvalidArgument) as caught:
        read_manifest(write(tmp_path, peft_type=peft_type))
    assert caught.value.reason == "UNKNOWN_TYPE"
    assert repr(peft_type) in caught.value.message


def test_the_own_format_is_told_from_pefts(tmp_path: Path) -> None:
    manifest = read_manifest(write(tmp_path, deltamux_type="delta", version=1))
    assert (manifest.library, manifest.type, manifest.peft_type) == ("deltamux", "delta", None)
    assert manifest.fields == {"version": 1}


@pytest.mark.parametrize(
    "fields", [{"deltamux_type": "LORA"}, {"deltamux_type": "delta", "peft_type": "LORA"}]
)
def test_a_foreign_type_or_two_types_are_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        read_manifest(write(tmp_path, **fields))
    assert caught.value.reason == "UNKNOWN_TYPE"


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"mh_adapter": True}, "bottleneck"),
        ({"architecture": None}, "bottleneck"),
        ({"architecture": "prefix_tuning"}, "prefix_tuning"),
    ],
)
def test_adapterhub_tells_the_type_inside(
    tmp_path: Path, config: dict[str, Any], kind: str
) -> None:
    manifest = read_manifest(write(tmp_path, config=config, model_type="llama", name="a"))
    assert (manifest.library, manifest.type, manifest.peft_type) == ("adapterhub", kind, None)
    assert manifest.fields == {"config": config, "model_type": "llama", "name": "a"}


@pytest.mark.parametrize("config", [{"architecture": "mystery"}, {"architecture": 7}, "pfeiffer"])
def test_unknown_architectures_are_refused(tmp_path: Path, config: Any) -> None:
    with pytest.raises(InvalidArgument) as caught:
        read_manifest(write(tmp_path, config=config, model_type="llama"))
    assert caught.value.reason == "UNKNOWN_TYPE"


def test_bi_31_a_large_file_is_refused_unread(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument) as caught:
        read_manifest(write(tmp_path, peft_type="LORA", filler="x" * (64 << 10)))
    assert caught.value.reason == "TOO_LARGE"


def test_bi_30_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=CONFIG) as caught:
        read_manifest(tmp_path)
    assert caught.value.reason == "MISSING_CONFIG"
