"""The layer in other people's models: flax's in, slimjax's out, same weights, same outputs."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slimjax.attention.positions import Position
from slimjax.nn import MultiHeadAttention
from slimjax.numerics import relative_l2


class Block(nnx.Module):
    """A model that knows nothing of slimjax."""

    def __init__(self, attention, rngs, **options):
        self.norm = nnx.LayerNorm(24, rngs=rngs)
        self.attention = attention(4, 24, decode=False, rngs=rngs, **options)
        self.mlp = nnx.Linear(24, 24, rngs=rngs)

    def __call__(self, x, *, decode=False):
        mask = None if decode else nnx.make_causal_mask(jnp.ones(x.shape[:2]))
        x = x + self.attention(self.norm(x), mask=mask, decode=decode)
        return x + nnx.gelu(self.mlp(x))


@nnx.jit
def step(model, x):
    return model(x, decode=True)


def outputs(model, x):
    """Without a cache, and token by token with one."""
    full = model(x)
    model.attention.init_cache(x.shape)
    return full, jnp.concatenate([step(model, x[:, t : t + 1]) for t in range(x.shape[1])], axis=1)


@pytest.mark.parametrize(
    ("scheme", "limit"),
    [
        (None, 1e-7),
        ("kv:float32", 2e-6),
        ("k:float32", 1e-4),
        ("k1:float32", 1e-4),
        ("v:float32", 1e-4),
        ("x:float32", 2e-6),
        ("k:int16", 1e-3),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_swapped_into_an_unmodified_model(scheme, limit, bias):
    theirs = Block(nnx.MultiHeadAttention, nnx.Rngs(0), use_bias=bias)
    ours = Block(MultiHeadAttention, nnx.Rngs(1), use_bias=bias, scheme=scheme)
    nnx.update(ours, nnx.state(theirs, nnx.Param))
    chex.assert_trees_all_equal_shapes_and_dtypes(nnx.state(ours, nnx.Param), nnx.state(theirs, nnx.Param))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 10, 24)), jnp.float32)
    expected_full, expected_cached = outputs(theirs, x)
    full, cached = outputs(ours, x)
    assert relative_l2(full, expected_full) < 1e-6
    assert relative_l2(cached, expected_cached) < limit


def test_same_seed_same_weights():
    theirs, ours = (
        nnx.MultiHeadAttention(4, 24, rngs=nnx.Rngs(7)),
        MultiHeadAttention(4, 24, rngs=nnx.Rngs(7)),
    )
    for name in ("query", "key", "value", "out"):
        np.testing.assert_array_equal(getattr(ours, name).kernel[...], getattr(theirs, name).kernel[...])


@pytest.mark.parametrize("kind", ["rope", "alibi", "t5", "fire", "kerple"])
@pytest.mark.parametrize("window", [None, 3])
def test_positions_and_windows_are_in_both_paths(kind, window):
    """A position scheme without a cache scheme must not fall back to flax's cache, which knows no positions."""
    model = Block(MultiHeadAttention, nnx.Rngs(0), position=Position(kind=kind), window=window)
    plain = Block(MultiHeadAttention, nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 10, 24)), jnp.float32)
    full, cached = outputs(model, x)
    assert relative_l2(cached, full) < 1e-6
    assert relative_l2(full, plain(x)) > 1e-3


def test_head_size_and_kv_heads():
    layer = MultiHeadAttention(
        4, 24, head_dim=10, num_kv_heads=2, scheme="x:bf16", decode=True, rngs=nnx.Rngs(0)
    )
    layer.init_cache((1, 3, 24))
    assert layer(jnp.ones((1, 2, 24))).shape == (1, 2, 24)
    spec = layer.decode_spec()
    assert (spec.heads, spec.kv_heads, spec.head_dim, spec.key_width) == (4, 2, 10, 20)


