"""The GPU kernel for keys alone in FlashQ's tiles, interpreted as clusters: the oracle on what the codes stand for."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_kernels_tpu as rows_suite
import test_kernels_tpu_flashq as tiles_suite
import test_kernels_tpu_flashq_keys as suite
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter_state
from threaded import alone, run_threaded, threaded

from slimjax import decode
from slimjax.attention.bases import basis
from slimjax.cache import codec_of
from slimjax.kernels import pallas_gpu
from slimjax.kernels.gpu import keys, mosaic, share, slim_packed
from slimjax.kernels.gpu.packed import Packing
from slimjax.kernels.shapes import SHAPES
from slimjax.numerics import relative_l2

pytestmark = pytest.mark.skipif(mosaic.OLD, reason="the kernel needs jax 0.11 or newer")
# Rows, queries and weights in bfloat16, each rounded to 2^-9.
TOLERANCE = suite.TOLERANCE["bfloat16"]
FEW, SQUARE = suite.FEW, (4, 4, 64, 256)


def case(*args, lengths=FEW, **more):
    return suite.Case(*args, lengths=lengths, **more)


# Blocks of threads of a cluster, and what they answer.
CASES = [
    (2, case("k2:flashq4/64", SQUARE, splits=2, lengths=tiles_suite.LENGTHS)),
    (2, case("k2:flashq4/64", SQUARE, "rope")),
    (1, case("k2:flashq8/64", (4, 4, 128, 512), "rope", tokens=2)),
    (2, case("k2:flashq2/64", (8, 4, 64, 256), "rope", splits=2)),
    (2, case("k2:flashq4/64+8", SQUARE, "rope", splits=2, lengths=tiles_suite.LENGTHS)),
    (2, case("k2:flashq2(extra=int8)/32+16", SQUARE, tokens=2)),
    (2, case("k2:flashq2/32", SQUARE, options=(("causal", False),))),
    (2, case("k2:flashq4/32", SQUARE, "learned", tokens=2, options=(("window", 100), ("softcap", 4.0)))),
    (2, case("k2:flashq4/64", (8, 8, 96, 768), "rope", lengths=(300,))),
]
NAMES = [f"C{blocks}-{each}" for blocks, each in CASES]


def run(blocks, each, monkeypatch, *, races=False):
    monkeypatch.setattr(share, "CLUSTERS", (blocks,))
    q, cache, weights, spec = suite.made(each)
    start = rows_suite.start_of(cache, spec, each.tokens)
    bad = tiles_suite.poisoned(cache, spec)
    return answers(each, q, bad, weights, spec, start, races=races), (q, cache, weights, spec, start)


def answers(each, q, cache, weights, spec, start, *, races=False):
    interpret = mosaic.interpreter(detect_races=races)
    found = pallas_gpu.decode(q, cache, weights, spec, start, splits=each.splits, interpret=interpret)
    return np.asarray(found, np.float64)


@threaded
@pytest.mark.parametrize(("blocks", "each"), CASES, ids=NAMES)
def test_packed_keys_are_the_oracle(blocks, each, monkeypatch):
    found, given = run(blocks, each, monkeypatch, races=True)
    assert not interpreter_state.get_races().races_found
    assert relative_l2(found, rows_suite.expected(*given)) < TOLERANCE
    if 0 in each.lengths:
        assert not np.any(found[0])  # a sequence without tokens


@threaded
def test_packed_keys_err_no_more_than_twice_as_much_as_the_reference_and_always_the_same(monkeypatch):
    """Rows are rounded as operands, which the reference's are not."""
    each = case("k2:flashq8/64", SQUARE, "rope", lengths=(300, suite.CAPACITY))
    found, given = run(2, each, monkeypatch)
    wanted = rows_suite.expected(*given)
    other = np.asarray(tiles_suite.exactly(*given), np.float64)
    assert TOLERANCE / 10 < relative_l2(found, wanted) < 2 * relative_l2(other, wanted)
    np.testing.assert_array_equal(found, run(2, each, monkeypatch)[0])


@threaded
def test_packed_keys_have_the_reference_s_sas_where_its_maximum_is(monkeypatch):
    """Lengths of whole tiles, so that none waits in the buffer, which is a part of its own."""
    each = case("k2:flashq8/64@sas(3)", SQUARE, "rope", lengths=(0, 64, 128))
    found, given = run(2, each, monkeypatch)
    other, whole = tiles_suite.exactly(*given), np.array([False, True, False])
    rows_suite.holds_sas(found, other, rows_suite.expected(*given), whole, TOLERANCE / 2)


