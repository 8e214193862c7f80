"""Compares two checkpoints tensor by tensor and writes what changed as an adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from deltamux.adapters.checkpoint import delta_format as words
from deltamux.adapters.checkpoint.files import CONFIG, WEIGHTS
from deltamux.errors import InvalidArgument
from deltamux.extract.exact import Use, exact_parts
from deltamux.extract.forms import Form, Parts, change, size_of
from deltamux.extract.parameters import Parameters, require_same_model
from deltamux.extract.report import Extraction, Stored
from deltamux.extract.weights_file import WeightsFile

# Told before each parameter: how many are done, of how many, and its name.
Progress = Callable[[int, int, str], None]


def extract(
    base_folder: Path, tuned_folder: Path, out: Path, form: Form, progress: Progress
) -> Extraction:
    """Writes the adapter to `out`; never holds more than one tensor of either checkpoint.

    Raises InvalidArgument where the two are no base and fine-tune of it, where something changed
    that cannot be stored, and where nothing changed at all.
    """
    base, tuned = Parameters(base_folder), Parameters(tuned_folder)
    require_same_model(base, tuned)
    _require_unknown_unchanged(base, tuned)
    names = _names(base, tuned)
    stored: list[Stored] = []
    with WeightsFile(out / WEIGHTS) as file:
        for number, name in enumerate(names):
            progress(number, len(names), name)
            if (entry := _store(name, base, tuned, form, file)) is not None:
                stored.append(entry)
        if not stored:
            raise InvalidArgument(f"{tuned_folder} has the same weights as {base_folder}")
    config = {
        "deltamux_type": words.TYPE,
        "version": words.VERSION,
        "base_model_name_or_path": base.config._name_or_path or str(base_folder),
        "form": form.name,
    }
    (out / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return Extraction(
        tuple(stored), len(names) - len(stored), (out / WEIGHTS).stat().st_size, tuned.file_bytes
    )


def _names(base: Parameters, tuned: Parameters) -> list[str]:
    """All parameters to compare; only a bias may be in one model and not in the other.

    Those that both have under unknown keys have been compared.
    """
    names = list(dict.fromkeys([*base.names, *tuned.names]))
    for name in names:
        if not tuned.knows(name):
            raise InvalidArgument(f"{tuned.folder} lacks {name}, which the base has")
        if not base.knows(name) and not name.endswith(".bias"):
            raise InvalidArgument(f"{tuned.folder} has {name}, which the base lacks")
    return [
        name for name in names if not all(p.stored_under_other_keys(name) for p in (base, tuned))
    ]


def _require_unknown_unchanged(base: Parameters, tuned: Parameters) -> None:
    for key in sorted(base.unknown_keys | tuned.unknown_keys):
        both = base.unknown_keys & tuned.unknown_keys
        if key not in both or not _same(base.read_unknown(key), tuned.read_unknown(key)):
            raise InvalidArgument(
                f"{key} changed, and is no parameter under that name in transformers' model "
                "(a renamed or fused one, or one of an expert): it cannot be stored exactly"
            )


def _store(
    name: str, base: Parameters, tuned: Parameters, form: Form, file: WeightsFile
) -> Stored | None:
    """Writes the parts of one parameter; None where it did not change."""
    value = tuned.read(name)
    before = base.read(name) if base.knows(name) else None
    _check(name, value, before)
    # A tied head follows the embeddings: a value of its own, changed or not, unties it.
    untied = before is not None and base.is_alias(name)
    if before is not None and _same(value, before) and not untied:
        return None
    if not tuned.is_of_a_site(name):
        raise InvalidArgument(f"{name} changed, and changes of such a parameter are not served")
    form_name, parts, error = _parts(value, before, tuned.use(name), form)
    written = {f"{name}.{part}": tensor for part, tensor in parts.items()}
    if before is not None:
        written[f"{name}.{words.SAMPLE}"] = words.base_sample(before)
    return Stored(
        name,
        form_name,
        parts[words.LOW_RANK_A].shape[0] if words.LOW_RANK_A in parts else None,
        sum(file.add(key, tensor) for key, tensor in written.items()),
        value.numel() * value.element_size(),
        error,
    )


def _check(name: str, value: Tensor, before: Tensor | None) -> None:
    if before is not None and value.shape != before.shape:
        raise InvalidArgument(
            f"{name} has shape {tuple(value.shape)}, {tuple(before.shape)} in the base; "
            "a resized vocabulary or another architecture is no change of weights"
        )
    if not torch.isfinite(value).all():
        raise InvalidArgument(f"{name} of the fine-tune holds NaN or infinity")


def _parts(value: Tensor, before: Tensor | None, use: Use, form: Form) -> tuple[str, Parts, float]:
    """The name of the form, the parts and their error; no loss where none takes no more."""
    name, exact = exact_parts(value, before, use)
    if use == "linear" and before is not None and form.name != "exact":
        delta = value.float() - before.float()
        parts = form.parts(delta, value.dtype)
        if size_of(parts) < size_of(exact):
            error = torch.linalg.vector_norm(change(parts, delta.shape) - delta)
            return form.name, parts, float(error / torch.linalg.vector_norm(delta))
    return name, exact, 0.0


def _same(value: Tensor, before: Tensor) -> bool:
    """Whether they hold the same numbers, whatever their dtypes."""
    if value.dtype != before.dtype:
        value, before = value.float(), before.float()
    return torch.equal(value, before)
