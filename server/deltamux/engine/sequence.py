"""One choice of one request while it runs: its tokens, its blocks and its counters."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from deltamux.adapters.primitives.virtual_tokens import Virtual
from deltamux.adapters.task import Call
from deltamux.adapters.traits import PLAIN, Traits
from deltamux.engine.activation import NEVER, first_adapted
from deltamux.wire.messages import Classify, Embed, Sampling, Stopping


@dataclass(eq=False)
class Sequence:
    """State that the scheduler decides on and the runner turns into tensors.

    Its places are the adapter's virtual tokens, then its own. Places 0 .. num_computed - 1 have
    their keys and values in `blocks`; the next num_computing will have them, and the last place
    its token, once the steps under way have landed. A preempted sequence keeps its tokens and
    loses its blocks.
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
    # Of the steps under way: places that they compute, and tokens that they bring.
    num_computing: int = 0
    num_coming: int = 0
    # Nobody waits for it any more, though a step under way may still compute it.
    ended: bool = False
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
        """With those of tokens that are still to come."""
        return self.traits.virtual.tokens + len(self.tokens) + self.num_coming

    @property
    def num_generated(self) -> int:
        """Tokens that have come."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_uncomputed(self) -> int:
        """Places that no step has computed or is computing.

        1 while decoding; more during prefill and after preemption.
        """
        known = self.traits.virtual.tokens + len(self.tokens)
        return known + self.num_coming - self.num_computed - self.num_computing

    def ids(self, first: int, count: int) -> list[int]:
        """What stands in `count` places, as far as it is known: token ids, and -1 - j for virtual
        token j."""
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


@dataclass(slots=True, eq=False)
class Scheduled:
    """A sequence's share of one step: its next `num_tokens` uncomputed places.

    What it says of them holds from when it was made, whatever the sequence comes to meanwhile.
    """

    sequence: Sequence
    num_tokens: int
    # The place with which it begins.
    first: int = field(init=False)
    # Whether it reaches the sequence's last place, so that the step brings what the sequence is
    # after: its next token, or what is pooled of its prompt.
    yields: bool = field(init=False)

    def __post_init__(self) -> None:
        self.first = self.sequence.num_computed + self.sequence.num_computing
        self.yields = self.num_tokens == self.sequence.num_uncomputed

    @property
    def generated(self) -> int:
        """How many generated tokens come before the one that it brings."""
        sequence = self.sequence
        return self.first + self.num_tokens - sequence.virtual.tokens - sequence.num_prompt

    def take_off(self) -> None:
        """From now on the sequence counts on what the step will bring it."""
        self.sequence.num_computing += self.num_tokens
        self.sequence.num_coming += self._brings_token

    def land(self) -> None:
        """From now on it does not: what came of it counts, or nothing."""
        self.sequence.num_computing -= self.num_tokens
        self.sequence.num_coming -= self._brings_token

    @property
    def _brings_token(self) -> bool:
        return self.yields and self.sequence.pooling is None
