"""The TPU kernel of keys alone in FlashQ's tiles, interpreted: against the oracle on what the codes stand for."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import test_kernels_tpu as rows_suite
import test_kernels_tpu_flashq as tiles_suite

from slimjax import DecodeWeights, decode
from slimjax.attention.bases import basis
from slimjax.cache import codec_of, empty
from slimjax.kernels import pallas_tpu
from slimjax.kernels.tiles import Tiles
from slimjax.numerics import relative_l2

CAPACITY = 576  # of tiles of 32 tokens: two blocks of 8 tiles, and a quarter of a third
FEW = (0, 33, 300, CAPACITY)
Case = rows_suite.Case
# Of the output's size, against exact arithmetic on the same codes: as of other rows, float32 over 8 times as many.
TOLERANCE = {"float32": 8e-6, "bfloat16": 1e-2}
SQUARE = (4, 4, 32, 128)
CASES = [
    Case("k:flashq4/32", SQUARE, dtype="float32", lengths=tiles_suite.LENGTHS),
    Case("k:flashq4/32", SQUARE, "rope", lengths=FEW),
    Case("k:flashq8/32", (2, 2, 64, 128), "rope", "float32", 2, lengths=FEW),
    Case("k:flashq2/32", (3, 3, 24, 72), dtype="float32", tokens=3, splits=2, lengths=FEW),
    Case("k:flashq3", SQUARE, dtype="float32", lengths=(0, 64, CAPACITY - 1)),
    Case("k:flashq4/32+8", SQUARE, "rope", "float32", lengths=FEW),
    Case("k:flashq4(extra=flashq8)/32+8", SQUARE, lengths=FEW),
    Case("k:flashq4(extra=int8)/32+8", SQUARE, dtype="float32", lengths=FEW),
    Case("k:flashq4/32", SQUARE, "alibi", "float32", 8, (("window", 100), ("softcap", 4.0)), lengths=FEW),
    Case("k:flashq4/32", SQUARE, "rope", "float32", k_bias=True, lengths=FEW),
    Case("k:flashq4/32", SQUARE, "none", "float32", k_bias=True, lengths=FEW),
    Case("k:flashq4/32", SQUARE, "t5", "float32", 2, lengths=FEW),
    Case("k:flashq4/32", SQUARE, "fire", "float32", lengths=FEW),  # which looks at more than the distance
    Case("k:flashq4/32", SQUARE, dtype="float32", options=(("causal", False),), lengths=FEW),
]


def made(case, seed=0):
    """Queries, a cache, weights and spec; later rows are larger."""
    q, _, weights, spec = rows_suite.made(case, seed)
    streams, codec, batch = basis(spec).streams(spec), codec_of(spec.scheme), len(case.lengths)
    draw = np.random.default_rng(seed)
    sizes = np.linspace(0.5, 2, CAPACITY)[:, None, None]
    rows = {
        name: jnp.asarray(sizes * draw.standard_normal((batch, CAPACITY, *row)), jnp.float32)
        for name, row in streams.items()
    }
    cache = empty(streams, codec, batch=batch, capacity=CAPACITY)
    return q, tiles_suite.grow(cache, rows, codec, jnp.asarray(case.lengths, jnp.int32)), weights, spec


def tiles_of(case, spec):
    return Tiles(block=8 * tiles_suite.codec_for(spec).tile, splits=case.splits)


def answers(case, q, cache, weights, spec, start, interpret=True):
    decoded = tiles_suite.decoder(tiles=tiles_of(case, spec), interpret=interpret)
    return np.asarray(decoded(q, cache, weights, spec, start), np.float64)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_the_oracle(case):
    q, cache, weights, spec = made(case)
    start = rows_suite.start_of(cache, spec, case.tokens)
    wanted = rows_suite.expected(q, cache, weights, spec, start)
    bad = tiles_suite.poisoned(cache, spec)
    found = answers(case, q, bad, weights, spec, start)
    assert relative_l2(found, wanted) < TOLERANCE[case.dtype]
    np.testing.assert_array_equal(found, answers(case, q, bad, weights, spec, start))
    assert not np.any(found[0])  # a sequence without tokens


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES[1:4], ids=str)
def test_nothing_is_raced_for_or_read_that_should_not_be(case):
    case = dataclasses.replace(case, lengths=case.lengths[-3:])
    q, cache, weights, spec = made(case)
    start = rows_suite.start_of(cache, spec, case.tokens)
    bad = tiles_suite.poisoned(cache, spec)
    plain = answers(case, q, bad, weights, spec, start)
    found = answers(case, q, bad, weights, spec, start, interpret=rows_suite.HOSTILE)
    assert not rows_suite.races_found()
    assert relative_l2(found, plain) < TOLERANCE["float32"]


def test_bfloat16_errs_no_more_than_twice_as_much_as_the_reference():
    """Rows are rounded as operands, which the reference's are not."""
    case = Case("k:flashq8/32", SQUARE, "rope", lengths=(300, CAPACITY))
    q, cache, weights, spec = made(case)
    start = rows_suite.start_of(cache, spec, 1)
    wanted = rows_suite.expected(q, cache, weights, spec, start)
    found = answers(case, q, cache, weights, spec, start)
    other = np.asarray(tiles_suite.exactly(q, cache, weights, spec, start), np.float64)
    assert TOLERANCE["bfloat16"] / 10 < relative_l2(found, wanted) < 2 * relative_l2(other, wanted)


