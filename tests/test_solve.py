"""The weight algebra: exact where it promises to be, refused where it cannot be, predicted where it is noisy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import suites
from hypothesis import given, strategies as st

import oracle
from slimjax.attention.layer import attend_cached, attend_full, init_cache
from slimjax.cache import codec_of
from slimjax.numerics import relative_l2
from slimjax.scheme import parse_scheme
from slimjax.solve import convert
from slimjax.solve.fold import fold_value_bias
from slimjax.solve.linear import condition_number, noise_gain, solve_map


def ill_conditioned(width, condition, seed=0):
    draw = np.random.default_rng(seed)
    left, right = (np.linalg.qr(draw.standard_normal((width, width)))[0] for _ in range(2))
    return (left * np.logspace(0, -np.log10(condition), width)) @ right


@given(width=st.integers(1, 20), more=st.integers(0, 10), seed=st.integers(0, 5))
def test_solve_map(width, more, seed):
    draw = np.random.default_rng(seed)
    source, target = draw.standard_normal((width, width + more)), draw.standard_normal((width, 7))
    solved = solve_map(source, target)
    np.testing.assert_allclose(source @ solved, target, atol=1e-9 * condition_number(source))
    if more:  # the right inverse of arXiv 2503.05840
        expected = source.T @ np.linalg.inv(source @ source.T) @ target
        np.testing.assert_allclose(solved, expected, atol=1e-8 * condition_number(source) ** 2)
    with pytest.raises(ValueError, match="needs E >= D"):
        solve_map(np.ones((3, 2)), np.ones((3, 3)))


def test_condition_number():
    assert condition_number(ill_conditioned(30, 1e5)) == pytest.approx(1e5, rel=1e-6)
    assert condition_number(np.zeros((3, 3))) == np.inf


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4])
def test_noise_gain_is_the_error_that_noise_makes(condition):
    draw = np.random.default_rng(1)
    source, target = ill_conditioned(40, condition), draw.standard_normal((40, 40))
    solved = solve_map(source, target)
    x = draw.standard_normal((20_000, 40))
    # Relative noise of 1e-3 on every element, in proportion to that element's spread.
    noise = 1e-3 * np.linalg.norm(source, axis=0) * draw.standard_normal((20_000, 40))
    measured = relative_l2((x @ source + noise) @ solved, x @ target) / 1e-3
    assert measured == pytest.approx(noise_gain(source, solved, target), rel=0.05)


@pytest.mark.parametrize("codec", ["bf16", "int16", "int8"])
@pytest.mark.parametrize("basis", ["k", "v"])
def test_predicted_error_on_other_inputs(basis, codec):
    """Predicted from the weights alone, the error of what is rebuilt is found on fresh white inputs."""
    case = suites.subject(
        f"{basis}:{codec}", (4, 4, 16, 64), "none", dtype="float32", batch=1, tokens=400, seed=3
    )
    source, target = (
        case.arrays[name].reshape(64, 64) for name in (("wk", "wv") if basis == "k" else ("wv", "wk"))
    )
    converted = convert(case.projections, case.spec)
    weight = converted.layer.weights.w_kv if basis == "k" else converted.layer.weights.w_vk
    stored = codec_of(case.spec.scheme)
    rows = jnp.asarray((case.x @ source).reshape(1, 400, 4, 16), "float32")
    rebuilt = oracle.f64(stored.decode(stored.encode(rows))).reshape(400, 64) @ oracle.f64(weight).reshape(
        64, 64
    )
    assert relative_l2(rebuilt, case.x[0] @ target) == pytest.approx(
        converted.figures.predicted_error, rel=0.1
    )
    assert converted.figures.condition_number == pytest.approx(case.condition, rel=1e-6)


@pytest.mark.parametrize(("basis", "name"), [("k", "wk"), ("v", "wv")])
def test_singular_weights_are_refused_by_name(basis, name):
    case = suites.subject(f"{basis}:float32", "mha", "none", dtype="float32")
    array = case.arrays[name].copy()
    array[:, 0] = array[:, 1]  # two equal heads
    broken = dataclasses.replace(case.projections, **{name: jnp.asarray(array, "float32")})
    with pytest.raises(NotImplementedError, match=r"decoder\.7: W_. is singular .* use .*basis x or kv"):
        convert(broken, case.spec, layer="decoder.7")
    kv = dataclasses.replace(case.spec, scheme=dataclasses.replace(case.spec.scheme, basis="kv", option=0))
    convert(broken, kv)


@pytest.mark.parametrize("damage", [{"wk": (3, 3, 3)}, {"bq": (1, 1)}])
def test_wrong_shapes_are_refused(damage):
    case = suites.subject("k:float32", "mha", "none", dtype="float32")
    broken = dataclasses.replace(case.projections, **{n: jnp.ones(s) for n, s in damage.items()})
    with pytest.raises(ValueError, match=rf"layer: {next(iter(damage))} has shape"):
        convert(broken, case.spec)


def test_weights_that_are_not_finite_are_refused():
    case = suites.subject("kv:float32", "mha", "none", dtype="float32")
    broken = dataclasses.replace(case.projections, wv=case.projections.wv.at[0, 0, 0].set(jnp.nan))
    with pytest.raises(ValueError, match="wv holds values that are not finite"):
        convert(broken, case.spec)


@pytest.mark.parametrize("layout", ["mha", "gqa", "mqa"])
def test_value_bias_folds_into_the_output_bias(layout, x64):
    case = suites.subject("kv:float64", layout, "rope")
    folded = fold_value_bias(case.projections, "float64")
    assert folded.bv is None
    outputs = [attend_full(case.inputs, p, case.spec) for p in (case.projections, folded)]
    np.testing.assert_allclose(*outputs, rtol=0, atol=1e-14)


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_a_folded_bias_is_not_rounded_to_the_weights_dtype(stored, x64):
    """Weights as a checkpoint has them, a float64 spec: the fold must not cost what the solve does not."""
    case = suites.subject("k:float64", "gqa" if stored == "bfloat16" else "mha", "rope")
    low = jax.tree.map(lambda array: array.astype(stored), case.projections)
    spec = dataclasses.replace(case.spec, scheme=parse_scheme("x1:float64"))
    layer = convert(low, spec).layer
    out, _ = attend_cached(case.inputs, layer, init_cache(spec, batch=2, capacity=9))
    assert relative_l2(out, attend_full(case.inputs, low, spec)) < 1e-14


def test_key_bias_is_carried_only_where_it_matters():
    for position, softcap, carried in [("none", None, False), ("rope", None, True), ("none", 5.0, True)]:
        case = suites.subject("k:float32", "mha", position, dtype="float32", softcap=softcap)
        weights = convert(case.projections, case.spec).layer.weights
        assert (weights.k_bias is not None) == carried


def test_the_map_is_float32_whatever_the_weights():
    case = suites.subject("k:bf16", "mha", "rope", dtype="bfloat16", biases=False)
    low = {name: getattr(case.projections, name).astype(jnp.bfloat16) for name in ("wq", "wk", "wv", "wo")}
    converted = convert(dataclasses.replace(case.projections, **low), case.spec)
    assert converted.layer.weights.w_kv.dtype == jnp.float32
