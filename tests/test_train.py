"""Training learns, goes on bit for bit where it stopped, and its parts do what they say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import slimjax.train
from slimjax import checkpoint
from slimjax.config import ModelConfig, TrainConfig
from slimjax.data import Corpus
from slimjax.numerics import cross_entropy
from slimjax.optimizer import adamw, initial, numbers
from slimjax.train import (
    conditioning_penalty,
    held_out,
    initial_state,
    schedule,
    state_shapes,
    train,
    trained_model,
)

MODEL = ModelConfig(vocab=16, layers=1, width=16, heads=2, mlp_width=16)
TRAIN = TrainConfig(steps=6, batch=4, length=12, learning_rate=3e-3, warmup=2, log_every=2)


@pytest.fixture(scope="module")
def corpus():
    """A text with a rule: each token is the one before plus one or plus three, modulo 16."""
    steps = np.random.default_rng(0).choice([1, 3], 4000)
    text = (np.cumsum(steps) % 16).astype(np.uint8)
    return Corpus(train=text[:3600], held_out=text[3600:], vocab=16)


def equal(a, b):
    """All leaves of both trees bit-equal."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in pairs)


def close(a, b, atol):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.allclose(np.asarray(x), np.asarray(y), atol=atol) for x, y in pairs)


def test_it_learns_the_rule(corpus):
    """From log 16 = 2.77 nats to near the text's entropy, log 2 = 0.69."""
    config = dataclasses.replace(TRAIN, steps=200, batch=16, learning_rate=1e-2, warmup=10, log_every=20)
    lines = []
    state = train(MODEL, config, corpus, on_step=lines.append)
    assert lines[0]["loss"] > 1.5
    assert 0.6 < lines[-1]["loss"] < 0.8
    assert [line["step"] for line in lines] == list(range(20, 201, 20))
    assert lines[-1]["seconds_left"] == 0
    assert lines[5]["tokens_per_second"] > 0
    windows = corpus.held_out_windows(8, 24)
    held_out = cross_entropy(
        trained_model(MODEL, state)(jnp.asarray(windows[:, :-1])), jnp.asarray(windows[:, 1:])
    )
    assert float(held_out) < 0.85
    assert int(state.step) == 200


def test_stopping_and_going_on_is_bit_exact(corpus, tmp_path):
    whole = train(MODEL, TRAIN, corpus)
    half = train(MODEL, TRAIN, corpus, until=3)
    assert int(half.step) == 3
    checkpoint.save(tmp_path, 3, half)
    restored = checkpoint.restore(tmp_path, initial_state(MODEL, TRAIN))
    assert equal(train(MODEL, TRAIN, corpus, state=restored), whole)
    other = train(MODEL, dataclasses.replace(TRAIN, seed=1), corpus)
    assert not equal(other.params, whole.params)


def test_losses_reported_after_going_on_are_those_of_an_unbroken_run(corpus, tmp_path):
    """Stopped inside the two steps a report is the mean of."""
    whole, parts = [], []
    train(MODEL, TRAIN, corpus, on_step=whole.append)

    def stop_after(steps):
        taken = iter(range(1, 100))
        return lambda: next(taken) == steps

    def save(state):
        checkpoint.save(tmp_path, int(state.step), state)

    state = None
    for count, at in ((3, 3), (2, 5), (9, 6)):
        state = train(
            MODEL, TRAIN, corpus, on_step=parts.append, state=state, save=save, stop=stop_after(count)
        )
        assert int(state.step) == at
        state = checkpoint.restore(tmp_path, state_shapes(MODEL, TRAIN))
    assert list(checkpoint.steps(tmp_path)) == [3, 5, 6]
    assert [(line["step"], line["loss"]) for line in parts] == [
        (line["step"], line["loss"]) for line in whole
    ]


def test_it_saves_every_so_many_steps_and_at_the_end(corpus):
    saved = []
    train(MODEL, TRAIN, corpus, save=lambda state: saved.append(int(state.step)), save_every=4)
    assert saved == [4, 6]


@pytest.mark.parametrize("bad", [3, 4, 6])
def test_a_loss_that_is_not_finite_names_its_step_and_saves_nothing(corpus, monkeypatch, bad):
    """A batch of not-a-number cannot be had from integers, so the loss of one step is replaced."""
    compiled, saved, reported = slimjax.train._compiled_step, [], []

    def broken(*configs):
        def step(state, tokens, given):
            index = int(state.step) + 1
            state, loss = compiled(*configs)(state, tokens, given)
            return state, loss * jnp.asarray(np.nan if index == bad else 1.0, loss.dtype)

        return step

    monkeypatch.setattr(slimjax.train, "_compiled_step", broken)
    with pytest.raises(FloatingPointError, match=f"step {bad}: the loss is nan"):
        train(
            MODEL,
            TRAIN,
            corpus,
            on_step=lambda line: reported.append(line["step"]),
            save=lambda state: saved.append(int(state.step)),
            save_every=1,
        )
    assert saved == list(range(1, bad))
    assert reported == [step for step in (2, 4) if step < bad]


