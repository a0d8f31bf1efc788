"""The TPU kernel over FlashQ's tiles, interpreted: against the reference, whose integers it has, and the oracle."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import suites
import test_kernels_tpu as rows_suite

import oracle
from slimjax import DecodeSpec, DecodeWeights, Position, decode, parse_scheme
from slimjax.attention.bases import basis
from slimjax.cache import TiledCodec, append, codec_of, empty, read
from slimjax.cache.layout import LaidOut
from slimjax.cache.tiled import flushed
from slimjax.kernels import pallas_tpu, reference
from slimjax.kernels.tiles import Tiles
from slimjax.kernels.tpu.generations import GENERATIONS
from slimjax.numerics import relative_l2

CAPACITY = 576  # of tiles of 32 tokens: two blocks of 8 tiles, and a quarter of a third
LENGTHS = (0, 1, 31, 32, 33, 255, 256, 257, 300, CAPACITY)
# The integers are those of the reference, and so is the order in which tiles are taken; float32 factors are multiplied
# in another order, a few roundings of 2^-24 each, and a weight that they push across a half moves by one of 119.
TOLERANCE = 1e-6


@dataclasses.dataclass(frozen=True)
class Case:
    scheme: str
    layout: tuple[int, int, int] = (4, 4, 32)  # N, K, H
    position: str = "none"
    tokens: int = 1
    options: tuple[tuple[str, object], ...] = ()
    splits: int = 1
    lengths: tuple[int, ...] = LENGTHS
    generation: str | None = None

    def __str__(self):
        more = [f"{name}={value}" for name, value in self.options]
        named = [self.generation] if self.generation else []
        return "-".join([self.scheme, self.position, f"T{self.tokens}", *more, *named])


grow = jax.jit(append, static_argnums=2, static_argnames=("prompt", "keep"))
exactly = jax.jit(reference.decode, static_argnums=3)
FEW = (33, 300, CAPACITY)
CASES = [
    Case("kv:flashq4/32"),
    Case("kv:flashq8/32", (4, 2, 64), "rope", 2),
    Case("kv:flashq2/32", (3, 3, 24), tokens=3, lengths=FEW),
    Case("kv:flashq4/32", (2, 1, 64), "alibi", 8, lengths=FEW),
    Case("kv:flashq4/32", (2, 2, 64), "rope", splits=2, lengths=FEW),
    Case("kv:flashq2-4/32@sas", (4, 2, 64), "rope", lengths=FEW),
    Case("kv:flashq2-4/32", (2, 2, 128), options=(("window", 100), ("softcap", 4.0)), lengths=FEW),
    Case("kv:flashq4/32#int8(p=static,denominator=after)", options=(("causal", False),), lengths=FEW),
    Case("kv:flashq4/32@sas#int8(rescale=softmax)", lengths=FEW),
    Case("kv:flashq4(window=64)/32", (4, 4, 96), lengths=FEW),
    Case("kv:flashq4/32", (4, 2, 64), tokens=2, lengths=FEW, generation="v7x"),
    Case("kv:flashq4", lengths=(64, CAPACITY - 1)),
    Case("kv:flashq3", (2, 2, 64), "rope", lengths=(64, CAPACITY - 1)),
    Case("kv:flashq4/32", (4, 2, 64), "t5", 2, lengths=FEW),
    Case("kv:flashq2-4/32", (4, 4, 64), "t5", splits=2, lengths=FEW),
    Case("kv:flashq4/32", (2, 2, 64), "fire", lengths=FEW),
]


def codec_for(spec) -> TiledCodec:
    codec = codec_of(spec.scheme)
    assert isinstance(codec, TiledCodec)
    return codec


def made(case, seed=0):
    """Queries, a cache and its spec; rows and queries are of size about 1, later rows larger, and first ones."""
    heads, kv_heads, size = case.layout
    spec = DecodeSpec(
        scheme=parse_scheme(case.scheme),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=size,
        width=heads * size,
        position=Position(kind=case.position, theta=1000.0)
        if case.position == "rope"
        else Position(kind=case.position),
        **dict(case.options),
    )
    draw = np.random.default_rng(seed)
    codec, batch = codec_of(spec.scheme), len(case.lengths)
    cache = empty(basis(spec).streams(spec), codec, batch=batch, capacity=CAPACITY)
    sizes = np.linspace(0.5, 2, CAPACITY)[:, None, None]
    rows = {
        name: jnp.asarray(sizes * draw.standard_normal((batch, CAPACITY, kv_heads, size)), jnp.float32)
        for name in cache.streams
    }
    cache = grow(cache, rows, codec, jnp.asarray(case.lengths, jnp.int32))
    q = jnp.asarray(draw.standard_normal((batch, case.tokens, heads, size)), jnp.float32)
    return q, cache, spec


def poisoned(cache, spec):
    """What lies behind the encoded windows, and behind each sequence's tokens in the buffer, is the worst there is."""
    codec = codec_for(spec)
    windows = flushed(codec, cache.length)
    held = cache.length - windows * codec.span

    def worst(leaf):
        bad = jnp.nan if jnp.issubdtype(leaf.dtype, jnp.floating) else jnp.iinfo(leaf.dtype).min
        return jnp.asarray(bad).astype(leaf.dtype)

    def behind(leaf, first):
        past = jnp.arange(leaf.shape[1])[None] >= first[:, None]
        return jnp.where(past.reshape(*past.shape, *(1,) * (leaf.ndim - 2)), worst(leaf), leaf)

    def spoilt(stored):
        if isinstance(stored, LaidOut):  # extra coordinates in a codec of rows
            slots = jnp.broadcast_to(jnp.arange(cache.capacity), (cache.batch, cache.capacity))
            return stored.written(
                jax.tree.map(lambda leaf: behind(leaf, cache.length), stored.codes()), slots
            )
        tiles = jax.tree.map(
            lambda leaf: behind(leaf, windows * codec.span // codec.tile), stored.tiles.tiles()
        )
        places = jnp.broadcast_to(jnp.arange(stored.tiles.count), (cache.batch, stored.tiles.count))
        return dataclasses.replace(
            stored,
            tiles=stored.tiles.written(tiles, places),
            buffer=behind(stored.buffer, held),
            scales=behind(stored.scales, held),
        )

    return dataclasses.replace(cache, streams={name: spoilt(each) for name, each in cache.streams.items()})


@functools.cache
def decoder(**options):
    """Compiled once for all calls of the same shapes."""
    return jax.jit(functools.partial(pallas_tpu.decode, **options), static_argnums=3)


def weights_of(spec):
    """Only a trained position scheme has any."""
    learned = suites.bias_parameters(spec.position, spec.heads, np.random.default_rng(2))
    learned = learned and {name: jnp.asarray(each, jnp.float32) for name, each in learned.items()}
    return DecodeWeights(position=learned)


def answers(case, q, cache, spec, start, *, interpret: Any = True):
    tiles = Tiles(block=8 * codec_for(spec).tile, splits=case.splits)
    generation = None if case.generation is None else GENERATIONS[case.generation]
    decoded = decoder(tiles=tiles, generation=generation, interpret=interpret)
    return np.asarray(decoded(q, cache, weights_of(spec), spec, start), np.float64)


def start_of(cache, spec, tokens):
    return cache.length - tokens if spec.causal else jnp.zeros_like(cache.length)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_the_reference(case):
    q, cache, spec = made(case)
    start = start_of(cache, spec, case.tokens)
    wanted = np.asarray(exactly(q, cache, weights_of(spec), spec, start), np.float64)
    found = answers(case, q, poisoned(cache, spec), spec, start)
    assert relative_l2(found, wanted) < TOLERANCE
    np.testing.assert_array_equal(found, answers(case, q, poisoned(cache, spec), spec, start))
    np.testing.assert_array_equal(found[cache.length == 0], 0)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES[2:8:2], ids=str)
