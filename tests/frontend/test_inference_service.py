"""Generate as a client sees it, over a real connection."""

from __future__ import annotations

import asyncio
from dataclasses import replace

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


@pytest.fixture
def ids(reference):
    """Text to token ids, by transformers."""
    return lambda text: reference.encode(text, add_special_tokens=False)


def request_of(text: str = "hi", **fields: object) -> v1.GenerateRequest:
    fields.setdefault("stopping", v1.StoppingCriteria(max_tokens=64))
    return v1.GenerateRequest(text=text, **fields)


def text_of(messages: list[v1.GenerateResponse], index: int = 0) -> str:
    return "".join(message.text for message in messages if message.index == index)


async def test_a_stream_has_all_that_the_contract_promises(harness, ids) -> None:
    call = asyncio.create_task(harness.collect(request_of("hello", request_id="r1")))
    submit = await harness.engine.receive(Submit)
    assert list(submit.prompt) == ids("hello")
    for text in "abc":
        harness.engine.say(submit, ids(text), first=BASE if text == "a" else None)
    harness.engine.say(submit, ids("d"), finish="length")
    messages = await call
    assert text_of(messages) == "abcd"
    assert {message.request_id for message in messages} == {"r1"}
    assert [message.HasField("served_by") for message in messages].index(True) == 0
    assert messages[0].served_by == v1.ServedBy(model="tiny")
    assert sum(message.HasField("finish") for message in messages) == 1
    last = messages[-1]
    assert last.finish.reason == v1.Finish.REASON_LENGTH
    assert last.usage == v1.Usage(prompt_tokens=5, completion_tokens=4, cached_prompt_tokens=2)
    assert (last.timing.queue, last.timing.adapter_load) == (0.5, 0.25)
    assert 0 < last.timing.first_token <= last.timing.total
    assert not any(message.token_ids or message.logprobs for message in messages)


async def test_a_missing_request_id_is_minted(harness) -> None:
    harness.engine.answer_all()
    first, second = await harness.collect(request_of()), await harness.collect(request_of())
    assert first[0].request_id and first[0].request_id != second[0].request_id


async def test_every_field_reaches_the_engine(harness) -> None:
    request = request_of(
        sampling=v1.SamplingParams(
            temperature=0.5,
            top_p=0.75,
            top_k=7,
            min_p=0.25,
            repetition_penalty=1.5,
            presence_penalty=-0.5,
            frequency_penalty=0.125,
            seed=2**63 - 1,
            n=3,
            logit_bias={5: -2.0},
        ),
        stopping=v1.StoppingCriteria(max_tokens=9, min_tokens=2, stop_token_ids=[7, 8]),
        output=v1.OutputOptions(logprobs=4),
        priority=-3,
    )
    call = harness.inference.Generate(request, timeout=20)
    submit = await harness.engine.receive(Submit)
    call.cancel()
    sampling = submit.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.75, 7)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.25, 1.5)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (-0.5, 0.125)
    assert (sampling.seed, sampling.logit_bias, sampling.logprobs) == (2**63 - 1, {5: -2.0}, 4)
    assert (submit.stopping.max_tokens, submit.stopping.min_tokens) == (9, 2)
    assert submit.stopping.stop_token_ids == (7, 8, 1)
    assert (submit.n, submit.priority, submit.adapter, submit.adapter_path) == (3, -3, "", "")
    # gRPC rounds the time up on its way.
    assert 0 < submit.deadline <= 21


async def test_open_fields_take_the_models_defaults_and_the_rest_of_the_context(harness) -> None:
    call = harness.inference.Generate(v1.GenerateRequest(text="hi"))
    submit = await harness.engine.receive(Submit)
    call.cancel()
    assert submit.stopping.max_tokens == 2048 - 2
    assert submit.stopping.stop_token_ids == (1,)
    assert submit.sampling.temperature == 0 and submit.sampling.seed is None
    assert submit.sampling.logprobs is None
    assert 590 < submit.deadline <= 600


async def test_ignore_eos_leaves_only_the_clients_own_stop_tokens(harness) -> None:
    stopping = v1.StoppingCriteria(max_tokens=4, ignore_eos=True, stop_token_ids=[9])
    call = harness.inference.Generate(request_of(stopping=stopping))
    submit = await harness.engine.receive(Submit)
    call.cancel()
    assert submit.stopping.stop_token_ids == (9,)


