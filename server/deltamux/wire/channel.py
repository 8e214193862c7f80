"""The private socket: an asyncio end for the front end, a blocking one for the engine."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import msgspec
import structlog
import zmq
import zmq.asyncio

from deltamux.errors import Internal, StartupError
from deltamux.wire.messages import (
    AdapterFailed,
    FromEngine,
    Inbound,
    Outbound,
    RequestFailed,
    ToEngine,
)

_log = structlog.get_logger(__name__)

# Milliseconds, some 24 days: a poll cannot be told to wait longer.
_LONGEST_WAIT = 2**31 - 1

# What bytes that are no message may raise.
_NO_MESSAGE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class FrontendEnd:
    """Binds `address` (ipc:// in a private folder), sends ToEngine, receives FromEngine."""

    def __init__(self, address: str) -> None:
        """Raises StartupError for a path that no socket can have."""
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Outbound)
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.set(zmq.SNDHWM, 0)
        self._socket.set(zmq.RCVHWM, 0)
        self._socket.set(zmq.LINGER, 0)
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self.close()
            why = zmq.strerror(error.errno or 0)
            raise StartupError(f"no socket at {address}: {why}") from error

    async def send(self, message: ToEngine) -> None:
        await self._socket.send(self._encoder.encode(message))

    async def receive(self) -> FromEngine:
        message: FromEngine = self._decoder.decode(await self._socket.recv())
        return message

    def close(self) -> None:
        self._socket.close()
        self._context.term()


class EngineEnd:
    """Connects to `address`, receives ToEngine, sends FromEngine; used by one thread only."""

    def __init__(self, address: str) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Inbound)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.set(zmq.SNDHWM, 0)
        self._socket.set(zmq.RCVHWM, 0)
        self._socket.set(zmq.LINGER, 1000)
        self._socket.connect(address)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)

    def wake_on(self, file_descriptor: int) -> None:
        """Makes `wait` return when the descriptor is readable too."""
        self._poller.register(file_descriptor, zmq.POLLIN)

    def wait(self, timeout: float | None) -> bool:
        """Blocks until something arrived, or for `timeout` seconds; False where nothing has."""
        milliseconds = None if timeout is None else int(min(timeout * 1000, _LONGEST_WAIT))
        return bool(self._poller.poll(milliseconds))

    def receive(self) -> list[ToEngine]:
        """All messages that have arrived, without blocking.

        What cannot be understood is logged and dropped; whoever it would have served is told.
        """
        messages: list[ToEngine] = []
        with suppress(zmq.Again):
            while True:
                received = self._socket.recv(zmq.NOBLOCK)
                try:
                    messages.append(self._decoder.decode(received))
                except _NO_MESSAGE as error:
                    self._refuse(received, error)
        return messages

    def send(self, message: FromEngine) -> None:
        self._socket.send(self._encoder.encode(message))

    def close(self) -> None:
        self._socket.close()
        self._context.term()

    def _refuse(self, received: bytes, error: Exception) -> None:
        _log.error("a message was not understood", bytes=len(received), error=str(error))
        fields: dict[str, Any] = {}
        with suppress(*_NO_MESSAGE):
            fields = msgspec.msgpack.decode(received, type=dict[str, Any])
        failure = Internal("the engine did not understand the order", reason="NOT_UNDERSTOOD")
        words = (failure.code, failure.reason, failure.message)
        if isinstance(request_id := fields.get("request_id"), str):
            self.send(RequestFailed(request_id, *words))
        elif isinstance(digest := fields.get("digest"), str):
            self.send(AdapterFailed(digest, *words))
