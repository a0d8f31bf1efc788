"""Codecs and the cache: what is stored, what it costs, and that nothing past a length is ever read."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import suites
from hypothesis import given, strategies as st

import oracle
import slimjax
from slimjax.attention.layer import attend_cached, init_cache, prefill
from slimjax.cache import CODECS, append, codec, empty, read
from slimjax.cache.layout import LaidOut, _one_by_one, _scattered
from slimjax.solve import convert

STORED = ("float32", "bf16", "fp16", "int16", "int8")


def rows(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("name", STORED)
def test_codec_against_the_oracle(name):
    x = rows((2, 5, 3, 8)) * np.logspace(-3, 3, 5, dtype=np.float32)[None, :, None, None]
    decoded = codec(name).decode(codec(name).encode(jnp.asarray(x)))
    # Codes equal the oracle's but where float32 division lands on the other side of a tie.
    expected = oracle.CODECS[name](x)
    step = {"int16": 1 / 32639, "int8": 1 / 127}.get(name, 0.0) * np.abs(x).max(axis=(2, 3), keepdims=True)
    assert np.mean(np.abs(decoded - expected) > 1e-6 * np.abs(expected)) < 0.01
    assert np.all(np.abs(decoded - expected) <= 1.001 * step + 1e-6 * np.abs(expected))


@pytest.mark.parametrize("name", STORED)
def test_bytes_are_the_formula(name):
    shape = (3, 7, 2, 10)
    codes = codec(name).encode(jnp.asarray(rows(shape)))
    measured = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(codes))
    each = {"float32": 4, "bf16": 2, "fp16": 2, "int16": 2, "int8": 1}[name]
    scales = {"int16": 1, "int8": 2}.get(name, 0)
    assert codec(name).nbytes(shape) == measured == 3 * 7 * (2 * 10 * each + 4 * scales)


@given(
    scheme=st.sampled_from(["kv:bf16", "k:int16", "v1:int8", "x1:fp16", "kv:int8"]),
    heads=st.integers(1, 4),
    size=st.sampled_from([2, 4, 6]),
    capacity=st.integers(1, 9),
)
def test_cache_bytes_per_token(scheme, heads, size, capacity):
    case = suites.subject(scheme, (heads, heads, size, heads * size), "rope", dtype="float32")
    cache = init_cache(case.spec, batch=2, capacity=capacity)
    shapes = {"kv": [(heads, size)] * 2, "x": [(1, heads * size)]}.get(
        case.spec.scheme.basis, [(heads, size)]
    )
    assert cache.nbytes == sum(
        codec(case.spec.scheme.codec).nbytes((2, capacity, *shape)) for shape in shapes
    )
    assert cache.bytes_per_token * 2 * capacity == cache.nbytes


def test_int16_splits_into_two_bytes_exactly():
    """code = 256*hi + lo with lo in [-128, 127] and hi in int8: true of every code up to the limit."""
    limit = codec("int16").limit
    code = np.arange(-limit, limit + 1)
    lo = (code + 128) % 256 - 128
    hi = (code - lo) // 256
    assert hi.min() >= -128
    assert hi.max() == 127
    assert (limit + 1 + 128) // 256 == 128  # one more and hi leaves int8
    extreme = codec("int16").encode(jnp.asarray([[[[1.0, -1.0, 0.0]]]]))
    np.testing.assert_array_equal(extreme.codes[0, 0, 0], [limit, -limit, 0])


def test_zero_rows_and_their_scale():
    for name in ("int16", "int8"):
        decoded = codec(name).decode(codec(name).encode(jnp.zeros((1, 2, 1, 4), jnp.float32)))
        np.testing.assert_array_equal(decoded, np.zeros((1, 2, 1, 4)))


# Of N(0, 1) rows, relative L2: what a scale for 64 (xquant: 128) of them leaves of so many bits.
BY_NAME = {
    "kivi": ({"bits": 4, "group": 64}, 0.1),
    "gear_l": ({"bits": 4, "group": 64}, 0.1),
    "xquant": ({"bits": 4, "group": 128}, 0.1),
    "turboquant": ({"bits": 4}, 0.1),
    "hadamard_int4": ({}, 0.1),
    "nvfp4": ({}, 0.1),
    "fp8": ({}, 0.03),
    "int8": ({}, 0.007),
    "flashq": ({"bits": 4, "group": 64}, 0.1),
}


@pytest.mark.parametrize("role", ["k", "v"])
@pytest.mark.parametrize("name", BY_NAME)
def test_every_method_is_a_codec_of_whole_rows(name, role):
    """All tokens are codes, the newest too: windows are a cache's."""
    options, error = BY_NAME[name]
    method, shape = slimjax.codec(name, **options), (2, 128, 1 if name == "xquant" else 2, 64)
    x = jnp.asarray(rows(shape))
    codes = method.encode(x, role=role)
    back = np.asarray(method.decode(codes))
    each = np.sqrt(np.mean((back - x) ** 2, axis=(0, 2, 3)) / np.mean(x**2, axis=(0, 2, 3)))  # of every token
    assert 0.6 * error < np.median(each) < 1.5 * error
    assert each.min() > 0.2 * error
    stored = sum(leaf.nbytes for leaf in jax.tree.leaves(codes))
    assert method.nbytes(shape, role) == stored < x.size * 2


