"""The equivalence table's numbers, each against an independent computation of it."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slimjax import evaluate
from slimjax.cache import codec
from slimjax.config import EquivalenceConfig, ModelConfig
from slimjax.data import Corpus
from slimjax.models.decoder import DecoderLM, convert_model, init_caches

MODEL = ModelConfig(vocab=17, layers=2, width=16, heads=2, mlp_width=24, tied=False)
CONFIG = EquivalenceConfig(tokens=72, length=12, generated=10, prompts=3, prompt_length=6)


def ill_conditioned(config, seed=1):
    """A model whose keys determine the values, but hardly: condition numbers of thousands."""
    model = DecoderLM(config, rngs=nnx.Rngs(seed))
    model.unembedding[...] = 50 * model.unembedding[...]
    for block in model.blocks:
        kernel = block.attention.key.kernel
        kernel[...] = kernel[...] * jnp.logspace(0, -3, config.width)[:, None, None]
    return model


def corpus(bytes_per_token=1.0):
    text = np.random.default_rng(0).integers(0, 17, 400).astype(np.uint8)
    return Corpus(train=text[:200], held_out=text[200:], vocab=17, bytes_per_token=bytes_per_token)


@pytest.fixture(scope="module")
def reference():
    return evaluate.prepare(ill_conditioned(MODEL), corpus(), CONFIG)


def test_bits_per_byte_of_the_exact_model(reference):
    """Against numpy, from the logits of a plain forward pass; two bytes a token halve it."""
    windows = corpus().held_out_windows(6, 12)
    logits = np.asarray(reference.model(jnp.asarray(windows[:, :-1])), np.float64)
    p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    chosen = np.take_along_axis(p, windows[:, 1:, None], axis=-1)
    assert reference.bits_per_byte == pytest.approx(float(np.mean(-np.log2(chosen))), rel=1e-5)
    halved = evaluate.prepare(reference.model, corpus(2.0), CONFIG)
    assert halved.bits_per_byte == pytest.approx(reference.bits_per_byte / 2)


def test_an_exact_cache_changes_nothing(reference):
    found = evaluate.measure(reference, "kv:float32", "float32")
    assert found["attention_error"] < 1e-6
    assert found["value_error"] < 1e-6
    assert abs(found["bits_per_byte_change"]) < 1e-5
    assert found["bits_per_byte"] == pytest.approx(reference.bits_per_byte, abs=1e-5)
    assert found["logit_kl"] < 1e-8
    assert found["top1_agreement"] == 1
    assert found["greedy_agreement"] == CONFIG.generated
    assert found["count"] == 72
    assert found["bytes_per_token"] == 2 * 2 * 16 * 4
    assert found["compression"] == 0.5
    assert "condition_number" not in found


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("kv:bf16", 128.0),
        ("k:bf16", 64.0),
        ("k:int16", 64.0 + 8),
        ("kv:int8", 64.0 + 32),
        ("x1:int8", 32.0 + 8),
    ],
)
def test_bytes(reference, scheme, expected):
    """Two layers; int16 and x's int8 have one float32 scale a row, kv's int8 two for K and two for V."""
    found = evaluate.measure(reference, scheme, "float32")
    assert found["bytes_per_token"] == expected
    assert found["compression"] == pytest.approx(128.0 / expected)


@pytest.mark.parametrize("scheme", ["kv:int8", "k:bf16", "k1:bf16", "v1:bf16", "x1:bf16"])
def test_the_identity_is_exact_whatever_the_codec(reference, scheme):
    found = evaluate.identity(reference, scheme)
    condition = found.get("condition_number", 1.0)
    assert found["identity_error"] < 1e-15 * 100 * condition
    assert (condition > 1) == (scheme[0] in "kv" and not scheme.startswith("kv"))


def test_the_condition_number_is_the_worst_layers(reference):
    kernels = [np.asarray(b.attention.key.kernel[...], np.float64) for b in reference.model.blocks]
    expected = max(np.linalg.cond(kernel.reshape(16, 16)) for kernel in kernels)
    assert evaluate.measure(reference, "k:int16", "float32")["condition_number"] == pytest.approx(expected)
    assert evaluate.identity(reference, "k:int16")["condition_number"] == pytest.approx(expected)


def test_bfloat16_keys_lose_the_values_and_int16_keys_hardly(reference):
    exact, rounded, fixed = (
        evaluate.measure(reference, scheme, "float32") for scheme in ("k:float32", "k:bf16", "k:int16")
    )
    for name in ("attention_error", "value_error", "logit_kl"):
        assert exact[name] < fixed[name] < 0.1 * rounded[name], name
    assert rounded["attention_error"] > 0.02
    assert rounded["top1_agreement"] < exact["top1_agreement"] == 1


def test_a_compute_dtype_costs_what_it_costs(reference):
    errors = {
        dtype: evaluate.measure(reference, "kv:float32", dtype)
        for dtype in ("float32", "float16", "bfloat16")
    }
    assert errors["float32"]["attention_error"] < 1e-6
    assert 1e-4 < errors["float16"]["attention_error"] < 2e-3 < errors["bfloat16"]["attention_error"] < 2e-2
    assert len({each["value_error"] for each in errors.values()}) == 1  # rows are not rounded to it


def test_the_value_error_against_plain_products(reference):
    """V from bfloat16 keys, X W_K rounded times W_K^-1 W_V, in numpy."""
    bf16, errors = codec("bf16"), []
    for block, x in zip(reference.model.blocks, reference.inputs, strict=True):
        wk, wv = (
            np.asarray(linear.kernel[...], np.float64).reshape(16, 16)
            for linear in (block.attention.key, block.attention.value)
        )
        x64 = np.asarray(x[:, : CONFIG.length], np.float64)
        keys = jnp.asarray((x64 @ wk).astype(np.float32))
        read = np.asarray(bf16.decode(bf16.encode(keys)), np.float64)
        rebuilt = read @ np.linalg.solve(wk, wv)
        errors.append(np.linalg.norm(rebuilt - x64 @ wv) / np.linalg.norm(x64 @ wv))
    # A key next to a rounding boundary may fall to either side, depending on the order of its sum.
    assert evaluate.measure(reference, "k:bf16", "float32")["value_error"] == pytest.approx(
        max(errors), rel=0.05
    )


def test_the_probes_stand_apart_from_the_scores(reference):
    """Attention errors are of single layers on exact inputs: a layer's error does not reach the next one's."""
    coarse, fine = (convert_model(reference.model, scheme)[0] for scheme in ("k:int8", "kv:float32"))
    mixed = (coarse[0], fine[1])
    _, outputs = evaluate.cached_logits(reference.model, mixed, reference.tokens[:, :-1], reference.inputs)
    errors = [
        np.max(np.abs(np.asarray(ours) - exact)[:, : CONFIG.length])
        for ours, exact in zip(outputs, reference.outputs, strict=True)
    ]
    assert errors[0] > 1e-2
    assert errors[1] < 1e-5


@pytest.mark.parametrize("scheme", ["k:int8", "k:bf16", "kv:int8"])
def test_greedy_agreement_is_that_of_decoding_step_by_step(reference, scheme):
    """Teacher-forced logits give the length that token-by-token decoding through the cache gives."""
    layers, _ = convert_model(reference.model, scheme)
    step = nnx.jit(lambda model, token, caches: model.with_cache(token, layers, caches))
    rows = reference.tokens[reference.scored :]
    prompt, continued = rows[:, : CONFIG.prompt_length], np.asarray(rows[:, CONFIG.prompt_length :])
    caches = init_caches(layers, CONFIG.prompts, 16)
    for index in range(CONFIG.prompt_length):
        logits, caches = step(reference.model, prompt[:, index : index + 1], caches)
    generated = []
    for _ in range(CONFIG.generated):
        generated.append(jnp.argmax(logits[:, -1], axis=-1).astype(jnp.int32))
        logits, caches = step(reference.model, generated[-1][:, None], caches)
    same = np.stack(generated, axis=1) == continued
    expected = np.mean([row.argmin() if not row.all() else len(row) for row in same])
    assert (expected < CONFIG.generated) == scheme.startswith("k:")  # both outcomes are met
    assert evaluate.measure(reference, scheme, "float32")["greedy_agreement"] == pytest.approx(expected)


def test_greedy_agreement_ends_where_the_generated_text_ends():
    """Scored windows longer than prompt and continuation pad the prompts' rows; padding is not agreement."""
    config = dataclasses.replace(CONFIG, tokens=36, length=36)
    long = evaluate.prepare(ill_conditioned(MODEL), corpus(), config)
    assert long.tokens.shape[1] > config.prompt_length + config.generated
    assert evaluate.greedy_length(long, long.logits) == config.generated


