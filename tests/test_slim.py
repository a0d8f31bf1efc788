"""The rows of slim attention beyond one square self-attention layer, against the oracle in float64.

Extra coordinates, rotated keys, caches shared by the cross-attention of all layers, softmax sparsity.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import suites

import oracle
import slimjax
from slimjax.attention import softmax
from slimjax.attention.layer import attend_cached, init_cache, prefill
from slimjax.attention.positions import unrotate
from slimjax.attention.reference import geometry, scores, weights as score_weights
from slimjax.attention.sparsity import skip_rates
from slimjax.numerics import relative_l2
from slimjax.solve import convert

step, fill_first = jax.jit(attend_cached), jax.jit(prefill)


def decoded(case, chunks=(1,) * 9, *, prefilled=False):
    """All tokens of a case through its cache, in chunks of these sizes, the first by `prefill` if so asked."""
    layer = convert(case.projections, case.spec).layer
    cache = init_cache(case.spec, batch=2, capacity=case.x.shape[1])
    out, done = [], 0
    for size in chunks:
        call = fill_first if prefilled and not done else step
        y, cache = call(case.inputs[:, done : done + size], layer, cache)
        out.append(np.asarray(y))
        done += size
    assert done == case.x.shape[1]
    return np.concatenate(out, axis=1), cache


@pytest.mark.parametrize("position", ["none", "rope", "alibi"])
@pytest.mark.parametrize("scheme", ["k:float64+5", "k1:float64+5"])
def test_extra_coordinates_change_nothing_in_exact_arithmetic(scheme, position, x64):
    case = suites.subject(scheme, "mha", position)
    out, cache = decoded(case)
    assert relative_l2(out, suites.oracle_output(case)) < 1e-11
    assert cache.streams["r"].leaves[0].shape == (2, 5, 9)


@pytest.mark.parametrize("scheme", ["k:float64+6", "k1:float64+9"])
def test_keys_narrower_than_the_model_with_the_coordinates_they_lack(scheme, x64):
    """GQA with D/2 < E < D: K and D - E coordinates of X determine V."""
    layout = (6, 3, 6, 24)
    case = suites.subject(scheme, layout, "rope")
    assert relative_l2(decoded(case)[0], suites.oracle_output(case)) < 1e-10


@pytest.mark.parametrize("prefilled", [False, True], ids=["cached", "prefilled"])
@pytest.mark.parametrize("chunks", [(9,), (4, 4, 1), (1,) * 9], ids=str)
@pytest.mark.parametrize(
    ("scheme", "layout"),
    [
        ("k:float64+5", "mha"),
        ("kr:float64", "mha"),
        ("kr1:float64+4", "mha"),
        ("k1:float64+6", (6, 3, 6, 24)),
    ],
)
def test_tokens_may_come_in_any_chunks(scheme, layout, chunks, prefilled, x64):
    """Extra coordinates, rotated keys and narrow keys, whose rows a prompt and a step both write and read."""
    case = suites.subject(scheme, layout, "rope")
    out, cache = decoded(case, chunks, prefilled=prefilled)
    assert relative_l2(out, suites.oracle_output(case)) < 1e-10
    assert np.array_equal(cache.length, [9, 9])


@pytest.mark.parametrize(
    ("scheme", "layout", "reason"),
    [
        ("k:float64+5", (6, 3, 6, 24), r"keys of width E = 18 and 5 extra .* add \+6 or more"),
        ("k:float64+12", (4, 2, 6, 24), "12 keys and 12 extra coordinates are no fewer than the 2"),
        ("k:float64", (4, 2, 6, 24), "use kv or x"),
    ],
)
def test_too_few_or_too_many_coordinates_are_refused(scheme, layout, reason, x64):
    case = suites.subject(scheme, layout, "none")
    with pytest.raises(NotImplementedError, match=reason):
        convert(case.projections, case.spec)


def test_the_coordinates_are_those_that_the_keys_lose(x64):
    """W_K with three null directions: no map is exact without them, and R = 3 is enough."""
    case = suites.subject("k:float64+3", "mha", "rope")
    left, values, right = np.linalg.svd(case.arrays["wk"].reshape(24, 24))
    values[-3:] = 0
    singular = ((left * values) @ right).reshape(24, 4, 6)
    case = dataclasses.replace(case, arrays=case.arrays | {"wk": singular})
    assert relative_l2(decoded(case)[0], suites.oracle_output(case)) < 1e-10
    for rank in (0, 2):
        scheme = slimjax.parse_scheme(f"k:float64+{rank}" if rank else "k:float64")
        with pytest.raises(NotImplementedError, match="singular"):
            convert(case.projections, dataclasses.replace(case.spec, scheme=scheme))


@pytest.mark.parametrize("position", ["rope", "interleaved"])
@pytest.mark.parametrize("scheme", ["kr:float64", "kr1:float64", "kr:float64+4"])
def test_rotated_keys(scheme, position, x64):
    case = suites.subject(scheme, "mha", position)
    assert relative_l2(decoded(case)[0], suites.oracle_output(case)) < 1e-11


@pytest.mark.parametrize("position", ["none", "alibi", "learned"])
def test_rotated_keys_without_a_rotation_are_refused(position, x64):
    case = suites.subject("kr:float64", "mha", position)
    with pytest.raises(NotImplementedError, match=r"use k$"):
        convert(case.projections, case.spec)


def test_rows_that_no_head_weighs_are_not_turned_back(x64, monkeypatch):
    """Un-rotation of every other row is replaced by NaN: the output must not see it."""
    from slimjax.attention import kr

    case = suites.subject("kr:float64@sparse(0.2)", "mha", "rope")
    layer = convert(case.projections, case.spec).layer
    cache = init_cache(case.spec, batch=2, capacity=9)
    _, cache = attend_cached(case.inputs[:, :8], layer, cache)
    expected, _ = attend_cached(case.inputs[:, 8:], layer, cache)
    weights = last_weights(case)
    dead = jnp.asarray(~(weights > 0).any(axis=(1, 2)))
    assert dead.any()
    assert not dead.all()

    def poisoned(rows, positions, position):
        return jnp.where(dead[:, :, None, None], jnp.nan, unrotate(rows, positions, position))

    monkeypatch.setattr(kr, "unrotate", poisoned)
    out, _ = attend_cached(case.inputs[:, 8:], layer, cache)
    np.testing.assert_array_equal(out, expected)


def last_weights(case):
    """The oracle's weights of the last query, [B, N, 1, S], thresholded as the scheme says."""
    a, rope = case.arrays, suites.rope_of(case.spec)
    tokens = case.x.shape[1]
    q = oracle.rotate(oracle.project(case.x[:, -1:], a["wq"], a["bq"]), [tokens - 1], *rope)
    k = oracle.rotate(oracle.project(case.x, a["wk"], a["bk"]), np.arange(tokens), *rope)
    raw = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1])
    p = np.exp(raw - raw.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return np.where(p < 0.2, 0.0, p)


@pytest.mark.parametrize("scheme", ["kv", "k1", "k"])
def test_a_sparse_softmax_drops_what_it_says(scheme, x64):
    case = suites.subject(f"{scheme}:float64@sparse(0.2)", "mha", "rope")
    p = last_weights(case)
    values = oracle.project(case.x, case.arrays["wv"], case.arrays["bv"])
    # The value bias is folded away and so never dropped: weights that sum to less than 1 leave all of it.
    values = values - case.arrays["bv"]
    heads = np.einsum("bnts,bsnh->btnh", p, values) + case.arrays["bv"]
    expected = oracle.merge(heads, case.arrays["wo"], case.arrays["bo"])
    assert relative_l2(decoded(case)[0][:, -1:], expected) < 1e-11


def test_a_threshold_of_zero_is_exact(x64):
    sparse, exact = (
        decoded(suites.subject(f"k:float64{end}", "mha", "alibi"))[0] for end in ("@sparse(0)", "")
    )
    np.testing.assert_array_equal(sparse, exact)


def test_skip_rates_against_counting(x64):
    case = suites.subject("kv:float64@sparse(0.15)", "gqa", "rope")
    a, spec = case.arrays, case.spec
    tokens = case.x.shape[1]
    steps = np.arange(tokens)
    turned = [oracle.rotate(oracle.project(case.x, a[n]), steps, *suites.rope_of(spec)) for n in ("wq", "wk")]
    q, k = map(jnp.asarray, turned)
    positions = jnp.arange(tokens, dtype=jnp.int32)
    everywhere = jnp.broadcast_to(positions[None], (2, tokens))
    where = geometry(everywhere, positions, jnp.full((2,), tokens, jnp.int32), None, spec)
    p = score_weights(scores(q, k), where, spec)
    rates = skip_rates(p, where.mask, spec.kv_heads)
    p = np.asarray(p)
    head, group, row, pairs = 0, 0, 0, 0
    for b, t in np.ndindex(2, tokens):
        for s in range(t + 1):
            zero = p[b, :, t, s] == 0
            head += zero.sum()
            group += sum(zero[2 * g : 2 * g + 2].all() * 2 for g in range(2))
            row += zero.all() * 4
            pairs += 4
    found = [float(rate) for rate in (rates.head, rates.group, rates.row)]
    np.testing.assert_allclose(found, [head / pairs, group / pairs, row / pairs], rtol=1e-6)
    assert found[0] > found[1] > found[2] > 0


@pytest.mark.parametrize(
    ("text", "problem"),
    [("sparse(2)", "threshold"), ("sparse(x)", "expected numbers"), ("sparse(1,2)", "does not take 2"),
     ("exact(1)", "does not take 1"), ("spars(1)", "did you mean 'sparse"), ("sparse(nan)", "finite")],
)  # fmt: skip
def test_wrong_softmaxes(text, problem):
    with pytest.raises(ValueError, match=problem):
        softmax.softmax_of(text)


# Cross-attention ------------------------------------------------------------------------------------------


def crossing(scheme, layout="mha", seed=0):
    """A cross-attention layer, its decoder inputs x [2, 3, D], and its memory [2, 7, D]."""
    case = suites.subject(scheme, layout, "none", tokens=10, seed=seed, causal=False)
    return case, jnp.asarray(case.x[:, :3]), jnp.asarray(case.x[:, 3:])


def cross_oracle(case, x, memory):
    a = case.arrays
    out = oracle.attend(
        oracle.project(x, a["wq"], a["bq"]),
        oracle.project(memory, a["wk"], a["bk"]),
        oracle.project(memory, a["wv"], a["bv"]),
        start=0,
        length=memory.shape[1],
        causal=False,
    )
    return oracle.merge(out, a["wo"], a["bo"])


@pytest.mark.parametrize("scheme", ["kv", "k", "k1", "k:+4", "v", "v1", "x", "x1", "e", "e1", "h", "h1"])
@pytest.mark.parametrize("layout", ["mha", "gqa", "wide"])
def test_cross_attention(scheme, layout, x64):
    basis, _, more = scheme.partition(":")
    case, x, memory = crossing(f"{basis}:float64{more}", layout)
    expected = cross_oracle(case, x, memory)
    assert relative_l2(slimjax.cross_full(x, memory, case.projections, case.spec), expected) < 1e-13
    if layout == "gqa" and basis[0] in "kvh" and basis != "kv":
        with pytest.raises(NotImplementedError, match="GQA"):
            convert(case.projections, case.spec)
        return
    layer = convert(case.projections, case.spec).layer
    cache = slimjax.fill(memory, layer, init_cache(case.spec, batch=2, capacity=7))
    whole = slimjax.attend_filled(x, layer, cache)
    assert relative_l2(whole, expected) < 1e-10
    one = [slimjax.attend_filled(x[:, t : t + 1], layer, cache) for t in range(3)]
    np.testing.assert_allclose(np.concatenate(one, axis=1), whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("basis", ["e", "h"])
@pytest.mark.parametrize("option", ["", "1"])
def test_one_cache_serves_every_layer(basis, option, x64):
    """Filled by the first layer, read by three with weights of their own."""
    cases = [crossing(f"{basis}{option}:float64", seed=seed)[0] for seed in range(3)]
    _, x, memory = crossing(f"{basis}:float64")
    first = cases[0].projections
    layers = [convert(case.projections, case.spec, first=first).layer for case in cases]
    cache = slimjax.fill(memory, layers[0], init_cache(cases[0].spec, batch=2, capacity=7))
    assert cache.bytes_per_token == 24 * 8
    for case, layer in zip(cases, layers, strict=True):
        expected = cross_oracle(case, x, memory)
        assert relative_l2(slimjax.attend_filled(x, layer, cache), expected) < 1e-10


def test_a_ragged_memory_is_not_read_past_its_end(x64):
    case, x, memory = crossing("e:float64")
    layer = convert(case.projections, case.spec).layer
    count = jnp.asarray([7, 4], jnp.int32)
    poisoned = memory.at[1, 4:].set(jnp.nan)
    cache = slimjax.fill(poisoned, layer, init_cache(case.spec, batch=2, capacity=9), count=count)
    out = slimjax.attend_filled(x, layer, cache)
    for b, length in enumerate((7, 4)):
        expected = cross_oracle(case, x[b : b + 1], memory[b : b + 1, :length])
        assert relative_l2(out[b : b + 1], expected) < 1e-12


def test_cross_functions_refuse_self_attention(x64):
    case = suites.subject("kv:float64", "mha", "rope")
    with pytest.raises(ValueError, match="causal=False"):
        slimjax.cross_full(case.inputs, case.inputs, case.projections, case.spec)


@pytest.mark.parametrize("basis", ["e", "h"])
def test_shared_caches_are_refused_for_self_attention(basis, x64):
    case = suites.subject(f"{basis}:float64", "mha", "none")
    with pytest.raises(NotImplementedError, match=r"no input in common; use x"):
        convert(case.projections, case.spec)


@pytest.mark.parametrize(("scheme", "built"), [("e:bf16", False), ("e1:bf16", True)])
def test_an_absorbed_step_builds_no_keys_or_values(scheme, built):
    """Option 2 works on the rows as stored: nothing of a layer's own [S, K, H] is ever an array."""
    case = suites.subject(scheme, "mha", "none", dtype="float32", causal=False)
    layer = convert(case.projections, case.spec).layer
    cache = init_cache(case.spec, batch=2, capacity=7)
    jaxpr = jax.make_jaxpr(lambda x: slimjax.attend_filled(x, layer, cache))(case.inputs[:, :1])
    assert ((2, 7, 4, 6) in shapes(jaxpr.jaxpr)) == built


def shapes(jaxpr):
    """Of every array that a jaxpr and those inside it make."""
    found = {v.aval.shape for equation in jaxpr.eqns for v in equation.outvars}
    for equation in jaxpr.eqns:
        for inner in equation.params.values():
            if hasattr(getattr(inner, "jaxpr", inner), "eqns"):
                found |= shapes(getattr(inner, "jaxpr", inner))
    return found
