"""Memory that a captured graph reads, rewritten by the host between its replays."""

from __future__ import annotations

import torch
from torch import Tensor


class Staged:
    """`tensor` is the device's; the host has its own, pinned where the device is a GPU."""

    def __init__(self, initial: Tensor, device: torch.device) -> None:
        self._host = initial
        self._copied: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._host = initial.pin_memory()
            self._copied = torch.cuda.Event()
        self.tensor = self._host.to(device, copy=True)

    def host(self) -> Tensor:
        """The same memory every time, to be written to: what was sent of it has left it."""
        if self._copied is not None:
            self._copied.synchronize()  # a step ago, as a rule
        return self._host

    def send(self, count: int | None = None) -> None:
        """Queues one copy of all rows, or of the first `count`; nobody waits for it."""
        self.tensor[:count].copy_(self._host[:count], non_blocking=True)
        if self._copied is not None:
            self._copied.record()
