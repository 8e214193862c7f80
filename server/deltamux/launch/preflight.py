"""What can be told about a configuration at once, before anything is loaded."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from pathlib import Path

from deltamux.adapters.checkpoint.header import check_weights
from deltamux.adapters.checkpoint.manifest import read_manifest
from deltamux.config import FrontendConfig, StoreConfig
from deltamux.errors import DeltamuxError, StartupError
from deltamux.store.catalog.reference import check_name


def check(frontend: FrontendConfig, store: StoreConfig) -> None:
    """Raises StartupError for folders that are missing or unfit, and for ports that are taken."""
    _check_model(frontend.model)
    _check_adapters(store)
    _check_ports(frontend.host, (frontend.port, frontend.admin_port, frontend.metrics_port))


def check_folder(folder: Path) -> None:
    """Raises InvalidArgument when its files are no adapter, as far as one can tell unread."""
    read_manifest(folder)
    check_weights(folder)


def _check_model(model: str) -> None:
    """A hub id is not checked."""
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise StartupError(f"--model {model}: no config.json in this folder")
    elif folder.is_absolute() or model.startswith((".", "~")) or folder.exists():
        raise StartupError(f"--model {model}: no such folder")


def _check_adapters(config: StoreConfig) -> None:
    for name, folder in config.adapters.items():
        try:
            check_name(name)
            check_folder(Path(folder))
        except DeltamuxError as error:
            raise StartupError(f"--adapter {name}={folder}: {error.message}") from error
    if config.adapter_dir is not None and not config.adapter_dir.is_dir():
        raise StartupError(f"--adapter-dir {config.adapter_dir}: no such folder")


def _check_ports(host: str, ports: tuple[int | None, ...]) -> None:
    """All at once, so that one given twice is taken too."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with ExitStack() as opened:
        for port in ports:
            try:
                if port:
                    opened.enter_context(socket.create_server((host, port), family=family))
            except OSError as error:
                reason = (error.strerror or str(error)).partition(" (")[0]
                raise StartupError(f"cannot listen on {host}:{port}: {reason}") from error
