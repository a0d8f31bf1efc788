"""Attention in integers against loops over tiles (``oracle_turbo``), through caches and without."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle_turbo
import pytest
import suites

import oracle
from slimjax import DecodeSpec, Position, parse_scheme
from slimjax.attention.bases import basis
from slimjax.attention.blocks import SLOTS
from slimjax.attention.compute import compute_of
from slimjax.attention.layer import attend_cached, init_cache, prefill
from slimjax.attention.projections import DecodeWeights, Projections
from slimjax.attention.reference import geometry
from slimjax.attention.sas import PUBLISHED
from slimjax.cache import append, codec_of
from slimjax.kernels.api import decode
from slimjax.solve import convert

LENGTHS = (75, 64, 33)
SAS = {"exponential": lambda x: oracle_turbo.cut(x, 6.0, PUBLISHED)}


def spec_of(scheme, kv_heads=2, **fields):
    return DecodeSpec(
        scheme=parse_scheme(scheme),
        heads=4,
        kv_heads=kv_heads,
        head_dim=8,
        width=32,
        dtype="float32",
        **fields,
    )


def arrays(*shapes, seed=0):
    draw = np.random.default_rng(seed)
    return [draw.standard_normal(shape).astype(np.float32) for shape in shapes]


def cache_of(spec, k, v, chunks, lengths=LENGTHS):
    """Keys and values cached in chunks, each sequence to its length."""
    cache = init_cache(spec, batch=len(lengths), capacity=96)
    for first, last in itertools.pairwise((0, *np.cumsum(chunks))):  # the first is a prompt
        count = np.clip(np.array(lengths) - first, 0, last - first)
        part = {"k": jnp.asarray(k[:, first:last]), "v": jnp.asarray(v[:, first:last])}
        cache = append(cache, part, codec_of(spec.scheme), jnp.asarray(count, jnp.int32), prompt=not first)
    return cache


def integer_tiles(cache, spec, sequence, head):
    """The codes that a cache holds of one sequence and head, tile by tile in order, and their scales."""
    made, length = codec_of(spec.scheme), int(cache.length[sequence])
    found = {}
    for name, stored in cache.streams.items():
        whole = length // made.span * made.span
        tiles = made.integers(stored.tiles.tiles())
        codes = [np.asarray(tiles.codes)[sequence, i, :, head].astype(int) for i in range(whole // made.tile)]
        scales = [float(tiles.scale[sequence, i, head]) for i in range(whole // made.tile)]
        buffer, marks = (
            np.asarray(stored.buffer)[sequence, :, head],
            np.asarray(stored.scales)[sequence, :, head, 0],
        )
        for at in range(0, length - whole, made.tile):
            end = at + min(made.tile, length - whole - at)
            codes.append(buffer[at:end].astype(int))
            scales.append(float(marks[at]))
            assert np.all(marks[at:end] == marks[at])
        found[name] = (codes, scales)
    return [(k, k_scale, v, v_scale) for k, k_scale, v, v_scale in zip(*found["k"], *found["v"], strict=True)]


def one_by_one(queries, tiles, length, **options):
    """The last queries of a sequence, each a tile of its own."""
    first = length - len(queries)
    return np.concatenate(
        [
            oracle_turbo.attend(
                queries[t : t + 1], tiles, lambda _, s, t=t: s <= first + t, scale=8**-0.5, **options
            )
            for t in range(len(queries))
        ]
    )


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(
    "codec", ["flashq8", "flashq4", "flashq3", "flashq2", "flashq2-4", "flashq4(window=64)"]
)
def test_decoding_is_a_prefill_over_the_same_codes(codec, kv_heads):
    spec = spec_of(f"kv:{codec}/32", kv_heads)
    k, v, q = arrays((3, 75, kv_heads, 8), (3, 75, kv_heads, 8), (3, 2, 4, 8))
    cache = cache_of(spec, k, v, (64, 11) if "window" in codec else (40, 24, 11))
    out = np.asarray(jax.jit(decode, static_argnums=3)(jnp.asarray(q), cache, DecodeWeights(), spec))
    for sequence, length in enumerate(LENGTHS):
        for head in range(4):
            expected = one_by_one(
                q[sequence, :, head], integer_tiles(cache, spec, sequence, head // (4 // kv_heads)), length
            )
            np.testing.assert_allclose(out[sequence, :, head], expected, rtol=1e-4, atol=1e-5)


def test_tokens_under_a_scale_that_grew_weigh_what_they_are():
    """Before anything is encoded every token has the scale of its time: integer products against float ones."""
    spec = spec_of("kv:flashq8/32")
    k, v, q = arrays((3, 20, 2, 8), (3, 20, 2, 8), (3, 1, 4, 8))
    size = np.logspace(-1.5, 0.5, 20, dtype=np.float32)[None, :, None, None]
    cache = cache_of(spec, k * size, v * size, (1,) * 20, (20, 20, 1))
    marks = np.asarray(cache.streams["v"].scales)[0, :20, 0, 0]
    assert marks[-1] > 10 * marks[0]
    whole, plain = (
        np.asarray(decode(jnp.asarray(q), cache, DecodeWeights(), spec_of(f"kv:flashq8/32{how}")))
        for how in ("", "#float")
    )
    assert 0 < np.linalg.norm(whole - plain) < 0.02 * np.linalg.norm(plain)


OPTIONS = {
    "": {},
    "#int8(p=static)": {"p": "static"},
    "#int8(p=row)": {"p": "row"},
    "#int8(denominator=after)": {"denominator": "after"},
    "@sas": SAS,
    "@sas#int8(rescale=softmax)": SAS | {"rescale": lambda x: oracle_turbo.cut(x, 6.0, PUBLISHED)},
    "@sas(10,2)#int8(p=row,denominator=after,rescale=softmax)": {
        "p": "row",
        "denominator": "after",
        "exponential": lambda x: oracle_turbo.cut(
            x, 10.0, np.polyfit(np.linspace(0, 1, 100), np.exp(-np.linspace(0, 1, 100)), 2)
        ),
        "rescale": lambda x: oracle_turbo.cut(
            x, 10.0, np.polyfit(np.linspace(0, 1, 100), np.exp(-np.linspace(0, 1, 100)), 2)
        ),
    },
}


@pytest.mark.parametrize("options", OPTIONS)
def test_what_the_paper_leaves_open(options):
    """Each option against its own definition; scores wide enough for SAS to cut."""
    spec = spec_of(f"kv:flashq4/32{options}")
    k, v, q = arrays((3, 75, 2, 8), (3, 75, 2, 8), (3, 2, 4, 8), seed=1)
    q = 3 * q
    cache = cache_of(spec, k, v, (40, 24, 11))
    out = np.asarray(decode(jnp.asarray(q), cache, DecodeWeights(), spec))
    plain = np.asarray(decode(jnp.asarray(q), cache, DecodeWeights(), spec_of("kv:flashq4/32")))
    for sequence, length in enumerate(LENGTHS):
        tiles = integer_tiles(cache, spec, sequence, 1)
        expected = one_by_one(q[sequence, :, 3], tiles, length, **OPTIONS[options])
        np.testing.assert_allclose(out[sequence, :, 3], expected, rtol=1e-4, atol=1e-5)
    if options == "#int8(p=row)":  # one query is a tile of its own here; a prompt's tiles hold more
        np.testing.assert_array_equal(out, plain)
    else:
        assert not options or np.abs(out - plain).max() > 1e-4  # an option that changes nothing is not there


@pytest.mark.parametrize("tokens", [9, 40])
@pytest.mark.parametrize("position", ["none", "rope", "alibi"])
def test_a_prompt_on_itself(tokens, position):
    """Prefill in tiles of 16 queries and 16 keys, ragged prompts."""
    spec = spec_of("kv:flashq4/32#int8(tile=16)", position=Position(kind=position))
    q, k, v = arrays((2, tokens, 4, 8), (2, tokens, 2, 8), (2, tokens, 2, 8), seed=2)
    lengths = np.array([tokens, tokens - 4])
    steps = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32)[None], (2, tokens))
    where = geometry(steps, steps[0], jnp.asarray(lengths, jnp.int32), None, spec)
    out = np.asarray(compute_of(spec).attend(*map(jnp.asarray, (q, k, v)), where, spec))
    if position == "alibi":
        exact = np.asarray(
            compute_of(spec_of("kv:float32", position=spec.position)).attend(
                *map(jnp.asarray, (q, k, v)), where, spec_of("kv:float32", position=spec.position)
            )
        )
        assert np.linalg.norm(out[0] - exact[0]) < 0.05 * np.linalg.norm(exact[0])
        return
    turned = oracle.rotate(q, np.arange(tokens)) if position == "rope" else q
    for sequence, head in ((0, 0), (1, 3)):
        length = lengths[sequence]
        keys, values = (each[sequence, :length, head // 2] for each in (k, v))
        tiles = [
            (*oracle_turbo.quantise(keys[at : at + 16]), *oracle_turbo.quantise(values[at : at + 16]))
            for at in range(0, length, 16)
        ]
        for at in range(0, length, 16):
            expected = oracle_turbo.attend(
                turned[sequence, at : at + 16, head], tiles, lambda t, s, at=at: s <= at + t, scale=8**-0.5
            )
            rows = min(16, length - at)
            np.testing.assert_allclose(
                out[sequence, at : at + rows, head], expected[:rows], rtol=2e-3, atol=2e-4
            )


def test_weights_of_a_prompt_may_have_a_scale_for_each_query():
    """It tells in the second tile of keys, where a query's largest weight so far need not be."""
    q, k, v = arrays((1, 32, 4, 8), (1, 32, 2, 8), (1, 32, 2, 8), seed=2)
    steps = jnp.arange(32, dtype=jnp.int32)[None]
    outs = []
    for how in ("row", "tile"):
        spec = spec_of(f"kv:flashq4/32#int8(p={how},tile=16)")
        where = geometry(steps, steps[0], jnp.full((1,), 32, jnp.int32), None, spec)
        outs.append(np.asarray(compute_of(spec).attend(*map(jnp.asarray, (3 * q, k, v)), where, spec)))
        tiles = [
            (*oracle_turbo.quantise(k[0, at : at + 16, 1]), *oracle_turbo.quantise(v[0, at : at + 16, 1]))
            for at in (0, 16)
        ]
        expected = oracle_turbo.attend(
            3 * q[0, 16:, 3], tiles, lambda t, s: s <= 16 + t, scale=8**-0.5, p=how
        )
        np.testing.assert_allclose(outs[-1][0, 16:, 3], expected, rtol=2e-3, atol=2e-4)
    assert np.abs(outs[0] - outs[1]).max() > 1e-4


