"""Every error a client can see: its gRPC status code by name, a stable reason, and words."""

from __future__ import annotations


class DeltamuxError(Exception):
    """Base of all errors that may reach a client.

    `code` is a gRPC status code name; `reason` is the stable UPPER_SNAKE word of
    google.rpc.ErrorInfo, the code where none is given; `retry_after` (seconds) becomes RetryInfo
    where waiting helps; `field` becomes a BadRequest field violation.
    """

    code = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        retry_after: float | None = None,
        field: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.code
        self.retry_after = retry_after
        self.field = field


class InvalidArgument(DeltamuxError):
    """Wrong whatever the server's state."""

    code = "INVALID_ARGUMENT"


class FailedPrecondition(DeltamuxError):
    """Sound, but not with this base model or configuration, or the stored adapter is unfit."""

    code = "FAILED_PRECONDITION"


class NotFound(DeltamuxError):
    """Unknown, or not the caller's."""

    code = "NOT_FOUND"


class AlreadyExists(DeltamuxError):
    """The name or id is taken."""

    code = "ALREADY_EXISTS"


class Aborted(DeltamuxError):
    """The state changed while the call was under way."""

    code = "ABORTED"


class ResourceExhausted(DeltamuxError):
    """A queue, a quota or a size is exceeded; `retry_after` only where waiting helps."""

    code = "RESOURCE_EXHAUSTED"


class Unavailable(DeltamuxError):
    """The server cannot serve now: starting, restarting, draining."""

    code = "UNAVAILABLE"


class DataLoss(DeltamuxError):
    """Stored bytes do not match their digest."""

    code = "DATA_LOSS"


class DeadlineExceeded(DeltamuxError):
    """The deadline passed, or cannot be met."""

    code = "DEADLINE_EXCEEDED"


class Cancelled(DeltamuxError):
    """The client, or an Abort call, ended the request."""

    code = "CANCELLED"


class Unimplemented(DeltamuxError):
    """Part of the contract that this server does not serve."""

    code = "UNIMPLEMENTED"


class Internal(DeltamuxError):
    """A bug of deltamux itself."""


class StartupError(DeltamuxError):
    """The server cannot start; the command line prints the message alone."""


def first_line(error: BaseException) -> str:
    """What the error of a library says at first; its kind too, where that may be a name alone."""
    kind, lines = type(error).__name__, str(error).strip().splitlines()
    if not lines:
        return kind
    if lines[0].endswith(":") and len(lines) > 1:
        return f"{lines[0]} {lines[1].strip()}"
    speaks = isinstance(error, OSError | ValueError | RuntimeError | AssertionError)
    return lines[0] if speaks else f"{kind}: {lines[0]}"


def from_code(
    code: str,
    reason: str,
    message: str,
    retry_after: float | None = None,
    field: str | None = None,
) -> DeltamuxError:
    """The error of this code that has crossed a process boundary."""
    kind = _BY_CODE.get(code, Internal)
    return kind(message, reason=reason, retry_after=retry_after, field=field)


_BY_CODE: dict[str, type[DeltamuxError]] = {
    kind.code: kind
    for kind in (
        InvalidArgument,
        FailedPrecondition,
        NotFound,
        AlreadyExists,
        Aborted,
        ResourceExhausted,
        Unavailable,
        DataLoss,
        DeadlineExceeded,
        Cancelled,
        Unimplemented,
        Internal,
    )
}
