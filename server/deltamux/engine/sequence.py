"""One choice of one request while it runs: its tokens, its blocks and its counters."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import NamedTuple

from deltamux.adapters.primitives.virtual_tokens import Virtual
from deltamux.adapters.task import Call
from deltamux.adapters.traits import PLAIN, Traits
from deltamux.engine.activation import NEVER, first_adapted
from deltamux.wire.messages import Classify, Embed, Sampling, Stopping


@dataclass(eq=False)
class Sequence:
    """State that the scheduler decides on and the runner turns into tensors.

    Its places are the adapter's virtual tokens, then its own. Places 0 .. num_computed - 1 have
    their keys and values in `blocks`. A preempted sequence keeps its tokens and loses its blocks.
    """

    request_id: str
    index: int
    tokens: list[int]
    num_prompt: int
    sampling: Sampling
    stopping: Stopping
    priority: int
    arrival: float
    deadline: float | None
    # Digest and folder of the adapter; empty for the base.
    adapter: str
    adapter_path: str
    # Sequences of different salts share no block.
    cache_salt: str
    # None: it generates. Otherwise it ends with its prompt.
    pooling: Classify | Embed | None = None
    # Which of two texts each token belongs to; empty for one text.
    token_types: tuple[int, ...] = ()
    # One more than the largest token id that the request names.
    ids_below: int = 0
    # The first choice of the same request, which computes the prompt for all of them.
    leader: Sequence | None = None

    # Of its adapter, as far as they are known.
    traits: Traits = PLAIN
    # int32, as the device reads them.
    blocks: array[int] = field(default_factory=lambda: array("i"))
    # Keys of the full blocks, as far as anybody asked for them.
    block_keys: list[bytes] = field(default_factory=list)
    num_computed: int = 0
    # Tokens of the prompt whose blocks were found when it was first admitted.
    num_cached: int = 0
    # Places between which the adapter computes; all others are the base's.
    adapter_from: int = 0
    adapter_until: int = NEVER
    # Device slot of the adapter while a lease is held; None for the base or while waiting.
    slot: int | None = None
    # Tier of the adapter at submission: "", "disk", "host" or "device".
    tier: str = ""
    # Engine clock, in seconds: when its adapter was first found missing, when it first ran.
    adapter_missed: float | None = None
    admitted: float | None = None

    @property
    def call(self) -> Call:
        """What was asked for, by the name of the call."""
        match self.pooling:
            case None:
                return "Generate"
            case Classify():
                return "Classify"
            case Embed():
                return "Embed"

    @property
    def virtual(self) -> Virtual:
        return self.traits.virtual

    @property
    def num_places(self) -> int:
        return self.traits.virtual.tokens + len(self.tokens)

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_uncomputed(self) -> int:
        """1 while decoding; more during prefill and after preemption."""
        return self.traits.virtual.tokens + len(self.tokens) - self.num_computed

    def ids(self, first: int, count: int) -> list[int]:
        """What stands in `count` places: token ids, and -1 - j for virtual token j."""
        own = first - self.traits.virtual.tokens
        if own >= 0:
            return self.tokens[own : own + count]
        virtual = min(-own, count)
        return [*range(-1 - first, -1 - first - virtual, -1), *self.tokens[: count - virtual]]

    def begin_with(self, traits: Traits) -> None:
        """Settles what the adapter's traits decide, which are known once it has been parsed."""
        if traits != self.traits:
            self.traits = traits
            prompt = self.tokens[: self.num_prompt]
            self.adapter_from = first_adapted(prompt, traits.invocation)
            self.adapter_until = NEVER if traits.reach is None else traits.reach
            self.block_keys.clear()

    def miss_adapter(self, now: float) -> None:
        """Remembers since when it is the adapter that holds the sequence up."""
        if self.adapter_missed is None:
            self.adapter_missed = now


class Scheduled(NamedTuple):
    """A sequence's share of one step: its next `num_tokens` uncomputed tokens."""

    sequence: Sequence
    num_tokens: int

    @property
    def yields(self) -> bool:
        """Whether these reach the sequence's last token, so that the step brings what the
        sequence is after: its next token, or what is pooled of its prompt."""
        return self.num_tokens == self.sequence.num_uncomputed
