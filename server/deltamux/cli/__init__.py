"""The command line: `deltamux COMMAND`, one module a command."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from deltamux import __version__
from deltamux.cli.command import UsageError, nearest
from deltamux.errors import DeltamuxError

# Imported only when asked for: `deltamux adapters list` loads neither torch nor the engine.
COMMANDS = {
    "serve": ("deltamux.cli.serve", "serve a model and its adapters over gRPC"),
    "generate": ("deltamux.cli.generate", "send a prompt to a server, stream its answer"),
    "adapters": ("deltamux.cli.adapters", "list, load, unload or pin a server's adapters"),
    "extract": ("deltamux.cli.extract", "make an adapter of a full fine-tune and its base"),
    "convert": ("deltamux.cli.convert", "make safetensors of an adapter saved as a pickle"),
    "inspect": ("deltamux.cli.inspect", "say what an adapter is, and whether a model can serve it"),
    "verify": ("deltamux.cli.verify", "hold an adapter to the library that trained it"),
    "demo": ("deltamux.cli.demo", "see one model answer through many adapters at once"),
    "bench": ("deltamux.cli.bench", "load a server and measure it"),
    "health": ("deltamux.cli.health", "exit 0 when a server is ready, 1 when not"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0, 1 for a failure, 2 for wrong usage."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    except DeltamuxError as error:
        # A library's words in it may have lines of their own.
        print(f"deltamux {arguments[0]}:", " ".join(error.message.split()), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output went away, `| head` for one.
        sys.stderr.close()
        return 1
    except OSError as error:
        # A file or folder that a flag names, which cannot be read or written.
        where = "" if error.filename is None else f"{error.filename}: "
        print(f"deltamux {arguments[0]}: {where}{error.strerror or error}", file=sys.stderr)
        return 1


def _run(arguments: list[str]) -> int:
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(_overview())
        return 0
    if name == "--version":
        print(f"deltamux {__version__}")
        return 0
    if name not in COMMANDS:
        raise UsageError(f"deltamux: unknown command {name!r}{nearest(name, COMMANDS)}")
    exit_code: int = importlib.import_module(COMMANDS[name][0]).main(arguments[1:])
    return exit_code


def _overview() -> str:
    rows = "\n".join(f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items())
    return (
        "usage: deltamux COMMAND [options]\n\n"
        "Serve many fine-tunes of one frozen model, mixed in one batch, over gRPC.\n\n"
        f"commands:\n{rows}\n\n"
        "`deltamux COMMAND --help` explains a command; `deltamux --version` says the version.\n"
        "Every option can be given in the environment too: DELTAMUX_PORT for --port."
    )
