"""Every field of Generate on the real server, with transformers and PEFT as the oracle."""

from __future__ import annotations

import asyncio
import shutil
import warnings
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltamux.demo.server import Server
from deltamux.demo.tasks import weights_path
from deltamux.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    control_pb2,
    control_pb2_grpc,
    inference_pb2_grpc,
)
from deltamux.v1 import inference_pb2 as v1

BASE = weights_path() / "base"
ADAPTERS = [weights_path() / "adapters" / name for name in ("atbash", "doubled", "leet")]
NAMES = [folder.name for folder in ADAPTERS]
PROMPTS = ["the quick fox\n", "a\n", "silver moon over water\n"]
# Seconds; no test comes near it when all is well.
PATIENCE = 60.0


class Oracle:
    """The same base and adapters under transformers and PEFT."""

    def __init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(BASE)
        base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
        with warnings.catch_warnings():
            # PEFT asks transformers for an attribute by its old name.
            warnings.simplefilter("ignore", FutureWarning)
            self._model = peft.PeftModel.from_pretrained(base, ADAPTERS[0], NAMES[0])
            for folder in ADAPTERS[1:]:
                self._model.load_adapter(folder, folder.name)
        self._model.eval()

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def generate(self, prompt: list[int], adapter: str = "", **options: object) -> list[int]:
        """Greedy tokens, the one that ends them included."""
        tokens = torch.tensor([prompt])
        options = {"max_new_tokens": 40, "do_sample": False, **options}
        mask = torch.ones_like(tokens)
        with torch.inference_mode(), self._active(adapter):
            output = self._model.generate(input_ids=tokens, attention_mask=mask, **options)
        return output[0, len(prompt) :].tolist()

    def logprobs(self, tokens: list[int], adapter: str = "") -> torch.Tensor:
        """[tokens, vocabulary] of what follows each token."""
        with torch.inference_mode(), self._active(adapter):
            return self._model(torch.tensor([tokens])).logits[0].log_softmax(-1)

    def _active(self, adapter: str):
        if not adapter:
            return self._model.disable_adapter()
        self._model.set_adapter(adapter)
        return torch.inference_mode()


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    cache = tmp_path_factory.mktemp("cache")
    named = [f"--adapter={folder.name}={folder}" for folder in ADAPTERS]
    arguments = [
        "--device=cpu",
        "--threads=1",
        "--max-model-len=128",
        f"--adapter-cache-dir={cache}",
        *named,
    ]
    with Server(f"--model={BASE}", *arguments) as running:
        yield running