async def test_token_ids_and_chats_are_prompts_too(harness, reference) -> None:
    harness.engine.answer_all()
    given = v1.GenerateRequest(
        token_ids=v1.TokenIds(ids=[5, 6, 7]), output=v1.OutputOptions(return_token_ids=True)
    )
    assert [i for message in await harness.collect(given) for i in message.token_ids] == [5, 6, 7]
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": " hé "}]
    chat = v1.Chat(messages=[v1.Chat.Message(**turn) for turn in turns])
    wanted = v1.GenerateRequest(
        chat=chat, output=v1.OutputOptions(return_token_ids=True, skip_special_tokens=False)
    )
    messages = await harness.collect(wanted)
    oracle = reference.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert [i for message in messages for i in message.token_ids] == oracle
    assert text_of(messages) == reference.decode(oracle)


async def test_choices_are_told_apart_and_the_cost_comes_last(harness, ids) -> None:
    call = asyncio.create_task(harness.collect(request_of("p", sampling=v1.SamplingParams(n=3))))
    submit = await harness.engine.receive(Submit)
    for index, text in ((1, "one"), (0, "zero"), (2, "two")):
        harness.engine.say(submit, ids(text), index=index, first=BASE)
    for index, end in ((2, "!"), (0, "?"), (1, ".")):
        harness.engine.say(submit, ids(end), index=index, finish="length")
    messages = await call
    assert [text_of(messages, index) for index in range(3)] == ["zero?", "one.", "two!"]
    assert [message.HasField("usage") for message in messages].count(True) == 1
    assert messages[-1].usage.completion_tokens == 3 + 4 + 3 + 3
    assert [message.HasField("served_by") for message in messages].count(True) == 1
    assert messages[0].HasField("served_by") and messages[-1].HasField("timing")
    assert sum(message.HasField("finish") for message in messages) == 3


async def test_echo_stands_in_front_of_the_first_choice_only(harness, ids) -> None:
    request = request_of(
        "prompt ", sampling=v1.SamplingParams(n=2), output=v1.OutputOptions(echo=True)
    )
    call = asyncio.create_task(harness.collect(request))
    submit = await harness.engine.receive(Submit)
    harness.engine.say(submit, ids("b"), index=1, finish="length", first=BASE)
    harness.engine.say(submit, ids("a"), index=0, finish="length", first=BASE)
    messages = await call
    assert text_of(messages, 0) == "prompt a" and text_of(messages, 1) == "b"


async def test_logprobs_carry_the_tokens_text(harness, ids) -> None:
    request = request_of(output=v1.OutputOptions(logprobs=2, return_token_ids=True))
    call = asyncio.create_task(harness.collect(request))
    submit = await harness.engine.receive(Submit)
    a, b, end = *ids("ab"), 1
    logprobs = TokenLogprobs(Logprob(a, -0.5), (Logprob(a, -0.5), Logprob(b, -1.5)))
    harness.engine.say(submit, [a], logprobs=(logprobs,), first=BASE)
    ending = TokenLogprobs(Logprob(end, -0.25), (Logprob(end, -0.25),))
    harness.engine.say(submit, [end], logprobs=(ending,), finish="stop")
    messages = await call
    entries = [entry for message in messages for entry in message.logprobs]
    assert [(c.token, c.logprob) for c in entries[0].top] == [("a", -0.5), ("b", -1.5)]
    assert entries[0].chosen.token_id == a
    assert entries[1].chosen.token == "</s>"
    assert [i for message in messages for i in message.token_ids] == [a, end]
    assert text_of(messages) == "a"


@pytest.mark.parametrize("include_stop", [False, True])
async def test_a_stop_string_across_tokens_ends_its_choice_alone(
    harness, ids, include_stop: bool
) -> None:
    request = request_of(
        sampling=v1.SamplingParams(n=2),
        stopping=v1.StoppingCriteria(max_tokens=64, stop=["END", "|"], include_stop=include_stop),
    )
    call = harness.inference.Generate(request, timeout=20)
    submit = await harness.engine.receive(Submit)
    harness.engine.say(submit, ids("go E"), first=BASE)
    assert (await call.read()).text == "go "
    harness.engine.say(submit, ids("ND and more"))
    message = await call.read()
    assert message.text == ("END" if include_stop else "")
    assert message.finish == v1.Finish(reason=v1.Finish.REASON_STOP, stop="END")
    assert await harness.engine.receive(Cancel) == Cancel(submit.request_id, (0,))
    harness.engine.say(submit, ids("late"), index=0)
    harness.engine.say(submit, ids("other"), index=1, first=BASE, finish="length")
    message = await call.read()
    assert (message.index, message.text) == (1, "other")
    assert message.usage.completion_tokens == len("go END") + len("other")
    assert await call.read() == grpc.aio.EOF
    assert await call.code() == grpc.StatusCode.OK