def test_the_held_out_score_is_the_mean_over_its_windows(corpus):
    state = initial_state(MODEL, TRAIN)
    found = held_out(MODEL, TRAIN, state, corpus, tokens=100)
    assert found["count"] == 3 * 4 * 12
    windows = corpus.held_out_windows(12, 12)
    logits = trained_model(MODEL, state)(jnp.asarray(windows[:, :-1]))
    expected = float(cross_entropy(logits, jnp.asarray(windows[:, 1:]))) / np.log(2)
    assert found["bits_per_byte"] == pytest.approx(expected, rel=1e-5)


def test_shapes_of_a_state_are_those_of_a_state():
    state, shapes = initial_state(MODEL, TRAIN), state_shapes(MODEL, TRAIN)
    assert jax.tree.structure(shapes) == jax.tree.structure(state)
    for shape, leaf in zip(jax.tree.leaves(shapes), jax.tree.leaves(state), strict=True):
        assert (shape.shape, shape.dtype) == (leaf.shape, leaf.dtype)


def test_the_first_step_has_no_learning_rate_and_the_second_does(corpus):
    start = initial_state(MODEL, TRAIN)
    assert equal(train(MODEL, TRAIN, corpus, until=1).params, start.params)
    assert not equal(train(MODEL, TRAIN, corpus, until=2).params, start.params)


def test_accumulation_is_the_same_mean(corpus):
    """Parts of a batch give its gradient; sums in another order differ by rounding, which Adam can enlarge."""
    config = dataclasses.replace(TRAIN, steps=3, warmup=1)
    whole = train(MODEL, config, corpus)
    parts = train(MODEL, dataclasses.replace(config, accumulation=4), corpus)
    moments, split = whole.opt_state.mu, parts.opt_state.mu
    assert close(moments, split, atol=1e-6)
    assert max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(moments)) > 1e-3


def test_bfloat16_computes_and_float32_remembers(corpus):
    state = train(MODEL, dataclasses.replace(TRAIN, dtype="bfloat16"), corpus)
    floats = [leaf for leaf in jax.tree.leaves((state.params, state.opt_state)) if leaf.ndim]
    assert {leaf.dtype for leaf in floats} == {jnp.dtype("float32")}
    exact = train(MODEL, TRAIN, corpus)
    assert not equal(state.params, exact.params)
    assert close(state.params, exact.params, atol=0.02)  # six steps of at most 3e-3


def test_clipping_bounds_the_gradient(corpus):
    config = dataclasses.replace(TRAIN, steps=2, warmup=1, clip=1e-3)
    moments = train(MODEL, config, corpus, until=1).opt_state.mu
    norm = float(jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(moments))))
    assert norm == pytest.approx(1e-3 * (1 - config.beta1), rel=1e-3)


def test_decay_shrinks_kernels_and_embeddings_alone(corpus):
    """A strong decay against none: norms and biases must not notice within a step, kernels must."""
    model = dataclasses.replace(MODEL, bias=True, norm="layernorm")

    def after(decay):
        config = dataclasses.replace(TRAIN, steps=3, warmup=1, weight_decay=decay)
        return dict(nnx.to_flat_state(train(model, config, corpus, until=2).params))

    decayed, free = after(10.0), after(0.0)
    for path, variable in decayed.items():
        same = np.array_equal(np.asarray(variable[...]), np.asarray(free[path][...]))
        assert same == (path[-1] not in ("kernel", "embedding")), path


def test_the_schedule():
    rate = schedule(TrainConfig(steps=100, warmup=10, learning_rate=2.0, final_fraction=0.1))
    assert float(rate(0)) == 0
    assert float(rate(5)) == pytest.approx(1.0)
    assert float(rate(10)) == pytest.approx(2.0)
    assert float(rate(55)) == pytest.approx(1.1)
    assert float(rate(100)) == pytest.approx(0.2)
    assert float(schedule(TrainConfig(steps=5, warmup=5, learning_rate=2.0))(5)) == pytest.approx(2.0)


# What a config may differ in without being compiled anew.
OTHERS = {
    "learning_rate": 1e-3,
    "beta1": 0.8,
    "beta2": 0.99,
    "weight_decay": 0.3,
    "clip": 0.01,
    "conditioning_penalty": 0.5,
    "warmup": 1,
    "steps": 9,
    "final_fraction": 0.7,
    "seed": 3,
    "log_every": 3,
}
PENALISED = dataclasses.replace(TRAIN, conditioning_penalty=0.1)


