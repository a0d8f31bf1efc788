"""``decode`` of a FlashQ cache on Hopper: its tiles by a kernel (``tiles``), its buffer as the reference reads it."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from slimjax.attention.blocks import Part
from slimjax.attention.projections import DecodeWeights
from slimjax.attention.softmax import sas_of
from slimjax.axes import Lengths, Queries
from slimjax.cache import Cache, codec_of
from slimjax.kernels import flashq
from slimjax.kernels.gpu import mosaic, packed, tile_steps
from slimjax.kernels.gpu.grid import ALIGNED, padded, parts
from slimjax.kernels.gpu.ring import ROWS, SHARED_LIMIT, Rules
from slimjax.kernels.gpu.tiles import attend_tiles, memory
from slimjax.kernels.spec import DecodeSpec

CALLS = 16  # of the kernel for one decode


def refusal(spec: DecodeSpec, tokens: int) -> str | None:
    """Why a spec that ``flashq.serves`` has no kernel for so many query tokens, or None."""
    if reason := flashq.refusal(spec):
        return reason
    if mosaic.OLD:
        return "FlashQ's tiles have no kernel for GPUs under jax 0.10; use 0.11 or newer"
    for part in flashq.widths(codec_of(spec.scheme)) or ():
        if reason := packed.refusal(part.bits, part.tile):
            return reason
    if not (most := _together(spec, tokens)):
        return (
            f"{spec.group} query heads a key head of {spec.head_dim} take {_memory(spec, 1):,} bytes of shared memory "
            f"beside tiles, more than {SHARED_LIMIT:,}, or are more than {ROWS}"
        )
    if tokens > CALLS * most:
        return f"{tokens} query tokens are more than {CALLS} calls of {most}; decode at most {CALLS * most} at a time"
    if (cut := sas_of(spec.scheme.softmax)) and not cut[0]:
        return f"softmax {spec.scheme.softmax} has no kernel for GPUs; it has exact, and SAS with a cut"
    return None


def _together(spec: DecodeSpec, tokens: int) -> int:
    """Query tokens that one call can serve, at most ``tokens``."""
    fits = (n for n in range(min(tokens, ROWS // spec.group), 0, -1) if _memory(spec, n) <= SHARED_LIMIT)
    return next(fits, 0)


def _memory(spec: DecodeSpec, tokens: int) -> int:
    """Bytes of shared memory, of heads with the most."""
    rows = math.ceil(tokens * spec.group / ALIGNED) * ALIGNED
    parts = flashq.widths(codec_of(spec.scheme)) or ()
    return max(memory(rows, spec.head_dim, part.bits, part.tile) for part in parts)


def decode_tiles(
    q: Queries,
    cache: Cache,
    weights: DecodeWeights,
    spec: DecodeSpec,
    start: Lengths,
    rules: Rules,
    *,
    splits: int | None,
    interpret: Any,
) -> Part:
    """As ``slimjax.decode_part``; ``splits``: as of ``pallas_gpu.decode``.

    More query tokens than shared memory has room for are further calls, each of which reads all tiles.
    """
    mosaic.enough_threads(mosaic.THREADS, "over FlashQ's tiles", interpret)
    most = _together(spec, q.shape[1])
    calls = [
        _call(q[:, at : at + most], cache, weights, spec, start + at, rules, splits, interpret)
        for at in range(0, q.shape[1], most)
    ]
    outs, log_sums = zip(*calls, strict=True)
    known = None if log_sums[0] is None else jnp.concatenate(log_sums, axis=1)
    return jnp.concatenate(outs, axis=1), known


def _call(
    q: Queries,
    cache: Cache,
    weights: DecodeWeights,
    spec: DecodeSpec,
    start: Lengths,
    rules: Rules,
    splits: int | None,
    interpret: Any,
) -> Part:
    """Heads of each width."""
    rules = dataclasses.replace(rules, tokens=q.shape[1])
    of = flashq.question(q, cache, spec, start)
    batch, kv_heads, *rows, size = of.asked.codes.shape
    queries, limit = math.prod(rows), jnp.minimum(of.limit, cache.capacity)
    codes = padded(of.asked.codes.reshape(batch, kv_heads, queries, size)).astype(jnp.bfloat16)
    scale = of.asked.scale.reshape(batch, kv_heads, queries)
    scale = jnp.pad(scale, ((0, 0), (0, 0), (0, ROWS - queries)))
    found, head = [], 0
    for part in flashq.by_width(cache, of.codec):
        fixed = _static(spec, of, rules, part["k"].bits, interpret)
        heads = part["k"].scale.shape[2]
        mine = slice(head, head + heads)
        count = parts(batch * heads, cache.capacity, fixed.span) if splits is None else splits
        found.append(
            attend_tiles(
                codes[:, mine],
                scale[:, mine],
                part["k"],
                part["v"],
                jnp.max(limit, axis=1),
                start,
                limit,
                fixed,
                splits=count,
                interpret=interpret,
            )
        )
        head += heads
    most = max(len(peak) for peak, _, _ in found)
    peak, total, out = (
        jnp.concatenate([_more(part[index], most, nothing) for part in found], axis=2)
        for index, nothing in enumerate((tile_steps.NONE, 0.0, 0.0))
    )
    state = flashq.merged(
        peak[..., :queries, None],
        total[..., :queries, None],
        jnp.swapaxes(out, 3, 4)[..., :queries, :],
        of.asked,
    )
    return flashq.finish(state, of, cache, weights, spec)


def _more(parts: Float[Array, "P *rest"], count: int, nothing: float) -> Float[Array, "Q *rest"]:
    """Filled up with parts of no token."""
    fill = [(0, count - len(parts)), *[(0, 0)] * (parts.ndim - 1)]
    return jnp.pad(parts, fill, constant_values=nothing)


def _static(
    spec: DecodeSpec, of: flashq.Question, rules: Rules, bits: int, interpret: Any
) -> tile_steps.Static:
    return tile_steps.Static(
        rules=rules,
        integer=of.integer,
        sas=sas_of(spec.scheme.softmax),
        bits=bits,
        tile=of.codec.tile,
        interpreted=interpret is not False,
    )