def test_a_bad_codec_is_named():
    with pytest.raises(ValueError, match="did you mean 'bf16'"):
        codec("bf61")
    with pytest.raises(ValueError, match="does not take the options"):
        codec("bf16", bits=3)
    with pytest.raises(ValueError, match="64-bit mode"):
        codec("float64").encode(jnp.zeros((1, 1, 1, 1), jnp.float32))
    with pytest.raises(dataclasses.FrozenInstanceError):
        codec("int8").bits = 4
    assert hash(codec("int8")) == hash(codec("int8"))
    families = {"hadamard": "hadamard_int4", "absmax": "int4"}  # at their default width they have that name
    assert all(CODECS[name]().name == families.get(name, name) for name in CODECS)


def test_append_leaves_its_argument_alone_and_writes_only_tokens():
    stored = codec("float32")
    cache = empty({"k": (1, 2)}, stored, batch=2, capacity=4)
    first = append(cache, {"k": jnp.asarray(rows((2, 3, 1, 2)))}, stored, jnp.asarray([3, 1], jnp.int32))
    np.testing.assert_array_equal(cache.length, [0, 0])
    np.testing.assert_array_equal(first.length, [3, 1])
    np.testing.assert_array_equal(
        first.streams["k"].codes()[1, 1:], np.zeros((3, 1, 2))
    )  # padding was not written
    second = append(first, {"k": jnp.asarray(rows((2, 1, 1, 2), seed=1))}, stored)
    np.testing.assert_array_equal(second.streams["k"].codes()[0, :3], first.streams["k"].codes()[0, :3])
    np.testing.assert_array_equal(second.streams["k"].codes()[1, 1], rows((2, 1, 1, 2), seed=1)[1, 0])


def test_overflow_is_loud():
    case = suites.subject("k:float32", "mha", "none", dtype="float32")
    layer = convert(case.projections, case.spec).layer
    cache = init_cache(case.spec, batch=2, capacity=8)
    with pytest.raises(ValueError, match="9 tokens do not fit a cache of 8 slots"):
        attend_cached(case.inputs, layer, cache)
    count = jnp.asarray([9, 8], jnp.int32)
    out, full = jax.jit(attend_cached)(case.inputs, layer, cache, count=count)
    assert np.isnan(out[0]).all()  # traced code cannot raise, so the sequence that lost a token says so
    assert np.isfinite(out[1, :8]).all()
    np.testing.assert_array_equal(full.length, [9, 8])


def test_a_prefill_behind_other_tokens_and_a_wrong_count_are_loud():
    case = suites.subject("k:float32", "mha", "none", dtype="float32")
    layer = convert(case.projections, case.spec).layer
    cache = init_cache(case.spec, batch=2, capacity=30)
    _, held = jax.jit(prefill)(case.inputs, layer, cache, count=jnp.asarray([3, 0], jnp.int32))
    with pytest.raises(ValueError, match=r"needs an empty cache, this one holds \[3, 0\]"):
        prefill(case.inputs, layer, held)
    out, _ = jax.jit(prefill)(case.inputs, layer, held)
    assert np.isnan(out[0]).all()
    assert np.isfinite(out[1]).all()
    for count in (10, -1):
        counts = jnp.asarray([9, count], jnp.int32)
        with pytest.raises(ValueError, match=r"expected 0\.\.9"):
            attend_cached(case.inputs, layer, cache, count=counts)
        out, _ = jax.jit(attend_cached)(case.inputs, layer, cache, count=counts)
        assert np.isfinite(out[0]).all()
        assert np.isnan(out[1]).all()


