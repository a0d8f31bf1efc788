"""What the tests of every low-bit codec share: plain loops for the formulas, and bytes counted leaf by leaf."""

import jax
import jax.numpy as jnp
import numpy as np

from slimjax.cache.codecs.base import Codec, Role, measured_bytes


def rows(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Normal rows with channels of very different size and offset, as keys have."""
    random = np.random.default_rng(seed)
    size = np.exp(random.standard_normal(shape[-1])) * random.choice([0.1, 1.0, 10.0], shape[-1])
    return (size * (random.standard_normal(shape) + random.standard_normal(shape[-1]))).astype(np.float32)


def external_input() -> np.ndarray:
    """The input of the published figures, [1, 256 tokens, 2 heads, 64 channels] here."""
    return np.random.default_rng(0).standard_normal((1, 2, 256, 64)).swapaxes(1, 2)


def through(codec: Codec, x: np.ndarray | jax.Array, role: Role = "k") -> np.ndarray:
    """Encoded and decoded, under jit."""
    return np.asarray(jax.jit(lambda given: codec.decode(codec.encode(given, role)))(jnp.asarray(x)))


def attention_input() -> list[np.ndarray]:
    """Q, K and V of the published attention errors: 1024 tokens of 64 normal channels each."""
    random = np.random.default_rng(0)
    return [random.standard_normal((1024, 64)).astype(np.float32) for _ in range(3)]


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """One head's attention without a mask."""
    scores = q @ k.T / np.sqrt(np.float32(q.shape[1]))
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


def cosine_and_relative_l1(output: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """The metrics of the published attention errors."""
    cosine = (output * expected).sum() / np.sqrt((output**2).sum() * (expected**2).sum())
    return float(cosine), float(np.abs(output - expected).sum() / np.abs(expected).sum())


def relative_mse(decoded, expected) -> float:
    error = np.asarray(decoded, np.float64) - expected
    return float((error**2).sum() / (expected**2).sum())


def coded_group(values: np.ndarray, bits: int, stored: type) -> tuple[list[int], list[float]]:
    """The codes of one group of float32 values, and what they decode to."""
    low, high = np.float32(min(values)), np.float32(max(values))
    scale = np.float32((high - low) / np.float32(2**bits - 1))
    codes = []
    for value in values:
        exact = float(np.float32(value - low) / scale) if scale else 0.0
        codes.append(int(np.rint(min(max(exact, 0.0), 2**bits - 1))))
    scale, low = float(stored(scale)), float(stored(low))
    return codes, [low + code * scale for code in codes]


def coded_line(line: np.ndarray, bits: int, group: int, stored: type) -> np.ndarray:
    """One line of values, group after group, coded and decoded; the last group may be shorter."""
    groups = [coded_group(line[at : at + group], bits, stored)[1] for at in range(0, len(line), group)]
    return np.concatenate(groups)


def check_bytes(codec: Codec, shape: tuple[int, int, int, int], role: Role) -> None:
    """``nbytes`` is what the leaves of ``encode`` take; they are read from shapes, nothing is computed."""
    codes = jax.eval_shape(lambda x: codec.encode(x, role), jax.ShapeDtypeStruct(shape, jnp.float32))
    leaves = sum(np.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(codes))
    assert codec.nbytes(shape, role) == leaves == measured_bytes(codes)


def check_nan_shows(codec: Codec, role: Role) -> None:
    """A NaN comes back as a NaN, and leaves the other sequence of the batch alone."""
    x = rows((2, 80, 2, 16))  # enough values for XLA's CPU maximum to lose a NaN
    x[1, 3, 1, 5] = np.nan
    decoded = through(codec, x, role)
    assert np.isnan(decoded[1, 3, 1, 5])
    assert np.all(np.isfinite(decoded[0]))
