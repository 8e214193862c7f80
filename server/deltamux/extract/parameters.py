"""What the tensors of a checkpoint are in the model: parameters by name, and how each is used."""

from __future__ import annotations

import inspect
import re
from collections import defaultdict
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.pytorch_utils import Conv1D

from deltamux.base.encoders import encoder_of
from deltamux.errors import InvalidArgument, first_line
from deltamux.extract.checkpoint import ModelCheckpoint
from deltamux.extract.exact import Use


class Parameters:
    """The parameters of one checkpoint under the names that transformers' model gives them.

    Weights are read as the own format means them: [out, in], those of a Conv1D transposed.
    """

    def __init__(self, folder: Path) -> None:
        """Raises InvalidArgument for a folder without a config or weights that can be read."""
        self.folder = folder
        self.config = _config(folder)
        self._model = _skeleton(self.config)
        self._checkpoint = ModelCheckpoint(folder)
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        # Names of one and the same parameter: tied embeddings and head.
        self._same: defaultdict[int, list[str]] = defaultdict(list)
        for name, parameter in parameters.items():
            self._same[id(parameter)].append(name)
        self._id_of = {name: id(parameter) for name, parameter in parameters.items()}
        self._key_of = self._keys()

    @property
    def names(self) -> list[str]:
        """All parameters in the model's order, each under its first name."""
        return [names[0] for names in self._same.values()]

    @property
    def file_bytes(self) -> int:
        return self._checkpoint.file_bytes

    @cached_property
    def unknown_keys(self) -> set[str]:
        """Tensors of the checkpoint that are no parameter, renamed or fused ones for instance."""
        known = set(self._key_of.values())
        ignored = self._model._keys_to_ignore_on_load_unexpected or ()
        return {
            key
            for key in self._checkpoint.keys
            if key not in known and not any(re.search(pattern, key) for pattern in ignored)
        }

    def read_unknown(self, key: str) -> Tensor:
        return self._checkpoint.read(key)

    def is_alias(self, name: str) -> bool:
        """Whether it is another name of a parameter that `names` has, as a tied head's."""
        return self._same[self._id_of[name]][0] != name

    def knows(self, name: str) -> bool:
        return name in self._id_of

    def stored_under_other_keys(self, name: str) -> bool:
        """Whether only the unknown keys can hold it: renamed, fused or split in the checkpoint."""
        if not (self.knows(name) and self.unknown_keys):
            return False
        return not any(n in self._key_of for n in self._same[self._id_of[name]])

    def read(self, name: str) -> Tensor:
        """The parameter of this name or of an alias.

        Raises InvalidArgument where the checkpoint lacks it, or holds two that differ.
        """
        keys = {self._key_of[n] for n in self._same[self._id_of[name]] if n in self._key_of}
        if not keys:
            raise InvalidArgument(f"{self.folder} lacks {name}")
        first, *others = sorted(keys)
        tensor = self._checkpoint.read(first)
        for other in others:
            if not torch.equal(tensor, self._checkpoint.read(other)):
                raise InvalidArgument(
                    f"{self.folder}: {first} and {other} differ, but its config ties them"
                )
        return tensor.T if isinstance(self._module(name), Conv1D) and tensor.ndim == 2 else tensor

    def use(self, name: str) -> Use:
        """Whether it is a linear module's weight, or a table with a row a token: the head's too."""
        module = self._module(name)
        if not name.endswith(".weight") or not isinstance(
            module, nn.Linear | Conv1D | nn.Embedding
        ):
            return "whole"
        if module is self._model.get_output_embeddings():
            return "whole" if module.bias is not None else "table"
        return "table" if isinstance(module, nn.Embedding) else "linear"

    def is_of_a_site(self, name: str) -> bool:
        """Whether a changed one can be served at all: no expert or router of a mixture, and no
        table of positions that finds out by itself which they are, as OPT's."""
        module = self._module(name)
        if not name.endswith((".weight", ".bias")):
            return False
        if isinstance(module, nn.Embedding):
            return len(inspect.signature(module.forward).parameters) == 1
        known = isinstance(module, nn.Linear | Conv1D)
        return known or self._model.get_parameter(name).ndim == 1

    def _module(self, name: str) -> nn.Module:
        module: nn.Module = self._model.get_submodule(name.rpartition(".")[0])
        return module

    def _keys(self) -> dict[str, str]:
        """Name of each parameter -> its key; checkpoints may leave the model's prefix out, and have
        names that transformers has given up, as `embed_out` of GPT-NeoX."""
        prefix = f"{self._model.base_model_prefix}."
        renamings = _renamings(self._model)
        found: dict[str, str] = {}
        for key in self._checkpoint.keys:
            today = key
            for renaming in renamings:
                today, _ = renaming.rename_source_key(today)
            for name in (key, today, prefix + today, today.removeprefix(prefix)):
                if name in self._id_of:
                    if name in found:
                        raise InvalidArgument(f"{self.folder} holds {name} twice")
                    found[name] = key
                    break
        return found


def require_same_model(base: Parameters, tuned: Parameters) -> None:
    """Raises InvalidArgument where the configs name models that compute differently."""
    fields, others = (_computing(parameters.config) for parameters in (base, tuned))
    for name in sorted(fields.keys() | others.keys()):
        if fields.get(name) != others.get(name):
            raise InvalidArgument(
                f"the configs differ in {name}: {fields.get(name)!r:.60} of the base, "
                f"{others.get(name)!r:.60} of the fine-tune; only weights may differ"
            )


# Fields of a config that do not change what the model computes from its weights.
_HARMLESS = {
    "_name_or_path", "architectures", "attention_bias", "attention_dropout", "attn_pdrop",
    "auto_map", "bos_token_id", "dtype", "embd_pdrop", "eos_token_id", "id2label",
    "initializer_range", "label2id", "max_position_embeddings", "mlp_bias", "output_attentions",
    "output_hidden_states", "pad_token_id", "pretraining_tp", "problem_type", "resid_pdrop",
    "return_dict", "sep_token_id", "task_specific_params", "tie_word_embeddings",
    "tokenizer_class", "torch_dtype", "transformers_version", "unsloth_fixed", "unsloth_version",
    "use_cache",
}  # fmt: skip


def _computing(config: PreTrainedConfig) -> dict[str, object]:
    return {name: value for name, value in config.to_dict().items() if name not in _HARMLESS}


def _config(folder: Path) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    # Whatever a broken config makes transformers stumble over.
    except Exception as error:
        raise InvalidArgument(f"{folder} is no model: {first_line(error)}") from None


def _renamings(model: PreTrainedModel) -> list[WeightRenaming]:
    transforms = get_model_conversion_mapping(model, add_legacy=False)
    return [transform for transform in transforms if isinstance(transform, WeightRenaming)]


def _skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The model without memory for its weights."""
    if encoder_of(config) is not None:
        raise InvalidArgument(
            f"{config.model_type!r} is an encoder; fine-tunes of models that generate are read"
        )
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:
        raise InvalidArgument(
            f"{config.model_type!r} is no language model: {first_line(error)}"
        ) from None
