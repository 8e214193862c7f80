"""Operations in C for float32 on a CPU."""

from deltamux_kernels.native.library import available

__all__ = ["available"]
