"""The vocabulary of a checkpoint that was trained on a resized model.

PEFT then saves the whole embedding and head, trained or not. What they have for the base's own
tokens goes the way of any checkpoint's; the rows of the tokens behind those are set apart here, so
that neither `modules_to_save` nor any family meets them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from deltamux.adapters.checkpoint.manifest import Manifest
from deltamux.adapters.checkpoint.strict_json import quoted
from deltamux.adapters.payloads.base_fit import differs, is_copy
from deltamux.adapters.payloads.rounding import to_serving
from deltamux.adapters.peft.module_tensors import PREFIX
from deltamux.adapters.peft.saved_modules import modules_to_save
from deltamux.adapters.peft.trained_tokens import TOKEN_ROWS, trained_ids
from deltamux.adapters.primitives.added_tokens import AddedTokens
from deltamux.adapters.primitives.payload import Payload
from deltamux.adapters.primitives.token_rows import TokenRows
from deltamux.adapters.primitives.virtual_tokens import KeyValuePrefix, VirtualTokens
from deltamux.base.structure import SiteSpec, Structure
from deltamux.errors import FailedPrecondition

Payloads = Mapping[str, tuple[Payload, ...]]

MAX_ADDED = 1 << 16
# A base's matrices may have rows for no token, to fill up a tile; resizing to the tokenizer's
# length then takes some away.
MAX_REMOVED = 1 << 10

# Where PEFT saves the matrix of a module that was not trained.
_COPIES = ("weight", "base_layer.weight", "token_adapter.base_layer.weight")
# Prompts are saved without the wrapper that other adapters have around the model.
_PREFIXES = (PREFIX, PREFIX.removesuffix("model."))
_ROWS_ENDS = (TOKEN_ROWS, f"token_adapter.{TOKEN_ROWS}")

# What a family may have at an embedding or head that was resized.
_BESIDE = (TokenRows, VirtualTokens, KeyValuePrefix)


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """`size` counts the tokens that the adapter knows, 0 where they are the base's; `added`
    [tokens, width] are the rows of those behind the base's by site, as far as they are saved whole.

    `tensors` is what else the checkpoint holds, shaped as if the base had never been resized.
    """

    size: int
    added: Mapping[str, Tensor]
    tensors: Mapping[str, Tensor]
    structure: Structure

    @property
    def parameters(self) -> int:
        return sum(rows.numel() for rows in self.added.values())

    @property
    def notes(self) -> tuple[str, ...]:
        return (f"{self.size} tokens in its own vocabulary",) if self.size else ()

    def complete(
        self, parsed: Payloads, saved: Payloads, dtype: torch.dtype
    ) -> dict[str, tuple[Payload, ...]]:
        """The payloads of family and saved modules, with those of added tokens beside them.

        Raises FailedPrecondition (ADDED_TOKENS) for other changes of a resized module, and where
        the rows of an added token are not in the checkpoint.
        """
        payloads = {**parsed, **saved}
        if not self.size:
            return payloads
        for site in _resized(self.structure):
            if any(not isinstance(payload, _BESIDE) for payload in parsed.get(site.name, ())):
                raise _refused(f"{site.name} is changed by more than rows of its own")
            payloads[site.name] = self._with_added(site, payloads.get(site.name, ()), dtype)
        return {name: of_site for name, of_site in payloads.items() if of_site}

    def _with_added(
        self, site: SiteSpec, payloads: Iterable[Payload], dtype: torch.dtype
    ) -> tuple[Payload, ...]:
        known, rows = _known(site), self.added.get(site.name)
        if rows is not None:
            rows = to_serving(site, rows.float() * site.embed_scale, dtype)
        kept: list[Payload] = []
        for payload in payloads:
            if isinstance(payload, TokenRows):
                rows = _trained_over(rows, payload, known, self.size)
                payload = _of_the_base(payload, known)
            kept += [payload] if payload.tensors[0].numel() else []
        if rows is None:
            raise _refused(
                f"the rows of {site.name} for its {self.size} tokens are not in the checkpoint",
                "ADDED_TOKENS" if self.size > known else "BASE_MISMATCH",
            )
        if self.size <= known:
            return tuple(kept)
        return (*kept, AddedTokens.of(range(known, self.size), rows))


def take_vocabulary(
    manifest: Manifest, tensors: Mapping[str, Tensor], structure: Structure
) -> Vocabulary:
    """Sets the rows of added tokens apart.

    Raises FailedPrecondition (ADDED_TOKENS, BASE_MISMATCH) for a resized model whose matrices are
    not all in the checkpoint or were changed in another way than row by row.
    """
    sites = _resized(structure)
    tensors = _without_tied_rows(manifest, tensors, structure)
    left = dict(tensors)
    given = {site.name: _take_matrices(site, left) for site in sites}
    size = _size(manifest, given, structure) if sites and manifest.library == "peft" else 0
    if not size:
        return Vocabulary(0, {}, tensors, structure)
    saved = modules_to_save(manifest, structure)
    added = {}
    for site in sites:
        if structure.bias(site.name) is not None:
            raise _refused(f"{site.name} has a bias")
        base = structure.weight(site.name)
        for end, (name, matrix) in given[site.name].items():
            _require_width(site, base, name, matrix)
            if site.name not in saved:
                _require_copy(name, matrix, base)
            elif end == "weight":
                left[name] = _of_known_tokens(matrix, base)
            else:
                left[name] = matrix
                continue
            added[site.name] = matrix[_known(site) :]
    _follow(structure, given, saved, added)
    _require_rows_only(sites, left)
    return Vocabulary(size, added, left, structure.with_added(size - _known(sites[0])))


def _resized(structure: Structure) -> list[SiteSpec]:
    """The modules with a row for each token; none for a base whose embedding is out of reach."""
    names = (structure.embedding, structure.head)
    sites = [structure.sites[name] for name in names if name in structure.sites]
    return sites if len(sites) == (2 if structure.head else 1) else []


def _known(site: SiteSpec) -> int:
    return site.in_features if site.kind == "embedding" else site.out_features


def _take_matrices(site: SiteSpec, left: dict[str, Tensor]) -> dict[str, tuple[str, Tensor]]:
    """By how their names end: name and matrix."""
    names = {f"{prefix}{site.name}.{end}": end for prefix in _PREFIXES for end in _COPIES}
    found: dict[str, tuple[str, Tensor]] = {}
    for name, end in names.items():
        is_matrix = name in left and left[name].ndim == 2 and left[name].is_floating_point()
        if is_matrix and end not in found:
            found[end] = (name, left.pop(name))
    return found


def _size(
    manifest: Manifest, given: Mapping[str, Mapping[str, tuple[str, Tensor]]], structure: Structure
) -> int:
    """How many tokens the trained model had; 0 where they are the base's."""
    known = _known(structure.sites[structure.embedding])
    sizes = {len(matrix) for of_site in given.values() for _, matrix in of_site.values()}
    reach = max(trained_ids(manifest), default=-1) + 1
    if not sizes - {known} and reach <= known:
        return 0
    if len(sizes) > 1 or (sizes and reach > max(sizes)):
        counts = ", ".join(map(str, sorted(sizes | {reach})))
        raise _refused(f"its matrices and trained tokens have rows for {counts} tokens")
    size = max(sizes, default=reach)
    if size > known + MAX_ADDED:
        raise _refused(f"{size - known} tokens are more than {MAX_ADDED}")
    if size < known - MAX_REMOVED:
        raise _refused(f"it has {size} tokens, the base model {known}", "BASE_MISMATCH")
    return size