def test_sas_is_the_reference_s_where_its_maximum_is():
    """Lengths of whole tiles, so that none waits in the buffer, which is a part of its own."""
    case = Case("k:flashq4/32@sas(2)", SQUARE, "rope", "float32", lengths=(0, 64, 256, 288))
    q, cache, weights, spec = made(case)
    start = rows_suite.start_of(cache, spec, 1)
    found = answers(case, q, cache, weights, spec, start)
    other = tiles_suite.exactly(q, cache, weights, spec, start)
    wanted, whole = rows_suite.expected(q, cache, weights, spec, start), np.array([False, True, True, False])
    rows_suite.holds_sas(found, other, wanted, whole, TOLERANCE["float32"])


@pytest.mark.parametrize("scheme", ["k:flashq4/32", "k:flashq4(extra=int8)/32+8"])
def test_queries_of_tokens_just_appended_see_the_buffer_as_it_was(scheme):
    """Three tokens, of which the second fills the buffer: the first still reads it, the third reads its tile."""
    case = Case(scheme, SQUARE, "rope", "float32", 3, lengths=(286, 95, 40))
    q, cache, weights, spec = made(case)
    draw = np.random.default_rng(1)
    streams = basis(spec).streams(spec)
    rows = {n: jnp.asarray(draw.standard_normal((3, 3, *row)), jnp.float32) for n, row in streams.items()}
    grown = tiles_suite.grow(cache, rows, codec_of(spec.scheme), prompt=False, keep=True)
    wanted = np.asarray(tiles_suite.exactly(q, grown, weights, spec, cache.length), np.float64)
    found = answers(case, q, grown, weights, spec, cache.length)
    assert relative_l2(found, wanted) < TOLERANCE["float32"]


def test_the_public_call_takes_it_and_an_overfull_cache_is_nan():
    q, cache, weights, spec = made(Case("k:flashq4/32", SQUARE, lengths=(70, 40)))
    cache = dataclasses.replace(cache, length=jnp.asarray([70, CAPACITY + 1], jnp.int32))
    out = np.asarray(decode(q, cache, weights, spec, implementation="pallas_tpu"), np.float32)
    assert np.isfinite(out[0]).all()
    assert np.isnan(out[1]).all()


REFUSED = [
    ("k:flashq2-4/32", "codec flashq has no kernel"),
    ("k:flashq4/32@sparse(0.01)", "softmax sparse.* has no kernel"),
    ("k:flashq4/40", "tiles of 40 tokens in 4 bits have no kernel; use a multiple of 16"),
    ("k:flashq3/32", "tiles of 32 tokens in 3 bits have no kernel; use a multiple of 64"),
    ("x2:flashq4/32", "codec flashq has no kernel"),
]


@pytest.mark.parametrize(("scheme", "reason"), REFUSED)
def test_what_it_does_not_serve_it_refuses_with_the_reason(scheme, reason):
    q, cache, weights, spec = made(Case(scheme, SQUARE, lengths=(4,)))
    with pytest.raises(NotImplementedError, match=reason):
        decode(q, cache, weights, spec, implementation="pallas_tpu")


def test_blocks_are_whole_tiles_eight_of_them():
    case = Case("k:flashq4/32", SQUARE, lengths=(4,))
    q, cache, _, spec = made(case)
    assert pallas_tpu.tiles_of(q, cache, DecodeWeights(), spec).block == 768
    with pytest.raises(NotImplementedError, match="multiples of 256 tokens"):
        pallas_tpu.decode(
            q, cache, DecodeWeights(), spec, cache.length, tiles=Tiles(block=128), interpret=True
        )