def test_nothing_is_raced_for_or_read_that_should_not_be(case):
    case = dataclasses.replace(case, lengths=case.lengths[-3:])
    q, cache, spec = made(case)
    start = start_of(cache, spec, case.tokens)
    bad = poisoned(cache, spec)
    plain = answers(case, q, bad, spec, start)
    found = answers(case, q, bad, spec, start, interpret=rows_suite.HOSTILE)
    assert not rows_suite.races_found()
    assert relative_l2(found, plain) < TOLERANCE


@pytest.mark.parametrize("scheme", ["kv:flashq8/32", "kv:flashq4/32@sas"])
def test_it_is_attention_on_the_rows_that_the_codes_stand_for(scheme):
    """Within the rounding of queries and weights to a 119th of their largest, and SAS's cut."""
    case = Case(scheme, lengths=FEW)
    q, cache, spec = made(case)
    rows = {
        n: np.asarray(each, np.float64) for n, each in read(cache, codec_of(spec.scheme), "float32").items()
    }
    start = np.asarray(start_of(cache, spec, 1))
    wanted = oracle.attend(
        np.asarray(q, np.float64), rows["k"], rows["v"], start=start, length=np.asarray(cache.length)
    )
    found = answers(case, q, cache, spec, jnp.asarray(start))
    assert 1e-3 < relative_l2(found, wanted) < 2e-2


