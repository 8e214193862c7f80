"""Small tables of the host, copied to the device without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def device_table(
    rows: Sequence[tuple[int, ...]], columns: int, device: torch.device
) -> torch.Tensor:
    """int32 [len(rows), columns] on the device; pinned on the way, so the copy does not block."""
    table = torch.tensor(rows, dtype=torch.int32).reshape(-1, columns)
    if device.type == "cuda":
        table = table.pin_memory()
    return table.to(device, non_blocking=True)
