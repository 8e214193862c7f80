"""Operations in C for float32 on a CPU."""

from deltamux_kernels.native.ahead import fetching_ahead
from deltamux_kernels.native.library import available
from deltamux_kernels.native.recording import Call, recording
from deltamux_kernels.native.runs import joined

__all__ = ["Call", "available", "fetching_ahead", "joined", "recording"]
