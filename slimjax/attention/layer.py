"""One attention layer, from its inputs to its output: without a cache, filling one, and through one."""

import dataclasses

import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool

from slimjax.attention.bases import basis
from slimjax.attention.compute import Compute, compute_of, compute_text
from slimjax.attention.positions import rotate
from slimjax.attention.projections import DecodeWeights, Projections, project, project_out
from slimjax.attention.reference import attend, causal_blocks, geometry
from slimjax.axes import Inputs, Lengths, typed
from slimjax.cache import Cache, append, codec_of, empty
from slimjax.kernels.api import decode
from slimjax.kernels.prompts import prompt_kernel
from slimjax.kernels.spec import DecodeSpec
from slimjax.pytree import pytree, static


@pytree
class CachedAttention:
    """A layer made ready for one scheme by ``slimjax.solve.convert``.

    Attributes:
        projections: as trained, but with the value bias folded into the output bias (``bv`` is None).
        weights: what decoding needs beside the cache.
        spec: static.
    """

    projections: Projections
    weights: DecodeWeights
    spec: DecodeSpec = static()


@typed
def attend_full(
    x: Inputs,
    projections: Projections,
    spec: DecodeSpec,
    *,
    mask: Bool[Array, "B #N T T"] | None = None,
    length: Lengths | None = None,
    compute: Compute | None = None,
    forward: bool = False,
) -> Inputs:
    """Attention of T tokens on themselves, no cache: training, scoring, prefill.

    Args:
        x: the layer's (normalised) inputs, any float dtype.
        projections: the layer's weights; used in ``spec.dtype``.
        spec: its scheme is not looked at, but by kernels of prompts, as is its implementation.
        mask: further restricts what the spec's causality and window leave visible.
        length: [B], tokens of each right-padded sequence; None: all T.
        compute: in which arithmetic queries meet keys and values; None: floating point.
        forward: nobody asks for a gradient, so that a kernel made for the backend may serve
            (``slimjax.kernels.prompts``).

    Returns:
        The layer's output in ``spec.dtype``.
    """
    batch, tokens, _ = x.shape
    positions = jnp.arange(tokens, dtype=jnp.int32)
    everywhere = jnp.broadcast_to(positions[None], (batch, tokens))
    held = jnp.full((batch,), tokens, jnp.int32) if length is None else length
    q = project(x, projections.wq, projections.bq, spec.dtype)
    k = rotate(project(x, projections.wk, projections.bk, spec.dtype), positions[None], spec.position)
    v = project(x, projections.wv, projections.bv, spec.dtype)
    k, v, outs = k.astype(spec.dtype), v.astype(spec.dtype), []
    if forward and mask is None and (prompt := prompt_kernel(spec, tokens, compute)):
        out = prompt(q, k, v, spec, held)
        return project_out(out, projections.wo, projections.bo, spec.dtype)
    # Other arithmetic has tiles of its own.
    blocks = causal_blocks(tokens, causal=spec.causal) if compute is None else [(0, tokens, tokens)]
    meet = attend if compute is None else compute.attend
    for first, last, end in blocks:
        where = geometry(everywhere[:, first:last], positions[:end], held, projections.position, spec)
        if mask is not None:
            where = where.restrict(mask[:, :, first:last, :end])
        if compute is not None:  # queries that are padding would have a say in the scales of tiles
            where = where.restrict((everywhere[:, first:last] < held[:, None])[:, None, :, None])
        outs.append(meet(q[:, first:last], k[:, :end], v[:, :end], where, spec))
    out = jnp.concatenate(outs, axis=1)
    return project_out(out, projections.wo, projections.bo, spec.dtype)


def init_cache(spec: DecodeSpec, *, batch: int, capacity: int) -> Cache:
    """An empty cache for a layer. Raises NotImplementedError where the spec cannot use its basis."""
    return empty(basis(spec).streams(spec), codec_of(spec.scheme), batch=batch, capacity=capacity)


@typed
def prefill(
    x: Inputs, layer: CachedAttention, cache: Cache, *, count: Lengths | None = None
) -> tuple[Inputs, Cache]:
    """A first chunk: attention on its own exact keys and values, and the cache written behind it.

    As in arXiv 2503.05840: V = X W_V costs prefill nothing extra, so nothing is rebuilt from the cache. Under a
    compute mode other than float, queries, keys and values meet in that arithmetic (FlashQ's INT8 tiles).

    Args:
        x: [B, T, D].
        layer: the converted layer.
        cache: an *empty* cache. Under jit a sequence that already holds tokens is answered with NaN.
        count: [B], tokens of each right-padded sequence; None: all T.

    Returns:
        The layer's output (rows past ``count`` are meaningless) and the filled cache.

    Raises:
        ValueError: (outside jit) the cache is not empty; ``attend_cached`` is for later chunks.
    """
    held = cache.length > 0
    if not isinstance(held, Tracer) and bool(jnp.any(held)):
        raise ValueError(f"prefill needs an empty cache, this one holds {cache.length.tolist()} tokens")
    spec = layer.spec
    compute = None if compute_text(spec.scheme) == "float" else compute_of(spec)
    out = attend_full(x, layer.projections, spec, length=count, compute=compute, forward=True)
    out = jnp.where(held[:, None, None], jnp.full_like(out, jnp.nan), out)
    return out, append_rows(x, layer, cache, count, prompt=True)


@typed
def attend_cached(
    x: Inputs,
    layer: CachedAttention,
    cache: Cache,
    *,
    count: Lengths | None = None,
    prompt: bool = False,
) -> tuple[Inputs, Cache]:
    """Append T tokens, then attend to everything *through the cache*: decoding, later chunks, evaluation.

    T tokens in one call are T calls of one token, in codes and, up to the order of sums, in outputs: a query sees
    the cache as it was when its own token had just been held, also where codes of several tokens depend on each
    other (tiles, whose newest tokens wait in a buffer). So an evaluation of whole texts stands for decoding. As a
    ``prompt`` the tokens are read likewise, but stored as ``prefill`` stores them.

    Args:
        x: [B, T, D], any T >= 1.
        layer: the converted layer.
        cache: what came before.
        count: [B], tokens of each right-padded sequence; None: all T.
        prompt: the tokens are (a further part of) a prompt; see ``append``. No difference but under codecs of
            tiles.

    Returns:
        The layer's output (rows past ``count`` are meaningless) and the longer cache.
    """
    spec = layer.spec
    q = project(x, layer.projections.wq, layer.projections.bq, spec.dtype).astype(spec.dtype)
    longer = append_rows(x, layer, cache, count, prompt=prompt, keep=spec.causal and x.shape[1] > 1)
    out = decode(q, longer, layer.weights, spec, start=cache.length)
    longer = dataclasses.replace(longer, recent=None)
    return project_out(out, layer.projections.wo, layer.projections.bo, spec.dtype), longer


def append_rows(
    x: Inputs,
    layer: CachedAttention,
    cache: Cache,
    count: Lengths | None,
    *,
    prompt: bool = False,
    keep: bool = False,
) -> Cache:
    """The cache with the rows of x behind what it held; ``prompt`` and ``keep`` as in ``append``."""
    positions = cache.length[:, None] + jnp.arange(x.shape[1], dtype=jnp.int32)[None, :]
    rows = basis(layer.spec).rows(x, layer.projections, layer.weights, positions, layer.spec)
    return append(cache, rows, codec_of(layer.spec.scheme), count, prompt=prompt, keep=keep)
