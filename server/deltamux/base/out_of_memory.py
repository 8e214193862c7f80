"""Which errors say that there was no memory, and what that means before the first request."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from deltamux.errors import StartupError, first_line

# Of RuntimeErrors without a type of their own: torch's allocator of host memory, oneDNN's of its
# code, CUDA's of pinned memory, its libraries and Triton's launches, C++. Handles of the libraries,
# one a thread, take memory beside torch's, and where it is short say all kinds of things.
_WORDS = (
    "`cublasCreate(handle)`",
    "`cusolverDnCreate(handle)`",
    "can't allocate memory",
    "could not create a primitive",
    "CUDA error: out of memory",
    "_STATUS_ALLOC_FAILED",
    "[CUDA]: out of memory",
    "std::bad_alloc",
)


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


@contextmanager
def memory_for(what: str) -> Iterator[None]:
    """Raises StartupError, with `what` there is no memory for, instead of what the block met."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise StartupError(f"there is not enough memory for {what}: {first_line(error)}") from error
