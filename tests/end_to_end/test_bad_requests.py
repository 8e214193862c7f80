"""Bad requests and bad adapters against the real server: each its code, and nobody else notices."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from safetensors.numpy import load_file, save_file

from deltamux.demo.server import Server
from deltamux.demo.tasks import TASKS, prompt, unseen_inputs, weights_path
from deltamux.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2_grpc
from deltamux.v1 import inference_pb2 as v1

TASK = next(task for task in TASKS if task.name == "rot13")
SOUND = weights_path() / "adapters" / TASK.name
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
CONTEXT = 128
PATIENCE = 60.0


def truncated(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def not_finite(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    next(iter(tensors.values())).flat[0] = np.nan
    save_file(tensors, folder / WEIGHTS)


def of_another_base(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    wide = {name: np.concatenate([t, t], axis=1) for name, t in tensors.items() if "lora_A" in name}
    save_file(tensors | wide, folder / WEIGHTS)


def with_something_left_over(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file(tensors | {"mystery": np.zeros(3, np.float32)}, folder / WEIGHTS)


def of_an_unknown_type(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "peft_type": "TELEPATHY"}))


def not_json(folder: Path) -> None:
    (folder / CONFIG).write_text("{'r': 4}")


BROKEN = {
    spoil.__name__: spoil
    for spoil in (
        truncated,
        not_finite,
        of_another_base,
        with_something_left_over,
        of_an_unknown_type,
        not_json,
    )
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter directory with one sound adapter and all the broken ones."""
    root = tmp_path_factory.mktemp("adapters")
    shutil.copytree(SOUND, root / TASK.name)
    for name, spoil in BROKEN.items():
        spoil(shutil.copytree(SOUND, root / name))
    return root


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    cache = tmp_path_factory.mktemp("cache")
    with Server(
        f"--model={weights_path() / 'base'}",
        "--device=cpu",
        "--threads=1",
        f"--max-model-len={CONTEXT}",
        f"--adapter-dir={folder}",
        f"--adapter-cache-dir={cache}",
    ) as running:
        yield running


@dataclass
class Calls:
    """Stubs of one connection, and requests through a sound adapter that go on beside the test."""

    channel: grpc.aio.Channel

    def __post_init__(self) -> None:
        self.inference = inference_pb2_grpc.InferenceServiceStub(self.channel)
        self.adapters = adapters_pb2_grpc.AdapterServiceStub(self.channel)
        self.right = 0

    async def collect(self, request: v1.GenerateRequest) -> str:
        call = self.inference.Generate(request, timeout=PATIENCE)
        return "".join([message.text async for message in call])

    async def good_traffic(self) -> None:
        while True:
            for text in unseen_inputs(TASK, 8):
                answer = await self.collect(generate(text=prompt(text), adapter=TASK.name))
                assert answer == TASK.answer(text)
                self.right += 1


@pytest.fixture
async def calls(server: Server) -> AsyncIterator[Calls]:
    async with grpc.aio.insecure_channel(server.target) as channel:
        made = Calls(channel)
        traffic = asyncio.create_task(made.good_traffic())
        yield made
        before = made.right
        while made.right <= before + 1 and not traffic.done():
            await asyncio.sleep(0.01)
        traffic.cancel()
        await asyncio.wait({traffic})
        assert traffic.cancelled(), traffic.exception()
    assert server.events("internal error") == []
    assert "Traceback" not in server.log()


async def refused(call: asyncio.Future | object) -> tuple[str, str]:
    """Code and reason of a call that must fail, whose words must give nothing away."""
    with pytest.raises(grpc.RpcError) as caught:
        await call
    error = caught.value
    status = rpc_status.from_call(error)
    assert status is not None, error
    info = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(info) for detail in status.details)
    assert info.domain == "deltamux"
    for secret in ("Traceback", ".py", "/tmp", "<class", "object at"):
        assert secret not in error.details()
    return error.code().name, info.reason


def generate(**fields: object) -> v1.GenerateRequest:
    if not {"text", "token_ids", "chat"} & fields.keys():
        fields["text"] = "hi\n"
    return v1.GenerateRequest(**fields)


