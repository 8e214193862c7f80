"""Triton where its wheel exists; elsewhere the modules import and the torch forms serve."""

from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:

    class _NoTriton:
        """Lets a kernel be defined on a platform that can never launch it."""

        constexpr = None

        @staticmethod
        def jit(function: Any = None, **options: Any) -> Any:
            return function or (lambda function: function)

    triton = tl = _NoTriton()


def start_launcher() -> None:
    """Lets Triton compile what launches kernels, which it else does at the first launch; raises
    whatever is in its way."""
    triton.runtime.driver.active.get_current_target()


def overlap(x: torch.Tensor) -> dict[str, bool]:
    """Launch options of a kernel that starts while the one before it ends.

    From sm_90 on. The kernel says when the next may start, and waits before it reads what the one
    before has written.
    """
    overlaps = capability(x.device) >= (9, 0)
    return {"OVERLAP": True, "launch_pdl": True} if overlaps else {"OVERLAP": False}


def capability(device: torch.device) -> tuple[int, int]:
    """Of an NVIDIA GPU, else (0, 0): AMD's count their capabilities too."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0, 0
    return torch.cuda.get_device_capability(device)


__all__ = ["capability", "overlap", "start_launcher", "tl", "triton"]
