"""Which key/value heads of a layer bear fewer bits, and the layer with those heads in front (arXiv 2412.08585).

Every selector takes rows of one layer, from calibration, as its cache would hold them, and returns one score per
head: the higher, the more the head needs its bits. The paper says "priority = gap * std" and no more; what gap,
std and its rivals are here stands at each function. Keys and values are scored apart, each divided by its mean
over the heads, and summed, so that neither's units decide. ``slimjax.solve.mixing`` applies them to a model, and has
slimjax's own, which measures what each head's bits are worth.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from slimjax.attention.positions import Position
from slimjax.attention.projections import Projections
from slimjax.cache.codecs.mixed import few_heads

BINS = 256  # of the histogram whose entropy is taken: the number of int8 codes


def priority(keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """gap * std: the head's range times the spread of its channels' ranges (arXiv 2412.08585, section 3.3).

    Args:
        keys, values: [n, K, H], as cached (keys after RoPE, where the cache holds them so).

    Returns:
        Scores [K], float64, without units: 2 on average.

    Raises:
        ValueError: other shapes, or no rows.
    """
    return _both(lambda rows: _gap(rows) * _spread(rows), keys, values)


def minmax(keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """gap alone: the largest value of any channel of the head less the smallest. As ``priority`` else."""
    return _both(_gap, keys, values)


def variation(keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """std alone: the standard deviation, over the head's channels, of their ranges. As ``priority`` else."""
    return _both(_spread, keys, values)


def entropy(keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Entropy of the head's values in a histogram of 256 bins over the range of the whole layer. As ``priority`` else.

    Bins of one width for all heads: a head whose values reach far fills more of them.
    """
    return _both(_entropy, keys, values)


def random(heads: int, seed: int | Sequence[int]) -> np.ndarray:
    """Scores [K] that know nothing of the heads: what a selector has to beat."""
    return np.random.default_rng(seed).random(heads)


# The selectors of rows alone, by name.
SELECTORS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "priority": priority,
    "entropy": entropy,
    "minmax": minmax,
    "variation": variation,
}


def low_heads(scores: np.ndarray, fraction: float) -> np.ndarray:
    """The order that puts the heads of the lowest scores first: what ``permute_heads`` and codec ``Mixed`` need.

    Args:
        scores: [K].
        fraction: of the heads that get fewer bits; their number is rounded down, as ``mixed.few_heads`` does.

    Returns:
        A permutation of 0..K-1, int64: first those heads, then the others, both in the order they had. Of equal
        scores the earlier head is the lower one.

    Raises:
        ValueError: scores that are not finite or not [K], or a fraction outside [0, 1].
    """
    scores = np.asarray(scores, np.float64)
    if scores.ndim != 1 or not np.all(np.isfinite(scores)):
        raise ValueError(f"{scores=}: expected one finite score per head")
    if not 0 <= fraction <= 1:
        raise ValueError(f"{fraction=}: a share of the heads lies in [0, 1]")
    few = few_heads(len(scores), fraction)
    ranked = np.argsort(scores, kind="stable")
    return np.concatenate([np.sort(ranked[:few]), np.sort(ranked[few:])])


def permute_heads(
    projections: Projections, order: Sequence[int] | np.ndarray, position: Position
) -> Projections:
    """The same layer with key/value head order[k] in place k, and the query heads that read it along with it.

    Every head's output is what it was, in its new place; their sum, the layer's output, is the same but for the
    order of the sum.

    Args:
        projections: of the layer, biases and trained position bias included.
        order: a permutation of 0..K-1.
        position: the layer's position scheme.

    Raises:
        ValueError: not a permutation of the key/value heads.
        NotImplementedError: ALiBi, whose slopes belong to a head's place and not to its weights.
    """
    heads = projections.wk.shape[1]
    order = np.asarray(order, np.int64)
    if order.shape != (heads,) or sorted(order.tolist()) != list(range(heads)):
        raise ValueError(f"order={order.tolist()} is not a permutation of {heads} key/value heads")
    if position.kind == "alibi" and order.tolist() != list(range(heads)):
        raise NotImplementedError(
            "ALiBi gives every head a slope by its place, so moved heads would get other slopes; leave the heads in "
            "place (one width for all of them), or use another position scheme"
        )
    group = projections.wq.shape[1] // heads
    queries = (order[:, None] * group + np.arange(group)[None, :]).reshape(-1)
    return dataclasses.replace(
        projections,
        wq=_moved(projections.wq, queries, 1),
        wk=_moved(projections.wk, order, 1),
        wv=_moved(projections.wv, order, 1),
        wo=_moved(projections.wo, queries, 0),
        bq=None if projections.bq is None else _moved(projections.bq, queries, 0),
        bk=None if projections.bk is None else _moved(projections.bk, order, 0),
        bv=None if projections.bv is None else _moved(projections.bv, order, 0),
        position=_moved_bias(projections.position, queries),
    )


# Trained parameters of a position bias that have a number per query head, on their last axis.
_PER_HEAD = ("table", "w2", "b2", "r1", "r2")


def _moved(array: jax.Array, order: np.ndarray, axis: int) -> jax.Array:
    return jnp.take(array, jnp.asarray(order, jnp.int32), axis=axis)


def _moved_bias(bias: dict[str, jax.Array] | None, queries: np.ndarray) -> dict[str, jax.Array] | None:
    if bias is None:
        return None
    return {
        name: _moved(array, queries, array.ndim - 1) if name in _PER_HEAD else array
        for name, array in bias.items()
    }


def _check(keys: np.ndarray, values: np.ndarray) -> None:
    if keys.ndim != 3 or keys.shape != values.shape or 0 in keys.shape:
        raise ValueError(f"{keys.shape=}, {values.shape=}: expected both [n, K, H], with at least one row")


def _both(score: Callable[[np.ndarray], np.ndarray], keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The scores of keys and of values, each divided by its mean over the heads, summed."""
    _check(keys, values)
    parts = [score(np.asarray(rows, np.float64)) for rows in (keys, values)]
    means = [float(part.mean()) for part in parts]
    return sum(
        (part / (mean or 1.0) for part, mean in zip(parts, means, strict=True)), np.zeros(keys.shape[1])
    )


def _gap(rows: np.ndarray) -> np.ndarray:
    return rows.max(axis=(0, 2)) - rows.min(axis=(0, 2))


def _spread(rows: np.ndarray) -> np.ndarray:
    return np.std(rows.max(axis=0) - rows.min(axis=0), axis=1)


def _entropy(rows: np.ndarray) -> np.ndarray:
    """In nats."""
    span = float(rows.min()), float(rows.max())
    scores = []
    for head in range(rows.shape[1]):
        counts, _ = np.histogram(rows[:, head], bins=BINS, range=span)
        share = counts[counts > 0] / counts.sum()
        scores.append(-math.fsum(share * np.log(share)))
    return np.asarray(scores)
