"""Attention in integers: Q, K, V and P in INT8 tiles, both products INT8 x INT8 -> INT32 (FlashQ, arXiv 2412.08585).

Keys and values come tile by tile with one scale per head: from the codes of a FlashQ cache without ever being
floats, or quantised on the way from any other cache. The softmax is online, over tiles, as in FlashAttention.

The paper leaves three things open; here they are options, and the defaults are the first of each:
the scale of P, the sum that P is divided by, and whether the factor between two maxima goes through SAS.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int8 as Int8Of

from slimjax.attention.blocks import fold
from slimjax.attention.positions import rotate
from slimjax.attention.projections import DecodeWeights
from slimjax.attention.reference import Geometry
from slimjax.attention.softmax import Exponential, exponential_of
from slimjax.axes import Keys, Queries, Values
from slimjax.cache import Cache, TiledCodec, codec_of, read
from slimjax.cache.codecs.base import IntegerTile
from slimjax.cache.codecs.flashq import quantise
from slimjax.cache.tiled import TiledRows, buffered
from slimjax.kernels.spec import DecodeSpec
from slimjax.numerics import MASK
from slimjax.pytree import pytree

TILE = 64
_P_SCALES = ("tile", "static", "row")
_DENOMINATORS = ("before", "after")
_RESCALES = ("exact", "softmax")

# Keys and values of ``size`` slots from ``start`` on.
Tiles = Callable[[Int[Array, ""] | int, int], tuple[IntegerTile, IntegerTile]]


@pytree
class _State:
    """The online softmax: maximum, denominator and weighted sum so far, of every query."""

    peak: Float[Array, "B K G Q T 1"]
    total: Float[Array, "B K G Q T 1"]
    out: Float[Array, "B K G Q T H"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Integer:
    """The compute mode ``#int8(p=tile, denominator=before, rescale=exact, tile=0)``.

    Attributes:
        p: what P, at most 1, is scaled by: its maximum in a tile of queries and keys over 119 ("tile"), 1/127
            ("static"), or each query's own maximum in the tile over 119 ("row").
        denominator: the sum of P before or after its rounding to INT8.
        rescale: the factor of what was summed under a lower maximum: an exact exponential, or the softmax's own
            (SAS where that is chosen).
        tile: queries of a tile, and keys where they are quantised here: of a prompt, and of a cache without
            INT8 tiles. 0: as many as the codec's tiles have, 64 where it has none.
    """

    p: str = "tile"
    denominator: str = "before"
    rescale: str = "exact"
    tile: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (("p", _P_SCALES), ("denominator", _DENOMINATORS), ("rescale", _RESCALES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"int8({name}={getattr(self, name)}): expected {' or '.join(allowed)}")
        if not isinstance(self.tile, int) or self.tile < 0:
            raise ValueError(f"int8(tile={self.tile}): expected a number of tokens")

    def refusal(self, spec: DecodeSpec) -> str | None:
        """Why this spec cannot be computed in integers, or None."""
        if spec.scheme.basis != "kv":
            return "integer products need keys and values as they are cached (kv); use #float"
        if exponential_of(spec.scheme.softmax) is None:
            return f"softmax {spec.scheme.softmax} needs all scores of a query at once; use #float"
        return None

    def decode(
        self, q: Queries, cache: Cache, where: Geometry, weights: DecodeWeights, spec: DecodeSpec
    ) -> Queries:
        """Attention of unrotated queries on a kv cache; output in ``spec.dtype``."""
        codec = codec_of(spec.scheme)
        where = where.without_padding(cache.length, spec)
        if isinstance(codec, TiledCodec) and codec.integral:
            return self._attend(q, _from_codes(cache, codec), cache.capacity, codec.tile, where, spec)

        def tiles(start: Int[Array, ""] | int, count: int) -> tuple[IntegerTile, IntegerTile]:
            rows = read(cache, codec, jnp.float32, start=start, size=count)
            return _tile(rows["k"]), _tile(rows["v"])

        size = codec.span if isinstance(codec, TiledCodec) else self._tokens(spec)
        return self._attend(q, tiles, cache.capacity, size, where, spec)

    def attend(self, q: Queries, k: Keys, v: Values, where: Geometry, spec: DecodeSpec) -> Queries:
        """Attention of unrotated queries on rotated keys and on values, quantised here; in ``spec.dtype``."""
        seen = jnp.any(where.mask, axis=(1, 2))[:, :, None, None]
        keys, values = (jnp.where(seen, each, jnp.zeros_like(each)) for each in (k, v))

        def tiles(start: Int[Array, ""] | int, count: int) -> tuple[IntegerTile, IntegerTile]:
            part = (jax.lax.dynamic_slice_in_dim(each, start, count, axis=1) for each in (keys, values))
            first, second = part
            return _tile(first), _tile(second)

        return self._attend(q, tiles, k.shape[1], self._tokens(spec), where, spec)

    def _tokens(self, spec: DecodeSpec) -> int:
        """Tokens of a tile: as chosen, or the codec's own."""
        codec = codec_of(spec.scheme)
        return self.tile or (codec.tile if isinstance(codec, TiledCodec) and codec.integral else TILE)

    def _attend(
        self, q: Queries, tiles: Tiles, slots: int, size: int, where: Geometry, spec: DecodeSpec
    ) -> Queries:
        batch, tokens, heads, width = q.shape
        turned = rotate(where.seeing(q), where.query_positions, spec.position)
        queries, q_scale = _query_tiles(turned, spec, self._tokens(spec))
        count, rows = queries.shape[1:3]
        shape = (batch, spec.kv_heads, spec.group, count, rows)
        state = _State(
            peak=jnp.full((*shape, 1), MASK, jnp.float32),
            total=jnp.zeros((*shape, 1), jnp.float32),
            out=jnp.zeros((*shape, width), jnp.float32),
        )
        exponential = exponential_of(spec.scheme.softmax)
        assert exponential is not None  # refused before

        def step(state: _State, start: Int[Array, ""] | int, count: int) -> _State:
            k, v = tiles(start, count)
            raw = _int_dot("bqtkgh,bskh->bkgqts", queries, k.codes).astype(jnp.float32)
            raw = raw * q_scale * _per_head(k.scale)
            scores, mask = _masked(raw, where, spec, start, count)
            return self._online(state, scores, mask, v, exponential)

        state = fold(slots, size, step, state)
        out = state.out / jnp.where(state.total == 0, jnp.ones_like(state.total), state.total)
        out = out.reshape(batch, heads, count * rows, width)[:, :, :tokens]
        return jnp.swapaxes(out, 1, 2).astype(spec.dtype)

    def _online(
        self,
        state: _State,
        scores: Float[Array, "B K G Q T S"],
        mask: Bool[Array, "B #K #G Q T S"],
        v: IntegerTile,
        exponential: Exponential,
    ) -> _State:
        """One tile of keys taken into account."""
        masked = jnp.where(mask, scores, jnp.full_like(scores, MASK))
        peak = jnp.maximum(state.peak, jnp.max(masked, axis=-1, keepdims=True))
        p = jnp.where(mask, exponential(peak - masked), jnp.zeros_like(scores))
        fall = peak - state.peak
        factor = jnp.exp(-fall) if self.rescale == "exact" else jnp.where(fall == 0, 1.0, exponential(fall))
        codes, scale = self._quantise_p(p)
        rounded = codes.astype(jnp.float32) * scale
        share = jnp.sum(p if self.denominator == "before" else rounded, axis=-1, keepdims=True)
        weighed = _int_dot("bkgqts,bskh->bkgqth", codes, v.codes).astype(jnp.float32)
        return _State(
            peak=peak,
            total=factor * state.total + share,
            out=factor * state.out + weighed * scale * _per_head(v.scale),
        )

    def _quantise_p(
        self, p: Float[Array, "B K G Q T S"]
    ) -> tuple[Int8Of[Array, "B K G Q T S"], Float[Array, "B K G Q #T 1"]]:
        """P in INT8 and its scale."""
        if self.p == "static":
            scale = jnp.full((*p.shape[:-2], 1, 1), 1 / 127, jnp.float32)
        else:
            peak = jnp.max(p, axis=(-2, -1) if self.p == "tile" else -1, keepdims=True)
            scale = jnp.where(peak == 0, jnp.ones_like(peak), peak / 119)
        return jnp.round(p / scale).astype(jnp.int8), scale


