"""`deltamux inspect`: what an adapter is, and what it becomes beside a base model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic_settings import CliPositionalArg
from transformers.utils.logging import disable_progress_bar

from deltamux.base.load import load_base
from deltamux.cli.command import option
from deltamux.cli.tables import Report, in_words, print_facts, print_json, print_table
from deltamux.errors import DeltamuxError, StartupError
from deltamux.inspection.files import Files, inspect_files
from deltamux.inspection.served import Served, inspect_served


class Inspect(Report):
    """Say what an adapter is and, with --model, how it would be served or why not; exit 1 then."""

    adapter: CliPositionalArg[Path] = option(help="the adapter's folder")
    model: str | None = option(
        None, help="the base model to fit it to, a folder or a hub id", metavar="MODEL"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", help="that the model is served in"
    )


def main(arguments: Sequence[str]) -> int:
    options = Inspect.parse("deltamux inspect", arguments)
    disable_progress_bar()
    files: Files | None = None
    served: Served | None = None
    refusal: DeltamuxError | None = None
    try:
        files = inspect_files(options.adapter)
        if options.model is not None:
            served = inspect_served(options.adapter, load_base(options.model, dtype=options.dtype))
    except StartupError:
        # That the base cannot be loaded says nothing of the adapter.
        raise
    except DeltamuxError as error:
        refusal = error
    if options.as_json:
        print_json(_json(files, served, refusal))
    else:
        _show(files, served, refusal)
    return 0 if refusal is None else 1


def _json(
    files: Files | None, served: Served | None, refusal: DeltamuxError | None
) -> dict[str, Any]:
    return {
        "files": files and files.as_json(),
        "served": served and served.as_json(),
        "refusal": refusal
        and {"code": refusal.code, "reason": refusal.reason, "message": refusal.message},
    }


def _show(files: Files | None, served: Served | None, refusal: DeltamuxError | None) -> None:
    if served is not None:
        _show_served(served)
    elif files is not None:
        _show_tensors(files)
    facts: dict[str, str] = {}
    if files is not None:
        facts["type"] = f"{files.type} of {files.library}, family {files.family}"
        dtypes = ", ".join(f"{count} {dtype}" for dtype, count in files.dtypes.items())
        facts["files"] = f"{in_words(files.bytes)}, {files.numbers:,} numbers, tensors: {dtypes}"
    if served is not None:
        facts["task"] = served.task
        facts["rank"] = str(served.rank or "")
        facts["parameters"] = f"{served.parameters:,}"
        host, device = in_words(served.host_bytes), in_words(served.device_bytes)
        facts["memory"] = f"{host} on the host, {device} on the device"
        facts["note"] = served.note
    if refusal is not None:
        facts["refused"] = f"{refusal.message} ({refusal.reason})"
    print_facts(facts)


def _show_served(served: Served) -> None:
    rows = [
        (part.site, part.primitive, str(part.rank or ""), in_words(part.bytes))
        for part in served.parts
    ]
    print_table(("site", "served as", "rank", "bytes"), rows)
    print()


def _show_tensors(files: Files) -> None:
    rows = [
        (tensor.name, tensor.dtype, " x ".join(map(str, tensor.shape)), in_words(tensor.bytes))
        for tensor in files.tensors
    ]
    print_table(("tensor", "dtype", "shape", "bytes"), rows)
    print()