async def test_what_a_stop_string_did_not_claim_is_shown_at_the_end(harness, ids) -> None:
    stopping = v1.StoppingCriteria(max_tokens=9, stop=["STOP"])
    call = asyncio.create_task(harness.collect(request_of(stopping=stopping)))
    submit = await harness.engine.receive(Submit)
    harness.engine.say(submit, ids("a STO"), first=BASE, finish="length")
    assert text_of(await call) == "a STO"


async def test_stop_strings_wait_for_min_tokens(harness, ids) -> None:
    stopping = v1.StoppingCriteria(max_tokens=9, min_tokens=4, stop=["x"])
    call = asyncio.create_task(harness.collect(request_of(stopping=stopping)))
    submit = await harness.engine.receive(Submit)
    harness.engine.say(submit, ids("xxabxc"), first=BASE)
    assert text_of(await call) == "xxab"


@pytest.mark.parametrize("include_stop", [False, True])
async def test_a_stop_token_is_named_and_shown_only_when_asked(
    harness, ids, include_stop: bool
) -> None:
    stopping = v1.StoppingCriteria(max_tokens=9, include_stop=include_stop)
    output = v1.OutputOptions(skip_special_tokens=False)
    call = asyncio.create_task(harness.collect(request_of(stopping=stopping, output=output)))
    submit = await harness.engine.receive(Submit)
    harness.engine.say(submit, [*ids("ok"), 1], first=BASE, finish="stop")
    messages = await call
    assert text_of(messages) == ("ok</s>" if include_stop else "ok")
    assert messages[-1].finish == v1.Finish(reason=v1.Finish.REASON_STOP, stop_token_id=1)
    assert messages[-1].usage.completion_tokens == 3


async def test_characters_are_never_cut(harness, ids) -> None:
    text = "aé→😀é😀"
    call = harness.inference.Generate(request_of(), timeout=20)
    submit = await harness.engine.receive(Submit)
    pieces: list[str] = []
    for position, token_id in enumerate(ids(text)):
        harness.engine.say(submit, [token_id], first=BASE if position == 0 else None)
    harness.engine.say(submit, ids("😀")[:3], finish="length")
    async for message in call:
        pieces.append(message.text)
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)


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
    with pytest.raises(grpc.RpcError) as caught:
        await harness.inference.Generate(request_of(), timeout=0.3).read()
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    submit = await harness.engine.receive(Submit)
    assert submit.deadline <= 0.4
    assert await harness.engine.receive(Cancel) == Cancel(submit.request_id)


class TestWithAShortDefaultDeadline:
    @pytest.fixture
    def config(self, config: FrontendConfig) -> FrontendConfig:
        return replace(config, default_deadline=0.2)

    async def test_it_applies_to_a_call_without_one(self, harness, refusal) -> None:
        got = await refusal(harness.inference.Generate(request_of()).read())
        assert (got.code, got.reason) == ("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED")
        submit = await harness.engine.receive(Submit)
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
    cancelled = None
    for _ in range(1000):
        harness.engine.say(submit, [5] * 100, logprobs=(entry,) * 100)
        await asyncio.sleep(0)
        if cancels := [m for m in harness.engine.received() if isinstance(m, Cancel)]:
            cancelled = cancels[0]
            break
    assert cancelled == Cancel(submit.request_id)
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


async def test_a_full_queue_refuses_and_says_when_to_come_back(harness, refusal) -> None:
    calls = {f"r{i}": harness.inference.Generate(request_of(request_id=f"r{i}")) for i in range(8)}
    submits = [await harness.engine.receive(Submit) for _ in calls]
    got = await refusal(harness.collect(request_of()))
    assert (got.code, got.reason) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL")
    assert got.retry_after > 0
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
    await asyncio.wait_for(idle, 10)


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


async def test_calls_are_counted_by_how_they_ended(harness, refusal) -> None:
    harness.engine.answer_all()
    await harness.collect(request_of("abc"))
    await refusal(harness.collect(request_of("")))

    def sample(name: str, **labels: str) -> float | None:
        return harness.metrics.registry.get_sample_value(name, {"model_name": "tiny", **labels})

    assert sample("deltamux_requests_total", code="OK") == 1
    assert sample("deltamux_requests_total", code="INVALID_ARGUMENT") == 1
    assert sample("deltamux_requests_in_flight") == 0
    assert sample("deltamux_prompt_tokens_total") == 3
    assert sample("deltamux_generation_tokens_total") == 3
    assert sample("deltamux_time_to_first_token_seconds_count") == 1
