"""Two widths of one codec side by side: the first heads of a row in fewer bits, the others in more.

Which heads those are is decided before: ``slimjax.solve.heads`` orders a layer's heads, those that bear few
bits first, and permutes its weights, so that a cache, and a kernel, sees two runs of whole heads
(arXiv 2412.08585, section 3: head-wise mixed precision).

Heads are whole: of K heads, ``share`` of them rounded down get fewer bits, which ``actual_share`` tells. At the
default of a half that is 1 of 3 heads, so "2-4" has 3.33 bits a value there and not 3; where it would be none, as of
one head, the codec refuses. Extra coordinates (``+R``) are one row for all heads and are stored in the wider width.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from slimjax.cache.codecs.base import Codec, IntegerTile, Role, TiledCodec, needless_extra
from slimjax.pytree import pytree


@pytree
class Pair:
    """Codes of the first heads and of the others; None where there are none."""

    few: Any
    many: Any


def few_heads(heads: int, share: float) -> int:
    """How many of ``heads`` get fewer bits: share * heads, rounded down."""
    return int(heads * share + 1e-9)


def actual_share(heads: int, share: float) -> float:
    """The share of ``heads`` that really gets fewer bits: that of ``few_heads``."""
    return few_heads(heads, share) / heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixed(Codec):
    """A token-local codec in two widths.

    Attributes:
        few, many: the codec of the first heads and of the others.
        share: of the heads that get fewer bits, in [0, 1]; see the module for what becomes of it.

    Raises:
        ValueError: a share outside [0, 1]; and, of rows, a share that is not one whole head of them.
    """

    few: Codec
    many: Codec
    share: float = 0.5

    def __post_init__(self) -> None:
        _check_share(self.share)

    @property
    def name(self) -> str:
        return self.few.name

    def encode(self, rows: Float[Array, "B S K H"], role: Role = "k") -> Pair:
        low, high = _split(rows, self.share)
        return Pair(
            few=None if low is None else self.few.encode(low, role),
            many=None if high is None else self.many.encode(high, role),
        )

    def decode(self, codes: Pair) -> Float[Array, "B S K H"]:
        return _join(
            None if codes.few is None else self.few.decode(codes.few),
            None if codes.many is None else self.many.decode(codes.many),
        )

    def nbytes(self, shape: tuple[int, int, int, int], role: Role = "k") -> int:
        return _nbytes(self, shape, role)

    def stream(self, name: str) -> Codec:
        return _stream(self, name)

    def refusal(self, basis: str, streams: Mapping[str, tuple[int, int]], plain: int) -> str | None:
        return _refusal(self, streams)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixedTiles(TiledCodec):
    """A codec of tiles in two widths; both have one tile, and one buffer, which is the wider one's.

    Attributes:
        few, many, share: as in ``Mixed``.
    """

    few: TiledCodec
    many: TiledCodec
    share: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_share(self.share)
        for part in (self.few, self.many):
            if (part.tile, part.span) != (self.tile, self.span):
                raise ValueError(
                    f"{part}: both widths need tiles of {self.tile} tokens and a buffer of {self.span}"
                )

    @property
    def name(self) -> str:
        return self.few.name

    @property
    def prefills(self) -> bool:
        return self.many.prefills

    @property
    def lazy(self) -> bool:
        return self.many.lazy

    @property
    def integral(self) -> bool:
        return self.few.integral and self.many.integral

    def integers(self, codes: Pair) -> IntegerTile:
        few = None if codes.few is None else self.few.integers(codes.few)
        many = None if codes.many is None else self.many.integers(codes.many)
        parts = [part for part in (few, many) if part is not None]
        return IntegerTile(
            codes=jnp.concatenate([part.codes for part in parts], axis=-2),
            scale=jnp.concatenate([part.scale for part in parts], axis=-1),
        )

    def encode_tiles(self, rows: Float[Array, "B n G K H"], role: Role = "k") -> Pair:
        low, high = _split(rows, self.share)
        return Pair(
            few=None if low is None else self.few.encode_tiles(low, role),
            many=None if high is None else self.many.encode_tiles(high, role),
        )

    def decode_tiles(self, codes: Pair) -> Float[Array, "B n G K H"]:
        return _join(
            None if codes.few is None else self.few.decode_tiles(codes.few),
            None if codes.many is None else self.many.decode_tiles(codes.many),
        )

    def nbytes(self, shape: tuple[int, int, int, int], role: Role = "k") -> int:
        return _nbytes(self, shape, role)

    def stream(self, name: str) -> Codec:
        return _stream(self, name)

    def refusal(self, basis: str, streams: Mapping[str, tuple[int, int]], plain: int) -> str | None:
        return _refusal(self, streams)

    def tiles_nbytes(self, shape: tuple[int, int, int, int], role: Role = "k") -> int:
        few, many = _shapes(shape, self.share)
        return sum(
            part.tiles_nbytes(each, role) for part, each in ((self.few, few), (self.many, many)) if each[2]
        )

    def buffer_scale(
        self, rows: Float[Array, "B T K H"], given: Bool[Array, "B T"]
    ) -> Float[Array, "B 1 K 1"] | None:
        return self.many.buffer_scale(rows, given)

    def tail_scale(
        self, rows: Float[Array, "B T K H"], given: Bool[Array, "B T"]
    ) -> Float[Array, "B 1 K 1"] | None:
        return self.many.tail_scale(rows, given)

    def hold(self, rows: Float[Array, "B T K H"], scale: Float[Array, "B #T K 1"] | None) -> Array:
        return self.many.hold(rows, scale)

    def held(self, codes: Array, scale: Float[Array, "B #T K 1"] | None) -> Float[Array, "B T K H"]:
        return self.many.held(codes, scale)

    def flush(self, codes: Array, scale: Float[Array, "B 1 K 1"] | None, role: Role = "k") -> Pair:
        low, high = _split(codes, self.share)
        scales = (None, None) if scale is None else _split(scale, self.share)
        return Pair(
            few=None if low is None else self.few.flush(low, scales[0], role),
            many=None if high is None else self.many.flush(high, scales[1], role),
        )


def _check_share(share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"{share=}: the share of heads with fewer bits lies in [0, 1]")


def _stream(codec: Mixed | MixedTiles, name: str) -> Codec:
    if name != "r":
        return codec
    return codec.extra or codec.many


def _refusal(codec: Mixed | MixedTiles, streams: Mapping[str, tuple[int, int]]) -> str | None:
    for name, (heads, _) in streams.items():
        if name != "r" and (reason := _none_left(heads, codec.share)):
            return reason
    return needless_extra(codec, streams)


def _none_left(heads: int, share: float) -> str | None:
    """Why heads cannot have two widths, or None."""
    if share == 0 or few_heads(heads, share):
        return None
    few = "1 head" if heads == 1 else f"{heads} heads"
    more = "" if heads == 1 else f", or a share of {math.ceil(1000 / heads) / 1000} or more"
    why = f"a share of {share} of {few} is no whole head for the fewer of two widths"
    return f"{why}: use one width, such as 4 bits{more}"


def _checked(heads: int, share: float) -> int:
    """``few_heads``. Raises ValueError where a share is asked for and is no whole head."""
    if reason := _none_left(heads, share):
        raise ValueError(reason)
    return few_heads(heads, share)


def _split(rows: Array, share: float) -> tuple[Array | None, Array | None]:
    """The first heads and the others, heads being the last axis but one."""
    few = _checked(rows.shape[-2], share)
    return (rows[..., :few, :] if few else None, rows[..., few:, :] if few < rows.shape[-2] else None)


def _join(few: Array | None, many: Array | None) -> Array:
    return jnp.concatenate([part for part in (few, many) if part is not None], axis=-2)


def _nbytes(codec: Mixed | MixedTiles, shape: tuple[int, int, int, int], role: Role) -> int:
    few, many = _shapes(shape, codec.share)
    return sum(part.nbytes(each, role) for part, each in ((codec.few, few), (codec.many, many)) if each[2])


def _shapes(shape: tuple[int, int, int, int], share: float) -> tuple[tuple[int, int, int, int], ...]:
    """The shapes of the rows of the first heads and of the others."""
    batch, tokens, heads, size = shape
    few = _checked(heads, share)
    return (batch, tokens, few, size), (batch, tokens, heads - few, size)
