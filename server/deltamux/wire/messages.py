"""What crosses between the front end and the engine: small tagged structs, msgpack on the wire."""

from __future__ import annotations

from typing import Literal

import msgspec

# `request_id` is the front end's own name for a request: the client's may come again. Each of its n
# choices is named by (request_id, index).


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """Resolved sampling parameters: every default is already filled in."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: dict[int, float] = {}
    # None: none wanted; 0: the chosen token only; k: k alternatives beside it.
    logprobs: int | None = None


class Stopping(msgspec.Struct, frozen=True, omit_defaults=True):
    """When the engine ends a sequence by itself; stop strings are the front end's work."""

    max_tokens: int
    min_tokens: int = 0
    # The client's own, and the model's end-of-sequence ids unless it asked to ignore them.
    stop_token_ids: tuple[int, ...] = ()


class Classify(msgspec.Struct, frozen=True, tag=True):
    """Asks for the scores of the adapter's task head."""


class Embed(msgspec.Struct, frozen=True, tag=True):
    """Asks for the pooled last hidden states."""

    pooling: Literal["first", "last", "mean"]
    # Divide by the Euclidean norm.
    normalize: bool


class ToEngine(msgspec.Struct, frozen=True, tag=True):
    """Base of the messages that the engine receives."""


class Submit(ToEngine, frozen=True, tag=True):
    request_id: str
    prompt: tuple[int, ...]
    sampling: Sampling
    stopping: Stopping
    n: int = 1
    priority: int = 0
    # Digest of the adapter; empty for the base.
    adapter: str = ""
    # Folder of the adapter's files on disk.
    adapter_path: str = ""
    # Requests of different salts share no blocks of the KV cache.
    cache_salt: str = ""
    # Seconds from now; None: no deadline.
    deadline: float | None = None
    # None: tokens are wanted, as many as `stopping` allows.
    pooling: Classify | Embed | None = None
    # Which of two texts each token belongs to; empty for one text.
    token_types: tuple[int, ...] = ()


class Cancel(ToEngine, frozen=True, tag=True):
    """Ends choices of a request: all of them when `indices` is empty."""

    request_id: str
    indices: tuple[int, ...] = ()


class LoadAdapter(ToEngine, frozen=True, tag=True):
    """Brings an adapter to host or device; answered by AdapterLoaded or AdapterFailed."""

    digest: str
    path: str
    to_device: bool
    pinned: bool = False


class PinAdapter(ToEngine, frozen=True, tag=True):
    """Sets the pin of an adapter that is on the device or will be; answered like LoadAdapter."""

    digest: str
    path: str
    pinned: bool


class DropAdapter(ToEngine, frozen=True, tag=True):
    """Frees the adapter on host and device once no sequence uses it; answered by AdapterDropped."""

    digest: str


class Shutdown(ToEngine, frozen=True, tag=True):
    """Ends the engine loop at once; the front end has drained before."""


class FromEngine(msgspec.Struct, frozen=True, tag=True):
    """Base of the messages that the front end receives."""


class Ready(FromEngine, frozen=True, tag=True):
    """The model is loaded and tested; requests may come."""

    model: str
    device: str
    dtype: str
    kernel_backend: str
    vocab_size: int
    max_model_len: int
    kv_cache_tokens: int
    adapter_slots: int
    families: tuple[str, ...]
    # False: a model whose tokens all see each other, which pools and classifies only.
    generates: bool = True
    # Whether it is told which of two texts a token belongs to.
    tells_pairs_apart: bool = False


class StartupFailed(FromEngine, frozen=True, tag=True):
    message: str


class Logprob(msgspec.Struct, frozen=True, array_like=True):
    token_id: int
    logprob: float


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    chosen: Logprob
    top: tuple[Logprob, ...] = ()


class FirstToken(msgspec.Struct, frozen=True):
    """Seconds that the request spent before its first token, and where its adapter was."""

    queue: float
    adapter_load: float
    # Tier when the request was admitted: "", "disk", "host" or "device".
    tier: str
    cached_prompt_tokens: int = 0


class Pooled(msgspec.Struct, frozen=True, omit_defaults=True):
    """The answer to Classify or Embed: rows of numbers, float32 in the machine's byte order."""

    # The embedding, or the logits of each position.
    numbers: bytes
    # Of as many numbers: each row of logits after softmax or sigmoid, or as it is.
    scores: bytes = b""
    # One for each number of a row.
    labels: tuple[str, ...] = ()


class Progress(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one step did for one choice of one request."""

    request_id: str
    index: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    # "", "stop" or "length"; with "stop", the last token is the one that stopped it.
    finish: str = ""
    # Sent once, with the first token of the choice or what was pooled.
    first: FirstToken | None = None
    # Sent with "stop", where no tokens were wanted.
    pooled: Pooled | None = None


class RequestFailed(FromEngine, frozen=True, tag=True):
    """Ends a whole request with an error."""

    request_id: str
    code: str
    reason: str
    message: str
    # Seconds; None where waiting does not help.
    retry_after: float | None = None
    # Of the request, where one is to blame.
    field: str | None = None


class Stats(msgspec.Struct, frozen=True):
    """State of the engine after a step; counters are totals since its start."""

    running: int
    waiting: int
    kv_blocks_used: int
    kv_blocks_total: int
    preemptions: int
    # Tokens of admitted prompts, and those of them that the prefix cache had.
    prefix_queries: int
    prefix_hits: int
    # Of this step.
    step_rows: int
    step_adapters: int
    step_seconds: float
    # Adapter cache counters.
    device_hits: int
    host_hits: int
    misses: int
    device_evictions: int
    host_evictions: int


class StepDone(FromEngine, frozen=True, tag=True):
    """Everything one step produced: one message a step."""

    progress: tuple[Progress, ...]
    stats: Stats


class AdapterInfo(msgspec.Struct, frozen=True):
    """What parsing an adapter told."""

    family: str
    rank: int
    parameters: int
    host_bytes: int
    device_bytes: int
    note: str = ""
    # "generation", "sequence", "token" or "features".
    task: str = "generation"
    # Of its task head, in the order of its outputs.
    labels: tuple[str, ...] = ()


class AdapterLoaded(FromEngine, frozen=True, tag=True):
    """Answers LoadAdapter and PinAdapter."""

    digest: str
    info: AdapterInfo


class AdapterFailed(FromEngine, frozen=True, tag=True):
    """Answers LoadAdapter and PinAdapter when they failed."""

    digest: str
    code: str
    reason: str
    message: str
    # Seconds; None where waiting does not help.
    retry_after: float | None = None


class AdapterDropped(FromEngine, frozen=True, tag=True):
    """Answers DropAdapter."""

    digest: str


class AdapterMoved(FromEngine, frozen=True, tag=True):
    """An adapter changed tier: "disk" (no longer in memory), "host" or "device"."""

    digest: str
    tier: str
    info: AdapterInfo | None = None
    # Seconds that the move took; 0 for evictions.
    seconds: float = 0.0


Inbound = Submit | Cancel | LoadAdapter | PinAdapter | DropAdapter | Shutdown
Outbound = (
    Ready
    | StartupFailed
    | StepDone
    | RequestFailed
    | AdapterLoaded
    | AdapterFailed
    | AdapterDropped
    | AdapterMoved
)
