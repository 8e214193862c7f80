"""The responses of a Generate call, added up."""

from __future__ import annotations

from dataclasses import dataclass

from deltamux.v1 import inference_pb2


@dataclass(frozen=True)
class Answer:
    """One choice of a request, complete."""

    text: str
    token_ids: tuple[int, ...]
    # "stop", "length" or "cancelled".
    finish: str
    prompt_tokens: int
    completion_tokens: int
    served_by: inference_pb2.ServedBy
    timing: inference_pb2.Timing


class Collected:
    """Adds up the responses of a stream."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._finish = ""
        self._usage = inference_pb2.Usage()
        self._timing = inference_pb2.Timing()
        self._served_by = inference_pb2.ServedBy()

    def add(self, response: inference_pb2.GenerateResponse) -> None:
        if response.index == 0:
            self._text.append(response.text)
            self._token_ids.extend(response.token_ids)
            if response.HasField("finish"):
                reason = inference_pb2.Finish.Reason.Name(response.finish.reason)
                self._finish = reason.removeprefix("REASON_").lower()
        if response.HasField("served_by"):
            self._served_by = response.served_by
        if response.HasField("usage"):
            self._usage = response.usage
        if response.HasField("timing"):
            self._timing = response.timing

    def complete(self) -> Answer:
        return Answer(
            text="".join(self._text),
            token_ids=tuple(self._token_ids),
            finish=self._finish,
            prompt_tokens=self._usage.prompt_tokens,
            completion_tokens=self._usage.completion_tokens,
            served_by=self._served_by,
            timing=self._timing,
        )
