"""TurboQuant-MSE: the codebook, the published errors, and a loop over the formula."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad

from slimjax.cache.codecs.rotation import rotate, unrotate
from slimjax.cache.codecs.turboquant import TurboQuantCodec, lloyd_max

# Max (1960), table I: the optimum of N(0, 1) for 2^bits levels, positive half, and its mean squared error.
MAX = {
    1: ([0.7980], 0.3634),
    2: ([0.4528, 1.510], 0.1175),
    3: ([0.2451, 0.7560, 1.344, 2.152], 0.03454),
    4: ([0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733], 0.009497),
}


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_codebook_is_the_optimum(bits):
    values = np.asarray(lloyd_max(bits))
    half, mse = MAX[bits]
    np.testing.assert_allclose(values[2 ** (bits - 1) :], half, atol=1.1e-3)
    np.testing.assert_array_equal(values, -values[::-1])
    edges = [-12.0, *((values[1:] + values[:-1]) / 2), 12.0]
    total = 0.0
    for value, low, high in zip(values, edges[:-1], edges[1:], strict=True):

        def moment(x, value=value, power=2):
            return (x - value) ** power * math.exp(-x * x / 2) / math.sqrt(2 * math.pi)

        total += quad(moment, low, high)[0]
        # Every value is the mean of its cell.
        assert abs(quad(lambda x, moment=moment: moment(x, power=1), low, high)[0]) < 1e-10
    assert total == pytest.approx(mse, rel=1e-3)


@pytest.mark.parametrize(("bits", "mse"), [(1, 0.361), (2, 0.117), (3, 0.0339), (4, 0.00935)])
def test_published_errors(bits, mse):
    """Normalised mean squared error at d = 128, whatever the vectors: of equal channels or of very unequal ones."""
    x = np.random.default_rng(0).standard_normal((1, 4000, 1, 128)).astype(np.float32)
    codec = TurboQuantCodec(bits=bits)
    through = jax.jit(lambda rows: codec.decode(codec.encode(rows)))

    def error(rows):
        found = np.asarray(through(jnp.asarray(rows)))
        return np.mean(np.sum((found - rows) ** 2, -1) / np.sum(rows**2, -1))

    assert error(x) == pytest.approx(mse, rel=0.01)
    skewed = x * np.exp(np.random.default_rng(1).standard_normal(128)).astype(np.float32)
    assert 0.85 * mse < error(skewed) < 1.02 * mse  # a few channels rule: the sums have shorter tails
    if bits == 2:
        one = np.zeros((1, 1, 1, 128), np.float32)
        one[..., 5] = 3
        assert error(np.broadcast_to(one, x.shape)) == pytest.approx((lloyd_max(2)[3] - 1) ** 2, rel=1e-4)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [16, 12])
def test_against_the_formula(bits, size):
    x = np.random.default_rng(bits).standard_normal((2, 10, 2, size)).astype(np.float32)
    x = x * np.logspace(-4, 4, 10, dtype=np.float32)[None, :, None, None]
    codec = TurboQuantCodec(bits=bits, seed=4)
    turned = np.asarray(jax.jit(lambda x: rotate(x, 4))(x), np.float64)
    expected = np.zeros_like(turned)
    for token in np.ndindex(x.shape[:-1]):
        norm = math.sqrt(sum(float(value) ** 2 for value in x[token]))
        for i, value in enumerate(turned[token]):
            nearest = min(lloyd_max(bits), key=lambda c: abs(value / norm * math.sqrt(size) - c))
            expected[token][i] = nearest * norm / math.sqrt(size)
    expected = np.asarray(jax.jit(lambda y: unrotate(y, 4))(expected.astype(np.float32)))
    found = np.asarray(jax.jit(lambda x: codec.decode(codec.encode(x)))(x))
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    np.testing.assert_allclose(found / norm, expected / norm, atol=2e-6)


def test_norms_are_kept_and_rounded_to_their_dtype():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 30, 2, 64)), jnp.float32)
    exact, rounded = (
        jax.jit(TurboQuantCodec(scale_dtype=dtype).encode)(x) for dtype in ("float32", "bfloat16")
    )
    np.testing.assert_allclose(exact.norm[..., 0], np.linalg.norm(x, axis=-1), rtol=1e-6)
    np.testing.assert_array_equal(exact.codes, rounded.codes)
    np.testing.assert_allclose(rounded.norm.astype(jnp.float32), exact.norm, rtol=2**-8)