def _layer(scheme, **fields):
    spec = spec_of(scheme, **fields)
    wq, wk, wv, wo = arrays((32, 4, 8), (32, 2, 8), (32, 2, 8), (4, 8, 32), seed=3)
    weights = Projections(
        *(), wq=jnp.asarray(wq / 6), wk=jnp.asarray(wk / 6), wv=jnp.asarray(wv / 6), wo=jnp.asarray(wo / 6)
    )
    return convert(weights, spec).layer


def test_a_layer_prefills_and_decodes_in_integers():
    exact, turbo = _layer("kv:float32"), _layer("kv:flashq8/32")
    x = jnp.asarray(arrays((2, 60, 32))[0])
    found = {}
    for name, layer in (("exact", exact), ("turbo", turbo)):
        out, cache = prefill(x[:, :50], layer, init_cache(layer.spec, batch=2, capacity=64))
        steps = [out]
        for at in range(50, 60):
            out, cache = jax.jit(attend_cached)(x[:, at : at + 1], layer, cache)
            steps.append(out)
        found[name] = np.concatenate(steps, axis=1)
    error = np.linalg.norm(found["turbo"] - found["exact"]) / np.linalg.norm(found["exact"])
    assert 1e-3 < error < 3e-2  # INT8 it is, and no worse


