"""How a call ends before it has answered: clients that go, engines that die, refusals."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from deltamux.config import FrontendConfig
from deltamux.errors import Unavailable
from deltamux.frontend.limits import MAX_UNREAD_TOKENS
from deltamux.v1 import control_pb2
from deltamux.v1 import inference_pb2 as v1
from deltamux.wire.messages import (
    Cancel,
    FirstToken,
    Logprob,
    RequestFailed,
    Submit,
    TokenLogprobs,
)

BASE = FirstToken(0.5, 0.25, "", cached_prompt_tokens=2)


def request_of(text: str = "hi", **fields: object) -> v1.GenerateRequest:
    fields.setdefault("stopping", v1.StoppingCriteria(max_tokens=64))
    return v1.GenerateRequest(text=text, **fields)


def text_of(messages: list[v1.GenerateResponse], index: int = 0) -> str:
    return "".join(message.text for message in messages if message.index == index)


async def test_a_client_that_leaves_frees_its_request(harness, ids) -> None:
    call = harness.inference.Generate(request_of(request_id="again"))
    submit = await harness.engine.receive(Submit)
    call.cancel()
    assert await harness.engine.receive(Cancel) == Cancel(submit.request_id)
    # The id is free again, and what the engine still says of the old request reaches nobody.
    task = asyncio.create_task(harness.collect(request_of(request_id="again")))
    second = await harness.engine.receive(Submit)
    harness.engine.say(submit, ids("stale"), first=BASE, finish="length")
    harness.engine.say(second, ids("fresh"), first=BASE, finish="length")
    assert text_of(await task) == "fresh"


async def test_a_finished_request_is_not_cancelled(harness) -> None:
    harness.engine.answer_all()
    await harness.collect(request_of())
    assert not [m for m in harness.engine.received() if isinstance(m, Cancel)]


async def test_the_deadline_ends_a_request_here_and_in_the_engine(harness) -> None:
    # One that passes before the engine has heard of the request would show nothing.
    for seconds in (0.3, 3, 30):
        call = harness.inference.Generate(request_of(), timeout=seconds)
        with pytest.raises(grpc.RpcError) as caught:
            await call.read()
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        if harness.engine.received():
            break
    submit = await harness.engine.receive(Submit)
    assert submit.deadline <= seconds + 0.1
    assert await harness.engine.receive(Cancel) == Cancel(submit.request_id)


async def test_a_call_without_a_deadline_has_the_servers(
    harness, config: FrontendConfig, refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = asyncio.ensure_future(harness.inference.Generate(request_of()).read())
    submit = await harness.engine.receive(Submit)
    loop = asyncio.get_running_loop()
    now = loop.time
    monkeypatch.setattr(loop, "time", lambda: now() + config.default_deadline)
    got = await refusal(call)
    assert (got.code, got.reason) == ("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED")
    assert await harness.engine.receive(Cancel) == Cancel(submit.request_id)


async def test_abort_ends_a_request_with_what_it_had(harness, ids, refusal) -> None:
    call = harness.inference.Generate(request_of(request_id="r", sampling={"n": 2}), timeout=20)
    submit = await harness.engine.receive(Submit)
    harness.engine.say(submit, ids("part"), first=BASE)
    assert (await call.read()).text == "part"
    await harness.control.Abort(control_pb2.AbortRequest(request_ids=["r", "unknown"]))
    endings = [await call.read(), await call.read()]
    assert [e.finish.reason for e in endings] == [v1.Finish.REASON_CANCELLED] * 2
    assert endings[-1].usage.completion_tokens == 4
    got = await refusal(call.read())
    assert (got.code, got.reason) == ("CANCELLED", "ABORTED_BY_CALL")
    assert await harness.engine.receive(Cancel) == Cancel(submit.request_id)


async def test_a_client_that_stops_reading_is_cut_off_alone(harness, ids, refusal) -> None:
    stalled = harness.inference.Generate(
        request_of(output=v1.OutputOptions(return_token_ids=True, logprobs=20)), timeout=20
    )
    submit = await harness.engine.receive(Submit)
    entry = TokenLogprobs(Logprob(5, -1.0), (Logprob(5, -1.0),) * 20)
    for _ in range(1000):
        harness.engine.say(submit, [5] * 100, logprobs=(entry,) * 100)
        await asyncio.sleep(0)
        if harness.engine.received():
            break
    assert await harness.engine.receive(Cancel) == Cancel(submit.request_id)
    harness.engine.received().clear()
    harness.engine.answer_all()
    assert text_of(await harness.collect(request_of("fine"))) == "fine"

    async def drained() -> None:
        async for _ in stalled:
            pass

    got = await refusal(drained())
    assert (got.code, got.reason) == ("RESOURCE_EXHAUSTED", "SLOW_CONSUMER")
    assert str(MAX_UNREAD_TOKENS) in got.message


async def test_an_engine_that_dies_ends_its_calls_and_the_next_one_serves(
    harness, ids, refusal
) -> None:
    begun = harness.inference.Generate(request_of("a"), timeout=20)
    submit = await harness.engine.receive(Submit)
    harness.engine.say(submit, ids("part"), first=BASE)
    assert (await begun.read()).text == "part"
    waiting = harness.inference.Generate(request_of("b"), timeout=20)
    await harness.engine.receive(Submit)
    harness.client.fail_all(Unavailable("the engine died", reason="ENGINE_LOST", retry_after=1.0))
    for call in (begun, waiting):
        got = await refusal(call.read())
        assert (got.code, got.reason, got.retry_after) == ("UNAVAILABLE", "ENGINE_LOST", 1.0)
    got = await refusal(harness.collect(request_of()))
    assert (got.code, got.reason) == ("UNAVAILABLE", "ENGINE_NOT_READY")
    assert got.retry_after > 0
    await harness.restart_engine()
    harness.engine.answer_all()
    assert text_of(await harness.collect(request_of("back"))) == "back"


async def test_an_error_of_the_engine_reaches_its_client_alone(harness, refusal) -> None:
    bad = asyncio.create_task(harness.collect(request_of("bad")))
    submit = await harness.engine.receive(Submit)
    good = asyncio.create_task(harness.collect(request_of("good")))
    harness.engine.answer_all()
    harness.engine.send(
        RequestFailed(submit.request_id, "FAILED_PRECONDITION", "NON_FINITE", "not finite")
    )
    got = await refusal(bad)
    assert (got.code, got.reason, got.message) == (
        "FAILED_PRECONDITION",
        "NON_FINITE",
        "not finite",
    )
    assert text_of(await good) == "good"
    assert not [m for m in harness.engine.received() if isinstance(m, Cancel)]
    assert harness.sample("prompt_tokens_total") == len("good")


async def test_a_full_queue_refuses_and_says_when_to_come_back(harness, refusal) -> None:
    calls = {f"r{i}": harness.inference.Generate(request_of(request_id=f"r{i}")) for i in range(8)}
    submits = [await harness.engine.receive(Submit) for _ in calls]
    got = await refusal(harness.collect(request_of()))
    assert (got.code, got.reason) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL")
    assert got.retry_after > 0 and got.quotas == ("max-waiting-requests",)
    # One that has begun waits no longer.
    harness.engine.say(submits[0], [5], first=BASE)
    await calls[submits[0].request_id.partition("#")[0]].read()
    calls["next"] = harness.inference.Generate(request_of())
    await harness.engine.receive(Submit)
    for call in calls.values():
        call.cancel()


async def test_an_id_in_flight_is_taken(harness, refusal) -> None:
    call = harness.inference.Generate(request_of(request_id="taken"))
    await harness.engine.receive(Submit)
    got = await refusal(harness.collect(request_of(request_id="taken")))
    assert (got.code, got.reason) == ("ALREADY_EXISTS", "REQUEST_IN_FLIGHT")
    call.cancel()


async def test_draining_refuses_the_new_and_finishes_the_old(harness, ids, refusal) -> None:
    call = asyncio.create_task(harness.collect(request_of()))
    submit = await harness.engine.receive(Submit)
    harness.client.start_draining()
    got = await refusal(harness.collect(request_of()))
    assert (got.code, got.reason) == ("UNAVAILABLE", "DRAINING")
    idle = asyncio.create_task(harness.client.wait_idle())
    assert not idle.done()
    harness.engine.say(submit, ids("done"), first=BASE, finish="length")
    assert text_of(await call) == "done"
    await idle


async def test_a_base_that_generates_nothing_says_so(harness, refusal) -> None:
    harness.client.fail_all(Unavailable("another model"))
    await harness.restart_engine(generates=False)
    got = await refusal(harness.collect(request_of()))
    assert (got.code, got.reason) == ("FAILED_PRECONDITION", "NO_GENERATION")


async def test_what_is_not_served_says_so(harness, refusal) -> None:
    blend = request_of(blend=[v1.WeightedAdapter(adapter="a")])
    structured = request_of(structured=v1.StructuredOutput(json_object=True))
    for call, reason in (
        (harness.collect(blend), "BLEND"),
        (harness.collect(structured), "STRUCTURED_OUTPUT"),
    ):
        got = await refusal(call)
        assert (got.code, got.reason) == ("UNIMPLEMENTED", reason)
