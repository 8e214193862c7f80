"""One adapter of every family in one batch, over gRPC, each held to its own training library."""

from __future__ import annotations

import asyncio
import copy
import os
import random
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from deltamux.adapters.checkpoint.convert import convert
from deltamux.adapters.checkpoint.files import PICKLES
from deltamux.cli import main
from deltamux.demo.server import Server
from deltamux.demo.tasks import weights_path
from deltamux.v1 import inference_pb2 as v1
from deltamux.v1 import inference_pb2_grpc

PEERS = Path(__file__).parents[1] / "peers" / "adapterhub"
TOKENS, TOP = 8, 5
# Of a log-probability, in float32.
TOLERANCE = 1e-4
PATIENCE = 120.0
TASK = {"task_type": "CAUSAL_LM"}
# PEFT is told the only task that there is.
TASK_IDS = {"poly": {"task_ids": torch.tensor([0])}}

# What AdapterHub has answered for, by the families it writes.
ADAPTERHUB = {
    "llama": (
        "houlsby",
        "pfeiffer",
        "parallel",
        "compacter",
        "dora",
        "vera",
        "mtl_lora",
        "prefix",
        "mam",
        "lora_and_houlsby",
        "loreft",
    ),
    "gpt2": ("houlsby", "pfeiffer", "parallel", "prefix", "mam", "loreft"),
}


def configs(name: str) -> dict[str, peft.PeftConfig]:
    """A PEFT config of every family that it trains on this architecture, LoRA in several forms."""
    qv, up, down, embedding, head = {
        "llama": (["q_proj", "v_proj"], ["up_proj"], ["down_proj"], "embed_tokens", "lm_head"),
        "gpt2": (["c_attn"], ["c_fc"], ["mlp.c_proj"], "wte", "lm_head"),
    }[name]
    targets = {"target_modules": qv + up, **TASK}
    found = {
        "lora-4": peft.LoraConfig(r=4, **targets),
        "lora-16": peft.LoraConfig(r=16, use_rslora=True, target_modules=qv + up + down, **TASK),
        "dora": peft.LoraConfig(r=3, use_dora=True, **targets),
        "pissa": peft.LoraConfig(r=2, init_lora_weights="pissa", **targets),
        "bitfit": peft.LoraConfig(r=2, bias="lora_only", target_modules=qv, **TASK),
        "head": peft.LoraConfig(r=2, modules_to_save=[head], target_modules=qv, **TASK),
        "tokens": peft.LoraConfig(
            r=2, trainable_token_indices={embedding: [5, 7]}, target_modules=qv, **TASK
        ),
        "adalora": peft.AdaLoraConfig(init_r=6, target_r=3, total_step=10, **targets),
        "loha": peft.LoHaConfig(r=2, **targets),
        "vera": peft.VeraConfig(r=8, target_modules=down, **TASK),
        "ia3": peft.IA3Config(target_modules=qv + down, feedforward_modules=down, **TASK),
        "shira": peft.ShiraConfig(r=2, **targets),
        "ln": peft.LNTuningConfig(**TASK),
        "prompt": peft.PromptTuningConfig(num_virtual_tokens=5, **TASK),
        "p-tuning": peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=16, **TASK),
        "prefix": peft.PrefixTuningConfig(num_virtual_tokens=6, **TASK),
        "trainable-tokens": peft.TrainableTokensConfig(
            token_indices=[2, 9], target_modules=[embedding], **TASK
        ),
    }
    if name == "gpt2":
        # PEFT refuses its Conv1D layers for these, and for most of those below.
        return {key: config for key, config in found.items() if key not in ("loha", "shira")}
    return found | {
        "miss": peft.MissConfig(r=4, **targets),
        "poly": peft.PolyConfig(r=3, n_skills=2, **targets),
        "gralora": peft.GraloraConfig(r=4, gralora_k=2, hybrid_r=0, **targets),
        "vblora": peft.VBLoRAConfig(r=2, num_vectors=9, vector_length=4, topk=2, **targets),
        "delora": peft.DeloraConfig(r=3, **targets),
        "oft": peft.OFTConfig(r=0, oft_block_size=8, **targets),
        "boft": peft.BOFTConfig(boft_block_size=8, boft_n_butterfly_factor=1, **targets),
        "road": peft.RoadConfig(group_size=8, **targets),
    }


@dataclass(frozen=True)
class Case:
    """A request and the log-probabilities, [tokens, vocabulary], behind its greedy answer."""

    adapter: str
    prompt: list[int]
    expected: Tensor


