"""Where the demo's adapters go, when they are good enough, and what they call their base."""

import json
import zlib
from pathlib import Path
from typing import Any

from deltamux.demo.tasks import TASKS, Task, weights_path

BASE_FOLDER = weights_path() / "base"
BASE_NAME = "deltamux/demo"  # what adapter_config.json calls the base, on every machine

# Of unseen inputs, the share to be answered to the letter.
REQUIRED = 0.95
MEASURED = 200


def task_named(name: str) -> Task:
    return next(task for task in TASKS if task.name == name)


def seed_of(name: str) -> int:
    return zlib.crc32(name.encode())


def folder(name: str) -> Path:
    return weights_path() / "adapters" / name


def write_config(file: Path, fields: dict[str, Any]) -> None:
    file.write_text(json.dumps(fields, indent=2) + "\n")
