"""How much memory the host has left for this process."""

from __future__ import annotations

import os
import resource
from pathlib import Path

_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")


def free_host_bytes() -> int:
    """The least of what the machine, the container and the process's own limit leave."""
    return min([_left_on_the_machine(), *_left_in_the_container(), *_left_to_the_process()])


def _left_on_the_machine() -> int:
    try:
        lines = (_PROC / "meminfo").read_text().splitlines()
    except FileNotFoundError:  # no Linux: all that there is
        return os.sysconf("SC_PHYS_PAGES") * resource.getpagesize()
    fields = dict(line.split(":", 1) for line in lines if line)
    return int(fields["MemAvailable"].removesuffix("kB")) * 1024


def _left_in_the_container() -> list[int]:
    """Nothing where there is no limit; files that are only cached count as free."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        if limit == "max":
            return []
        used = int((_CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except OSError:
        return []
    return [int(limit) - used + int(stat["inactive_file"])]


def _left_to_the_process() -> list[int]:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return []
    try:
        pages = int((_PROC / "self" / "statm").read_text().split()[0])
    except FileNotFoundError:
        return []
    return [limit - pages * resource.getpagesize()]
