"""The one mask constant, the one matrix product, error metrics, and tolerances with their reasons."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

# Masked scores: finite, because a row with every key masked would otherwise give inf - inf = NaN, and
# 0.7 of the maximum, because a bias may still be added to it without overflowing.
MASK = -0.7 * float(np.finfo(np.float32).max)
CHUNK = 1 << 16  # numbers of an array that are worked on at a time


def accumulation_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """The dtype that sums of products of ``dtype`` are kept in: float64 for float64, else float32."""
    return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


def einsum(subscripts: str, *operands: Array) -> Array:
    """``jnp.einsum`` with the precision stated: operands as they are, sums in ``accumulation_dtype``.

    A float32 product left at jax's default is rounded to bfloat16 on TPU and TF32 on recent GPUs, and
    V = K W_KV multiplies that by its noise gain, which no CPU run would show. So ``HIGHEST``, always; who
    wants a bfloat16 product passes bfloat16 operands, for which ``HIGHEST`` changes nothing.

    Of two operands the derivative is stated too (reverse mode alone): it is the same sum, in an order of its
    factors that spares XLA a transposed copy of the larger one.
    """
    if len(operands) == 2 and _bilinear(subscripts):
        return _product(subscripts, *operands)
    return _contract(subscripts, *operands)


def _contract(subscripts: str, *operands: Array) -> Array:
    return jnp.einsum(
        subscripts,
        *operands,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=accumulation_dtype(operands[0].dtype),
    )


def _bilinear(subscripts: str) -> bool:
    """Whether each operand's derivative is the einsum of the other one and the result's."""
    operands, out = subscripts.split("->")
    first, second = operands.split(",")
    return all(
        len(set(part)) == len(part) and set(part) <= set(others)
        for part, others in ((first, second + out), (second, first + out))
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(subscripts: str, first: Array, second: Array) -> Array:
    return _contract(subscripts, first, second)


def _product_forward(subscripts: str, first: Array, second: Array) -> tuple[Array, tuple[Array, Array]]:
    return _contract(subscripts, first, second), (first, second)


def _product_backward(subscripts: str, operands: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    """XLA transposes the left factor of a sum over leading axes, as that for a weight is: the smaller, then.

    Left to itself jax puts the gradient there, and XLA computes it anew, a column at a time: on CPU that took
    as long as the products.
    """
    inputs, out = subscripts.split("->")
    left, right = inputs.split(",")
    # Both in the wider dtype, which is exact: a gradient is in the dtype of sums.
    first, second = (operand.astype(gradient.dtype) for operand in operands)
    to_first = _contract(f"{out},{right}->{left}", gradient, second)
    if first.size <= gradient.size:
        to_second = _contract(f"{left},{out}->{right}", first, gradient)
    else:
        to_second = _contract(f"{out},{left}->{right}", gradient, first)
    return to_first.astype(operands[0].dtype), to_second.astype(operands[1].dtype)


_product.defvjp(_product_forward, _product_backward)


def _pair(value: jax.typing.ArrayLike, reference: jax.typing.ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64 numpy arrays of one shape. Raises ValueError where the shapes differ."""
    a, b = (
        np.asarray(value).astype(np.float64, copy=False),
        np.asarray(reference).astype(np.float64, copy=False),
    )
    if a.shape != b.shape:
        raise ValueError(f"a metric needs two arrays of one shape, got {a.shape=} and {b.shape=}")
    return a, b


def relative_l2(value: jax.typing.ArrayLike, reference: jax.typing.ArrayLike) -> float:
    """|value - reference| / |reference| in the Euclidean norm over all elements, in float64."""
    a, b = _pair(value, reference)
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), np.finfo(np.float64).tiny))


def relative_l1(value: jax.typing.ArrayLike, reference: jax.typing.ArrayLike) -> float:
    """sum|value - reference| / sum|reference| over all elements, in float64."""
    a, b = _pair(value, reference)
    return float(np.abs(a - b).sum() / max(np.abs(b).sum(), np.finfo(np.float64).tiny))


def rmse(value: jax.typing.ArrayLike, reference: jax.typing.ArrayLike) -> float:
    """Root of the mean squared difference, in float64 and in the units of the arguments."""
    a, b = _pair(value, reference)
    return float(np.sqrt(np.mean((a - b) ** 2)))


