"""Which heads of a model get fewer bits, against the rows in its caches and loops, and heads that move unnoticed."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import suites
from flax import nnx

from slimjax import parse_scheme
from slimjax.cache import codec, read
from slimjax.config import ModelConfig
from slimjax.models.decoder import DecoderLM, convert_model, init_caches
from slimjax.solve.heads import SELECTORS, low_heads, random
from slimjax.solve.mixing import for_prompt, head_order, head_orders, measured, protected, reordered

CONFIG = ModelConfig(vocab=11, layers=2, width=32, heads=4, mlp_width=24, max_length=96)
MODELS = {
    "rope": dataclasses.replace(CONFIG, bias=True),
    "gqa": dataclasses.replace(CONFIG, heads=8, kv_heads=4, head_dim=8),
    "t5": dataclasses.replace(CONFIG, position="t5"),
    "three": dataclasses.replace(CONFIG, heads=3, width=24),
}
TEXT = "hadamard2-4"


def build(name="rope"):
    """Biases and heads of very different size, so that scores differ."""
    model = DecoderLM(MODELS[name], rngs=nnx.Rngs(0))
    draw = np.random.default_rng(5)
    for block in model.blocks:
        for part in (block.attention.key, block.attention.value):
            factors = jnp.asarray(np.exp(draw.standard_normal(part.kernel.shape[1:])), jnp.float32)
            part.kernel[...] = part.kernel[...] * factors[None]
            if part.bias is not None:
                part.bias[...] = 0.5 * factors
    return model


def tokens(batch=2, length=40, seed=0):
    return np.random.default_rng(seed).integers(0, 11, (batch, length)).astype(np.int32)


@nnx.jit
def through_cache(model, given, layers):
    """Half a prompt and then the rest: logits and caches."""
    half = given.shape[1] // 2
    caches = init_caches(layers, given.shape[0], 64)
    first, caches = model.with_cache(given[:, :half], layers, caches, fresh=True)
    rest, caches = model.with_cache(given[:, half:], layers, caches)
    return jnp.concatenate([first, rest], axis=1), caches


@nnx.jit
def filled(model, given, layers):
    """The first layer's cache of a prompt."""
    return model.with_cache(given, layers, init_caches(layers, given.shape[0], 64), fresh=True)[1][0]


def cached(model, scheme, given, **options):
    layers, _ = convert_model(model, scheme, **options)
    return through_cache(model, jnp.asarray(given), layers)


# The orders -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("basis", "share"), [("kv", 0.5), ("k", 0.25), ("v1", 0.5)])
def test_orders_follow_the_rows_in_the_cache(basis, share):
    """Every selector of rows alone, on what a float cache holds: keys after RoPE for kv, before it for k."""
    model, given = build(), tokens()
    _, caches = cached(model, f"{basis}:float32", given)
    for name, score in SELECTORS.items():
        orders = head_orders(model, given, f"{basis}:{TEXT}".replace("-4", f"-4(share={share})"), name)
        for cache, order in zip(caches, orders, strict=True):
            held = read(cache, codec("float32"), jnp.float32)
            flat = {stream: np.asarray(rows)[:, :40].reshape(80, 4, 8) for stream, rows in held.items()}
            keys, values = flat.get("k", flat.get("v")), flat.get("v", flat.get("k"))
            np.testing.assert_array_equal(order, low_heads(score(keys, values), share), err_msg=name)


def test_selectors_that_look_at_nothing():
    model, given = build(), tokens()
    for order in head_orders(model, given, f"kv:{TEXT}", "none"):
        assert order.tolist() == [0, 1, 2, 3]
    first, second = head_orders(model, given, f"kv:{TEXT}", "random", seed=3)
    assert first.tolist() == low_heads(random(4, (3, 0)), 0.5).tolist()
    assert second.tolist() == low_heads(random(4, (3, 1)), 0.5).tolist()
    # A layer of one width has nothing to order.
    orders = head_orders(model, given, ["kv:hadamard4", f"kv:{TEXT}"], "random", seed=4)
    assert orders[0].tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="did you mean 'priority'"):
        head_orders(model, given, f"kv:{TEXT}", "priorty")
    with pytest.raises(ValueError, match="3 schemes for 2 layers"):
        head_orders(model, given, [f"kv:{TEXT}"] * 3, "none")
    with pytest.raises(NotImplementedError, match="use one width"):
        head_orders(model, given, f"x1:{TEXT}", "priority")


