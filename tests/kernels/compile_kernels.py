"""Compiles every Triton kernel for GPUs that need not exist, as its launcher launches it.

    python tests/kernels/compile_kernels.py sm_90:bfloat16 gfx942:bfloat16

prints one JSON line per kernel and target: registers, spills and shared memory, in bytes, and
whether it takes a step of another size to need it. The launchers run on the CPU with real tensors;
only the launch itself becomes a compilation, so what is compiled is what the launcher asks for.
"""

import contextlib
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from gpu.arms import Fused
from gpu.consumers import consumer
from gpu.shapes import LLAMA, Step
from gpu.skinny import Scratch, Shape, skinny_linear
from gpu.weights import exact
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from deltamux_kernels import (
    AttentionBatch,
    Columns,
    PackedMatrices,
    PairFactors,
    Segments,
    SignMatrices,
    SparseMatrices,
    TokenTable,
)
from deltamux_kernels.activate import Activations, activate_triton
from deltamux_kernels.block_rotate import block_rotate_triton
from deltamux_kernels.embedding_rows import embedding_rows_triton
from deltamux_kernels.embedding_shrink import embedding_shrink_triton
from deltamux_kernels.expand import expand_triton
from deltamux_kernels.expand_slices import Slice, expand_slices_triton
from deltamux_kernels.expert_pairs import expert_pairs_triton
from deltamux_kernels.gated_silu import gated_silu_triton
from deltamux_kernels.grouped_dense import dense_delta_triton, grouped_dense_triton
from deltamux_kernels.paged_attention_triton import paged_attention_triton
from deltamux_kernels.pair_rotate import pair_rotate_triton
from deltamux_kernels.rms_norm import rms_norm_triton
from deltamux_kernels.rotary import rotary_triton
from deltamux_kernels.row_affine import row_affine_triton
from deltamux_kernels.row_bias import row_bias_triton
from deltamux_kernels.row_norm import NormForm, row_norm_triton
from deltamux_kernels.scoring import Scoring
from deltamux_kernels.shrink import shrink_triton
from deltamux_kernels.sign_delta import sign_delta_triton
from deltamux_kernels.sparse_delta import sparse_delta_triton
from deltamux_kernels.token_rows import token_columns_triton, token_rows_triton
from deltamux_kernels.write_kv import write_kv_triton

CPU = torch.device("cpu")
WIDTH = 2048


class AbsentGPU:
    """The part of a Triton driver that a compilation asks."""

    def __init__(self, number: int, architecture: str) -> None:
        """`architecture`: sm_90, gfx942, ...; one number each, as Triton remembers by device."""
        self.number = number
        if architecture.startswith("sm_"):
            self.target = GPUTarget("cuda", int(architecture[3:]), 32)
        else:
            self.target = GPUTarget("hip", architecture, 64)

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


