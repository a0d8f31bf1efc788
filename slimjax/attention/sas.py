"""SAS, sparse activated softmax: exp by a table and a polynomial, cut below a threshold (arXiv 2412.08585, section 4).

With x >= 0 the distance of a score below its row's maximum, exp(-x) = table[whole part] * P(fraction). P is the
least-squares polynomial of exp(-t) on 100 equally spaced points of [0, 1]; at degree 3 its coefficients are the
four decimals that the paper prints. Scores further than the threshold below the maximum weigh exactly 0.

How far this is from the exact softmax p, for a row that loses the share m of its mass (``lost_mass``) and with r
the largest relative error of P (``polynomial_error``): the weights kept are p (1 + d) / Z, |d| <= r, and so

    sum |weights - p| <= 2 m + 2 r / (1 - r),    m <= S exp(-threshold) for S keys,

which also bounds the error of the output by that many times the largest |value|. r is 1.0e-3 at degree 3, while m
reaches 0.12 at threshold 6 with Gaussian logits (sigma 2) over 8,192 keys: the cut is the error, not the cubic.
"""

import functools
import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from slimjax.axes import Scores, typed
from slimjax.numerics import MASK, accumulation_dtype

PUBLISHED = (-0.1025, 0.4626, -0.9922, 0.9996)  # of degree 3, highest power first
THRESHOLD = 6.0
DEGREE = 3
MOST_COMPARED = 16  # entries that are found by comparing, which a TPU can; more are gathered
_DEGREES = range(1, 9)  # at 8 the error is 2.4e-11; beyond that the least squares lose digits


@functools.cache
def coefficients(degree: float) -> tuple[float, ...]:
    """P's, highest power first: the published ones at degree 3, else fitted as those were.

    Raises:
        ValueError: a degree that is no whole number from 1 to 8.
    """
    if degree not in _DEGREES:
        raise ValueError(f"{degree=}: SAS has polynomials of degree {_DEGREES[0]} to {_DEGREES[-1]}")
    if degree == DEGREE:
        return PUBLISHED
    points = np.linspace(0, 1, 100)
    return tuple(np.polyfit(points, np.exp(-points), int(degree)).tolist())


@functools.cache
def polynomial_error(degree: int) -> tuple[float, float]:
    """The largest absolute and relative error of P on [0, 1], seen on 10,001 points: 4.0e-4, 1.0e-3 at degree 3."""
    points = np.linspace(0, 1, 10_001)
    exact = np.exp(-points)
    error = np.abs(np.polyval(coefficients(degree), points) - exact)
    return float(error.max()), float((error / exact).max())


def degree_for(error: float) -> int:
    """The lowest degree whose ``sas_exp`` is within ``error`` of exp(-x) wherever it is not cut.

    Raises:
        ValueError: an error that no degree reaches.
    """
    for degree in _DEGREES:
        if polynomial_error(degree)[0] <= error:
            return degree
    least = polynomial_error(_DEGREES[-1])[0]
    raise ValueError(f"{error=}: degree {_DEGREES[-1]} errs by {least:.1e}, and no higher one is offered")


def threshold_for(error: float, keys: int = 1) -> float:
    """The lowest threshold that loses at most ``error``, whatever the scores are: ln(keys / error).

    Args:
        error: of one weight relative to the row's largest (keys = 1), or of the softmax mass of a row. In (0, 1).
        keys: S, of the row: every key that is cut weighs less than exp(-threshold), and all of them together at
            least 1.

    Raises:
        ValueError: an error outside (0, 1), or no keys.
    """
    if not 0 < error < 1 or keys < 1:
        raise ValueError(f"{error=}, {keys=}: expected an error in (0, 1) and at least one key")
    return math.log(keys / error)


def sas_exp(
    x: Float[Array, "*S"], threshold: float | None = THRESHOLD, degree: int = DEGREE
) -> Float[Array, "*S"]:
    """exp(-x) for x >= 0 as table[whole part of x] * P(fraction), in x's dtype; exactly 0 where x > threshold.

    The absolute error is at most ``polynomial_error(degree)[0]`` up to the threshold (4.0e-4 at degree 3, as the
    table holds 1 and less) and exp(-threshold) beyond it (2.5e-3 at 6), besides the dtype's rounding. NaN stays.

    Args:
        x: distances below the maximum; negative ones count as 0.
        threshold: None or infinity: nothing is cut, but that exp(-x) below the dtype's smallest normal number is 0.
        degree: of P.

    Raises:
        ValueError: a threshold that is not positive, or a degree outside 1 to 8.
    """
    dtype = accumulation_dtype(x.dtype)
    smallest = -math.log(float(jnp.finfo(dtype).tiny))
    limit = min(_checked(threshold), smallest)
    wide = x.astype(dtype)
    inside = jnp.clip(wide, 0.0, limit)  # masked scores are too far away for an integer
    whole = jnp.floor(inside)
    fraction, value = inside - whole, jnp.zeros_like(inside)
    for coefficient in coefficients(degree):
        value = value * fraction + coefficient
    value = _entries(whole, math.floor(limit)) * value
    return jnp.where(wide > limit, jnp.zeros_like(value), value).astype(x.dtype)