def loop(case, keys, values):
    """A layer's output from raw keys and values [T, K, H], one sequence, query by query; RoPE or nothing."""
    weights = {name: np.asarray(array, np.float64) for name, array in case.arrays.items()}
    n, size = case.spec.heads, case.spec.head_dim
    x = case.x[0]
    q = np.einsum("td,dnh->tnh", x, weights["wq"]) + weights["bq"]
    out = np.zeros((len(x), n, size))
    turn = suites.POSITIONS["rope"] if case.spec.position.rotary else None
    for t, head in np.ndindex(len(x), n):
        mine = head * keys.shape[1] // n
        raw = [_turned(q[t, head], t, turn) @ _turned(keys[s, mine], s, turn) for s in range(t + 1)]
        p = np.exp(np.asarray(raw) / np.sqrt(size))
        out[t, head] = sum(p[s] * values[s, mine] for s in range(t + 1)) / p.sum()
    return np.einsum("tnh,nhd->td", out, weights["wo"])


def _turned(row, at, position):
    if position is None:
        return row
    half = len(row) // 2
    angle = at * position.theta ** (-np.arange(half) / half)
    a, b = row[:half], row[half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)])


@pytest.mark.parametrize(
    ("text", "layout", "position"),
    [("kv:hadamard2-4", "gqa", "none"), ("k:hadamard2-4", "mha", "rope"), ("k:flashq2-4", "mha", "none")],
)
def test_the_calibrated_selector_against_loops(text, layout, position):
    """One head's rows at a time through two bits: of basis k these change the values of every head."""
    case = suites.subject(text, layout, position, dtype="float32", batch=1, tokens=7)
    weights, x = case.arrays, case.x[0]
    keys = np.einsum("td,dkh->tkh", x, weights["wk"])
    values = np.einsum("td,dkh->tkh", x, weights["wv"])
    bias = weights["bk"]
    narrow = codec(parse_scheme(text).codec, bits=2)
    exact_map = None
    if text[:2] == "k:":
        flat = [weights[name].reshape(case.spec.width, -1) for name in ("wk", "wv")]
        exact_map = np.linalg.solve(*flat)

    def coded(rows):
        given = jnp.asarray(rows, jnp.float32)[None]
        return np.asarray(narrow.decode(narrow.encode(given)))[0].astype(np.float64)

    whole, expected = loop(case, keys + bias, values), []
    low = coded(keys) if text[:2] == "k:" else coded(keys + bias) - bias, coded(values)
    for head in range(case.spec.kv_heads):
        k, v = keys.copy(), values.copy()
        k[:, head] = low[0][:, head]
        if exact_map is None:
            v[:, head] = low[1][:, head]
        else:
            v = (k.reshape(7, -1) @ exact_map).reshape(v.shape)
        expected.append(np.linalg.norm(loop(case, k + bias, v) - whole) / np.linalg.norm(whole))
    found = measured(case.inputs, case.projections, case.spec)
    np.testing.assert_allclose(found, expected, rtol=2e-3)
    order = head_order(case.inputs, case.projections, case.spec, "calibrated")
    assert order.tolist() == low_heads(np.asarray(expected), 0.5).tolist()


def test_the_calibrated_selector_finds_the_head_that_matters():
    """A head whose output the projection ignores costs nothing, whatever its rows look like."""
    case = suites.subject("kv:flashq2-4", "mha", "none", dtype="float32", tokens=20)
    case.arrays["wo"][1] = 0
    found = measured(case.inputs, case.projections, case.spec)
    assert found[1] < 1e-6
    assert np.all(found[[0, 2, 3]] > 0.01)
    plain = dataclasses.replace(case.spec, scheme=parse_scheme("kv:flashq4"))
    with pytest.raises(ValueError, match="for two widths, such as flashq2-4"):
        measured(case.inputs, case.projections, plain)


# Layers in another order -----------------------------------------------------------------------------------

MOVES = [[2, 0, 3, 1], [3, 2, 1, 0]]


@pytest.mark.parametrize(
    ("name", "scheme"),
    [("rope", "kv:float32"), ("rope", "k:float32+2"), ("gqa", "kv:float32"), ("t5", "k:float32"),
     ("rope", "v1:float32"), ("rope", "kr:float32"), ("rope", "x1:float32")],
)  # fmt: skip
def test_the_model_is_the_same_in_any_order(name, scheme):
    model, given = build(name), tokens(length=12)
    plain, _ = cached(model, scheme, given)
    moved, caches = cached(model, scheme, given, orders=MOVES)
    # What is solved for has the rounding of float32 times W_K's condition number.
    most = (1e-5 if scheme[:2] in ("kv", "x1") else 2e-3) * np.linalg.norm(plain)
    assert np.linalg.norm(moved - plain) < most
    if scheme == "kv:float32":
        _, held = cached(model, scheme, given)
        rows, was = (np.asarray(each[0].streams["k"].codes()) for each in (caches, held))
        np.testing.assert_allclose(rows, was[:, :, MOVES[0]], atol=1e-5)
    # A converted layer moves as well, and is what converting the moved one gives.
    if not scheme.startswith("x"):
        layers, _ = convert_model(model, scheme)
        again = tuple(reordered(layer, order) for layer, order in zip(layers, MOVES, strict=True))
        logits, _ = through_cache(model, jnp.asarray(given), again)
        assert np.linalg.norm(logits - plain) < most


