"""Any server with OpenAI's completions over HTTP that names adapters in `model`, as vLLM does."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2

from deltamux.bench.backend import BackendError, Progress
from deltamux.bench.workload import PlannedRequest

_DONE = "[DONE]"


class OpenAIBackend:
    name = "openai"

    def __init__(self, target: str, vocab_size: int) -> None:
        """`target` is HOST:PORT or a URL before /v1; the protocol tells no `vocab_size`."""
        url = target if "://" in target else f"http://{target}"
        # Requests are open loop: none may wait here for another's connection.
        unlimited = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        self._client = httpx2.AsyncClient(base_url=url, timeout=None, limits=unlimited)
        self._vocab_size = vocab_size
        # By name, what each was trained on; nothing for a base.
        self._parents: dict[str, Any] | None = None

    async def vocab_size(self) -> int:
        return self._vocab_size

    async def adapters(self) -> tuple[str, ...]:
        return tuple(name for name, parent in (await self._served()).items() if parent)

    async def generate(self, request: PlannedRequest) -> AsyncIterator[Progress]:
        """A server that counts in each message is believed; else a message with text is a token."""
        body = await self._body(request)
        seen = 0
        try:
            async with self._client.stream("POST", "/v1/completions", json=body) as response:
                await _raise_for_status(response)
                async for data in _events(response):
                    if data == _DONE:
                        return
                    tokens = _tokens(json.loads(data), seen)
                    yield Progress(tokens - seen)
                    seen = tokens
        except httpx2.TransportError as error:
            raise BackendError(type(error).__name__, str(error)) from None
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise BackendError("MALFORMED", f"an event is none of a completion: {error}") from None
        raise BackendError("INCOMPLETE", "the answer ended without [DONE]")

    async def aclose(self) -> None:
        await self._client.aclose()

    async def _body(self, request: PlannedRequest) -> dict[str, Any]:
        return {
            "model": request.adapter or await self._base(),
            "prompt": list(request.prompt),
            "max_tokens": request.max_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }

    async def _base(self) -> str:
        for name, parent in (await self._served()).items():
            if not parent:
                return name
        raise BackendError("NO_BASE", "/v1/models names no model without a parent")

    async def _served(self) -> dict[str, Any]:
        if self._parents is None:
            try:
                response = await self._client.get("/v1/models")
            except httpx2.TransportError as error:
                raise BackendError(type(error).__name__, str(error)) from None
            await _raise_for_status(response)
            try:
                models = response.json()["data"]
                self._parents = {str(model["id"]): model.get("parent") for model in models}
            except (KeyError, TypeError, ValueError):
                raise BackendError("MALFORMED", "/v1/models lists no models") from None
        return self._parents


async def _events(response: httpx2.Response) -> AsyncIterator[str]:
    """The data of each server-sent event, which is one line here."""
    async for line in response.aiter_lines():
        if line.startswith("data:"):
            yield line.removeprefix("data:").strip()


async def _raise_for_status(response: httpx2.Response) -> None:
    if not response.is_success:
        body = (await response.aread()).decode(errors="replace")
        raise BackendError(f"HTTP {response.status_code}", body)


def _tokens(event: dict[str, Any], seen: int) -> int:
    """How many the answer has after this event."""
    if error := event.get("error"):
        raise BackendError(f"HTTP {error.get('code')}", str(error.get("message")))
    if usage := event.get("usage"):
        return int(usage["completion_tokens"])
    return seen + any(choice["text"] for choice in event["choices"])
