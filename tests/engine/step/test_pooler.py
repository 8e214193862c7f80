"""Embeddings and task heads beside generating sequences, against transformers and PEFT."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers as hf
from torch import Tensor
from torch.nn import functional

from deltamux.adapters.checkpoint.files import CONFIG
from deltamux.adapters.parse import parse_adapter
from deltamux.adapters.sites.device_sites import DeviceSites
from deltamux.adapters.sites.rows import Rows
from deltamux.base.load import load_base
from deltamux.engine.kv.kv_cache import KVCache
from deltamux.engine.outcome import NonFinite, Outcome, SampledToken
from deltamux.engine.rehearsal import rehearse, trial_sequence
from deltamux.engine.sequence import Scheduled, Sequence
from deltamux.engine.step.encoder_runner import EncoderRunner
from deltamux.engine.step.runner import ModelRunner
from deltamux.errors import FailedPrecondition
from deltamux.wire.messages import Classify, Embed, Pooled, Sampling

VOCABULARY, BLOCK, PAD = 61, 4, 3
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
MODERN = {**SMALL, "local_attention": 8, "cls_token_id": 0, "sep_token_id": 0}
DISTIL = {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
CONFIGS: dict[str, Callable[..., hf.PreTrainedConfig]] = {
    "llama": lambda **labels: hf.LlamaConfig(**SMALL, num_key_value_heads=2, **labels),
    "gpt2": lambda **labels: hf.GPT2Config(**SMALL, **labels),
    "bert": lambda **labels: hf.BertConfig(**SMALL, **labels),
    "roberta": lambda **labels: hf.RobertaConfig(**SMALL, type_vocab_size=1, **labels),
    "distilbert": lambda **labels: hf.DistilBertConfig(**DISTIL, pad_token_id=PAD, **labels),
    "modernbert": lambda **labels: hf.ModernBertConfig(**MODERN, **labels),
    "modernbert_mean": lambda **labels: hf.ModernBertConfig(
        **MODERN, classifier_pooling="mean", **labels
    ),
}
DECODERS, ENCODERS = ("llama", "gpt2"), tuple(CONFIGS)[2:]
# As bases are published: with what the library's own head builds on.
PUBLISHED = {"bert": hf.BertForPreTraining}
TARGETS = {
    "llama": ["q_proj", "down_proj"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "bert": ["query", "intermediate.dense", "pooler.dense"],
    "roberta": ["query", "value"],
    "distilbert": ["q_lin", "lin2"],
    "modernbert": ["Wqkv", "head.dense"],
    "modernbert_mean": ["Wo", "mlp.Wi"],
}
AUTO = {
    "SEQ_CLS": hf.AutoModelForSequenceClassification,
    "TOKEN_CLS": hf.AutoModelForTokenClassification,
    "FEATURE_EXTRACTION": hf.AutoModel,
    "CAUSAL_LM": hf.AutoModelForCausalLM,
}
PROMPT = [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17]


@dataclass
class World:
    """One base in a folder, served, with adapters in its slots; and the library's own models."""

    name: str
    folder: Path
    runner: ModelRunner | EncoderRunner
    sites: DeviceSites
    base: Any
    blocks: Iterator[int]

    def tune(self, slot: int, task: str, labels: int = 2, **config: Any) -> torch.nn.Module:
        """Puts a new adapter into the slot and returns PEFT's model of it, loaded anew."""
        folder = self.folder / f"{slot}"
        model = self.library(task, labels)
        torch.manual_seed(slot)
        config = {"target_modules": TARGETS[self.name], "r": 3, **config}
        tuned = peft.get_peft_model(model, peft.LoraConfig(task_type=task, **config))
        with torch.no_grad():
            for parameter in tuned.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        tuned.save_pretrained(folder)
        adapter = parse_adapter(folder, folder.name, self.base.structure, torch.float32)
        assert self.sites.reserve(slot, adapter)
        self.sites.write(slot, adapter)
        return peft.PeftModel.from_pretrained(self.library(task, labels), folder).eval()

    def library(self, task: str, labels: int = 2) -> Any:
        config = CONFIGS[self.name](num_labels=labels)
        return AUTO[task].from_pretrained(
            self.folder / "base", config=config, attn_implementation="eager"
        )

    def sequence(
        self, pooling: Classify | Embed | None, slot: int | None = None, prompt: list[int] = PROMPT
    ) -> Sequence:
        blocks = [next(self.blocks) for _ in range(9)]
        sequence = trial_sequence(0, prompt, blocks, Sampling())
        sequence.pooling, sequence.slot = pooling, slot
        return sequence

    def run(self, *sequences: Sequence, chunk: int = 64) -> list[Outcome]:
        """Each sequence's first outcome, all of them in the same steps, a chunk of each a step."""
        outcomes: dict[Sequence, Outcome] = {}
        while waiting := [s for s in sequences if s not in outcomes]:
            # Not all at the same pace.
            step = [
                Scheduled(s, min(chunk + number % 3, s.num_uncomputed))
                for number, s in enumerate(waiting)
            ]
            yielding = [item.sequence for item in step if item.yields]
            outcomes.update(zip(yielding, self.runner.run(step), strict=True))
            for item in step:
                item.sequence.num_computed += item.num_tokens
        return [outcomes[sequence] for sequence in sequences]


