"""Symmetric absmax integers against a loop over the formula, one width at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slimjax.cache.codecs.absmax import AbsmaxCodec
from slimjax.cache.codecs.narrow import unpack_rows


def oracle(x, bits, group):
    """float64; one group of channels of one head of one token at a time."""
    limit = 2 ** (bits - 1) - 1
    out = np.zeros_like(x)
    for token in np.ndindex(x.shape[:-1]):
        for first in range(0, x.shape[-1], group):
            part = slice(first, first + group)
            scale = max(abs(value) for value in x[token][part]) / limit
            for i in range(first, min(first + group, x.shape[-1])):
                out[token][i] = max(-limit, min(limit, round(x[token][i] / scale))) * scale
    return out


# The relative mean squared error of N(0, 1) rows with H = 64, each width its own.
@pytest.mark.parametrize(("bits", "mse"), [(4, 0.01156), (3, 0.0630), (2, 0.514)])
@pytest.mark.parametrize("group", [None, 16, 5])
def test_against_the_formula(bits, mse, group):
    x = np.random.default_rng(0).standard_normal((2, 40, 3, 64)).astype(np.float32)
    x = x * np.logspace(-3, 3, 40, dtype=np.float32)[None, :, None, None]
    codec = AbsmaxCodec(bits=bits, group=group)
    found = np.asarray(jax.jit(lambda x: codec.decode(codec.encode(x)))(x), np.float64)
    expected = oracle(x.astype(np.float64), bits, group or 64)
    step = np.abs(x).max(axis=-1, keepdims=True) / (2 ** (bits - 1) - 1)
    # Equal but where float32 division lands on the other side of a tie.
    assert np.mean(np.abs(found - expected) > 1e-6 * step) < 1e-3
    assert np.all(np.abs(found - expected) <= 1.001 * step)
    assert np.all(np.abs(found - x) <= 0.5001 * step)
    measured = np.mean(np.sum((found - x) ** 2, -1) / np.sum(x**2, -1))
    if group is None:
        assert measured == pytest.approx(mse, rel=0.06)
    else:
        assert measured < mse * 0.75


@pytest.mark.parametrize(
    ("bits", "row", "codes"),
    [
        (4, [7.0, -7.0, 0.5, 1.5, -2.5, 3.4], [14, 0, 7, 9, 5, 10]),
        (3, [3.0, -3.0, 0.5, 1.5, -2.5, 0.9], [6, 0, 3, 5, 1, 4]),
        (2, [1.0, -1.0, 0.5, 0.51, -0.4, 0.0], [2, 0, 1, 2, 1, 1]),
    ],
)
def test_codes_by_hand(bits, row, codes):
    """The scale is 1: ties go to the even integer."""
    stored = jax.jit(AbsmaxCodec(bits=bits).encode)(jnp.asarray(row, jnp.float32)[None, None, None])
    np.testing.assert_array_equal(unpack_rows(stored.codes, bits, 6)[0, 0, 0], codes)
    assert stored.scale.reshape(-1).tolist() == [1.0]


def test_rows_are_divided_by_the_scale_as_stored():
    """bfloat16 rounds the scale 1.003 to 1: the same codes, read with 1."""
    codec = AbsmaxCodec(scale_dtype="bfloat16")
    x = jnp.asarray([7 * 1.003, -7 * 1.003, 2.504, 0.0], jnp.float32)[None, None, None]
    stored = jax.jit(codec.encode)(x)
    assert float(stored.scale.reshape(())) == 1.0
    # 2.504 / 1.003 would be below the tie and become 2.
    np.testing.assert_array_equal(jax.jit(codec.decode)(stored)[0, 0, 0], [7, -7, 3, 0])


def test_a_scale_too_coarse_for_its_rows():
    """Of tiny rows float16 rounds the scale 1.4 units to 1, and the largest value is clamped; less becomes 0."""
    codec = AbsmaxCodec(scale_dtype="float16")
    unit = 2.0**-24
    x = jnp.asarray([[9.8 * unit, -9.8 * unit, 3 * unit], [1e-9, -1e-9, 0.0]], jnp.float32)[None, :, None]
    stored = jax.jit(codec.encode)(x)
    np.testing.assert_array_equal(
        jax.jit(codec.decode)(stored)[0, :, 0], [[7 * unit, -7 * unit, 3 * unit], [0, 0, 0]]
    )
    # Of a scale of 0 every code is the middle one: no quotient is left to what a platform makes of NaN.
    np.testing.assert_array_equal(unpack_rows(stored.codes, 4, 3)[0, 1, 0], [7, 7, 7])