@pytest.mark.parametrize("scheme", ["kv:flashq4/32", "kv:float32#int8", "kv:float32#sage"])
def test_what_padding_holds_does_not_matter(scheme):
    """Ragged prompts and chunks: rows that are padding share tiles with rows that are not, but no scale."""
    layer = _layer(scheme)
    x = arrays((2, 14, 32), seed=5)[0]
    outs = []
    for filler in (0.0, 100.0):
        padded = x.copy()
        padded[1, 6:10] = padded[1, 12:] = filler
        cache = init_cache(layer.spec, batch=2, capacity=64)
        first, cache = prefill(jnp.asarray(padded[:, :10]), layer, cache, count=jnp.array([10, 6], jnp.int32))
        then, _ = attend_cached(jnp.asarray(padded[:, 10:]), layer, cache, count=jnp.array([4, 2], jnp.int32))
        outs.append((np.asarray(first), np.asarray(then)))
    for here, there in zip(*outs, strict=True):
        np.testing.assert_array_equal(here[0], there[0])
    np.testing.assert_array_equal(outs[0][0][1, :6], outs[1][0][1, :6])
    np.testing.assert_array_equal(outs[0][1][1, :2], outs[1][1][1, :2])


def test_sage_rounds_weights_before_they_are_divided():
    """40,000 equal weights: 1 each in float16 and exact, where 1/40,000 would be rounded by a thousandth."""
    spec = spec_of("kv:bf16#sage(tile=4096)")
    q, k = jnp.ones((1, 1, 4, 8)), jnp.zeros((1, 40_000, 2, 8))
    last = jnp.full((1, 1), 39_999, jnp.int32)
    where = geometry(last, jnp.arange(40_000, dtype=jnp.int32), last[0] + 1, None, spec)
    out = compute_of(spec).attend(q, k, jnp.ones_like(k), where, spec)
    np.testing.assert_allclose(out, 1, atol=1e-6)


