"""Fine-tunes all linear weights of the demo's base so that each change is one size, up or down.

python training/one_bit.py    the adapter `exclaimed`, in deltamux's own format
"""

import torch
from examples import batches
from full_tune import keep, load
from loop import fit
from shipping import BASE_FOLDER, seed_of, task_named
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import AutoTokenizer, PreTrainedModel

from deltamux.extract.forms import Form

NAME = "exclaimed"

STEPS = 250
BATCH_SIZE = 32
PEAK_LEARNING_RATE = 1e-3


class OneSize(nn.Module):
    """A weight whose change has one size; gradients pass as if it were the change itself."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.register_buffer("start", start.detach().clone())

    def forward(self, weight: Tensor) -> Tensor:
        change = weight - self.start
        one_size = change.abs().mean() * change.sign()
        return weight + (one_size - change).detach()


def main() -> None:
    task = task_named(NAME)
    torch.manual_seed(seed_of(NAME))
    tokenizer = AutoTokenizer.from_pretrained(BASE_FOLDER)
    model = load(BASE_FOLDER).requires_grad_(False)
    layers = linear_modules(model)
    for module in layers:
        parametrize.register_parametrization(module, "weight", OneSize(module.weight))
        module.parametrizations.weight.original.requires_grad_(True)
    examples = batches(tokenizer, task.answer, BATCH_SIZE, seed_of(NAME))
    fit(model, examples, STEPS, PEAK_LEARNING_RATE)
    for module in layers:
        parametrize.remove_parametrizations(module, "weight")  # and leaves what it made
    keep(model, task, tokenizer, Form("one-bit"))


def linear_modules(model: PreTrainedModel) -> list[nn.Linear]:
    """Those of the layers; embeddings and head stay the base's."""
    return [module for module in model.model.layers.modules() if isinstance(module, nn.Linear)]


if __name__ == "__main__":
    main()
