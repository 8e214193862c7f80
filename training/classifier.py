"""Trains the adapter of the demo that classifies: LoRA and a head over the last token, by PEFT.

python training/classifier.py    the adapter `word-count`
"""

import sys

import torch
from examples import labelled_batches
from loop import fit
from peft import LoraConfig, PeftModel, get_peft_model
from shipping import BASE_FOLDER, MEASURED, REQUIRED, folder, seed_of, task_named, write_config
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from tune import ATTENTION, save

from deltamux.demo.tasks import Task, prompt, unseen_inputs

NAME = "word-count"

RANK = 4
STEPS = 250
BATCH_SIZE = 32
PEAK_LEARNING_RATE = 5e-3


def main() -> None:
    task = task_named(NAME)
    torch.manual_seed(seed_of(NAME))
    tokenizer = AutoTokenizer.from_pretrained(BASE_FOLDER)
    base = AutoModelForSequenceClassification.from_pretrained(
        BASE_FOLDER, dtype=torch.float32, num_labels=len(task.labels)
    )
    config = LoraConfig(task_type="SEQ_CLS", r=RANK, lora_alpha=2 * RANK, target_modules=ATTENTION)
    model = get_peft_model(base, config)
    examples = labelled_batches(tokenizer, task.answer, task.labels, BATCH_SIZE, seed_of(NAME))
    fit(model, examples, STEPS, PEAK_LEARNING_RATE)
    model.half().float()  # what is measured is what is stored
    right = accuracy(model, tokenizer, task)
    print(f"{NAME}: {right:.1%} of unseen inputs classified right")
    if right < REQUIRED:
        sys.exit(f"below {REQUIRED:.0%}, not saved")
    save(model.half(), folder(NAME))
    labels = {str(number): label for number, label in enumerate(task.labels)}
    # PEFT leaves the names of the labels to the model's config, which deltamux reads beside it.
    write_config(folder(NAME) / "config.json", {"id2label": labels})


@torch.inference_mode()
def accuracy(model: PeftModel, tokenizer: PreTrainedTokenizerBase, task: Task) -> float:
    texts = unseen_inputs(task, MEASURED)
    batch = tokenizer(
        [prompt(text) for text in texts], padding=True, padding_side="right", return_tensors="pt"
    )
    chosen = model(**batch).logits.argmax(-1).tolist()
    right = [
        task.labels[number] == task.answer(text) for number, text in zip(chosen, texts, strict=True)
    ]
    return sum(right) / len(texts)


if __name__ == "__main__":
    main()
