"""Triton where its wheel exists; elsewhere the modules import and the torch forms serve."""

from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:

    class _NoTriton:
        """Lets a kernel be defined on a platform that can never launch it."""

        constexpr = None

        @staticmethod
        def jit(function: Any) -> Any:
            return function

    triton = tl = _NoTriton()

__all__ = ["tl", "triton"]
