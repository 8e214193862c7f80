"""The LoRA operations of vLLM and SGLang, imported from a folder outside this repository.

`--peers FOLDER` holds the unzipped `vllm/lora/ops/triton_ops/`, `sglang/kernels/ops/lora/` and
`sglang/srt/lora/dense/configs/` of their wheels. Every package level above is registered as a bare
module with a path, so that none of their `__init__.py` runs; the few modules that the operations
import are stood in for here. Nothing of those projects lies in this repository. What is measured is
their operations, not their engines.
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
import triton.language as tl


class _Logger(logging.Logger):
    def warning_once(self, *_: object) -> None:
        return

    info_once = warning_once


class _Platform:
    def is_cuda(self) -> bool:
        return torch.cuda.is_available()

    is_cuda_alike = is_cuda

    def has_device_capability(self, capability: int) -> bool:
        major, minor = torch.cuda.get_device_capability() if self.is_cuda() else (0, 0)
        return major * 10 + minor >= capability


class _Unset:
    """SGLang's environment with nothing set."""

    def __getattr__(self, name: str) -> object:
        return types.SimpleNamespace(get=lambda: None if "DIR" in name else False)


def _module(name: str, path: Path | None = None, **content: object) -> None:
    module = types.ModuleType(name)
    module.__path__ = [str(path)] if path else []
    vars(module).update(content)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], child, module)


def _no_registration(*_: object, **__: object) -> None:
    raise AttributeError  # the file falls back to the plain function


@dataclass(frozen=True)
class Peers:
    """The imported modules; None where the folder lacks that project."""

    vllm: types.SimpleNamespace | None
    sglang: types.SimpleNamespace | None


def load(folder: Path | None) -> Peers:
    if folder is None:
        return Peers(None, None)
    vllm = _vllm(folder) if (folder / "vllm").is_dir() else None
    return Peers(vllm, _sglang(folder) if (folder / "sglang").is_dir() else None)


def _vllm(folder: Path) -> types.SimpleNamespace:
    environment = types.SimpleNamespace(
        VLLM_BATCH_INVARIANT=False,
        VLLM_LORA_ENABLE_DUAL_STREAM=False,
        VLLM_TUNED_CONFIG_FOLDER=None,
        VLLM_LORA_DISABLE_PDL=False,
    )
    _module("vllm", folder / "vllm", envs=environment)
    sys.modules["vllm.envs"] = environment  # type: ignore[assignment]
    _module("vllm.logger", init_logger=_Logger)
    _module("vllm.platforms", current_platform=_Platform())
    _module("vllm.triton_utils", tl=tl, triton=triton, HAS_TRITON=True)
    _module("vllm.utils")
    _module("vllm.utils.math_utils", next_power_of_2=triton.next_power_of_2)
    _module(
        "vllm.utils.torch_utils",
        direct_register_custom_op=_no_registration,
        async_tensor_h2d=lambda data, dtype, device: torch.tensor(data, dtype=dtype, device=device),
    )
    for path in ("lora", "lora/ops", "lora/ops/triton_ops"):
        _module("vllm." + path.replace("/", "."), folder / "vllm" / path)
    operations = "vllm.lora.ops.triton_ops."
    return types.SimpleNamespace(
        shrink=importlib.import_module(operations + "lora_shrink_op").lora_shrink,
        expand=importlib.import_module(operations + "lora_expand_op").lora_expand,
        meta=importlib.import_module(operations + "lora_kernel_metadata").LoRAKernelMeta,
    )


def _sglang(folder: Path) -> types.SimpleNamespace:
    _module("sglang", folder / "sglang")
    operations = "kernels/ops/lora"
    for path in (
        "kernels",
        "kernels/ops",
        operations,
        f"{operations}/common",
        f"{operations}/dense",
        f"{operations}/moe",
        "srt",
        "srt/lora",
    ):
        _module("sglang." + path.replace("/", "."), folder / "sglang" / path)
    _module("sglang.srt.environ", envs=_Unset())
    _module(
        "sglang.srt.utils",
        cached_triton_kernel=lambda key: lambda function: function,
        get_device_name=lambda *_: "NVIDIA_H200",  # the only one that its tuned files name
        is_npu=lambda: False,
    )
    _module("sglang.srt.lora.utils", LoRABatchInfo=object)
    _module("sglang.kernels.ops.moe")
    _module("sglang.kernels.ops.moe.moe_align", moe_align_block_size=None)
    _module("sglang.kernels.ops.lora.moe.virtual_experts", _align_block_size_jit=None)
    dense, common = "sglang.kernels.ops.lora.dense.", "sglang.kernels.ops.lora.common."
    plans = folder / "sglang/srt/lora/dense/configs/sm90.plans.json"
    return types.SimpleNamespace(
        shrink=importlib.import_module(
            dense + "chunked_sgmv_shrink"
        ).chunked_sgmv_lora_shrink_forward,
        expand=importlib.import_module(
            dense + "chunked_sgmv_expand"
        ).chunked_sgmv_lora_expand_forward,
        a=importlib.import_module(common + "lora_a"),
        b=importlib.import_module(common + "lora_b"),
        route=importlib.import_module(common + "route_view"),
        plans=json.loads(plans.read_text())["rows"] if plans.exists() else [],
    )
