"""Head-wise mixed precision of a model: which heads bear fewer bits, by layer (arXiv 2412.08585, section 3.3).

The selectors are ``slimjax.solve.heads``'s and one of slimjax's own, ``calibrated``, which measures what a head's
fewer bits cost. Calibration tokens decide once, or a prompt decides for itself (``for_prompt``). Layers may have
schemes of their own (``protected``).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from slimjax.attention.bases import BASES, basis
from slimjax.attention.layer import CachedAttention
from slimjax.attention.projections import DecodeWeights, Projections, project, project_out
from slimjax.attention.reference import geometry, weights as score_weights
from slimjax.axes import Inputs, Tokens
from slimjax.cache import codec_of, role_of
from slimjax.cache.codecs.mixed import Mixed, MixedTiles
from slimjax.kernels.spec import DecodeSpec
from slimjax.scheme import Scheme, parse_scheme, suggest
from slimjax.solve.convert import convert, round_trip
from slimjax.solve.fold import fold_value_bias
from slimjax.solve.heads import SELECTORS, low_heads, permute_heads, random

if TYPE_CHECKING:
    from slimjax.models.decoder import DecoderLM

NAMES = (*SELECTORS, "random", "calibrated", "none")

Rows = Mapping[str, jax.Array]


def by_layer(scheme: str | Scheme | Sequence[str | Scheme], layers: int) -> tuple[str | Scheme, ...]:
    """One scheme for each layer, of one for all or a sequence. Raises ValueError for another number of them."""
    schemes = (scheme,) * layers if isinstance(scheme, str | Scheme) else tuple(scheme)
    if len(schemes) != layers:
        raise ValueError(f"{len(schemes)} schemes for {layers} layers: give one, or one for each")
    return schemes


def protected(
    scheme: str | Scheme, other: str | Scheme, layers: int, first: int, last: int
) -> tuple[Scheme, ...]:
    """``other`` for the first ``first`` and the last ``last`` layers, ``scheme`` for those between.

    Raises ValueError where a number is negative or the two are more than the layers.
    """
    if min(first, last) < 0 or first + last > layers:
        raise ValueError(
            f"{first=} and {last=} protected layers of {layers}: expected 0 to {layers} together"
        )
    plain, safe = (parse_scheme(each) if isinstance(each, str) else each for each in (scheme, other))
    return (safe,) * first + (plain,) * (layers - first - last) + (safe,) * last


def head_orders(
    model: "DecoderLM",
    tokens: Tokens | np.ndarray,
    scheme: str | Scheme | Sequence[str | Scheme],
    selector: str,
    *,
    seed: int = 0,
) -> tuple[np.ndarray, ...]:
    """Of every layer its key/value heads in the order that a mixed codec needs, low-bit heads first.

    Args:
        model: a decoder whose layers are in their own order of heads.
        tokens: int32 [B, T], calibration: every token counts, so no padding.
        scheme: one, or one for each layer. Its codec says how many heads get fewer bits, and its basis which rows
            are looked at, as they are cached: keys after RoPE and values for kv, keys before RoPE for k.
        selector: priority, entropy, minmax, variation (``solve.heads``), random, calibrated (``measured``), or
            none: heads as they are.
        seed: of ``random``, which draws for every layer.

    Returns:
        For each layer a permutation of 0..K-1, int64; the identity where the codec has one width.

    Raises:
        ValueError: an unknown selector, or as many schemes as layers are needed.
        NotImplementedError: a layer cannot use its scheme.
    """
    if selector not in NAMES:
        raise ValueError(f"unknown selector {selector!r}{suggest(selector, NAMES)}")
    inputs = _inputs(model, jnp.asarray(tokens, jnp.int32))
    orders = []
    for index, (block, chosen, x) in enumerate(
        zip(model.blocks, by_layer(scheme, len(inputs)), inputs, strict=True)
    ):
        spec = block.attention.decode_spec(chosen, "float32")
        orders.append(head_order(x, block.attention.projections(), spec, selector, seed=(seed, index)))
    return tuple(orders)


@nnx.jit
def _inputs(model: "DecoderLM", tokens: Tokens) -> tuple[Inputs, ...]:
    return model.attention_inputs(tokens)


def head_order(
    x: Inputs, projections: Projections, spec: DecodeSpec, selector: str, *, seed: int | Sequence[int] = 0
) -> np.ndarray:
    """The order of one layer's heads from its inputs x [B, T, D]; see ``head_orders``."""
    basis(spec)
    codec = codec_of(spec.scheme)
    if selector == "none" or not isinstance(codec, Mixed | MixedTiles):
        return np.arange(spec.kv_heads)
    if selector == "random":
        scores = random(spec.kv_heads, seed)
    elif selector == "calibrated":
        scores = measured(x, projections, spec)
    else:
        rows = cached_rows(x, projections, spec)
        found = {name: np.asarray(each).reshape(-1, *each.shape[2:]) for name, each in rows.items()}
        keys = found.get("k", found.get("v"))
        assert keys is not None  # bases without heads are refused
        scores = SELECTORS[selector](keys, found.get("v", keys))
    return low_heads(scores, codec.share)


