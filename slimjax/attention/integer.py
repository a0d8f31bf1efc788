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

from slimjax.attention.blocks import Held, Part, as_held, fold
from slimjax.attention.integer_tiles import Tile, Tiles, stored_tiles, tile_of
from slimjax.attention.positions import rotate
from slimjax.attention.projections import DecodeWeights
from slimjax.attention.reference import Geometry
from slimjax.attention.softmax import Exponential, exponential_of
from slimjax.axes import Keys, Queries, Values
from slimjax.cache import Cache, TiledCodec, codec_of
from slimjax.cache.codecs.flashq import quantise
from slimjax.kernels.spec import DecodeSpec
from slimjax.numerics import MASK
from slimjax.pytree import pytree

TILE = 64
_P_SCALES = ("tile", "static", "row")
_DENOMINATORS = ("before", "after")
_RESCALES = ("exact", "softmax")


@pytree
class Asked:
    """Queries in INT8: Q tiles of T, and the tiles' scales per head."""

    codes: Int8Of[Array, "B K G Q T H"]
    scale: Float[Array, "B K G Q 1 1"]


@pytree
class State:
    """The online softmax: maximum, denominator and weighted sum so far, of every query."""

    peak: Float[Array, "B K G Q T 1"]
    total: Float[Array, "B K G Q T 1"]
    out: Float[Array, "B K G Q T H"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Integer:
    """The compute mode ``#int8(p=tile, denominator=before, rescale=exact, tile=0)``.

    Attributes:
        p: what P, at most 1, is scaled by: its maximum in a tile of queries and keys over 119 ("tile"), 1/127
            ("static"), or each query's own maximum in the tile over 119 ("row"). Of a cache every query is a tile of
            its own, so that "tile" and "row" are one there.
        denominator: the sum of P before or after its rounding to INT8.
        rescale: the factor of what was summed under a lower maximum: an exact exponential, or the softmax's own
            (SAS where that is chosen).
        tile: queries of a prompt's tile, and keys where they are quantised here: of a prompt, and of a cache without
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
    ) -> Part:
        """Attention of unrotated queries on a kv cache, output in ``spec.dtype``; and log-sums.

        Every query is a tile of its own.
        """
        codec = codec_of(spec.scheme)
        where = where.without_padding(cache.length, spec)
        if isinstance(codec, TiledCodec) and codec.integral:
            tiles = stored_tiles(cache, codec, where.query_positions)
            return self._attend(q, tiles, cache.capacity, codec.tile, 1, where, spec)
        size = codec.span if isinstance(codec, TiledCodec) else self.tokens(spec)

        def meet(q: Queries, held: Held, where: Geometry) -> Part:
            def tiles(start: Int[Array, ""] | int, count: int) -> tuple[Tile, ...]:
                rows = held(start, count)
                return (tile_of(rows["k"], rows["v"]),)

            return self._attend(q, tiles, cache.capacity, size, 1, where, spec)

        return as_held(q, cache, codec, where, meet)

    def attend(self, q: Queries, k: Keys, v: Values, where: Geometry, spec: DecodeSpec) -> Queries:
        """Attention of unrotated queries on rotated keys and on values, quantised here; in ``spec.dtype``."""
        seen = jnp.any(where.mask, axis=(1, 2))[:, :, None, None]
        keys, values = (jnp.where(seen, each, jnp.zeros_like(each)) for each in (k, v))

        def tiles(start: Int[Array, ""] | int, count: int) -> tuple[Tile, ...]:
            first, second = (
                jax.lax.dynamic_slice_in_dim(each, start, count, axis=1) for each in (keys, values)
            )
            return (tile_of(first, second),)

        size = self.tokens(spec)
        return self._attend(q, tiles, k.shape[1], size, size, where, spec)[0]

    def tokens(self, spec: DecodeSpec) -> int:
        """Tokens of a tile: as chosen, or the codec's own."""
        codec = codec_of(spec.scheme)
        return self.tile or (codec.tile if isinstance(codec, TiledCodec) and codec.integral else TILE)

    def _attend(
        self, q: Queries, tiles: Tiles, slots: int, size: int, rows: int, where: Geometry, spec: DecodeSpec
    ) -> Part:
        """Tiles of ``size`` slots and of at most ``rows`` queries."""
        asked = ask(rotate(where.seeing(q), where.query_positions, spec.position), spec, rows)

        def step(state: State, start: Int[Array, ""] | int, count: int) -> State:
            return self.take(state, asked, tiles(start, count), where, spec, start, count)

        return answer(fold(slots, size, step, begin(asked)), q.shape[1], spec)

    def take(
        self,
        state: State,
        asked: Asked,
        tiles: tuple[Tile, ...],
        where: Geometry,
        spec: DecodeSpec,
        start: Int[Array, ""] | int,
        count: int,
    ) -> State:
        """One tile of keys, slots start .. start + count - 1 of ``where``, taken into account."""

        def score(tile: Tile) -> Array:
            met = _int_dot("bkgqth,bskh->bkgqts", asked.codes, tile.k)
            return met.astype(jnp.float32) * asked.scale * tile.k_scale

        scores, mask = _masked(_chosen(tiles, score), where, spec, start, count)
        exponential = exponential_of(spec.scheme.softmax)
        assert exponential is not None  # refused before
        return self._online(state, scores, mask, tiles, exponential)

    def _online(
        self,
        state: State,
        scores: Float[Array, "B K G Q T S"],
        mask: Bool[Array, "B #K #G Q T S"],
        tiles: tuple[Tile, ...],
        exponential: Exponential,
    ) -> State:
        """The same for scores, and which of them are seen."""
        masked = jnp.where(mask, scores, jnp.full_like(scores, MASK))
        peak = jnp.maximum(state.peak, jnp.max(masked, axis=-1, keepdims=True))

        def weights() -> Array:
            return jnp.where(mask, exponential(peak - masked), jnp.zeros_like(scores))

        # Not only for tiles that no query sees: XLA on CPU would compute SAS, cheap as it looks, for every use of P.
        p = jax.lax.cond(jnp.any(mask), weights, lambda: jnp.zeros_like(scores))
        fall = peak - state.peak
        factor = jnp.exp(-fall) if self.rescale == "exact" else jnp.where(fall == 0, 1.0, exponential(fall))
        share = _chosen(tiles, lambda tile: tile.share)
        codes, scale = self._quantise_p(p * share)
        summed = p if self.denominator == "before" else codes.astype(jnp.float32) * scale / share

        def weigh(tile: Tile) -> Array:
            weighed = _int_dot("bkgqts,bskh->bkgqth", codes, tile.v).astype(jnp.float32)
            return weighed * scale * tile.v_scale

        return State(
            peak=peak,
            total=factor * state.total + jnp.sum(summed, axis=-1, keepdims=True),
            out=factor * state.out + _chosen(tiles, weigh),
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


def ask(q: Queries, spec: DecodeSpec, tile: int) -> Asked:
    """Rotated queries in tiles of at most ``tile``, padded with zeros."""
    batch, tokens, heads, width = q.shape
    rows = min(tile, tokens)
    count = -(-tokens // rows)
    padded = jnp.pad(q.astype(jnp.float32), ((0, 0), (0, count * rows - tokens), (0, 0), (0, 0)))
    codes, scale = quantise(padded.reshape(batch, count, rows, heads, width))
    grouped = codes.reshape(batch, count, rows, spec.kv_heads, spec.group, width)
    scales = jnp.moveaxis(scale.reshape(batch, count, spec.kv_heads, spec.group), 1, 3)
    # Once, in the order of the scores.
    return Asked(codes=jnp.transpose(grouped, (0, 3, 4, 1, 2, 5)), scale=scales[..., None, None])


def begin(asked: Asked) -> State:
    """Nothing taken yet."""
    shape = asked.codes.shape[:-1]
    return State(
        peak=jnp.full((*shape, 1), MASK, jnp.float32),
        total=jnp.zeros((*shape, 1), jnp.float32),
        out=jnp.zeros(asked.codes.shape, jnp.float32),
    )


def answer(state: State, tokens: int, spec: DecodeSpec) -> Part:
    """What was taken over its denominators, for the first ``tokens`` queries, in ``spec.dtype``; and log-sums."""
    some = jnp.where(state.total == 0, jnp.ones_like(state.total), state.total)

    def by_token(found: Float[Array, "B K G Q T A"]) -> Float[Array, "B t N A"]:
        batch, kv_heads, group, count, rows, width = found.shape
        found = found.reshape(batch, kv_heads * group, count * rows, width)[:, :, :tokens]
        return jnp.swapaxes(found, 1, 2)

    out = by_token(state.out / some).astype(spec.dtype)
    if spec.scheme.softmax != "exact":
        return out, None
    return out, by_token(jnp.where(state.total == 0, MASK, state.peak + jnp.log(some)))[..., 0]


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


def _chosen(tiles: tuple[Tile, ...], value: Callable[[Tile], Array]) -> Array:
    """A value of the first tile, or for each query of the tile that is its own."""
    found = value(tiles[0])
    for tile in tiles[1:]:
        assert tile.mine is not None  # of all but the first
        found = jnp.where(tile.mine, value(tile), found)
    return found


def _int_dot(subscripts: str, first: Int8Of[Array, "..."], second: Int8Of[Array, "..."]) -> Int[Array, "..."]:
    """INT8 x INT8 with the sum in INT32."""
    return jnp.einsum(subscripts, first, second, preferred_element_type=jnp.int32)
