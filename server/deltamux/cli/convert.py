"""`deltamux convert`: an adapter that is not served as it was saved, rewritten so that it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic_settings import CliPositionalArg

from deltamux.adapters.checkpoint.convert import convert
from deltamux.cli.command import Command, option


class Convert(Command):
    """Rewrite an adapter saved as a pickle, or with its head beside it, as safetensors."""

    source: CliPositionalArg[Path] = option(help="the adapter's folder")
    target: CliPositionalArg[Path] = option(help="the folder to be made")


def main(arguments: Sequence[str]) -> int:
    options = Convert.parse("deltamux convert", arguments)
    print(f"wrote {convert(options.source, options.target)}")
    return 0
