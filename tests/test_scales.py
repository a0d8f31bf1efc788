"""Static scales per channel (codec fixed16), and the map in two bfloat16 parts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import suites
from test_remedies import WIDTH, calibration, inputs, spec, weights

import slimjax
from slimjax import Position, Projections, convert, parse_scheme
from slimjax.attention.layer import attend_cached, attend_full, init_cache, prefill
from slimjax.attention.pair import Pair, through
from slimjax.cache.codecs.integers import FixedCodec
from slimjax.numerics import relative_l2
from slimjax.solve.augment import Solution
from slimjax.solve.calibrate import collect
from slimjax.solve.fit import fit, key_error, value_error
from slimjax.solve.measure import scheme_error
from slimjax.solve.options import Layer, option
from slimjax.solve.plan import make_plan
from slimjax.solve.planfile import load_plan, save_plan
from slimjax.solve.scales import channel_scales, key_scales, rescaled

FIXED = FixedCodec()


# The codec ------------------------------------------------------------------------------------------------


def test_codes_are_256ths_and_clip():
    x = jnp.asarray([0.0, 1.0, -1.0, 1 / 512 + 1e-6, 127.4961, 127.6, 1e9, -1e9]).reshape(1, 1, 1, 8)
    codes = FIXED.encode(x)
    assert codes.dtype == jnp.int16
    assert codes.ravel().tolist() == [0, 256, -256, 1, 32_639, 32_639, 32_639, -32_639]
    assert float(FIXED.decode(codes)[0, 0, 0, 6]) == FIXED.peak == 32_639 / 256
    assert FIXED.nbytes((2, 3, 4, 5)) == 2 * 3 * 4 * 5 * 2


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_a_number_again(value):
    read = FIXED.decode(FIXED.encode(jnp.asarray([value, 3.0]).reshape(1, 1, 1, 2)))
    assert np.isnan(read[0, 0, 0, 0])
    assert read[0, 0, 0, 1] == 3


# Scales ---------------------------------------------------------------------------------------------------


def test_scales_are_powers_of_two_that_leave_room():
    rows = inputs() * np.geomspace(1e-4, 1e4, WIDTH)
    scale = channel_scales(rows, FIXED)
    assert np.all(np.log2(scale) == np.round(np.log2(scale)))
    most = np.abs(rows / scale).max(axis=0)
    assert np.all(most <= FIXED.peak / 1.25)
    assert np.all(most > FIXED.peak / 2.5)
    np.testing.assert_array_equal(channel_scales(np.zeros((3, 2)), FIXED), 1)


@pytest.mark.parametrize(
    ("interleaved", "partner"), [(False, lambda i: (i + 4) % 8), (True, lambda i: i ^ 1)]
)
def test_channels_that_rope_turns_together_share_a_scale(interleaved, partner):
    turned = dataclasses.replace(spec("k:fixed16"), position=Position(kind="rope", interleaved=interleaved))
    rows = inputs() * np.random.default_rng(0).uniform(0.01, 100, WIDTH)
    alone, found = channel_scales(rows, FIXED), key_scales(rows, turned, FIXED)
    pairs = np.asarray([8 * (c // 8) + partner(c % 8) for c in range(WIDTH)])
    np.testing.assert_array_equal(found, np.maximum(alone, alone[pairs]))
    assert (found != alone).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("position", ["none", "rope", "interleaved", "alibi"])
def test_a_rescaled_layer_is_the_same_layer(position, dtype, x64):
    """To the last bit of float64 arithmetic, at every weight dtype: scales are powers of two."""
    case = suites.subject("k:float64", "square", position)
    given = jax.tree.map(lambda a: a.astype(dtype), case.projections)
    keys = np.asarray(case.x.reshape(-1, 24) @ case.arrays["wk"].reshape(24, 24))
    scale = key_scales(keys * np.geomspace(1e-3, 1e3, 24), case.spec, FIXED)
    assert len(set(scale)) > 3
    other = rescaled(given, scale, case.spec)
    np.testing.assert_array_equal(
        np.asarray(other.wk, np.float64) * scale.reshape(1, 2, 12), np.asarray(given.wk, np.float64)
    )
    before, after = (attend_full(case.inputs, each, case.spec) for each in (given, other))
    assert relative_l2(after, before) < 1e-13


# Layers ---------------------------------------------------------------------------------------------------


def uneven(seed=0):
    """Keys whose channels differ by four orders: what one scale per token cannot serve."""
    wk, wv = weights(1.5, seed)
    return wk * np.geomspace(1, 1e-4, WIDTH), wv


def layer(position="none", seed=0):
    wk, wv = uneven(seed)
    draw = np.random.default_rng(seed + 10)
    arrays = {
        "wq": draw.standard_normal((WIDTH, 4, 8)) / 8,
        "wk": wk.reshape(WIDTH, 4, 8),
        "wv": wv.reshape(WIDTH, 4, 8),
        "wo": draw.standard_normal((4, 8, WIDTH)) / 8,
        "bq": draw.standard_normal((4, 8)) / 8,
        "bk": draw.standard_normal((4, 8)) / 8,
    }
    made = Projections(**{name: jnp.asarray(a, jnp.float32) for name, a in arrays.items()})
    here = dataclasses.replace(spec("kv:bf16"), position=suites.POSITIONS[position])
    return Layer(name="uneven", projections=made, spec=here)


@pytest.fixture(scope="module")
def seen():
    return calibration()


def test_uneven_channels_are_what_it_is_for(seen):
    wk, wv = uneven()
    error = {scheme: fit(wk, wv, spec(scheme), seen).held_out for scheme in ("k:int16", "k:fixed16")}
    assert error["k:fixed16"] < error["k:int16"] / 20
    assert error["k:fixed16"] < 1e-3


@pytest.mark.parametrize(
    ("scheme", "position"), [("k:fixed16", "rope"), ("k1:fixed16", "alibi"), ("k:fixed16+4", "none")]
)
def test_decoding_through_static_scales(scheme, position, seen):
    """Against attention without a cache; and the cache holds codes alone."""
    subject = layer(position)
    under = subject.under(parse_scheme(scheme))
    found = fit(subject.keys, subject.values, under, seen).solution
    made = convert(subject.projections, under, solution=found).layer
    x = jnp.asarray(inputs(24, seed=5).reshape(2, 12, WIDTH), jnp.float32)
    exact = attend_full(x, subject.projections, under)
    cache = init_cache(under, batch=2, capacity=12)
    assert cache.bytes_per_token == 2 * (WIDTH + under.scheme.extra)
    first, cache = prefill(x[:, :5], made, cache)
    rest, cache = attend_cached(x[:, 5:], made, cache)
    assert relative_l2(first, exact[:, :5]) < 1e-5
    assert relative_l2(rest, exact[:, 5:]) < 2e-3


def test_louder_inputs_than_calibrated_are_clipped_and_counted(seen):
    """The error of what was seen holds for inputs as loud; of louder ones it is that of clipping, not hidden."""
    wk, wv = uneven()
    at = spec("k:fixed16")
    found = fit(wk, wv, at, seen).solution
    errors = [value_error(loud * seen.held_out, wk, wv, found, at) for loud in (1.0, 10.0)]
    assert errors[0] < 1e-3
    assert errors[1] > 0.1
    assert key_error(10 * seen.held_out, wk, found, at) > 0.1


def test_errors_are_those_of_the_keys_and_values_themselves(seen):
    wk, wv = uneven()
    at = spec("k:fixed16+2")
    found = fit(wk, wv, at, seen).solution
    rows = np.asarray(seen.held_out, np.float64)
    cached = np.concatenate([rows @ wk / found.scale, rows @ found.extra], axis=1)
    read = np.clip(np.round(cached * 256), -32_639, 32_639) / 256
    assert key_error(rows, wk, found, at) == pytest.approx(
        relative_l2(read[:, :WIDTH] * found.scale, rows @ wk), rel=1e-3
    )
    assert value_error(rows, wk, wv, found, at) == pytest.approx(
        relative_l2(read @ found.weight, rows @ wv), rel=1e-3
    )
    assert np.abs(cached[:, WIDTH:]).max() < FIXED.peak


# Refusals, plans ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["kv:fixed16", "v:fixed16", "x:fixed16", "e:fixed16", "kr:fixed16"])
def test_only_keys_can_be_stored_so(scheme, seen):
    subject = layer("rope" if scheme[:2] == "kr" else "none")
    if scheme[0] == "e":
        subject = dataclasses.replace(subject, spec=dataclasses.replace(subject.spec, causal=False))
    chosen = parse_scheme(scheme)
    with pytest.raises(NotImplementedError, match="which only the weights of basis k can take up; use int16"):
        convert(subject.projections, subject.under(chosen))
    assert "basis k" in option(subject, chosen, seen).refused
    with pytest.raises(NotImplementedError, match="basis k"):
        scheme_error(subject, chosen, seen.held_out)


def test_without_calibration_there_is_no_scale(seen):
    subject, chosen = layer(), parse_scheme("k:fixed16")
    reason = "one static scale per channel, which calibration finds: give calibration data, or use int16"
    with pytest.raises(NotImplementedError, match=f"layer: .*{reason}"):
        convert(subject.projections, subject.under(chosen))
    with pytest.raises(NotImplementedError, match=reason):
        convert(subject.projections, subject.under(chosen), solution=Solution(weight=np.eye(WIDTH)))
    with pytest.raises(NotImplementedError, match=reason):
        scheme_error(subject, chosen, seen.held_out)
    assert reason in option(subject, chosen, None).refused
    assert option(subject, chosen, seen).refused is None


def test_a_plan_carries_the_scales(tmp_path, seen):
    subject, schemes = layer("rope"), [parse_scheme(text) for text in ("k:int16", "k:fixed16", "k:fixed16+4")]
    plan = make_plan([subject], [seen], max_error=2e-3, schemes=schemes)
    assert plan.layers[0].scheme == "k:fixed16"
    save_plan(tmp_path / "plan.json", plan)
    read = load_plan(tmp_path / "plan.json").solutions["uneven"]
    np.testing.assert_array_equal(read.scale, plan.solutions["uneven"].scale)
    error = scheme_error(subject, schemes[1], seen.held_out, solution=read)
    assert error == pytest.approx(plan.layers[0].error, rel=1e-3)
    made = convert(subject.projections, subject.under(schemes[1]), solution=read).figures
    assert made.predicted_error is None
    assert made.condition_number < 100  # of [W_K / scale]: scaling is half of the conditioning


def test_a_channel_that_is_never_used_does_no_harm():
    wk, wv = weights(1.5)
    at = dataclasses.replace(spec("k:fixed16"), kv_heads=5, heads=5)  # E = 40 > D
    wide = np.concatenate([wk, np.zeros((WIDTH, 8))], axis=1)
    target = np.concatenate([wv, np.zeros((WIDTH, 8))], axis=1)
    found = fit(wide, target, at, collect(([inputs(300, seed=n)] for n in range(5)), 1)[0])
    assert found.held_out < 1e-3
    np.testing.assert_array_equal(found.solution.scale[-8:], 1)


# The map in two parts -------------------------------------------------------------------------------------


def test_a_pair_is_the_map_to_two_to_the_minus_seventeen():
    weight = jnp.asarray(weights(1e4)[1], jnp.float32)
    pair = Pair.of(weight)
    assert (pair.high.dtype, pair.low.dtype, pair.shape) == (jnp.bfloat16, jnp.bfloat16, weight.shape)
    held = np.asarray(pair.high, np.float64) + np.asarray(pair.low, np.float64)
    assert np.max(np.abs(held / np.asarray(weight, np.float64) - 1)) <= 2.0**-17
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(pair)) == weight.nbytes


def test_six_products_are_one_in_full_precision():
    """The pair's own value times the rows: no error beyond float32's sums."""
    rows, weight = inputs(50), weights(1e4)[1]
    rows = jnp.asarray(rows, jnp.float32)
    pair = Pair.of(jnp.asarray(weight, jnp.float32))
    held = np.asarray(pair.high, np.float64) + np.asarray(pair.low, np.float64)
    exact = np.asarray(rows, np.float64) @ held
    size = np.abs(np.asarray(rows, np.float64)) @ np.abs(held)
    # A row in three parts is exact; each of six sums of M terms rounds by at most M * 2^-24 of its terms' sizes.
    found = np.asarray(through("sm,mf->sf", rows, pair), np.float64)
    assert np.all(np.abs(found - exact) <= (WIDTH + 6) * 2.0**-24 * size)
    with pytest.raises(ValueError, match="float32 rows, not bfloat16"):
        through("sm,mf->sf", rows.astype(jnp.bfloat16), pair)


@pytest.mark.parametrize("scheme", ["k:int16+4", "k1:int16+4", "kr:int16"])
def test_a_layer_with_a_pair_decodes_as_with_float32(scheme):
    subject = suites.subject(scheme, "mha", "rope", dtype="float32")
    whole = convert(subject.projections, subject.spec)
    parts = convert(subject.projections, subject.spec, pair=True).layer
    assert isinstance(parts.weights.w_kv, Pair)
    out = []
    for each in (whole.layer, parts):
        cache = init_cache(subject.spec, batch=2, capacity=9)
        out.append(attend_cached(subject.inputs, each, cache)[0])
    # Heads P [K, X U] M: M's 2^-17 reaches them multiplied by its noise gain, which the condition number bounds.
    assert 0 < relative_l2(out[1], out[0]) < 2.0**-17 * whole.figures.condition_number


def test_all_products_with_a_pair_are_of_bfloat16():
    """None that a backend could round further: both operands have 8 bits as they are, sums are float32."""
    subject = suites.subject("k:int16+4", "mha", "none", dtype="float32")
    made = convert(subject.projections, subject.spec, pair=True).layer
    rows = jnp.zeros((2, 1, 4, 28), jnp.float32)
    jaxpr = jax.make_jaxpr(lambda rows: slimjax.attention.absorb.apply_heads(rows, made.weights.w_kv))(rows)
    text = str(jaxpr)
    assert text.count("dot_general") == 6
    assert text.count("preferred_element_type=float32") == 6
    found = [e for e in jaxpr.eqns if e.primitive.name in ("dot_general", "custom_vjp_call")]
    assert len(found) <= 6
    assert not any(v.aval.dtype == jnp.float32 for e in found for v in e.invars)


def test_where_a_pair_cannot_be(x64):
    for scheme, dtype in (("x:float32", "float32"), ("v:float32", "float32"), ("k:float64", "float64")):
        subject = suites.subject(scheme, "mha", "none", dtype=dtype)
        with pytest.raises(ValueError, match="two bfloat16 parts is for bases k and kr below float64"):
            convert(subject.projections, subject.spec, pair=True)
