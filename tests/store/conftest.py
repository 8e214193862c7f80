"""Adapters of one tiny linear module, in files, and the real store above and below them."""

from __future__ import annotations

import asyncio
import json
import os
import select
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from deltamux.adapters.adapter import Adapter
from deltamux.adapters.checkpoint.header import check_weights
from deltamux.adapters.parse import parse_adapter
from deltamux.adapters.sites.device_sites import DeviceSites
from deltamux.adapters.sites.rows import Rows
from deltamux.base.structure import SiteSpec, Structure
from deltamux.base.task_heads import TaskHeads
from deltamux.errors import from_code
from deltamux.store.catalog.catalog import Catalog
from deltamux.store.catalog.disk_tier import DiskTier
from deltamux.store.catalog.lease import Lease
from deltamux.store.memory.adapter_cache import AdapterCache
from deltamux.store.memory.loader import Loader
from deltamux.wire.messages import (
    AdapterDropped,
    AdapterFailed,
    AdapterInfo,
    AdapterLoaded,
    AdapterMoved,
    FromEngine,
)
from deltamux_kernels.segments import Segments

IN, OUT = 8, 6
CPU = torch.device("cpu")
# Seconds after which what does not come is a failure.
PATIENCE = 60.0


@dataclass(frozen=True)
class AdapterFiles:
    """Writes adapters of any content into folders below `root`."""

    root: Path

    def write(self, name: str, seed: int = 0, rank: int = 2) -> Path:
        """Also overwrites: then with other content for another seed."""
        folder = self.root / name
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": rank,
            "target_modules": ["linear"],
            "bias": "none",
        }
        (folder / "adapter_config.json").write_text(json.dumps(config))
        save_file(self.tensors(seed, rank), folder / "adapter_model.safetensors")
        # The clock of a file system may stand still for longer than a test takes.
        for file in folder.iterdir():
            os.utime(file, (seed, seed))
        return folder

    def tensors(self, seed: int, rank: int = 2) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        prefix = "base_model.model.linear"
        return {
            f"{prefix}.lora_A.weight": torch.randn(rank, IN, generator=generator),
            f"{prefix}.lora_B.weight": torch.randn(OUT, rank, generator=generator),
        }

    def delta(self, seed: int, rank: int = 2) -> torch.Tensor:
        """B A of the adapter, [OUT, IN]."""
        a, b = self.tensors(seed, rank).values()
        return b @ a


@dataclass
class Device:
    """A model of one linear module whose adapters lie in `slots` slots."""

    slots: int
    arena_bytes: int = 1 << 20

    def __post_init__(self) -> None:
        self.rows = Rows(CPU)
        self.model = torch.nn.Module()
        self.model.linear = self.linear = torch.nn.Linear(IN, OUT, bias=False)
        self.model.requires_grad_(False)
        sites = {"linear": SiteSpec("linear", "linear", IN, OUT)}
        heads = TaskHeads(OUT, "", {}, (), None, None)
        self.structure = Structure(sites, {"linear": self.linear}, "", "", False, heads)
        self.sites = DeviceSites(
            self.model, self.structure, self.rows, self.slots, self.arena_bytes, torch.float32, CPU
        )
        self.parse = partial(parse_adapter, structure=self.structure, dtype=torch.float32)
        self.reads: list[str] = []
        self.loader = Loader(self._parse, self.sites.write)

    def cache(self, host_bytes: int = 1 << 20) -> AdapterCache:
        return AdapterCache(self.sites, self.loader, slots=self.slots, host_bytes=host_bytes)

    def _parse(self, folder: Path, digest: str) -> Adapter:
        self.reads.append(digest)
        return self.parse(folder, digest)

    def delta(self, slot: int) -> torch.Tensor:
        """What the adapter in this slot adds to the module's weight, [OUT, IN]."""
        segments = Segments.build([(slot, 0, IN)], CPU)
        self.rows.set(segments, segments)
        with torch.inference_mode():
            return (self.model.linear(torch.eye(IN)) - self.linear(torch.eye(IN))).T


