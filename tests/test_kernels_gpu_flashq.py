"""The GPU kernel over FlashQ's tiles, interpreted: against the reference, whose integers it has, and the oracle."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import suites
import test_kernels_tpu_flashq as suite
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter_state
from threaded import alone, run_threaded, threaded

from slimjax import DecodeWeights, decode, parse_scheme
from slimjax.attention.sas import sas_exp
from slimjax.kernels import gpu_aot, gpu_cases, pallas_gpu
from slimjax.kernels.gpu import mosaic, ring
from slimjax.numerics import relative_l2

pytestmark = pytest.mark.skipif(mosaic.OLD, reason="the kernel needs jax 0.11 or newer")
Case = suite.Case
# The reference's integers, as on TPU; its answers are in bfloat16, which rounds to 2^-9, and so are these: a few that
# lie beside a boundary fall to either side. Where weights are rounded or cut by how far they lie below the maximum so
# far (a static scale, SAS), that of one reader is not that of the whole sequence: such cases err no more.
TOLERANCE = 1e-3
FEW = (0, 33, 300, suite.CAPACITY)
BF16 = ("dtype", "bfloat16")
FLASHQ = [case for case in gpu_cases.CASES if case.scheme.startswith("kv:flashq")]
CASES = [
    Case("kv:flashq4/64", (2, 2, 64), lengths=FEW),
    Case("kv:flashq4/64", (4, 2, 128), "rope", 2, splits=2, lengths=FEW),
    Case("kv:flashq8/64", (2, 1, 64), "rope", 3, lengths=FEW),
    Case("kv:flashq2/64", (2, 2, 64), lengths=FEW),
    Case("kv:flashq2/64", (4, 1, 128), tokens=3, lengths=FEW),  # in two calls: 12 rows have no room
    Case("kv:flashq4/64", (2, 1, 96), "rope", 2, lengths=FEW),
    Case("kv:flashq4/32", (2, 2, 64), options=(("window", 100), ("softcap", 4.0)), lengths=FEW),
    Case("kv:flashq2-4/64@sas", (4, 2, 64), "rope", lengths=FEW),
    Case(
        "kv:flashq4/64#int8(p=static,denominator=after)",
        (2, 2, 64),
        options=(("causal", False),),
        lengths=FEW,
    ),
    Case("kv:flashq4/64@sas#int8(rescale=softmax)", (2, 2, 64), lengths=FEW),
    Case("kv:flashq4(window=128)/64", (8, 1, 64), tokens=8, lengths=FEW),  # all 64 columns
]


def made(case):
    return suite.made(dataclasses.replace(case, options=(*case.options, BF16)))


def answers(case, q, cache, spec, start, *, races=True):
    found = pallas_gpu.decode(
        q,
        cache,
        DecodeWeights(),
        spec,
        start,
        splits=case.splits,
        interpret=mosaic.interpreter(detect_races=races),
    )
    return np.asarray(found, np.float64)


@threaded
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_the_reference(case):
    q, cache, spec = made(case)
    start = suite.start_of(cache, spec, case.tokens)
    bad = suite.poisoned(cache, spec)
    wanted = np.asarray(suite.exactly(q, cache, DecodeWeights(), spec, start), np.float64)
    found = answers(case, q, bad, spec, start)
    assert not interpreter_state.get_races().races_found
    if "sas" in case.scheme or "static" in case.scheme:
        exact = dataclasses.replace(
            spec, scheme=parse_scheme(re.split("[@#]", case.scheme)[0]), dtype="float32"
        )
        best = np.asarray(suite.exactly(q, cache, DecodeWeights(), exact, start), np.float64)
        assert relative_l2(found, best) < 1.1 * relative_l2(wanted, best)
    else:
        assert relative_l2(found, wanted) < TOLERANCE
        assert np.mean(found != wanted) < 0.05
    np.testing.assert_array_equal(found[cache.length == 0], 0)


@threaded
def test_it_gives_the_same_twice():
    case = CASES[1]
    q, cache, spec = made(case)
    start = suite.start_of(cache, spec, case.tokens)
    once, again = (answers(case, q, cache, spec, start, races=races) for races in (True, False))
    np.testing.assert_array_equal(once, again)


@alone
def test_in_a_process_of_enough_threads(request):
    names = ["test_it_is_the_reference", "test_it_gives_the_same_twice"]
    run_threaded(request, names, len(CASES) + 1)


def test_with_too_few_threads_it_says_so(monkeypatch):
    monkeypatch.setenv("NPROC", "2")
    q, cache, spec = made(Case("kv:flashq4/64", (2, 2, 64), lengths=(64,)))
    with pytest.raises(RuntimeError, match="2 are too few: set the environment's NPROC=16"):
        decode(q, cache, DecodeWeights(), spec, implementation="pallas_gpu")


def test_its_sas_is_that_of_the_softmax():
    x = jnp.linspace(0, 9, 1001)
    for cut in ((6.0, 3), (4.5, 2)):
        np.testing.assert_allclose(ring.exponential(x, cut), sas_exp(x, *cut), atol=2e-7)


REFUSED = [
    ({"scheme": "kv:flashq3/64"}, "tiles of 3 bits have no kernel"),
    ({"scheme": "kv:flashq8/128"}, "tiles of 128 tokens in 8 bits have no kernel .*; use 32 or 64"),
    ({"scheme": "kv:flashq4/64#float"}, "compute mode float of FlashQ's tiles has no kernel"),
    ({"scheme": "kv:flashq4/64@sas(0)"}, "it has exact, and SAS with a cut"),
    ({"layout": (2, 2, 80)}, "head_dim=80 has no kernel for GPUs; it has 64, 96, 128"),
    (
        {"layout": (8, 1, 64), "tokens": 129},
        "129 query tokens are more than 16 calls of 8; decode at most 128 at a time",
    ),
    ({"scheme": "kv:flashq2/64", "layout": (16, 1, 128)}, "16 query heads a key head .* shared memory"),
    ({"position": "alibi"}, "position scheme 'alibi' has no kernel"),
]


@pytest.mark.parametrize(("changes", "reason"), REFUSED, ids=str)
def test_what_it_does_not_serve_it_refuses_with_the_reason(changes, reason):
    q, cache, spec = made(
        Case(**{"scheme": "kv:flashq4/64", "layout": (2, 2, 64), "lengths": (64,), **changes})
    )
    with pytest.raises(NotImplementedError, match=reason):
        decode(q, cache, DecodeWeights(), spec, implementation="pallas_gpu")


@pytest.mark.parametrize("case", FLASHQ, ids=str)
def test_it_is_lowered_for_cuda_without_a_gpu(case):
    function, specs = gpu_cases.program(case)
    text = gpu_aot.lower(function, *specs).as_text()
    assert text.count("custom_call @mosaic_gpu") == (2 if "2-4" in case.scheme else 1)


@pytest.mark.parametrize("case", FLASHQ, ids=str)
def test_readers_share_no_memory_of_reductions(case):
    """Pallas would send what goes from warp to warp through one place for all warpgroups of a block."""
    function, specs = gpu_cases.program(case)
    assert reductions_over_rows(function, *specs) == 0
    assert reductions_over_rows(lambda x: x.max(axis=0), jnp.zeros((64, 8))) == 1


def reductions_over_rows(function, *specs):
    kernels = [
        each
        for each in suites.equations(jax.make_jaxpr(function)(*specs).jaxpr)
        if each.primitive.name.startswith("reduce_") and each.invars[0].aval.shape[:1] == (ring.BLOCK,)
    ]
    return sum(0 in each.params.get("axes", ()) for each in kernels)