def test_configs_that_differ_in_numbers_share_one_program_and_none_is_forgotten(corpus):
    slimjax.train._compiled_step.cache_clear()
    base = train(MODEL, PENALISED, corpus, until=4)
    for name, value in OTHERS.items():
        model = dataclasses.replace(MODEL, key_init="orthogonal") if name == "beta1" else MODEL
        state = train(model, dataclasses.replace(PENALISED, **{name: value}), corpus, until=4)
        same = equal(state.params, base.params)
        assert same == (name == "log_every"), name
        assert (int(state.loss_count), int(base.loss_count)) == (1 if name == "log_every" else 2, 2)
    assert slimjax.train._compiled_step.cache_info().misses == 1
    assert slimjax.train.compiled_step(MODEL, PENALISED)._cache_size() == 1
    train(MODEL, TRAIN, corpus, until=1)  # without a penalty it is another program
    assert slimjax.train._compiled_step.cache_info().misses == 2


@pytest.mark.parametrize("clip", [None, 0.5])
def test_the_optimizer_is_that_of_optax(clip):
    config = dataclasses.replace(TRAIN, clip=clip, weight_decay=0.2, beta1=0.8)
    rates = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, 2, 6, 0.1 * config.learning_rate)
    theirs = optax.chain(
        optax.identity() if clip is None else optax.clip_by_global_norm(clip),
        optax.adamw(
            rates,
            b1=0.8,
            b2=config.beta2,
            weight_decay=0.2,
            mask=lambda tree: {"kernel": True, "bias": False},
        ),
    )
    random = np.random.default_rng(0)
    ours = expected = {name: jnp.asarray(random.normal(size=5), jnp.float32) for name in ("kernel", "bias")}
    moments, other = initial(ours), theirs.init(expected)
    for index in range(6):
        gradient = {name: jnp.asarray(random.normal(size=5), jnp.float32) for name in ours}
        ours, moments = adamw(
            numbers(config), gradient, moments, ours, step=jnp.asarray(index), clipped=clip is not None
        )
        with jax.numpy_dtype_promotion("standard"):
            updates, other = theirs.update(gradient, other, expected)
        expected = optax.apply_updates(expected, updates)
        assert schedule(config)(index) == pytest.approx(float(np.asarray(rates(index))), rel=1e-6)
        assert close(ours, expected, atol=1e-6)
    assert not close(ours, initial(ours).mu, atol=0.1)


def test_a_report_is_the_mean_of_its_steps_when_reports_come_more_often_after_a_restart(corpus):
    losses, lines = {}, []
    config = dataclasses.replace(TRAIN, log_every=4)
    state = train(MODEL, config, corpus, until=3, on_loss=losses.__setitem__)
    often = dataclasses.replace(config, log_every=2)
    train(MODEL, often, corpus, state=state, on_loss=losses.__setitem__, on_step=lines.append)
    assert [line["step"] for line in lines] == [4, 6]
    assert lines[0]["loss"] == pytest.approx(np.mean([losses[step] for step in range(1, 5)]), rel=1e-6)
    assert lines[1]["loss"] == pytest.approx((losses[5] + losses[6]) / 2, rel=1e-6)


@pytest.mark.parametrize("shape", [(12, 3, 4), (12, 2, 3), (6, 3, 4)])
def test_the_penalty_is_zero_for_orthogonal_keys_alone(shape):
    flat = (shape[0], shape[1] * shape[2])
    orthogonal = jax.nn.initializers.orthogonal()(jax.random.key(0), flat, jnp.float32).reshape(shape)
    assert float(conditioning_penalty(7 * orthogonal)) == pytest.approx(0, abs=1e-5)
    values = np.linspace(0.5, 2, min(flat)) ** 0.5
    u, _, v = np.linalg.svd(np.asarray(orthogonal).reshape(flat), full_matrices=False)
    uneven = jnp.asarray(((u * values) @ v).reshape(shape), jnp.float32)
    expected = np.var(values**2) / np.mean(values**2) ** 2
    assert float(conditioning_penalty(uneven)) == pytest.approx(expected, rel=1e-4)
    assert float(conditioning_penalty(0.01 * uneven)) == pytest.approx(expected, rel=1e-4)


def test_the_penalty_conditions_the_keys(corpus):
    def worst(penalty):
        config = dataclasses.replace(TRAIN, steps=100, learning_rate=1e-2, conditioning_penalty=penalty)
        kernel = trained_model(MODEL, train(MODEL, config, corpus)).blocks[0].attention.key.kernel[...]
        return np.linalg.cond(np.asarray(kernel).reshape(16, 16))

    assert worst(1.0) < 4 < worst(0.0)


def test_what_cannot_be_trained_is_refused(corpus):
    with pytest.raises(ValueError, match=r"corpus.vocab=16 does not fit .*vocab=8"):
        train(dataclasses.replace(MODEL, vocab=8), TRAIN, corpus)
    state = initial_state(MODEL, TRAIN)
    broken = jax.tree.map(lambda leaf: leaf * jnp.asarray(np.nan, leaf.dtype), state.params)
    with pytest.raises(FloatingPointError, match="step 1: the loss is nan"):
        train(MODEL, TRAIN, corpus, state=dataclasses.replace(state, params=broken))
