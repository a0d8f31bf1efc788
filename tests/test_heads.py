"""Head selectors against loops, and heads that move without the layer's noticing."""

import dataclasses

import numpy as np
import pytest
import suites

from slimjax.attention.layer import attend_full
from slimjax.attention.positions import Position
from slimjax.solve.heads import SELECTORS, entropy, low_heads, permute_heads, random


def drawn(n=40, heads=4, size=8):
    draw = np.random.default_rng(0)
    spread = np.asarray([1.0, 5.0, 0.3, 2.0])[None, :heads, None] * (1 + np.arange(size)[None, None] / 4)
    return draw.standard_normal((n, heads, size)) * spread, draw.standard_normal((n, heads, size))


def factors(rows, head):
    """gap and std of one head, by the words of their definition."""
    channels = [rows[:, head, i] for i in range(rows.shape[2])]
    ranges = [max(channel) - min(channel) for channel in channels]
    gap = max(max(channel) for channel in channels) - min(min(channel) for channel in channels)
    mean = sum(ranges) / len(ranges)
    return gap, (sum((value - mean) ** 2 for value in ranges) / len(ranges)) ** 0.5


@pytest.mark.parametrize("name", ["priority", "minmax", "variation"])
def test_selectors_against_their_definitions(name):
    keys, values = drawn()
    expected = np.zeros(4)
    for rows in (keys, values):
        both = [factors(rows, head) for head in range(4)]
        score = np.asarray([{"priority": g * s, "minmax": g, "variation": s}[name] for g, s in both])
        expected += score / score.mean()
    np.testing.assert_allclose(SELECTORS[name](keys, values), expected, rtol=1e-12)
    # The units of either do not matter.
    np.testing.assert_allclose(SELECTORS[name](keys, 1e3 * values), expected, rtol=1e-9)


def test_entropy_of_known_histograms():
    """A head that fills all 256 bins evenly has ln 256, one that fills a quarter of them ln 64, a constant 0."""
    even = np.linspace(0, 1, 256 * 4)
    rows = np.stack([even, even / 4 * 0.9999, np.zeros_like(even)], axis=1)[:, :, None]
    found = entropy(rows, rows)
    expected = np.asarray([np.log(256), np.log(64), 0])
    np.testing.assert_allclose(found, 2 * expected / expected.mean(), rtol=2e-3)


def test_random_scores_are_the_seed_s():
    np.testing.assert_array_equal(random(6, 3), random(6, 3))
    assert not np.array_equal(random(6, 3), random(6, 4))
    assert not np.array_equal(random(6, (3, 0)), random(6, (3, 1)))


def test_low_heads_first_and_otherwise_in_order():
    scores = [3.0, 1.0, 2.0, 1.0, 0.5]
    assert low_heads(np.asarray(scores), 0.0).tolist() == [0, 1, 2, 3, 4]
    assert low_heads(np.asarray(scores), 0.4).tolist() == [1, 4, 0, 2, 3]  # of equal scores the earlier
    assert low_heads(np.asarray(scores), 0.5).tolist() == [1, 4, 0, 2, 3]  # rounded down
    assert low_heads(np.asarray(scores), 0.6).tolist() == [1, 3, 4, 0, 2]
    assert low_heads(np.asarray(scores), 1.0).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="finite score"):
        low_heads(np.asarray([1.0, np.nan]), 0.5)
    with pytest.raises(ValueError, match="lies in"):
        low_heads(np.asarray(scores), 1.5)


@pytest.mark.parametrize("layout", ["mha", "gqa"])
@pytest.mark.parametrize("position", ["none", "rope", "t5", "fire", "kerple"])
def test_the_permuted_layer_is_the_layer(layout, position, x64):
    case = suites.subject("kv:float64", layout, position)
    heads, group = case.spec.kv_heads, case.spec.group
    order = np.roll(np.arange(heads)[::-1], 1) if heads > 2 else np.asarray([1, 0])
    moved = permute_heads(case.projections, order, case.spec.position)
    assert not np.array_equal(moved.wk, case.projections.wk)
    exact, found = (attend_full(case.inputs, p, case.spec) for p in (case.projections, moved))
    np.testing.assert_allclose(found, exact, rtol=1e-12, atol=1e-14)
    # Head by head: each query head's part of wo stands where the order says.
    for place, head in enumerate(order):
        mine, was = (slice(i * group, (i + 1) * group) for i in (place, head))
        for name in ("wq", "bq", "wo"):
            new, old = (np.asarray(getattr(p, name)) for p in (moved, case.projections))
            new, old = (a.swapaxes(0, 1) if name == "wq" else a for a in (new, old))
            np.testing.assert_array_equal(new[mine], old[was])
    back = permute_heads(moved, np.argsort(order), case.spec.position)
    for name, array in case.arrays.items():
        np.testing.assert_array_equal(getattr(back, name), array)


def test_a_layer_without_biases_moves_too():
    case = suites.subject("kv:float32", "gqa", "none", dtype="float32", biases=False)
    moved = permute_heads(case.projections, [1, 0], case.spec.position)
    assert moved.bq is moved.bk is moved.bv is moved.bo is moved.position is None


def test_what_cannot_be_moved():
    case = suites.subject("kv:float32", "mha", "alibi", dtype="float32")
    with pytest.raises(NotImplementedError, match="slope by its place"):
        permute_heads(case.projections, [1, 0, 2, 3], case.spec.position)
    stayed = permute_heads(case.projections, [0, 1, 2, 3], case.spec.position)
    np.testing.assert_array_equal(stayed.wq, case.projections.wq)
    for order in ([0, 1, 2], [0, 1, 2, 2], [0, 1, 2, 4]):
        with pytest.raises(ValueError, match="not a permutation of 4"):
            permute_heads(dataclasses.replace(case.projections), order, Position())


def test_shapes_that_do_not_fit():
    keys, values = drawn()
    with pytest.raises(ValueError, match="expected both"):
        SELECTORS["priority"](keys, values[:, :2])
