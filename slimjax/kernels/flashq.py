"""What kernels over FlashQ's tiles share on every device: what they are asked, and how their answer is finished.

A kernel takes encoded tiles into an online softmax. The newest tokens are in the cache's buffer and in no tile yet;
the reference's own code takes these, from the state that the kernel leaves.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8, Int32

from slimjax.attention.blocks import Part
from slimjax.attention.compute import compute_of, compute_text
from slimjax.attention.integer import Asked, Integer, State, answer, ask
from slimjax.attention.integer_tiles import buffer_tiles
from slimjax.attention.positions import rotate
from slimjax.attention.projections import DecodeWeights
from slimjax.axes import Keys, Lengths, Queries, Values
from slimjax.cache import Cache, TiledCodec, codec_of
from slimjax.cache.codecs.flashq import FlashQ, FlashQTiles, quantise
from slimjax.cache.codecs.mixed import MixedTiles, Pair
from slimjax.kernels.buffer import buffer_geometry, tokens_in_tiles
from slimjax.kernels.spec import DecodeSpec


@dataclasses.dataclass(frozen=True)
class Question:
    """Of a decode call.

    Attributes:
        asked: queries in INT8, each a tile of its own.
        positions: of the queries.
        limit: tokens in tiles that each sees.
        codec, integer: of the scheme.
    """

    asked: Asked
    positions: Int[Array, "B T"]
    limit: Int32[Array, "B T"]
    codec: TiledCodec
    integer: Integer


def serves(spec: DecodeSpec) -> bool:
    """Whether a spec is of keys and values in FlashQ's tiles, refused or not."""
    return widths(codec_of(spec.scheme)) is not None and spec.scheme.basis == "kv"


def widths(codec: object) -> tuple[FlashQ, ...] | None:
    """The widths of a FlashQ codec, or None of another."""
    parts = (codec.few, codec.many) if isinstance(codec, MixedTiles) else (codec,)
    found = tuple(part for part in parts if isinstance(part, FlashQ))
    return found if len(found) == len(parts) else None


def refusal(spec: DecodeSpec) -> str | None:
    """Why no kernel can serve the arithmetic of a spec that ``serves``, or None."""
    if (mode := compute_of(spec)) and not isinstance(mode, Integer):
        return f"compute mode {compute_text(spec.scheme)} of FlashQ's tiles has no kernel; it has int8"
    return compute_of(spec).refusal(spec)


def question(q: Queries, cache: Cache, spec: DecodeSpec, start: Lengths) -> Question:
    """What a kernel is asked by queries that are not rotated yet."""
    codec, integer = codec_of(spec.scheme), compute_of(spec)
    assert isinstance(codec, TiledCodec)
    assert isinstance(integer, Integer)  # others are refused
    positions = start[:, None] + jnp.arange(q.shape[1], dtype=jnp.int32)[None]
    limit = tokens_in_tiles(cache, codec, positions)
    if spec.causal:  # queries behind a sequence are padding
        limit = jnp.where(positions < cache.length[:, None], limit, 0)
    asked = ask(rotate(q.astype(spec.dtype), positions, spec.position), spec, 1)
    return Question(asked, positions, limit, codec, integer)


def by_width(cache: Cache, codec: TiledCodec) -> list[dict[str, FlashQTiles]]:
    """Keys and values: of all heads, or of those with fewer bits and of the others."""
    held: dict[str, Any] = {
        name: jax.tree.unflatten(each.tiles.structure, each.tiles.leaves)
        for name, each in cache.streams.items()
    }
    if not isinstance(codec, MixedTiles):
        return [held]
    parts: list[dict[str, Any]] = [
        {name: getattr(pair, width) for name, pair in held.items() if isinstance(pair, Pair)}
        for width in ("few", "many")
    ]
    return [part for part in parts if part["k"] is not None]


def merged(
    peak: Float[Array, "P B K R 1"],
    total: Float[Array, "P B K R 1"],
    out: Float[Array, "P B K R H"],
    asked: Asked,
) -> State:
    """The state of P parts of a sequence; a part counts by how far its maximum lies below the highest."""
    top = jnp.max(peak, axis=0)
    share, shape = jnp.exp(peak - top[None]), asked.codes.shape[:-1]
    return State(
        peak=top.reshape(*shape, 1),
        total=jnp.sum(total * share, axis=0).reshape(*shape, 1),
        out=jnp.sum(out * share, axis=0).reshape(asked.codes.shape),
    )


def finish(state: State, of: Question, cache: Cache, weights: DecodeWeights, spec: DecodeSpec) -> Part:
    """The answer and log-sums, the newest tokens taken in."""
    first, mine, buffer = buffer_tiles(cache, of.codec, of.positions)
    where = buffer_geometry(first, mine[:, 0], of.positions, cache, weights, spec)
    where = where.without_padding(cache.length - first, spec)
    for index, tile in enumerate(buffer):
        state = of.integer.take(state, of.asked, (tile,), where, spec, index * of.codec.tile, of.codec.tile)
    return answer(state, of.positions.shape[1], spec)


def prompt_refusal(spec: DecodeSpec) -> str | None:
    """Why no kernel of prompts in INT8 serves this spec, or None."""
    if spec.dtype not in ("bfloat16", "float32"):
        return f"compute dtype {spec.dtype}; it has bfloat16 and float32"
    if not spec.causal:
        return "attention that looks ahead"
    if spec.position.kind not in ("none", "learned", "rope"):
        return f"position scheme {spec.position.kind!r}, which adds to the scores"
    return None


def prompt_rows(
    q: Queries, k: Keys, v: Values, length: Lengths, spec: DecodeSpec
) -> tuple[Queries, Keys, Values]:
    """Rotated queries, keys and values of a prompt; zeros behind its end, where anything may be."""
    positions = jnp.arange(q.shape[1], dtype=jnp.int32)
    there = (positions[None] < length[:, None])[:, :, None, None]
    q, k, v = (jnp.where(there, rows, jnp.zeros_like(rows)) for rows in (q, k, v))
    return rotate(q, jnp.broadcast_to(positions[None], q.shape[:2]), spec.position), k, v


def prompt_codes(
    rows: Queries, whole: int, tile: int, *, turned: bool = False
) -> tuple[Int8[Array, "B N ..."], Float[Array, "B N n"]]:
    """Codes by head, [S, H] or ``turned`` [H, S], filled up to a multiple of ``whole`` tokens; and tiles' scales."""
    batch, tokens, heads, size = rows.shape
    padded = jnp.pad(rows, ((0, 0), (0, -tokens % whole), (0, 0), (0, 0)))
    # By head while they are floats: XLA takes minutes to compile the same for INT8.
    by_head = jnp.transpose(padded, (0, 2, 1, 3))
    codes, scale = quantise(by_head.reshape(batch, heads, -1, tile, 1, size))
    if turned:
        columns = jnp.transpose(padded, (0, 2, 3, 1)).astype(jnp.float32)
        marks = jnp.repeat(scale[..., 0], tile, axis=2)[:, :, None]
        return jnp.round(columns / marks).astype(jnp.int8), scale[..., 0]
    return codes.reshape(by_head.shape), scale[..., 0]
