"""A sequence in several caches: ``decode_part`` of each, put together by ``combine``, is ``decode`` of the whole."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import suites

import oracle
import slimjax
from slimjax.attention.layer import append_rows, init_cache
from slimjax.numerics import MASK, relative_l2
from slimjax.solve import convert

BEFORE, TOKENS = 64, 91  # of the first part, and of the whole; FlashQ's tiles have 64
WIDE = (4, 4, 16, 64)


def made(scheme, position, dtype, tokens=1, length=TOKENS, **options):
    """A case's layer, the queries of its last tokens, its whole cache and the caches of its two parts."""
    case = suites.subject(scheme, WIDE, position, dtype=dtype, tokens=length, biases=False, **options)
    layer = convert(case.projections, case.spec).layer

    @jax.jit
    def cache_of(rows):
        return append_rows(rows, layer, init_cache(case.spec, batch=2, capacity=128), None, prompt=True)

    q = oracle.project(case.x[:, -tokens:], case.arrays["wq"], None)
    caches = [cache_of(case.inputs[:, part]) for part in (slice(None), slice(BEFORE), slice(BEFORE, None))]
    return case, layer, jnp.asarray(q, dtype), caches


def parts_of(case, layer, q, caches, implementation=None):
    """Answers and log-sums of the two parts."""
    before = jnp.full(2, case.x.shape[1] - q.shape[1], jnp.int32)  # behind the first part's end
    earlier = dataclasses.replace(case.spec, causal=False) if "flashq" in str(case.spec.scheme) else case.spec

    @jax.jit
    def both(q, caches, weights):
        found = [
            slimjax.decode_part(q, cache, weights, spec, start=start, implementation=implementation)
            for cache, spec, start in zip(caches, (earlier, case.spec), (before, None), strict=True)
        ]
        return [jnp.stack(each) for each in zip(*found, strict=True)]

    return both(q, caches[1:], layer.weights)


def whole_of(case, layer, q, caches):
    """``decode`` of all tokens."""
    return jax.jit(lambda *given: slimjax.decode(*given, case.spec))(q, caches[0], layer.weights)


def true_log_sums(case, q):
    """[B, T, N] in float64, of the whole sequence."""
    spec, tokens = case.spec, q.shape[1]
    at = np.arange(TOKENS - tokens, TOKENS)
    k = oracle.project(case.x, case.arrays["wk"], None)
    q = np.asarray(q, np.float64)
    if suites.rope_of(spec):
        q = oracle.rotate(q, at, *suites.rope_of(spec))
        k = oracle.rotate(k, np.arange(TOKENS), *suites.rope_of(spec))
    scores = np.einsum("btnh,bsnh->bnts", q, k) * spec.head_dim**-0.5
    bias = suites.oracle_bias(case, at, np.arange(TOKENS))
    scores = scores + (0 if bias is None else bias)
    if spec.softcap is not None:
        scores = spec.softcap * np.tanh(scores / spec.softcap)
    reach = at[:, None] - np.arange(TOKENS)
    seen = (reach >= 0) & (reach < (spec.window or TOKENS))
    return np.moveaxis(np.log(np.sum(np.where(seen, np.exp(scores), 0), axis=-1)), 1, 2)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize(
    ("scheme", "position", "options"),
    [
        ("kv:float64", "rope", {}),
        ("kv:float64", "t5", {}),
        ("kv:float64", "alibi", {"window": 40}),
        ("kv:float64", "none", {"softcap": 3.0}),
        ("k2:float64", "rope", {}),
        ("k1:float64", "none", {}),
        ("x2:float64", "none", {}),
    ],
)
def test_parts_make_the_whole(scheme, position, options, tokens, x64):
    case, layer, q, caches = made(scheme, position, "float64", tokens, **options)
    answers, sums = parts_of(case, layer, q, caches)
    mixed, whole_sum = slimjax.combine(answers, sums)
    assert relative_l2(mixed, whole_of(case, layer, q, caches)) < 1e-12
    np.testing.assert_allclose(whole_sum, true_log_sums(case, q), atol=1e-11)


@pytest.mark.parametrize("scheme", ["kv:flashq4", "kv:flashq2-4", "k2:flashq4", "kv:kivi4/32"])
def test_tiles_of_two_caches(scheme):
    """Parts begin and end where tiles do, so that tiles are the whole's; P's codes know no tile but their own."""
    case, layer, q, caches = made(scheme, "none", "float32", length=2 * BEFORE)
    mixed, _ = slimjax.combine(*parts_of(case, layer, q, caches))
    # float32 through a map of keys to values, whose condition number is some 100.
    assert relative_l2(mixed, whole_of(case, layer, q, caches)) < (1e-5 if scheme.startswith("k2") else 1e-6)


@pytest.mark.parametrize("scheme", ["kv:bf16", "k2:int16", "x2:bf16", "kv:flashq4", "k2:flashq4"])
def test_kernels_have_the_log_sums_of_the_reference(scheme):
    case, layer, q, caches = made(scheme, "none", "bfloat16", tokens=2)
    q = q.astype(jnp.bfloat16)
    wanted, found = (parts_of(case, layer, q, caches, name) for name in ("reference", "pallas_tpu"))
    assert (
        relative_l2(*(each[0].astype(jnp.float32) for each in (found, wanted))) < 1e-2
    )  # answers are bfloat16
    np.testing.assert_allclose(found[1], wanted[1], atol=2e-2)  # of scores of bfloat16 queries


def test_a_part_without_keys_counts_nothing(x64):
    case, layer, q, caches = made("kv:float64", "rope", "float64")
    nothing = dataclasses.replace(caches[1], length=jnp.zeros(2, jnp.int32))
    empty, sums = slimjax.decode_part(q, nothing, layer.weights, case.spec)
    assert not np.any(empty)
    assert np.all(np.asarray(sums) == MASK)
    whole, its_sum = slimjax.decode_part(q, caches[0], layer.weights, case.spec)
    mixed, mixed_sum = slimjax.combine(jnp.stack([empty, whole]), jnp.stack([sums, its_sum]))
    np.testing.assert_array_equal(mixed, whole)
    np.testing.assert_array_equal(mixed_sum, its_sum)


@pytest.mark.parametrize(
    ("scheme", "start", "reason"),
    [
        ("kv:bf16@sas", None, "put together by sums of exponentials, which sas"),
        ("kv:bf16@sparse(0.01)", None, "which sparse"),
        ("kv:bf16#sage", None, "log-sums are not known"),
        ("kv:bf16", "fire", "'fire' depends on where in the whole sequence"),
        ("kv:flashq4", [70, 70], "int8 takes queries behind a cache's end for padding"),
    ],
)
def test_what_cannot_be_put_together_is_refused(scheme, start, reason):
    case, layer, q, caches = made(scheme, "fire" if start == "fire" else "none", "float32")
    start = jnp.asarray(start, jnp.int32) if isinstance(start, list) else None
    with pytest.raises(NotImplementedError, match=reason):
        slimjax.decode_part(q, caches[0], layer.weights, case.spec, start=start)


def test_log_sums_nobody_takes_cost_nothing():
    case, layer, q, caches = made("k2:bf16", "rope", "float32")

    def flops(function):
        compiled = jax.jit(function).lower(q, caches[0], layer.weights).compile()
        return compiled.cost_analysis()["flops"], compiled.cost_analysis()["transcendentals"]

    alone = flops(lambda *a: slimjax.decode(*a, case.spec))
    both = flops(lambda *a: slimjax.decode_part(*a, case.spec))
    assert alone[1] < both[1]