def drive(cache: AdapterCache, loader: Loader) -> list[FromEngine]:
    """Polls until nothing is under way, and on until nothing counts as asked for."""
    events = cache.poll()
    while cache.pending_loads:
        select.select([loader.fileno()], [], [], 10)
        events += cache.poll()
    return events + cache.poll() + cache.poll()


class LocalEngine:
    """The engine's adapter cache on this very loop, as the catalog sees it."""

    def __init__(self, cache: AdapterCache, loader: Loader, catalog: Catalog | None = None) -> None:
        self.cache = cache
        self.catalog = catalog
        self.events: list[FromEngine] = []
        self._loader = loader
        self._answers: dict[str, deque[asyncio.Future[FromEngine]]] = {}
        asyncio.get_running_loop().add_reader(loader.fileno(), self.poll)

    async def load(self, digest: str, path: str, to_device: bool, pinned: bool) -> AdapterInfo:
        self.cache.load(digest, path, to_device, pinned)
        return self._info(await self._answer(digest))

    async def pin(self, digest: str, path: str, pinned: bool) -> AdapterInfo:
        self.cache.pin(digest, path, pinned)
        return self._info(await self._answer(digest))

    async def drop(self, digest: str) -> None:
        self.cache.drop(digest)
        await self._answer(digest)

    def poll(self) -> None:
        for event in self.cache.poll():
            self.events.append(event)
            assert self.catalog is not None
            match event:
                case AdapterMoved():
                    self.catalog.moved(event)
                case AdapterLoaded() | AdapterFailed() | AdapterDropped():
                    if isinstance(event, AdapterFailed):
                        self.catalog.failed(event)
                    if waiting := self._answers.get(event.digest):
                        waiting.popleft().set_result(event)

    def replace(self, cache: AdapterCache, loader: Loader) -> None:
        """As when the engine has died and another one was started."""
        self.close()
        self.__init__(cache, loader, self.catalog)

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._loader.fileno())

    async def _answer(self, digest: str) -> FromEngine:
        future = asyncio.get_running_loop().create_future()
        self._answers.setdefault(digest, deque()).append(future)
        self._loader.wake()
        return await future

    def _info(self, event: FromEngine) -> AdapterInfo:
        if isinstance(event, AdapterFailed):
            raise from_code(event.code, event.reason, event.message)
        assert isinstance(event, AdapterLoaded)
        return event.info


@dataclass
class Store:
    """Everything from the catalog down to the device, in one process."""

    catalog: Catalog
    disk: DiskTier
    engine: LocalEngine
    device: Device

    async def served(self, lease: Lease) -> torch.Tensor:
        """What the leased adapter adds, computed on the device as a request would."""
        cache = self.engine.cache
        async with asyncio.timeout(PATIENCE):
            while (slot := cache.acquire(lease.version, lease.path)) is None:
                await asyncio.sleep(0)
                self.engine.poll()
        delta = self.device.delta(slot)
        cache.release(lease.version)
        return delta

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not condition():
                await asyncio.sleep(0.001)


@pytest.fixture
def files(tmp_path: Path) -> AdapterFiles:
    return AdapterFiles(tmp_path / "sources")


@pytest.fixture
def make_device() -> Iterator[Callable[..., Device]]:
    devices: list[Device] = []

    def make(slots: int, **options: int) -> Device:
        devices.append(Device(slots, **options))
        return devices[-1]

    yield make
    for device in devices:
        device.loader.close()


@pytest.fixture
def drive_cache() -> Callable[[AdapterCache, Loader], list[FromEngine]]:
    return drive


@pytest.fixture
def make_disk(tmp_path: Path) -> Callable[..., DiskTier]:
    def make(capacity: int = 1 << 20, largest: int = 1 << 16) -> DiskTier:
        return DiskTier(tmp_path / "cache", capacity, largest, check_weights)

    return make


@pytest.fixture
async def store(
    make_device: Callable[..., Device], make_disk: Callable[..., DiskTier]
) -> AsyncIterator[Store]:
    device, disk = make_device(slots=2), make_disk()
    engine = LocalEngine(device.cache(), device.loader)
    engine.catalog = Catalog(disk, engine)
    yield Store(engine.catalog, disk, engine, device)
    engine.catalog.close()
    engine.close()
