"""Metrics against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slimjax import numerics


def test_metrics():
    a, b = np.array([[3.0, 0.0]]), np.array([[0.0, 4.0]])
    assert numerics.relative_l2(a, b) == pytest.approx(5 / 4)
    assert numerics.relative_l1(a, b) == pytest.approx(7 / 4)
    assert numerics.rmse(a, b) == pytest.approx(np.sqrt(12.5))
    assert numerics.cosine(a, b) == 0.0
    assert numerics.cosine(a, 2 * a) == pytest.approx(1.0)
    assert numerics.max_abs(a, b) == (4.0, (0, 1))
    assert numerics.max_abs(np.array([1.0, np.nan]), np.zeros(2))[1] == (1,)
    with pytest.raises(ValueError, match="one shape"):
        numerics.rmse(a, b[0])


def test_four_errors_are_the_four():
    draw = np.random.default_rng(0)
    reference = draw.standard_normal((3, 50, 1700)).astype(np.float32)  # four chunks, the last not whole
    value = reference + (0.1 * draw.standard_normal(reference.shape)).astype(np.float32)
    each = (numerics.cosine, numerics.relative_l1, numerics.rmse, numerics.relative_l2)
    wanted = [one(value, reference) for one in each]
    np.testing.assert_allclose(numerics.four_errors(value, reference), wanted, rtol=1e-13)
    with pytest.raises(ValueError, match="one shape"):
        numerics.four_errors(value, reference[0])


def test_kl_and_agreement():
    logits, reference = jnp.asarray([[0.0, 0.0], [5.0, 0.0]]), jnp.asarray([[0.0, jnp.log(3.0)], [5.0, 0.0]])
    expected = 0.25 * np.log(0.25 / 0.5) + 0.75 * np.log(0.75 / 0.5)
    np.testing.assert_allclose(numerics.logit_kl(logits, reference), [expected, 0.0], atol=1e-6)
    assert numerics.top1_agreement(logits, reference) == 0.5  # the first row's tie goes to token 0


def test_greedy_agreement_stops_at_the_first_difference():
    value, reference = (
        jnp.asarray([[1, 2, 3, 4], [1, 9, 3, 4], [1, 2, 3, 4]]),
        jnp.asarray([[1, 2, 3, 4]] * 3),
    )
    np.testing.assert_array_equal(numerics.greedy_agreement(value, reference), [4, 1, 4])


def test_einsum_keeps_bfloat16_sums_in_float32():
    x = jnp.ones((1, 4096), jnp.bfloat16)
    assert numerics.einsum("bd,bd->b", x, x)[0] == 4096  # bfloat16 cannot count that far
    assert numerics.einsum("bd,bd->b", x, x).dtype == jnp.float32


def test_tolerance_grows_with_what_it_is_derived_from():
    eps = np.finfo(np.float32).eps
    assert numerics.tolerance("float32", size=64, gain=10.0) == pytest.approx(eps * (1 + 8 / 2 * 10))
    assert numerics.tolerance("bfloat16") == pytest.approx(2**-7, rel=1e-4)


@pytest.mark.parametrize(
    ("subscripts", "first", "second"),
    [
        ("btd,df->btf", (2, 3, 4), (4, 5)),
        ("btd,df->btf", (2, 3, 8), (8, 2)),
        ("btkgh,bskh->bkgts", (2, 3, 2, 2, 4), (2, 5, 2, 4)),
        ("bkgts,bskh->btkgh", (2, 2, 2, 3, 5), (2, 5, 2, 4)),
        ("de,df->ef", (3, 4), (3, 2)),
        ("btkgh,kh->bkgt", (2, 3, 2, 2, 4), (2, 4)),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_stated_derivative_of_a_product_is_the_derivative(subscripts, first, second, dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    a, b = (
        jax.random.normal(key, size).astype(dtype) for key, size in zip(keys, (first, second), strict=False)
    )
    out, stated = jax.vjp(lambda *pair: numerics.einsum(subscripts, *pair), a, b)
    same, derived = jax.vjp(
        lambda *pair: jnp.einsum(subscripts, *pair, precision="highest"),
        a.astype("float32"),
        b.astype("float32"),
    )
    assert numerics.relative_l2(out, same) < 1e-6
    g = jax.random.normal(keys[2], out.shape)
    for mine, theirs, operand in zip(stated(g), derived(g), (a, b), strict=True):
        assert mine.dtype == operand.dtype
        assert numerics.relative_l2(mine, theirs) < {"float32": 1e-6, "bfloat16": 1e-2}[dtype]
