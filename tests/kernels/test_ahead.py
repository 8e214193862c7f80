"""Products fetch what is read right after them, each thread its part, and have the same bits."""

from __future__ import annotations

import ctypes
import os
import random
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deltamux_kernels import PackedMatrices, Segments, native
from deltamux_kernels.native import build
from deltamux_kernels.native.library import INTEGER, POINTER
from deltamux_kernels.native.panels import Panels
from deltamux_kernels.shrink import shrink

pytestmark = pytest.mark.skipif(not native.available(), reason="there is no C compiler")

SLOTS, ROWS, DEPTH = 20, 17, 520
# One thread's pieces: where each begins, and how many bytes it takes from there.
PIECES = """
#include "ahead.h"
int64_t pieces(const Matrices *all, int64_t count, int64_t thread, int64_t threads, int64_t steps,
               int64_t *found)
{
    Share share = {.thread = thread, .threads = threads, .next = all, .pending = count};
    for (int64_t n = 0;; n++) {
        Lines lines = next_lines(&share, steps);
        if (lines.first == (const char *)&share)
            return n;
        const Matrices *of = share.of;
        Numbers all = matrix(of->arena, of->offsets[of->spans[share.span].slot]);
        found[3 * n] = (int64_t)lines.first;
        found[3 * n + 1] = (int64_t)all.first + share.begin - (int64_t)lines.first;
        found[3 * n + 2] = lines.step;
    }
}
"""


def matrices(rng: random.Random, width: int) -> tuple[PackedMatrices, dict[int, range]]:
    """Some of float32 and some of bfloat16, and where each lies."""
    arena = torch.randn(1 << 18)
    packed = PackedMatrices(arena, SLOTS, width, halves=True)
    offset, places = 0, {}
    for slot in rng.sample(range(SLOTS), 14):
        rows = rng.choice([1, 3, 8, 40])
        matrix = torch.randn(rows, width)
        matrix = matrix.bfloat16() if rng.random() < 0.5 else matrix
        packed.write(slot, offset, matrix)
        begin = arena.data_ptr() + 4 * offset
        places[slot] = range(begin, begin + matrix.nbytes)
        offset += -(-packed.elements([matrix]) // 64) * 64
    return packed, places


def some_rows(rng: random.Random) -> Segments:
    """Of adapters, some of which have no matrix, and of none."""
    spans, end = [], 0
    for slot in rng.sample(range(SLOTS), rng.randrange(1, 8)):
        start = end + rng.randrange(2)
        end = start + rng.randrange(1, 3)
        spans.append((slot, start, end))
    return Segments.build(spans, torch.device("cpu"))


def product_of(panels: Panels, x: torch.Tensor) -> Any:
    (call,) = calls_of(lambda: panels.product(x))
    return call


def shrink_of(packed: PackedMatrices, segments: Segments) -> Any:
    (call,) = calls_of(lambda: shrink(torch.randn(ROWS, packed.width), packed, segments))
    return call


def calls_of(work: Callable[[], object]) -> list[Any]:
    calls: list[Any] = []
    with native.recording(calls):
        work()
    return calls


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("ahead")
    (folder / "pieces.c").write_text(PIECES)
    include = f"-I{Path(build.__file__).parent}"
    compiler = shlex.split(os.environ.get("CC") or "cc")
    flags = ["-march=native", "-shared", "-fPIC", include]
    subprocess.run([*compiler, *flags, "pieces.c", "-o", "pieces.so"], cwd=folder, check=True)
    function = ctypes.CDLL(str(folder / "pieces.so")).pieces
    function.argtypes, function.restype = (POINTER, *[INTEGER] * 4, POINTER), INTEGER
    return function


@pytest.mark.parametrize("seed", range(20))
def test_threads_fetch_each_byte_once(pieces: Any, seed: int) -> None:
    rng = random.Random(seed)
    packed = [matrices(rng, width) for width in (72, 200)]
    segments = some_rows(rng)
    product = product_of(Panels(torch.randn(64, DEPTH)), torch.randn(ROWS, DEPTH))
    reads = [shrink_of(one, segments) for one, _ in packed]
    fetching, *others = native.fetching_ahead([product, *reads, product, *reads])
    assert others[:2] == reads
    threads, steps = rng.choice([1, 2, 3]), rng.choice([1, 100, 512])
    fetched: list[int] = []
    for thread in range(threads):
        found = (ctypes.c_int64 * 60000)()
        count = pieces(*fetching.arguments[-2:], thread, threads, steps, found)
        for piece in range(count):
            begin, size, step = found[3 * piece : 3 * piece + 3]
            assert 0 < size <= 64 * steps
            assert size - steps < steps * step <= size
            fetched += range(begin, begin + size)
    expected = [
        byte for _, places in packed for slot in segments.slots for byte in places.get(slot, ())
    ]
    assert sorted(fetched) == sorted(expected)


@pytest.mark.parametrize("rows", [1, 6, 7, 12, 13, 49])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_bit_of_a_product_is_another(rows: int, dtype: torch.dtype) -> None:
    rng = random.Random(rows)
    panels = Panels(torch.randn(200, 1030).to(dtype).float())
    x = torch.randn(rows, 1030)
    y: list[torch.Tensor] = []
    (product,) = calls_of(lambda: y.append(panels.product(x)))
    before = y[0].clone()
    packed, segments = [matrices(rng, 200)[0] for _ in range(2)], some_rows(rng)
    fetching, *_ = native.fetching_ahead([product, *(shrink_of(one, segments) for one in packed)])
    y[0].fill_(torch.nan)
    fetching()
    assert torch.equal(y[0], before)


def test_a_product_before_anything_else_fetches_nothing() -> None:
    product = product_of(Panels(torch.randn(64, DEPTH)), torch.randn(ROWS, DEPTH))
    assert [call.arguments[-1] for call in native.fetching_ahead([product, product])] == [0, 0]
