"""Classify and Embed on the real server beside Generate; transformers and PEFT are the oracle."""

from __future__ import annotations

import asyncio
import json
import warnings
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from deltamux.client import (
    AsyncClient,
    Client,
    ClientError,
    classify_request,
    embed_request,
    generate_request,
)
from deltamux.demo.server import Server
from deltamux.demo.tasks import weights_path
from deltamux.v1 import inference_pb2

BASE = weights_path() / "base"
GENERATING = weights_path() / "adapters" / "rot13"
TEXTS = ["the quick fox", "a", "silver moon over water and a far hill"]
TOPICS = ["sea", "sky", "land"]
LABELS = {"topic": 3, "reward": 1, "words": 5}
PATIENCE = 60.0


class Library:
    """Untrained heads and adapters for the demo's base, saved by PEFT and computed by it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = AutoTokenizer.from_pretrained(BASE)
        self.models = {name: self._tuned(name, count) for name, count in LABELS.items()}
        self.base = AutoModel.from_pretrained(BASE, dtype=torch.float32).eval()

    def _tuned(self, name: str, labels: int) -> Any:
        torch.manual_seed(labels)
        auto, task = AutoModelForSequenceClassification, "SEQ_CLS"
        if name == "words":
            auto, task = AutoModelForTokenClassification, "TOKEN_CLS"
        model = auto.from_pretrained(BASE, dtype=torch.float32, num_labels=labels)
        config = peft.LoraConfig(
            task_type=task, r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False
        )
        tuned = peft.get_peft_model(model, config).eval()
        tuned.save_pretrained(self.folder / name)
        if name == "topic":
            names = {str(number): label for number, label in enumerate(TOPICS)}
            (self.folder / name / "config.json").write_text(json.dumps({"id2label": names}))
        return tuned

    def ids(self, text: str) -> Tensor:
        return torch.tensor([self.tokenizer.encode(text)])

    @torch.inference_mode()
    def logits(self, name: str, text: str) -> Tensor:
        return self.models[name](input_ids=self.ids(text)).logits.view(-1, LABELS[name])

    @torch.inference_mode()
    def hidden(self, name: str, text: str) -> Tensor:
        body = self.models[name].base_model.model.model if name else self.base
        return body(input_ids=self.ids(text)).last_hidden_state[0]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Library(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def server(library: Library, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    arguments = [
        "--device=cpu",
        "--threads=1",
        "--max-model-len=128",
        "--max-num-batched-tokens=24",
        "--max-adapter-slots=4",
        f"--adapter=rot13={GENERATING}",
        f"--adapter-dir={library.folder}",
        f"--adapter-cache-dir={tmp_path_factory.mktemp('cache')}",
    ]
    with Server(f"--model={BASE}", *arguments) as running:
        yield running


@pytest.fixture
async def client(server: Server) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.target, timeout=PATIENCE) as client:
        yield client


def close(got: list[float], expected: Tensor) -> None:
    torch.testing.assert_close(torch.tensor(got), expected, atol=1e-4, rtol=1e-4)


async def test_three_kinds_of_calls_share_the_server(client: AsyncClient, library: Library) -> None:
    poolings = ["mean", "last", "first"]
    embedded = [(text, name, p) for text in TEXTS for name in ("", "topic") for p in poolings]
    classified = [(text, name) for text in TEXTS for name in LABELS]
    spoken, scores, vectors = await asyncio.gather(
        asyncio.gather(
            *(client.generate(generate_request("abc\n", adapter="rot13")) for _ in range(4))
        ),
        asyncio.gather(
            *(client.classify(classify_request(text, adapter=name)) for text, name in classified)
        ),
        asyncio.gather(
            *(
                client.embed(embed_request(text, adapter=name, pooling=p, normalize=False))
                for text, name, p in embedded
            )
        ),
    )
    assert [answer.text.strip() for answer in spoken] == ["nop"] * 4
    for (text, name), positions in zip(classified, scores, strict=True):
        expected = library.logits(name, text)
        assert len(positions) == len(expected)
        for position, row in zip(positions, expected, strict=True):
            unnamed = [f"LABEL_{i}" for i in range(LABELS[name])]
            assert [s.label for s in position] == (TOPICS if name == "topic" else unnamed)
            close([s.logit for s in position], row)
            close([s.score for s in position], row if name == "reward" else row.softmax(-1))
    for (text, name, pooling), vector in zip(embedded, vectors, strict=True):
        hidden = library.hidden(name, text)
        close(vector, {"mean": hidden.mean(0), "last": hidden[-1], "first": hidden[0]}[pooling])


async def test_an_embedding_has_unit_length_unless_told_otherwise(
    client: AsyncClient, library: Library
) -> None:
    vector = await client.embed(embed_request(TEXTS[0]))
    close(vector, functional.normalize(library.hidden("", TEXTS[0])[-1], dim=0))


async def test_calls_that_do_not_fit_the_adapter_are_refused(client: AsyncClient) -> None:
    for call, reason in (
        (client.generate(generate_request("a", adapter="topic")), "NO_GENERATION"),
        (client.generate(generate_request("a", adapter="words")), "NO_GENERATION"),
        (client.classify(classify_request("a", adapter="rot13")), "NO_TASK_HEAD"),
        (client.classify(classify_request("a", adapter="")), "NO_TASK_HEAD"),
    ):
        with pytest.raises(ClientError) as caught:
            await call
        assert (caught.value.code, caught.value.reason) == ("FAILED_PRECONDITION", reason)
    with pytest.raises(ClientError) as caught:
        await client.embed(embed_request("a", adapter="nobody"))
    assert caught.value.code == "NOT_FOUND"


async def test_the_list_of_adapters_tells_tasks_and_labels(
    client: AsyncClient, server: Server
) -> None:
    await client.classify(classify_request("a", adapter="words"))
    with Client(server.target, timeout=PATIENCE) as blocking:
        listed = {adapter.name: adapter for adapter in blocking.list_adapters()}
    assert (listed["words"].task, len(listed["words"].labels)) == ("token", 5)
    assert listed["words"].tier == inference_pb2.TIER_DEVICE