def cached_rows(x: Inputs, projections: Projections, spec: DecodeSpec) -> Rows:
    """The rows with heads that a cache would hold of x [B, T, D], unrounded: stream -> [B, T, K, H]."""
    folded = fold_value_bias(projections, spec.accumulation)
    bare = _exact(spec, extra=0)
    return basis_rows(x, folded, DecodeWeights(), bare)


def basis_rows(x: Inputs, projections: Projections, weights: DecodeWeights, spec: DecodeSpec) -> Rows:
    """All rows that a cache would hold of x [B, T, D], unrounded."""
    # Not ``basis``, which refuses: without the extra coordinates rows may be too few.
    return BASES[spec.scheme.basis].rows(x, projections, weights, _positions(x), spec)


def measured(x: Inputs, projections: Projections, spec: DecodeSpec) -> np.ndarray:
    """What it costs to put one head alone into the fewer bits: slimjax's own selector, measured, not guessed.

    |change of the layer's output| / |output|, Euclidean over all tokens, when head k's cached rows, and no
    other's, go through the codec of fewer bits (``solve.convert.round_trip``): everything that follows from the rows
    is in it, such as what keys of basis k do to the values of all heads. Attention is the scheme's, in floating
    point. K + 1 passes of attention over x, a head at a time.

    Args:
        x: the layer's inputs, [B, T, D], sequences without padding.
        projections: as trained.
        spec: its codec is of two widths.

    Returns:
        Errors [K], float64.

    Raises:
        NotImplementedError: the basis needs an inverse that the layer has not (``solve.convert``).
        ValueError: a codec of one width.
    """
    codec = codec_of(spec.scheme)
    if not isinstance(codec, Mixed | MixedTiles):
        raise ValueError(
            f"scheme {spec.scheme}: the calibrated selector is for two widths, such as flashq2-4"
        )
    layer = convert(projections, _exact(spec, extra=spec.scheme.extra)).layer
    exact = dict(basis_rows(x, layer.projections, layer.weights, layer.spec))
    coded = {
        name: round_trip(rows, codec.few, role_of(name)) if name in ("k", "v") else rows
        for name, rows in exact.items()
    }
    errors = _errors(x, layer, exact, coded)
    return np.asarray(errors, np.float64)


@jax.jit
def _errors(x: Inputs, layer: CachedAttention, exact: Rows, coded: Rows) -> jax.Array:
    """Of every head the relative change of the layer's output when its rows are the coded ones."""
    spec, positions = layer.spec, _positions(x)
    method = basis(spec)
    length = jnp.full((x.shape[0],), x.shape[1], jnp.int32)
    where = geometry(positions, positions[0], length, layer.projections.position, spec)
    q = project(x, layer.projections.wq, layer.projections.bq, spec.dtype).astype(spec.dtype)
    ready = method.queries(q, positions, layer.weights, spec)

    def output(rows: Rows) -> jax.Array:
        p = score_weights(method.scores(ready, rows, positions[0], layer.weights, spec), where, spec)
        heads = method.finish(method.weigh(p, rows, positions[0], layer.weights, spec), layer.weights, spec)
        return project_out(heads, layer.projections.wo, None, spec.dtype)

    def swapped(head: jax.Array) -> Rows:
        mine = jnp.arange(spec.kv_heads, dtype=jnp.int32)[None, None, :, None] == head
        return {
            name: jnp.where(mine, coded[name], rows) if name in ("k", "v") else rows
            for name, rows in exact.items()
        }

    whole = output(exact)
    heads = jnp.arange(spec.kv_heads, dtype=jnp.int32)
    changes = jax.lax.map(lambda head: jnp.linalg.norm(output(swapped(head)) - whole), heads)
    return changes / jnp.maximum(jnp.linalg.norm(whole), jnp.finfo(jnp.float32).tiny)


def reordered(layer: CachedAttention, order: Sequence[int] | np.ndarray) -> CachedAttention:
    """A converted layer with its heads in another order; its maps move along and nothing is solved again.

    Raises:
        ValueError: not a permutation of the layer's key/value heads.
        NotImplementedError: ALiBi (``permute_heads``), or a basis whose rows are one for all heads.
    """
    spec, weights, order = layer.spec, layer.weights, np.asarray(order, np.int64)
    if order.tolist() == list(range(spec.kv_heads)):
        return layer
    if spec.scheme.basis not in ("kv", "k", "kr", "v"):
        raise NotImplementedError(
            f"basis {spec.scheme.basis!r} caches one row for all heads, which have no order: use kv, k, kr or v"
        )
    projections = permute_heads(layer.projections, order, spec.position)
    channels = (order[:, None] * spec.head_dim + np.arange(spec.head_dim)[None, :]).reshape(-1)

    def rows_and_heads(weight: jax.Array) -> jax.Array:
        """[E(+R), K, H]: rows as the cached channels, the extra ones staying behind them; heads as the heads."""
        extra = np.arange(spec.key_width, weight.shape[0])
        return _taken(_taken(weight, np.concatenate([channels, extra]), 0), order, 1)

    moved = dataclasses.replace(
        weights,
        w_kv=jax.tree.map(rows_and_heads, weights.w_kv),
        w_vk=jax.tree.map(rows_and_heads, weights.w_vk),
        k_bias=None if weights.k_bias is None else _taken(weights.k_bias, order, 0),
        position=projections.position,
    )
    return dataclasses.replace(layer, projections=projections, weights=moved)


def for_prompt(
    model: "DecoderLM",
    prompt: Tokens | np.ndarray,
    layers: Sequence[CachedAttention],
    selector: str = "priority",
    *,
    seed: int = 0,
) -> tuple[CachedAttention, ...]:
    """The dynamic selector: layers whose low-bit heads a prompt chooses for itself, before its prefill.

    Cost, for each prompt: its pass through the model without a cache, which is a prefill's work again (a serving
    system would have the rows from the prefill itself), one look at each cached value (``calibrated``: K + 1
    passes of attention), and a copy of every layer's projections and maps. Shapes stay, so nothing is compiled
    again. Sequences of one batch share the order: give a prompt a batch of its own.

    Args:
        model: the decoder.
        prompt: int32 [B, T], without padding.
        layers: from ``convert_model``, heads in the model's order (without ``orders``).
        selector: as in ``head_orders``.
        seed: likewise.

    Returns:
        The layers for this prompt, for ``with_cache`` with an empty cache.
    """
    schemes = [layer.spec.scheme for layer in layers]
    orders = head_orders(model, prompt, schemes, selector, seed=seed)
    return tuple(reordered(layer, order) for layer, order in zip(layers, orders, strict=True))


def _exact(spec: DecodeSpec, *, extra: int) -> DecodeSpec:
    """The spec with rows in float32 and attention in floating point."""
    scheme = dataclasses.replace(
        spec.scheme, codec="float32", bits=None, group=None, options=(), compute="", extra=extra
    )
    return dataclasses.replace(spec, scheme=scheme)


def _positions(x: Inputs) -> jax.Array:
    line = jnp.arange(x.shape[1], dtype=jnp.int32)
    return jnp.broadcast_to(line[None], x.shape[:2])


def _taken(array: jax.Array, order: np.ndarray, axis: int) -> jax.Array:
    return jnp.take(array, jnp.asarray(order, jnp.int32), axis=axis)
