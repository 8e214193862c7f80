"""Names of adapters and references to their versions: `name` or `name@version`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from deltamux.errors import InvalidArgument, NotFound

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")
# A digest, or enough of its beginning to be unique.
_VERSION = re.compile(r"[0-9a-f]{8,64}")


@dataclass(frozen=True)
class Reference:
    """`version` is a digest or its first 8 or more characters; empty means the live version."""

    name: str
    version: str = ""
    # Of the request that it stands in.
    field: str = "adapter"

    @classmethod
    def parse(cls, text: str, field: str = "adapter") -> Reference:
        """Raises InvalidArgument for what can be no reference."""
        name, at, version = text.partition("@")
        check_name(name, field)
        if at and not _VERSION.fullmatch(version):
            raise InvalidArgument(
                "a version is 64 lower-case hexadecimal characters, or at least the first 8",
                reason="INVALID_ADAPTER_VERSION",
                field=field,
            )
        return cls(name, version, field)

    def __str__(self) -> str:
        return f"{self.name}@{self.version}" if self.version else self.name

    def not_found(self) -> NotFound:
        """One text, whatever the reason why the caller cannot have it."""
        return NotFound(f"adapter {str(self)!r} is not known", reason="ADAPTER_NOT_FOUND")


def check_name(name: str, field: str = "adapter") -> None:
    """Raises InvalidArgument unless `name` may be an adapter's."""
    if not _NAME.fullmatch(name) or {".", ".."} & set(name.split("/")):
        raise InvalidArgument(
            "an adapter's name is 1 to 200 of A-Z a-z 0-9 . _ / -, begins with a letter or digit "
            "and has no segment . or ..",
            reason="INVALID_ADAPTER_NAME",
            field=field,
        )
