"""The real server over an encoder: Classify and Embed as transformers and PEFT have it."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from deltamux.client import (
    AsyncClient,
    ClientError,
    classify_request,
    embed_request,
    generate_request,
)
from deltamux.demo.server import Server

WORDS = ["good", "bad", "day", "night", "very", "not", "a", "the"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
SMALL = {
    "vocab_size": len(WORDS) + len(SPECIAL),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
TEXTS = ["a good day", "the very very bad night", "not"]
PATIENCE = 60.0


def tokenizer() -> hf.PreTrainedTokenizerFast:
    """Words between [CLS] and [SEP]; left as a training script leaves it, cutting and padding."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    backend.enable_truncation(3)
    backend.enable_padding(length=12)
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


class Library:
    """BERT with a classifier on pairs and one on tokens, as PEFT has saved them."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.base, self.adapters = folder / "base", folder / "adapters"
        hf.BertForPreTraining(hf.BertConfig(**SMALL)).save_pretrained(self.base)
        tokenizer().save_pretrained(self.base)
        self.tokenizer = hf.AutoTokenizer.from_pretrained(self.base)
        self.body = hf.AutoModel.from_pretrained(self.base).eval()
        self.pairs = self._tuned("pairs", hf.AutoModelForSequenceClassification, "SEQ_CLS")
        self.words = self._tuned("words", hf.AutoModelForTokenClassification, "TOKEN_CLS")

    def _tuned(self, name: str, auto: Any, task: str) -> Any:
        model = auto.from_pretrained(self.base, num_labels=3)
        config = peft.LoraConfig(task_type=task, target_modules=["query"], init_lora_weights=False)
        tuned = peft.get_peft_model(model, config).eval()
        tuned.save_pretrained(self.adapters / name)
        return tuned

    @torch.inference_mode()
    def run(self, model: Any, *texts: str) -> Any:
        return model(**self.tokenizer(*texts, return_tensors="pt", padding=False))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Library(tmp_path_factory.mktemp("library"))


@pytest.fixture(scope="module")
def server(library: Library, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    arguments = [
        "--device=cpu",
        "--threads=1",
        "--max-num-batched-tokens=16",
        f"--adapter-dir={library.adapters}",
        f"--adapter-cache-dir={tmp_path_factory.mktemp('cache')}",
    ]
    with Server(f"--model={library.base}", *arguments) as running:
        yield running


def close(got: list[float], expected: torch.Tensor) -> None:
    torch.testing.assert_close(torch.tensor(got), expected, atol=1e-4, rtol=1e-4)


async def test_encoders_classify_and_embed(server: Server, library: Library) -> None:
    async with AsyncClient(server.target, timeout=PATIENCE) as client:
        pairs, words, vectors = await asyncio.gather(
            asyncio.gather(
                *(
                    client.classify(classify_request(text, adapter="pairs", text_pair="a bad day"))
                    for text in TEXTS
                )
            ),
            asyncio.gather(
                *(client.classify(classify_request(text, adapter="words")) for text in TEXTS)
            ),
            asyncio.gather(*(client.embed(embed_request(text, normalize=False)) for text in TEXTS)),
        )
    for text, positions in zip(TEXTS, pairs, strict=True):
        expected = library.run(library.pairs, text, "a bad day").logits[0]
        assert len(positions) == 1
        close([score.logit for score in positions[0]], expected)
    for text, positions in zip(TEXTS, words, strict=True):
        expected = library.run(library.words, text).logits[0]
        close([[score.logit for score in position] for position in positions], expected)
    for text, vector in zip(TEXTS, vectors, strict=True):
        close(vector, library.run(library.body, text).last_hidden_state[0].mean(0))


async def test_what_an_encoder_cannot_do_says_so(server: Server) -> None:
    async with AsyncClient(server.target, timeout=PATIENCE) as client:
        for request in (generate_request("a day"), generate_request("a day", adapter="pairs")):
            with pytest.raises(ClientError) as caught:
                await client.generate(request)
            assert (caught.value.code, caught.value.reason) == (
                "FAILED_PRECONDITION",
                "NO_GENERATION",
            )
        # A prompt is read in one step, of 16 tokens here.
        assert len(await client.embed(embed_request("a day " * 7))) == 32
        with pytest.raises(ClientError) as caught:
            await client.embed(embed_request("a day " * 8))
        assert (caught.value.code, caught.value.reason) == ("INVALID_ARGUMENT", "PROMPT_TOO_LONG")
