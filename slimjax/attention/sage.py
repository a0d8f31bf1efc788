"""Attention in SageAttention's style: INT8 scores from keys without their mean, P V in float16 (arXiv 2410.02367).

The mean of the keys over tokens adds the same number to every score of a query, which a softmax does not see;
without it the keys' outlier channels no longer take the INT8 range. P and V are rounded to float16 instead: P
before it is divided by its sum, so that its largest value is 1 and the small weights of long contexts are not lost.
The published kernel's P is relative to the maximum so far, ours to the query's maximum over all keys.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from slimjax.attention.blocks import Held, Part, as_held, each, fold, total
from slimjax.attention.positions import rotate
from slimjax.attention.projections import DecodeWeights
from slimjax.attention.reference import Geometry, scores as head_scores, weigh, weights as score_weights
from slimjax.axes import Keys, Queries, Values
from slimjax.cache import Cache, TiledCodec, codec_of
from slimjax.kernels.spec import DecodeSpec
from slimjax.numerics import einsum

LIMIT = 127


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sage:
    """The compute mode ``#sage(tile=64)``: so many queries, and keys, share a scale per head.

    Of a cache of tiles, the keys of a buffer's size do.
    """

    tile: int = 64

    def __post_init__(self) -> None:
        if not isinstance(self.tile, int) or self.tile < 1:
            raise ValueError(f"sage(tile={self.tile}): expected a number of tokens")

    def refusal(self, spec: DecodeSpec) -> str | None:
        """Why this spec cannot be computed so, or None."""
        if spec.scheme.basis != "kv":
            return "SageAttention smooths keys as they are cached (kv); use #float"
        if spec.softcap is not None:
            return "a softcap sees the mean that is taken from the keys; use #float"
        return None

    def decode(
        self, q: Queries, cache: Cache, where: Geometry, weights: DecodeWeights, spec: DecodeSpec
    ) -> Part:
        """Attention of unrotated queries on a kv cache, output in ``spec.dtype``; log-sums are not known."""
        codec = codec_of(spec.scheme)
        where = where.without_padding(cache.length, spec)

        size = codec.span if isinstance(codec, TiledCodec) else self.tile

        def meet(q: Queries, held: Held, where: Geometry) -> Queries:
            return self._attend(q, held, cache.capacity, size, where, spec)

        return as_held(q, cache, codec, where, meet), None

    def attend(self, q: Queries, k: Keys, v: Values, where: Geometry, spec: DecodeSpec) -> Queries:
        """Attention of unrotated queries on rotated keys and on values; in ``spec.dtype``."""
        seen = jnp.any(where.mask, axis=(1, 2))[:, :, None, None]
        whole = {
            name: jnp.where(seen, each_, jnp.zeros_like(each_)).astype(jnp.float32)
            for name, each_ in (("k", k), ("v", v))
        }

        def rows(start: Int[Array, ""] | int, count: int) -> Mapping[str, Array]:
            return {
                name: jax.lax.dynamic_slice_in_dim(part, start, count, axis=1) for name, part in whole.items()
            }

        return self._attend(q, rows, k.shape[1], self.tile, where, spec)

    def _attend(
        self, q: Queries, rows: Held, slots: int, size: int, where: Geometry, spec: DecodeSpec
    ) -> Queries:
        turned = rotate(where.seeing(q).astype(jnp.float32), where.query_positions, spec.position)
        queries = jnp.concatenate(
            [_rounded(turned[:, at : at + self.tile]) for at in range(0, q.shape[1], self.tile)], axis=1
        )
        batch, kv_heads, width = q.shape[0], spec.kv_heads, spec.head_dim
        seen = jnp.any(where.mask, axis=(1, 2)).astype(jnp.float32)[:, :, None, None]

        def add(sum_: Array, start: Int[Array, ""] | int, count: int) -> Array:
            # Slots past a length read as zeros, slots that nobody sees as what they hold.
            # As a product: XLA on CPU else works a key out anew for each number it adds, three times as long.
            part = jax.lax.dynamic_slice_in_dim(seen, start, count, axis=1)[:, :, 0, 0]
            return sum_ + einsum("bskh,bs->bkh", rows(start, count)["k"], part)[:, None]

        summed = fold(slots, size, add, jnp.zeros((batch, 1, kv_heads, width), jnp.float32))
        mean = summed / jnp.maximum(jnp.sum(seen, axis=1, keepdims=True), 1.0)

        def scores(start: Int[Array, ""] | int, count: int) -> Array:
            part = jax.lax.dynamic_slice_in_dim(seen, start, count, axis=1)
            return head_scores(queries, _rounded((rows(start, count)["k"] - mean) * part))

        # Not through the compute dtype: float16 is what P is rounded to here.
        wide = dataclasses.replace(spec, dtype="float32")
        p = score_weights(each(slots, size, scores), where, wide)
        # exp(score - maximum) is P over its own maximum, whatever the softmax is.
        peak = jnp.max(p, axis=-1, keepdims=True)
        p = p / jnp.where(peak == 0, jnp.ones_like(peak), peak)

        def weighed(start: Int[Array, ""] | int, count: int) -> Array:
            part = jax.lax.dynamic_slice_in_dim(p, start, count, axis=3).astype(jnp.float16)
            return weigh(part, rows(start, count)["v"].astype(jnp.float16).astype(jnp.float32))

        return (total(slots, size, weighed) * jnp.swapaxes(peak, 1, 2)).astype(spec.dtype)


def _rounded(rows: Array) -> Array:
    """[B, S, K, H] rounded to the INT8 grid of its own maximum per head, as float32.

    A product of two such in float32 is that of the integers times both scales: sums stay below 2^24.
    """
    peak = jnp.max(jnp.abs(rows), axis=(1, 3), keepdims=True)
    scale = jnp.where(peak == 0, jnp.ones_like(peak), peak / LIMIT)
    return jnp.round(rows / scale) * scale
