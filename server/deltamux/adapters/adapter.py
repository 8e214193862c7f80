"""A parsed adapter in host memory: what it adds at each site of the base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain

from deltamux.adapters.primitives.payload import Payload
from deltamux.adapters.primitives.task_head import TaskHead
from deltamux.adapters.primitives.virtual_tokens import (
    NO_VIRTUAL,
    KeyValuePrefix,
    Virtual,
    VirtualTokens,
)
from deltamux.adapters.task import Task
from deltamux.adapters.traits import Traits


@dataclass(frozen=True, eq=False)
class Adapter:
    """All that the device needs to know of one adapter version, checked against the base."""

    digest: str
    family: str
    # The largest rank at any site; 0 where the family has none.
    rank: int
    # Trained numbers in the checkpoint.
    parameters: int
    # What a reader should know about how it is served; empty for most.
    note: str
    payloads: Mapping[str, tuple[Payload, ...]]
    task: Task = "generation"
    # What takes the place of the language head, for tasks that have it.
    head: TaskHead | None = None
    invocation: tuple[int, ...] = ()
    reach: int | None = None
    # Tokens of a vocabulary of its own; 0 where it is the base's.
    vocab_size: int = 0

    @property
    def traits(self) -> Traits:
        return Traits(self._virtual, self.invocation, self.reach, self.vocab_size)

    @property
    def _virtual(self) -> Virtual:
        for payload in chain.from_iterable(self.payloads.values()):
            if isinstance(payload, VirtualTokens | KeyValuePrefix):
                return payload.virtual
        return NO_VIRTUAL

    @property
    def host_bytes(self) -> int:
        tensors = [t for site in self.payloads.values() for p in site for t in p.tensors]
        tensors += () if self.head is None else self.head.tensors
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
