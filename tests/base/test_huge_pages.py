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


def huge_bytes() -> int:
    """What of this process lies in huge pages."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("AnonHugePages"))


def can_collapse() -> bool:
    if sys.platform != "linux" or not Path("/sys/kernel/mm/transparent_hugepage").exists():
        return False
    return tuple(map(int, platform.release().split(".")[:2])) >= (6, 1)


pytestmark = pytest.mark.skipif(not can_collapse(), reason="needs Linux 6.1 with huge pages")


def test_memory_in_huge_pages_holds_what_it_held() -> None:
    before = huge_bytes()
    x = torch.arange(SIZE // 8)
    collapse(x.data_ptr() + 64, SIZE - 128)
    assert huge_bytes() - before > SIZE / 2
    assert torch.equal(x, torch.arange(SIZE // 8))


def test_zeros_lie_in_huge_pages() -> None:
    before = huge_bytes()
    x = zeros(SIZE // 4, torch.float32, torch.device("cpu"))
    assert huge_bytes() - before > SIZE / 2
    assert not x.any()


def test_packed_weights_lie_in_huge_pages() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4096, SIZE // 4 // 4096)).requires_grad_(False)
    before = huge_bytes()
    pack_linears(model)
    assert huge_bytes() - before > SIZE / 2