@pytest.mark.parametrize(
    "scheme",
    ["kv:flashq4/64", "kv:flashq3/64", "kv:flashq2/64", "kv:flashq2-4/64", "kv:flashq4/64@sas"],
)
def test_a_step_multiplies_integers_and_makes_no_floats_of_the_cache(scheme):
    spec = spec_of(scheme)
    cache = init_cache(spec, batch=2, capacity=2048)
    packed = [leaf for leaf in jax.tree.leaves(cache.streams) if leaf.dtype == jnp.uint8]
    assert packed
    assert sum(leaf.nbytes for leaf in packed) > 0.6 * cache.nbytes
    step = jax.make_jaxpr(decode, static_argnums=3)(jnp.zeros((2, 1, 4, 8)), cache, DecodeWeights(), spec)
    dots = [each for each in suites.equations(step.jaxpr) if each.primitive.name == "dot_general"]
    assert len(dots) == 2
    for dot in dots:
        assert [each.aval.dtype for each in dot.invars] == [jnp.int8, jnp.int8]
        assert dot.outvars[0].aval.dtype == jnp.int32
    values = 2 * 2048 * 2 * 8
    floats = [
        variable.aval
        for equation in suites.equations(step.jaxpr)
        for variable in equation.outvars
        if jnp.issubdtype(getattr(variable.aval, "dtype", jnp.int8), jnp.floating)
    ]
    assert max(each.size for each in floats) < values / 4