@threaded
@pytest.mark.parametrize("scheme", ["k2:flashq4/64", "k2:flashq4(extra=int8)/64+8"])
def test_packed_keys_of_tokens_just_appended_see_the_buffer_as_it_was(scheme, monkeypatch):
    """Three tokens, of which the second fills the buffer: the first still reads it, the third reads its tile."""
    monkeypatch.setattr(share, "CLUSTERS", (2,))
    each = case(scheme, SQUARE, "rope", tokens=3, lengths=(318, 127, 40))
    q, cache, weights, spec = suite.made(each)
    draw = np.random.default_rng(1)
    streams = basis(spec).streams(spec)
    rows = {n: jnp.asarray(draw.standard_normal((3, 3, *row)), jnp.float32) for n, row in streams.items()}
    grown = tiles_suite.grow(cache, rows, codec_of(spec.scheme), prompt=False, keep=True)
    exact = dataclasses.replace(spec, dtype="float32")
    wanted = np.asarray(tiles_suite.exactly(q, grown, weights, exact, cache.length), np.float64)
    found = answers(each, q, grown, weights, spec, cache.length)
    assert relative_l2(found, wanted) < TOLERANCE


@threaded
def test_packed_keys_whose_loader_does_not_wait_are_seen_to_race(monkeypatch):
    known = vars(slim_packed.plgpu)
    hasty = SimpleNamespace(**known | {"barrier_wait": lambda barrier: None})
    for module in (share, slim_packed.ring):
        monkeypatch.setattr(module, "plgpu", hasty)
    said = ""
    try:
        run(2, CASES[0][1], monkeypatch, races=True)
    except jax.errors.JaxRuntimeError as error:
        said = str(error)
    assert "RACE DETECTED" in said or interpreter_state.get_races().races_found


@alone
def test_in_a_process_of_enough_threads(request):
    run_threaded(request, ["packed_keys"], len(CASES) + 5)


@pytest.mark.parametrize(("bits", "tile"), [(8, 64), (4, 64), (4, 32), (2, 64), (2, 32)])
def test_every_token_is_in_one_row_of_one_block(bits, tile):
    packing = Packing(bits=bits, tile=tile)
    part = share.share(4, 64, 1, packing=packing)
    assert part is not None
    blocks = np.arange(4 * packing.parts)[:, None]
    tokens = part.begin(blocks)[1] + part.offset(np.arange(64))
    np.testing.assert_array_equal(np.sort(tokens, axis=None), np.arange(tokens.size))
    assert (tokens < part.begin(blocks)[0] + part.span).all()
    assert (tokens >= part.begin(blocks)[0]).all()


@pytest.mark.parametrize("shape", ["llama-2-7b", "phi-3-mini", "smollm2-1.7b", "whisper-large-self"])
def test_real_shapes_are_shared(shape):
    spec = SHAPES[shape].spec("k2:flashq4/64", "bfloat16")
    ((count, part),) = keys.plan(spec, 1, None) or ()
    assert (count, part.blocks * part.width, part.packing) == (1, spec.key_width, Packing(bits=4, tile=64))


REFUSED = [
    ("k2:flashq2-4/64", SQUARE, "of keys alone flashq of one"),
    ("k2:flashq3/64", SQUARE, "tiles of 3 bits have no kernel"),
    ("k2:flashq8/128", SQUARE, "tiles of 128 tokens in 8 bits .* use 32 or 64"),
    ("k2:flashq4/64+12", SQUARE, "12 extra coordinates have no kernel .* multiples of 8 up to 64"),
    ("k2:flashq4/64", (2, 2, 64, 128), "FlashQ's tiles of 2 key heads .* multiples of 4"),
    ("k:flashq4/64@sas(0)", SQUARE, "softmax sas.* it has exact, and SAS with a cut"),
]


@pytest.mark.parametrize(("scheme", "layout", "reason"), REFUSED)
def test_what_it_does_not_serve_it_refuses_with_the_reason(scheme, layout, reason):
    q, cache, weights, spec = suite.made(case(scheme, layout, lengths=(4,)))
    with pytest.raises(NotImplementedError, match=reason):
        decode(q, cache, weights, spec, implementation="pallas_gpu")


def test_a_key_bias_is_refused():
    q, cache, weights, spec = suite.made(case("k2:flashq4/64", SQUARE, k_bias=True, lengths=(4,)))
    with pytest.raises(NotImplementedError, match="a key bias beside FlashQ's tiles"):
        decode(q, cache, weights, spec, implementation="pallas_gpu")
