"""Which adapters of a server a load can ask: those that generate."""

from __future__ import annotations

from deltamux.client import Client, ClientError
from deltamux.v1 import adapters_pb2


def generating(client: Client) -> tuple[str, ...]:
    """Names of the server's adapters that answer Generate; raises ClientError.

    What an adapter was trained for is known once it was read, so those that nobody has used yet
    are loaded, up to host memory. One that cannot be loaded is asked too: it fails, and counts.
    """
    live = [adapter for adapter in client.list_adapters() if adapter.live]
    return tuple(adapter.name for adapter in live if _generates(client, adapter))


def _generates(client: Client, adapter: adapters_pb2.Adapter) -> bool:
    if adapter.task:
        return adapter.task == "generation"
    try:
        loaded = client.load_adapter(adapter.name, adapter.source, upto="host")
    except ClientError:
        return True
    return loaded.task == "generation"
