"""Every Triton kernel compiles for each GPU generation, without spilling registers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = {
    "shrink_kernel",
    "expand_kernel",
    "embedding_shrink_kernel",
    "row_affine_kernel",
    "sparse_delta_kernel",
    "sign_delta_kernel",
    "grouped_dense_kernel",
    "write_kv_kernel",
    "paged_attention_kernel",
}
# Bytes that a block may have on every one of these GPUs and on their smaller siblings (sm_89).
SHARED_LIMIT = 99 * 1024


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [(80, "bfloat16"), (90, "bfloat16"), (90, "float16"), (100, "bfloat16")],
)
def test_kernels_compile_without_spills(
    capability: int, dtype: str, pytestconfig: pytest.Config
) -> None:
    """In a process of its own, since Triton compiles nothing where its interpreter is on."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("TRITON_INTERPRET", None)
    cache = pytestconfig.cache.mkdir("ahead_of_time")
    script = Path(__file__).with_name("compile_kernels.py")
    run = subprocess.run(
        [sys.executable, str(script), str(capability), dtype],
        env=environment | {"TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    reports = [json.loads(line) for line in run.stdout.splitlines()]
    assert {report["kernel"] for report in reports} == KERNELS
    assert not [report for report in reports if report["spills"]]
    assert all(report["shared"] <= SHARED_LIMIT for report in reports)