@contextlib.contextmanager
def launches_compile(found: Callable[[str, str, Any], None]) -> Iterator[None]:
    """Every launch compiles instead, and hands over name, ptxas's log and the kernel."""
    run = JITFunction.run

    def compiled(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        with contextlib.redirect_stdout(io.StringIO()) as log:
            kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        found(self.fn.__name__.strip("_"), log.getvalue(), kernel)

    JITFunction.run = compiled
    try:
        yield
    finally:
        JITFunction.run = run


def usage(log: str, kernel: Any) -> dict[str, int]:
    """Registers, spills and shared memory; kept beside Triton's cache, which keeps no log."""
    kept = Path(triton.knobs.cache.dir, f"usage_{kernel.hash}.json")
    if not kept.exists():
        assembly = kernel.asm.get("amdgcn")
        registers, spills = _of_assembly(assembly) if assembly else _of_log(log)
        report = {"registers": registers, "spills": spills, "shared": kernel.metadata.shared}
        kept.write_text(json.dumps(report))
    found: dict[str, int] = json.loads(kept.read_text())
    return found


def _of_log(log: str) -> tuple[int, int]:
    registers = re.search(r"Used (\d+) registers", log)
    assert registers, f"no report from ptxas: {log}"
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    return int(registers[1]), sum(map(int, spills))


def _of_assembly(assembly: str) -> tuple[int, int]:
    """Vector registers, and the bytes of scratch memory that spilled ones take."""
    counts = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", assembly))
    return int(counts["vgpr_count"]), int(counts["private_segment_fixed_size"])


@contextlib.contextmanager
def launched_on(architecture: str) -> Iterator[None]:
    """Launchers choose what they would on that GPU."""
    number = int(architecture[3:]) if architecture.startswith("sm_") else 0
    with contextlib.ExitStack() as stack:
        for name in ("_triton", "paged_attention_triton"):
            module = sys.modules[f"deltamux_kernels.{name}"]
            stack.enter_context(
                mock.patch.object(module, "capability", lambda _: divmod(number, 10))
            )
        yield


def low_rank(dtype: torch.dtype, rows: int) -> None:
    """Each op on packed matrices, in a step of `rows` rows."""
    arena = torch.zeros(64 * WIDTH, dtype=dtype)
    packed = PackedMatrices(arena, slots=2, width=WIDTH)
    packed.write(0, 0, torch.zeros(17, WIDTH))
    scale = PackedMatrices(arena, slots=2, width=WIDTH)
    scale.write(0, 0, torch.zeros(1, WIDTH))
    segments = Segments.build([(0, 0, rows)], CPU)
    x = torch.zeros(rows, WIDTH, dtype=dtype)
    h = shrink_triton(x, packed, segments)
    expand_triton(x, h, packed, Columns(2, CPU), segments)
    activations = Activations(arena, slots=2)
    activations.packed.write(0, 0, torch.zeros(17, 1))
    activate_triton(h, activations, segments)
    slices = [Slice(x, packed, Columns(2, CPU))] * 3
    expand_slices_triton(slices, h, segments)
    embedding_shrink_triton(torch.zeros(rows, dtype=torch.int64), packed, segments)
    embedding_rows_triton(x, torch.zeros(rows, dtype=torch.int64), packed, segments)
    expert_pairs_triton(torch.zeros(rows, 8, dtype=torch.int64), segments, 64, 128)
    row_affine_triton(x, x[0], scale, segments)
    row_affine_triton(x, None, scale, segments)
    row_bias_triton(x, scale, segments)
    sparse = SparseMatrices(arena, 2, WIDTH, WIDTH)
    for part in (sparse.values, sparse.columns, sparse.starts):
        part.write(0, 0, torch.zeros(WIDTH, 1))
    sparse_delta_triton(x, x, sparse, segments)
    signs = SignMatrices(arena, 2, WIDTH, WIDTH)
    for part in (signs.words, signs.scales):
        part.write(0, 0, torch.zeros(WIDTH, 1))
    sign_delta_triton(x, x, signs, segments)
    grouped_dense_triton(x, x, packed, scale, segments)
    dense_delta_triton(x, x, packed, segments)
    tokens = TokenTable(arena, 2, WIDTH)
    tokens.rows.write(0, 0, torch.zeros(17, WIDTH))
    token_rows_triton(x, torch.zeros(rows, dtype=torch.int64), tokens, segments)
    token_columns_triton(x, x, tokens, segments)
    block_rotate_triton(x, x, packed, segments)
    factors = PairFactors(arena, 2, WIDTH)
    factors.factors.write(0, 0, torch.zeros(2, WIDTH))
    pair_rotate_triton(x, factors, segments)


def attention(
    dtype: torch.dtype, dim: int, queries: int, scoring: Scoring, blocks: int = 4
) -> None:
    """Two sequences of `queries` rows with 8 query heads on 2 KV heads."""
    cache = torch.zeros(8, 16, 2, dim, dtype=dtype)
    query = torch.zeros(2 * queries, 8, dim, dtype=dtype)
    batch = AttentionBatch(
        (queries, queries),
        (queries, queries),
        torch.zeros(3, dtype=torch.int32),
        torch.zeros(2, dtype=torch.int32),
        torch.zeros(2, blocks, dtype=torch.int32),
    )
    paged_attention_triton(query, cache, cache, batch, scoring)


def new_keys(dtype: torch.dtype, dim: int, rows: int) -> None:
    """Keys and values of 2 heads into their pages."""
    cache, key = (torch.zeros(*size, 2, dim, dtype=dtype) for size in ((8, 16), (rows,)))
    write_kv_triton(key, key, cache, cache, torch.zeros(rows, dtype=torch.int64))


def layer(dtype: torch.dtype, width: int, dim: int) -> None:
    """What a layer of the model computes between its products, of `width` features."""
    rows = torch.zeros(1, 32, width, dtype=dtype)
    heads = rows.view(1, 32, -1, dim)
    gated_silu_triton(rows, rows)
    for x in (rows, heads):
        rms_norm_triton(x, x.flatten(0, -2)[0], 1e-6)
        rms_norm_triton(x, x.flatten(0, -2)[0], 1e-6, offset=1.0, once=True)
        for fields in ({}, {"offset": 1.0, "once": True}, {"centred": True}):
            row_norms(dtype, x[0], NormForm(1e-6, **fields))
    query, key = heads.transpose(1, 2), heads[:, :, :8].transpose(1, 2)
    rotary_triton(query, key, heads[:, :, 0], heads[:, :, 1])


def fused_consumers(dtype: torch.dtype) -> None:
    """Candidates of bench/gpu.py: expands inside what a Llama block computes next."""
    step = Step("decode", 16, "mixed", (17,))
    for site in LLAMA:
        weights = exact(site, step, dtype, CPU)
        arm, y = Fused([weights], step), torch.zeros(16, sum(site.outputs), dtype=dtype)
        arm.before(0, torch.zeros(16, site.width, dtype=dtype))
        arm.consume(0, y, consumer(site, 16, y))


def skinny(dtype: torch.dtype) -> None:
    """A candidate of bench/gpu_linear.py: the base's product of a few rows."""
    x, weight = torch.zeros(32, 4096, dtype=dtype), torch.zeros(256, 4096, dtype=dtype)
    y, scratch = torch.zeros(32, 256, dtype=dtype), Scratch(x, 256)
    for shape in (Shape(64, 128, 4, 4, 3), Shape(128, 64, 1, 8, 4)):
        skinny_linear(x, weight, y, shape, scratch)


def row_norms(dtype: torch.dtype, x: torch.Tensor, form: NormForm) -> None:
    """One slot's own norm of rows or heads."""
    parameters = PackedMatrices(torch.zeros(2 * x.shape[-1], dtype=dtype), 1, x.shape[-1])
    parameters.write(0, 0, torch.zeros(1 + form.centred, x.shape[-1]))
    row_norm_triton(x, x, parameters, form, Segments.build([(0, 0, len(x))], CPU))


def compile_all(target: str, number: int) -> None:
    """`target`: architecture and dtype, as in sm_90:bfloat16."""
    architecture, name = target.split(":")
    triton.runtime.driver.set_active(AbsentGPU(number, architecture))
    dtype: torch.dtype = getattr(torch, name)
    seen: set[str] = set()
    other_size = False

    def found(name: str, log: str, kernel: Any) -> None:
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            report = {"target": target, "kernel": name, "other_size": other_size}
            report |= usage(log, kernel)
            print(json.dumps(report), flush=True)

    plain = Scoring(0.1, None, None, None)
    everything = Scoring(0.1, 1024, 30.0, torch.zeros(8, dtype=dtype))
    with launches_compile(found), launched_on(architecture):
        for rows in (16, 512):
            low_rank(dtype, rows)
        for dim, scoring in ((64, everything), (128, plain), (256, plain)):
            for queries in (1, 64):
                attention(dtype, dim, queries, scoring)
                new_keys(dtype, dim, 2 * queries)
        if architecture in ("sm_89", "sm_120"):
            # Of all that are served, the least shared memory and the most of it wanted.
            for dim in (128, 256):
                attention(torch.float32, dim, 64, plain)
        for width, dim in ((2048, 64), (4096, 128), (16384, 256)):
            layer(dtype, width, dim)
        fused_consumers(dtype)
        skinny(dtype)
        other_size = True
        for rows in (1, 17, 100):
            low_rank(dtype, rows)
        for blocks in (1, 16):
            attention(dtype, 128, 1, plain, blocks)


if __name__ == "__main__":
    triton.knobs.nvidia.dump_ptxas_log = True
    for number, target in enumerate(sys.argv[1:]):
        compile_all(target, number)
