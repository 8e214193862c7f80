"""Every limit on what a client may send; docs/limits.md explains them."""

from __future__ import annotations

# Sizes of messages, in bytes. A larger one is RESOURCE_EXHAUSTED before it is parsed.
MAX_REQUEST_BYTES = 4 << 20
MAX_RESPONSE_BYTES = 16 << 20

# Characters of a text prompt, or of all messages of a chat together. Checked before tokenizing,
# because a tokenizer needs seconds for a million characters.
MAX_PROMPT_CHARACTERS = 1 << 20
MAX_CHAT_MESSAGES = 1024
CHAT_ROLES = frozenset({"system", "user", "assistant"})

# Characters.
MAX_REQUEST_ID = 128
MAX_SOURCE = 4096
# Bytes.
MAX_CACHE_SALT = 128
MAX_ABORT_IDS = 1024

MAX_CHOICES = 8
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS_ENTRIES = 1024
MAX_LOGIT_BIAS = 100.0
MAX_STOP_STRINGS = 16
# Characters.
MAX_STOP_STRING = 1024
MAX_STOP_TOKEN_IDS = 128
# Exclusive, where the vocabulary is an adapter's own and not known here.
MAX_TOKEN_IDS = 2**31

# Below the smallest temperature, softmax overflows; 0 itself is greedy.
MIN_TEMPERATURE = 1e-3
MAX_TEMPERATURE = 100.0
MAX_TOP_K = 2**31 - 1
MAX_REPETITION_PENALTY = 10.0
MAX_ADDITIVE_PENALTY = 2.0
MAX_SEED = 2**63 - 1

# Calls that one connection may have open: more than the queue holds by default, so that it is the
# queue that refuses, with a reason, and this only bounds what a hostile client can pile up.
MAX_STREAMS = 4096

# Tokens that a client may leave unread, beyond what the transport holds, before its stream ends.
MAX_UNREAD_TOKENS = 4096

MAX_PAGE_SIZE = 1000
DEFAULT_PAGE_SIZE = 100
