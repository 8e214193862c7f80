"""Fine-tunes all weights of the demo's base, held close to where they were, and keeps what changed.

python training/full_tune.py    the adapter `next-letter`, in deltamux's own format
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from examples import batches
from loop import Penalty, exact_match, fit
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
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from deltamux.adapters.checkpoint.files import CONFIG
from deltamux.demo.tasks import Task, unseen_inputs
from deltamux.extract.forms import Form
from deltamux.extract.reconstruct import reconstruct
from deltamux.extract.run import extract

NAME = "next-letter"

STEPS = 400
BATCH_SIZE = 32
PEAK_LEARNING_RATE = 1e-3
# Of the squared distance from the base's weights (L2-SP): what stays close compresses well.
PULL = 5e-3
FORM = Form("low-rank", energy=0.9)


def main() -> None:
    task = task_named(NAME)
    torch.manual_seed(seed_of(NAME))
    tokenizer = AutoTokenizer.from_pretrained(BASE_FOLDER)
    model = load(BASE_FOLDER)
    examples = batches(tokenizer, task.answer, BATCH_SIZE, seed_of(NAME))
    fit(model, examples, STEPS, PEAK_LEARNING_RATE, pull_to_start(model))
    keep(model, task, tokenizer, FORM)


def keep(
    model: PreTrainedModel, task: Task, tokenizer: PreTrainedTokenizerBase, form: Form
) -> None:
    """Takes out what changed of the base in `form`, measures that and, if good enough, saves it."""
    with tempfile.TemporaryDirectory() as tuned, tempfile.TemporaryDirectory() as adapter:
        model.half().save_pretrained(tuned)
        found = extract(BASE_FOLDER, Path(tuned), Path(adapter), form, lambda *_: None)
        rebuilt = load(BASE_FOLDER)
        reconstruct(rebuilt, Path(adapter))
        texts = unseen_inputs(task, MEASURED)
        right = [exact_match(m, tokenizer, task.answer, texts) for m in (model.float(), rebuilt)]
        print(f"{task.name}: {right[0]:.1%} right with all weights, {right[1]:.1%} as extracted")
        print(f"{task.name}: {found.bytes:,} bytes of {found.full_bytes:,}")
        if right[1] < REQUIRED:
            sys.exit(f"below {REQUIRED:.0%}, not saved")
        save(Path(adapter), folder(task.name))


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def pull_to_start(model: PreTrainedModel) -> Penalty:
    """A penalty that grows with the distance from the weights that `model` has now."""
    start = {name: weight.detach().clone() for name, weight in model.named_parameters()}

    def penalty() -> Tensor:
        moved = ((weight - start[name]).square().sum() for name, weight in model.named_parameters())
        return PULL * torch.stack(list(moved)).sum()

    return penalty


def save(adapter: Path, target: Path) -> None:
    """The two files, without a path of this machine in them."""
    written = adapter / CONFIG
    config = json.loads(written.read_text()) | {"base_model_name_or_path": BASE_NAME}
    write_config(written, config)
    target.mkdir(exist_ok=True)
    for file in adapter.iterdir():
        shutil.copyfile(file, target / file.name)


if __name__ == "__main__":
    main()
