"""Platforms that have no wheel of Triton, as macOS."""

from __future__ import annotations

import subprocess
import sys


def test_all_modules_import() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import importlib, pkgutil, deltamux_kernels as kernels\n"
        "for module in pkgutil.iter_modules(kernels.__path__, 'deltamux_kernels.'):\n"
        "    importlib.import_module(module.name)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
