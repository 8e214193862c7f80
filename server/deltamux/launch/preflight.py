"""What can be told about a configuration at once, before anything is loaded."""

from __future__ import annotations

import socket
from pathlib import Path

from deltamux.adapters.checkpoint.header import check_weights
from deltamux.adapters.checkpoint.manifest import read_manifest
from deltamux.config import FrontendConfig, StoreConfig
from deltamux.errors import DeltamuxError, StartupError


def check(frontend: FrontendConfig, store: StoreConfig) -> None:
    """Raises StartupError for folders that are missing or unfit, and for ports that are taken."""
    _check_model(frontend.model)
    _check_adapters(store)
    for port in (frontend.port, frontend.admin_port, frontend.metrics_port):
        if port:
            _check_port(frontend.host, port)


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
            check_folder(Path(folder))
        except DeltamuxError as error:
            raise StartupError(f"--adapter {name}={folder}: {error.message}") from error
    if config.adapter_dir is not None and not config.adapter_dir.is_dir():
        raise StartupError(f"--adapter-dir {config.adapter_dir}: no such folder")


def _check_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (")[0]
        raise StartupError(f"cannot listen on {host}:{port}: {reason}") from error
