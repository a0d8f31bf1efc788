"""``decode`` of a FlashQ cache on TPU: its tiles by a kernel (``flashq``), its buffer as the reference reads it."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from slimjax.attention.blocks import Part
from slimjax.attention.compute import compute_of
from slimjax.attention.integer import Asked, Integer, State
from slimjax.attention.positions import alibi_slopes, bias
from slimjax.attention.projections import DecodeWeights
from slimjax.attention.sas import MOST_COMPARED
from slimjax.attention.softmax import compared
from slimjax.axes import Lengths, Queries
from slimjax.cache import Cache, TiledCodec, codec_of
from slimjax.cache.codecs.flashq import FlashQ, FlashQTiles
from slimjax.kernels import flashq
from slimjax.kernels.spec import DecodeSpec
from slimjax.kernels.tiles import SHARE, Tiles
from slimjax.kernels.tpu import tiled_rows
from slimjax.kernels.tpu.flashq import Section, Static, Stream, at_once, attend_tiles, together
from slimjax.kernels.tpu.online import LANES
from slimjax.kernels.tpu.operands import rules_of
from slimjax.kernels.tpu.tile_rows import parts_of
from slimjax.pytree import pytree

COUNTS = (
    8,
    16,
    32,
)  # tiles of a block: fewer have fewer rows to drop, and parts of theirs have to fill lanes


def refusal(spec: DecodeSpec) -> str | None:
    """Why the kernel cannot serve a spec that ``flashq.serves``, or None."""
    parts = flashq.widths(codec_of(spec.scheme)) or ()
    if reason := next((tiled_rows.refusal(part) for part in parts if part.bits == 3), None):
        return reason
    if reason := flashq.refusal(spec):
        return reason
    softmax, cut = spec.scheme.softmax, f"SAS with a cut of at most {MOST_COMPARED}"
    return None if compared(softmax) else f"softmax {softmax} has no kernel; it has exact, and {cut}"


def decode_tiles(
    q: Queries,
    cache: Cache,
    weights: DecodeWeights,
    spec: DecodeSpec,
    start: Lengths,
    tiles: Tiles,
    *,
    int8: bool,
    interpret: Any,
) -> Part:
    """As ``slimjax.decode_part``; ``int8``: products of INT8, else of bfloat16, which have the same sums."""
    of, tokens = flashq.question(q, cache, spec, start), q.shape[1]
    fixed = Static(
        rules=rules_of(spec, tokens),
        integer=of.integer,
        softmax=spec.scheme.softmax,
        tile=of.codec.tile,
        dtype="int8" if int8 else "bfloat16",
    )
    added = _bias(cache, weights, of.positions, spec)
    sections = _sections(of.asked, cache, of.codec, spec, added, tiles)
    states = attend_tiles(
        jnp.max(of.limit, axis=1), start, of.limit.reshape(-1), sections, fixed, tiles, interpret=interpret
    )
    return flashq.finish(_state(states, sections, of.asked), of, cache, weights, spec)


def tiles_for(
    spec: DecodeSpec, capacity: int, tokens: int, tiles: Tiles | None, vmem: int, splits: int = 1
) -> Tiles:
    """The tiles asked for, else the fewest of ``COUNTS`` whose packed parts fill lanes. Raises NotImplementedError as
    ``kernels.tiles.choose`` does, and where tiles asked for are not whole FlashQ tiles, 8 or a multiple.

    splits: parts, unless tiles are asked for, or there are fewer blocks, or parts would weigh otherwise.
    """
    codec = codec_of(spec.scheme)
    widths = flashq.widths(codec)
    assert widths is not None
    size = widths[0].tile
    if tiles is None:
        parts = [size // parts_of(part.bits) for part in widths]
        count = next((n for n in COUNTS if all(n * part % LANES == 0 for part in parts)), COUNTS[-1])
        blocks = math.ceil(capacity / (count * size))
        tiles = Tiles(block=count * size, vmem=vmem, splits=min(splits, blocks) if _divisible(spec) else 1)
    if tiles.block % (8 * size):
        raise NotImplementedError(
            f"{tiles.block=}: the kernel takes 8 FlashQ tiles of {size} tokens at once, or 16, ..."
        )
    taken = _memory(spec, widths, tiles.block, tokens)
    if taken > SHARE * tiles.vmem:
        raise NotImplementedError(
            f"{tiles.block} tokens take {taken:,} bytes of VMEM with their queries and sums, more than "
            f"{int(SHARE * tiles.vmem):,}"
        )
    return tiles


def _divisible(spec: DecodeSpec) -> bool:
    """Whether parts of a sequence weigh as the whole does: SAS cuts, and P's static scale rounds, what is small
    against the maximum so far, which is each part's own.
    """
    compute = compute_of(spec)
    return spec.scheme.softmax == "exact" and isinstance(compute, Integer) and compute.p != "static"


def _memory(spec: DecodeSpec, widths: tuple[FlashQ, ...], block: int, tokens: int) -> int:
    """Bytes of VMEM: blocks, queries and states twice, and what is made of the columns at work."""
    queries, size, wide = spec.group * tokens, widths[0].tile, spec.key_width
    bits = max(part.bits for part in widths)
    blocks = 2 * block * wide * bits // 8 + 4 * block // size * (wide + 2 * LANES)
    rows = math.ceil(queries / 8) * 8
    states = 2 * rows * wide * 4 + 3 * spec.kv_heads * rows * LANES * 4
    heads = together(spec.kv_heads, spec.head_dim) * at_once(spec.kv_heads, spec.head_dim, queries)
    if spec.position.trained:
        blocks += 4 * block * spec.kv_heads * rows
    scores = 6 * heads * queries * (block // size) * block * 4
    code = 4 + 2 if any(part.bits == 3 for part in widths) else 2  # unpacked to words, or as bytes
    return 2 * (blocks + states) + code * block * heads * spec.head_dim + scores


def _bias(
    cache: Cache, weights: DecodeWeights, positions: Int[Array, "B T"], spec: DecodeSpec
) -> Float[Array, "B K R C"] | None:
    """What a trained position scheme adds to the scores."""
    if not spec.position.trained:
        return None
    slots = jnp.arange(cache.capacity, dtype=jnp.int32)
    found = bias(spec.position, weights.position, positions, slots, spec.heads, jnp.float32)
    assert found is not None  # of a trained scheme
    return found.reshape(len(positions), spec.kv_heads, -1, cache.capacity)


def _unpacked_order(
    rows: Float[Array, "*lead C"], bits: int, tile: int, block: int
) -> Float[Array, "*lead c"]:
    """Tokens of every block in the order in which its codes are unpacked: part by part, tile by tile."""
    lead, parts = rows.shape[:-1], parts_of(bits)
    padded = jnp.pad(rows, ((0, 0),) * len(lead) + ((0, -rows.shape[-1] % block),))
    tiles = padded.reshape(*lead, -1, block // tile, parts, tile // parts)
    return jnp.swapaxes(tiles, -3, -2).reshape(padded.shape)


def _sections(
    asked: Asked,
    cache: Cache,
    codec: TiledCodec,
    spec: DecodeSpec,
    biased: Float[Array, "B K R C"] | None,
    tiles: Tiles,
) -> tuple[Section, ...]:
    """Heads of each width, with what they read."""
    batch, kv_heads, group, tokens, _, size = asked.codes.shape
    queries = group * tokens
    codes = asked.codes.reshape(batch, kv_heads, queries, size).astype(jnp.float32)
    scale = asked.scale.reshape(batch, kv_heads, queries)
    slopes = None
    if spec.position.kind == "alibi":
        each = np.repeat(alibi_slopes(spec.heads), tokens).reshape(1, kv_heads, queries)
        slopes = jnp.asarray(each, jnp.float32)
    found, first = [], 0
    for part in flashq.by_width(cache, codec):
        heads = part["k"].scale.shape[2]
        mine = slice(first, first + heads)
        lanes = heads // together(heads, size)
        added = None
        if biased is not None:
            added = biased[:, mine].reshape(batch, lanes, -1, cache.capacity)
            added = _unpacked_order(added, part["k"].bits, codec.tile, tiles.block)
        found.append(
            Section(
                q=jnp.moveaxis(codes[:, mine], 1, 2).reshape(batch, queries, heads * size),
                q_scale=_on_lanes(scale[:, mine], lanes),
                slopes=None if slopes is None else _on_lanes(slopes[:, mine], lanes)[0],
                bias=added,
                k=_stream(part["k"]),
                v=_stream(part["v"]),
                bits=part["k"].bits,
            )
        )
        first += heads
    return tuple(found)


def _stream(tiles: FlashQTiles) -> Stream:
    return Stream(packed=tiles.packed, step=tiles.step, low=tiles.low, scale=tiles.scale)


def _on_lanes(rows: Float[Array, "B K R"], groups: int) -> Float[Array, "B groups hR 128"]:
    flat = rows.reshape(rows.shape[0], groups, -1, 1)
    return jnp.broadcast_to(flat, (*flat.shape[:3], LANES))


@pytree
class _Part:
    """A section's state, parts of the sequence first."""

    peak: Float[Array, "P B K R 1"]
    total: Float[Array, "P B K R 1"]
    out: Float[Array, "P B K R H"]


def _state(states: list[tuple[Array, Array, Array]], sections: tuple[Section, ...], asked: Asked) -> State:
    """Of all heads and parts."""

    def part(state: tuple[Array, Array, Array], section: Section) -> _Part:
        peak, total, out = state
        lead, queries = peak.shape[:2], out.shape[2]

        def rows(x: Array) -> Array:
            return x[..., :1].reshape(*lead, section.heads, queries, 1)

        heads = out.reshape(*lead, queries, section.heads, -1)
        return _Part(peak=rows(peak), total=rows(total), out=jnp.moveaxis(heads, 3, 2))

    parts = [part(*each) for each in zip(states, sections, strict=True)]
    whole = jax.tree.map(lambda *each: jnp.concatenate(each, axis=2), *parts)
    return flashq.merged(whole.peak, whole.total, whole.out, asked)
