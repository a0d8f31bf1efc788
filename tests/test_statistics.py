"""Intervals and tests against values worked out by hand or known from textbooks."""

import math
from fractions import Fraction

import numpy as np
import pytest

from slimjax.statistics import (
    blocks,
    holm,
    mcnemar,
    mean_interval,
    next_interval,
    paired_interval,
    paired_p,
    welch_p,
    wilson,
)


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [
        (8, 10, 0.4901625, 0.9433178),
        (0, 10, 0.0, 0.2775328),
        (10, 10, 0.7224672, 1.0),
        (81, 263, 0.2552885, 0.3662096),
    ],
)
def test_wilson_against_published_values(right, count, low, high):
    """The last pair is Newcombe's example (Stat. Med. 17, 1998): 0.2553 to 0.3662."""
    found = wilson(right, count)
    assert found.mean == right / count
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-6), pytest.approx(high, abs=1e-6))


@pytest.mark.parametrize(("first", "second"), [(10, 2), (2, 10), (5, 5), (0, 1), (0, 0), (0, 9)])
def test_mcnemar_counts_every_split_as_uneven_or_more(first, second):
    """Two-sided, without mid-p: all splits of the n pairs that differ, by whole numbers."""
    n, least = first + second, min(first, second)
    p = sum(math.comb(n, k) for k in range(n + 1) if min(k, n - k) <= least)
    a = [True] * first + [False] * second + [True, True, False]
    b = [False] * first + [True] * second + [True, True, False]
    found = mcnemar(a, b)
    assert (found.first, found.second) == (first, second)
    assert found.p == pytest.approx(float(Fraction(p, 2**n)))


def test_mcnemar_on_ten_against_two():
    assert mcnemar([1] * 10 + [0] * 2, [0] * 10 + [1] * 2).p == pytest.approx(2 * 79 / 4096)


def test_mean_interval_is_students():
    found = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.776445105 * math.sqrt(2.5 / 5)  # t of 4 degrees of freedom
    assert (found.mean, found.low, found.high) == (3.0, pytest.approx(3 - half), pytest.approx(3 + half))
    assert found.apart
    wider = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0], level=0.99)
    assert wider.high - 3 == pytest.approx(4.604094871 * math.sqrt(0.5))
    alone = mean_interval([2.0])
    assert (alone.mean, alone.apart) == (2.0, False)


def test_one_more_sample_is_as_likely_inside_as_told():
    draws = np.random.default_rng(0).normal(size=(4000, 4))
    inside = [(found := next_interval(row[:3])).low <= row[3] <= found.high for row in draws]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.012)
    assert next_interval([1.0]).low == -math.inf


def test_pairs_see_what_their_spread_would_hide():
    noise = np.random.default_rng(0).normal(size=40)
    assert not paired_interval(noise, np.roll(noise, 1)).apart
    found = paired_interval(noise + 0.01, noise)
    assert found.apart
    assert found.mean == pytest.approx(0.01)


def test_the_p_of_pairs():
    """t = 3 / sqrt(2.5 / 5) of 4 degrees of freedom."""
    found = paired_p([2.0, 4.0, 3.0, 5.0, 4.0], [1.0, 1.0, 1.0, 0.0, 0.0])
    assert found == pytest.approx(0.0132356, rel=1e-5)
    assert paired_p([1.0], [0.0]) == 1
    assert paired_p([1.0, 2.0], [1.0, 2.0]) == 1
    assert paired_p([2.0, 3.0], [1.0, 2.0]) == 0
    x = np.random.default_rng(0).normal(size=20)
    y = x + np.random.default_rng(1).normal(size=20)
    edge = 1 - paired_p(x, y)
    assert paired_interval(x, y, level=edge - 1e-6).apart
    assert not paired_interval(x, y, level=edge + 1e-6).apart


def test_welch_by_hand():
    """Means 4 and 8, squared errors of them 4/3 and 8/3: t = -2 of 16 / (8/9 + 64/27) = 4.909 degrees of freedom."""
    assert welch_p([2.0, 4.0, 6.0], [4.0, 12.0, 8.0, 8.0]) == pytest.approx(0.10299, rel=1e-4)
    assert welch_p([1.0], [2.0, 3.0]) == 1
    assert welch_p([1.0, 1.0], [1.0, 1.0]) == 1
    assert welch_p([1.0, 1.0], [2.0, 2.0]) == 0


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_blocks_are_of_one_sequence_each():
    values = np.arange(12.0).reshape(2, 6)
    assert blocks(values, 3).tolist() == [1.0, 4.0, 7.0, 10.0]
    assert blocks(values, 4).tolist() == [2.5, 8.5]
    assert blocks(values, 100).tolist() == [2.5, 8.5]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: wilson(3, 2), "right=3 of count=2"),
        (lambda: wilson(0, 0), "count at least 1"),
        (lambda: wilson(1, 2, level=1.0), "level=1.0"),
        (lambda: mcnemar([True], [True, False]), "as many answers"),
        (lambda: mcnemar([], []), "at least one"),
        (lambda: mean_interval([]), "at least one"),
        (lambda: mean_interval([1.0, math.nan]), "all finite"),
        (lambda: paired_interval([1.0], [1.0, 2.0]), "as many values"),
        (lambda: paired_p([1.0], [1.0, 2.0]), "as many values"),
        (lambda: paired_p([], []), "at least one"),
        (lambda: holm([0.5, 1.5]), "p = 1.5"),
    ],
)
def test_what_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()
