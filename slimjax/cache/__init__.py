"""Attention caches: the cache pytree (``cache.py``) and how its rows are stored (``codecs/``)."""

from slimjax.cache.cache import Cache, Streams, append, empty, read
from slimjax.cache.codecs import CODECS, Codec, codec, codec_of

__all__ = ["CODECS", "Cache", "Codec", "Streams", "append", "codec", "codec_of", "empty", "read"]