NAN = float("nan")
INVALID = ("INVALID_ARGUMENT", "INVALID_ARGUMENT")
TOO_LONG = ("INVALID_ARGUMENT", "PROMPT_TOO_LONG")
BAD_NAME = ("INVALID_ARGUMENT", "INVALID_ADAPTER_NAME")
UNKNOWN = ("NOT_FOUND", "ADAPTER_NOT_FOUND")
REQUESTS = {
    "no prompt": (v1.GenerateRequest(), INVALID),
    "empty prompt": (generate(text=""), INVALID),
    "prompt over the context": (generate(text="a" * CONTEXT), TOO_LONG),
    "prompt over the characters": (generate(text="a" * 2_000_000), TOO_LONG),
    "answer over the context": (
        generate(stopping={"max_tokens": CONTEXT}),
        ("INVALID_ARGUMENT", "CONTEXT_EXCEEDED"),
    ),
    "token id out of the vocabulary": (generate(token_ids={"ids": [2**31 - 1]}), INVALID),
    "stop token id out of it": (generate(stopping={"stop_token_ids": [4000]}), INVALID),
    "bias of a token out of it": (generate(sampling={"logit_bias": {4000: 1.0}}), INVALID),
    "no tokens wanted": (generate(stopping={"max_tokens": 0}), INVALID),
    "no choices": (generate(sampling={"n": 0}), INVALID),
    "a million choices": (generate(sampling={"n": 10**6}), INVALID),
    "temperature NaN": (generate(sampling={"temperature": NAN}), INVALID),
    "temperature below 0": (generate(sampling={"temperature": -0.1}), INVALID),
    "top_p 0": (generate(sampling={"top_p": 0.0}), INVALID),
    "min_p 2": (generate(sampling={"min_p": 2.0}), INVALID),
    "logprobs 21": (generate(output={"logprobs": 21}), INVALID),
    "10,000 stop strings": (generate(stopping={"stop": ["a"] * 10_000}), INVALID),
    "an empty stop string": (generate(stopping={"stop": [""]}), INVALID),
    "a bias of NaN": (generate(sampling={"logit_bias": {5: NAN}}), INVALID),
    "a seed of 2**63": (generate(sampling={"seed": 2**63}), INVALID),
    "no end": (generate(stopping={"ignore_eos": True}), INVALID),
    "an unknown role": (generate(chat={"messages": [{"role": "god", "content": "a"}]}), INVALID),
    "a request id of control characters": (
        generate(request_id="a\x1b"),
        ("INVALID_ARGUMENT", "REQUEST_ID_INVALID"),
    ),
    "a salt of 129 bytes": (generate(cache_salt="a" * 129), INVALID),
    "structured output": (
        generate(structured={"json_object": True}),
        ("UNIMPLEMENTED", "STRUCTURED_OUTPUT"),
    ),
    "a blend": (generate(blend=[{"adapter": TASK.name}]), ("UNIMPLEMENTED", "BLEND")),
    "a path as adapter": (generate(adapter="/etc/passwd"), BAD_NAME),
    "a path that climbs": (generate(adapter="../" + TASK.name), BAD_NAME),
    "a URL as adapter": (generate(adapter="hf://org/adapter"), BAD_NAME),
    "an unknown adapter": (generate(adapter="nobody"), UNKNOWN),
    "an unknown version": (generate(adapter=f"{TASK.name}@{'0' * 64}"), UNKNOWN),
    "a version that cannot be": (
        generate(adapter=f"{TASK.name}@latest"),
        ("INVALID_ARGUMENT", "INVALID_ADAPTER_VERSION"),
    ),
}


async def test_bad_requests_get_their_codes(calls: Calls) -> None:
    got = await asyncio.gather(*(refused(calls.collect(r)) for r, _ in REQUESTS.values()))
    wanted = {name: expected for name, (_, expected) in REQUESTS.items()}
    assert dict(zip(REQUESTS, got, strict=True)) == wanted


