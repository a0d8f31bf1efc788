"""Generation: the same tokens as one step at a time, the right distributions, and no needless compilation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, strategies as st

from slimjax.config import ModelConfig
from slimjax.generate import Sampling, _continue, _prefill, bucket, filtered, generate, sample
from slimjax.models.decoder import DecoderLM, convert_model, init_caches
from slimjax.numerics import MASK

CONFIG = ModelConfig(vocab=13, layers=2, width=16, heads=2, mlp_width=24, tied=False)


@pytest.fixture(scope="module")
def model():
    """Random, with logits far enough apart that rounding cannot swap them."""
    model = DecoderLM(CONFIG, rngs=nnx.Rngs(1))
    model.unembedding[...] = 50 * model.unembedding[...]
    return model


def prompts(batch, length, seed=0):
    return np.random.default_rng(seed).integers(0, CONFIG.vocab, (batch, length)).astype(np.int32)


@pytest.fixture
def compilations():
    """A function that says how many programs were compiled since it was last asked."""
    durations = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            durations.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)

    def since():
        count = len(durations)
        durations.clear()
        return count

    yield since
    jax.monitoring.unregister_event_duration_listener(listen)


@nnx.jit
def last_logits(model, tokens, index):
    return jax.lax.dynamic_index_in_dim(model(tokens), index, axis=1, keepdims=False)


@pytest.mark.parametrize("scheme", ["kv:float32", "k:float32", "x1:float32"])
def test_greedy_is_argmax_without_a_cache(model, scheme):
    """Against the plain forward pass on the whole text, one token at a time."""
    start, new = prompts(3, 6), 9
    layers, _ = convert_model(model, scheme)
    text = np.zeros((3, 6 + new), np.int32)
    text[:, :6] = start
    for index in range(new):
        text[:, 6 + index] = np.argmax(last_logits(model, jnp.asarray(text), jnp.asarray(5 + index)), axis=-1)
    got = generate(model, start, layers=layers, max_new_tokens=new)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, text[:, 6:])
    assert len(np.unique(text[:, 6:])) > 2  # a model that says one thing only would prove nothing


def test_a_lossy_cache_is_followed_step_by_step():
    """Keys that hardly determine the values, in int8: generation and steps by hand read the same cache."""
    model = DecoderLM(CONFIG, rngs=nnx.Rngs(1))
    model.unembedding[...] = 50 * model.unembedding[...]
    for block in model.blocks:
        kernel = block.attention.key.kernel
        kernel[...] = kernel[...] * jnp.logspace(0, -3, CONFIG.width)[:, None, None]
    layers, _ = convert_model(model, "k:int8")
    start = prompts(2, 16)
    step = nnx.jit(lambda model, token, layers, caches: model.with_cache(token, layers, caches))
    caches = init_caches(layers, 2, 32)
    first = nnx.jit(lambda model, tokens, caches: model.with_cache(tokens, layers, caches, fresh=True))
    logits, caches = first(model, jnp.asarray(start), caches)
    by_hand = []
    for _ in range(6):
        by_hand.append(jnp.argmax(logits[:, -1], axis=-1).astype(jnp.int32))
        logits, caches = step(model, by_hand[-1][:, None], layers, caches)
    got = generate(model, start, layers=layers, max_new_tokens=6)
    np.testing.assert_array_equal(got, np.stack(by_hand, axis=1))
    exact = generate(model, start, layers=convert_model(model, "kv:float32")[0], max_new_tokens=6)
    assert not np.array_equal(got, exact)  # or the cache was not in the way


def test_layers_take_the_implementation_that_they_are_made_with():
    """The kernel made for TPUs, interpreted; what it refuses is not done by another."""
    model = DecoderLM(dataclasses.replace(CONFIG, width=64, heads=4), rngs=nnx.Rngs(1))
    model.unembedding[...] = 50 * model.unembedding[...]
    texts = []
    for implementation in (None, "pallas_tpu"):
        layers, _ = convert_model(model, "k2:bf16", implementation=implementation)
        texts.append(generate(model, prompts(1, 5), layers=layers, max_new_tokens=3))
    np.testing.assert_array_equal(*texts)
    with pytest.raises(ValueError, match="unknown implementation 'palas_tpu'; did you mean 'pallas_tpu'"):
        convert_model(model, "k2:bf16", implementation="palas_tpu")
    refused, _ = convert_model(model, "kv:kivi4", implementation="pallas_tpu")
    with pytest.raises(NotImplementedError, match="kivi"):
        generate(model, prompts(1, 5), layers=refused, max_new_tokens=3)


def test_ragged_prompts_are_what_they_are_alone(model):
    layers, _ = convert_model(model, "k:int16")
    padded = prompts(3, 12, seed=5)
    lengths = np.asarray([3, 12, 7])
    together = generate(model, padded, lengths, layers=layers, max_new_tokens=5)
    for row, length in enumerate(lengths):
        alone = generate(model, padded[row : row + 1, :length], layers=layers, max_new_tokens=5)
        np.testing.assert_array_equal(together[row], alone[0])
    garbage = padded.copy()
    garbage[0, 3:] = 0
    np.testing.assert_array_equal(
        together, generate(model, garbage, lengths, layers=layers, max_new_tokens=5)
    )


def test_caches_are_held_once_and_a_prompt_has_no_logits_but_its_last(model):
    """What bounds the largest batch: room for the caches alone, however long the prompts."""
    layers, _ = convert_model(model, "kv:float32")
    graph, params = nnx.split(model)
    tokens, counts = jnp.zeros((8, 512), jnp.int32), jnp.full((8,), 500, jnp.int32)
    prefilled = _prefill.lower(graph, params, layers, tokens, counts, capacity=640, dtype=None)
    assert "8x512x13x" not in prefilled.as_text()
    assert "8x1x13x" in prefilled.as_text()
    logits, caches = prefilled.compile()(params, layers, tokens, counts)
    held = sum(cache.nbytes for cache in caches)
    options = {"steps": 16, "sampling": Sampling(), "eos": None, "dtype": None}
    limit, key = jnp.asarray(16, jnp.int32), jax.random.key(0)
    found = _continue.lower(graph, params, layers, logits, caches, limit, key, **options).compile()
    assert found.memory_analysis().alias_size_in_bytes >= held


def test_the_last_logits_alone_are_those_of_all(model):
    layers, _ = convert_model(model, "kv:float32")
    counts, tokens = jnp.asarray([3, 9, 1], jnp.int32), jnp.asarray(prompts(3, 9))
    caches = init_caches(layers, 3, 16)
    every, _ = model.with_cache(tokens, layers, caches, count=counts, fresh=True)
    alone, _ = model.with_cache(tokens, layers, caches, count=counts, fresh=True, last=True)
    wanted = np.asarray(every)[np.arange(3), np.asarray(counts) - 1]
    np.testing.assert_allclose(alone[:, 0], wanted, rtol=1e-6, atol=1e-5)


def test_no_compilation_within_a_bucket(model, compilations):
    """Neither prompt lengths, nor ragged ones, nor the number of tokens, nor keys compile anything anew."""
    layers, _ = convert_model(model, "kv:bf16")
    sampling = Sampling(temperature=0.7)

    def run(length, new, seed):
        lengths = np.asarray([1, length])
        key = jax.random.key(seed)
        return generate(
            model, prompts(2, length), lengths, layers=layers, max_new_tokens=new, sampling=sampling, key=key
        )

    run(5, 4, 0)
    assert compilations() > 0
    for length, new in ((5, 4), (6, 4), (16, 16), (2, 1)):
        assert run(length, new, seed=length).shape == (2, new)
    assert compilations() == 0
    run(17, 4, 0)
    assert compilations() > 0  # the next bucket: the count above could have failed


@pytest.mark.parametrize(("length", "expected"), [(1, 16), (16, 16), (17, 32), (33, 64), (128, 128)])
def test_buckets(length, expected):
    assert bucket(length) == expected


def test_eos_ends_a_sequence_and_only_that(model):
    layers, _ = convert_model(model, "kv:float32")
    free = np.asarray(generate(model, prompts(4, 6), layers=layers, max_new_tokens=12))
    eos = int(free[0, 3])
    ended = np.asarray(generate(model, prompts(4, 6), layers=layers, max_new_tokens=12, eos=eos))
    for row, text in zip(ended, free, strict=True):
        stop = int(np.argmax(text == eos)) if eos in text else len(text)
        np.testing.assert_array_equal(row[:stop], text[:stop])
        assert (row[stop:] == eos).all()


def test_keys_make_samples(model):
    layers, _ = convert_model(model, "kv:float32")

    def run(seed, **how):
        key = jax.random.key(seed)
        sampling = Sampling(temperature=2.0, **how)
        return np.asarray(
            generate(model, prompts(2, 6), layers=layers, max_new_tokens=16, sampling=sampling, key=key)
        )

    np.testing.assert_array_equal(run(0), run(0))
    assert not np.array_equal(run(0), run(1))
    greedy = generate(model, prompts(2, 6), layers=layers, max_new_tokens=16)
    np.testing.assert_array_equal(run(0, top_k=1), greedy)
    np.testing.assert_array_equal(run(3, top_p=1e-6), greedy)


@given(
    logits=st.lists(st.integers(-40, 40), min_size=2, max_size=9, unique=True),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    top_k=st.sampled_from([None, 1, 3, 50]),
    top_p=st.sampled_from([None, 0.1, 0.5, 0.9, 1.0]),
)
def test_filters_against_plain_loops(logits, temperature, top_k, top_p):
    values = np.asarray(logits, np.float64) / 10 / temperature
    order = list(np.argsort(-values))
    kept = order[: top_k or len(order)]
    if top_p is not None:
        p = np.exp(values[kept]) / np.exp(values[kept]).sum()
        mass, nucleus = 0.0, []
        for token, share in zip(kept, p, strict=True):
            if mass < top_p - 1e-6:
                nucleus.append(token)
            mass += share
        if any(abs(m - top_p) < 1e-5 for m in np.cumsum(p)[:-1]):
            return  # the nucleus hangs on a rounding error
        kept = nucleus
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    got = np.asarray(filtered(jnp.asarray([logits], jnp.float32) / 10, sampling))[0]
    expected = np.full(len(logits), MASK)
    expected[kept] = values[kept]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_samples_follow_the_filtered_distribution():
    logits = jnp.log(jnp.asarray([0.5, 0.3, 0.15, 0.05]))
    for sampling, expected in (
        (Sampling(temperature=1.0), [0.5, 0.3, 0.15, 0.05]),
        (Sampling(temperature=1.0, top_k=2), [0.625, 0.375, 0, 0]),
        (Sampling(temperature=1.0, top_p=0.7), [0.625, 0.375, 0, 0]),
        (Sampling(temperature=0.5), np.asarray([0.25, 0.09, 0.0225, 0.0025]) / 0.365),
    ):
        drawn = sample(jnp.broadcast_to(logits, (20_000, 4)), jax.random.key(0), sampling)
        shares = np.bincount(np.asarray(drawn), minlength=4) / 20_000
        np.testing.assert_allclose(shares, expected, atol=0.015)  # four standard errors
        assert (shares[np.asarray(expected) == 0] == 0).all()


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.1}],
)
def test_sampling_refuses_nonsense(wrong):
    with pytest.raises(ValueError, match="expected"):
        Sampling(**wrong)


def test_arguments_that_do_not_fit(model):
    layers, _ = convert_model(model, "kv:float32")
    for lengths in ([0, 3], [3, 7], [3]):
        with pytest.raises(ValueError, match=r"lengths = .*expected one of 1\.\.6 for each of 2"):
            generate(model, prompts(2, 6), np.asarray(lengths), layers=layers, max_new_tokens=1)
    with pytest.raises(ValueError, match="max_new_tokens = 0"):
        generate(model, prompts(2, 6), layers=layers, max_new_tokens=0)
    with pytest.raises(ValueError, match="needs a key"):
        generate(model, prompts(2, 6), layers=layers, max_new_tokens=1, sampling=Sampling(temperature=1.0))


def test_learned_positions_bound_generation():
    config = ModelConfig(vocab=13, layers=1, width=16, heads=2, position="learned", max_length=24)
    model = DecoderLM(config, rngs=nnx.Rngs(0))
    layers, _ = convert_model(model, "kv:float32")
    with pytest.raises(ValueError, match=r"20 \+ 5 tokens are more than 24 learned positions"):
        generate(model, prompts(1, 20), layers=layers, max_new_tokens=5)
    start = prompts(1, 20)
    got = generate(
        model, start, layers=layers, max_new_tokens=4
    )  # buckets of 32 + 16: longer than the positions
    text = np.pad(start, ((0, 0), (0, 4)))
    for index in range(20, 24):
        text[:, index] = np.argmax(last_logits(model, jnp.asarray(text), jnp.asarray(index - 1)), axis=-1)
    np.testing.assert_array_equal(got, text[:, 20:])


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (np.zeros((0, 3), np.int32), r"shape \(0, 3\)"),
        (np.zeros((2, 0), np.int32), r"shape \(2, 0\)"),
        (np.array([[1, -1]], np.int32), r"tokens -1\.\.1, the vocabulary is 0\.\."),
        (np.array([[1, 10_000]], np.int32), r"tokens 1\.\.10000, the vocabulary is 0\.\."),
    ],
)
def test_prompts_that_are_none_are_named(prompts, message):
    model = DecoderLM(CONFIG, rngs=nnx.Rngs(0))
    layers, _ = convert_model(model, "kv:float32")
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, layers=layers, max_new_tokens=1)
    with pytest.raises(ValueError, match="1e-39"):
        Sampling(temperature=1e-39)
