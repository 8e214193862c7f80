"""Which GPUs start a kernel while the one before it ends."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from deltamux_kernels._triton import overlap


@pytest.mark.parametrize(
    ("capability", "hip", "overlaps"),
    [((8, 9), None, False), ((9, 0), None, True), ((10, 0), None, True), ((9, 4), "6.4", False)],
)
def test_kernels_overlap_on_nvidias_from_sm_90_on(
    capability: tuple[int, int], hip: str | None, overlaps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    tensor = SimpleNamespace(device=torch.device("cuda"))
    assert overlap(tensor)["OVERLAP"] == overlaps