async def test_broken_adapters_fail_their_own_requests_only(calls: Calls) -> None:
    names = list(BROKEN)
    got = await asyncio.gather(*(refused(calls.collect(generate(adapter=n))) for n in names))
    assert {code for code, _ in got} == {"FAILED_PRECONDITION"}, dict(zip(names, got, strict=True))
    assert dict(zip(names, (reason for _, reason in got), strict=True)) == {
        "truncated": "MALFORMED_WEIGHTS",
        "not_finite": "NON_FINITE",
        "of_another_base": "BASE_MISMATCH",
        "with_something_left_over": "EXTRA_TENSORS",
        "of_an_unknown_type": "UNKNOWN_TYPE",
        "not_json": "MALFORMED_JSON",
    }


async def test_loading_a_broken_adapter_says_what_is_wrong(calls: Calls, folder: Path) -> None:
    got = {}
    for name in BROKEN:
        source = str(folder / name)
        load = adapters_pb2.LoadAdapterRequest(name=f"loaded-{name}", source=source)
        got[name] = await refused(calls.adapters.LoadAdapter(load))
        missing = calls.adapters.GetAdapter(adapters_pb2.GetAdapterRequest(name=f"loaded-{name}"))
        assert await refused(missing) == UNKNOWN
    assert got == {
        "truncated": ("INVALID_ARGUMENT", "MALFORMED_WEIGHTS"),
        "not_finite": ("INVALID_ARGUMENT", "NON_FINITE"),
        "of_another_base": ("FAILED_PRECONDITION", "BASE_MISMATCH"),
        "with_something_left_over": ("INVALID_ARGUMENT", "EXTRA_TENSORS"),
        "of_an_unknown_type": ("INVALID_ARGUMENT", "UNKNOWN_TYPE"),
        "not_json": ("INVALID_ARGUMENT", "MALFORMED_JSON"),
    }


async def test_bad_administration_gets_its_codes(calls: Calls, tmp_path: Path) -> None:
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(SOUND / CONFIG, pickled)
    (pickled / "adapter_model.bin").write_bytes(b"\x80\x04.")

    def load(**fields: object) -> object:
        request = {"name": "a", "source": str(SOUND), **fields}
        return calls.adapters.LoadAdapter(adapters_pb2.LoadAdapterRequest(**request))

    def update(**fields: object) -> object:
        return calls.adapters.UpdateAdapter(adapters_pb2.UpdateAdapterRequest(**fields))

    def unload(name: str) -> object:
        return calls.adapters.UnloadAdapter(adapters_pb2.UnloadAdapterRequest(name=name))

    await update(name=TASK.name, pinned=True)
    for call, wanted in (
        (load(source=str(pickled)), ("INVALID_ARGUMENT", "PICKLE_REFUSED")),
        (load(source=str(tmp_path / "nothing")), ("INVALID_ARGUMENT", "SOURCE_NOT_FOUND")),
        (load(source="http://169.254.169.254/"), ("INVALID_ARGUMENT", "SOURCE_NOT_ALLOWED")),
        (load(expect_version="0" * 64), ("INVALID_ARGUMENT", "DIGEST_MISMATCH")),
        (load(name="../a"), BAD_NAME),
        (load(tenant="t"), ("UNIMPLEMENTED", "TENANT")),
        (update(name=TASK.name, traffic={"v": 1.0}), ("UNIMPLEMENTED", "TRAFFIC")),
        (update(name="nobody", pinned=True), UNKNOWN),
        (unload("nobody"), UNKNOWN),
        (unload(TASK.name), ("FAILED_PRECONDITION", "ADAPTER_PINNED")),
    ):
        assert await refused(call) == wanted
    await update(name=TASK.name, pinned=False)


GARBAGE = {
    "noise": b"\xff\xfe\xfd\xfc",
    "truncated": v1.GenerateRequest(text="hello").SerializeToString()[:-2],
    "not UTF-8": b"\x1a\x02\xc3\x28",
    "too deep": b"\x7b" * 200 + b"\x7c" * 200,
}


@pytest.mark.parametrize("name", GARBAGE)
async def test_garbage_is_an_invalid_argument(calls: Calls, name: str) -> None:
    raw = calls.channel.unary_stream("/deltamux.v1.InferenceService/Generate")
    assert await refused(raw(GARBAGE[name]).read()) == ("INVALID_ARGUMENT", "MALFORMED_MESSAGE")
