"""SAS: the published cubic, the error that its docstrings promise, and what the cut loses."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

import oracle
from slimjax import parse_scheme
from slimjax.attention.sas import (
    coefficients,
    degree_for,
    gaussian_lost_mass,
    lost_mass,
    polynomial_error,
    sas_exp,
    threshold_for,
)
from slimjax.attention.softmax import exact, softmax_of


def sas_oracle(scores, mask, threshold, degree):
    """Written from the formula: loops, float64, the cubic from its four decimals."""
    points = np.linspace(0, 1, 100)
    p = [-0.1025, 0.4626, -0.9922, 0.9996] if degree == 3 else np.polyfit(points, np.exp(-points), degree)
    out = np.zeros_like(scores)
    for row in np.ndindex(scores.shape[:-1]):
        seen = np.flatnonzero(mask[row])
        if not len(seen):
            continue
        peak = max(scores[row][i] for i in seen)
        for i in seen:
            x = peak - scores[row][i]
            if x <= threshold:
                t = x - math.floor(x)
                out[row][i] = math.exp(-math.floor(x)) * sum(c * t**k for k, c in enumerate(reversed(p)))
        out[row] /= out[row].sum()
    return out


def test_the_published_cubic_is_the_least_squares_one():
    points = np.linspace(0, 1, 100)
    fitted = np.polyfit(points, np.exp(-points), 3)
    np.testing.assert_array_equal(np.round(fitted, 4), coefficients(3))
    # A tenth of a thousandth of change in any of them, and it would not be.
    assert np.all(np.abs(fitted - np.asarray(coefficients(3))) < 0.5e-4)


@pytest.mark.parametrize("degree", [1, 2, 4, 5, 6, 7, 8])
def test_other_degrees_are_fitted_alike(degree):
    points = np.linspace(0, 1, 100)
    # Least squares by their normal equations' solution, through QR.
    basis = np.stack([points**k for k in range(degree, -1, -1)], axis=1)
    q, r = np.linalg.qr(basis)
    np.testing.assert_allclose(coefficients(degree), np.linalg.solve(r, q.T @ np.exp(-points)), rtol=1e-6)


def test_the_errors_that_are_promised():
    absolute, relative = polynomial_error(3)
    assert absolute == pytest.approx(4.0e-4, rel=1e-3)
    assert relative == pytest.approx(1.03e-3, rel=0.01)
    errors = [polynomial_error(degree)[0] for degree in range(1, 9)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == pytest.approx(2.4e-11, rel=0.05)


@pytest.mark.parametrize("degree", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("threshold", [6.0, 8.0, 2.5, None])
def test_exp_is_within_its_bound_and_reaches_it(degree, threshold):
    x = np.linspace(0, 20, 20_001)
    found = np.asarray(sas_exp(jnp.asarray(x, jnp.float32), threshold, degree), np.float64)
    error = np.abs(found - np.exp(-x))
    inside = x <= (math.inf if threshold is None else threshold)
    bound = polynomial_error(degree)[0]
    assert bound * 0.9 < error[inside].max() <= bound + 1e-6
    assert np.all(found[~inside] == 0)
    if threshold is not None:
        assert error[~inside].max() <= math.exp(-threshold)
        assert sas_exp(jnp.float32(threshold), threshold, degree) > 0
    # The relative error is the polynomial's in every whole interval.
    assert np.max(error[inside] / np.exp(-x[inside])) <= polynomial_error(degree)[1] + 1e-5


def test_exp_far_away_and_without_a_number():
    far = jnp.asarray([100.0, 3e38, math.inf, math.nan, -1.0], jnp.float32)
    found = np.asarray(sas_exp(far, None))
    np.testing.assert_array_equal(found[:3], 0)
    assert np.isnan(found[3])
    assert found[4] == np.float32(0.9996)
    assert sas_exp(jnp.asarray([0.5], jnp.bfloat16)).dtype == jnp.bfloat16
    # Nothing but underflow is cut where nothing shall be.
    assert sas_exp(jnp.float32(87.0), math.inf) == pytest.approx(math.exp(-87.0), rel=2e-3)


@pytest.mark.parametrize(
    "text", ["sas", "sas(8)", "sas(10,3)", "sas(0)", "sas(6,1)", "sas(2.5,5)", "sas(0,8)"]
)
def test_softmax_against_the_oracle(text, x64):
    draw = np.random.default_rng(0)
    scores = 4 * draw.standard_normal((2, 3, 4, 9))
    mask = draw.random((2, 1, 4, 9)) < 0.7
    mask[0, 0, 1] = False
    numbers = text[4:-1].split(",") if "(" in text else []
    threshold = float(numbers[0]) if numbers else 6.0
    degree = int(numbers[1]) if len(numbers) > 1 else 3
    found = softmax_of(text)(jnp.asarray(scores), jnp.asarray(mask))
    expected = sas_oracle(scores, np.broadcast_to(mask, scores.shape), threshold or math.inf, degree)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-300)
    assert np.all(np.asarray(found)[0, :, 1] == 0)


@jax.jit
def _both(scores, mask):
    return exact(scores, mask), softmax_of("sas")(scores, mask), lost_mass(scores, 6.0)


@given(seed=st.integers(0, 10_000), sigma=st.floats(0.1, 8), keys=st.sampled_from([1, 7, 300]))
def test_weights_are_as_near_as_the_lost_mass_allows(seed, sigma, keys):
    scores = jnp.asarray(sigma * np.random.default_rng(seed).standard_normal((1, 1, 2, keys)), jnp.float32)
    mask = jnp.ones((1, 1, 2, keys), bool)
    p, found, m = (np.asarray(part) for part in _both(scores, mask))
    r = polynomial_error(3)[1]
    distance = np.sum(np.abs(found - p), axis=-1)
    assert np.all(distance <= 2 * m + 2 * r / (1 - r) + 1e-5)
    assert np.all(m <= keys * math.exp(-6))
    np.testing.assert_allclose(np.sum(found, axis=-1), 1, rtol=1e-5)


def test_bound_is_not_idle():
    """With a fifth of the mass lost the weights differ by nearly twice that."""
    scores = jnp.zeros((1, 1, 1, 401), jnp.float32).at[..., 1:].set(-7.0)
    mask = jnp.ones(scores.shape, bool)
    m = float(lost_mass(scores, 6.0)[0, 0, 0])
    assert m == pytest.approx(400 * math.exp(-7) / (1 + 400 * math.exp(-7)), rel=1e-5)
    distance = float(jnp.sum(jnp.abs(softmax_of("sas")(scores, mask) - exact(scores, mask))))
    assert distance == pytest.approx(2 * m, rel=1e-3)


def test_offers_meet_the_error_that_was_asked():
    assert [degree_for(error) for error in (0.06, 1e-2, 4.1e-4, 3.9e-4, 1e-6, 1e-10)] == [1, 2, 3, 4, 5, 8]
    with pytest.raises(ValueError, match="degree 8 errs by"):
        degree_for(1e-12)
    assert threshold_for(math.exp(-6)) == pytest.approx(6)
    for keys in (10, 5000):
        # The worst row for a threshold: one maximum, all others just beyond the cut.
        threshold = threshold_for(1e-3, keys)
        scores = jnp.full((keys,), -threshold * 1.00001, jnp.float32).at[0].set(0.0)
        assert 0.9e-3 * (keys - 1) / keys < float(lost_mass(scores, threshold)) <= 1e-3
    for error, keys in ((0.0, 1), (1.0, 1), (0.1, 0)):
        with pytest.raises(ValueError, match="expected an error"):
            threshold_for(error, keys)


def test_lost_mass_of_gaussian_logits_at_eight_thousand_keys():
    mean, spread = gaussian_lost_mass(8192)
    assert spread < 0.006
    assert mean == pytest.approx(0.12, abs=0.01)
    assert gaussian_lost_mass(8192, threshold=10.0, rows=32)[0] < 0.005
    assert gaussian_lost_mass(1024, rows=64)[0] < 0.08
    assert gaussian_lost_mass(64, threshold=0.0, rows=2) == (0.0, 0.0)


def test_lost_mass_leaves_masked_keys_out():
    scores = jnp.asarray([[0.0, -7.0, -math.inf], [2.0, 1.0, -1.7e38]], jnp.float32)
    w = math.exp(-7)
    np.testing.assert_allclose(lost_mass(scores, 6.0), [w / (1 + w), 0], rtol=1e-6)


def test_refusals():
    for text, match in [
        ("sas(-1)", "positive distance"),
        ("sas(6,0)", "degree=0"),
        ("sas(6,9)", "degree=9"),
        ("sas(6,2.5)", "degree=2.5"),
        ("sas(inf)", "finite"),
        ("sas(1,2,3)", "does not take 3"),
    ]:
        with pytest.raises(ValueError, match=match):
            softmax_of(text)
    with pytest.raises(ValueError, match="positive distance"):
        sas_exp(jnp.zeros((1,), jnp.float32), 0.0)
    assert str(parse_scheme("kv:bf16@sas(10,3)")) == "kv:bf16@sas(10,3)"


def test_slopes_are_nearly_the_exact_ones():
    """Finite everywhere, masked keys and empty rows included."""
    scores = jnp.asarray(np.random.default_rng(1).standard_normal((1, 1, 2, 6)), jnp.float32)
    mask = jnp.ones((1, 1, 2, 6), bool).at[0, 0, 0, 2].set(False).at[0, 0, 1].set(False)
    weigh = jnp.arange(6, dtype=jnp.float32)

    def slope(softmax):
        return jax.jit(jax.grad(lambda s: jnp.sum(softmax(s, mask) * weigh[None, None, None])))(scores)

    np.testing.assert_allclose(slope(softmax_of("sas(0,8)")), slope(exact), atol=1e-5)
    assert np.all(np.isfinite(slope(softmax_of("sas"))))


def test_oracle_softmax_is_the_limit():
    """Without a cut and at degree 8 SAS is the softmax of the oracle."""
    scores = np.random.default_rng(2).standard_normal((1, 2, 3, 7)) * 3
    found = softmax_of("sas(0,8)")(jnp.asarray(scores, jnp.float32), jnp.ones((1, 1, 3, 7), bool))
    np.testing.assert_allclose(found, np.apply_along_axis(oracle.softmax, -1, scores), atol=1e-6)
