"""The responses of a Generate call, added up."""

from __future__ import annotations

from collections.abc import Iterable
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


def added_up(responses: Iterable[inference_pb2.GenerateResponse]) -> Answer:
    """The first choice of a stream."""
    text: list[str] = []
    token_ids: list[int] = []
    finish = ""
    # Each is in one of the responses; to merge what is absent changes nothing.
    served_by, usage = inference_pb2.ServedBy(), inference_pb2.Usage()
    timing = inference_pb2.Timing()
    for response in responses:
        if response.index == 0:
            text.append(response.text)
            token_ids.extend(response.token_ids)
            if response.HasField("finish"):
                reason = inference_pb2.Finish.Reason.Name(response.finish.reason)
                finish = reason.removeprefix("REASON_").lower()
        served_by.MergeFrom(response.served_by)
        usage.MergeFrom(response.usage)
        timing.MergeFrom(response.timing)
    return Answer(
        text="".join(text),
        token_ids=tuple(token_ids),
        finish=finish,
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        served_by=served_by,
        timing=timing,
    )
