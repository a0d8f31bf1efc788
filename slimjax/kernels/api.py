"""The public decode calls and the choice of what executes them."""

from collections.abc import Callable

import jax

from slimjax.attention.bases import basis
from slimjax.attention.blocks import Part
from slimjax.attention.compute import compute_text
from slimjax.attention.projections import DecodeWeights
from slimjax.axes import Lengths, LogSums, Queries, typed
from slimjax.cache import Cache, codec_of, empty
from slimjax.kernels import pallas_gpu, pallas_tpu, reference
from slimjax.kernels.spec import DecodeSpec
from slimjax.scheme import suggest

IMPLEMENTATIONS: dict[str, Callable[..., Part]] = {
    "reference": reference.decode_part,
    "pallas_tpu": pallas_tpu.decode_part,
    "pallas_gpu": pallas_gpu.decode_part,
}

# What ``implementation=None`` tries, in this order, by jax backend.
_ORDER: dict[str, tuple[str, ...]] = {
    "cpu": ("reference",),
    "gpu": ("reference",),  # pallas_gpu only by name: it has been compiled and interpreted, but run on no GPU
    "tpu": ("pallas_tpu", "reference"),
}


def native() -> tuple[str, ...]:
    """The implementations made for the backend in use, in the order in which ``decode`` tries them."""
    return _ORDER.get(jax.default_backend(), ("reference",))


@typed
def decode(
    q: Queries,
    cache: Cache,
    weights: DecodeWeights,
    spec: DecodeSpec,
    *,
    implementation: str | None = None,
    start: Lengths | None = None,
) -> Queries:
    """Attention of new queries on a cache that already holds their tokens.

    Args:
        q: [B, T, N, H] queries before any rotation.
        cache: the layer's cache, the T tokens of the queries appended.
        weights: the layer's arrays that stand in for what the basis does not cache.
        spec: static; scheme, head layout, position scheme, compute dtype.
        implementation: "reference" (any backend); "pallas_tpu", "pallas_gpu" (elsewhere than on a TPU or a GPU they
            are interpreted, which is slow); None: the spec's own, and if that is None, too, the ones for the running
            backend in order.
        start: [B], absolute position of each sequence's first query; None: the last T tokens of each,
            ``cache.length - T``.

    Returns:
        [B, T, N, H] in ``spec.dtype``, before the output projection. A sequence that has overrun its
        capacity is NaN; a query that sees no key is 0.

    Raises:
        ValueError: shapes or a cache that do not fit the spec, or an unknown implementation.
        NotImplementedError: the spec cannot use its basis, or a named implementation, or every one tried,
            refuses; with the reasons.
        RuntimeError: "pallas_gpu" interpreted by a process of fewer threads than its warpgroups wait in (``NPROC``).
    """
    return _attend(q, cache, weights, spec, implementation, start)[0]


@typed
def decode_part(
    q: Queries,
    cache: Cache,
    weights: DecodeWeights,
    spec: DecodeSpec,
    *,
    implementation: str | None = None,
    start: Lengths | None = None,
) -> tuple[Queries, LogSums]:
    """Attention on a cache that holds a part of a sequence's tokens, and what ``combine`` puts parts together by.

    A sequence may lie in several caches, on several devices: each answers for its own tokens, and answers weigh as
    much as their shares of the softmax. They are finished rows, so the combination is the whole's, as long as every
    part has the same weights, scheme and implementation.

    Args:
        q, cache, weights, spec, implementation: as of ``decode``.
        start: [B], position of each sequence's first query, counted from this part's first token: it lies behind the
            part's end where the query belongs to a later one. None: the last T tokens of this part.

    Returns:
        [B, T, N, H] in ``spec.dtype``, as of ``decode``, and [B, T, N], float32 or float64: logarithms of the sums of
        exponentials of the scores, ``numerics.MASK`` of a query that sees no key of this part. Up to a number of each
        query that is the same for every part: some kernels leave out what a bias of the keys adds to all scores.

    Raises:
        ValueError, NotImplementedError, RuntimeError: as ``decode``. NotImplementedError also of a softmax other than
            the exact one, of FIRE, and of other arithmetic that knows no log-sums; and of causal integer attention
            with ``start``, which takes queries behind a cache's end for padding.
    """
    if spec.scheme.softmax != "exact":
        raise NotImplementedError(
            f"scheme {spec.scheme}: parts are put together by sums of exponentials, which {spec.scheme.softmax} has not"
        )
    if spec.position.kind == "fire":
        raise NotImplementedError(
            "position scheme 'fire' depends on where in the whole sequence a query stands"
        )
    if start is not None and spec.causal and (mode := compute_text(spec.scheme)) != "float":
        raise NotImplementedError(
            f"scheme {spec.scheme}: {mode} takes queries behind a cache's end for padding; of a part that lies before "
            "all queries give a spec with causal=False"
        )
    out, log_sums = _attend(q, cache, weights, spec, implementation, start)
    if log_sums is None:
        raise NotImplementedError(
            f"scheme {spec.scheme}: its log-sums are not known in this arithmetic, nor of two passes"
        )
    return out, log_sums


def _attend(
    q: Queries,
    cache: Cache,
    weights: DecodeWeights,
    spec: DecodeSpec,
    implementation: str | None,
    start: Lengths | None,
) -> Part:
    """By the implementation named, else by the first of the running backend's that does not refuse."""
    batch, tokens, heads, size = q.shape
    if (heads, size) != (spec.heads, spec.head_dim):
        raise ValueError(f"q has N, H = {heads}, {size}, the spec {spec.heads}, {spec.head_dim}")
    if batch != cache.batch:
        raise ValueError(f"q has {batch} sequences, the cache {cache.batch}")
    _check_cache(cache, spec)
    first = cache.length - tokens if start is None else start
    implementation = implementation or spec.implementation
    if implementation is not None:
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"unknown implementation {implementation!r}{suggest(implementation, IMPLEMENTATIONS)}"
            )
        return IMPLEMENTATIONS[implementation](q, cache, weights, spec, first)
    reasons = []
    for name in native():
        try:
            return IMPLEMENTATIONS[name](q, cache, weights, spec, first)
        except NotImplementedError as refusal:
            reasons.append(f"{name}: {refusal}")
    raise NotImplementedError("; ".join(reasons))


def _check_cache(cache: Cache, spec: DecodeSpec) -> None:
    """Raise ValueError unless the cache is laid out as the spec's own would be; costs nothing under jit."""

    def layout(held: Cache) -> dict[str, list[str]]:
        streams = held.streams.items()
        return {
            name: [f"{x.dtype}{list(x.shape)}" for x in jax.tree.leaves(codes)] for name, codes in streams
        }

    def own() -> Cache:
        streams, codec = basis(spec).streams(spec), codec_of(spec.scheme)
        return empty(streams, codec, batch=cache.batch, capacity=cache.capacity)

    held, wanted = layout(cache), layout(jax.eval_shape(own))
    if held != wanted:
        raise ValueError(f"the cache holds {held}, scheme {spec.scheme} of this spec needs {wanted}")