def test_identity_of_a_model_with_biases():
    model = ill_conditioned(dataclasses.replace(MODEL, bias=True))
    for index, block in enumerate(model.blocks):
        for part in ("query", "key", "value", "out"):
            bias = getattr(block.attention, part).bias
            bias[...] = 0.3 * jax.random.normal(jax.random.key(index), bias.shape)
    biased = evaluate.prepare(model, corpus(), CONFIG)
    for scheme in ("kv:bf16", "x1:bf16", "k:bf16"):
        found = evaluate.identity(biased, scheme)
        assert found["identity_error"] < 1e-14 * max(found.get("condition_number", 1.0), 1.0)


def test_refusals_reach_the_caller(reference):
    for function in (evaluate.identity, lambda *given: evaluate.measure(*given, "float32")):
        with pytest.raises(NotImplementedError, match=r"layer 0.*x1"):
            function(reference, "x:bf16")


def test_models_of_one_shape_share_their_programs(reference):
    """Another model's row of the table compiles nothing: evaluation time is spent on numbers."""
    evaluate.measure(reference, "k:int16", "bfloat16")
    other = evaluate.prepare(
        ill_conditioned(dataclasses.replace(MODEL, key_init="orthogonal"), seed=2), corpus(), CONFIG
    )
    compiled = evaluate._block._cache_size(), evaluate._values._cache_size(), evaluate._head._cache_size()
    again = evaluate.measure(other, "k:int16", "bfloat16")
    assert compiled == (
        evaluate._block._cache_size(),
        evaluate._values._cache_size(),
        evaluate._head._cache_size(),
    )
    assert math.isfinite(again["attention_error"])


def test_text_that_is_too_short(reference):
    short = dataclasses.replace(CONFIG, tokens=1200)
    with pytest.raises(ValueError, match="held-out text of 200 tokens has no 100 windows"):
        evaluate.prepare(reference.model, corpus(), short)


def test_grouped_heads_have_values_too():
    model = DecoderLM(dataclasses.replace(MODEL, kv_heads=1), rngs=nnx.Rngs(0))
    grouped = evaluate.prepare(model, corpus(), CONFIG)
    found = evaluate.measure(grouped, "kv:bf16", "float32")
    assert 5e-4 < found["value_error"] < 4e-3
    assert found["compression"] == 1
    assert evaluate.identity(grouped, "x1:bf16")["identity_error"] < 1e-14
    assert jax.config.read("jax_enable_x64") is False
