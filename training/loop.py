"""One training run with its progress, and how often the result is exactly right."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from examples import Answer, Batch
from torch.optim.lr_scheduler import OneCycleLR
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltamux.demo.tasks import prompt

REPORT_EVERY = 50

torch.set_num_threads(1)  # a model this small gains little from more, and sums stay in one order


Penalty = Callable[[], torch.Tensor]


def fit(
    model: PreTrainedModel,
    batches: Iterator[Batch],
    steps: int,
    peak: float,
    penalty: Penalty | None = None,
) -> None:
    """Trains all weights of `model` that want gradients, at a rate that climbs to `peak` first.

    A `penalty` is added to the loss of every step.
    """
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = OneCycleLR(optimizer, max_lr=peak, total_steps=steps, pct_start=0.05)
    started, total = time.monotonic(), 0.0
    model.train()
    for step, batch in enumerate(itertools.islice(batches, steps), start=1):
        loss = model(**batch, use_cache=False).loss
        (loss if penalty is None else loss + penalty()).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        total += loss.item()
        if step % REPORT_EVERY == 0:
            seconds = time.monotonic() - started
            print(
                f"  {step:5}/{steps}  loss {total / REPORT_EVERY:.5f}  {seconds:4.0f} s", flush=True
            )
            total = 0.0
    model.eval()


def exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    answer: Answer,
    texts: Sequence[str],
) -> float:
    """The share of `texts` that greedy generation answers to the letter."""
    right = 0
    for alike in _of_one_length(texts):
        wanted = [answer(text) for text in alike]
        batch = tokenizer([prompt(text) for text in alike], return_tensors="pt")
        longest = max(map(len, wanted))
        with torch.inference_mode():
            output = model.generate(**batch, do_sample=False, max_new_tokens=1 + longest)
        replies = tokenizer.batch_decode(
            output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
        )
        right += sum(map(str.__eq__, replies, wanted))
    return right / len(texts)


def _of_one_length(texts: Sequence[str]) -> list[list[str]]:
    """Padding would come between a prompt and its virtual tokens, which training never saw."""
    return [list(alike) for _, alike in itertools.groupby(sorted(texts, key=len), len)]
