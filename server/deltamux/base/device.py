"""The device that a base is to run on, and whether it can."""

from __future__ import annotations

import logging

import torch

from deltamux.base.out_of_memory import is_out_of_memory
from deltamux.errors import StartupError, first_line
from deltamux_kernels import start_launcher

_log = logging.getLogger(__name__)


def find_device(name: str) -> torch.device:
    """The device of that name; "auto" is the first GPU, or the CPU where torch finds none.

    A GPU becomes the current one of this thread: there Triton launches kernels and events are
    recorded, wherever their tensors lie. Raises StartupError for a device that cannot be used.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            _log.info("computing on the CPU: %s", _why_there_is_none())
            return torch.device("cpu")
        name = "cuda"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise StartupError(f"unknown device {name!r}: cpu, cuda and cuda:N are possible") from None
    if device.type not in ("cpu", "cuda"):
        raise StartupError(f"device {name!r} is not supported: cpu, cuda and cuda:N are possible")
    return device if device.type == "cpu" else _gpu(device.index or 0)


def _gpu(index: int) -> torch.device:
    if not torch.cuda.is_available():
        raise StartupError(
            f"no CUDA device is available ({_why_there_is_none()}): use --device cpu"
        )
    if index >= (count := torch.cuda.device_count()):
        raise StartupError(f"there is no cuda:{index}: torch finds {count} CUDA devices, from 0 on")
    device = torch.device("cuda", index)
    try:
        major, minor = torch.cuda.get_device_capability(device)
        # Before an A100, no matrix instruction takes bfloat16.
        if major < 8:
            raise StartupError(
                f"{device}, {torch.cuda.get_device_name(device)}, has compute capability "
                f"{major}.{minor}; 8.0 or later is needed: use --device cpu"
            )
        torch.cuda.set_device(device)
        # Some builds of torch have no kernel for the newest GPUs.
        torch.ones(1, device=device)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise StartupError(f"{device} cannot be used: {first_line(error)}") from error
    try:
        start_launcher()
    except Exception as error:
        raise StartupError(
            f"Triton cannot launch kernels on {device} ({first_line(error)}): it needs a C "
            "compiler, Python's headers and a TRITON_CACHE_DIR to write to"
        ) from error
    return device


def _why_there_is_none() -> str:
    """In torch's words: no driver, one too old, no device that this process may see, no CUDA."""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except Exception as error:
        return first_line(error)
    return "torch finds none"
