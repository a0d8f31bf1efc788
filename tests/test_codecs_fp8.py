"""fp8 E4M3: its values by their definition, scales, and that too large is 448 and never NaN."""

import math

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from slimjax.cache.codecs.fp8 import Fp8Codec, to_e4m3


def e4m3():
    """All magnitudes: exponent 0 is subnormal, and the last mantissa of the last exponent is NaN."""
    values = [mantissa / 8 * 2.0**-6 for mantissa in range(8)]
    values += [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
    return np.asarray(values)


def nearest(value):
    """The nearest magnitude with its sign; a tie to the even mantissa, which is the even index."""
    table = e4m3()
    apart = np.abs(table - abs(value))
    best = np.flatnonzero(apart == apart.min())
    return math.copysign(table[next((i for i in best if i % 2 == 0), best[0])], value)


def test_every_value_is_itself_and_midpoints_go_to_even():
    table = e4m3()
    assert table[-1] == 448
    np.testing.assert_array_equal(to_e4m3(jnp.asarray(table, jnp.float32)).astype(jnp.float32), table)
    middles = (table[1:] + table[:-1]) / 2
    found = to_e4m3(jnp.asarray(-middles, jnp.float32)).astype(jnp.float32)
    np.testing.assert_array_equal(found, [nearest(-value) for value in middles])
    # The same codes as another library's cast.
    draw = np.random.default_rng(0).standard_normal(500).astype(np.float32) * 100
    np.testing.assert_array_equal(
        np.asarray(to_e4m3(jnp.asarray(draw))).view(np.uint8),
        draw.clip(-448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8),
    )


@pytest.mark.parametrize("scale", ["head", "token", "none", 0.25])
def test_against_the_formula(scale):
    x = np.random.default_rng(0).standard_normal((2, 6, 2, 5)).astype(np.float32)
    x = x * np.logspace(-2, 2, 6, dtype=np.float32)[None, :, None, None]
    codec = Fp8Codec(scale=scale)
    found = np.asarray(codec.decode(codec.encode(jnp.asarray(x))))
    expected = np.zeros(x.shape)
    for b, s, k, h in np.ndindex(x.shape):
        peak = {"head": np.abs(x[b, s, k]).max(), "token": np.abs(x[b, s]).max()}.get(scale)
        step = float(peak) / 448 if peak is not None else (1.0 if scale == "none" else scale)
        expected[b, s, k, h] = nearest(float(x[b, s, k, h]) / step) * step
    # Another side of a tie would be an eighth away: no value here is within rounding of one.
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    step = codec.encode(jnp.asarray(x)).scale
    size = np.abs(x) / np.asarray(1.0 if scale == "none" else scale if step is None else step)
    normal = (size >= 2.0**-6) & (size <= 448)
    assert np.mean(normal) > 0.8
    assert np.all(np.abs(found - x)[normal] <= np.abs(x)[normal] / 16 * 1.0001)


@pytest.mark.parametrize("scale", ["none", 0.5])
def test_too_large_saturates(scale):
    codec, factor = Fp8Codec(scale=scale), 1.0 if scale == "none" else scale
    x = jnp.asarray([449.0, 1e30, -3e38, 464.0, 465.0], jnp.float32)[None, None, None] * factor
    found = codec.decode(codec.encode(x))[0, 0, 0]
    np.testing.assert_array_equal(found, np.asarray([448, 448, -448, 448, 448]) * factor)


@pytest.mark.parametrize("scale", ["head", "token"])
def test_a_scale_brings_any_row_into_range(scale):
    x = jnp.asarray([3e38, -3e38, 1e38, 0.0], jnp.float32)[None, None, None]
    codec = Fp8Codec(scale=scale)
    found = np.asarray(codec.decode(codec.encode(x)), np.float64)
    np.testing.assert_allclose(found, x, rtol=1 / 16)
