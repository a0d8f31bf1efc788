"""A random rotation of a head's channels that costs H log H: it spreads outliers over all of them.

y = T s x: s random signs of a fixed seed, T a fixed symmetric orthogonal matrix, so that T T = 1 and x = s T y.
T is the Hadamard matrix where H is a power of two. Other sizes are m * 2^k with an odd m, and T is the Kronecker
product of the Hartley matrix of size m, (cos + sin)(2 pi i j / m) / sqrt(m), with the Hadamard matrix of size
2^k: every channel still reaches every other with a weight of at most sqrt(2 / H), where blocks of 2^k channels
(three of 32 at H = 96) would keep an outlier within its block. It costs H * m more.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from slimjax.numerics import einsum


@functools.cache
def signs(size: int, seed: int) -> np.ndarray:
    """The random signs of ``size`` channels, +-1 in float32: the same for every head, layer, token and run."""
    return np.random.default_rng(seed).choice(np.array([-1.0, 1.0], np.float32), size)


def transform(x: Float[Array, "*B H"]) -> Float[Array, "*B H"]:
    """T x along the last axis, any H, in x's dtype: orthonormal, symmetric and its own inverse.

    A power of two takes log2(H) rounds of sums and differences of halves (the fast Walsh-Hadamard transform, in
    the natural order of the Sylvester matrix).
    """
    size = x.shape[-1]
    power = size & -size
    odd = size // power
    out = x.reshape(-1, odd, power)
    if odd > 1:
        turn = 2 * np.pi * np.outer(np.arange(odd), np.arange(odd)) / odd
        hartley = jnp.asarray((np.cos(turn) + np.sin(turn)) / math.sqrt(odd), x.dtype)
        out = einsum("bop,oq->bqp", out, hartley).astype(x.dtype)
    half = 1
    while half < power:
        pairs = out.reshape(-1, odd, power // (2 * half), 2, half)
        first, second = pairs[:, :, :, 0], pairs[:, :, :, 1]
        out = jnp.stack([first + second, first - second], axis=3)
        half *= 2
    return (out * (power**-0.5)).reshape(x.shape)


def rotate(x: Float[Array, "*B H"], seed: int = 0) -> Float[Array, "*B H"]:
    """T s x: lengths and inner products are kept, to rounding."""
    return transform(x * _signs(x, seed))


def unrotate(y: Float[Array, "*B H"], seed: int = 0) -> Float[Array, "*B H"]:
    """The inverse of ``rotate``."""
    return transform(y) * _signs(y, seed)


def _signs(x: jax.Array, seed: int) -> jax.Array:
    size = x.shape[-1]
    return jnp.asarray(signs(size, seed), x.dtype).reshape((1,) * (x.ndim - 1) + (size,))
