"""`deltamux demo`: the real server, the packaged model, concurrent requests, checked answers."""

from __future__ import annotations

from collections.abc import Sequence

from deltamux.cli.command import Command, option
from deltamux.demo.run import run


class Demo(Command):
    """Start a server with the packaged model and ask it through all its adapters at once."""

    prompts: int = option(2, ge=1, help="prompts for each adapter", metavar="N")
    seed: int = option(0, help="chooses the prompts", metavar="N")


def main(arguments: Sequence[str]) -> int:
    options = Demo.parse("deltamux demo", arguments)
    return run(options.prompts, options.seed)
