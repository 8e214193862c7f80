"""The one place that every call passes: parses it, ends it with a rich status, logs it.

grpc.aio answers UNKNOWN, with the exception's own words, to a message that does not parse and
to a handler that raises. Neither happens behind this interceptor.
"""

from __future__ import annotations

import asyncio
import inspect
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

import grpc
import structlog

from deltamux.errors import Cancelled, DeadlineExceeded, DeltamuxError, Internal, InvalidArgument
from deltamux.frontend.printable import printable
from deltamux.frontend.status import rich_status
from deltamux.metrics import Metrics

_log = structlog.get_logger(__name__)


class CallInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc is untyped
    """Wraps the handlers of all services, those of health and reflection too.

    `metrics` counts the calls whose method begins with `measured`.
    """

    def __init__(self, metrics: Metrics, measured: str) -> None:
        self._metrics = metrics
        self._measured = measured

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        return self._wrapped(handler, handler_call_details.method)

    def _wrapped(self, handler: grpc.RpcMethodHandler, method: str) -> grpc.RpcMethodHandler:
        """The same handler, receiving bytes and raising nothing."""
        parse = handler.request_deserializer
        behaviour = handler.unary_unary or handler.unary_stream or handler.stream_stream
        streams = handler.stream_stream is not None

        async def handle(request: Any, context: grpc.aio.ServicerContext) -> Any:
            async def call() -> Any:
                parsed = _each_parsed(parse, request) if streams else _parsed(parse, request)
                return await _result(behaviour(parsed, context), context)

            return await self._concluded(method, context, call)

        return _KINDS[handler.request_streaming, handler.response_streaming](
            handle, response_serializer=handler.response_serializer
        )

    async def _concluded(
        self, method: str, context: grpc.aio.ServicerContext, call: Callable[[], Awaitable[Any]]
    ) -> Any:
        """Awaits the call; whatever it raises becomes a status; one event is logged."""
        structlog.contextvars.clear_contextvars()
        started = time.perf_counter()
        measured = method.startswith(self._measured)
        if measured:
            self._metrics.request_started()
        error: DeltamuxError | None = None
        try:
            return await call()
        except DeltamuxError as raised:
            error = raised
        except asyncio.CancelledError:
            error = _cancelled(context)
            raise
        except Exception:
            error = _internal(method)
        finally:
            seconds = time.perf_counter() - started
            if measured:
                self._metrics.request_finished(error.code if error else "OK", seconds)
            _log_call(method, error, seconds)
        # A client whose own deadline has passed may be gone: nobody is left to be told, and gRPC
        # would log that as an error, with a traceback.
        with suppress(grpc.aio.InternalError):
            await context.abort_with_status(rich_status(error))


# By whether the request and the response are streams.
_KINDS = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


async def _each_parsed(
    parse: Callable[[bytes], Any], requests: AsyncIterator[bytes]
) -> AsyncIterator[Any]:
    async for request in requests:
        yield _parsed(parse, request)


def _parsed(parse: Callable[[bytes], Any], request: bytes) -> Any:
    try:
        return parse(request)
    except Exception:
        raise InvalidArgument(
            "the message is not a valid protobuf of this method's request type",
            reason="MALFORMED_MESSAGE",
        ) from None


async def _result(result: Any, context: grpc.aio.ServicerContext) -> Any:
    """Awaits a handler of either kind: one that yields its responses, or a coroutine."""
    if not inspect.isasyncgen(result):
        return await result
    async for response in result:
        await context.write(response)
    return None


def _cancelled(context: grpc.aio.ServicerContext) -> DeltamuxError:
    remaining = context.time_remaining()
    if remaining is not None and remaining <= 0:
        return DeadlineExceeded("the client's deadline passed")
    return Cancelled("the client went away")


def _internal(method: str) -> Internal:
    """The client gets a number; the traceback stays in the log beside the same number."""
    incident = secrets.token_hex(8)
    _log.exception("internal error", method=method, incident=incident)
    return Internal(f"internal error; id={incident}")


def _log_call(method: str, error: DeltamuxError | None, seconds: float) -> None:
    """What the handlers bind to structlog's context (request id, adapter) is in the event too."""
    event = _log.bind(method=method.rpartition("/")[2], seconds=round(seconds, 6))
    if error is None and method.startswith("/grpc.health."):
        # A prober asks every few seconds.
        event.debug("call", code="OK")
    elif error is None:
        event.info("call", code="OK")
    else:
        event.info("call", code=error.code, reason=error.reason, error=printable(error.message))
