"""Making a trained layer ready for a cache scheme, with the figures that say how well it will do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from slimjax.attention.bases import basis
from slimjax.attention.layer import CachedAttention
from slimjax.attention.projections import DecodeWeights, Projections
from slimjax.cache import codec_of
from slimjax.kernels.spec import DecodeSpec
from slimjax.numerics import relative_l2
from slimjax.solve.fold import fold_value_bias, key_bias_matters
from slimjax.solve.linear import condition_number, noise_gain, solve_map


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
    """What is known of a converted layer before any data is seen; None where nothing is solved for.

    Attributes:
        condition_number: of the matrix that is inverted, W_K for basis k, W_V for basis v.
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


def convert(projections: Projections, spec: DecodeSpec, *, layer: str = "layer") -> Converted:
    """Solve for what the scheme's basis needs, in float64 on the host, and fold the value bias away.

    Args:
        projections: concrete weights (not traced), any float dtype; the solve uses exactly these values.
        spec: the scheme and the layer's geometry.
        layer: the layer's name, for messages.

    Returns:
        The converted layer. W_KV or W_VK is float32 (float64 under a float64 spec), whatever the weights.

    Raises:
        NotImplementedError: the scheme cannot serve this layer, singular W_K included; the message names
            the layer, the reason and what to use instead.
        ValueError: weights that are not finite, or do not have the spec's shapes.
    """
    _check(projections, spec, layer)
    try:
        basis(spec)
    except NotImplementedError as refusal:
        raise NotImplementedError(f"{layer}: {refusal}") from None
    folded = fold_value_bias(projections, spec.accumulation)
    fields: dict[str, jax.Array | None] = {}
    figures = Figures()
    name = spec.scheme.basis
    if name in ("k", "v"):
        wk, wv = _flat(projections.wk), _flat(projections.wv)
        solved, figures = _solve(wk, wv, spec, layer) if name == "k" else _solve(wv, wk, spec, layer)
        fields["w_kv" if name == "k" else "w_vk"] = solved
    elif name == "x":
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


def _solve(source: np.ndarray, target: np.ndarray, spec: DecodeSpec, layer: str) -> tuple[jax.Array, Figures]:
    """The map from cached rows to missing ones, [E, K, H], and its figures."""
    lacking, cached = ("values", "W_K") if spec.scheme.basis == "k" else ("keys", "W_V")
    condition = condition_number(source)
    # Once cond * eps reaches 1, a solve kept in the accumulation dtype has no correct digit left.
    limit = 1.0 / float(np.finfo(spec.accumulation).eps)
    if not condition < limit:
        raise NotImplementedError(
            f"{layer}: {cached} is singular to working precision (condition number {condition:.1e}, limit "
            f"{limit:.1e}), so {lacking} cannot be rebuilt from it; use basis x or kv"
        )
    solved = solve_map(source, target)
    figures = Figures(
        condition_number=condition,
        noise_gain=noise_gain(source, solved, target),
        predicted_error=_predict(source, solved, target, spec),
    )
    weight = solved.reshape(-1, spec.kv_heads, spec.head_dim).astype(spec.accumulation)
    return jnp.asarray(weight), figures


def _predict(source: np.ndarray, solved: np.ndarray, target: np.ndarray, spec: DecodeSpec) -> float:
    """Relative L2 error of what is rebuilt from the encoded rows of 256 white Gaussian inputs."""
    inputs = np.random.default_rng(0).standard_normal((256, source.shape[0]))
    rows = jnp.asarray((inputs @ source).astype(spec.accumulation))
    codec = codec_of(spec.scheme)
    rows = rows.reshape(1, 256, spec.kv_heads, spec.head_dim)
    decoded = np.asarray(codec.decode(codec.encode(rows))).astype(np.float64).reshape(256, -1)
    return relative_l2(decoded @ solved, inputs @ target)