class Calls:
    """Stubs of one connection."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.inference = inference_pb2_grpc.InferenceServiceStub(channel)
        self.adapters = adapters_pb2_grpc.AdapterServiceStub(channel)
        self.control = control_pb2_grpc.ControlServiceStub(channel)

    async def collect(self, request: v1.GenerateRequest) -> list[v1.GenerateResponse]:
        call = self.inference.Generate(request, timeout=PATIENCE)
        return [response async for response in call]


@pytest.fixture
async def calls(server: Server) -> AsyncIterator[Calls]:
    async with grpc.aio.insecure_channel(server.target) as channel:
        yield Calls(channel)


def request_of(
    text: str = PROMPTS[0], adapter: str = "", max_tokens: int = 40, **fields: object
) -> v1.GenerateRequest:
    sampling = v1.SamplingParams(**fields.pop("sampling", {}))
    stopping = v1.StoppingCriteria(max_tokens=max_tokens, **fields.pop("stopping", {}))
    output = v1.OutputOptions(return_token_ids=True, **fields.pop("output", {}))
    return v1.GenerateRequest(
        text=text, adapter=adapter, sampling=sampling, stopping=stopping, output=output, **fields
    )


async def rest(call: grpc.aio.UnaryStreamCall) -> AsyncIterator[v1.GenerateResponse]:
    """What is left of a stream whose first message was read by hand."""
    while (message := await call.read()) is not grpc.aio.EOF:
        yield message


def ids_of(messages: list[v1.GenerateResponse], index: int = 0) -> list[int]:
    return [i for message in messages if message.index == index for i in message.token_ids]


def text_of(messages: list[v1.GenerateResponse], index: int = 0) -> str:
    return "".join(message.text for message in messages if message.index == index)


async def test_mixed_answers_are_those_of_transformers_and_peft(calls, oracle) -> None:
    pairs = [(prompt, adapter) for prompt in PROMPTS for adapter in ("", *NAMES)]
    answers = await asyncio.gather(*(calls.collect(request_of(*pair)) for pair in pairs))
    for (prompt, adapter), messages in zip(pairs, answers, strict=True):
        wanted = oracle.generate(oracle.ids(prompt), adapter)
        assert ids_of(messages) == wanted, (prompt, adapter)
        assert text_of(messages) == oracle.tokenizer.decode(wanted, skip_special_tokens=True)
        last, end = messages[-1], oracle.tokenizer.eos_token_id
        stopped = v1.Finish(reason=v1.Finish.REASON_STOP, stop_token_id=end)
        cut = v1.Finish(reason=v1.Finish.REASON_LENGTH)
        assert last.finish == (stopped if wanted[-1] == end else cut)
        assert last.usage.prompt_tokens == len(oracle.ids(prompt))
        assert last.usage.completion_tokens == len(wanted)
        assert messages[0].served_by.adapter == adapter
        assert len(messages[0].served_by.version) == (64 if adapter else 0)


async def test_token_ids_and_chats_are_prompts_too(calls, oracle) -> None:
    ids = oracle.ids(PROMPTS[0])
    by_ids = request_of()
    by_ids.token_ids.ids.extend(ids)
    assert ids_of(await calls.collect(by_ids)) == oracle.generate(ids)
    turns = [{"role": "user", "content": "blue sky"}]
    by_chat = request_of()
    by_chat.chat.CopyFrom(v1.Chat(messages=[v1.Chat.Message(**turn) for turn in turns]))
    rendered = oracle.tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    messages = await calls.collect(by_chat)
    assert messages[-1].usage.prompt_tokens == len(rendered)
    assert ids_of(messages) == oracle.generate(rendered)


@pytest.mark.parametrize("adapter", ["", NAMES[0]])
async def test_logprobs_are_those_of_a_plain_forward(calls, oracle, adapter: str) -> None:
    messages = await calls.collect(request_of(adapter=adapter, output={"logprobs": 5}))
    prompt, answer = oracle.ids(PROMPTS[0]), ids_of(messages)
    expected = oracle.logprobs(prompt + answer, adapter)[len(prompt) - 1 : -1]
    entries = [entry for message in messages for entry in message.logprobs]
    assert len(entries) == len(answer)
    for entry, token, row in zip(entries, answer, expected, strict=True):
        assert entry.chosen.token_id == token
        assert entry.chosen.logprob == pytest.approx(row[token].item(), abs=1e-4)
        assert entry.chosen.token == oracle.tokenizer.decode([token])
        top = torch.tensor([candidate.logprob for candidate in entry.top])
        torch.testing.assert_close(top, row.topk(5).values, atol=1e-4, rtol=0)


async def test_penalties_and_biases_act(calls, oracle) -> None:
    prompt = oracle.ids(PROMPTS[0])
    penalized = await calls.collect(request_of(sampling={"repetition_penalty": 1.5}))
    assert ids_of(penalized) == oracle.generate(prompt, repetition_penalty=1.5)
    letter = oracle.ids("z")[-1]
    biased = await calls.collect(request_of(max_tokens=5, sampling={"logit_bias": {letter: 100}}))
    assert ids_of(biased) == [letter] * 5
    free = request_of(max_tokens=5, sampling={"logit_bias": {letter: 30}, "presence_penalty": 2})
    assert ids_of(await calls.collect(free))[0] == letter


async def test_a_seed_gives_the_same_tokens_in_any_company(calls) -> None:
    wild = {"temperature": 3.0, "top_p": 0.95, "top_k": 100, "n": 4}
    request = request_of(sampling={**wild, "seed": 7}, stopping={"ignore_eos": True})
    alone = await calls.collect(request)
    company = [asyncio.create_task(calls.collect(request_of(PROMPTS[2], a))) for a in NAMES]
    crowded = await calls.collect(request)
    await asyncio.gather(*company)
    choices = [ids_of(alone, index) for index in range(4)]
    assert choices == [ids_of(crowded, index) for index in range(4)]
    assert len({tuple(choice) for choice in choices}) == 4
    other = await calls.collect(
        request_of(sampling={**wild, "seed": 8}, stopping={"ignore_eos": True})
    )
    assert ids_of(other, 0) != choices[0]


async def test_filters_that_leave_one_token_make_sampling_greedy(calls, oracle) -> None:
    wanted = oracle.generate(oracle.ids(PROMPTS[0]))
    for only in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        sampled = request_of(sampling={"temperature": 50.0, **only})
        assert ids_of(await calls.collect(sampled)) == wanted, only


async def test_stops_end_an_answer(calls, oracle) -> None:
    full = oracle.generate(oracle.ids(PROMPTS[0]))
    text = oracle.tokenizer.decode(full, skip_special_tokens=True)
    stop = text[4:7]
    assert len(stop) == 3, "the demo's base repeats its input"
    plain = await calls.collect(request_of(stopping={"stop": ["zzz", stop]}))
    assert text_of(plain) == text[: text.index(stop)]
    assert plain[-1].finish == v1.Finish(reason=v1.Finish.REASON_STOP, stop=stop)
    shown = await calls.collect(request_of(stopping={"stop": [stop], "include_stop": True}))
    assert text_of(shown) == text[: text.index(stop) + 3]
    token = full[3]
    by_token = await calls.collect(request_of(stopping={"stop_token_ids": [token]}))
    assert ids_of(by_token) == full[: full.index(token) + 1]
    assert by_token[-1].finish.stop_token_id == token
    late = await calls.collect(request_of(stopping={"stop_token_ids": [token], "min_tokens": 6}))
    assert len(ids_of(late)) >= 6 and token not in ids_of(late)[:5]
    short = await calls.collect(request_of(max_tokens=3))
    assert ids_of(short) == full[:3] and short[-1].finish.reason == v1.Finish.REASON_LENGTH
    endless = await calls.collect(request_of(stopping={"ignore_eos": True}))
    assert len(ids_of(endless)) == 40 and full[-1] in ids_of(endless)


async def test_an_answer_may_fill_the_context(calls) -> None:
    context = (
        await calls.control.GetServerInfo(control_pb2.GetServerInfoRequest())
    ).max_context_tokens
    request = request_of(max_tokens=context - 2, stopping={"ignore_eos": True})
    request.token_ids.ids.extend([1, 50])
    messages = await calls.collect(request)
    assert messages[-1].usage.completion_tokens == context - 2


async def test_output_options(calls, oracle) -> None:
    end = oracle.tokenizer.eos_token
    echoed = await calls.collect(request_of(output={"echo": True}))
    assert text_of(echoed).startswith(PROMPTS[0])
    shown = request_of(output={"skip_special_tokens": False}, stopping={"include_stop": True})
    assert text_of(await calls.collect(shown)).endswith(end)
    bare = request_of()
    bare.output.Clear()
    messages = await calls.collect(bare)
    assert not ids_of(messages) and not any(message.logprobs for message in messages)


async def test_usage_and_metrics_tell_what_the_prefix_cache_spared(calls, server: Server) -> None:
    async def hits() -> float:
        series = await asyncio.to_thread(server.metrics)
        return series["deltamux_prefix_cache_hits"].samples[0].value

    text = "the slow brown fox sleeps under the tree\n"
    before, cached, answers = await hits(), [], []
    for salt in ("", "", "pepper"):
        messages = await calls.collect(request_of(text, cache_salt=salt))
        cached.append(messages[-1].usage.cached_prompt_tokens)
        answers.append(text_of(messages))
    assert cached[0] == cached[2] == 0 and cached[1] >= 32
    assert len(set(answers)) == 1
    assert await hits() - before == sum(cached)


async def test_a_cold_adapter_tells_where_it_was(calls, tmp_path: Path) -> None:
    folder = shutil.copytree(ADAPTERS[0], tmp_path / "cold")
    request = adapters_pb2.LoadAdapterRequest(name="cold", source=str(folder), upto=v1.TIER_DISK)
    # Other bytes, the same adapter: a version of its own.
    with open(folder / "adapter_config.json", "a") as config:
        config.write("\n")
    await calls.adapters.LoadAdapter(request)
    first, second = [await calls.collect(request_of(adapter="cold")) for _ in range(2)]
    assert first[0].served_by.tier == v1.TIER_DISK and first[-1].timing.adapter_load > 0
    assert second[0].served_by.tier == v1.TIER_DEVICE
    assert text_of(first) == text_of(second)
    await calls.adapters.UnloadAdapter(adapters_pb2.UnloadAdapterRequest(name="cold", purge=True))


async def test_a_swap_leaves_running_requests_on_their_version(calls, oracle) -> None:
    load = adapters_pb2.LoadAdapterRequest(name="swapped", source=str(ADAPTERS[0]))
    old = (await calls.adapters.LoadAdapter(load)).adapter
    prompt = oracle.ids(PROMPTS[0])
    running = calls.inference.Generate(
        request_of(adapter="swapped", max_tokens=100, stopping={"ignore_eos": True}),
        timeout=PATIENCE,
    )
    messages = [await running.read()]
    load.source = str(ADAPTERS[1])
    new = (await calls.adapters.LoadAdapter(load)).adapter
    assert new.version != old.version and new.live
    later = await calls.collect(request_of(adapter="swapped"))
    assert later[0].served_by.version == new.version
    assert ids_of(later) == oracle.generate(prompt, NAMES[1])
    messages += [message async for message in rest(running)]
    assert messages[0].served_by.version == old.version
    wanted = oracle.generate(prompt, NAMES[0], max_new_tokens=100)
    assert ids_of(messages)[: len(wanted)] == wanted
    await calls.adapters.UnloadAdapter(adapters_pb2.UnloadAdapterRequest(name="swapped"))


async def test_requests_that_end_early_leave_nothing_running(calls, server: Server) -> None:
    def endless(request_id: str) -> v1.GenerateRequest:
        return request_of(
            adapter=NAMES[0],
            max_tokens=100,
            stopping={"ignore_eos": True},
            sampling={"n": 8},
            request_id=request_id,
        )

    cancelled = calls.inference.Generate(endless("cancelled"), timeout=PATIENCE)
    aborted = calls.inference.Generate(endless("aborted"), timeout=PATIENCE)
    await cancelled.read()
    await aborted.read()
    cancelled.cancel()
    await calls.control.Abort(control_pb2.AbortRequest(request_ids=["aborted"]))
    endings = []
    with pytest.raises(grpc.RpcError) as caught:
        async for message in rest(aborted):
            endings += [message] if message.HasField("finish") else []
    assert caught.value.code() == grpc.StatusCode.CANCELLED
    assert [e.finish.reason for e in endings] == [v1.Finish.REASON_CANCELLED] * 8
    assert 1 <= endings[-1].usage.completion_tokens < 8 * 100
    async with asyncio.timeout(PATIENCE):
        while any((await left(calls, server)).values()):
            pass


async def left(calls: Calls, server: Server) -> dict[str, float]:
    """What is not yet free of the requests that there were."""
    # One more request makes the engine tell its state.
    await calls.collect(request_of())
    series = await asyncio.to_thread(server.metrics)
    gauges = ("requests_running", "requests_waiting", "kv_cache_usage_ratio")
    adapters = await calls.adapters.ListAdapters(adapters_pb2.ListAdaptersRequest())
    return {name: series[f"deltamux_{name}"].samples[0].value for name in gauges} | {
        adapter.name: adapter.active_requests for adapter in adapters.adapters
    }
