"""Names, sources and versions: what is known, without doing anything about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from deltamux.errors import AlreadyExists, InvalidArgument
from deltamux.store.catalog.facts import TIERS, AdapterFacts, facts
from deltamux.store.catalog.records import Registration, Version
from deltamux.store.catalog.reference import Reference, check_name


class Registry:
    """All registrations by name."""

    def __init__(self) -> None:
        self._names: dict[str, Registration] = {}

    def __contains__(self, registration: Registration) -> bool:
        return self._names.get(registration.name) is registration

    def register(self, name: str, source: str) -> None:
        """Makes `name` known; raises AlreadyExists if it is, with another source."""
        check_name(name)
        known = self._names.setdefault(name, Registration(name, source))
        if known.source != source:
            raise AlreadyExists(f"adapter {name!r} has another source", reason="ADAPTER_EXISTS")

    @contextmanager
    def entered(self, name: str, source: str) -> Iterator[Registration]:
        """The registration of `name`; one made for the occasion goes again on an error."""
        known = name in self._names
        registration = self._names.setdefault(name, Registration(name, source))
        try:
            yield registration
        except BaseException:
            if not known:
                del self._names[name]
            raise

    def remove(self, name: str) -> None:
        del self._names[name]

    def get(self, name: str) -> Registration | None:
        return self._names.get(name)

    def registration(self, wanted: Reference) -> Registration:
        """Raises NotFound."""
        registration = self._names.get(wanted.name)
        if registration is None:
            raise wanted.not_found()
        return registration

    def find(self, wanted: Reference) -> Version | None:
        """The version that is meant; None while the source of its name has not been read.

        Raises NotFound, or InvalidArgument if the beginning of a digest fits several.
        """
        registration = self.registration(wanted)
        if registration.live is None or not wanted.version:
            return registration.live
        matches = [v for d, v in registration.versions.items() if d.startswith(wanted.version)]
        if len(matches) > 1:
            raise InvalidArgument(
                f"{str(wanted)!r} may mean {len(matches)} versions",
                reason="AMBIGUOUS_ADAPTER_VERSION",
                field=wanted.field,
            )
        if not matches:
            raise wanted.not_found()
        return matches[0]

    def page(
        self, page_size: int, page_token: str, at_least: str
    ) -> tuple[list[AdapterFacts], str]:
        """Up to `page_size` > 0 versions at a tier or closer, and the token of the next page."""
        near = TIERS[TIERS.index(at_least) :]
        name, _, digest = page_token.partition("@")
        rows = [
            facts(registration, version)
            for registration in self._names.values()
            for version in registration.versions.values() or [None]
        ]
        rows = [r for r in rows if r.tier in near and (r.name, r.version) > (name, digest)]
        rows.sort(key=lambda row: (row.name, row.version))
        page = rows[:page_size]
        return page, f"{page[-1].name}@{page[-1].version}" if len(rows) > len(page) else ""
