"""AdapterService: the life of adapters, as the catalog keeps it."""

from __future__ import annotations

import re
from dataclasses import asdict

import grpc
from structlog.contextvars import bind_contextvars

from deltamux.errors import Unimplemented
from deltamux.frontend import limits, tiers
from deltamux.frontend.deadline import deadline
from deltamux.frontend.printable import printable
from deltamux.frontend.validation import check, invalid
from deltamux.store.catalog.catalog import Catalog
from deltamux.store.catalog.facts import AdapterFacts
from deltamux.store.catalog.reference import check_name
from deltamux.v1 import adapters_pb2 as v1
from deltamux.v1 import adapters_pb2_grpc, inference_pb2

DIGEST = re.compile(r"[0-9a-f]{64}")
# What comes before the colon of a URL; a folder's path may hold colons further on.
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


class AdapterService(adapters_pb2_grpc.AdapterServiceServicer):
    """Checks what an operator asks, passes it to the catalog and says what became of it."""

    def __init__(self, catalog: Catalog, default_deadline: float) -> None:
        """`default_deadline`: seconds for a call that brings no deadline."""
        self._catalog = catalog
        self._default_deadline = default_deadline

    async def LoadAdapter(
        self, request: v1.LoadAdapterRequest, context: grpc.aio.ServicerContext
    ) -> v1.LoadAdapterResponse:
        bind_contextvars(adapter=printable(request.name))
        _check_load(request)
        async with deadline(context, self._default_deadline):
            loaded = await self._catalog.load(
                request.name,
                request.source,
                upto=_tier_name("upto", request.upto, "device"),
                pinned=request.pinned,
                expect_version=request.expect_version,
            )
        bind_contextvars(version=loaded.facts.version)
        return v1.LoadAdapterResponse(
            adapter=_adapter(loaded.facts), already_loaded=loaded.already_loaded
        )

    async def UnloadAdapter(
        self, request: v1.UnloadAdapterRequest, context: grpc.aio.ServicerContext
    ) -> v1.UnloadAdapterResponse:
        bind_contextvars(adapter=printable(request.name))
        async with deadline(context, self._default_deadline):
            await self._catalog.unload(request.name, request.purge)
        return v1.UnloadAdapterResponse()

    async def GetAdapter(
        self, request: v1.GetAdapterRequest, context: grpc.aio.ServicerContext
    ) -> v1.GetAdapterResponse:
        bind_contextvars(adapter=printable(request.name))
        return v1.GetAdapterResponse(adapter=_adapter(self._catalog.get(request.name)))

    async def ListAdapters(
        self, request: v1.ListAdaptersRequest, context: grpc.aio.ServicerContext
    ) -> v1.ListAdaptersResponse:
        _check_page_token(request.page_token)
        size = min(request.page_size or limits.DEFAULT_PAGE_SIZE, limits.MAX_PAGE_SIZE)
        at_least = _tier_name("at_least", request.at_least, "remote")
        rows, token = self._catalog.page(size, request.page_token, at_least)
        return v1.ListAdaptersResponse(adapters=map(_adapter, rows), next_page_token=token)

    async def UpdateAdapter(
        self, request: v1.UpdateAdapterRequest, context: grpc.aio.ServicerContext
    ) -> v1.UpdateAdapterResponse:
        bind_contextvars(adapter=printable(request.name))
        _refuse_tenant(request.HasField("tenant"))
        if request.traffic:
            raise Unimplemented("traffic shares are not served", reason="TRAFFIC")
        async with deadline(context, self._default_deadline):
            if request.HasField("pinned"):
                facts = await self._catalog.pin(request.name, request.pinned)
            else:
                facts = self._catalog.get(request.name)
        return v1.UpdateAdapterResponse(adapter=_adapter(facts))


def _check_load(request: v1.LoadAdapterRequest) -> None:
    check_name(request.name, "name")
    _refuse_tenant(bool(request.tenant))
    _check_source(request.source)
    device = request.upto in (inference_pb2.TIER_UNSPECIFIED, inference_pb2.TIER_DEVICE)
    check(request.upto != inference_pb2.TIER_REMOTE, "upto", "must be disk, host or device")
    check(device or not request.pinned, "pinned", "only an adapter on the device can be pinned")
    digest = request.expect_version
    check(not digest or bool(DIGEST.fullmatch(digest)), "expect_version", "must be a digest")


def _check_source(source: str) -> None:
    check(bool(source), "source", "the folder of the adapter's files is needed")
    check(len(source) <= limits.MAX_SOURCE, "source", f"at most {limits.MAX_SOURCE} characters")
    check(source.isprintable(), "source", "holds characters that cannot be printed")
    if SCHEME.match(source):
        raise invalid("source", "only folders of this machine are served", "SOURCE_NOT_ALLOWED")


def _refuse_tenant(given: bool) -> None:
    if given:
        raise Unimplemented("tenants are not served", reason="TENANT")


def _check_page_token(token: str) -> None:
    name, _, digest = token.partition("@")
    sound = bool(name) and (not digest or bool(DIGEST.fullmatch(digest)))
    check(not token or sound, "page_token", "is none of ListAdapters' own")


def _tier_name(field: str, tier: int, default: str) -> str:
    """The catalog's word for a tier; raises InvalidArgument for a number that names none."""
    if tier not in tiers.NAMES:
        raise invalid(field, "is no tier")
    return tiers.NAMES[tier] or default


def _adapter(facts: AdapterFacts) -> v1.Adapter:
    fields = asdict(facts)
    fields["tier"] = tiers.NUMBERS[facts.tier]
    return v1.Adapter(**fields)