@pytest.mark.parametrize("scheme", ["kv:flashq4/32", "kv:flashq2-4/32"])
def test_queries_of_tokens_just_appended_see_the_buffer_as_it_was(scheme):
    """Three tokens, of which the second fills the buffer: the first still reads it, the third reads its tile."""
    case = Case(scheme, lengths=(286, 95, 40), tokens=3)
    q, cache, spec = made(case)
    draw = np.random.default_rng(1)
    rows = {n: jnp.asarray(draw.standard_normal((3, 3, 4, 32)), jnp.float32) for n in cache.streams}
    codec = codec_of(spec.scheme)
    grown = grow(cache, rows, codec, prompt=False, keep=True)
    start = cache.length
    wanted = np.asarray(exactly(q, grown, DecodeWeights(), spec, start), np.float64)
    assert relative_l2(answers(case, q, grown, spec, start), wanted) < TOLERANCE


def test_the_public_call_takes_it_and_an_overfull_cache_is_nan():
    q, cache, spec = made(Case("kv:flashq4/32", lengths=(70, 40)))
    cache = dataclasses.replace(cache, length=jnp.asarray([70, CAPACITY + 1]))
    out = np.asarray(decode(q, cache, DecodeWeights(), spec, implementation="pallas_tpu"))
    assert np.isfinite(out[0]).all()
    assert np.isnan(out[1]).all()


REFUSED = [
    (Case("kv:flashq3/32"), "tiles of 32 tokens in 3 bits have no kernel; use a multiple of 64"),
    (Case("kv:flashq4#float"), "compute mode float of FlashQ's tiles has no kernel"),
]


@pytest.mark.parametrize(("case", "reason"), REFUSED, ids=str)
def test_what_it_does_not_serve_it_refuses_with_the_reason(case, reason):
    q, cache, spec = made(dataclasses.replace(case, lengths=(4,)))
    with pytest.raises(NotImplementedError, match=reason):
        decode(q, cache, DecodeWeights(w_kv=jnp.zeros((128, 4, 32))), spec, implementation="pallas_tpu")


def test_tiles_are_whole_ones_and_fit():
    case = Case("kv:flashq4/32", lengths=(70,))
    q, cache, spec = made(case)
    start = start_of(cache, spec, 1)
    for tiles, reason in (
        (Tiles(block=96), "takes 8 FlashQ tiles of 32"),
        (Tiles(block=256, vmem=9999), "bytes of VMEM"),
    ):
        with pytest.raises(NotImplementedError, match=reason):
            pallas_tpu.decode(q, cache, DecodeWeights(), spec, start, tiles=tiles, interpret=True)
