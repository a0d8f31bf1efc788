"""Position schemes against the papers' formulas, and the properties they are chosen for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import suites
from hypothesis import given, strategies as st

import oracle
from slimjax.attention.positions import (
    Position,
    alibi_slopes,
    bias,
    init_bias,
    rotate,
    scores_of_one,
    t5_bucket,
    unrotate,
)


@pytest.mark.parametrize("interleaved", [False, True])
@given(size=st.sampled_from([2, 6, 16]), start=st.integers(0, 100_000), seed=st.integers(0, 9))
def test_rope(interleaved, size, start, seed):
    position = Position(kind="rope", theta=500.0, interleaved=interleaved)
    x = np.random.default_rng(seed).standard_normal((2, 3, 2, size))
    steps = start + np.arange(3)
    with jax.enable_x64(True):
        turned = rotate(jnp.asarray(x), jnp.asarray(steps)[None], position)
        np.testing.assert_allclose(turned, oracle.rotate(x, steps, 500.0, interleaved), rtol=0, atol=1e-10)
        back = unrotate(turned, jnp.asarray(steps)[None], position)
        np.testing.assert_allclose(back, x, rtol=0, atol=1e-14)


def test_rope_scores_depend_on_the_distance_only(x64):
    position = Position(kind="rope")
    q, k = np.random.default_rng(0).standard_normal((2, 1, 1, 1, 8))

    def score(i, j):
        turned = [rotate(jnp.asarray(x), jnp.asarray([[at]]), position) for x, at in ((q, i), (k, j))]
        return float(np.sum(turned[0] * turned[1]))

    assert score(7, 3) == pytest.approx(score(1004, 1000), abs=1e-12)
    assert score(7, 3) != pytest.approx(score(7, 4), abs=1e-3)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("group", [1, 3])
def test_scores_of_one_query_are_products_with_rotated_keys(interleaved, group, x64):
    position = Position(kind="rope", theta=500.0, interleaved=interleaved)
    rng = np.random.default_rng(group)
    q, k = rng.standard_normal((2, 1, 2 * group, 6)), rng.standard_normal((2, 5, 2, 6))
    steps = 70 + np.arange(5)
    turned = oracle.rotate(k, steps, 500.0, interleaved)
    expected = np.einsum("bnh,bsnh->bns", q[:, 0], np.repeat(turned, group, axis=2))[:, :, None]
    found = scores_of_one(jnp.asarray(q), jnp.asarray(k), jnp.asarray(steps)[None], position)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13)


def test_rope_needs_pairs():
    with pytest.raises(ValueError, match="even head size, got H=3"):
        rotate(jnp.zeros((1, 1, 1, 3)), jnp.zeros((1, 1), jnp.int32), Position(kind="rope"))


@pytest.mark.parametrize("heads", [1, 2, 3, 8, 12, 20])
def test_alibi_slopes(heads):
    np.testing.assert_allclose(alibi_slopes(heads), oracle.alibi_slopes(heads), rtol=1e-15)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_t5_buckets(bidirectional):
    position = Position(kind="t5", buckets=32, max_distance=128, bidirectional=bidirectional)
    distance = np.arange(-300, 301)
    expected = [oracle.t5_bucket(int(d), bidirectional) for d in distance]
    np.testing.assert_array_equal(t5_bucket(jnp.asarray(distance), position), expected)


@pytest.mark.parametrize("name", ["alibi", "t5", "fire", "kerple", "kerple_power"])
def test_bias(name, x64):
    case = suites.subject("kv:float64", "mha", name)
    query, key = np.array([[3, 9], [0, 70]]), np.arange(80)
    value = bias(
        case.spec.position, case.projections.position, jnp.asarray(query), jnp.asarray(key), 4, jnp.float64
    )
    expected = [suites.oracle_bias(case, positions, key) for positions in query]
    np.testing.assert_allclose(value, np.stack(expected), rtol=1e-6, atol=1e-9)


def test_trained_biases_and_those_that_have_nothing_to_train():
    for name, position in suites.POSITIONS.items():
        parameters = init_bias(position, 4, jax.random.key(0))
        assert (parameters is not None) == position.trained, name
    with pytest.raises(ValueError, match="'t5' needs its trained parameters"):
        bias(
            Position(kind="t5"),
            None,
            jnp.zeros((1, 1), jnp.int32),
            jnp.zeros((1,), jnp.int32),
            2,
            jnp.float32,
        )
    with pytest.raises(ValueError, match="did you mean 'rope'"):
        Position(kind="ropes")
