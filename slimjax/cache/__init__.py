"""Attention caches: the cache pytree (``cache.py``) and how its rows are stored (``codecs/``)."""

from slimjax.cache.cache import (
    Cache,
    Streams,
    append,
    empty,
    in_tiles,
    newest,
    read,
    read_at,
    read_both,
    role_of,
    row_bytes,
)
from slimjax.cache.codecs import CODECS, Codec, Role, TiledCodec, codec, codec_of

__all__ = [
    "CODECS",
    "Cache",
    "Codec",
    "Role",
    "Streams",
    "TiledCodec",
    "append",
    "codec",
    "codec_of",
    "empty",
    "in_tiles",
    "newest",
    "read",
    "read_at",
    "read_both",
    "role_of",
    "row_bytes",
]
