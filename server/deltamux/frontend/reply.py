"""The answer to one Generate call: its choices, what served it, and what it cost."""

from __future__ import annotations

import time
from collections.abc import Iterator

from deltamux.frontend import tiers
from deltamux.frontend.choice import Choice
from deltamux.frontend.tokenizer import Prompt, Tokenizer
from deltamux.metrics import Metrics
from deltamux.v1 import inference_pb2 as v1
from deltamux.wire.messages import FirstToken, Progress


class Reply:
    """Progress in, messages for the client out."""

    def __init__(
        self,
        request: v1.GenerateRequest,
        request_id: str,
        prompt: Prompt,
        served_by: v1.ServedBy,
        tokenizer: Tokenizer,
        metrics: Metrics,
        started: float,
    ) -> None:
        """`started`: when the call arrived, on time.perf_counter's clock."""
        self._request_id = request_id
        self._prompt_tokens = len(prompt.token_ids)
        self._echo = prompt.text if request.output.echo else ""
        self._served_by: v1.ServedBy | None = served_by
        self._metrics = metrics
        self._started = started
        self._choices = [
            Choice(index, request, prompt, tokenizer) for index in range(request.sampling.n or 1)
        ]
        self._unfinished = len(self._choices)
        # When each choice's last token came.
        self._latest = [started] * len(self._choices)
        self._first: FirstToken | None = None
        self._first_seconds = 0.0

    @property
    def tokens(self) -> int:
        """Generated so far, all choices together."""
        return sum(choice.tokens for choice in self._choices)

    @property
    def finished(self) -> bool:
        return not self._unfinished

    def take(self, progress: Progress) -> v1.GenerateResponse | None:
        """The next message; None when there is nothing to say yet."""
        choice = self._choices[progress.index]
        if choice.finished:
            return None
        self._measure(progress)
        response = self._addressed(choice.take(progress))
        spoken = response.text or response.token_ids or response.logprobs
        return response if spoken or choice.finished or response.HasField("served_by") else None

    def cancelled(self) -> Iterator[v1.GenerateResponse]:
        """The last messages of the choices that still ran."""
        for choice in self._choices:
            if not choice.finished:
                yield self._addressed(choice.cancel())

    def record_tokens(self) -> None:
        """Counts the tokens of the whole call, however it ended; the prompt's if it was read."""
        self._metrics.tokens(self._prompt_tokens if self._first else 0, self.tokens)

    def _addressed(self, response: v1.GenerateResponse) -> v1.GenerateResponse:
        """Adds what the first message, the first of choice 0, and the last one carry."""
        response.request_id = self._request_id
        if self._served_by is not None:
            response.served_by.CopyFrom(self._served_by)
            self._served_by = None
        if self._echo and response.index == 0:
            response.text = self._echo + response.text
            self._echo = ""
        if response.HasField("finish"):
            self._unfinished -= 1
        if self.finished:
            response.usage.CopyFrom(self._usage())
            response.timing.CopyFrom(self._timing())
        return response

    def _measure(self, progress: Progress) -> None:
        now = time.perf_counter()
        if progress.first is not None and self._first is None:
            self._begin(progress.first, now - self._started)
        elif progress.first is None and progress.token_ids:
            gap = (now - self._latest[progress.index]) / len(progress.token_ids)
            self._metrics.inter_token(gap, len(progress.token_ids))
        self._latest[progress.index] = now

    def _begin(self, first: FirstToken, seconds: float) -> None:
        self._first, self._first_seconds = first, seconds
        self._metrics.first_token(seconds)
        self._metrics.queue(first.queue)
        if self._served_by is not None and self._served_by.adapter:
            self._served_by.tier = tiers.NUMBERS[first.tier]

    def _usage(self) -> v1.Usage:
        return v1.Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self.tokens,
            cached_prompt_tokens=self._first.cached_prompt_tokens if self._first else 0,
        )

    def _timing(self) -> v1.Timing:
        return v1.Timing(
            queue=self._first.queue if self._first else 0.0,
            adapter_load=self._first.adapter_load if self._first else 0.0,
            first_token=self._first_seconds,
            total=time.perf_counter() - self._started,
        )
