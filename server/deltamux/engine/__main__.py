"""The engine process: `python -m deltamux.engine --socket ADDRESS`.

The first line of standard input is the EngineConfig as JSON. The rest of it stays empty: its end
means that the parent is gone, however it went, and the engine goes too.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import sys
import threading

import msgspec
import structlog

from deltamux import logs
from deltamux.config import EngineConfig
from deltamux.engine.build import build_engine
from deltamux.errors import StartupError, first_line
from deltamux.wire.channel import EngineEnd
from deltamux.wire.messages import StartupFailed

_log = structlog.get_logger("deltamux.engine")

# Seconds for which a thread may keep Python to itself while others want it. A step hands it back
# with each of its operations, and would wait Python's own 5 ms for a parsing loader every time.
_SWITCH_INTERVAL = 0.0005


def main() -> int:
    parser = argparse.ArgumentParser(prog="deltamux.engine")
    parser.add_argument("--socket", required=True, help="where the front end listens, ipc://...")
    address = parser.parse_args().socket
    # The parent decides: it drains first, then ends this process.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    config = msgspec.json.decode(sys.stdin.buffer.readline(), type=EngineConfig)
    logs.configure(config.log_format, config.log_level)
    logs.take_in_transformers()
    sys.setswitchinterval(_SWITCH_INTERVAL)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    link = EngineEnd(address)
    try:
        return _serve(config, link)
    finally:
        link.close()


def _serve(config: EngineConfig, link: EngineEnd) -> int:
    try:
        engine, ready = build_engine(config, link)
    except StartupError as error:
        link.send(StartupFailed(error.message))
        return 1
    except Exception as error:
        _log.exception("the engine cannot start")
        link.send(StartupFailed(f"the engine cannot start: {first_line(error)}"))
        return 1
    # What the start has left stays to the end. Looking through it for garbage takes 0.2 seconds,
    # again and again, in which no step is launched.
    gc.collect()
    gc.freeze()
    link.send(ready)
    try:
        engine.run()
    except Exception:
        # Nothing in memory is trusted any more: the parent starts another process.
        _log.exception("the engine has failed")
        return 1
    return 0


def _exit_with_parent() -> None:
    # Not through Python's buffer, whose lock this thread would hold when the interpreter ends.
    os.read(sys.stdin.fileno(), 1)
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
