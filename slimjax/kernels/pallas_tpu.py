"""``decode`` by Pallas kernels for TPU, ``implementation="pallas_tpu"``; on other backends only interpreted."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from slimjax.attention.bases import basis
from slimjax.attention.blocks import Part
from slimjax.attention.projections import DecodeWeights
from slimjax.axes import Lengths, Queries, typed
from slimjax.cache import Cache, Codec, TiledCodec, codec_of
from slimjax.kernels import flashq
from slimjax.kernels.buffer import attend_buffer
from slimjax.kernels.combine import combine
from slimjax.kernels.spec import DecodeSpec
from slimjax.kernels.tiles import VMEM, Memory, Tiles, choose
from slimjax.kernels.tpu import flashq_decode
from slimjax.kernels.tpu.generations import Generation, known, running
from slimjax.kernels.tpu.online import LANES
from slimjax.kernels.tpu.operands import angles, operands
from slimjax.kernels.tpu.room import memory
from slimjax.kernels.tpu.rows import attend_rows
from slimjax.kernels.tpu.tiled_rows import COUNT


@typed
def decode(
    q: Queries,
    cache: Cache,
    weights: DecodeWeights,
    spec: DecodeSpec,
    start: Lengths,
    *,
    tiles: Tiles | None = None,
    generation: Generation | None = None,
    interpret: Any = None,
) -> Queries:
    """As ``slimjax.decode``.

    Args:
        q, cache, weights, spec, start: as there; ``start`` is the position of each sequence's first query.
        tiles: None: as long as fast memory allows (``kernels.tiles``).
        generation: of the TPU; None: the one in use.
        interpret: as of ``pallas_call``; None: only where there is no TPU.

    Raises:
        NotImplementedError: what the kernels do not serve, with the reason.
    """
    return decode_part(
        q, cache, weights, spec, start, tiles=tiles, generation=generation, interpret=interpret
    )[0]


@typed
def decode_part(
    q: Queries,
    cache: Cache,
    weights: DecodeWeights,
    spec: DecodeSpec,
    start: Lengths,
    *,
    tiles: Tiles | None = None,
    generation: Generation | None = None,
    interpret: Any = None,
) -> Part:
    """As ``slimjax.decode_part``, with the arguments of ``decode``."""
    if interpret is None:
        interpret = jax.default_backend() != "tpu"
    way = _decode_tiles if flashq.serves(spec) else _decode_rows
    generation = generation or (running() if interpret else known())
    out, log_sums = way(q, cache, weights, spec, start, tiles, generation, interpret)
    overfull = (cache.length > cache.capacity)[:, None, None, None]
    return jnp.where(overfull, jnp.full_like(out, jnp.nan), out), log_sums


def _decode_rows(
    q: Queries,
    cache: Cache,
    weights: DecodeWeights,
    spec: DecodeSpec,
    start: Lengths,
    tiles: Tiles | None,
    generation: Generation | None,
    interpret: Any,
) -> Part:
    given, rules = operands(q, cache, weights, spec, start, int8=_int8(generation))
    codec = codec_of(spec.scheme)
    chosen = _row_tiles(memory(given, rules), cache, spec, tiles, generation)
    if given.turned is not None:
        blocks = math.ceil(cache.capacity / chosen.block)
        given = dataclasses.replace(given, angles=angles(spec, chosen.block, blocks))
    parts = attend_rows(given, rules, chosen, interpret=interpret)
    batch, tokens, heads, _ = q.shape
    if isinstance(codec, TiledCodec):
        newest = attend_buffer(q, cache, weights, spec, codec, start)
        parts = [
            jnp.concatenate(
                [part[:, :, : tokens * heads], each.reshape(1, batch, tokens * heads, *each.shape[3:])]
            )
            for part, each in zip(parts, newest, strict=True)
        ]
    rows, log_sums = (
        each[:, : tokens * heads].reshape(batch, tokens, heads, *each.shape[2:]) for each in combine(*parts)
    )
    return basis(spec).finish(rows, weights, spec).astype(spec.dtype), log_sums


def _decode_tiles(
    q: Queries,
    cache: Cache,
    weights: DecodeWeights,
    spec: DecodeSpec,
    start: Lengths,
    tiles: Tiles | None,
    generation: Generation | None,
    interpret: Any,
) -> Part:
    chosen = _flashq_tiles(q, cache, spec, tiles, generation)
    int8 = _int8(generation)
    return flashq_decode.decode_tiles(q, cache, weights, spec, start, chosen, int8=int8, interpret=interpret)


def _flashq_tiles(
    q: Queries, cache: Cache, spec: DecodeSpec, tiles: Tiles | None, generation: Generation | None
) -> Tiles:
    if reason := flashq_decode.refusal(spec):
        raise NotImplementedError(f"scheme {spec.scheme}: {reason}")
    splits = _splits(cache, generation)
    return flashq_decode.tiles_for(spec, cache.capacity, q.shape[1], tiles, _vmem(generation), splits)


def tiles_of(
    q: Queries, cache: Cache, weights: DecodeWeights, spec: DecodeSpec, generation: Generation | None = None
) -> Tiles:
    """The tiles that ``decode`` chooses for arrays of these shapes; ``generation``: of the TPU, None: the one in use.

    Raises NotImplementedError as ``decode`` does.
    """

    if flashq.serves(spec):
        return _flashq_tiles(q, cache, spec, None, generation or known())

    def look(q: Queries, cache: Cache, weights: DecodeWeights) -> None:
        nonlocal found
        here = generation or known()
        used = memory(*operands(q, cache, weights, spec, cache.length, int8=_int8(here)))
        found = _row_tiles(used, cache, spec, None, here)

    found: Tiles | None = None
    jax.eval_shape(look, q, cache, weights)
    assert found is not None
    return found


def _row_tiles(
    used: Memory, cache: Cache, spec: DecodeSpec, tiles: Tiles | None, generation: Generation | None
) -> Tiles:
    # SAS cuts what is small against the maximum so far, a part's own: no parts that nobody asked for.
    splits = _splits(cache, generation) if spec.scheme.softmax == "exact" else 1
    vmem, codec = _vmem(generation), codec_of(spec.scheme)
    return choose(cache.capacity, used, tiles=tiles, vmem=vmem, unit=_unit(codec), splits=splits)


def _splits(cache: Cache, generation: Generation | None) -> int:
    """Parts that leave no core without work, of tiles that nobody asked for."""
    return 1 if generation is None else generation.parts(cache.batch)


def _unit(codec: Codec) -> int:
    """Tokens that a block is a multiple of."""
    return math.lcm(COUNT * codec.tile, LANES) if isinstance(codec, TiledCodec) else 16


def _int8(generation: Generation | None) -> bool:
    """Whether its units multiply INT8; an interpreted kernel's do."""
    return generation is None or generation.int8


def _vmem(generation: Generation | None) -> int:
    return VMEM if generation is None else generation.room
