"""The codecs, by the names of the scheme grammar: how a cache's rows are stored."""

from collections.abc import Callable
from typing import Any

from slimjax.cache.codecs.base import Codec
from slimjax.cache.codecs.floats import FloatCodec
from slimjax.cache.codecs.integers import IntegerCodec, Scaled
from slimjax.scheme import Scheme, suggest

__all__ = ["CODECS", "Codec", "FloatCodec", "IntegerCodec", "Scaled", "codec", "codec_of"]

CODECS: dict[str, Callable[..., Codec]] = {
    "float64": lambda: FloatCodec(kind="float64"),
    "float32": lambda: FloatCodec(kind="float32"),
    "bf16": lambda: FloatCodec(kind="bf16"),
    "fp16": lambda: FloatCodec(kind="fp16"),
    "int16": lambda: IntegerCodec(bits=16, per_head=False),
    "int8": lambda: IntegerCodec(bits=8, per_head=True),
}


def codec(name: str, **options: Any) -> Codec:
    """The codec called ``name``: a frozen object with ``encode``, ``decode`` and ``nbytes``.

    Args:
        name: float64, float32, bf16, fp16, int16 (one scale per token) or int8 (one per token and head).
        options: what that codec lets one choose; none of these lets anything be chosen.

    Raises:
        ValueError: an unknown name (the nearest known one is named) or an option the codec does not have.
    """
    if name not in CODECS:
        raise ValueError(f"unknown codec {name!r}{suggest(name, CODECS)}")
    try:
        return CODECS[name](**options)
    except TypeError as error:
        raise ValueError(f"codec {name!r} does not take the options {options}") from error


def codec_of(scheme: Scheme) -> Codec:
    """The codec that a scheme names, with the scheme's bits and group. Raises ValueError as ``codec`` does."""
    chosen = {"bits": scheme.bits, "group": scheme.group}
    return codec(scheme.codec, **{name: value for name, value in chosen.items() if value is not None})
