"""Classify and Embed as a client sees them, over a real connection."""

from __future__ import annotations

import asyncio
from array import array
from pathlib import Path

import grpc
import pytest

from deltamux.errors import Unavailable
from deltamux.frontend import limits
from deltamux.v1 import control_pb2
from deltamux.v1 import inference_pb2 as v1
from deltamux.wire.messages import Cancel, Classify, Embed, Pooled, RequestFailed, Submit

CONTEXT, VOCABULARY = 2048, 259
VECTOR = Pooled(array("f", [0.5, -2.0, 3.0]).tobytes())
SCORES = Pooled(
    array("f", [1.0, 2.0, 3.0, 4.0]).tobytes(),
    array("f", [0.25, 0.75, 0.5, 0.5]).tobytes(),
    ("no", "yes"),
)


@pytest.fixture
async def adapter(harness, tmp_path: Path) -> str:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    harness.catalog.register("mood", str(folder))
    return "mood"


def ids(*numbers: int) -> v1.TokenIds:
    return v1.TokenIds(ids=numbers)


async def test_scores_come_with_their_labels_by_position(harness, adapter, reference) -> None:
    request = v1.ClassifyRequest(request_id="c", adapter=adapter, text="good", text_pair="bad")
    call = asyncio.ensure_future(harness.inference.Classify(request, timeout=20))
    submit = await harness.engine.receive(Submit)
    assert submit.pooling == Classify()
    assert list(submit.prompt) == reference("good", "bad").input_ids
    assert submit.adapter and Path(submit.adapter_path).name == submit.adapter
    assert (submit.n, submit.deadline > 10) == (1, True)
    harness.engine.pool(submit, SCORES, "host")
    answer = await call
    assert answer.request_id == "c"
    got = [[(s.label, s.score, s.logit) for s in p.scores] for p in answer.positions]
    assert got == [[("no", 0.25, 1.0), ("yes", 0.75, 2.0)], [("no", 0.5, 3.0), ("yes", 0.5, 4.0)]]
    assert answer.served_by == v1.ServedBy(
        model="tiny", adapter="mood", version=submit.adapter, tier=v1.TIER_HOST
    )
    assert answer.usage == v1.Usage(prompt_tokens=len(submit.prompt))


@pytest.mark.parametrize(
    ("fields", "pooling"),
    [
        ({}, Embed("last", normalize=True)),
        ({"pooling": v1.EmbedRequest.POOLING_MEAN}, Embed("mean", normalize=True)),
        ({"pooling": v1.EmbedRequest.POOLING_FIRST, "normalize": False}, Embed("first", False)),
        ({"pooling": v1.EmbedRequest.POOLING_LAST, "normalize": True}, Embed("last", True)),
    ],
)
async def test_an_embedding_is_pooled_as_asked(harness, fields, pooling) -> None:
    request = v1.EmbedRequest(token_ids=ids(5, 6, 7), **fields)
    call = asyncio.ensure_future(harness.inference.Embed(request, timeout=20))
    submit = await harness.engine.receive(Submit)
    assert (submit.pooling, submit.prompt, submit.adapter) == (pooling, (5, 6, 7), "")
    harness.engine.pool(submit, VECTOR)
    answer = await call
    assert list(answer.embedding) == [0.5, -2.0, 3.0]
    assert answer.request_id and answer.served_by == v1.ServedBy(model="tiny")
    assert answer.usage == v1.Usage(prompt_tokens=3)


async def test_a_base_that_generates_nothing_pools_the_mean_by_default(harness) -> None:
    harness.client.fail_all(Unavailable("another model"))
    await harness.restart_engine(generates=False)
    call = asyncio.ensure_future(harness.inference.Embed(v1.EmbedRequest(text="a"), timeout=20))
    submit = await harness.engine.receive(Submit)
    assert submit.pooling == Embed("mean", normalize=True)
    harness.engine.pool(submit, VECTOR)
    await call


INVALID = "INVALID_ARGUMENT"
BAD: dict[str, tuple[dict[str, object], str, str]] = {
    "no input": ({}, INVALID, "input"),
    "empty text": ({"text": ""}, INVALID, "text"),
    "no tokens": ({"token_ids": ids()}, INVALID, "token_ids"),
    "a token beyond any vocabulary": ({"token_ids": ids(1 << 31)}, INVALID, "token_ids"),
    "too many tokens": ({"token_ids": ids(*[5] * (CONTEXT + 1))}, "PROMPT_TOO_LONG", "token_ids"),
    "text over the context": ({"text": "a" * (CONTEXT + 1)}, "PROMPT_TOO_LONG", "text"),
    "text over the characters": (
        {"text": "a" * (limits.MAX_PROMPT_CHARACTERS + 1)},
        "PROMPT_TOO_LONG",
        "text",
    ),
    "a bad request id": ({"text": "a", "request_id": "a b"}, "REQUEST_ID_INVALID", "request_id"),
    "a path": ({"text": "a", "adapter": "../mood"}, "INVALID_ADAPTER_NAME", "adapter"),
}


