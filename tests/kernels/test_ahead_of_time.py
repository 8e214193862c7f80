"""Every Triton kernel compiles for each GPU generation, within its registers and memory."""

import json
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pytest

# The first test waits for all the compilations, which on a busy machine take minutes.
pytestmark = pytest.mark.timeout(1800)

TARGETS = (
    "sm_80:bfloat16",
    "sm_86:bfloat16",
    "sm_89:bfloat16",
    "sm_90:bfloat16",
    "sm_90:float16",
    "sm_100:bfloat16",
    "sm_120:bfloat16",
    "gfx942:bfloat16",
)


class Limit(NamedTuple):
    """The most that any shape of a kernel takes on any target."""

    registers: int
    shared: int  # bytes a block


# Each Triton assigns registers in its own way, and these are of one. Every Triton must compile all.
by_the_compiler_of_the_limits = pytest.mark.skipif(
    not version("triton").startswith("3.9."), reason="the limits are those of Triton 3.9"
)

LIMITS = {
    "shrink_kernel": Limit(80, 16_384),
    "expand_kernel": Limit(72, 5_120),
    "activate_kernel": Limit(40, 0),
    "expand_slices_kernel": Limit(72, 5_120),
    "embedding_shrink_kernel": Limit(24, 0),
    "embedding_rows_kernel": Limit(24, 0),
    "pair_keys_kernel": Limit(48, 512),
    "pair_tiles_kernel": Limit(40, 1_024),
    "row_affine_kernel": Limit(40, 512),
    "row_bias_kernel": Limit(40, 512),
    "sparse_delta_kernel": Limit(96, 8),
    "sign_delta_kernel": Limit(96, 45_056),
    "grouped_dense_kernel": Limit(56, 20_480),
    "token_rows_kernel": Limit(32, 0),
    "token_columns_kernel": Limit(72, 20_480),
    "block_rotate_kernel": Limit(104, 4_096),
    "pair_rotate_kernel": Limit(56, 0),
    "write_kv_kernel": Limit(16, 0),
    "paged_attention_kernel": Limit(280, 82_720),
    "row_norm_kernel": Limit(64, 1_024),
    "rms_norm_kernel": Limit(64, 1_024),
    "gated_silu_kernel": Limit(32, 0),
    "rotary_kernel": Limit(40, 512),
    "gated_silu_of_sum_kernel": Limit(96, 9_216),
    "residual_of_sum_kernel": Limit(64, 5_120),
    "rotary_of_sum_kernel": Limit(72, 5_120),
    "skinny_kernel": Limit(136, 81_936),
}
# Bytes, the only ones: attention of 128 dimensions over prompts, and of 256 decoding.
SPILLS = {
    ("paged_attention_kernel", "gfx942:bfloat16"): 192,
    ("paged_attention_kernel", "sm_86:bfloat16"): 8,
    ("paged_attention_kernel", "sm_89:bfloat16"): 8,
}
# Bytes that a block may have on gfx942, and on every NVIDIA GPU from sm_80 on.
SHARED_ON_AMD, SHARED_ON_NVIDIA = 64 * 1024, 99 * 1024

Report = dict[str, Any]


@pytest.fixture(scope="module")
def reports(pytestconfig: pytest.Config, run_in_parts: Callable[..., list[str]]) -> list[Report]:
    """In processes of their own, since Triton compiles nothing where its interpreter is on."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("TRITON_INTERPRET", None)
    environment["TRITON_CACHE_DIR"] = str(pytestconfig.cache.mkdir("ahead_of_time"))
    script = Path(__file__).with_name("compile_kernels.py")
    printed = run_in_parts([sys.executable, str(script)], TARGETS, 2, environment)
    return [json.loads(line) for line in "".join(printed).splitlines()]


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles(target: str, reports: list[Report]) -> None:
    assert {report["kernel"] for report in reports if report["target"] == target} == set(LIMITS)


@by_the_compiler_of_the_limits
@pytest.mark.parametrize("kernel", LIMITS)
def test_a_kernel_keeps_to_its_registers_and_shared_memory(
    kernel: str, reports: list[Report]
) -> None:
    limit, own = LIMITS[kernel], [report for report in reports if report["kernel"] == kernel]
    assert [report for report in own if report["registers"] > limit.registers] == []
    assert [report for report in own if report["shared"] > limit.shared] == []


@by_the_compiler_of_the_limits
def test_nothing_spills_beyond_what_is_known(reports: list[Report]) -> None:
    spilling = [r for r in reports if r["spills"] > SPILLS.get((r["kernel"], r["target"]), 0)]
    assert spilling == []


def test_a_step_of_another_size_needs_no_other_kernel(reports: list[Report]) -> None:
    """Everybody waits while one is compiled."""
    assert [report for report in reports if report["other_size"]] == []


def test_a_block_fits_the_shared_memory_of_each_gpu(reports: list[Report]) -> None:
    amd = [report["shared"] for report in reports if report["target"].startswith("gfx")]
    assert max(amd) <= SHARED_ON_AMD
    assert max(report["shared"] for report in reports) <= SHARED_ON_NVIDIA
