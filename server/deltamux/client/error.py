"""What a failed call raises."""

from __future__ import annotations

import grpc
from google.rpc import error_details_pb2, status_pb2


class ClientError(Exception):
    """A call that failed: `code` is the gRPC status by name, `reason` the server's stable word."""

    def __init__(self, code: str, reason: str, message: str) -> None:
        super().__init__(message or code)
        self.code = code
        self.reason = reason
        self.message = message or code


def translated(error: grpc.RpcError) -> ClientError:
    """The status, and the reason of its google.rpc.ErrorInfo where the server sent one."""
    reason = ""
    status = status_pb2.Status()
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            status.ParseFromString(value)
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            reason = info.reason
    return ClientError(error.code().name, reason, error.details() or "")
