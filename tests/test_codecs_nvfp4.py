"""NVFP4: E2M1 against its definition and another library's cast, blocks and scales against a loop."""

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from slimjax.cache.codecs.nvfp4 import Nvfp4Codec, from_e2m1, to_e2m1


def test_e2m1_by_its_definition():
    """Codes are sign, exponent (bias 1), mantissa; exponent 0 is subnormal."""
    values = []
    for code in range(16):
        exponent, mantissa = (code >> 1) & 3, code & 1
        magnitude = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
        values.append(-magnitude if code >> 3 else magnitude)
    np.testing.assert_array_equal(from_e2m1(jnp.arange(16, dtype=jnp.uint8)), values)
    np.testing.assert_array_equal(to_e2m1(jnp.asarray(values, jnp.float32)), np.arange(16))


def test_e2m1_rounds_as_another_library():
    x = np.concatenate([np.linspace(-6, 6, 4801), [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]]).astype(np.float32)
    expected = x.astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(from_e2m1(to_e2m1(jnp.asarray(x))), expected)
    np.testing.assert_array_equal(
        from_e2m1(to_e2m1(jnp.asarray([7.0, -1e30, np.inf], jnp.float32))), [6, -6, 6]
    )


def oracle(x, group, row_scale):
    """float64 loops; the nearest of a table at both levels, ties to the even code."""
    small = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    wide = [m / 8 * 2.0**-6 for m in range(8)]
    wide += [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]

    def nearest(value, table):
        return table[min(range(len(table)), key=lambda i: (abs(table[i] - value), i % 2))]

    out = np.zeros_like(x)
    for b, s in np.ndindex(x.shape[:2]):
        unit = np.abs(x[b, s]).max() / (448 * 6) if row_scale is None else row_scale
        for k in range(x.shape[2]):
            for first in range(0, x.shape[3], group):
                part = x[b, s, k, first : first + group]
                block = nearest(np.abs(part).max() / unit / 6, wide)
                for i, value in enumerate(part):
                    code = nearest(abs(value) / unit / block, small) if block else 0
                    out[b, s, k, first + i] = math.copysign(code * block * unit, value)
    return out


@pytest.mark.parametrize("group", [16, 5])
@pytest.mark.parametrize("scale", ["token", 0.01])
def test_against_the_formula(group, scale):
    x = np.random.default_rng(0).standard_normal((1, 12, 2, 48)).astype(np.float32)
    x[..., 16:32] *= 0.05
    if scale == "token":
        x = x * np.logspace(-3, 3, 12, dtype=np.float32)[None, :, None, None]
    codec = Nvfp4Codec(group=group, scale=scale)
    found = np.asarray(jax.jit(lambda x: codec.decode(codec.encode(x)))(x), np.float64)
    expected = oracle(x.astype(np.float64), group, None if scale == "token" else scale)
    peak = np.abs(x).max(axis=-1, keepdims=True)
    assert np.mean(np.abs(found - expected) > 1e-5 * peak) < 0.01
    assert np.all(np.abs(found - x) <= 0.18 * peak)
    relative = np.sum((found - x) ** 2) / np.sum(x**2)
    assert 0.003 < relative < 0.012


def test_blocks_of_one_scale_and_another():
    """Each block of 16 has its own range: a small one beside a large one is not lost."""
    x = np.ones((1, 1, 1, 32), np.float32)
    x[..., 16:] = 1e-3
    each, one = (
        np.asarray(jax.jit(lambda x, c=codec: c.decode(c.encode(x)))(x))
        for codec in (Nvfp4Codec(), Nvfp4Codec(group=32))
    )
    np.testing.assert_allclose(each, x, rtol=1 / 16)
    assert np.all(one[..., 16:] == 0)


def test_a_known_scale_saturates():
    """Values beyond 448 * 6 times it are the largest there is; nothing becomes NaN."""
    codec = Nvfp4Codec(scale=1e-3)
    x = jnp.asarray([[100.0] * 16 + [-1e30] + [0.0] * 15], jnp.float32)[None, None]
    found = np.asarray(jax.jit(lambda x: codec.decode(codec.encode(x)))(x))[0, 0, 0]
    np.testing.assert_allclose(found, [2.688] * 16 + [-2.688] + [0.0] * 15, rtol=1e-6)
    assert jax.eval_shape(codec.encode, x).row is None
