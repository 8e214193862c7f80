"""Adapters of resized models over gRPC, beside adapters and a base that must never notice."""

from __future__ import annotations

import asyncio
import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import peft
import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from deltamux.demo.server import Server
from deltamux.demo.tasks import weights_path
from deltamux.v1 import inference_pb2 as v1
from deltamux.v1 import inference_pb2_grpc

KNOWN = 259
TOLERANCE, PATIENCE = 1e-4, 120.0
LORA: dict[str, Any] = {"r": 3, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
BOTH = ["embed_tokens", "lm_head"]
TRAINED = {name: [KNOWN, KNOWN + 1] for name in BOTH}
# By name: tokens of the resized model, and how it was trained.
RESIZED: dict[str, tuple[int, peft.PeftConfig]] = {
    "loud": (KNOWN + 4, peft.LoraConfig(modules_to_save=BOTH, **LORA)),
    "saved": (KNOWN + 1, peft.LoraConfig(**LORA)),
    "tokens": (KNOWN + 2, peft.LoraConfig(trainable_token_indices=TRAINED, **LORA)),
    "prompt": (KNOWN + 3, peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
    "fewer": (KNOWN - 3, peft.LoraConfig(modules_to_save=BOTH, **LORA)),
}
# The tokens of "loud", whose tokenizer lies beside it.
WORDS = ["<tool>", "<|", AddedToken("<|end|>", special=True), "caf\u00e9"]
# Of the base's own vocabulary.
PLAIN = ("", "upper-case", "rot13")


def resized(base: PreTrainedModel, size: int, loud: bool) -> PreTrainedModel:
    torch.manual_seed(size)
    model = copy.deepcopy(base)
    model.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[KNOWN:].normal_()
        # Whatever the hidden state, one of the loud ones has a larger logit than most others.
        model.get_output_embeddings().weight[KNOWN:].normal_(std=8.0 if loud else 0.2)
    return model


@dataclass
class World:
    base: PreTrainedModel
    folders: dict[str, Path]
    alone: dict[str, PreTrainedModel] = field(default_factory=dict)

    def greedy(self, adapter: str, prompt: list[int], tokens: int) -> list[torch.Tensor]:
        """PEFT's log-probabilities behind its own answer, on the resized model."""
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")
            if adapter not in self.alone:
                size = RESIZED[adapter][0]
                model = resized(self.base, size, adapter == "loud")
                self.alone[adapter] = peft.PeftModel.from_pretrained(model, self.folders[adapter])
            ids, rows = list(prompt), []
            for _ in range(tokens):
                logits = self.alone[adapter].eval()(input_ids=torch.tensor([ids])).logits[0, -1]
                rows.append(logits.log_softmax(-1))
                ids.append(int(logits.argmax()))
        return rows


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(weights_path() / "base", dtype=torch.float32)
    folders = {name: weights_path() / "adapters" / name for name in PLAIN if name}
    for name, (size, config) in RESIZED.items():
        folders[name] = tmp_path_factory.mktemp(name)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(resized(base, size, name == "loud"), copy.deepcopy(config))
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
            model.save_pretrained(folders[name])
    tokenizer = AutoTokenizer.from_pretrained(weights_path() / "base")
    tokenizer.add_tokens(WORDS)
    tokenizer.save_pretrained(folders["loud"])
    return World(base.eval(), folders)


@pytest.fixture(scope="module")
def server(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    named = [f"--adapter={name}={folder}" for name, folder in world.folders.items()]
    cache = tmp_path_factory.mktemp("cache")
    fixed = ["--device=cpu", "--threads=1", f"--adapter-cache-dir={cache}"]
    with Server(f"--model={weights_path() / 'base'}", *fixed, *named) as running:
        yield running


Ask = Callable[..., list[list[v1.GenerateResponse]]]


@pytest.fixture
def ask(server: Server) -> Ask:
    """ask(requests) -> the messages of each; all of them run at once."""

    async def one(stub: Any, request: v1.GenerateRequest) -> list[v1.GenerateResponse]:
        return [response async for response in stub.Generate(request, timeout=PATIENCE)]

    async def all_of(requests: Sequence[v1.GenerateRequest]) -> list[list[v1.GenerateResponse]]:
        async with grpc.aio.insecure_channel(server.target) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            return await asyncio.gather(*(one(stub, request) for request in requests))

    return lambda requests: asyncio.run(all_of(requests))


def request(adapter: str, ids: list[int], tokens: int = 6, **sampling: Any) -> v1.GenerateRequest:
    return v1.GenerateRequest(
        adapter=adapter,
        token_ids=v1.TokenIds(ids=ids),
        sampling=v1.SamplingParams(**sampling),
        stopping=v1.StoppingCriteria(max_tokens=tokens, ignore_eos=True),
        output=v1.OutputOptions(logprobs=20, return_token_ids=True),
    )


def candidates(responses: list[v1.GenerateResponse]) -> list[list[v1.TokenLogprobs.Candidate]]:
    return [[t.chosen, *t.top] for response in responses for t in response.logprobs]


def test_each_answers_as_peft_does_on_the_resized_model(world: World, ask: Ask) -> None:
    prompts = {
        name: [1, 70 + number, *([size - 1, KNOWN - 9, size - 2] if size > KNOWN else [99])]
        for number, (name, (size, _)) in enumerate(RESIZED.items())
    }
    # Once cold, once all in one step.
    for _ in range(2):
        mixed = [*prompts.items(), *((name, [1, 80, 81]) for name in PLAIN)]
        answers = ask([request(name, ids, temperature=0.0) for name, ids in mixed])
        for (name, ids), responses in zip(mixed[: len(prompts)], answers, strict=False):
            rows = world.greedy(name, ids, 6)
            tokens = [token for response in responses for token in response.token_ids]
            assert tokens == [int(row.argmax()) for row in rows], name
            for row, alternatives in zip(rows, candidates(responses), strict=True):
                for candidate in alternatives:
                    # "loud" has logits of some hundreds, and float32 but seven digits.
                    error = abs(row[candidate.token_id].item() - candidate.logprob)
                    rounding = 1e-6 * row.abs().max().item()
                    assert error <= TOLERANCE + rounding, f"{name}: {error}"
            if name == "loud":
                assert max(tokens) >= KNOWN


def test_nobody_else_ever_has_an_added_token(ask: Ask) -> None:
    """At the highest temperature all 259 tokens are as likely, and those of "loud" beside them in
    the same steps certain."""
    free = {"temperature": 100.0, "top_k": 0, "top_p": 1.0}
    cut = {"temperature": 100.0, "top_k": 300, "min_p": 1e-9}
    requests = [
        request(name, [1, 60 + seed], 60, seed=seed, **(free if seed % 2 else cut))
        for name in (*PLAIN, "fewer", "loud", "prompt")
        for seed in range(4)
    ]
    seen: dict[str, set[int]] = {}
    for sent, responses in zip(requests, ask(requests), strict=True):
        found = seen.setdefault(sent.adapter, set())
        found |= {token for response in responses for token in response.token_ids}
        found |= {c.token_id for row in candidates(responses) for c in row}
    for name in PLAIN:
        assert KNOWN - 20 < max(seen[name]) < KNOWN
    assert KNOWN - 20 < max(seen["fewer"]) < KNOWN - 3
    assert max(seen["loud"]) == KNOWN + 3
    assert KNOWN <= max(seen["prompt"]) < KNOWN + 3


def test_a_seed_gives_the_same_tokens_beside_wider_rows(ask: Ask) -> None:
    seeded = request("upper-case", [1, 66], 30, temperature=3.0, seed=7)
    (alone,) = ask([seeded])
    beside = ask([seeded, *(request("loud", [1, 66, KNOWN], 30, seed=n) for n in range(3))])[0]
    ids = [[token for r in responses for token in r.token_ids] for responses in (alone, beside)]
    assert ids[0] == ids[1]


@pytest.mark.parametrize(
    ("adapter", "token"),
    [("", KNOWN), ("upper-case", KNOWN), ("fewer", KNOWN - 3), ("loud", KNOWN + 4)],
)
def test_ids_beyond_a_vocabulary_are_refused(adapter: str, token: int, ask: Ask) -> None:
    for wrong in (
        request(adapter, [1, token]),
        request(adapter, [1], logit_bias={token: 100.0}),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            ask([wrong])
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_bias_moves_an_adapter_to_its_own_tokens(ask: Ask) -> None:
    biased = request("saved", [1, 70], 3, logit_bias={KNOWN: 100.0}, temperature=0.0)
    (responses,) = ask([biased])
    assert [token for r in responses for token in r.token_ids] == [KNOWN] * 3


def test_texts_of_an_adapter_hold_its_own_tokens(world: World, ask: Ask) -> None:
    """And those of every other request the characters that they are made of."""
    oracle = AutoTokenizer.from_pretrained(world.folders["loud"])
    base = AutoTokenizer.from_pretrained(weights_path() / "base")
    text = "a <tool> in the caf\u00e9<|end|>"
    asked = []
    for name in ("loud", "upper-case", ""):
        asked.append(request(name, [], 12, temperature=0.0))
        asked[-1].text = text
        asked[-1].output.skip_special_tokens = False
    for sent, responses in zip(asked, ask(asked), strict=True):
        tokenizer = oracle if sent.adapter == "loud" else base
        tokens = [token for response in responses for token in response.token_ids]
        written = "".join(response.text for response in responses)
        assert responses[-1].usage.prompt_tokens == len(tokenizer.encode(text))
        assert written == tokenizer.decode(tokens).rstrip("\ufffd")
        assert any(str(word) in written for word in WORDS) == (sent.adapter == "loud")