@pytest.fixture
def world(name: str, tmp_path: Path) -> World:
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    masked = hf.AutoModelForCausalLM if name in DECODERS else hf.AutoModelForMaskedLM
    model = PUBLISHED.get(name, masked.from_config)(CONFIGS[name]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.ndim > 1 else parameter.add_(0.1)
    model.save_pretrained(tmp_path / "base")
    base = load_base(str(tmp_path / "base"))
    rehearse(base, BLOCK)
    rows = Rows(base.device)
    sites = DeviceSites(base.model, base.structure, rows, 8, 8 << 20, base.dtype, base.device)
    runner: ModelRunner | EncoderRunner = EncoderRunner(base, rows, BLOCK, sites.task_heads)
    if base.encoder is None:
        cache = KVCache(base.layers, 128, BLOCK, base.dtype, base.device)
        runner = ModelRunner(base, cache, rows, sites.task_heads)
    return World(name, tmp_path, runner, sites, base, iter(range(1, 128)))


def numbers(outcome: Outcome, of: str = "numbers") -> Tensor:
    assert isinstance(outcome, Pooled)
    array = np.frombuffer(getattr(outcome, of), dtype=np.float32).copy()
    return torch.from_numpy(array).view(-1, len(outcome.labels) or array.size)


@torch.no_grad()
def logits(model: torch.nn.Module, prompt: list[int] = PROMPT) -> Tensor:
    return model(input_ids=torch.tensor([prompt])).logits[0]


@torch.no_grad()
def hidden(model: torch.nn.Module, prompt: list[int] = PROMPT) -> Tensor:
    return model(input_ids=torch.tensor([prompt])).last_hidden_state[0]


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected.reshape(got.shape), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("chunk", [2, 64])
def test_all_kinds_of_answers_share_their_steps(world: World, chunk: int) -> None:
    classes, reward = world.tune(0, "SEQ_CLS", 3), world.tune(1, "SEQ_CLS", 1)
    tokens, speech = world.tune(2, "TOKEN_CLS", 5), world.tune(3, "CAUSAL_LM")
    features = world.tune(4, "FEATURE_EXTRACTION")
    plain = hf.AutoModel.from_pretrained(world.folder / "base", attn_implementation="eager")
    mean, first = Embed("mean", normalize=False), Embed("first", normalize=False)
    sequences = [
        world.sequence(None, slot=3),
        world.sequence(Classify(), slot=0),
        world.sequence(mean, slot=4),
        world.sequence(Classify(), slot=2),
        world.sequence(None),
        world.sequence(Classify(), slot=1),
        world.sequence(Classify(), slot=0, prompt=PROMPT[2:5]),
        world.sequence(Embed("last", normalize=True)),
        world.sequence(mean, prompt=PROMPT[:1]),
        world.sequence(first, slot=2),
        world.sequence(mean, slot=2),
    ]
    answers = world.run(*sequences, chunk=chunk)

    assert answers[0] == SampledToken(int(logits(speech)[-1].argmax()))
    close(numbers(answers[1]), logits(classes))
    close(numbers(answers[2]), hidden(features).mean(0))
    close(numbers(answers[3]), logits(tokens))
    assert answers[4] == SampledToken(int(logits(world.library("CAUSAL_LM"))[-1].argmax()))
    close(numbers(answers[5]), logits(reward))
    close(numbers(answers[6]), logits(classes, PROMPT[2:5]))
    close(numbers(answers[7]), functional.normalize(hidden(plain)[-1], dim=0))
    close(numbers(answers[8]), hidden(plain, PROMPT[:1])[0])
    body = getattr(tokens.base_model.model, plain.base_model_prefix)
    close(numbers(answers[9]), hidden(body)[0])
    close(numbers(answers[10]), hidden(body).mean(0))


@pytest.mark.parametrize("name", ["llama"])
@pytest.mark.parametrize("prompt", [[7, 8, PAD, PAD], [PAD, 7, PAD, 8], [7], [PAD, PAD]])
def test_a_head_reads_the_last_token_that_is_no_padding(world: World, prompt: list[int]) -> None:
    model = world.tune(0, "SEQ_CLS", 3)
    (answer,) = world.run(world.sequence(Classify(), slot=0, prompt=prompt), chunk=1)
    close(numbers(answer), logits(model, prompt))


@pytest.mark.parametrize("name", ["llama"])
def test_scores_are_softmax_of_several_outputs_and_one_output_as_it_is(world: World) -> None:
    world.tune(0, "SEQ_CLS", 3)
    world.tune(1, "SEQ_CLS", 1)
    classes, reward = world.run(*(world.sequence(Classify(), slot=slot) for slot in (0, 1)))
    close(numbers(classes, "scores"), numbers(classes).softmax(-1))
    assert torch.equal(numbers(reward, "scores"), numbers(reward))


@pytest.mark.parametrize("name", ["llama"])
@pytest.mark.parametrize("pooling", [Embed("mean", False), Embed("first", False), Classify()])
def test_a_preempted_prompt_counts_once(world: World, pooling: Classify | Embed) -> None:
    world.tune(0, "TOKEN_CLS", 2)
    (whole,) = world.run(world.sequence(pooling, slot=0))
    preempted = world.sequence(pooling, slot=0)
    for computed in (0, 4):
        preempted.num_computed = computed
        assert world.runner.run([Scheduled(preempted, 4)]) == []
    # The second chunk again, as after a step that ran out of memory, then all from the start, and
    # the last chunk again, as after a step that ran out of memory at its very end.
    for computed, count in ((4, 5), (0, 3), (3, 8), (3, 8)):
        preempted.num_computed = computed
        outcomes = world.runner.run([Scheduled(preempted, count)])
    close(numbers(outcomes[0]), numbers(whole))


@pytest.mark.parametrize("name", ["llama"])
def test_poisoned_prompts_are_reported_and_their_neighbours_are_untouched(world: World) -> None:
    world.tune(0, "SEQ_CLS", 2)
    prompts = ([5, 6], [9, 8], [5, 7], [9, 7])
    poolings = (Classify(), Classify(), Embed("mean", True), Embed("mean", True))

    def answers() -> list[Outcome]:
        return world.run(
            *(world.sequence(p, 0, prompt) for p, prompt in zip(poolings, prompts, strict=True))
        )

    sound = answers()
    embedding = world.base.model.get_submodule(world.base.structure.embedding)
    embedding.weight[5] = torch.nan
    assert answers() == [NonFinite(), sound[1], NonFinite(), sound[3]]


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_answer_whole_prompts_of_all_adapters_in_one_step(world: World) -> None:
    classes, reward = world.tune(0, "SEQ_CLS", 3), world.tune(1, "SEQ_CLS", 1)
    tokens, features = world.tune(2, "TOKEN_CLS", 5), world.tune(3, "FEATURE_EXTRACTION")
    plain = hf.AutoModel.from_pretrained(world.folder / "base", attn_implementation="eager")
    mean, last = Embed("mean", normalize=False), Embed("last", normalize=False)
    long = [*PROMPT, *PROMPT[::-1], *PROMPT]
    answers = world.run(
        world.sequence(Classify(), slot=0, prompt=long),
        world.sequence(mean),
        world.sequence(Classify(), slot=2, prompt=long),
        world.sequence(Classify(), slot=1, prompt=PROMPT[:1]),
        world.sequence(Classify(), slot=0, prompt=PROMPT[2:5]),
        world.sequence(mean, slot=3, prompt=long),
        world.sequence(last, slot=3),
        world.sequence(last, prompt=long),
    )
    close(numbers(answers[0]), logits(classes, long))
    close(numbers(answers[1]), hidden(plain).mean(0))
    close(numbers(answers[2]), logits(tokens, long))
    close(numbers(answers[3]), logits(reward, PROMPT[:1]))
    close(numbers(answers[4]), logits(classes, PROMPT[2:5]))
    close(numbers(answers[5]), hidden(features, long).mean(0))
    close(numbers(answers[6]), hidden(features)[-1])
    close(numbers(answers[7]), hidden(plain, long)[-1])


@pytest.mark.parametrize("name", ["bert"])
@pytest.mark.parametrize(
    "config",
    [{"target_modules": "all-linear"}, {"modules_to_save": ["pooler"]}, {"use_dora": True}],
)
def test_the_bases_part_of_its_heads_is_adapted_like_any_module(
    world: World, config: dict[str, Any]
) -> None:
    models = [world.tune(0, "SEQ_CLS", 3, **config), world.tune(1, "SEQ_CLS", 3)]
    answers = world.run(*(world.sequence(Classify(), slot=slot) for slot in (0, 1, 0)))
    for answer, slot in zip(answers, (0, 1, 0), strict=True):
        close(numbers(answer), logits(models[slot]))


@pytest.mark.parametrize("name", ["roberta"])
def test_positions_skip_padding_where_the_model_does(world: World) -> None:
    model = world.tune(0, "SEQ_CLS", 3)
    padded = [7, PAD, 8, PAD, PAD, 9]
    alone, after = (world.sequence(Classify(), slot=0, prompt=padded) for _ in range(2))
    answers = world.run(alone, world.sequence(Classify(), slot=0), after)
    close(numbers(answers[0]), logits(model, padded))
    assert torch.equal(numbers(answers[0]), numbers(answers[2]))


@pytest.mark.parametrize("name", ["bert"])
@torch.no_grad()
def test_tokens_of_the_second_text_are_told_apart(world: World) -> None:
    model = world.tune(0, "SEQ_CLS", 3)
    types = [0] * 4 + [1] * (len(PROMPT) - 4)
    pair, single = world.sequence(Classify(), slot=0), world.sequence(Classify(), slot=0)
    pair.token_types = tuple(types)
    answers = world.run(single, pair)
    ids = torch.tensor([PROMPT])
    expected = model(input_ids=ids, token_type_ids=torch.tensor([types])).logits
    assert (expected - logits(model)).abs().max() > 0.01
    close(numbers(answers[0]), logits(model))
    close(numbers(answers[1]), expected)


@pytest.mark.parametrize("name", ["bert"])
def test_a_checkpoint_without_the_bases_part_of_a_head_has_no_such_heads(
    world: World, tmp_path: Path
) -> None:
    world.tune(0, "SEQ_CLS", 3)
    world.tune(1, "TOKEN_CLS", 3)
    hf.BertForMaskedLM(CONFIGS["bert"]()).save_pretrained(tmp_path / "masked")
    base = load_base(str(tmp_path / "masked"))
    rehearse(base, BLOCK)
    with pytest.raises(FailedPrecondition) as caught:
        parse_adapter(tmp_path / "0", "0", base.structure, torch.float32)
    assert caught.value.reason == "BASE_MISMATCH"
    assert parse_adapter(tmp_path / "1", "1", base.structure, torch.float32).task == "token"


@pytest.mark.parametrize("name", ["distilbert"])
def test_an_adapter_that_was_trained_to_generate_does_not_fit_an_encoder(world: World) -> None:
    world.tune(0, "SEQ_CLS")
    fields = json.loads((world.folder / "0" / CONFIG).read_text())
    (world.folder / "0" / CONFIG).write_text(json.dumps(fields | {"task_type": "CAUSAL_LM"}))
    with pytest.raises(FailedPrecondition, match="generates no text") as caught:
        parse_adapter(world.folder / "0", "0", world.base.structure, torch.float32)
    assert caught.value.reason == "BASE_MISMATCH"
