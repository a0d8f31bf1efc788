"""Static scales per channel: a layer whose keys all fill the range of a codec that stores no scale.

Dividing the channels of W_K (and b_K) by s and multiplying those of W_Q (and b_Q) by s leaves every score, and so
the layer, as it was; with [K / s, X U] in the cache the map from it to V takes up the rest. RoPE turns pairs of
channels, which then share one scale. Scales are powers of two: weights of any float dtype keep all their bits.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from slimjax.attention.projections import Projections
from slimjax.cache import codec_of
from slimjax.cache.codecs.integers import FixedCodec
from slimjax.kernels.spec import DecodeSpec
from slimjax.solve.augment import Solution

HEADROOM = 1.25  # over the largest value seen; rounding up to a power of two leaves 1 to 2 times more


def fixed(spec: DecodeSpec) -> FixedCodec | None:
    """The scheme's codec where it stores no scale of its own."""
    codec = codec_of(spec.scheme)
    return codec if isinstance(codec, FixedCodec) else None


def needs_scale(spec: DecodeSpec, solution: Solution | None, layer: str) -> None:
    """Raise NotImplementedError where the codec stores no scale and the solution brings none."""
    if fixed(spec) is not None and (solution is None or solution.scale is None):
        raise NotImplementedError(
            f"{layer}: scheme {spec.scheme}: codec {spec.scheme.codec} has one static scale per channel, which "
            "calibration finds: give calibration data, or use int16"
        )


def channel_scales(rows: np.ndarray, codec: FixedCodec) -> np.ndarray:
    """Powers of two, [E], that bring columns of what was seen, [n, E], into the codec's range with some room."""
    most = np.max(np.abs(rows), axis=0) * HEADROOM / codec.peak
    return np.exp2(np.ceil(np.log2(np.where(most > 0, most, 1.0))))


def key_scales(keys: np.ndarray, spec: DecodeSpec, codec: FixedCodec) -> np.ndarray:
    """``channel_scales`` of keys [n, E] before RoPE; the two channels that it turns together share the larger."""
    found = channel_scales(keys, codec)
    if not spec.position.rotary:
        return found
    half = spec.head_dim // 2
    pairs = found.reshape(spec.kv_heads, *((half, 2) if spec.position.interleaved else (2, half)))
    axis = 2 if spec.position.interleaved else 1
    return np.broadcast_to(pairs.max(axis=axis, keepdims=True), pairs.shape).reshape(-1)


def rescaled(projections: Projections, scale: np.ndarray, spec: DecodeSpec) -> Projections:
    """The same layer with its keys divided by ``scale``, [E], and its queries multiplied by it."""
    keys = scale.reshape(spec.kv_heads, spec.head_dim)
    queries = np.repeat(keys, spec.group, axis=0)

    def times(array: jax.Array | None, factor: np.ndarray) -> jax.Array | None:
        if array is None:
            return None
        # float16 has too few exponents for a product with a power of two to be exact always.
        dtype = jnp.dtype("float32") if array.dtype == jnp.float16 else array.dtype
        wide = jnp.asarray(factor, dtype).reshape((1,) * (array.ndim - 2) + factor.shape)
        return array.astype(dtype) * wide

    wq, wk = times(projections.wq, queries), times(projections.wk, 1 / keys)
    assert wq is not None
    assert wk is not None
    return dataclasses.replace(
        projections, wq=wq, wk=wk, bq=times(projections.bq, queries), bk=times(projections.bk, 1 / keys)
    )
