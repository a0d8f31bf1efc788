"""``decode`` by Pallas kernels for TPU, ``implementation="pallas_tpu"``; on other backends only interpreted."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from slimjax.attention.bases import basis
from slimjax.attention.projections import DecodeWeights
from slimjax.axes import Lengths, Queries, typed
from slimjax.cache import Cache
from slimjax.kernels.combine import combine
from slimjax.kernels.spec import DecodeSpec
from slimjax.kernels.tiles import VMEM, Tiles, choose
from slimjax.kernels.tpu.generations import Generation, running
from slimjax.kernels.tpu.operands import angles, operands
from slimjax.kernels.tpu.rows import attend_rows, memory


@typed
def decode(
    q: Queries,
    cache: Cache,
    weights: DecodeWeights,
    spec: DecodeSpec,
    start: Lengths,
    *,
    tiles: Tiles | None = None,
    interpret: Any = None,
) -> Queries:
    """As ``slimjax.decode``.

    Args:
        q, cache, weights, spec, start: as there; ``start`` is the position of each sequence's first query.
        tiles: None: as long as fast memory allows (``kernels.tiles``).
        interpret: as of ``pallas_call``; None: only where there is no TPU.

    Raises:
        NotImplementedError: what the kernels do not serve, with the reason.
    """
    given, rules = operands(q, cache, weights, spec, start)
    chosen = choose(cache.capacity, memory(given, rules), tiles=tiles, vmem=_vmem(running()))
    if given.turned is not None:
        blocks = math.ceil(cache.capacity / chosen.block)
        given = dataclasses.replace(given, angles=angles(spec, chosen.block, blocks))
    if interpret is None:
        interpret = jax.default_backend() != "tpu"
    mixed, _ = combine(*attend_rows(given, rules, chosen, interpret=interpret))
    batch, tokens, heads, _ = q.shape
    rows = mixed[:, : tokens * heads].reshape(batch, tokens, heads, -1)
    out = basis(spec).finish(rows, weights, spec).astype(spec.dtype)
    return jnp.where((cache.length > cache.capacity)[:, None, None, None], jnp.full_like(out, jnp.nan), out)


def tiles_of(
    q: Queries, cache: Cache, weights: DecodeWeights, spec: DecodeSpec, generation: Generation | None = None
) -> Tiles:
    """The tiles that ``decode`` chooses for arrays of these shapes; ``generation``: of the TPU, None: the one in use.

    Raises NotImplementedError as ``decode`` does.
    """

    def look(q: Queries, cache: Cache, weights: DecodeWeights) -> None:
        nonlocal found
        used = memory(*operands(q, cache, weights, spec, cache.length))
        found = choose(cache.capacity, used, vmem=_vmem(generation or running()))

    found: Tiles | None = None
    jax.eval_shape(look, q, cache, weights)
    assert found is not None
    return found


def _vmem(generation: Generation | None) -> int:
    return VMEM if generation is None else generation.room
