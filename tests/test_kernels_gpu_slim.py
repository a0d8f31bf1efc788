"""The GPU kernel for keys alone in one pass, interpreted as clusters: against the oracle, poisoned, races sought."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_kernels_gpu as suite
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter_state
from test_kernels_gpu import BLOCK, CAPACITY, EVERYTHING, TOLERANCE
from test_kernels_tpu import holds_sas
from threaded import alone, run_threaded, threaded

from slimjax import decode
from slimjax.cache import append, codec_of, empty
from slimjax.kernels import reference
from slimjax.kernels.gpu import keys, latent, mosaic, share, slim_load, slim_mix, slim_steps
from slimjax.kernels.shapes import SHAPES
from slimjax.numerics import relative_l2

pytestmark = pytest.mark.skipif(mosaic.OLD, reason="the kernel needs jax 0.11 or newer")
FEW = (0, 1, BLOCK, CAPACITY)
WHOLE = 3 * BLOCK  # as extra coordinates have it


def case(*args, lengths=FEW, scheme="k2:bf16", **more):
    if "+" in scheme:
        more.setdefault("capacity", WHOLE)
    return suite.Case(*args, scheme=scheme, lengths=lengths, **more)


# Blocks of threads of a cluster, and what they answer.
CASES = [
    (1, case((4, 4, 64))),
    (2, case((4, 4, 64), splits=2, lengths=suite.LENGTHS)),
    (2, case((4, 4, 64), 1, "rope", lengths=suite.LENGTHS)),
    (2, case((8, 8, 96), 1, "rope", splits=2)),
    (2, case((4, 4, 128), 2, "rope", EVERYTHING)),
    (
        2,
        case((12, 4, 64), 2, options=(("window", 5), ("scale", 0.3))),
    ),  # 12 rows a block
    (2, case((4, 4, 128), 3, "learned", (("causal", False),), k_bias=True)),
    (4, case((8, 8, 64), 1, "rope", (("window", 70),), lengths=(2 * BLOCK + 9,))),
    # More query tokens than fit: six, and two more in a pass of their own.
    (1, case((8, 8, 64), 8, "rope", (("window", 5),), lengths=(70,), splits=2, scheme="k2:int16+8")),
    (2, case((8, 4, 64), 1, "rope")),
    (2, case((4, 4, 64), scheme="k2:int16", splits=2, lengths=suite.LENGTHS)),
    (2, case((8, 8, 96), 1, "rope", scheme="k2:int16")),
    (2, case((4, 4, 64), 2, "rope", EVERYTHING, scheme="k2:int16+16")),
    (1, case((4, 4, 128), 1, "learned", scheme="k2:int16+8")),
    (2, case((4, 4, 64), 1, "rope", scheme="k2:bf16+24", lengths=suite.LENGTHS)),
    # Rows that every head meets: each block's scores are a part; clusters for groups of queries.
    (2, case((4, 4, 64), 2, "learned", EVERYTHING, scheme="x2:bf16", splits=2, lengths=suite.LENGTHS)),
    (1, case((4, 2, 64), 3, options=(("causal", False),), scheme="e2:int16", k_bias=True)),
    (2, case((32, 4, 64), 3, options=(("window", 70),), scheme="x2:int16", lengths=(2 * BLOCK + 9,))),
    (2, case((8, 8, 64), 1, options=(("causal", False),), scheme="h2:bf16")),
    # So many blocks of tokens that every slot of shared memory is used again.
    (2, case((8, 8, 128), lengths=(7 * BLOCK, 6 * BLOCK + 3), capacity=7 * BLOCK)),
    (2, case((8, 8, 128), scheme="k2:int16+8", lengths=(7 * BLOCK, 6 * BLOCK + 3), capacity=7 * BLOCK)),
]
NAMES = [f"C{blocks}-{each}" for blocks, each in CASES]


def run(blocks, each, monkeypatch, **more):
    monkeypatch.setattr(share, "CLUSTERS", (blocks,))
    return suite.run(each, passes=1, **more)


@threaded
@pytest.mark.parametrize(("blocks", "each"), CASES, ids=NAMES)
def test_one_pass_is_the_oracle(blocks, each, monkeypatch):
    found, wanted = run(blocks, each, monkeypatch, interpret=mosaic.interpreter(detect_races=True))
    assert relative_l2(found, wanted) < TOLERANCE
    assert not interpreter_state.get_races().races_found
    if 0 in each.lengths:
        assert not np.any(found[0])  # a sequence without tokens


@threaded
@pytest.mark.parametrize(
    ("blocks", "each"),
    [
        (2, case((4, 4, 64), 1, "rope", scheme="k2:bf16@sas(2)")),
        (2, case((4, 4, 64), 2, scheme="k2:int16+16@sas(2,2)")),
        (1, case((4, 2, 64), scheme="x2:bf16@sas(2)")),
    ],
    ids=str,
)
def test_one_pass_has_the_reference_s_sas_where_its_maximum_is(blocks, each, monkeypatch):
    found, wanted = run(blocks, each, monkeypatch, interpret=mosaic.interpreter(detect_races=True))
    assert not interpreter_state.get_races().races_found
    q, cache, weights, spec = suite.made(each)
    other = reference.decode(q, cache, weights, spec, suite.start_of(cache, spec, each.tokens))
    whole = np.asarray((cache.length > 0) & (cache.length <= BLOCK))
    holds_sas(found, other, wanted, whole, TOLERANCE)


@threaded
@pytest.mark.parametrize("position", ["none", "rope"])
def test_one_pass_errs_no_more_than_twice_as_much_as_the_reference_and_always_the_same(position, monkeypatch):
    each = case((4, 4, 64), 1, position, lengths=(40, BLOCK, CAPACITY))
    mine, wanted = run(2, each, monkeypatch)
    q, cache, weights, spec = suite.made(each)
    other = reference.decode(q, cache, weights, spec, suite.start_of(cache, spec, 1))
    error = relative_l2(mine, wanted)
    assert TOLERANCE / 10 < error < 2 * relative_l2(np.asarray(other, np.float64), wanted)
    np.testing.assert_array_equal(mine, run(2, each, monkeypatch)[0])


@threaded
@pytest.mark.parametrize("position", ["none", "rope"])
def test_one_pass_loses_nothing_of_codes_to_a_map_that_enlarges_errors(position, monkeypatch):
    """Values of size 1 from keys of size 1 through a map of condition 3,000: what bfloat16 would round away shows."""
    each = case((4, 4, 64), 1, position, scheme="k2:int16", lengths=(CAPACITY,))
    q, cache, weights, spec = suite.made(each)
    draw, size = np.random.default_rng(1), spec.key_width
    turn = [np.linalg.qr(draw.standard_normal((size, size)))[0] for _ in range(2)]
    to_values = turn[0] * np.geomspace(1, 3000, size) @ turn[1]
    rows = draw.standard_normal((1, CAPACITY, size)) @ np.linalg.inv(to_values)
    rows /= rows.std()
    values = rows @ to_values
    to_values /= values.std()
    codec, streams = codec_of(spec.scheme), {"k": jnp.asarray(rows, jnp.float32).reshape(1, CAPACITY, 4, 64)}
    cache = append(empty(suite.basis(spec).streams(spec), codec, batch=1, capacity=CAPACITY), streams, codec)
    weights = dataclasses.replace(weights, w_kv=jnp.asarray(to_values, jnp.float32).reshape(size, 4, 64))
    start = suite.start_of(cache, spec, 1)
    monkeypatch.setattr(share, "CLUSTERS", (2,))
    found = suite.pallas_gpu.decode(q, cache, weights, spec, start, splits=1, passes=1)
    wanted = suite.expected(q, cache, weights, spec, start)
    assert relative_l2(np.asarray(found, np.float64), wanted) < TOLERANCE


@threaded
@pytest.mark.parametrize(
    "hasty", [slim_load, slim_steps, slim_mix, share], ids=["loader", "scorer", "mixers", "slots"]
)
def test_one_pass_whose_warpgroups_do_not_wait_is_seen(hasty, monkeypatch):
    known = vars(hasty.plgpu)
    monkeypatch.setattr(hasty, "plgpu", SimpleNamespace(**known | {"barrier_wait": lambda barrier: None}))
    said = ""
    try:
        run(2, CASES[-1][1], monkeypatch, interpret=mosaic.interpreter(detect_races=True))
    except jax.errors.JaxRuntimeError as error:
        said = str(error)
    assert "RACE DETECTED" in said or "in all phases" in said or interpreter_state.get_races().races_found


@alone
def test_in_a_process_of_enough_threads(request):
    run_threaded(request, ["one_pass"], len(CASES) + 11)


def test_with_too_few_threads_it_says_so(monkeypatch):
    monkeypatch.setenv("NPROC", "2")
    q, cache, weights, spec = suite.made(case((4, 4, 64)))
    with pytest.raises(RuntimeError, match="2 are too few: set the environment's NPROC=4"):
        decode(q, cache, weights, spec, implementation="pallas_gpu")


# Blocks of a cluster, and of eight query tokens those that are decoded together.
SHARED = {
    "llama-2-7b": (8, [1] * 8),
    "phi-3-mini": (8, [2] * 4),
    "smollm2-1.7b": (4, [2] * 4),
    "whisper-large-self": (2, [1] * 8),
}


@pytest.mark.parametrize("shape", SHARED)
def test_real_shapes_are_shared(shape):
    blocks, counts = SHARED[shape]
    spec = SHAPES[shape].spec("k2:bf16", "bfloat16")
    ((count, part),) = keys.plan(spec, 1, None)
    assert (count, part.blocks) == (1, blocks)
    found = keys.plan(spec, 8, None)
    assert [count for count, _ in found] == counts
    for _, part in found:
        assert part.slots * part.piece >= 2 * part.width
        assert part.blocks * part.width == spec.key_width


def test_two_passes_serve_more_query_tokens_where_they_can():
    spec = SHAPES["whisper-large-self"].spec("k2:bf16", "bfloat16")
    assert keys.plan(spec, 3, None) is None
    assert [count for count, _ in keys.plan(spec, 3, 1)] == [1, 1, 1]
    assert [count for count, _ in keys.plan(spec, 7, None)] == [1] * 7  # 140 rows are no two passes'
    turned = SHAPES["smollm2-1.7b"].spec("k2:bf16", "bfloat16")
    assert [count for count, _ in keys.plan(turned, 3, None)] == [2, 1]


def test_query_rows_of_latents_are_cut_into_clusters():
    spec = SHAPES["t5-11b-cross"].spec("e2:bf16", "bfloat16")
    part = latent.plan(spec, 1)
    assert part.groups * part.rows >= 128 > part.rows
    each = CASES[NAMES.index("C2-x2:int16-32x4x64-none-T3-P1-window=70")][1]
    assert latent.plan(suite.made(each)[-1], each.tokens).groups > 1


def test_passes_other_than_one_and_two_are_refused():
    q, cache, weights, spec = suite.made(case((4, 4, 64)))
    with pytest.raises(ValueError, match="passes=3: expected 1, 2 or None"):
        suite.pallas_gpu.decode(q, cache, weights, spec, cache.length, passes=3)
    spec = dataclasses.replace(spec, position=suite.Position(kind="rope"))
    with pytest.raises(NotImplementedError, match="before RoPE have no kernel for GPUs in two passes"):
        suite.pallas_gpu.decode(q, cache, weights, spec, cache.length, passes=2)
