"""What a failed call raises."""

from __future__ import annotations

import grpc
from google.rpc import error_details_pb2, status_pb2


class ClientError(Exception):
    """A call that failed: `code` is the gRPC status by name, `reason` the server's stable word.

    `retry_after` are the seconds after which it may succeed, where the server knows.
    """

    def __init__(
        self, code: str, reason: str, message: str, retry_after: float | None = None
    ) -> None:
        super().__init__(message or code)
        self.code = code
        self.reason = reason
        self.message = message or code
        self.retry_after = retry_after


def translated(error: grpc.RpcError) -> ClientError:
    """The status, and what its details say: google.rpc.ErrorInfo and RetryInfo."""
    reason, retry_after = "", None
    status = status_pb2.Status()
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            status.ParseFromString(value)
    for detail in status.details:
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            reason = info.reason
        elif detail.Unpack(retry):
            retry_after = retry.retry_delay.ToTimedelta().total_seconds()
    message = error.details() or ""
    if error.code() is grpc.StatusCode.UNIMPLEMENTED and not reason:
        # gRPC itself answers so, where nobody serves the method.
        message = (
            "not served on this port: a server with an --admin-port administers adapters there, "
            "and serves all else on --port"
        )
    return ClientError(error.code().name, reason, message, retry_after)
