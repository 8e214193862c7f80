"""Triton's interpreter, packed matrices with poisoned surroundings, and the forms of an op."""

import os
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    # Read when a kernel is defined: it acts here only if no other test imported the kernels first.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from deltamux_kernels import ALIGNMENT, PackedMatrices, native  # noqa: E402
from deltamux_kernels.shrink import _shrink_kernel  # noqa: E402

JITFunction: Any = type(_shrink_kernel)
TRITON_RUNS = GPU or type(_shrink_kernel).__name__ == "InterpretedFunction"

ROOT = Path(__file__).parents[2]
PROCESSORS = len(os.sched_getaffinity(0))

Matrices = Sequence[torch.Tensor | None]
Pack = Callable[[Matrices, int], PackedMatrices]
PackInOne = Callable[..., list[PackedMatrices]]


@pytest.fixture
def triton_runs() -> bool:
    """Whether this process can run the Triton forms, on a GPU or in the interpreter."""
    return TRITON_RUNS


@pytest.fixture(scope="session")
def run_in_parts() -> Callable[..., list[str]]:
    """run(command, arguments, parts, environment) -> what each part has printed.

    Deals the arguments out to so many processes of one thread, one at a time for each processor.
    """

    def run(
        command: Sequence[str], arguments: Sequence[str], parts: int, environment: dict[str, str]
    ) -> list[str]:
        def run_one(part: int) -> str:
            ran = subprocess.run(
                [*command, *arguments[part::parts]],
                env=environment | {"OMP_NUM_THREADS": "1"},
                cwd=ROOT,
                capture_output=True,
                text=True,
            )
            assert ran.returncode == 0, ran.stdout + ran.stderr
            return ran.stdout

        with ThreadPoolExecutor(PROCESSORS) as pool:
            return list(pool.map(run_one, range(min(parts, len(arguments)))))

    return run


@pytest.fixture(params=["torch", "triton"])
def form(request: pytest.FixtureRequest) -> str:
    """Which implementation of the op a test runs; "native" where a test asks for it."""
    if request.param == "triton" and not TRITON_RUNS:
        pytest.skip("run in a process of its own by test_interpreter.py")
    if request.param == "native" and not native.available():
        pytest.skip("there is no C compiler")
    return request.param


@pytest.fixture
def device(form: str) -> torch.device:
    return torch.device("cuda" if GPU and form == "triton" else "cpu")


@pytest.fixture(params=["float32", "float16", "bfloat16"])
def dtype(request: pytest.FixtureRequest, form: str) -> torch.dtype:
    if request.param == "bfloat16" and form == "triton" and not GPU:
        pytest.skip("the interpreter's bfloat16 arithmetic is wrong")
    if request.param != "float32" and form == "native":
        pytest.skip("the C form is of float32")
    return getattr(torch, request.param)


@pytest.fixture
def pack(pack_in_one: PackInOne) -> Pack:
    """Packs the matrices of one store, in an arena of its own."""
    return lambda matrices, width: pack_in_one((matrices, width))[0]


@pytest.fixture
def pack_in_one(device: torch.device, dtype: torch.dtype) -> PackInOne:
    """Packs stores `(matrices, width)` in one arena that is NaN wherever no matrix lies."""

    def packed(*stores: tuple[Matrices, int]) -> list[PackedMatrices]:
        elements = sum(
            2 * ALIGNMENT + (0 if matrix is None else matrix.numel())
            for matrices, width in stores
            for matrix in matrices
        )
        arena = torch.full((elements + ALIGNMENT,), torch.nan, dtype=dtype, device=device)
        results, end = [], 1
        for matrices, width in stores:
            store = PackedMatrices(arena, len(matrices), width)
            for slot, matrix in enumerate(matrices):
                if matrix is not None:
                    offset = -(-end // ALIGNMENT) * ALIGNMENT
                    store.write(slot, offset, matrix)
                    end = offset + matrix.numel() + 1
            results.append(store)
        return results

    return packed


@pytest.fixture
def as_columns() -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """as_columns(y) -> a copy that is columns of a wider tensor, as a base's layers hand them out;
    its neighbours must keep their bits."""
    wholes: list[tuple[torch.Tensor, int]] = []

    def copied(y: torch.Tensor) -> torch.Tensor:
        rows, width = y.shape
        whole = y.new_full((rows, width + 2 * ALIGNMENT), 7.0)
        wholes.append((whole, width))
        columns = whole[:, ALIGNMENT : ALIGNMENT + width]
        return columns.copy_(y)

    yield copied
    for whole, width in wholes:
        assert (whole[:, :ALIGNMENT] == 7).all() and (whole[:, ALIGNMENT + width :] == 7).all()


@dataclass
class Launch:
    """One launch of a kernel, which can be repeated with the same arguments.

    `read` and `written` are bytes by the name of the kernel's parameter that they belong to, a
    masked element being neither.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    read: Counter[str] = field(default_factory=Counter)
    written: Counter[str] = field(default_factory=Counter)

    @property
    def name(self) -> str:
        return str(self.kernel.__name__).strip("_")

    def replay(self) -> None:
        self.kernel.run(*self.arguments, grid=self.grid, warmup=False, **self.options)

    def owner(self, address: int) -> str:
        """The parameter whose tensor an address lies in."""
        flat = [
            (name, tensor)
            for name, argument in zip(self.kernel.arg_names, self.arguments, strict=False)
            for tensor in _tensors(argument)
        ]
        for name, tensor in flat:
            storage = tensor.untyped_storage()
            if storage.data_ptr() <= address < storage.data_ptr() + storage.nbytes():
                return name
        return "nobody"


def _tensors(argument: Any) -> list[torch.Tensor]:
    if isinstance(argument, tuple):
        return [tensor for part in argument for tensor in _tensors(part)]
    return [argument] if isinstance(argument, torch.Tensor) else []


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """`with traced() as launches:` all launches inside; in the interpreter with their traffic."""

    @contextmanager
    def trace() -> Iterator[list[Launch]]:
        launches: list[Launch] = []
        run = JITFunction.run

        def recorded(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            launches.append(Launch(self, grid, args, options))
            return run(self, *args, grid=grid, warmup=warmup, **options)

        with monkeypatch.context() as patch:
            patch.setattr(JITFunction, "run", recorded)
            if not GPU:
                _count_traffic(patch, launches)
            yield launches

    return trace


def _count_traffic(patch: pytest.MonkeyPatch, launches: list[Launch]) -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def count(pointers: Any, mask: Any, counters: str) -> None:
        live = pointers.data[mask.data]
        if live.size:
            launch = launches[-1]
            item = pointers.get_element_ty().primitive_bitwidth // 8
            getattr(launch, counters)[launch.owner(int(live.flat[0]))] += live.size * item

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        count(pointers, mask, "read")
        return load(self, pointers, mask, *rest)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        count(pointers, mask, "written")
        return store(self, pointers, value, mask, *rest)

    patch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
    patch.setattr(InterpreterBuilder, "create_masked_store", counted_store)
