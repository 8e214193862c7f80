"""The tensors of a file are what safetensors reads of it, and no more than the file has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltamux.adapters.checkpoint import tensors as tensors_module
from deltamux.adapters.checkpoint.files import WEIGHTS
from deltamux.adapters.checkpoint.tensors import read_tensors, require_finite
from deltamux.errors import InvalidArgument

DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
)


def test_every_dtype_is_read_as_safetensors_reads_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    written = {
        f"{dtype}.{n}"[6:]: (9 * torch.randn(n, 3)).to(dtype) for dtype in DTYPES for n in (0, 5)
    }
    save_file(written, tmp_path / WEIGHTS, metadata={"format": "pt"})
    read, wanted = read_tensors(tmp_path), load_file(tmp_path / WEIGHTS)
    assert read.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(read[name], tensor)
        assert read[name].untyped_storage().nbytes() == tensor.nbytes


def test_a_header_may_name_tensors_in_another_order_than_they_lie(tmp_path: Path) -> None:
    header = json.dumps(
        {
            "second": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
            "first": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        }
    ).encode()
    data = torch.tensor([1.0, 2.0, 3.0, 4.0])
    file = len(header).to_bytes(8, "little") + header + data.numpy().tobytes()
    (tmp_path / WEIGHTS).write_bytes(file)
    read = read_tensors(tmp_path)
    assert read["first"].tolist() == [1, 2]
    assert read["second"].tolist() == [3, 4]


def test_a_file_cut_off_behind_its_checked_header_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"a": torch.ones(100, 100)}, tmp_path / WEIGHTS)
    check = tensors_module.read_header

    def cutting(file):  # type: ignore[no-untyped-def]
        header = check(file)
        with open(tmp_path / WEIGHTS, "r+b") as other:
            other.truncate(20_000)
        return header

    monkeypatch.setattr(tensors_module, "read_header", cutting)
    with pytest.raises(InvalidArgument, match="it ends in a") as caught:
        read_tensors(tmp_path)
    assert caught.value.reason == "MALFORMED_WEIGHTS"


def test_finite_numbers_may_have_a_sum_that_is_none() -> None:
    largest = torch.full((9,), torch.finfo(torch.float32).max)
    require_finite("a", largest)
    for number in (torch.nan, torch.inf, -torch.inf):
        with pytest.raises(InvalidArgument, match="a holds NaN or infinity"):
            require_finite("a", torch.cat((largest, torch.tensor([number]))))