def _from_codes(cache: Cache, codec: TiledCodec) -> Tiles:
    """Tiles of a FlashQ cache: codes expanded in integers, the newest ones from the buffer."""

    def tile(stored: TiledRows, start: Int[Array, ""] | int, count: int) -> IntegerTile:
        index = start // codec.tile
        codes = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, index, 1, axis=1), stored.tiles)
        found = codec.integers(codes)
        held = jax.lax.dynamic_slice_in_dim(stored.buffer, start % codec.span, count, axis=1)
        newest = buffered(cache.length, codec.span, start // codec.span * codec.span, codec.span)
        assert stored.scale is not None  # an integer buffer has one
        scale = jnp.where(newest, stored.scale[:, 0, :, 0], found.scale[:, 0])
        # What no token was written to may hold anything, and 0 times NaN is NaN.
        used = (start < cache.length)[:, None]
        return IntegerTile(
            codes=jnp.where(newest[:, :, None, None], held, found.codes[:, 0]),
            scale=jnp.where(used, scale, jnp.zeros_like(scale)),
        )

    return lambda start, count: (
        tile(cache.streams["k"], start, count),
        tile(cache.streams["v"], start, count),
    )


def _tile(rows: Float[Array, "B S K H"]) -> IntegerTile:
    codes, scale = quantise(rows.astype(jnp.float32))
    return IntegerTile(codes=codes, scale=scale)


def _query_tiles(
    q: Queries, spec: DecodeSpec, tile: int
) -> tuple[Int8Of[Array, "B Q T K G H"], Float[Array, "B K G Q 1 1"]]:
    """Queries in tiles of at most ``tile``, padded with zeros, and the tiles' scales per head."""
    batch, tokens, heads, width = q.shape
    rows = min(tile, tokens)
    count = -(-tokens // rows)
    padded = jnp.pad(q.astype(jnp.float32), ((0, 0), (0, count * rows - tokens), (0, 0), (0, 0)))
    codes, scale = quantise(padded.reshape(batch, count, rows, heads, width))
    grouped = codes.reshape(batch, count, rows, spec.kv_heads, spec.group, width)
    scales = jnp.moveaxis(scale.reshape(batch, count, spec.kv_heads, spec.group), 1, 3)
    return grouped, scales[..., None, None]


def _masked(
    raw: Float[Array, "B K G Q T S"],
    where: Geometry,
    spec: DecodeSpec,
    start: Int[Array, ""] | int,
    count: int,
) -> tuple[Float[Array, "B K G Q T S"], Bool[Array, "B #K #G Q T S"]]:
    """Scores scaled, capped and biased, and what each query sees of this tile."""
    scores = raw * (spec.head_dim**-0.5 if spec.scale is None else spec.scale)
    if spec.softcap is not None:
        scores = spec.softcap * jnp.tanh(scores / spec.softcap)
    tiles, rows = raw.shape[3:5]

    def part(whole: Array) -> Array:
        here = jax.lax.dynamic_slice_in_dim(whole, start, count, axis=3)
        here = jnp.pad(here, ((0, 0), (0, 0), (0, tiles * rows - here.shape[2]), (0, 0)))
        heads = (1, 1) if here.shape[1] == 1 else (spec.kv_heads, spec.group)
        return here.reshape(here.shape[0], *heads, tiles, rows, count)

    if where.bias is not None:
        scores = scores + part(where.bias).astype(scores.dtype)
    return scores, part(where.mask)


def _per_head(scale: Float[Array, "B K"]) -> Float[Array, "B K 1 1 1 1"]:
    return scale[:, :, None, None, None, None]


def _int_dot(subscripts: str, first: Int8Of[Array, "..."], second: Int8Of[Array, "..."]) -> Int[Array, "..."]:
    """INT8 x INT8 with the sum in INT32."""
    return jnp.einsum(subscripts, first, second, preferred_element_type=jnp.int32)