class World:
    """A base, adapters of every family for it, and what each answers alone."""

    def __init__(self, name: str, folder: Path) -> None:
        self.base = folder / "base"
        self.base.mkdir()
        for source in (PEERS / name, weights_path() / "base"):
            for file in source.glob("*token*" if source != PEERS / name else "*.*"):
                shutil.copy(file, self.base)
        self._model = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32).eval()
        answers = load_file(PEERS / name / "logits.safetensors")
        self._golden_prompt = answers["ids"][0].tolist()
        self._goldens = {f"adapterhub-{kind}": answers[kind][0] for kind in ADAPTERHUB[name]}
        self.folders = {
            f"adapterhub-{kind}": _as_safetensors(PEERS / name / kind, folder)
            for kind in ADAPTERHUB[name]
        }
        self._alone: dict[str, Callable[[Tensor], Tensor]] = {}
        for number, (key, config) in enumerate(configs(name).items()):
            self.folders[key] = folder / key
            self._tune(config, folder / key, number)
        self.folders["delta"] = self._extract(folder)

    def _tune(self, config: peft.PeftConfig, folder: Path, seed: int) -> None:
        torch.manual_seed(seed)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(copy.deepcopy(self._model), config)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
            model.save_pretrained(folder)

    def _extract(self, folder: Path) -> Path:
        """A full fine-tune that stayed close to the base, in deltamux's own format."""
        torch.manual_seed(99)
        tuned = copy.deepcopy(self._model)
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter.add_(torch.randn_like(parameter) * parameter.std() * 0.1)
        tuned.save_pretrained(folder / "tuned")
        words = ["extract", "--base", str(self.base), "--tuned", str(folder / "tuned")]
        assert main([*words, "--out", str(folder / "delta"), "--no-logits"]) == 0
        self._alone["delta"] = self._of(tuned)
        return folder / "delta"

    def cases(self) -> list[Case]:
        found = [
            Case(kind, self._golden_prompt, logits[-1:].log_softmax(-1))
            for kind, logits in self._goldens.items()
        ]
        for number, name in enumerate(["", "", *self.folders]):
            if name not in self._goldens:
                # Two of the ids that the adapters of tokens have made their own.
                prompt = [5, 9, *(11 + (7 * number + 3 * i) % 45 for i in range(number % 9))]
                found.append(Case(name, prompt, self._answer(name, prompt)))
        return found

    def _answer(self, name: str, prompt: list[int]) -> Tensor:
        alone, tokens, rows = self._alone_with(name), list(prompt), []
        for _ in range(TOKENS):
            rows.append(alone(torch.tensor([tokens]))[0, -1].log_softmax(-1))
            tokens.append(int(rows[-1].argmax()))
        return torch.stack(rows)

    def _alone_with(self, name: str) -> Callable[[Tensor], Tensor]:
        if name not in self._alone:
            model = copy.deepcopy(self._model)
            if name:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    model = peft.PeftModel.from_pretrained(model, self.folders[name]).eval()
            self._alone[name] = self._of(model, **TASK_IDS.get(name, {}))
        return self._alone[name]

    @staticmethod
    def _of(
        model: PreTrainedModel | peft.PeftModel, **options: Tensor
    ) -> Callable[[Tensor], Tensor]:
        def logits(ids: Tensor) -> Tensor:
            with torch.inference_mode():
                answer: Tensor = model(input_ids=ids, **options).logits
                return answer

        return logits


def _as_safetensors(adapter: Path, folder: Path) -> Path:
    """What AdapterHub saves of prefixes are pickles."""
    pickled = (adapter / PICKLES[1]).exists()
    return convert(adapter, folder / f"adapterhub-{adapter.name}") if pickled else adapter


@pytest.fixture(scope="module", params=list(ADAPTERHUB))
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def server(world: World, tmp_path: Path) -> Iterator[Server]:
    named = [f"--adapter={name}={folder}" for name, folder in world.folders.items()]
    fixed = ["--device=cpu", "--threads=1", f"--adapter-cache-dir={tmp_path}"]
    with Server(f"--model={world.base}", *fixed, *named) as running:
        yield running


async def ask(stub: inference_pb2_grpc.InferenceServiceStub, case: Case) -> list[v1.TokenLogprobs]:
    request = v1.GenerateRequest(
        adapter=case.adapter,
        token_ids=v1.TokenIds(ids=case.prompt),
        sampling=v1.SamplingParams(temperature=0.0),
        stopping=v1.StoppingCriteria(max_tokens=len(case.expected), ignore_eos=True),
        output=v1.OutputOptions(logprobs=TOP),
    )
    responses = stub.Generate(request, timeout=PATIENCE)
    return [token async for response in responses for token in response.logprobs]


async def ask_all(server: Server, cases: list[Case]) -> list[list[v1.TokenLogprobs]]:
    """The engine is stopped until all have been asked, so that they meet in its steps."""
    engine = server.events("engine ready")[-1]["pid"]
    async with grpc.aio.insecure_channel(server.target) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        os.kill(engine, signal.SIGSTOP)
        try:
            answers = asyncio.gather(*(ask(stub, case) for case in cases))
            while await asyncio.to_thread(in_flight, server) < len(cases):
                await asyncio.sleep(0.01)
        finally:
            os.kill(engine, signal.SIGCONT)
        return await answers


def in_flight(server: Server) -> float:
    calls: float = server.metrics()["deltamux_requests_in_flight"].samples[0].value
    return calls


def check(case: Case, tokens: list[v1.TokenLogprobs]) -> None:
    chosen = [token.chosen.token_id for token in tokens]
    assert chosen == case.expected.argmax(-1).tolist(), case.adapter
    for row, token in zip(case.expected, tokens, strict=True):
        for candidate in (token.chosen, *token.top):
            error = abs(row[candidate.token_id].item() - candidate.logprob)
            assert error <= TOLERANCE, f"{case.adapter}: {error}"


# PEFT's own sparse tensors.
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_every_family_shares_a_batch_and_answers_as_alone(world: World, server: Server) -> None:
    cases = world.cases()
    served = {case.adapter for case in cases if case.adapter}
    assert served == world.folders.keys()
    # The first round brings all adapters to the device; in the second they meet.
    for seed in range(2):
        random.Random(seed).shuffle(cases)
        answers = asyncio.run(ask_all(server, cases))
        for case, tokens in zip(cases, answers, strict=True):
            check(case, tokens)
    steps = server.metrics()["deltamux_adapters_per_step"].samples
    shared = {s.labels["le"]: s.value for s in steps if s.name.endswith("_bucket")}
    many = [value for le, value in shared.items() if float(le) >= len(served) / 2]
    assert max(many) > min(many), f"no step had half of the {len(served)} adapters: {shared}"
