"""The codecs, by the names of the scheme grammar: how a cache's rows are stored."""

from collections.abc import Callable
from typing import Any

from slimjax.cache.codecs.absmax import AbsmaxCodec
from slimjax.cache.codecs.base import Codec, Role, TiledCodec
from slimjax.cache.codecs.flashq import FlashQ
from slimjax.cache.codecs.floats import FloatCodec
from slimjax.cache.codecs.fp8 import Fp8Codec
from slimjax.cache.codecs.gear import GearL
from slimjax.cache.codecs.hadamard import HadamardCodec
from slimjax.cache.codecs.integers import FixedCodec, IntegerCodec, Scaled
from slimjax.cache.codecs.kivi import Kivi
from slimjax.cache.codecs.mixed import Mixed, MixedTiles
from slimjax.cache.codecs.nvfp4 import Nvfp4Codec
from slimjax.cache.codecs.turboquant import TurboQuantCodec
from slimjax.cache.codecs.xquant import XQuant
from slimjax.scheme import Scheme, suggest

__all__ = [
    "CODECS",
    "Codec",
    "FixedCodec",
    "FloatCodec",
    "IntegerCodec",
    "Role",
    "Scaled",
    "TiledCodec",
    "codec",
    "codec_of",
]


def _of_width(only: int, make: Callable[..., Codec]) -> Callable[..., Codec]:
    """A codec that may be told the only width it has."""

    def made(bits: int = only, **options: Any) -> Codec:
        if bits != only:
            raise ValueError(f"{bits=}: this codec stores {only} bits")
        return make(**options)

    return made


def _by_head(scale: str) -> bool:
    if scale not in ("head", "token"):
        raise ValueError(f"codec 'int8': {scale=} is neither head nor token")
    return scale == "head"


# name -> what ``bits``, ``group`` and the options of ``codec`` make of it.
CODECS: dict[str, Callable[..., Codec]] = {
    "float64": lambda: FloatCodec(kind="float64"),
    "float32": lambda: FloatCodec(kind="float32"),
    "bf16": lambda: FloatCodec(kind="bf16"),
    "fp16": lambda: FloatCodec(kind="fp16"),
    "int16": lambda: IntegerCodec(bits=16, per_head=False),
    "int8": _of_width(8, lambda scale="head": IntegerCodec(bits=8, per_head=_by_head(scale))),
    "fixed16": FixedCodec,
    "int4": lambda **options: AbsmaxCodec(bits=4, **options),
    "int3": lambda **options: AbsmaxCodec(bits=3, **options),
    "int2": lambda **options: AbsmaxCodec(bits=2, **options),
    "fp8": _of_width(8, Fp8Codec),
    "nvfp4": _of_width(4, Nvfp4Codec),
    "flashq": lambda group=64, **options: FlashQ(tile=group, **options),
    "kivi": lambda group=64, **options: Kivi(group=group, **{"tile": group} | options),
    "gear_l": lambda group=64, **options: GearL(group=group, **{"tile": group} | options),
    "xquant": XQuant,
    "turboquant": TurboQuantCodec,
    "hadamard": HadamardCodec,
    "hadamard_int4": HadamardCodec,
    "absmax": AbsmaxCodec,
}


def codec(name: str, *, bits: int | str | None = None, group: int | None = None, **options: Any) -> Codec:
    """The codec called ``name``: a frozen object with ``encode``, ``decode`` and ``nbytes``.

    Args:
        name: a key of ``CODECS``.
        bits: per value, where the codec offers a choice; "2-4": the first half of the heads (or ``share`` of
            them) in 2 bits, the others in 4.
        group: tokens or channels that share a scale, where the codec offers a choice.
        options: what else that codec lets one choose.

    Raises:
        ValueError: an unknown name (the nearest known one is named), an option the codec does not have, or a
            value that it does not take.

    Where a codec groups tokens, ``group`` is also its tile, unless the option ``tile`` says more; a cache's
    buffer of newest tokens is the option ``window``, one tile by default.
    """
    if name not in CODECS:
        raise ValueError(f"unknown codec {name!r}{suggest(name, CODECS)}")
    chosen = options | {key: value for key, value in (("bits", bits), ("group", group)) if value is not None}
    if isinstance(bits, str) and "-" in bits:
        return _mixed(name, bits, chosen)
    if isinstance(bits, str):
        chosen["bits"] = int(bits)
    try:
        return CODECS[name](**chosen)
    except TypeError as error:
        raise ValueError(f"codec {name!r} does not take the options {chosen}") from error


def _mixed(name: str, bits: str, chosen: dict[str, Any]) -> Codec:
    """Heads of two widths."""
    few, many = (int(part) for part in bits.split("-"))
    if few >= many:
        raise ValueError(f"codec {name!r}: {bits} bits: expected fewer, then more")
    share = {"share": float(chosen.pop("share"))} if "share" in chosen else {}
    low, high = (codec(name, **chosen | {"bits": each}) for each in (few, many))
    if isinstance(low, TiledCodec) and isinstance(high, TiledCodec):
        return MixedTiles(few=low, many=high, tile=low.tile, window=low.window, **share)
    return Mixed(few=low, many=high, **share)


def codec_of(scheme: Scheme) -> Codec:
    """The codec that a scheme names, with its bits, group and options. Raises ValueError as ``codec`` does."""
    if twice := {"name", "bits", "group"} & dict(scheme.options).keys():
        raise ValueError(
            f"option {min(twice)} of codec {scheme.codec!r} has a place of its own: codec[bits]/group"
        )
    return codec(scheme.codec, bits=scheme.bits, group=scheme.group, **dict(scheme.options))