def _require_width(site: SiteSpec, base: Tensor, name: str, matrix: Tensor) -> None:
    if matrix.shape[1] != base.shape[1]:
        raise FailedPrecondition(
            f"{quoted(name)} has rows of {matrix.shape[1]} numbers, {site.name} of {base.shape[1]}",
            reason="BASE_MISMATCH",
        )


def _require_copy(name: str, matrix: Tensor, base: Tensor) -> None:
    """Of what was not trained: it has to be the base's own, but for added tokens."""
    same = slice(min(len(matrix), len(base)))
    if not is_copy(matrix[same], base[same]):
        raise differs(name)


def _of_known_tokens(matrix: Tensor, base: Tensor) -> Tensor:
    """The rows of the base's own tokens, its own ones where the trained model had none."""
    removed = base[len(matrix) :].detach().to("cpu", matrix.dtype)
    return torch.cat((matrix[: len(base)], removed))


def _follow(
    structure: Structure,
    given: Mapping[str, Mapping[str, object]],
    saved: Collection[str],
    added: dict[str, Tensor],
) -> None:
    """A tied head that is not saved beside its embedding has the embedding's rows."""
    embedding, head = structure.embedding, structure.head
    if structure.tied and not given[head] and embedding in added and embedding not in saved:
        added[head] = added[embedding]


def _require_rows_only(sites: Iterable[SiteSpec], left: Mapping[str, Tensor]) -> None:
    for site in sites:
        beginning = f"{PREFIX}{site.name}."
        allowed = {f"{beginning}{end}" for end in ("weight", *_ROWS_ENDS)}
        for name in left:
            if name.startswith(beginning) and name not in allowed:
                raise _refused(f"{quoted(name)} changes it in another way")


def _without_tied_rows(
    manifest: Manifest, tensors: Mapping[str, Tensor], structure: Structure
) -> Mapping[str, Tensor]:
    """PEFT saves the trained rows of a tied pair once, or with their matrices twice."""
    if not structure.tied or manifest.type == "TRAINABLE_TOKENS":
        return tensors
    head, embedding = (
        f"{PREFIX}{name}.{_ROWS_ENDS[1]}" for name in (structure.head, structure.embedding)
    )
    if head in tensors and embedding in tensors and torch.equal(tensors[head], tensors[embedding]):
        return {name: tensor for name, tensor in tensors.items() if name != head}
    return tensors


def _trained_over(rows: Tensor | None, trained: TokenRows, known: int, size: int) -> Tensor | None:
    """`rows` of the added tokens with those that were trained alone in their places."""
    own = trained.ids >= known
    places = trained.ids[own].long() - known
    if rows is None:
        # Ids ascend: so many are all of them.
        return trained.rows[own] if len(places) == size - known else None
    return rows.index_copy(0, places, trained.rows[own])


def _of_the_base(trained: TokenRows, known: int) -> TokenRows:
    own = trained.ids < known
    return TokenRows(trained.ids[own].contiguous(), trained.rows[own].contiguous())


def _refused(why: str, reason: str = "ADDED_TOKENS") -> FailedPrecondition:
    return FailedPrecondition(
        f"the adapter was trained with a vocabulary of its own: {why}", reason=reason
    )
