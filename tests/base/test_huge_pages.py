"""Memory is moved into huge pages and stays what it was."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import pytest
import torch

from deltamux.base.huge_pages import collapse, zeros
from deltamux.base.packed_linear import pack_linears

SIZE = 64 << 20


def huge_bytes(address: int, size: int) -> int:
    """What lies in huge pages of the mappings in which this memory is.

    Not of the process: garbage of other tests may be let go at any time.
    """
    found, within = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            start, end = (int(place, 16) for place in first.split("-"))
            within = start < address + size and address < end
        elif within and first == "AnonHugePages:":
            found += 1024 * int(rest[0])
    return found


def can_collapse() -> bool:
    enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if sys.platform != "linux" or not enabled.exists() or "[never]" in enabled.read_text():
        return False
    return tuple(map(int, platform.release().split(".")[:2])) >= (6, 1)


pytestmark = pytest.mark.skipif(not can_collapse(), reason="needs Linux 6.1 with huge pages")


def test_memory_in_huge_pages_holds_what_it_held() -> None:
    x = torch.arange(SIZE // 8)
    before = huge_bytes(x.data_ptr(), SIZE)
    collapse(x.data_ptr() + 64, SIZE - 128)
    assert huge_bytes(x.data_ptr(), SIZE) - before > SIZE / 2
    assert torch.equal(x, torch.arange(SIZE // 8))


def test_zeros_lie_in_huge_pages() -> None:
    x = zeros(SIZE // 4, torch.float32, torch.device("cpu"))
    assert huge_bytes(x.data_ptr(), SIZE) > SIZE / 2
    assert not x.any()


def test_packed_weights_lie_in_huge_pages() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4096, SIZE // 4 // 4096)).requires_grad_(False)
    pack_linears(model)
    assert huge_bytes(*model[0].memory) > SIZE / 2
