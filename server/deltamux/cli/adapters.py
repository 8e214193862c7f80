"""`deltamux adapters list|load|unload|pin|unpin`: the adapters of a running server."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from pydantic_settings import CliPositionalArg
from rich.table import Table

from deltamux.cli.command import Command, UsageError, nearest, option
from deltamux.cli.tables import console
from deltamux.client import DEFAULT_TARGET, Client, ClientError
from deltamux.v1 import adapters_pb2, inference_pb2

PROGRAM = "deltamux adapters"


class _Remote(Command):
    """Options of every command that talks to a server's administration."""

    target: str = option(
        DEFAULT_TARGET, help="the server, or its --admin-port", metavar="HOST:PORT"
    )
    timeout: float | None = option(None, gt=0, help="longest wait for an answer", metavar="SECONDS")


class List(_Remote):
    """List the adapters that a server knows, and where each is now."""


class Load(_Remote):
    """Register a folder on the server as an adapter, and load it."""

    name: CliPositionalArg[str] = option(help="how requests will call it")
    source: CliPositionalArg[Path] = option(help="its folder on the server's machine")
    upto: Literal["disk", "host", "device"] = option("device", help="how far to load it")
    pinned: bool = option(False, help="keep it on the device until it is unpinned")


class Unload(_Remote):
    """Forget an adapter once no request uses it."""

    name: CliPositionalArg[str] = option(help='"name" for all its versions, "name@version" for one')
    purge: bool = option(False, help="delete its copy on the server's disk too")


class Pin(_Remote):
    """Keep an adapter on the device until it is unpinned."""

    name: CliPositionalArg[str] = option(help="the adapter")


class Unpin(Pin):
    """Let an adapter leave the device when its place is needed."""


def main(arguments: Sequence[str]) -> int:
    verb = arguments[0] if arguments else "--help"
    if verb in ("-h", "--help"):
        print(_overview())
        return 0
    if verb not in VERBS:
        raise UsageError(f"{PROGRAM}: unknown command {verb!r}{nearest(verb, VERBS)}")
    command, run = VERBS[verb]
    options = command.parse(f"{PROGRAM} {verb}", arguments[1:])
    try:
        with Client(options.target, options.timeout) as client:
            run(client, options)
    except ClientError as error:
        print(f"{PROGRAM} {verb}: {error.code}: {error.message}", file=sys.stderr)
        return 1
    return 0


def _list(client: Client, options: List) -> None:
    _show(client.list_adapters())


def _load(client: Client, options: Load) -> None:
    # The server resolves the folder: what is relative here would be relative to it.
    source = str(options.source.absolute())
    pinned, upto = options.pinned, options.upto
    _show([client.load_adapter(options.name, source, pinned=pinned, upto=upto)])


def _unload(client: Client, options: Unload) -> None:
    client.unload_adapter(options.name, purge=options.purge)
    print(f"unloaded {options.name}")


def _pin(client: Client, options: Pin) -> None:
    _show([client.pin_adapter(options.name, pinned=not isinstance(options, Unpin))])


VERBS: dict[str, tuple[type[_Remote], Callable[..., None]]] = {
    "list": (List, _list),
    "load": (Load, _load),
    "unload": (Unload, _unload),
    "pin": (Pin, _pin),
    "unpin": (Unpin, _pin),
}


def _show(adapters: Sequence[adapters_pb2.Adapter]) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("name", "version", "family", "rank", "tier", "pinned", "requests", "note"):
        table.add_column(heading, justify="right" if heading in ("rank", "requests") else "left")
    for adapter in adapters:
        table.add_row(
            adapter.name,
            adapter.version[:12] + ("" if adapter.live else " (old)"),
            adapter.family,
            str(adapter.rank or ""),
            inference_pb2.Tier.Name(adapter.tier).removeprefix("TIER_").lower(),
            "pinned" if adapter.pinned else "",
            str(adapter.active_requests),
            adapter.note,
        )
    console().print(table)


def _overview() -> str:
    rows = "\n".join(f"  {verb:<8}{command.__doc__}" for verb, (command, _) in VERBS.items())
    return f"usage: {PROGRAM} COMMAND [options]\n\ncommands:\n{rows}"
