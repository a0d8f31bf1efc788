"""The public decode call: its precision as written in the program, its refusals, and how often it compiles."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import suites
from hypothesis import given, strategies as st
from jax.extend.core import Literal

import slimjax
from slimjax.attention.layer import attend_cached, init_cache
from slimjax.kernels import api
from slimjax.numerics import relative_l2
from slimjax.solve import convert

HIGHEST = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)


def products(jaxpr, derived=frozenset()):
    """Every dot_general of a jaxpr and its sub-jaxprs, with whether an operand comes from ``derived``.

    A value that is computed from a derived one by anything but a product is derived too.
    """
    derived = set(derived)
    for equation in jaxpr.eqns:
        taken = [not isinstance(v, Literal) and v in derived for v in equation.invars]
        inner = [
            getattr(p, "jaxpr", p)
            for p in equation.params.values()
            if hasattr(getattr(p, "jaxpr", p), "eqns")
        ]
        for sub in inner:
            yield from products(sub, {v for v, t in zip(sub.invars, taken, strict=True) if t})
        if equation.primitive.name == "dot_general":
            yield equation, any(taken)
        elif any(taken) and not inner:
            derived.update(equation.outvars)


def imprecise(function, *arguments, weight=None):
    """Products in ``function`` below the stated precision, as text; ``weight``: which argument is W_KV, if any."""
    jaxpr = jax.make_jaxpr(function)(*arguments)
    derived = set() if weight is None else {jaxpr.jaxpr.invars[weight]}
    found = []
    for equation, with_weight in products(jaxpr.jaxpr, derived):
        dtypes = {v.aval.dtype for v in equation.invars}
        if equation.params["precision"] != HIGHEST:
            found.append(f"default precision: {equation}")
        if equation.outvars[0].aval.dtype != jnp.float32:
            found.append(f"sums not in float32: {equation}")
        if with_weight and dtypes != {jnp.dtype("float32")}:
            found.append(f"W_KV rounded: {equation}")
    # A walk that meets no product, or none with the weight, would find nothing wrong anywhere.
    assert any(with_weight or weight is None for _, with_weight in products(jaxpr.jaxpr, derived))
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("variant", "position", "name"),
    [
        ("kv", "rope", None),
        ("k1", "rope", "w_kv"),
        ("k2", "rope", "w_kv"),
        ("k2", "alibi", "w_kv"),
        ("k:+3", "rope", "w_kv"),
        ("kr", "rope", "w_kv"),
        ("v1", "rope", "w_vk"),
        ("v2", "alibi", "w_vk"),
        ("x1", "rope", "wv"),
        ("x2", "fire", "wk"),
    ],
)
@pytest.mark.parametrize("codec", ["bf16", "int16"])
def test_every_product_is_at_the_stated_precision(variant, position, name, codec, dtype):
    basis, _, extra = variant.partition(":")
    case = suites.subject(f"{basis}:{codec}{extra}", "mha", position, dtype=dtype)
    weights = convert(case.projections, case.spec).layer.weights
    cache = init_cache(case.spec, batch=2, capacity=8)
    q = jnp.zeros((2, 1, 4, 6), jnp.float32)

    def step(weight, q):
        used = weights if name is None else dataclasses.replace(weights, **{name: weight})
        return slimjax.decode(q, cache, used, case.spec)

    weight = jnp.zeros(()) if name is None else getattr(weights, name)
    assert imprecise(step, weight, q, weight=None if name is None else 0) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["wk", "wv"])
@pytest.mark.parametrize("variant", ["e", "e1", "h", "h1"])
@pytest.mark.parametrize("codec", ["bf16", "int16"])
def test_every_product_with_a_shared_cross_cache_is_too(variant, name, codec, dtype):
    """Bases e and h are read through `attend_filled`; both projections are absorbed or rebuilt from."""
    case = suites.subject(f"{variant}:{codec}", "mha", "none", dtype=dtype, causal=False)
    first = suites.subject("kv:bf16", "mha", "none", dtype=dtype, seed=1).projections
    layer = convert(case.projections, case.spec, first=first).layer
    cache = init_cache(case.spec, batch=2, capacity=8)

    def step(weight, x):
        weights = dataclasses.replace(layer.weights, **{name: weight})
        return slimjax.attend_filled(x, dataclasses.replace(layer, weights=weights), cache)

    assert imprecise(step, getattr(layer.weights, name), case.inputs[:, :1], weight=0) == []


def test_the_walk_sees_what_it_is_for():
    x, weight = jnp.zeros((3, 4)), jnp.zeros((4, 5))
    assert "default precision" in imprecise(lambda w, x: x @ w, weight, x, weight=0)[0]

    def rounded(w, x):
        low = (x.astype(jnp.bfloat16), w.astype(jnp.bfloat16))
        return jnp.matmul(*low, precision="highest", preferred_element_type=jnp.float32)

    assert "W_KV rounded" in imprecise(jax.jit(rounded), weight, x, weight=0)[0]

    def short(w, x):
        return jnp.matmul(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), precision="highest")

    assert any("sums not in float32" in line for line in imprecise(short, weight, x, weight=0))


def test_one_trace_for_all_lengths_and_tokens():
    case = suites.subject("k:int16", "mha", "rope", dtype="float32")
    layer = convert(case.projections, case.spec).layer
    step = jax.jit(chex.assert_max_traces(attend_cached, n=1))
    cache = init_cache(case.spec, batch=2, capacity=16)
    for token in range(6):
        out, cache = step(case.inputs[:, token : token + 1], layer, cache)
    ragged = dataclasses.replace(cache, length=jnp.asarray([2, 5], jnp.int32))
    step(case.inputs[:, :1], layer, ragged)
    assert np.isfinite(out).all()


def test_run_twice_bit_equal():
    case = suites.subject("k:int16", "mha", "rope", dtype="bfloat16")
    layer = convert(case.projections, case.spec).layer
    cache = init_cache(case.spec, batch=2, capacity=9)
    runs = [jax.jit(attend_cached)(case.inputs, layer, cache)[0] for _ in range(2)]
    chex.assert_trees_all_equal(*runs)


@given(
    heads=st.integers(1, 5),
    group=st.integers(1, 3),
    size=st.sampled_from([2, 4, 10]),
    width=st.integers(1, 40),
    batch=st.integers(1, 3),
    chunks=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    variant=st.sampled_from(suites.VARIANTS),
    position=st.sampled_from(["none", "rope", "alibi"]),
)
def test_any_shape_equals_the_oracle_or_is_refused(
    heads, group, size, width, batch, chunks, variant, position
):
    layout = (heads * group, heads, size, width)
    refused = (variant in ("k1", "k2", "v1", "v2") and heads * size < width) or (
        variant in ("v2", "x2") and position == "rope"
    )
    with jax.enable_x64(True):
        case = suites.subject(f"{variant}:float64", layout, position, batch=batch, tokens=sum(chunks))
        if refused:
            with pytest.raises(NotImplementedError):
                convert(case.projections, case.spec)
            return
        layer = convert(case.projections, case.spec).layer
        cache, out, done = init_cache(case.spec, batch=batch, capacity=sum(chunks)), [], 0
        for chunk in chunks:
            y, cache = jax.jit(attend_cached)(case.inputs[:, done : done + chunk], layer, cache)
            out.append(y)
            done += chunk
        expected = suites.oracle_output(case)
        assert relative_l2(np.concatenate(out, axis=1), expected) < 1e-12 * max(case.condition, 10.0)


def test_refusals_and_wrong_calls():
    case = suites.subject("k:int16", "mha", "rope", dtype="float32")
    weights = convert(case.projections, case.spec).layer.weights
    cache = init_cache(case.spec, batch=2, capacity=4)
    q = jnp.zeros((2, 1, 4, 6))
    with pytest.raises(ValueError, match="unknown implementation 'refrence'; did you mean 'reference'"):
        slimjax.decode(q, cache, weights, case.spec, implementation="refrence")
    with pytest.raises(ValueError, match="q has N, H = 3, 6, the spec 4, 6"):
        slimjax.decode(q[:, :, :3], cache, weights, case.spec)
    with pytest.raises(ValueError, match="q has 1 sequences, the cache 2"):
        slimjax.decode(q[:1], cache, weights, case.spec)
    with pytest.raises(ValueError, match=r"needs weights\.w_kv"):
        slimjax.decode(q, cache, slimjax.DecodeWeights(), case.spec)
    rotary = dataclasses.replace(case.spec, scheme=slimjax.parse_scheme("x:int16"))
    with pytest.raises(NotImplementedError, match="use x1"):
        slimjax.decode(q, cache, weights, rotary)
    with pytest.raises(ValueError, match="is not a multiple"):
        dataclasses.replace(case.spec, kv_heads=3)
    with pytest.raises(ValueError, match="RoPE needs an even head size, got head_dim=5"):
        dataclasses.replace(case.spec, head_dim=5)
    with pytest.raises(ValueError, match="expected a Scheme"):
        dataclasses.replace(case.spec, scheme="k:int16")
    assert dataclasses.replace(case.spec, dtype=jnp.bfloat16) == dataclasses.replace(
        case.spec, dtype="bfloat16"
    )


@pytest.mark.parametrize("other", ["kv:int16", "x1:int16", "k:int8", "k:bf16"])
def test_a_cache_of_another_scheme_is_refused(other):
    case = suites.subject("k:int16", "mha", "rope", dtype="float32")
    weights = convert(case.projections, case.spec).layer.weights
    spec = dataclasses.replace(case.spec, scheme=slimjax.parse_scheme(other))
    with pytest.raises(ValueError, match=r"the cache holds .* scheme k:int16 of this spec needs"):
        slimjax.decode(jnp.zeros((2, 1, 4, 6)), init_cache(spec, batch=2, capacity=4), weights, case.spec)
    fewer = dataclasses.replace(case.spec, scheme=spec.scheme, kv_heads=2, width=12)
    with pytest.raises(ValueError, match="the cache holds"):
        slimjax.decode(jnp.zeros((2, 1, 4, 6)), init_cache(fewer, batch=2, capacity=4), weights, spec)


def test_every_reason_is_reported_where_no_implementation_will(monkeypatch):
    def refusing(reason):
        def decode(*_):
            raise NotImplementedError(reason)

        return decode

    monkeypatch.setattr(api, "IMPLEMENTATIONS", {"first": refusing("too old"), "second": refusing("too new")})
    monkeypatch.setattr(api, "_ORDER", {jax.default_backend(): ("first", "second")})
    case = suites.subject("kv:bf16", "mha", "rope", dtype="float32")
    cache = init_cache(case.spec, batch=2, capacity=4)
    with pytest.raises(NotImplementedError, match="first: too old; second: too new"):
        slimjax.decode(jnp.zeros((2, 1, 4, 6)), cache, slimjax.DecodeWeights(), case.spec)
    with pytest.raises(NotImplementedError, match="too new"):
        slimjax.decode(
            jnp.zeros((2, 1, 4, 6)), cache, slimjax.DecodeWeights(), case.spec, implementation="second"
        )


def test_a_named_implementation_gives_what_none_gives():
    case = suites.subject("k:int16", "mha", "rope", dtype="float32")
    layer = convert(case.projections, case.spec).layer
    _, cache = attend_cached(case.inputs, layer, init_cache(case.spec, batch=2, capacity=9))
    q = jnp.ones((2, 2, 4, 6))
    results = [
        slimjax.decode(q, cache, layer.weights, case.spec, implementation=i) for i in (None, "reference")
    ]
    chex.assert_trees_all_equal(*results)
