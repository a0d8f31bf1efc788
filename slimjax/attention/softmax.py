"""How scores become weights: one entry per name of the scheme grammar's ``@softmax`` part."""

import functools
import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from slimjax.attention.sas import DEGREE, MOST_COMPARED, THRESHOLD, sas, sas_exp
from slimjax.axes import Scores, typed
from slimjax.numerics import MASK
from slimjax.scheme import suggest

Softmax = Callable[[Scores, Bool[Array, "B #N T S"]], Scores]
# exp(-x) of distances x >= 0 below a maximum.
Exponential = Callable[[Array], Array]


@jax.custom_jvp
@typed
def exact(scores: Scores, mask: Bool[Array, "B #N T S"]) -> Scores:
    """softmax over the visible keys, in the scores' dtype; a query that sees no key gets weights of 0."""
    masked = jnp.where(mask, scores, jnp.full_like(scores, MASK))
    peak = jnp.max(masked, axis=-1, keepdims=True)
    weight = jnp.where(mask, jnp.exp(masked - peak), jnp.zeros_like(scores))
    total = jnp.sum(weight, axis=-1, keepdims=True)
    return weight / jnp.where(total == 0, jnp.ones_like(total), total)


@exact.defjvp
def _exact_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    """dP = P (dS - sum P dS): the derivative of the lines above, in which maximum and masks cancel."""
    p = exact(*primals)
    weighed = p * tangents[0]
    return p, weighed - p * jnp.sum(weighed, axis=-1, keepdims=True)


def sparse(threshold: float) -> Softmax:
    """Exact weights, those below ``threshold`` replaced by 0 and the rest left as they are.

    The row of such a key need not be read, un-rotated or multiplied (arXiv 2503.05840, "softmax sparsity"):
    ``attention.sparsity`` counts them. The weights then sum to less than 1, by at most S * threshold.

    Raises:
        ValueError: a threshold outside [0, 1).
    """
    if not 0 <= threshold < 1:
        raise ValueError(f"sparse({threshold}): a threshold of softmax weights lies in [0, 1)")

    def weigh(scores: Scores, mask: Bool[Array, "B #N T S"]) -> Scores:
        weight = exact(scores, mask)
        return jnp.where(weight < threshold, jnp.zeros_like(weight), weight)

    return weigh


# name -> a function of the numbers in parentheses, none where there are none.
SOFTMAXES: dict[str, Callable[..., Softmax]] = {"exact": lambda: exact, "sparse": sparse, "sas": sas}


@functools.cache
def softmax_of(text: str) -> Softmax:
    """The softmax that ``name`` or ``name(number, ...)`` calls.

    Raises:
        ValueError: an unknown name (the nearest is named), text that is not of that form, or numbers that
            the softmax does not take.
    """
    name, numbers = _parsed(text)
    try:
        return SOFTMAXES[name](*numbers)
    except TypeError:
        raise ValueError(f"softmax {text!r}: {name} does not take {len(numbers)} numbers") from None


@functools.cache
def exponential_of(text: str) -> Exponential | None:
    """What a softmax takes for exp(-x), for a softmax computed tile by tile; None where it is more than that."""
    if _parsed(text)[0] == "exact":
        return lambda x: jnp.exp(-x)
    cut = sas_of(text)
    if cut is None:
        return None
    threshold, degree = cut
    return lambda x: sas_exp(x, threshold or None, degree)


def sas_of(text: str) -> tuple[float, int] | None:
    """Threshold (0: nothing is cut) and degree of SAS, or None of another softmax."""
    name, numbers = _parsed(text)
    if name != "sas":
        return None
    threshold, degree = (*numbers, *(THRESHOLD, DEGREE)[len(numbers) :])
    return threshold, int(degree)


def compared(text: str) -> bool:
    """Whether a kernel can compute it: exact, or SAS whose table is found by comparing and not gathered."""
    cut = sas_of(text)
    return text == "exact" if cut is None else 0 < cut[0] < MOST_COMPARED + 1


def _parsed(text: str) -> tuple[str, list[float]]:
    """The name and numbers of a softmax. Raises ValueError as ``softmax_of`` does."""
    match = re.fullmatch(r"([a-z][a-z0-9_]*)(?:\(([^()]*)\))?", text)
    if match is None or match[1] not in SOFTMAXES:
        raise ValueError(f"unknown softmax {text!r}{suggest(text, SOFTMAXES)}")
    try:
        numbers = [float(part) for part in match[2].split(",")] if match[2] else []
    except ValueError:
        raise ValueError(f"softmax {text!r}: expected numbers in the parentheses") from None
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"softmax {text!r}: expected finite numbers")
    return match[1], numbers
