"""The decoder LM: every combination of its choices, causality, and the same logits through every cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slimjax.config import ModelConfig
from slimjax.models.decoder import DecoderLM, convert_model, full_attention, init_caches
from slimjax.numerics import relative_l2

TINY = ModelConfig(vocab=11, layers=1, width=16, heads=2, mlp_width=24, max_length=32)
VARIANTS = {
    "rope": TINY,
    "interleaved": dataclasses.replace(TINY, rope_interleaved=True, tied=False),
    "learned": dataclasses.replace(TINY, position="learned", norm="layernorm", mlp="gelu", bias=True),
    "alibi": dataclasses.replace(TINY, position="alibi", bias=True),
    "t5": dataclasses.replace(TINY, position="t5", tied=False),
    "fire": dataclasses.replace(TINY, position="fire", mlp="gelu"),
    "kerple": dataclasses.replace(TINY, position="kerple", norm="layernorm"),
    "none": dataclasses.replace(TINY, position="none"),
    "gqa": dataclasses.replace(TINY, heads=4, kv_heads=2),
    "mqa": dataclasses.replace(TINY, kv_heads=1, bias=True),
    "wide": dataclasses.replace(TINY, head_dim=12),
    "window": dataclasses.replace(TINY, window=3, layers=2),
}


def build(config, seed=0):
    return DecoderLM(config, rngs=nnx.Rngs(seed))


def some_tokens(batch, length, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, TINY.vocab, (batch, length)), jnp.int32)


@nnx.jit
def exact(model, tokens):
    return model(tokens)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_matters(name):
    """Logits have their shape and dtype, and no parameter is without a gradient."""
    model, tokens = build(VARIANTS[name]), some_tokens(2, 9)
    graph, params = nnx.split(model, nnx.Param)

    def loss(params):
        logits = nnx.merge(graph, params)(tokens)
        assert logits.shape == (2, 9, TINY.vocab)
        assert logits.dtype == jnp.float32
        return jnp.mean(jax.nn.log_softmax(logits) ** 2)

    # A constant added to all scores, as a key bias without RoPE is, cancels in the softmax.
    constants = {"learned": ("key']['bias",), "alibi": ("key']['bias",), "fire": ("b2",)}
    exempt = constants.get(name, ())
    for path, gradient in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params)):
        where = jax.tree_util.keystr(path)
        assert bool(jnp.all(jnp.isfinite(gradient))), where
        if not any(word in where for word in exempt):
            assert float(jnp.max(jnp.abs(gradient))) > 1e-9, where


@pytest.mark.parametrize("name", ["rope", "learned", "fire", "gqa", "window"])
def test_causality_by_gradients(name):
    """The logits at t depend on the inputs at t and before, within the window, and on no other."""
    model, length, t = build(VARIANTS[name]), 8, 5

    def logit(h):
        for block in model.blocks:
            h = block(h, full_attention(block, "float32"), "float32")
        return jnp.sum(jnp.sin(model.head(h, "float32")[0, t]))

    gradient = jax.jit(jax.grad(logit))(model.embed(some_tokens(1, length), "float32"))
    seen = np.abs(np.asarray(gradient[0])).max(axis=1) > 0
    reach = 2 * (3 - 1) if name == "window" else length  # two layers, three tokens each
    np.testing.assert_array_equal(seen, [t - reach <= s <= t for s in range(length)])


def test_tying_saves_the_unembedding():
    def count(model):
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))

    tied, untied = build(TINY), build(dataclasses.replace(TINY, tied=False))
    assert count(untied) - count(tied) == TINY.vocab * TINY.width
    h = jax.random.normal(jax.random.key(0), (1, 2, TINY.width))
    before = tied.head(h, "float32"), untied.head(h, "float32")
    for model in (tied, untied):
        model.embedding[...] = 2 * model.embedding[...]
    np.testing.assert_allclose(tied.head(h, "float32"), 2 * before[0], rtol=1e-5)
    np.testing.assert_array_equal(untied.head(h, "float32"), before[1])


def test_head_counts_set_the_shapes():
    attention = build(VARIANTS["gqa"]).blocks[0].attention
    assert attention.query.kernel.shape == (16, 4, 4)
    assert attention.key.kernel.shape == attention.value.kernel.shape == (16, 2, 4)
    assert build(VARIANTS["wide"]).blocks[0].attention.out.kernel.shape == (2, 12, 16)


@nnx.jit
def reuse(model, tokens, layers, caches, count=None):
    return model.with_cache(tokens, layers, caches, count=count)


@nnx.jit
def prefill(model, tokens, layers, caches, count=None):
    return model.with_cache(tokens, layers, caches, count=count, fresh=True)


@pytest.mark.parametrize(
    ("name", "first"), [(name, prefill) for name in VARIANTS] + [("rope", reuse), ("learned", reuse)]
)
def test_chunks_through_a_cache_are_the_whole(name, first):
    """Prefill or not, then four tokens at once, then one by one: the logits without a cache."""
    model, tokens = build(VARIANTS[name]), some_tokens(3, 10)
    layers, _ = convert_model(model, "kv:float32")
    got, caches = first(model, tokens[:, :4], layers, init_caches(layers, 3, 12))
    parts = [got]
    for start, stop in ((4, 8), (8, 9), (9, 10)):
        got, caches = reuse(model, tokens[:, start:stop], layers, caches)
        parts.append(got)
    assert relative_l2(jnp.concatenate(parts, axis=1), exact(model, tokens)) < 2e-6
    np.testing.assert_array_equal(caches[0].length, [10, 10, 10])


@pytest.mark.parametrize(
    ("name", "scheme"), [("rope", "k:float32"), ("alibi", "x:float32"), ("gqa", "x1:float32")]
)
def test_ragged_rows_are_what_they_are_alone(name, scheme):
    model, tokens = build(VARIANTS[name]), some_tokens(2, 8)
    layers, _ = convert_model(model, scheme)
    count = jnp.asarray([3, 8], jnp.int32)
    got, caches = prefill(model, tokens, layers, init_caches(layers, 2, 9), count)
    last = jnp.asarray([[1], [2]], jnp.int32)
    after, _ = reuse(model, last, layers, caches)
    # Causality: a row alone, padded on the right, is what it is without the padding.
    alone = jnp.concatenate([tokens, last], axis=1).at[0, 3].set(1)
    expected = exact(model, alone)
    for row, length in enumerate((3, 8)):
        assert relative_l2(got[row, :length], expected[row, :length]) < 1e-5
        assert relative_l2(after[row, 0], expected[row, length]) < 1e-4


def test_attention_inputs_are_what_attention_is_given():
    model, tokens = build(dataclasses.replace(TINY, layers=2)), some_tokens(2, 6)

    @nnx.jit
    def watched(model):
        seen, h = [], model.embed(tokens, "float32")
        for block in model.blocks:
            attend = full_attention(block, "float32")
            h = block(h, lambda x, attend=attend: (seen.append(x), attend(x))[1], "float32")
        return seen, model.attention_inputs(tokens)

    for theirs, ours in zip(*watched(model), strict=True):
        np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_allclose(np.mean(np.square(ours), axis=-1), 1.0, atol=0.01)  # RMSNorm, scale 1


def test_learned_positions_end():
    model = build(VARIANTS["learned"])
    with pytest.raises(ValueError, match="33 tokens are more than"):
        model(some_tokens(1, 33))
    layers, _ = convert_model(model, "kv:float32")
    caches = init_caches(layers, 1, 40)
    _, caches = prefill(model, some_tokens(1, 31), layers, caches)
    last, caches = reuse(model, some_tokens(1, 1), layers, caches)
    beyond, _ = reuse(model, some_tokens(1, 1), layers, caches)
    assert bool(jnp.isfinite(last).all())
    assert bool(jnp.isnan(beyond).all())  # never another token's position


def test_a_compute_dtype_changes_products_not_parameters():
    model, tokens = build(TINY), some_tokens(2, 9)
    rounded = nnx.jit(lambda model: model(tokens, "bfloat16"))(model)
    assert rounded.dtype == jnp.float32
    assert 1e-4 < relative_l2(rounded, exact(model, tokens)) < 3e-2
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}


def test_layers_may_have_schemes_of_their_own():
    model = build(dataclasses.replace(TINY, layers=2))
    layers, figures = convert_model(model, ("kv:bf16", "k:int16"), "bfloat16")
    assert [str(layer.spec.scheme) for layer in layers] == ["kv:bf16", "k:int16"]
    assert {layer.spec.dtype for layer in layers} == {"bfloat16"}
    assert figures[0].condition_number is None
    kernel = np.asarray(model.blocks[1].attention.key.kernel[...], np.float64).reshape(16, 16)
    assert figures[1].condition_number == pytest.approx(np.linalg.cond(kernel))
    with pytest.raises(ValueError, match="3 schemes for 2 layers"):
        convert_model(model, ["kv:bf16"] * 3)


def test_a_refusal_names_the_layer():
    with pytest.raises(NotImplementedError, match=r"layer 1.*use kv or x"):
        convert_model(build(dataclasses.replace(VARIANTS["gqa"], layers=2)), ("kv:bf16", "k:bf16"))


def test_orthogonal_keys_are_perfectly_conditioned():
    model = build(dataclasses.replace(TINY, key_init="orthogonal"))
    for block in model.blocks:
        values = np.linalg.svd(np.asarray(block.attention.key.kernel[...]).reshape(16, 16), compute_uv=False)
        np.testing.assert_allclose(values, 1.0, atol=1e-5)
    wide = build(dataclasses.replace(TINY, key_init="orthogonal", head_dim=12)).blocks[0].attention
    values = np.linalg.svd(np.asarray(wide.key.kernel[...]).reshape(16, 24), compute_uv=False)
    np.testing.assert_allclose(values, 1.0, atol=1e-5)


def test_seeds_make_models():
    first, same, other = (nnx.state(build(TINY, seed)) for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (first, same)), strict=True))
    assert not np.array_equal(first["embedding"][...], other["embedding"][...])