@pytest.mark.parametrize(
    "scheme",
    ["kv:flashq4", "kv:flashq4#float", "kv:kivi2", "kv:gear_l2", "kv:turboquant4", "kv:hadamard_int4", "kv:nvfp4",
     "kv:int4", "kv:fp8", "kv:bf16", "kv:bf16#sage", "k:flashq4", "k:int16+8", "x1:xquant4", "x:xquant4",
     "kr:kivi4", "v1:int8"],
)  # fmt: skip
def test_a_step_never_decodes_the_whole_cache(scheme):
    """Peak of a compiled step's temporaries: some blocks and the scores, at a capacity of many blocks."""
    position = Position(kind="none" if scheme[:2] == "x:" else "rope")
    spec = dataclasses.replace(spec_of(scheme, 4, position=position), head_dim=32, width=128)
    layer = convert(
        Projections(
            *(),
            **{
                n: jnp.asarray(a / 12)
                for n, a in zip(
                    ("wq", "wk", "wv", "wo"),
                    arrays((128, 4, 32), (128, 4, 32), (128, 4, 32), (4, 32, 128)),
                    strict=True,
                )
            },
        ),
        spec,
    ).layer
    slots = 16_384
    cache = jax.eval_shape(lambda: init_cache(spec, batch=1, capacity=slots))
    compiled = (
        jax.jit(decode, static_argnums=3)
        .lower(jax.ShapeDtypeStruct((1, 1, 4, 32), jnp.float32), cache, layer.weights, spec)
        .compile()
    )
    decoded = slots * 4 * sum(heads * size for heads, size in basis(spec).streams(spec).values())
    # XLA on CPU copies what a loop reads, as it is stored; that is not of our making.
    assert compiled.memory_analysis().temp_size_in_bytes < cache.nbytes + decoded / 4
    widest = max(heads * size for heads, size in basis(spec).streams(spec).values())
    for tokens in (1, 2):
        x = jax.ShapeDtypeStruct((1, tokens, 128), jnp.float32)
        step = jax.make_jaxpr(attend_cached)(x, layer, cache)
        floats = [
            variable.aval
            for equation in suites.equations(step.jaxpr)
            for variable in equation.outvars
            if jnp.issubdtype(getattr(variable.aval, "dtype", jnp.int8), jnp.floating)
            and variable.aval.shape not in _kept(cache)
        ]
        # A block's rows, and all scores; no floats of the cache's size but those it is made of.
        assert max(each.size for each in floats) <= max(2 * SLOTS * widest, 4 * tokens * slots)


def _kept(cache):
    """Shapes of what a cache itself stores in floats: appending makes the longer one of it."""
    return {leaf.shape for leaf in jax.tree.leaves(cache) if jnp.issubdtype(leaf.dtype, jnp.floating)}


@pytest.mark.parametrize(
    ("scheme", "fields", "reason"),
    [
        ("k:flashq4#int8", {"kv_heads": 4}, "use #float"),
        ("kv:flashq4@sparse(1e-3)", {}, "use #float"),
        ("kv:bf16#sage", {"softcap": 3.0}, "softcap"),
        ("x1:xquant4#sage", {}, "smooths keys"),
    ],
)
def test_what_cannot_be_computed_so_is_refused(scheme, fields, reason):
    with pytest.raises(NotImplementedError, match=reason):
        compute_of(spec_of(scheme, **fields))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kv:bf16#int9", "unknown compute mode 'int9'; did you mean 'int8'"),
        ("kv:bf16#int8(p=column)", "expected tile or static or row"),
        ("kv:bf16#int8(rows=2)", "does not take the options"),
        ("kv:bf16#sage(tile=0)", "expected a number of tokens"),
        ("kv:bf16#int8(tile=-1)", "expected a number of tokens"),
        ("kv:flashq4(bits=2)", "a place of its own"),
        ("kv:kivi4(window=64.0)", "whole tiles"),
        ("kv:flashq4(margin=inf)", "positive number"),
        ("kv:int8(scale=tensor)", "neither head nor token"),
        ("kv:kivi4(tile=48)/32", "whole groups"),
        ("kv:kivi4(tile)", "expected name=value"),
    ],
)
def test_mistakes(text, message):
    with pytest.raises(ValueError, match=message):
        parse_scheme(text)
