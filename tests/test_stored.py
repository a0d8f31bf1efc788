"""What solves and selectors take a cache to store is what it stores, each stream by its own codec."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_remedies import calibration, inputs, spec, weights

from slimjax import Projections, convert
from slimjax.attention.layer import init_cache, prefill
from slimjax.cache import append, codec, codec_of, empty, read
from slimjax.numerics import relative_l2
from slimjax.solve.convert import round_trip, stored, through_codec
from slimjax.solve.fit import fit, rounding_noise, value_error
from slimjax.solve.options import Layer, option

grow = jax.jit(append, static_argnums=2)
look = jax.jit(read, static_argnums=(1, 2))


@pytest.mark.parametrize(
    "made",
    [codec("gear_l", bits=2, group=32), codec("flashq", bits=2, group=32), codec("flashq", bits="2-4", group=32),
     codec("flashq", bits=3, group=32, rank=2), codec("kivi", bits=2, group=32, window=32), codec("hadamard", bits=3)],
    ids=["gear", "flashq", "mixed", "corrected", "kivi", "hadamard"],
)  # fmt: skip
@pytest.mark.parametrize("role", ["k", "v"])
def test_a_round_trip_is_what_a_cache_gives_back_of_a_first_chunk(made, role):
    draw = np.random.default_rng(0)
    # As bfloat16, which KIVI's buffer keeps its tokens in.
    x = jnp.asarray(draw.standard_normal((2, 96, 2, 16)), jnp.bfloat16).astype(jnp.float32)
    cache = grow(empty({role: (2, 16)}, made, batch=2, capacity=97), {role: x}, made)
    cache = grow(cache, {role: x[:, :1]}, made)  # KIVI encodes its last window when another token comes
    found, expected = look(cache, made, "float32")[role][:, :96], round_trip(x, made, role)
    assert np.mean(np.abs(np.asarray(found - expected)) > 1e-5) < 0.01  # a tie may fall either way


TEXT = "k:flashq4(extra=flashq8)/32+4"


def test_each_stream_has_the_noise_of_its_own_codec():
    wk, _ = weights(1e3)
    draw = np.random.default_rng(4)
    extra = draw.standard_normal((32, 4))
    rows = inputs(256)
    own = rounding_noise(rows, wk, extra, spec(TEXT))
    same = rounding_noise(rows, wk, extra, spec("k:flashq4/32+4"))
    np.testing.assert_array_equal(own[:32], same[:32])
    assert np.all(own[32:] < same[32:] / 10)
    coordinates = rows @ extra
    plain = codec("flashq", bits=8, group=32)
    read_back = round_trip(jnp.asarray(coordinates, jnp.float32).reshape(1, 256, 1, 4), plain, "k")
    expected = np.mean((np.asarray(read_back).reshape(256, 4) - coordinates) ** 2, axis=0)
    np.testing.assert_allclose(own[32:], expected, rtol=1e-3)
    only = through_codec(coordinates, spec(TEXT), 1, stream="r")
    np.testing.assert_array_equal(
        only, stored(np.concatenate([rows @ wk, coordinates], 1), spec(TEXT))[:, 32:]
    )


def test_wider_coordinates_make_low_bit_keys_better():
    """At R = 4 of 32 and 4 bits of keys; and the solve's figure is what the cache's own rows give."""
    wk, wv = weights(30)
    data = calibration()
    errors = {}
    for text in ("k:flashq4/32+4", TEXT, "k:flashq4(extra=int16)/32+4"):
        found = fit(wk, wv, spec(text), data)
        assert found.solution.how.startswith("noise-aware")
        assert found.held_out < found.exact
        errors[text] = found.held_out
    assert errors[TEXT] < errors["k:flashq4/32+4"]
    assert errors["k:flashq4(extra=int16)/32+4"] == pytest.approx(errors[TEXT], rel=0.05)


def test_the_layer_reads_what_the_solve_predicted():
    wk, wv = weights(30)
    shaped = [jnp.asarray(each.reshape(32, 4, 8), jnp.float32) for each in (wk, wk, wv)]
    projections = Projections(wq=shaped[0], wk=shaped[1], wv=shaped[2], wo=jnp.zeros((4, 8, 32)))
    layer = Layer(name="layer", projections=projections, spec=spec("kv:bf16"))
    chosen = option(layer, spec(TEXT).scheme, calibration())
    assert chosen.solution is not None
    made = convert(projections, spec(TEXT), solution=chosen.solution)
    x = inputs(128, seed=9)
    cache = init_cache(made.layer.spec, batch=1, capacity=128)
    _, cache = jax.jit(prefill)(jnp.asarray(x, jnp.float32)[None], made.layer, cache)
    held = look(cache, codec_of(made.layer.spec.scheme), "float32")
    row = np.concatenate([np.asarray(held[name], np.float64).reshape(128, -1) for name in ("k", "r")], axis=1)
    found = relative_l2(row @ chosen.solution.weight, x @ wv)
    assert found == pytest.approx(value_error(x, wk, wv, chosen.solution, spec(TEXT)), rel=1e-3)
    # 4.5 bits of keys (4 heads: 2 bytes a channel and a scale in 32 tokens) and 8 of four coordinates.
    assert chosen.bytes_per_token == 32 / 2 + (32 * 2 + 4 * 4) / 32 + 4 + 4 / 32
    plain = option(layer, dataclasses.replace(spec(TEXT).scheme, options=()), calibration())
    assert plain.bytes_per_token == 32 / 2 + (32 * 2 + 4 * 4) / 32 + 4 / 2 + (4 * 2 + 4) / 32