def _entries(whole: Float[Array, "*S"], last: int) -> Float[Array, "*S"]:
    """exp(-n) of whole numbers 0 to ``last``. NaN is none; its fraction is NaN, so any entry will do: the first."""
    table = np.exp(-np.arange(last + 1, dtype=np.float64))
    if last <= MOST_COMPARED:
        found = jnp.full_like(whole, table[0])
        for n in range(1, last + 1):
            found = jnp.where(whole >= n, jnp.asarray(table[n], whole.dtype), found)
        return found
    entry = jnp.where(jnp.isnan(whole), jnp.zeros_like(whole), whole).astype(jnp.int32)
    return jnp.take(jnp.asarray(table, whole.dtype), entry, mode="clip")


def sas(
    threshold: float = THRESHOLD, degree: float = DEGREE
) -> Callable[[Scores, Bool[Array, "B #N T S"]], Scores]:
    """The softmax ``@sas(threshold, degree)``: ``sas_exp`` of the distance to the maximum, over the sum of those.

    The maximum's own weight is P(0) = 0.9996 before the division. A query that sees no key gets weights of 0.

    Args:
        threshold: 0: no cut.
        degree: of the polynomial, a whole number.

    Raises:
        ValueError: a negative threshold, or a degree that is not offered.
    """
    cut = None if threshold == 0 else threshold
    _checked(cut)
    coefficients(degree)  # for its refusal: numbers of a scheme arrive as floats

    @typed
    def weigh(scores: Scores, mask: Bool[Array, "B #N T S"]) -> Scores:
        masked = jnp.where(mask, scores, jnp.full_like(scores, MASK))
        distance = jnp.max(masked, axis=-1, keepdims=True) - masked
        weight = jnp.where(mask, sas_exp(distance, cut, int(degree)), jnp.zeros_like(scores))
        total = jnp.sum(weight, axis=-1, keepdims=True)
        return weight / jnp.where(total == 0, jnp.ones_like(total), total)

    return weigh


def lost_mass(scores: Float[Array, "*B S"], threshold: float) -> Float[Array, "*B"]:
    """Share of each row's exact softmax mass that lies more than ``threshold`` below its maximum, in [0, 1].

    Args:
        scores: masked keys at minus infinity or ``numerics.MASK``.
        threshold: 0: no cut, nothing is lost.

    Raises:
        ValueError: a negative threshold.
    """
    limit = _checked(threshold or None)
    distance = jnp.max(scores, axis=-1, keepdims=True) - scores
    kept = jnp.where(distance > limit, jnp.zeros_like(scores), jnp.exp(-distance))
    # What is lost is summed by itself: 1 - kept / all would round small shares away.
    gone = jnp.where(distance > limit, jnp.exp(-distance), jnp.zeros_like(scores))
    lost = jnp.sum(gone, axis=-1)
    return lost / (lost + jnp.sum(kept, axis=-1))


def gaussian_lost_mass(
    keys: int, *, sigma: float = 2.0, threshold: float = THRESHOLD, rows: int = 256, seed: int = 0
) -> tuple[float, float]:
    """``lost_mass`` of ``rows`` rows of ``keys`` Gaussian logits, float32: its mean and that mean's standard error.

    What a table of lost mass against context holds beside a model's own. 0.12 at 8,192 keys, sigma 2, threshold 6.
    """
    draw = np.random.default_rng(seed)
    each = np.concatenate(
        [
            np.asarray(
                lost_mass(jnp.asarray(sigma * draw.standard_normal((1, keys)), jnp.float32), threshold)
            )
            for _ in range(rows)
        ]
    ).astype(np.float64)
    return float(each.mean()), float(each.std(ddof=1) / math.sqrt(rows))


def _checked(threshold: float | None) -> float:
    """The threshold as a number, infinity where nothing is cut. Raises ValueError where it is not positive."""
    limit = math.inf if threshold is None else float(threshold)
    if not limit > 0:
        raise ValueError(f"{threshold=}: SAS cuts at a positive distance below the maximum, or not at all")
    return limit
