"""`deltamux health`: what a container's health check runs."""

from __future__ import annotations

from collections.abc import Sequence

from deltamux.cli.command import Command, option
from deltamux.client import DEFAULT_TARGET, Client


class Health(Command):
    """Ask a server whether it is ready; exit 0 when it is, 1 when not."""

    target: str = option(DEFAULT_TARGET, help="the server", metavar="HOST:PORT")
    timeout: float = option(5.0, gt=0, help="longest wait for an answer", metavar="SECONDS")


def main(arguments: Sequence[str]) -> int:
    options = Health.parse("deltamux health", arguments)
    with Client(options.target, options.timeout) as client:
        healthy = client.healthy()
    print("SERVING" if healthy else "NOT_SERVING")
    return 0 if healthy else 1
