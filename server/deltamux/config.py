"""One frozen dataclass a role; only the command line, which fills them, reads flags."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class EngineConfig:
    """What the engine process needs to know. Crosses to it as JSON."""

    model: str
    device: str = "cpu"
    dtype: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 1024
    block_size: int = 16
    # Bytes of the KV cache; None: what the other memory leaves, at most 1 GiB on a CPU.
    kv_cache_bytes: int | None = None
    enable_prefix_caching: bool = True
    gpu_memory_utilization: float = 0.9
    # On a GPU: no CUDA graphs.
    enforce_eager: bool = False
    # Bytes of device memory for adapters; None: a share of what is left, at most 1 GiB on a CPU.
    adapter_device_bytes: int | None = None
    # Bytes of host memory for parsed adapters, least recently used first out.
    adapter_host_bytes: int = 4 << 30
    max_adapter_slots: int = 64
    # Threads of torch on a CPU; None: as torch decides.
    threads: int | None = None
    seed: int = 0
    log_format: str = "auto"
    log_level: str = "info"


@dataclass(frozen=True)
class StoreConfig:
    """Where adapters come from and how much disk their copies may take."""

    # name -> folder, registered before the server is ready.
    adapters: dict[str, str] = field(default_factory=dict)
    # Each subfolder is one adapter; new ones are found while running.
    adapter_dir: Path | None = None
    cache_dir: Path = Path("~/.cache/deltamux/adapters")
    disk_bytes: int = 64 << 30
    # Largest single adapter accepted, in bytes.
    max_adapter_bytes: int = 8 << 30


@dataclass(frozen=True)
class FrontendConfig:
    """What the gRPC process needs to know."""

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    metrics_port: int | None = 9090
    # Adapter administration moves to its own listener when set.
    admin_port: int | None = None
    max_waiting_requests: int = 1024
    # Seconds granted to a request that brings no deadline.
    default_deadline: float = 600.0
    # Seconds that running requests may take to finish after SIGTERM.
    drain_grace: float = 30.0
    reflection: bool = True
