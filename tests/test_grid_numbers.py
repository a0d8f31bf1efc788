"""Cells of the grid beyond its walk: grouped heads, several tokens, other dtypes, vmap, scan and donation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slimjax import DecodeSpec, Position, Projections, parse_scheme
from slimjax.attention.layer import attend_cached, init_cache, prefill
from slimjax.solve import convert

SAMPLE = ["kv:flashq2-4/32@sas", "x1:kivi4(window=32)/32", "kv:fp8#sage"]
step = jax.jit(attend_cached)
prefilled = jax.jit(prefill)


def grouped(text, dtype="float32"):
    """Two query heads to each of two key/value heads, RoPE."""
    draw = np.random.default_rng(2)
    kind = "float64" if dtype == "float64" else "float32"
    wq, wk, wv, wo = (
        jnp.asarray(draw.standard_normal(shape) / 6, kind)
        for shape in ((32, 4, 8), (32, 2, 8), (32, 2, 8), (4, 8, 32))
    )
    spec = DecodeSpec(
        scheme=parse_scheme(text), heads=4, kv_heads=2, head_dim=8, width=32, position=Position(kind="rope"),
        dtype=dtype,
    )  # fmt: skip
    return convert(Projections(wq=wq, wk=wk, wv=wv, wo=wo), spec).layer


def rows_of(tokens, batch=2, dtype="float32"):
    return jnp.asarray(np.random.default_rng(3).standard_normal((batch, tokens, 32)), dtype)


def text_through(text, dtype="float32"):
    """A prompt, then more than one token through the cache."""
    layer, x = grouped(text, dtype), rows_of(70, dtype="float64" if dtype == "float64" else "float32")
    cache = prefilled(x[:, :40], layer, init_cache(layer.spec, batch=2, capacity=80))[1]
    return step(x[:, 40:], layer, cache)[0]


def distance(found, exact):
    found, exact = (np.asarray(each, np.float64) for each in (found, exact))
    return np.linalg.norm(found - exact) / np.linalg.norm(exact)


@pytest.mark.parametrize("text", SAMPLE)
def test_grouped_heads_and_several_tokens(text):
    """Beside the exact cache; bfloat16 changes no more than its rounding does."""
    out = text_through(text)
    assert out.shape == (2, 30, 32)
    assert 1e-3 < distance(out, text_through("kv:float32")) < 0.6
    narrow = text_through(text, "bfloat16")
    assert narrow.dtype == jnp.bfloat16
    assert 1e-4 < distance(narrow, out) < 0.02


@pytest.mark.parametrize("text", SAMPLE[:2])
def test_float64_around_the_codes(x64, text):
    wide = text_through(text, "float64")
    assert wide.dtype == jnp.float64
    assert distance(text_through(text), wide) < 0.03  # here and there a code differs


@pytest.mark.parametrize("text", SAMPLE[::2])
def test_mapped_scanned_and_donated(text):
    """One step over a stack of caches, two in a scan, and one that takes its cache's memory."""
    layer, x = grouped(text), rows_of(42, batch=4)
    cache = prefilled(x[:, :40], layer, init_cache(layer.spec, batch=4, capacity=80))[1]
    expected, longer = step(x[:, 40:41], layer, cache)

    halves = jax.tree.map(lambda leaf: leaf.reshape(2, 2, *leaf.shape[1:]), cache)
    over = jax.jit(jax.vmap(attend_cached, in_axes=(0, None, 0)))
    mapped, _ = over(x[:, 40:41].reshape(2, 2, 1, 32), layer, halves)
    np.testing.assert_allclose(mapped.reshape(4, 1, 32), expected, atol=1e-5)

    def one(cache, row):
        out, cache = attend_cached(row[:, None], layer, cache)
        return cache, out[:, 0]

    _, outs = jax.lax.scan(one, cache, jnp.swapaxes(x[:, 40:], 0, 1))
    np.testing.assert_allclose(outs[0], expected[:, 0], atol=1e-5)
    np.testing.assert_allclose(outs[1], step(x[:, 41:42], layer, longer)[0][:, 0], atol=1e-5)

    donated = jax.jit(attend_cached, donate_argnums=2)
    out, _ = donated(x[:, 40:41], layer, cache)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    assert jax.tree.leaves(cache.streams)[0].is_deleted()