@pytest.mark.parametrize("name", BAD)
async def test_bad_requests_are_refused_before_the_engine_hears_of_them(
    harness, adapter, refusal, name: str
) -> None:
    fields, reason, field = BAD[name]
    for call in (
        harness.inference.Classify(v1.ClassifyRequest(**{"adapter": adapter, **fields})),
        harness.inference.Embed(v1.EmbedRequest(**{"adapter": adapter, **fields})),
    ):
        got = await refusal(call)
        assert (got.code, got.reason, got.fields) == ("INVALID_ARGUMENT", reason, (field,))
    assert not [m for m in harness.engine.received() if isinstance(m, Submit)]


async def test_fields_of_one_call_only_are_checked_too(harness, adapter, refusal) -> None:
    pair = v1.ClassifyRequest(adapter=adapter, token_ids=ids(5), text_pair="b")
    half = "a" * (limits.MAX_PROMPT_CHARACTERS // 2 + 1)
    long = v1.ClassifyRequest(adapter=adapter, text=half, text_pair=half)
    for call, wanted in (
        (harness.inference.Classify(pair), (INVALID, "text_pair")),
        (harness.inference.Classify(long), ("PROMPT_TOO_LONG", "text_pair")),
        (harness.inference.Embed(v1.EmbedRequest(text="a", pooling=9)), (INVALID, "pooling")),
        # An adapter may have it, as the engine knows; the base does not.
        (
            harness.inference.Embed(v1.EmbedRequest(token_ids=ids(VOCABULARY))),
            (INVALID, "token_ids"),
        ),
    ):
        got = await refusal(call)
        assert (got.code, got.reason, *got.fields) == ("INVALID_ARGUMENT", *wanted)


async def test_a_prompt_may_fill_the_context(harness) -> None:
    request = v1.EmbedRequest(token_ids=ids(*[5] * CONTEXT))
    call = asyncio.ensure_future(harness.inference.Embed(request, timeout=20))
    submit = await harness.engine.receive(Submit)
    assert len(submit.prompt) == CONTEXT
    harness.engine.pool(submit, VECTOR)
    await call


async def test_the_base_has_no_task_head(harness, refusal) -> None:
    got = await refusal(harness.inference.Classify(v1.ClassifyRequest(text="a")))
    assert (got.code, got.reason) == ("FAILED_PRECONDITION", "NO_TASK_HEAD")


async def test_the_engines_refusal_reaches_the_client(harness, refusal) -> None:
    call = harness.inference.Embed(v1.EmbedRequest(text="a"), timeout=20)
    submit = await harness.engine.receive(Submit)
    harness.engine.send(RequestFailed(submit.request_id, "FAILED_PRECONDITION", "R", "words"))
    got = await refusal(call)
    assert (got.code, got.reason, got.message) == ("FAILED_PRECONDITION", "R", "words")


async def test_scores_that_fit_no_response_are_an_error(harness, adapter, refusal) -> None:
    request = v1.ClassifyRequest(adapter=adapter, token_ids=ids(5), request_id="big")
    call = harness.inference.Classify(request, timeout=20)
    submit = await harness.engine.receive(Submit)
    numbers = bytes(limits.MAX_RESPONSE_BYTES // 4)
    harness.engine.pool(submit, Pooled(numbers, numbers, ("a", "b")))
    got = await refusal(call)
    assert (got.code, got.reason) == ("RESOURCE_EXHAUSTED", "RESPONSE_TOO_LARGE")


async def test_a_client_that_leaves_ends_the_request_in_the_engine(harness) -> None:
    call = harness.inference.Embed(v1.EmbedRequest(text="a"), timeout=20)
    submit = await harness.engine.receive(Submit)
    call.cancel()
    assert (await harness.engine.receive(Cancel)).request_id == submit.request_id


async def test_abort_and_deadline_end_the_call(harness, refusal) -> None:
    aborted = harness.inference.Embed(v1.EmbedRequest(text="a", request_id="x"), timeout=20)
    await harness.engine.receive(Submit)
    await harness.control.Abort(control_pb2.AbortRequest(request_ids=["x"]))
    assert (await refusal(aborted)).reason == "ABORTED_BY_CALL"
    late = harness.inference.Embed(v1.EmbedRequest(text="a"), timeout=0.05)
    with pytest.raises(grpc.RpcError) as caught:
        await late
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED


async def test_pooled_calls_are_counted(harness) -> None:
    call = asyncio.ensure_future(harness.inference.Embed(v1.EmbedRequest(text="abc"), timeout=20))
    harness.engine.pool(await harness.engine.receive(Submit), VECTOR)
    await call

    assert harness.sample("requests_total", code="OK") == 1
    assert harness.sample("prompt_tokens_total") == 3
    assert harness.sample("generation_tokens_total") == 0
    assert harness.sample("request_queue_seconds_sum") == 0.25
    assert harness.sample("time_to_first_token_seconds_count") == 0
