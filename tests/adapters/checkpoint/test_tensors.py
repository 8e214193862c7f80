"""The tensors of a file are what safetensors reads of it, and no more than the file has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltamux.adapters.checkpoint import tensors as tensors_module
from deltamux.adapters.checkpoint.files import WEIGHTS
from deltamux.adapters.checkpoint.tensors import read_tensors
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