def test_misuse_is_named():
    stored = codec("float32")
    with pytest.raises(ValueError, match="capacity=0"):
        empty({"k": (1, 2)}, stored, batch=1, capacity=0)
    with pytest.raises(ValueError, match=r"holds \['k'\].*\['v'\]"):
        append(empty({"k": (1, 2)}, stored, batch=1, capacity=1), {"v": jnp.zeros((1, 1, 1, 2))}, stored)


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("variant", suites.VARIANTS)
def test_slots_past_the_length_are_never_read(variant, name):
    """NaN (or the most negative code under a NaN scale) in every unused slot changes not one bit."""
    position = "alibi" if variant in ("v2", "x2") else "rope"
    case = suites.subject(f"{variant}:{name}", "mha", position, dtype="float32", batch=3)
    layer = convert(case.projections, case.spec).layer
    cache = init_cache(case.spec, batch=3, capacity=12)
    _, cache = attend_cached(case.inputs, layer, cache, count=jnp.asarray([9, 4, 0], jnp.int32))
    used = np.arange(12)[None, :] < np.asarray(cache.length)[:, None]

    def poison(leaf):
        worst = np.nan if jnp.issubdtype(leaf.dtype, jnp.floating) else np.iinfo(leaf.dtype).min
        keep = jnp.asarray(used.reshape(*used.shape, *(1,) * (leaf.ndim - 2)))
        return jnp.where(keep, leaf, jnp.full_like(leaf, worst))

    slots = jnp.broadcast_to(jnp.arange(cache.capacity), used.shape)
    streams = {
        stream: held.written(jax.tree.map(poison, held.codes()), slots)
        if isinstance(held, LaidOut)
        else jax.tree.map(poison, held)
        for stream, held in cache.streams.items()
    }
    poisoned = dataclasses.replace(cache, streams=streams)
    q = jnp.asarray(rows((3, 2, 4, 6)))
    step = jax.jit(slimjax.decode, static_argnums=3)
    clean, again = (step(q, c, layer.weights, case.spec) for c in (cache, poisoned))
    chex.assert_trees_all_equal(clean, again)
    assert np.isfinite(clean).all()
    np.testing.assert_array_equal(clean[2], np.zeros_like(clean[2]))  # an empty sequence weighs nothing
    rebuilt = read(poisoned, codec(name), jnp.float32)
    assert all(np.isfinite(array).all() for array in rebuilt.values())


@pytest.mark.parametrize(
    "name", ["int16", "int8", "int4", "fp8", "nvfp4", "hadamard_int4", "kivi", "flashq", "xquant"]
)
def test_a_nan_is_seen_in_a_large_array_too(name):
    """XLA's maximum on CPU loses NaN from 4,096 values on; a scale must not."""
    x = rows((1, 128, 1, 64))
    x[0, 70, 0, 5] = np.nan
    made = codec(name)
    assert np.isnan(np.asarray(made.decode(made.encode(jnp.asarray(x))))[0, 70, 0]).any()


@pytest.mark.parametrize("capacity", [5, 128, 300])  # less than lanes, lanes, and some beside whole lanes
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int16"])
def test_a_token_is_written_for_a_tpu_as_elsewhere(capacity, dtype):
    """Into the columns of what has tokens last; a slot that does not exist is not written."""
    places = [0, 1, capacity - 2, capacity - 1, capacity, capacity + 1, 2 * capacity]
    slots = jnp.asarray(places, jnp.int32)[:, None]
    leaf, fresh = (jnp.asarray(9 * rows((7, *size)), dtype) for size in ((3, capacity), (1, 3)))
    wanted = _scattered(leaf, fresh, slots)
    np.testing.assert_array_equal(_one_by_one(leaf, fresh, slots), wanted)
    np.testing.assert_array_equal(wanted[4:], leaf[4:])
    assert np.all(np.any(np.asarray(wanted[:4] != leaf[:4]), axis=(1, 2)))
