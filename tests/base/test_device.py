"""Which device is taken, and what is said of one that cannot be."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

from deltamux.base import device
from deltamux.base.device import find_device
from deltamux.errors import StartupError
from deltamux_kernels import start_launcher

# Makes torch see that many GPUs of a capability; returns the numbers of those made current.
See = Callable[..., list[int]]


@pytest.fixture
def see(monkeypatch: pytest.MonkeyPatch) -> See:
    def see(
        count: int, capability: tuple[int, int] = (9, 0), error: str = "", kernels: bool = True
    ) -> list[int]:
        current: list[int] = []

        def set_current(index: int) -> None:
            if error:
                raise RuntimeError(error)
            current.append(index)

        def ones(size: int, device: torch.device) -> None:
            if not kernels:
                raise RuntimeError("CUDA error: no kernel image is available\nand more")

        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
        monkeypatch.setattr(device, "start_launcher", lambda: None)
        monkeypatch.setattr(torch, "ones", ones)
        # torch's own set_device comes before it, which does not take each device.
        monkeypatch.setattr(torch._C, "_cuda_setDevice", set_current, raising=False)
        return current

    return see


def refusal(name: str) -> str:
    with pytest.raises(StartupError) as error:
        find_device(name)
    assert "\n" not in error.value.message
    return error.value.message


@pytest.mark.parametrize(
    ("name", "index"), [("auto", 0), ("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)]
)
def test_a_gpu_becomes_the_current_one(see: See, name: str, index: int) -> None:
    current = see(2)
    assert find_device(name) == torch.device("cuda", index)
    assert current == [index]


def test_without_a_gpu_auto_is_the_cpu_and_the_log_says_why(
    see: See, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a command prints is its answer alone."""
    see(0)
    with caplog.at_level("INFO"):
        assert find_device("auto") == find_device("cpu") == torch.device("cpu")
    (message,) = caplog.messages
    assert re.fullmatch("computing on the CPU: .+", message)
    assert not capsys.readouterr().out


def test_torch_says_why_there_is_no_gpu(see: See, monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old\nand more")

    see(0)
    monkeypatch.setattr(torch.cuda, "init", init)
    assert refusal("cuda") == (
        "no CUDA device is available (The NVIDIA driver on your system is too old): "
        "use --device cpu"
    )


@pytest.mark.parametrize(
    ("name", "words"), [("gpu", "unknown device 'gpu'"), ("meta", "'meta' is not supported")]
)
def test_names_of_no_device(name: str, words: str) -> None:
    assert words in refusal(name)


def test_a_gpu_that_is_not_there(see: See) -> None:
    assert not see(2)
    assert refusal("cuda:2") == "there is no cuda:2: torch finds 2 CUDA devices, from 0 on"


def test_a_gpu_that_is_too_old(see: See) -> None:
    """Newer builds of torch have no kernels for the oldest."""
    see(1, capability=(7, 5), kernels=False)
    assert refusal("auto") == (
        "cuda:0, Some GPU, has compute capability 7.5; 8.0 or later is needed: use --device cpu"
    )


def test_a_driver_that_fails_at_the_first_question(
    see: See, monkeypatch: pytest.MonkeyPatch
) -> None:
    def capability(_: torch.device) -> None:
        raise RuntimeError("CUDA unknown error\nand more")

    see(1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    assert refusal("cuda") == "cuda:0 cannot be used: CUDA unknown error"


def test_a_gpu_that_others_have_for_themselves(see: See) -> None:
    see(1, error="CUDA error: CUDA-capable device(s) is/are busy or unavailable\nand more")
    assert refusal("cuda").startswith("cuda:0 cannot be used: CUDA error: CUDA-capable device(s)")


def test_a_gpu_for_which_torch_has_no_kernels(see: See) -> None:
    see(1, kernels=False)
    assert refusal("cuda") == "cuda:0 cannot be used: CUDA error: no kernel image is available"


def test_a_gpu_without_memory_is_told_as_such(see: See) -> None:
    """The engine says what for."""
    see(1, error="CUDA error: out of memory\nand more")
    with pytest.raises(RuntimeError, match="out of memory"):
        find_device("cuda")


def test_a_gpu_for_which_triton_cannot_compile(see: See, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here it finds no driver; elsewhere no compiler, no headers, or no place to write."""
    see(1)
    monkeypatch.setattr(device, "start_launcher", start_launcher)
    assert re.fullmatch(
        r"Triton cannot launch kernels on cuda:0 \(.+\): it needs a C compiler, Python's headers "
        "and a TRITON_CACHE_DIR to write to",
        refusal("cuda"),
    )
