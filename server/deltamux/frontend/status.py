"""Turns a DeltamuxError into the rich gRPC status that the client sees."""

from __future__ import annotations

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from deltamux.errors import DeltamuxError

DOMAIN = "deltamux"
# Status and details travel in trailers, whose limit is 8 KiB for all of them together.
MAX_MESSAGE = 1000

# Limits that the operator sets and a call may meet: the flag, by the reason of the error.
QUOTAS = {
    "QUEUE_FULL": "max-waiting-requests",
    "HOST_MEMORY_FULL": "adapter-host-bytes",
    "ADAPTER_TOO_LARGE": "max-adapter-bytes",
}


def rich_status(error: DeltamuxError) -> grpc.Status:
    """Code, message, ErrorInfo; RetryInfo, QuotaFailure and BadRequest where they apply."""
    message = error.message[:MAX_MESSAGE]
    status = status_pb2.Status(
        code=grpc.StatusCode[error.code].value[0],
        message=message,
        details=[_packed(detail) for detail in _details(error, message)],
    )
    return rpc_status.to_status(status)


def _details(error: DeltamuxError, message: str) -> list[object]:
    details: list[object] = [error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)]
    if error.retry_after is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    if quota := QUOTAS.get(error.reason):
        exceeded = error_details_pb2.QuotaFailure.Violation(subject=quota, description=message)
        details.append(error_details_pb2.QuotaFailure(violations=[exceeded]))
    if error.field is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=message
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    return details


def _packed(detail: object) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed
