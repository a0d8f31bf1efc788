"""Making a trained layer ready for a cache scheme, with the figures that say how well it will do."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slimjax.attention.bases import basis
from slimjax.attention.layer import CachedAttention
from slimjax.attention.pair import Pair
from slimjax.attention.projections import DecodeWeights, Projections
from slimjax.cache import Codec, Role, codec_of
from slimjax.kernels.spec import DecodeSpec
from slimjax.numerics import relative_l2
from slimjax.solve.augment import Solution, augmented, exact_solution
from slimjax.solve.fold import fold_value_bias, key_bias_matters
from slimjax.solve.linear import condition_number, noise_gain
from slimjax.solve.scales import fixed, needs_scale, rescaled


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
    """What is known of a converted layer before any data is seen; None where nothing is solved for.

    Attributes:
        condition_number: of the matrix that is inverted: [W_K, U] for bases k and kr, W_V for basis v, the
            first layer's W_K for basis h.
        noise_gain: how the cache's relative rounding error grows on its way to what is rebuilt.
        predicted_error: relative L2 error of what is rebuilt (V for k, K for v) when white Gaussian
            inputs are projected, encoded by the scheme's codec, decoded and mapped back.
    """

    condition_number: float | None = None
    noise_gain: float | None = None
    predicted_error: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Converted:
    """A layer made ready for a scheme, and its figures."""

    layer: CachedAttention
    figures: Figures


def convert(
    projections: Projections,
    spec: DecodeSpec,
    *,
    layer: str = "layer",
    solution: Solution | None = None,
    first: Projections | None = None,
    pair: bool = False,
) -> Converted:
    """Solve for what the scheme's basis needs, in float64 on the host, and fold the value bias away.

    Args:
        projections: concrete weights (not traced), any float dtype; the solve uses exactly these values.
        spec: the scheme and the layer's geometry.
        layer: the layer's name, for messages.
        solution: for bases k and kr, a map found elsewhere (from calibration data); None: the exact one,
            with the scheme's extra coordinates in the directions that W_K sees least. With static scales per
            channel the layer's queries and keys are rescaled, which changes no score.
        first: for basis h, the projections of the layer that fills the cache; None: this one.
        pair: keep the map of bases k and kr as two bfloat16 arrays (``attention.pair``) in place of float32.

    Returns:
        The converted layer. W_KV or W_VK is float32 (float64 under a float64 spec), whatever the weights.

    Raises:
        NotImplementedError: the scheme cannot serve this layer, singular W_K included; the message names
            the layer, the reason and what to use instead.
        ValueError: weights that are not finite, or do not have the spec's shapes; a solution of another R; a pair
            where there is no map or float64 is asked for.
    """
    _check(projections, spec, layer)
    if pair and (spec.scheme.basis not in ("k", "kr") or spec.dtype == "float64"):
        raise ValueError(
            f"{layer}: a map in two bfloat16 parts is for bases k and kr below float64, not {spec}"
        )
    try:
        basis(spec)
    except NotImplementedError as refusal:
        raise NotImplementedError(f"{layer}: {refusal}") from None
    needs_scale(spec, solution, layer)
    if solution is not None and solution.scale is not None:
        projections = rescaled(projections, solution.scale, spec)
    folded = fold_value_bias(projections, spec.accumulation)
    fields: dict[str, Any] = {}
    figures = Figures()
    name = spec.scheme.basis
    wk, wv = _flat(projections.wk), _flat(projections.wv)
    if name in ("k", "kr"):
        found = solution or _exact(wk, wv, spec, layer)
        if found.rank != spec.scheme.extra:
            raise ValueError(f"{layer}: a solution with R = {found.rank} for scheme {spec.scheme}")
        weight = _heads(found.weight, spec)
        fields |= {"w_kv": Pair.of(weight) if pair else weight, "extra": _device(found.extra, spec)}
        figures = _figures(wk, wv, found, spec)
    elif name == "v":
        found = _exact(wv, wk, spec, layer)
        fields["w_vk"] = _heads(found.weight, spec)
        figures = _figures(wv, wk, found, spec)
    elif name == "h":
        source = wk if first is None else _flat(first.wk)
        both = _exact(source, np.concatenate([wk, wv], axis=1), spec, layer)
        fields |= {
            "wk": _heads(both.weight[:, : spec.key_width], spec),
            "wv": _heads(both.weight[:, spec.key_width :], spec),
        }
        figures = _figures(source, np.concatenate([wk, wv], axis=1), both, spec)
    elif name in ("x", "e"):
        fields |= {"wk": projections.wk, "wv": projections.wv}
    if name != "kv" and key_bias_matters(spec):
        fields["k_bias"] = projections.bk
    weights = DecodeWeights(position=projections.position, **fields)
    return Converted(layer=CachedAttention(projections=folded, weights=weights, spec=spec), figures=figures)


def _flat(weight: jax.Array) -> np.ndarray:
    """[D, K, H] on the device to float64 [D, E] on the host."""
    return np.asarray(weight).astype(np.float64).reshape(weight.shape[0], -1)


def _check(projections: Projections, spec: DecodeSpec, layer: str) -> None:
    """Raise ValueError where an array is not finite or not of the spec's shape."""
    width, heads, kv_heads, size = spec.width, spec.heads, spec.kv_heads, spec.head_dim
    shapes = {
        "wq": (width, heads, size),
        "wk": (width, kv_heads, size),
        "wv": (width, kv_heads, size),
        "wo": (heads, size, projections.wo.shape[-1]),
        "bq": (heads, size),
        "bk": (kv_heads, size),
        "bv": (kv_heads, size),
        "bo": projections.wo.shape[-1:],
    }
    for name, shape in shapes.items():
        array = getattr(projections, name)
        if array is None:
            continue
        if array.shape != shape:
            raise ValueError(f"{layer}: {name} has shape {array.shape}, the spec wants {shape}")
        if not bool(jnp.all(jnp.isfinite(array))):
            raise ValueError(f"{layer}: {name} holds values that are not finite")


def _exact(source: np.ndarray, target: np.ndarray, spec: DecodeSpec, layer: str) -> Solution:
    """The exact map from cached rows to missing ones. Raises NotImplementedError where none is left of it."""
    found = exact_solution(source, target, spec.scheme.extra)
    condition = condition_number(augmented(source, found.extra))
    # Once cond * eps reaches 1, a solve kept in the accumulation dtype has no correct digit left.
    limit = 1.0 / float(np.finfo(spec.accumulation).eps)
    if not condition < limit:
        cached, lacking = ("W_V", "keys") if spec.scheme.basis == "v" else ("W_K", "values")
        more = "extra coordinates (such as k:int16+16), or " if spec.scheme.basis in ("k", "kr") else ""
        raise NotImplementedError(
            f"{layer}: {cached} is singular to working precision (condition number {condition:.1e}, limit "
            f"{limit:.1e}), so {lacking} cannot be rebuilt from it; use {more}basis x or kv"
        )
    return found


def _heads(weight: np.ndarray, spec: DecodeSpec) -> jax.Array:
    """[., E] on the host to [., K, H] on the device, in the accumulation dtype."""
    return jnp.asarray(weight.reshape(-1, spec.kv_heads, spec.head_dim).astype(spec.accumulation))


def _device(array: np.ndarray | None, spec: DecodeSpec) -> jax.Array | None:
    return None if array is None else jnp.asarray(array.astype(spec.accumulation))


def _figures(source: np.ndarray, target: np.ndarray, found: Solution, spec: DecodeSpec) -> Figures:
    whole = augmented(source, found.extra)
    return Figures(
        condition_number=condition_number(whole),
        noise_gain=noise_gain(whole, found.weight, target),
        # Static scales fit the inputs they were calibrated on; white ones they would clip.
        predicted_error=None if fixed(spec) else _predict(whole, found, target, spec),
    )


def _predict(whole: np.ndarray, found: Solution, target: np.ndarray, spec: DecodeSpec) -> float:
    """Relative L2 error of what is rebuilt from the encoded rows of 256 white Gaussian inputs."""
    inputs = np.random.default_rng(0).standard_normal((256, whole.shape[0]))
    decoded = stored(inputs @ whole, spec)
    return relative_l2(decoded @ found.weight, inputs @ target)


def stored(rows: np.ndarray, spec: DecodeSpec) -> np.ndarray:
    """Rows [S, E+R] of basis k (or v) as the cache gives them back: each stream through its codec; float64."""
    split = rows.shape[1] - spec.scheme.extra
    keys = through_codec(rows[:, :split], spec, spec.kv_heads)
    if not spec.scheme.extra:
        return keys
    return np.concatenate([keys, through_codec(rows[:, split:], spec, 1, stream="r")], axis=1)


def through_codec(
    rows: np.ndarray, spec: DecodeSpec, heads: int, role: Role = "k", *, stream: str = "k"
) -> np.ndarray:
    """Rows [S, heads*.] of one stream, encoded and decoded; float64. See ``round_trip``."""
    shaped = jnp.asarray(rows.astype(spec.accumulation)).reshape(1, len(rows), heads, -1)
    codec = codec_of(spec.scheme).stream(stream)
    return np.asarray(round_trip(shaped, codec, role)).astype(np.float64).reshape(rows.shape)


@functools.partial(jax.jit, static_argnums=(1, 2))
def round_trip(rows: jax.Array, codec: Codec, role: Role) -> jax.Array:
    """Rows [B, S, K, H] as a cache stores a first chunk of them, each run of ``tile`` tokens a tile.

    A ``TiledCodec``'s tokens are tiles in the order given, the last tile filled up with copies of its last token;
    of a cache's buffer, which holds the newest tokens more closely, nothing is taken into account.
    """
    return codec.decode(codec.encode(rows, role))
