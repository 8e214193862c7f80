"""The header check: every malformed or hostile file is refused by reason, without reading data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from deltamux.adapters.checkpoint.files import WEIGHTS
from deltamux.adapters.checkpoint.header import MAX_HEADER_BYTES, MAX_TENSORS, check_weights
from deltamux.errors import InvalidArgument

TENSOR = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def write(folder: Path, header: Any, data: bytes = bytes(24), length: int | None = None) -> Path:
    """A file with any header: an object, text or bytes; `length` overrides its true length."""
    text = header if isinstance(header, str | bytes) else json.dumps(header)
    encoded = text.encode() if isinstance(text, str) else text
    size = len(encoded) if length is None else length
    (folder / WEIGHTS).write_bytes(size.to_bytes(8, "little") + encoded + data)
    return folder


def entry(**changes: Any) -> dict[str, Any]:
    return {"a": {**TENSOR, **changes}}


def refused(folder: Path) -> InvalidArgument:
    with pytest.raises(InvalidArgument) as caught:
        check_weights(folder)
    return caught.value


def test_what_safetensors_writes_is_read(tmp_path: Path) -> None:
    tensors = {
        "a.lora_A.weight": torch.zeros(2, 3),
        "b-c": torch.zeros(5, dtype=torch.bfloat16),
        "d": torch.zeros(1, 2, 3, dtype=torch.float16),
    }
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    found = check_weights(tmp_path)
    assert {name: (info.dtype, info.shape) for name, info in found.items()} == {
        "a.lora_A.weight": ("F32", (2, 3)),
        "b-c": ("BF16", (5,)),
        "d": ("F16", (1, 2, 3)),
    }


@pytest.mark.parametrize(
    ("header", "data", "reason"),
    [
        pytest.param(entry(), bytes(23), "MALFORMED_WEIGHTS", id="BI-6 truncated"),
        pytest.param(entry(), bytes(25), "MALFORMED_WEIGHTS", id="BI-7 trailing bytes"),
        pytest.param(
            entry(data_offsets=[1, 25]), bytes(25), "MALFORMED_WEIGHTS", id="BI-7 gap at the start"
        ),
        pytest.param({"a": TENSOR, "b": TENSOR}, bytes(24), "MALFORMED_WEIGHTS", id="BI-7 overlap"),
        pytest.param(entry(data_offsets=[24, 0]), bytes(24), "MALFORMED_WEIGHTS", id="BI-7 begin"),
        pytest.param(entry(shape=[2, 2]), bytes(24), "MALFORMED_WEIGHTS", id="BI-8 too small"),
        pytest.param(
            entry(shape=[2**40, 2**40]), bytes(24), "MALFORMED_WEIGHTS", id="BI-8 overflow"
        ),
        pytest.param(entry(shape=[-2, -3]), bytes(24), "MALFORMED_WEIGHTS", id="BI-8 negative"),
        pytest.param(entry(shape=[2.0, 3]), bytes(24), "MALFORMED_WEIGHTS", id="BI-8 float"),
        pytest.param(entry(shape=[True, 6]), bytes(24), "MALFORMED_WEIGHTS", id="BI-8 bool"),
        pytest.param(
            entry(shape=[], data_offsets=[0, 4]), bytes(4), "MALFORMED_WEIGHTS", id="BI-8 scalar"
        ),
        pytest.param(entry(dtype="I8"), bytes(24), "MALFORMED_WEIGHTS", id="BI-9 int8"),
        pytest.param(entry(dtype="F8_E4M3"), bytes(24), "MALFORMED_WEIGHTS", id="BI-9 fp8"),
        pytest.param(entry(dtype="BOOL"), bytes(24), "MALFORMED_WEIGHTS", id="BI-9 bool"),
        pytest.param(entry(dtype=7), bytes(24), "MALFORMED_WEIGHTS", id="BI-9 no string"),
        pytest.param(entry(extra=1), bytes(24), "MALFORMED_WEIGHTS", id="unknown member"),
        pytest.param({"a": [1]}, bytes(24), "MALFORMED_WEIGHTS", id="entry is a list"),
        pytest.param('{"a": {}, "a": {}}', bytes(24), "MALFORMED_JSON", id="BI-10 duplicate names"),
        pytest.param({"../a": TENSOR}, bytes(24), "MALFORMED_WEIGHTS", id="BI-11 traversal"),
        pytest.param({"a\0": TENSOR}, bytes(24), "MALFORMED_WEIGHTS", id="BI-11 NUL"),
        pytest.param({"a\n": TENSOR}, bytes(24), "MALFORMED_WEIGHTS", id="BI-11 newline"),
        pytest.param({"a" * 513: TENSOR}, bytes(24), "MALFORMED_WEIGHTS", id="BI-11 long name"),
        pytest.param(b'{"\xff": 1}', bytes(24), "MALFORMED_JSON", id="BI-12 not UTF-8"),
        pytest.param("[1, 2, 3]", bytes(24), "MALFORMED_JSON", id="BI-12 a list"),
        pytest.param(
            {"__metadata__": {"a": 1}}, b"", "MALFORMED_WEIGHTS", id="BI-12 metadata values"
        ),
        pytest.param({"__metadata__": 1}, b"", "MALFORMED_WEIGHTS", id="BI-12 metadata"),
        pytest.param(
            entry(shape=[1] * 101, data_offsets=[0, 4]),
            bytes(4),
            "MALFORMED_WEIGHTS",
            id="BI-23 101 dimensions",
        ),
        pytest.param('{"a": NaN}', bytes(24), "MALFORMED_JSON", id="NaN"),
    ],
)
def test_a_malformed_file_is_refused(tmp_path: Path, header: Any, data: bytes, reason: str) -> None:
    assert refused(write(tmp_path, header, data)).reason == reason


@pytest.mark.parametrize(
    ("content", "reason", "says"),
    [
        pytest.param(b"", "NOT_SAFETENSORS", "0 bytes", id="BI-1 empty"),
        pytest.param(b"\x08\0\0", "NOT_SAFETENSORS", "3 bytes", id="BI-1 short"),
        pytest.param((99).to_bytes(8, "little") + b"{}", "MALFORMED_WEIGHTS", "longer", id="BI-2"),
        pytest.param(b"\0" * 7 + b"\x80{}", "MALFORMED_WEIGHTS", "longer", id="BI-3 2**63"),
        pytest.param(b"\xff" * 8 + b"{}", "MALFORMED_WEIGHTS", "longer", id="BI-3 2**64-1"),
        pytest.param(
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
            "NOT_SAFETENSORS",
            "git-lfs pointer",
            id="BI-13 LFS",
        ),
        pytest.param(b"<!DOCTYPE html><html>", "NOT_SAFETENSORS", "HTML", id="BI-13 HTML"),
        pytest.param(b"PK\x03\x04" + bytes(40), "NOT_SAFETENSORS", "zip", id="BI-13 zip"),
        pytest.param(
            b"\x80\x02}q\x00(X\x01\x00\x00\x00a", "NOT_SAFETENSORS", "pickle", id="BI-13 pickle"
        ),
        pytest.param(b"GGUF" + bytes(40), "NOT_SAFETENSORS", "GGUF", id="BI-13 GGUF"),
    ],
)
def test_another_kind_of_file_is_named(
    tmp_path: Path, content: bytes, reason: str, says: str
) -> None:
    (tmp_path / WEIGHTS).write_bytes(content)
    error = refused(tmp_path)
    assert error.reason == reason
    assert says in error.message


def sparse(folder: Path, length: int, size: int) -> Path:
    with open(folder / WEIGHTS, "wb") as file:
        file.write(length.to_bytes(8, "little") + b"{")
        file.truncate(size)
    return folder


def many_tensors(folder: Path, count: int) -> Path:
    empty = '"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return write(folder, "{" + ",".join(empty % i for i in range(count)) + "}", b"")


def nested(folder: Path) -> Path:
    return write(folder, '{"a":' + "[" * (MAX_HEADER_BYTES - 100), b"")


@pytest.mark.parametrize(
    ("bomb", "reason"),
    [
        pytest.param(
            lambda f: sparse(f, 99 << 20, 100 << 20), "TOO_LARGE", id="BI-4 99 MB of blanks"
        ),
        pytest.param(lambda f: sparse(f, 1 << 39, 1 << 40), "TOO_LARGE", id="BI-29 sparse 1 TB"),
        pytest.param(lambda f: many_tensors(f, 200_000), "TOO_LARGE", id="BI-5 200,000 tensors"),
        pytest.param(
            lambda f: many_tensors(f, MAX_TENSORS + 1), "MALFORMED_WEIGHTS", id="BI-5 in 4 MiB"
        ),
        pytest.param(nested, "MALFORMED_JSON", id="nested lists"),
    ],
)
def test_a_bomb_is_refused_in_little_memory(tmp_path: Path, bomb: Any, reason: str) -> None:
    bomb(tmp_path)
    tracemalloc.start()
    try:
        assert refused(tmp_path).reason == reason
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 << 20


def test_a_single_number_is_called_one(tmp_path: Path) -> None:
    """As trainers beside PEFT save their alphas."""
    with pytest.raises(InvalidArgument, match="single number"):
        check_weights(write(tmp_path, entry(shape=[], data_offsets=[0, 4]), bytes(4)))


def test_the_header_check_needs_no_torch() -> None:
    code = "import sys, deltamux.adapters.checkpoint.precheck; print('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert result.stdout.strip() == "False"
