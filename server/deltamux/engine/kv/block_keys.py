"""What a block of the KV cache holds, as a key: equal keys mean equal keys and values."""

from __future__ import annotations

from hashlib import blake2b

import msgspec

from deltamux.engine.sequence import Sequence

_BYTES = 16
_encode = msgspec.msgpack.Encoder().encode


def block_key(sequence: Sequence, index: int, block_size: int) -> bytes:
    """The key of the sequence's block `index`, all of whose places are known.

    It depends on the key of the block before it, the version of the adapter that computes any of
    it, the salt of the request and the tokens in it. A block of nothing but virtual tokens is the
    same for all requests of the adapter, whatever their salt. The base is the same for the whole
    cache. A sequence remembers its keys: its tokens only ever grow.
    """
    keys = sequence.block_keys
    while len(keys) <= index:
        before = keys[-1] if keys else b""
        end = (len(keys) + 1) * block_size
        salt = sequence.cache_salt if end > sequence.virtual.tokens else None
        ids = sequence.ids(end - block_size, block_size)
        # Every field is encoded with its length, so that no two lists of them look the same.
        adapter = sequence.adapter if end > sequence.adapter_from else ""
        content = _encode((before, adapter, salt, ids))
        keys.append(blake2b(content, digest_size=_BYTES).digest())
    return keys[index]
