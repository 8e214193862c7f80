"""Trains the adapter of the demo that AdapterHub writes: a bottleneck behind each layer's MLP.

python -m venv /tmp/adapterhub
/tmp/adapterhub/bin/pip install torch==2.13.0 adapters==1.3.0
PYTHONPATH=server /tmp/adapterhub/bin/python training/bottleneck.py    the adapter `previous-letter`

`adapters` 1.3.0 needs transformers 4.57.6, which cannot live beside the transformers that deltamux
drives; so it gets an environment of its own.
"""

import json
import sys

import adapters
import torch
from examples import batches
from loop import exact_match, fit
from shipping import (
    BASE_FOLDER,
    BASE_NAME,
    MEASURED,
    REQUIRED,
    folder,
    seed_of,
    task_named,
    write_config,
)
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from deltamux.demo.tasks import unseen_inputs

NAME = "previous-letter"

REDUCTION = 2  # the hidden size through this is the width
STEPS = 600
BATCH_SIZE = 32
PEAK_LEARNING_RATE = 1e-2


def main() -> None:
    task = task_named(NAME)
    torch.manual_seed(seed_of(NAME))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(
        BASE_FOLDER, model_input_names=["input_ids", "attention_mask"]
    )
    model = AutoModelForCausalLM.from_pretrained(BASE_FOLDER, dtype=torch.float32)
    adapters.init(model)
    model.add_adapter(NAME, config=adapters.SeqBnConfig(reduction_factor=REDUCTION))
    model.train_adapter(NAME)
    examples = batches(tokenizer, task.answer, BATCH_SIZE, seed_of(NAME))
    fit(model, examples, STEPS, PEAK_LEARNING_RATE)
    model.half().float()  # what is measured is what is stored
    model.generation_config.use_cache = False  # with adapters 1.3.0, cached tokens come out wrong
    right = exact_match(model, tokenizer, task.answer, unseen_inputs(task, MEASURED))
    print(f"{NAME}: {right:.1%} of unseen inputs answered to the letter")
    if right < REQUIRED:
        sys.exit(f"below {REQUIRED:.0%}, not saved")
    save(model.half())


def save(model: PreTrainedModel) -> None:
    """AdapterHub's two files that serve, without a path of this machine in them."""
    target = folder(NAME)
    model.save_adapter(str(target), NAME, with_head=False, use_safetensors=True)
    written = target / "adapter_config.json"
    write_config(written, json.loads(written.read_text()) | {"model_name": BASE_NAME})


if __name__ == "__main__":
    main()
