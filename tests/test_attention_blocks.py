"""Attention without a cache, block by block of queries, and its stated derivative: the same numbers, faster."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from slimjax.attention import reference
from slimjax.attention.layer import attend_full
from slimjax.attention.positions import Position, init_bias
from slimjax.attention.projections import Projections
from slimjax.attention.softmax import exact
from slimjax.kernels.spec import DecodeSpec
from slimjax.numerics import MASK, relative_l2
from slimjax.scheme import parse_scheme

D, N, K, H, B, T = 16, 4, 2, 4, 2, 23
SPEC = DecodeSpec(scheme=parse_scheme("kv:float32"), heads=N, kv_heads=K, head_dim=H, width=D)


def layer(position):
    keys = jax.random.split(jax.random.key(0), 5)
    sizes = ((D, N, H), (D, K, H), (D, K, H), (N, H, D))
    wq, wk, wv, wo = (jax.random.normal(key, size) * 0.3 for key, size in zip(keys[:4], sizes, strict=True))
    return Projections(wq=wq, wk=wk, wv=wv, wo=wo, position=init_bias(position, N, keys[4]))


@pytest.mark.parametrize(
    ("changes", "masked"),
    [
        ({"position": Position(kind="rope")}, False),
        ({"position": Position(kind="t5"), "softcap": 3.0}, False),
        ({"window": 5}, True),
        ({"causal": False}, True),
    ],
    ids=["rope", "t5", "window", "bidirectional"],
)
def test_blocks_of_queries_change_nothing(monkeypatch, changes, masked):
    spec = dataclasses.replace(SPEC, **changes)
    x = jax.random.normal(jax.random.key(1), (B, T, D))
    mask = jax.random.bernoulli(jax.random.key(2), 0.7, (B, 1, T, T)) if masked else None
    projections, length = layer(spec.position), jnp.asarray([T, 9], jnp.int32)

    def out():
        def loss(x, p):
            y = attend_full(x, p, spec, mask=mask, length=length)
            return jnp.sum(y * jnp.sin(y)), y

        gradient, y = jax.jit(jax.grad(loss, has_aux=True))(x, projections)
        return y, gradient

    whole, gradient = out()
    monkeypatch.setattr(reference, "SMALLEST_BLOCK", 3)
    assert len(reference.causal_blocks(T, causal=spec.causal)) == (4 if spec.causal else 1)
    blocks, block_gradient = out()
    assert relative_l2(blocks, whole) < 1e-6
    assert relative_l2(block_gradient, gradient) < 1e-6


def test_blocks_cover_every_query_once():
    for tokens in (1, 255, 256, 259, 4096):
        blocks = reference.causal_blocks(tokens, causal=True)
        assert [i for first, last, _ in blocks for i in range(first, last)] == list(range(tokens))
        assert all(end == last for _, last, end in blocks)


def test_the_softmax_s_derivative_is_that_of_its_definition():
    scores = jax.random.normal(jax.random.key(0), (B, N, 5, 7))
    mask = jnp.tril(jnp.ones((5, 7), bool), 1)[None, None].repeat(B, 0).at[0, 0, 3].set(False)
    weights = jax.random.normal(jax.random.key(1), scores.shape)

    def plain(scores):
        p = jax.nn.softmax(jnp.where(mask, scores, MASK), axis=-1)
        return jnp.sum(jnp.where(mask, p, 0.0) * weights)

    found = jax.grad(lambda scores: jnp.sum(exact(scores, mask) * weights))(scores)
    assert relative_l2(found, jax.grad(plain)(scores)) < 1e-6
    assert not found[0, :, 3].any()  # a query that sees no key
    _, along = jax.jvp(lambda scores: exact(scores, mask), (scores,), (weights,))
    assert jnp.isfinite(along).all()