@pytest.mark.parametrize(("name", "basis"), [("rope", "kv"), ("rope", "k"), ("three", "kv")])
def test_the_heads_in_front_are_those_of_fewer_bits(name, basis):
    """What the cache of two widths holds is, head by head, what two caches of one width hold of the plain model."""
    model, given = build(name), tokens()
    scheme, heads = f"{basis}:{TEXT}", MODELS[name].K
    orders = head_orders(model, given, scheme, "priority")
    layers, _ = convert_model(model, scheme, orders=orders)
    held = read(filled(model, jnp.asarray(given), layers), codec("hadamard", bits="2-4"), jnp.float32)
    for bits, places in ((2, range(heads // 2)), (4, range(heads // 2, heads))):
        plain, _ = convert_model(model, f"{basis}:hadamard{bits}")
        alone = filled(model, jnp.asarray(given), plain)
        rows = read(alone, codec("hadamard", bits=bits), jnp.float32)
        for stream, place in ((stream, place) for stream in held for place in places):
            expected = rows[stream][:, :, orders[0][place]]
            error = np.abs(np.asarray(held[stream][:, :, place] - expected))
            assert np.mean(error > 1e-4) < 0.02  # a sum of another order may move a code by a step


def test_a_prompt_chooses_its_own_heads():
    """Layers in the order of the prompt's own rows, whose maps still give the values; prompts differ in it."""
    model, scheme = build(), f"k:{TEXT}+2"
    layers, _ = convert_model(model, scheme)
    prompts = [tokens(1, 3, seed=seed) for seed in range(12)]
    orders = [head_orders(model, prompt, scheme, "priority") for prompt in prompts]
    assert len({str(order) for order in orders}) > 1
    moved = next(index for index, order in enumerate(orders) if order[0].tolist() != [0, 1, 2, 3])
    chosen = for_prompt(model, prompts[moved], layers)
    for layer, block, order in zip(chosen, model.blocks, orders[moved], strict=True):
        trained = block.attention.projections()
        np.testing.assert_array_equal(layer.projections.wk, np.asarray(trained.wk)[:, order])
        np.testing.assert_array_equal(layer.weights.k_bias, np.asarray(trained.bk)[order])
        rows = np.concatenate([np.asarray(layer.projections.wk).reshape(32, 32), layer.weights.extra], axis=1)
        values = np.asarray(trained.wv)[:, order]
        found = np.einsum("de,ekh->dkh", rows, layer.weights.w_kv)
        assert np.linalg.norm(found - values) < 1e-3 * np.linalg.norm(values)


def test_layers_in_another_order_that_cannot_be():
    model = build()
    layers, _ = convert_model(model, "x1:float32")
    assert reordered(layers[0], [0, 1, 2, 3]) is layers[0]
    with pytest.raises(NotImplementedError, match="use kv, k, kr or v"):
        reordered(layers[0], [1, 0, 2, 3])
    with pytest.raises(ValueError, match="1 orders for 2 layers"):
        convert_model(model, "kv:float32", orders=[None])
    with pytest.raises(ValueError, match="not a permutation of 4"):
        convert_model(model, "kv:float32", orders=[None, [0, 1, 2, 2]])


# Protected layers ------------------------------------------------------------------------------------------


def test_protected_layers():
    found = protected("kv:flashq2", "kv:flashq4", 5, 1, 2)
    assert [str(each) for each in found] == [
        "kv:flashq4",
        "kv:flashq2",
        "kv:flashq2",
        "kv:flashq4",
        "kv:flashq4",
    ]
    assert protected(found[1], found[0], 2, 0, 0) == (found[1],) * 2
    assert protected(found[1], found[0], 2, 2, 0) == (found[0],) * 2
    layers, _ = convert_model(build(), protected("kv:flashq2", "kv:bf16", 2, 1, 0))
    assert [layer.spec.scheme.codec for layer in layers] == ["bf16", "flashq"]
    for first, last in ((-1, 0), (0, -1), (3, 3)):
        with pytest.raises(ValueError, match="protected layers of 5"):
            protected("kv:flashq2", "kv:flashq4", 5, first, last)
