"""The rotation (also TurboQuant's) and asymmetric integers behind it, against loops and against scipy's matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from slimjax.cache.codecs.absmax import AbsmaxCodec
from slimjax.cache.codecs.hadamard import HadamardCodec
from slimjax.cache.codecs.rotation import rotate, signs, transform, unrotate


def matrix(size):
    """Hadamard by the sign of the number of common bits, Hartley by its cosines and sines."""
    power = size & -size
    odd = size // power
    t = np.zeros((size, size))
    for i in range(size):
        for j in range(size):
            common = bin((i % power) & (j % power)).count("1")
            angle = 2 * np.pi * (i // power) * (j // power) / odd
            t[i, j] = (-1) ** common * (np.cos(angle) + np.sin(angle)) / np.sqrt(size)
    return t


@pytest.mark.parametrize("size", [1, 2, 4, 7, 8, 12, 64, 96, 128])
def test_transform_against_the_matrix(size):
    t = matrix(size)
    np.testing.assert_allclose(t @ t.T, np.eye(size), atol=1e-12)
    if size & (size - 1) == 0:
        np.testing.assert_allclose(t, scipy.linalg.hadamard(size) / np.sqrt(size), atol=1e-12)
    else:
        assert np.abs(t).max() <= np.sqrt(2 / size) + 1e-12
    x = np.random.default_rng(0).standard_normal((2, 3, size)).astype(np.float32)
    np.testing.assert_allclose(jax.jit(transform)(x), x @ t, atol=1e-5)
    turned = jax.jit(lambda x: rotate(x, 5))(x)
    np.testing.assert_allclose(turned, (x * signs(size, 5)) @ t, atol=1e-5)
    np.testing.assert_allclose(jax.jit(lambda y: unrotate(y, 5))(turned), x, atol=1e-5)
    np.testing.assert_allclose(np.sum(np.square(turned), -1), np.sum(x**2, -1), rtol=1e-4)


def test_signs_are_fixed():
    """Codes that were stored are read with them: another generator would be another format."""
    assert signs(16, 0).tolist() == [1, 1, 1, -1, -1, -1, -1, -1, -1, 1, 1, 1, 1, 1, 1, 1]
    assert signs(64, 0).tolist() != signs(64, 1).tolist()
    assert abs(signs(4096, 0).sum()) < 200


def oracle(x, bits, group, seed):
    """float64; rotates by the matrix, then one group of one head of one token at a time."""
    size, most = x.shape[-1], 2**bits - 1
    t, s = matrix(size), signs(size, seed).astype(np.float64)
    turned = (x * s) @ t
    out = np.zeros_like(x)
    for token in np.ndindex(x.shape[:-1]):
        for first in range(0, size, group):
            part = turned[token][first : first + group]
            low, step = part.min(), (part.max() - part.min()) / most
            for i, value in enumerate(part):
                out[token][first + i] = low + step * max(0, min(most, round((value - low) / step)))
    return (out @ t) * s


# The relative mean squared error of N(0, 1) rows with H = 64, each width its own.
@pytest.mark.parametrize(("bits", "mse"), [(2, 0.2026), (3, 0.0369), (4, 0.00802), (8, 2.776e-5)])
@pytest.mark.parametrize(("size", "group"), [(64, None), (64, 16), (12, 5)])
def test_against_the_formula(bits, mse, size, group):
    x = np.random.default_rng(1).standard_normal((1, 60, 2, size)).astype(np.float32)
    x = x * np.logspace(-3, 3, 60, dtype=np.float32)[None, :, None, None]
    codec = HadamardCodec(bits=bits, group=group, seed=2)
    found = np.asarray(jax.jit(lambda x: codec.decode(codec.encode(x)))(x), np.float64)
    expected = oracle(x.astype(np.float64), bits, group or size, 2)
    norm = np.linalg.norm(x, axis=-1)
    # Equal but where float32 lands on the other side of a tie, which moves one of the rotated channels by a step.
    apart = np.linalg.norm(found - expected, axis=-1) / norm
    assert np.mean(apart > 2e-6) < 0.03
    assert apart.max() < 2.5 / (2**bits - 1)
    measured = np.mean(np.linalg.norm(found - x, axis=-1) ** 2 / norm**2)
    assert (measured == pytest.approx(mse, rel=0.06)) if group is None else measured < mse * 0.7


def test_a_channel_of_outliers_is_spread():
    """What the rotation is for: at 4 bits the other channels survive a channel 30 times as large."""
    x = np.random.default_rng(0).standard_normal((1, 50, 1, 64)).astype(np.float32)
    x[..., 3] = 30
    others = np.arange(64) != 3

    def error(codec):
        found = np.asarray(jax.jit(lambda x: codec.decode(codec.encode(x)))(x))
        return np.mean((found - x)[..., others] ** 2)

    assert error(HadamardCodec()) < 0.3 * error(AbsmaxCodec())
    blocks = np.abs(np.asarray(jax.jit(rotate)(np.eye(96, dtype=np.float32))))
    assert blocks.min(axis=0).max() > 0  # at H = 96 an outlier leaves its block of 32
    assert blocks.max() <= np.sqrt(2 / 96) + 1e-6


def test_equal_values_are_exact_whatever_the_step():
    """A rotated row of equal values has no range: its minimum is all of it."""
    size = 8
    flat = np.asarray(jax.jit(unrotate)(jnp.full((1, 1, 1, size), 0.5, jnp.float32)))
    codec = HadamardCodec(bits=2)
    np.testing.assert_allclose(jax.jit(lambda x: codec.decode(codec.encode(x)))(flat), flat, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_codes_fit_the_step_and_minimum_as_stored(dtype):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 100, 1, 64)), jnp.float32)

    def error(codec):
        return float(jax.jit(lambda x: jnp.mean(jnp.square(codec.decode(codec.encode(x)) - x)))(x))

    narrow, wide = HadamardCodec(bits=8, scale_dtype=dtype), HadamardCodec(bits=8)
    assert error(narrow) < 1.15 * error(wide)