def test_what_is_not_offered_says_so():
    for refused in (
        {"normalize_qk": True},
        {"dropout_rate": 0.1},
        {"attention_fn": max},
        {"precision": "high"},
    ):
        with pytest.raises(NotImplementedError, match=next(iter(refused))):
            MultiHeadAttention(4, 24, **refused, scheme="k:int16", rngs=nnx.Rngs(0))
        if "attention_fn" not in refused:
            MultiHeadAttention(4, 24, **refused, rngs=nnx.Rngs(0))  # flax's own business without a scheme
    with pytest.raises(ValueError, match="unknown codec"):
        MultiHeadAttention(4, 24, scheme="k:int61", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="either head_dim"):
        MultiHeadAttention(4, 24, qkv_features=48, head_dim=12, rngs=nnx.Rngs(0))
    layer = MultiHeadAttention(4, 24, scheme="k:int16", decode=True, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="call init_cache first"):
        layer(jnp.ones((1, 1, 24)))
    layer.init_cache((1, 3, 24))
    with pytest.raises(NotImplementedError, match="sow_weights"):
        layer(jnp.ones((1, 1, 24)), sow_weights=True)
    with pytest.raises(TypeError, match="is_casual"):
        layer(jnp.ones((1, 1, 24)), is_casual=True)
    with pytest.raises(NotImplementedError, match=r"\[B, T, D\]"):
        layer(jnp.ones((1, 1, 1, 24)))
    with pytest.raises(ValueError, match="say decode=True or False"):
        MultiHeadAttention(4, 24, scheme="k:int16", rngs=nnx.Rngs(0))(jnp.ones((1, 1, 24)))
    with pytest.raises(NotImplementedError, match="further mask"):
        layer(jnp.ones((1, 1, 24)), mask=jnp.ones((1, 1, 1, 3), bool))
    with pytest.raises(NotImplementedError, match="self-attention"):
        layer(jnp.ones((1, 1, 24)), jnp.ones((1, 1, 24)))
    gqa = MultiHeadAttention(4, 24, num_kv_heads=2, scheme="k:int16", decode=True, rngs=nnx.Rngs(0))
    with pytest.raises(NotImplementedError, match=r"attention: .*GQA.* use kv or x"):
        gqa.init_cache((1, 3, 24))


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_the_result_has_the_dtype_that_flax_gives_it(dtype, param_dtype):
    options = {"dtype": dtype, "param_dtype": param_dtype, "decode": False, "rngs": nnx.Rngs(0)}
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 5, 24)), jnp.float32)
    with jax.numpy_dtype_promotion("standard"):  # flax promotes its arguments
        expected = nnx.MultiHeadAttention(4, 24, **options)(x)
    ours = MultiHeadAttention(4, 24, scheme="kv:float32", **options | {"rngs": nnx.Rngs(0)})
    full = ours(x)
    ours.init_cache((1, 5, 24))
    cached = ours(x[:, :1], decode=True)
    assert full.dtype == cached.dtype == expected.dtype
    assert relative_l2(full, expected) < 2 * float(jnp.finfo(expected.dtype).eps)


def test_a_cache_that_was_popped_is_not_initialised():
    layer = MultiHeadAttention(4, 24, scheme="k:int16", decode=True, rngs=nnx.Rngs(0))
    layer.init_cache((1, 3, 24))
    assert layer.cache.capacity == 3
    nnx.pop(layer, nnx.Cache)
    assert layer.cache is None
    with pytest.raises(ValueError, match="call init_cache first"):
        layer(jnp.ones((1, 1, 24)))


def test_the_cache_travels_with_the_modules_state():
    layer = MultiHeadAttention(4, 24, scheme="k:int16", decode=True, rngs=nnx.Rngs(0))
    layer.init_cache((1, 3, 24))
    x = jnp.ones((1, 1, 24))
    step = nnx.jit(lambda module, x: module(x))
    first = step(layer, x)
    graph, state = nnx.split(layer)
    again = nnx.merge(graph, state)
    np.testing.assert_array_equal(again.cache.length, [1])
    np.testing.assert_allclose(step(again, x), first, atol=1e-5)  # two equal tokens weigh to the same value
