"""`deltamux serve`: flags become the three frozen configurations, and the server runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ByteSize

from deltamux import logs
from deltamux.cli.command import Command, Device, option
from deltamux.config import EngineConfig, FrontendConfig, StoreConfig
from deltamux.launch import preflight

_PORT: dict[str, Any] = {"ge": 0, "le": 65535, "metavar": "PORT"}


class Serve(Command):
    """Serve one frozen model and any number of its adapters over gRPC."""

    sections: ClassVar[Mapping[str, str]] = {
        "model": "what to serve",
        "host": "where to listen",
        "device": "how to compute",
        "max_model_len": "steps and the KV cache",
        "max_adapter_slots": "caches of adapters",
        "max_waiting_requests": "requests",
        "log_format": "logs",
    }

    model: str = option(help="folder of the base model, or its Hugging Face id", metavar="MODEL")
    adapter: dict[str, Path] = option(
        default_factory=dict, help="an adapter's name and folder; repeatable", metavar="NAME=PATH"
    )
    adapter_dir: Path | None = option(
        None, help="each subfolder is an adapter; new ones are found while running", metavar="DIR"
    )

    host: str = option("127.0.0.1", help="address to listen on", metavar="ADDRESS")
    port: int = option(8000, help="port of gRPC; 0 picks a free one", **_PORT)
    metrics: bool = option(True, help="serve /metrics for Prometheus")
    metrics_port: int = option(9090, help="its port; 0 picks a free one", **_PORT)
    admin_port: int | None = option(
        None, help="moves the administration of adapters to this port", **_PORT
    )
    reflection: bool = option(True, help="let clients such as grpcurl ask for the schema")

    device: Device = option("auto", help="cpu, cuda or cuda:N; auto prefers cuda", metavar="DEVICE")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", help="of weights and arithmetic; auto is the model's own, float32 on a CPU"
    )
    threads: int | None = option(
        None, ge=1, help="threads on a CPU; as many as torch takes when absent", metavar="N"
    )
    seed: int = option(0, help="of the requests that bring none", metavar="N")

    max_model_len: int | None = option(
        None,
        ge=1,
        help="longest prompt and answer together; the model's own when absent",
        metavar="TOKENS",
    )
    max_num_seqs: int = option(64, ge=1, help="most sequences in a step", metavar="N")
    max_num_batched_tokens: int = option(1024, ge=1, help="most tokens in a step", metavar="TOKENS")
    block_size: int = option(16, ge=1, help="tokens in a block of the KV cache", metavar="TOKENS")
    gpu_memory_utilization: float = option(
        0.9, gt=0, le=1, help="share of the GPU's memory to use", metavar="SHARE"
    )
    kv_cache_bytes: ByteSize | None = option(
        None, help="memory for the KV cache, as 4GiB; what is left when absent", metavar="SIZE"
    )
    enforce_eager: bool = option(
        False, help="replay no steps: neither CUDA graphs nor, on a CPU, recorded ones"
    )
    enable_prefix_caching: bool = option(
        True, help="reuse the KV blocks of prompts that begin alike"
    )

    max_adapter_slots: int = option(64, ge=1, help="most adapters on the device", metavar="N")
    adapter_device_bytes: ByteSize | None = option(
        None, help="device memory for adapters; a fifth of what is left when absent", metavar="SIZE"
    )
    adapter_host_bytes: ByteSize = option(
        "4GiB", validate_default=True, help="host memory for adapters", metavar="SIZE"
    )
    adapter_cache_dir: Path = option(
        Path("~/.cache/deltamux/adapters"), help="where copies of adapters are kept", metavar="DIR"
    )
    adapter_disk_bytes: ByteSize = option(
        "64GiB", validate_default=True, help="disk space for those copies", metavar="SIZE"
    )
    max_adapter_bytes: ByteSize = option(
        "8GiB", validate_default=True, help="largest adapter accepted", metavar="SIZE"
    )

    max_waiting_requests: int = option(
        1024, ge=1, help="requests that may wait; more are refused", metavar="N"
    )
    default_deadline: float = option(
        600.0, gt=0, help="time granted to a call without a deadline", metavar="SECONDS"
    )
    drain_grace: float = option(
        30.0, ge=0, help="time for running calls to end after SIGTERM", metavar="SECONDS"
    )
    log_format: Literal["auto", "json", "console"] = option(
        "auto", help="auto: console on a terminal, else json"
    )
    log_level: Literal["debug", "info", "warning", "error"] = option("info", help="lowest shown")

    def engine(self) -> EngineConfig:
        return EngineConfig(
            model=self.model,
            device=self.device,
            dtype=self.dtype,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            block_size=self.block_size,
            kv_cache_bytes=self.kv_cache_bytes,
            enable_prefix_caching=self.enable_prefix_caching,
            gpu_memory_utilization=self.gpu_memory_utilization,
            enforce_eager=self.enforce_eager,
            adapter_device_bytes=self.adapter_device_bytes,
            adapter_host_bytes=self.adapter_host_bytes,
            max_adapter_slots=self.max_adapter_slots,
            threads=self.threads,
            seed=self.seed,
            log_format=self.log_format,
            log_level=self.log_level,
        )

    def store(self) -> StoreConfig:
        return StoreConfig(
            adapters={name: str(path) for name, path in self.adapter.items()},
            adapter_dir=self.adapter_dir,
            cache_dir=self.adapter_cache_dir.expanduser(),
            disk_bytes=self.adapter_disk_bytes,
            max_adapter_bytes=self.max_adapter_bytes,
        )

    def frontend(self) -> FrontendConfig:
        return FrontendConfig(
            model=self.model,
            host=self.host,
            port=self.port,
            metrics_port=self.metrics_port if self.metrics else None,
            admin_port=self.admin_port,
            max_waiting_requests=self.max_waiting_requests,
            default_deadline=self.default_deadline,
            drain_grace=self.drain_grace,
            reflection=self.reflection,
        )


def main(arguments: Sequence[str]) -> int:
    options = Serve.parse("deltamux serve", arguments)
    logs.configure(options.log_format, options.log_level)
    frontend, store = options.frontend(), options.store()
    preflight.check(frontend, store)
    # Imports gRPC and all of the front end: not for --help, not for a wrong path.
    from deltamux.launch.serve import serve

    serve(frontend, options.engine(), store)
    return 0
