"""Loads a transformers model and makes it ready to be driven: frozen, probed, its sites known."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from deltamux.base.device import find_device
from deltamux.base.encoders import Encoder, encoder_of, heads_of, set_shared_apart
from deltamux.base.fused import can_fuse, fuse
from deltamux.base.last_hidden import LastHidden
from deltamux.base.out_of_memory import is_out_of_memory, memory_for
from deltamux.base.packed_linear import pack_linears
from deltamux.base.probe import AttentionLayer, probe
from deltamux.base.stacked_linears import stack_linears
from deltamux.base.structure import Structure, find_structure
from deltamux.errors import StartupError, first_line

AttentionFunction = Callable[..., tuple[Tensor, None]]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_attention_numbers = itertools.count()


@dataclass(frozen=True)
class Base:
    """One frozen model that all requests share."""

    model: PreTrainedModel
    device: torch.device
    dtype: torch.dtype
    structure: Structure
    last_hidden: LastHidden
    # None: it generates.
    encoder: Encoder | None
    # Rows of the token embedding, and the logits of one row.
    vocab_size: int
    # Kinds of segments that a prompt of a pair has; 0 for a model that tells none apart.
    token_types: int
    # Positions that the model knows.
    max_model_len: int
    # transformers looks attention functions up by name, in a table that all models share.
    attention_name: str

    @property
    def config(self) -> PreTrainedConfig:
        return self.model.config

    @property
    def layers(self) -> tuple[AttentionLayer, ...]:
        return self.structure.layers

    def set_attention(self, attention: AttentionFunction) -> None:
        """Makes every layer call `attention` from now on; the function before it is let go."""
        ALL_ATTENTION_FUNCTIONS.register(self.attention_name, attention)
        self.model.set_attn_implementation(self.attention_name)

    def set_plain_attention(self) -> None:
        """Back to transformers' own attention, the reference."""
        self.model.set_attn_implementation("eager")


def load_base(model: str, device: str = "cpu", dtype: str = "auto") -> Base:
    """Loads the model in a local folder, or of a hub id, on one device.

    `dtype` is "float32", "bfloat16", "float16" or "auto": the checkpoint's own on a GPU, float32 on
    a CPU. No code of the checkpoint is run. A GPU becomes the current one of this thread. Raises
    StartupError when there is no such model, its weights are incomplete or larger than the memory,
    or deltamux cannot serve its architecture.
    """
    with memory_for(f"the weights of {model}"):
        place = find_device(device)
        config = _config(model)
        loaded, missing = _weights(model, config, _dtype(dtype, place))
        return adopt(loaded.to(place), missing)


def adopt(model: PreTrainedModel, missing: frozenset[str] = frozenset()) -> Base:
    """Freezes and probes a model that is in memory; it belongs to the returned Base from now on.

    `missing` names the parameters that its checkpoint lacks.
    """
    model.eval().requires_grad_(False)
    set_shared_apart(model, missing)
    encoder = encoder_of(model.config)
    layers = probe(model, causal=encoder is None)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    vocab_size = (embedding if head is None else head.weight).shape[0]
    pack_linears(model)
    structure = find_structure(model, layers)
    if can_fuse(embedding):
        fuse(model)
    if embedding.device.type == "cuda":
        stack_linears(model, structure)
    return Base(
        model=model,
        device=embedding.device,
        dtype=embedding.dtype,
        structure=structure,
        last_hidden=LastHidden(model),
        encoder=encoder,
        vocab_size=vocab_size,
        token_types=0 if encoder is None else getattr(model.config, "type_vocab_size", 0),
        max_model_len=_max_model_len(model.config, encoder),
        attention_name=f"deltamux_{next(_attention_numbers)}",
    )


def _dtype(name: str, device: torch.device) -> torch.dtype | str:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if name not in _DTYPES:
        raise StartupError(f"unknown dtype {name!r}: auto, {', '.join(_DTYPES)} are possible")
    return _DTYPES[name]


def _config(model: str) -> PreTrainedConfig:
    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        raise StartupError(f"{model} is not a model: it has no config.json")
    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=False)
    # Whatever a broken config makes transformers stumble over.
    except Exception as error:
        raise _not_loaded(model, error) from error


def _weights(
    model: str, config: PreTrainedConfig, dtype: torch.dtype | str
) -> tuple[PreTrainedModel, frozenset[str]]:
    """The model, and the parameters outside its body that its checkpoint lacks."""
    generates = encoder_of(config) is None
    auto = AutoModelForCausalLM if generates else AutoModelForSequenceClassification
    try:
        loaded, report = auto.from_pretrained(
            model,
            config=config,
            dtype=dtype,
            attn_implementation="eager",
            trust_remote_code=False,
            output_loading_info=True,
            # Told apart below: transformers' own error says to look into its log.
            ignore_mismatched_sizes=True,
        )
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise _not_loaded(model, error) from error
    if mismatched := sorted(report["mismatched_keys"]):
        name, stored, configured = mismatched[0]
        raise StartupError(
            f"{model} cannot be loaded: {name} has shape {tuple(stored)}, its config says "
            f"{tuple(configured)}"
        )
    missing = frozenset(report["missing_keys"])
    _check_complete(model, missing - heads_of(loaded, missing))
    return loaded, missing


def _check_complete(model: str, names: Collection[str]) -> None:
    """transformers fills what is missing with random numbers; that must not be served."""
    missing = sorted(names)
    if missing:
        raise StartupError(
            f"{model} is incomplete: {len(missing)} weights are missing, {missing[0]} among them"
        )


def _not_loaded(model: str, error: Exception) -> StartupError:
    if isinstance(error, OSError) and not Path(model).exists():
        return StartupError(f"{model} is neither a folder nor a model that the hub can give")
    return StartupError(f"{model} cannot be loaded: {first_line(error)}")


def _max_model_len(config: PreTrainedConfig, encoder: Encoder | None) -> int:
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(length, int):
        raise StartupError(f"the config of {config.model_type!r} names no max_position_embeddings")
    # Where positions count from behind the padding's id, those up to it are no token's.
    skipped = config.pad_token_id + 1 if encoder is not None and encoder.skips_padding else 0
    return length - skipped
