"""The codecs, by the names of the scheme grammar: how a cache's rows are stored.

Scales differ by publication. KIVI, GEAR and XQuant keep them, and minima, in the model's dtype: float16 here.
FlashQ's and NVFP4's are the formats' own (a float32 a tile and head; E4M3, and a float32 a row). TurboQuant's norm is
"in floating-point precision", QuaRot's (hadamard) steps are not said, and the plain integers and fp8 have no
publication: float32 here. All but FlashQ and NVFP4 take ``scale_dtype``: float16, bfloat16 or float32. Comparisons at
equal bytes set it; ``nbytes`` counts what is set.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from slimjax.cache.codecs.absmax import AbsmaxCodec
from slimjax.cache.codecs.base import Codec, Role, TiledCodec
from slimjax.cache.codecs.corrected import Corrected
from slimjax.cache.codecs.flashq import FlashQ
from slimjax.cache.codecs.floats import FloatCodec
from slimjax.cache.codecs.fp8 import Fp8Codec
from slimjax.cache.codecs.gear import gear_l
from slimjax.cache.codecs.hadamard import HadamardCodec
from slimjax.cache.codecs.integers import FixedCodec, IntegerCodec, Scaled
from slimjax.cache.codecs.kivi import Kivi, kivi
from slimjax.cache.codecs.mixed import Mixed, MixedTiles
from slimjax.cache.codecs.nvfp4 import Nvfp4Codec
from slimjax.cache.codecs.turboquant import TurboQuantCodec
from slimjax.cache.codecs.xquant import XQuant
from slimjax.scheme import Scheme, split_codec, suggest

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


def _flashq(group: int = 64, rank: int = 0, decode_rank: int = 0, **options: Any) -> Codec:
    """FlashQ's tiles; with a rank, their error corrected at that rank."""
    own = {name: options.pop(name) for name in ("loops", "factor_dtype") if name in options}
    base = FlashQ(tile=group, **options)
    if not rank:
        if decode_rank or own:
            raise ValueError(
                f"codec 'flashq': {decode_rank=} and {own} belong to a correction; use rank=2, say"
            )
        return base
    ranks = {"rank": rank, "decode_rank": decode_rank or rank}
    return Corrected(base=base, tile=base.tile, window=base.window, **ranks, **own)


# name -> what ``bits``, ``group`` and the options of ``codec`` make of it.
CODECS: dict[str, Callable[..., Codec]] = {
    "float64": lambda: FloatCodec(kind="float64"),
    "float32": lambda: FloatCodec(kind="float32"),
    "bf16": lambda: FloatCodec(kind="bf16"),
    "fp16": lambda: FloatCodec(kind="fp16"),
    "int16": lambda: IntegerCodec(bits=16, per_head=False),
    "int8": _of_width(
        8, lambda scale="head", **options: IntegerCodec(bits=8, per_head=_by_head(scale), **options)
    ),
    "fixed16": FixedCodec,
    "int4": lambda **options: AbsmaxCodec(bits=4, **options),
    "int3": lambda **options: AbsmaxCodec(bits=3, **options),
    "int2": lambda **options: AbsmaxCodec(bits=2, **options),
    "fp8": _of_width(8, Fp8Codec),
    "nvfp4": _of_width(4, Nvfp4Codec),
    "flashq": _flashq,
    "kivi": kivi,
    "gear_l": gear_l,
    "xquant": XQuant,
    "turboquant": TurboQuantCodec,
    "hadamard": HadamardCodec,
    "hadamard_int4": HadamardCodec,
    "absmax": AbsmaxCodec,
}
# Codecs whose values share a scale with a head, a row or nothing.
_UNGROUPED = ("float64", "float32", "bf16", "fp16", "int16", "int8", "fixed16", "fp8", "turboquant")


def codec(name: str, *, bits: int | str | None = None, group: int | None = None, **options: Any) -> Codec:
    """The codec called ``name``: a frozen object with ``encode``, ``decode`` and ``nbytes``.

    Args:
        name: a key of ``CODECS``.
        bits: per value, where the codec offers a choice; "2-4": the first half of the heads (or ``share`` of
            them) in 2 bits, the others in 4.
        group: tokens or channels that share a scale, where the codec offers a choice.
        options: what else that codec lets one choose. ``extra``, of every codec: the name of the codec that stores
            the extra coordinates of bases k and kr, such as "int8" or, beside tiles, "flashq8" in the same tiles.

    Raises:
        ValueError: an unknown name (the nearest known one is named), an option the codec does not have, or a
            value that it does not take.

    Where a codec groups tokens, ``group`` is also its tile, unless the option ``tile`` says more; a cache's
    buffer of newest tokens is the option ``window``, one tile by default, 128 tokens of kivi.
    """
    if name not in CODECS:
        raise ValueError(f"unknown codec {name!r}{suggest(name, CODECS)}")
    chosen = options | {key: value for key, value in (("bits", bits), ("group", group)) if value is not None}
    if "extra" in options:
        others = {key: value for key, value in options.items() if key != "extra"}
        return _with_extra(codec(name, bits=bits, group=group, **others), options["extra"])
    if group is not None and name in _UNGROUPED:
        raise ValueError(
            f"codec {name!r} has no groups ({group=}): its values share a scale by head, row or not at all; leave "
            "group away, or use absmax, hadamard, xquant or kivi"
        )
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
    share: dict[str, Any] = {"share": float(chosen.pop("share"))} if "share" in chosen else {}
    low, high = (codec(name, **chosen | {"bits": each}) for each in (few, many))
    if isinstance(low, TiledCodec) and isinstance(high, TiledCodec):
        return MixedTiles(few=low, many=high, tile=low.tile, window=low.window, **share)
    return Mixed(few=low, many=high, **share)


def _with_extra(main: Codec, text: object) -> Codec:
    """``main``, and another codec for the extra coordinates."""
    name, bits = split_codec(str(text), CODECS)
    extra = codec(name, bits=bits)
    if isinstance(extra, TiledCodec):
        if not isinstance(main, TiledCodec):
            raise ValueError(
                f"extra={text}: tiles need a codec of tiles beside them, not {main.name}; use int8 or int16"
            )
        extra = _in_tiles_of(extra, main)
        if extra.lazy != main.lazy:
            raise ValueError(
                f"extra={text}: its buffer is not encoded when {main.name}'s is; use {main.name}"
            )
    if isinstance(extra, Mixed | MixedTiles | FixedCodec):
        raise ValueError(f"extra={text}: one row for all heads, without static scales; use int8 or int16")
    return dataclasses.replace(main, extra=extra)


def _in_tiles_of(codec: TiledCodec, main: TiledCodec) -> TiledCodec:
    """The same codec in the tiles of another. Raises ValueError where it has no such tiles."""
    if isinstance(codec, Corrected):
        base = _in_tiles_of(codec.base, main)
        return dataclasses.replace(codec, base=base, tile=main.tile, window=main.window)
    if isinstance(codec, Kivi):
        return dataclasses.replace(codec, group=main.tile, tile=main.tile, window=main.window)
    return dataclasses.replace(codec, tile=main.tile, window=main.window)


def codec_of(scheme: Scheme) -> Codec:
    """The codec that a scheme names, with its bits, group and options. Raises ValueError as ``codec`` does."""
    if twice := {"name", "bits", "group"} & dict(scheme.options).keys():
        raise ValueError(
            f"option {min(twice)} of codec {scheme.codec!r} has a place of its own: codec[bits]/group"
        )
    return codec(scheme.codec, bits=scheme.bits, group=scheme.group, **dict(scheme.options))
