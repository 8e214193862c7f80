"""A small gRPC client, blocking and asyncio, over the generated stubs of `deltamux.v1`."""

from deltamux.client.answer import Answer
from deltamux.client.asynchronous import AsyncClient
from deltamux.client.blocking import DEFAULT_TARGET, Client
from deltamux.client.error import ClientError
from deltamux.client.requests import classify_request, embed_request, generate_request

__all__ = (
    "DEFAULT_TARGET",
    "Answer",
    "AsyncClient",
    "Client",
    "ClientError",
    "classify_request",
    "embed_request",
    "generate_request",
)
