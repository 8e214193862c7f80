"""Arrays on their way to the device and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deltamux.engine.transfer import Download, Upload, pack, spans, unpack

ARRAYS = [
    np.arange(3),
    np.arange(7, dtype=np.int32),
    np.zeros(0, dtype=np.int64),
    np.arange(10, dtype=np.int32).reshape(2, 5),
    np.array([-1 << 40]),
]
CUDA = pytest.param(
    torch.device("cuda"),
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ],
)
DEVICES = [torch.device("cpu"), CUDA]


def same(tensors: list[torch.Tensor], arrays: list[np.ndarray]) -> bool:
    pairs = list(zip(tensors, arrays, strict=True))
    return all(
        t.cpu().equal(torch.from_numpy(a)) and t.dtype == torch.from_numpy(a).dtype
        for t, a in pairs
    )


def test_what_is_packed_is_found_again_where_a_kernel_wants_it() -> None:
    memory = np.full(sum(spans(ARRAYS)), 255, dtype=np.uint8)
    pack(ARRAYS, memory)
    packed = torch.from_numpy(memory)
    tensors = unpack(packed, ARRAYS)
    assert same(tensors, ARRAYS)
    assert all((tensor.data_ptr() - packed.data_ptr()) % 16 == 0 for tensor in tensors)


@pytest.mark.parametrize("device", DEVICES)
def test_what_was_sent_stays_when_more_is_sent(device: torch.device) -> None:
    """Larger than before, and smaller: the memory on the host is the same."""
    upload = Upload(device)
    steps = [[array + step for array in ARRAYS * (step + 1)] for step in (0, 2, 1)]
    sent = [upload.send(step) for step in steps]
    for tensors, arrays in zip(sent, steps, strict=True):
        assert same(tensors, arrays)


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_fetched_is_what_it_was_when_it_was_asked_for(device: torch.device) -> None:
    numbers = torch.arange(5.0, device=device)
    download = Download([numbers * 2, numbers.int()])
    doubled, same_numbers = download.wait()
    assert doubled.tolist() == [0, 2, 4, 6, 8]
    assert same_numbers.tolist() == [0, 1, 2, 3, 4]
