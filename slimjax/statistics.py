"""What a difference between two caches is worth: tests and intervals of paired measurements.

Shares (right answers) have Wilson's interval and McNemar's exact test, means (KL per token) an interval by
Student's t over blocks of tokens, as neighbouring tokens are no independent samples. Where several differences are
tested at once, Holm's correction keeps the chance of even one false among them at the level.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy import special

LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean (or share), and where its true value lies at the chosen level."""

    mean: float
    low: float
    high: float

    @property
    def apart(self) -> bool:
        """Whether it leaves 0 out: of a difference, that there is one."""
        return self.low > 0 or self.high < 0


@dataclasses.dataclass(frozen=True)
class McNemar:
    """Answers that one of two has right and the other has not, and the p of a split as uneven as that.

    Attributes:
        first, second: how many only the first, and only the second, has right.
        p: two-sided, that both are right equally often.
    """

    first: int
    second: int
    p: float


def mcnemar(first: Sequence[bool] | np.ndarray, second: Sequence[bool] | np.ndarray) -> McNemar:
    """McNemar's test (Psychometrika 12, 1947) in its exact form: binomial, two-sided, no mid-p.

    Only questions on which the two differ count; if neither is better, each goes either way with probability 1/2.

    Args:
        first, second: right or wrong, question by question, the same questions in the same order.

    Raises:
        ValueError: other lengths, or no questions.
    """
    a, b = np.asarray(first, bool), np.asarray(second, bool)
    if a.shape != b.shape or a.ndim != 1 or not a.size:
        raise ValueError(f"{a.shape} and {b.shape}: expected as many answers of both, at least one")
    only_first, only_second = int(np.sum(a & ~b)), int(np.sum(b & ~a))
    differ = only_first + only_second
    p = 2 * special.bdtr(min(only_first, only_second), differ, 0.5) if differ else 1.0
    return McNemar(first=only_first, second=only_second, p=min(1.0, float(p)))


def wilson(right: int, count: int, level: float = LEVEL) -> Interval:
    """Wilson's score interval of a share (J. Am. Stat. Assoc. 22, 1927); within [0, 1], of 0 and of all, too.

    Raises:
        ValueError: not 0 <= right <= count, no questions, or a level outside (0, 1).
    """
    if not 0 <= right <= count or count < 1:
        raise ValueError(f"{right=} of {count=}: expected 0 <= right <= count, count at least 1")
    z = float(special.ndtri((1 + _checked(level)) / 2))
    share, spread = right / count, z * z / count
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    # Of none and of all the ends are exact, whatever rounding makes of them.
    low = 0.0 if right == 0 else max(0.0, centre - half)
    return Interval(share, low, 1.0 if right == count else min(1.0, centre + half))


def mean_interval(values: Sequence[float] | np.ndarray, level: float = LEVEL) -> Interval:
    """The mean and Student's t interval of it; values are independent samples, such as means of blocks of tokens.

    One value alone says nothing of its spread: the interval is the whole line.

    Raises:
        ValueError: no values, or some that are not finite; a level outside (0, 1).
    """
    x = _samples(values)
    mean = float(x.mean())
    if x.size == 1:
        return Interval(mean, -math.inf, math.inf)
    t = float(special.stdtrit(x.size - 1, (1 + _checked(level)) / 2))
    half = t * float(x.std(ddof=1)) / math.sqrt(x.size)
    return Interval(mean, mean - half, mean + half)


def next_interval(values: Sequence[float] | np.ndarray, level: float = LEVEL) -> Interval:
    """The mean, and where one further sample of the same normal distribution lies at the level (Student's t).

    Of one value the interval is the whole line. Raises ValueError as ``mean_interval``.
    """
    x = _samples(values)
    found = mean_interval(x, level)
    half = (found.high - found.mean) * math.sqrt(x.size + 1)
    return Interval(found.mean, found.mean - half, found.mean + half)


def paired_interval(
    first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray, level: float = LEVEL
) -> Interval:
    """Of the mean of first - second, sample by sample. Raises ValueError as ``mean_interval``, or for other lengths."""
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"{a.shape} and {b.shape}: expected as many values of both")
    return mean_interval(a - b, level)


def paired_p(first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray) -> float:
    """Two-sided p, by Student's t, that the mean of first - second is 0; below 1 - level where the interval at that
    level leaves 0 out.

    One pair says nothing: 1. Equal differences have no spread: 1 where they are 0, else 0.

    Raises:
        ValueError: other lengths, no values, or some that are not finite.
    """
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"{a.shape} and {b.shape}: expected as many values of both")
    x = _samples(a - b)
    if x.size == 1:
        return 1.0
    spread = float(x.std(ddof=1)) / math.sqrt(x.size)
    if spread == 0:
        return float(x[0] == 0)
    return float(2 * special.stdtr(x.size - 1, -abs(float(x.mean())) / spread))


def welch_p(first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray) -> float:
    """Two-sided p that the means of two independent samples are equal: Welch's t (Biometrika 34, 1947).

    For samples that no pairing joins, such as blocks of tokens at other places of a text. One value of either says
    nothing: 1. Without any spread: 1 where the means are equal, else 0.

    Raises:
        ValueError: no values, or some that are not finite.
    """
    a, b = _samples(first), _samples(second)
    if min(a.size, b.size) == 1:
        return 1.0
    parts = [float(x.var(ddof=1)) / x.size for x in (a, b)]
    apart, total = float(a.mean() - b.mean()), sum(parts)
    if total == 0:
        return float(apart == 0)
    freedom = total**2 / (parts[0] ** 2 / (a.size - 1) + parts[1] ** 2 / (b.size - 1))
    return float(2 * special.stdtr(freedom, -abs(apart) / math.sqrt(total)))


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's adjusted p of each of several tests (Scand. J. Stat. 6, 1979): the k-th smallest of m times m - k + 1.

    To reject where the adjusted p is below a level keeps the chance of any false rejection below that level, however
    the tests depend on each other.

    Raises:
        ValueError: a p outside [0, 1].
    """
    if wrong := [p for p in ps if not 0 <= p <= 1]:
        raise ValueError(f"p = {wrong[0]}: expected probabilities")
    found, most = [0.0] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=lambda each: ps[each])):
        most = max(most, min(1.0, (len(ps) - rank) * ps[index]))
        found[index] = most
    return found


def blocks(values: np.ndarray, size: int) -> np.ndarray:
    """Means of blocks of at least ``size`` consecutive tokens of each sequence [B, T] (of T, where it is less); [n]."""
    count = max(1, values.shape[1] // size)
    parts = np.array_split(np.asarray(values, np.float64), count, axis=1)
    return np.stack([part.mean(axis=1) for part in parts], axis=1).reshape(-1)


def _samples(values: Sequence[float] | np.ndarray) -> np.ndarray:
    x = np.asarray(values, np.float64)
    if x.ndim != 1 or not x.size or not np.all(np.isfinite(x)):
        raise ValueError(f"{x.shape} values: expected at least one, all finite")
    return x


def _checked(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"{level=}: expected a probability between 0 and 1")
    return level
