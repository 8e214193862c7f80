"""What a block of the KV cache holds, as a key: equal keys mean equal keys and values."""

from __future__ import annotations

from hashlib import blake2b

import msgspec

from deltamux.engine.sequence import Sequence

_BYTES = 16
_encode = msgspec.msgpack.Encoder().encode


def block_key(sequence: Sequence, index: int, block_size: int) -> bytes:
    """The key of the sequence's block `index`, all of whose tokens are known.

    It depends on the keys of the blocks before it, the version of the adapter that computes it,
    the salt of the request and the tokens in it. The base is the same for all blocks of a cache.
    A sequence remembers its keys: its tokens only ever grow.
    """
    keys = sequence.block_keys
    while len(keys) <= index:
        tokens = sequence.tokens[len(keys) * block_size : (len(keys) + 1) * block_size]
        before = keys[-1] if keys else b""
        # Every field is encoded with its length, so that no two lists of them look the same.
        content = _encode((before, sequence.adapter, sequence.cache_salt, tokens))
        keys.append(blake2b(content, digest_size=_BYTES).digest())
    return keys[index]