def cosine(value: jax.typing.ArrayLike, reference: jax.typing.ArrayLike) -> float:
    """<value, reference> / (|value| |reference|) over all elements, in float64; 1 is equal direction."""
    a, b = _pair(value, reference)
    norm = np.linalg.norm(a) * np.linalg.norm(b)
    return float(np.vdot(a, b) / max(norm, np.finfo(np.float64).tiny))


def four_errors(
    value: jax.typing.ArrayLike, reference: jax.typing.ArrayLike
) -> tuple[float, float, float, float]:
    """``cosine``, ``relative_l1``, ``rmse`` and ``relative_l2`` in one go through arrays, part by part.

    Sums in float64, in another order than theirs. Raises ValueError where the shapes differ.
    """
    a, b = np.ravel(value), np.ravel(reference)
    if np.shape(value) != np.shape(reference):
        raise ValueError(
            f"a metric needs two arrays of one shape, got {np.shape(value)} and {np.shape(reference)}"
        )
    sums = np.zeros(6)
    for start in range(0, a.size, CHUNK):
        x, y = (each[start : start + CHUNK].astype(np.float64) for each in (a, b))
        away = x - y
        # Not by BLAS, whose threads wait for each other over so little.
        pairs = (x, y), (x, x), (y, y), (away, away)
        sums += *((one * other).sum() for one, other in pairs), np.abs(away).sum(), np.abs(y).sum()
    across, own, size, square, l1, whole = sums
    tiny = np.finfo(np.float64).tiny
    return (
        float(across / max(np.sqrt(own) * np.sqrt(size), tiny)),
        float(l1 / max(whole, tiny)),
        float(np.sqrt(square / max(a.size, 1))),
        float(np.sqrt(square) / max(np.sqrt(size), tiny)),
    )


def max_abs(value: jax.typing.ArrayLike, reference: jax.typing.ArrayLike) -> tuple[float, tuple[int, ...]]:
    """The largest absolute difference and the index where it stands; NaN counts as the largest."""
    a, b = _pair(value, reference)
    difference = np.abs(a - b)
    where = np.unravel_index(int(np.argmax(np.where(np.isnan(difference), np.inf, difference))), a.shape)
    return float(difference[where]), tuple(int(i) for i in where)


def cross_entropy(logits: Float[Array, "B T V"], targets: Int[Array, "B T"]) -> Float[Array, ""]:
    """Mean negative log-likelihood of the targets, in nats per token."""
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen)


def logit_kl(logits: Float[Array, "*T V"], reference: Float[Array, "*T V"]) -> Float[Array, "*T"]:
    """KL(softmax(reference) || softmax(logits)) per position, in nats."""
    p, q = jax.nn.log_softmax(reference, axis=-1), jax.nn.log_softmax(logits, axis=-1)
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1)


def top1_agreement(logits: Float[Array, "*T V"], reference: Float[Array, "*T V"]) -> Float[Array, ""]:
    """Share of positions at which both have the same most likely token, in [0, 1]."""
    return jnp.mean((jnp.argmax(logits, axis=-1) == jnp.argmax(reference, axis=-1)).astype(jnp.float32))


def greedy_agreement(tokens: Int[Array, "B T"], reference: Int[Array, "B T"]) -> Int[Array, "B"]:
    """How many tokens each sequence generates before its first difference from the reference; T if none."""
    same = (tokens == reference).astype(jnp.int32)
    return jnp.sum(jnp.cumprod(same, axis=1), axis=1)


def tolerance(dtype: jax.typing.DTypeLike, *, size: int = 1, gain: float = 1.0) -> float:
    """Relative L2 error that attention may have in compute dtype ``dtype``: one derivation, no tuning.

    Rounding to ``dtype`` (q, P, output) is relative and independent per element: rms 0.2 eps each for
    mantissas spread log-uniformly, 0.35 eps for the three together, so eps bounds it with a factor 3.
    Sums run in the accumulation dtype: a sum of ``size`` products drifts by its unit roundoff (eps / 2)
    times sqrt(size), and reaches V multiplied by ``gain`` (noise gain of W_KV; 1 where nothing is solved for).
    """
    compute = float(jnp.finfo(dtype).eps)
    roundoff = float(jnp.finfo(accumulation_dtype(dtype)).eps) / 2
    return compute + roundoff * math.sqrt(size) * max(gain, 1.0)
