"""The GPU kernel of prompts in INT8 tiles, interpreted: the reference's integers, and the oracle's attention."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import suites
import test_kernels_tpu_flashq_prompt as suite
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter_state
from test_kernels_gpu_flashq import reductions_over_rows
from threaded import alone, run_threaded, threaded

import oracle
from slimjax import Position
from slimjax.attention.compute import compute_of
from slimjax.kernels import gpu_aot, gpu_cases, prompts
from slimjax.kernels.gpu import mosaic, prompt
from slimjax.numerics import relative_l2

pytestmark = pytest.mark.skipif(mosaic.OLD, reason="the kernel needs jax 0.11 or newer")
TOKENS, LENGTHS = (
    200,
    (200, 130, 0),
)  # tiles that are not whole, and a block of queries that one reader has nothing of
CASES = [
    suite.spec_of(1, 1, 64),
    suite.spec_of(2, 1, 128, "kv:flashq4@sas", "rope"),
    suite.spec_of(1, 1, 64, "kv:flashq2-4@sas", "rope", window=70, softcap=4.0),
    suite.spec_of(1, 1, 96, "kv:flashq4", scale=0.2, window=5),
    suite.spec_of(1, 1, 64, "kv:flashq4#int8(p=row)"),
    suite.spec_of(1, 1, 64, "kv:flashq4@sas#int8(p=static,denominator=after,rescale=softmax)"),
]
names = pytest.mark.parametrize(
    "spec", CASES, ids=lambda s: f"{s.scheme}-{s.heads}x{s.kv_heads}x{s.head_dim}"
)


def run(spec, given, *, races=False):
    """With NaN behind every prompt's end."""
    q, k, v, length = given
    past = (jnp.arange(q.shape[1])[None] >= length[:, None])[:, :, None, None]
    spoilt = (jnp.where(past, jnp.nan, rows) for rows in (q, k, v))
    integer = suite.integer_of(spec)
    call = functools.partial(
        prompt.attend_prompt,
        spec=spec,
        integer=integer,
        tile=integer.tokens(spec),
        interpret=mosaic.interpreter(detect_races=races),
    )
    return np.asarray(call(*spoilt, length=length))


@threaded
@names
def test_it_has_the_reference_s_integers(spec):
    given = suite.made(spec, TOKENS, LENGTHS)
    found = run(spec, given, races=True)
    assert not interpreter_state.get_races().races_found
    wanted = np.asarray(suite.expected(*given, spec))
    for index, length in enumerate(LENGTHS):
        assert not np.any(found[index, length:])
        if length:
            # In other powers a weight beside a boundary may be rounded to the other side, which its row shows.
            rows = zip(found[index, :length], wanted[index, :length], strict=True)
            apart = [relative_l2(mine, other) > 5 * suite.SAME for mine, other in rows]
            assert np.mean(apart) < 0.02
            assert relative_l2(found[index, :length], wanted[index, :length]) < 3e-4


@threaded
def test_it_gives_the_same_twice():
    given = suite.made(CASES[1], TOKENS, LENGTHS)
    np.testing.assert_array_equal(run(CASES[1], given), run(CASES[1], given))


@threaded
def test_it_is_attention_within_what_int8_gives():
    """119 levels of queries, keys, weights and values: each a relative error of some 0.4 % of its largest."""
    spec = CASES[1]
    q, k, v, length = suite.made(spec, TOKENS, LENGTHS)
    found = run(spec, (q, k, v, length))[0]
    exact = [np.asarray(each, np.float64)[:1] for each in (q, k, v)]
    rope = suites.rope_of(spec)
    assert rope is not None
    exact[0] = oracle.rotate(exact[0], np.arange(TOKENS), *rope)
    wanted = oracle.attend(*exact, start=np.zeros(1, int), length=np.asarray(length[:1]), causal=True)[0]
    assert 2e-3 < relative_l2(found, wanted) < 4e-2


@threaded
def test_a_reader_that_does_not_wait_is_seen_to_race(monkeypatch):
    known = vars(prompt.ring.plgpu)
    hasty = SimpleNamespace(**known | {"barrier_wait": lambda barrier: None})
    monkeypatch.setattr(prompt.ring, "plgpu", hasty)
    said = ""
    try:
        run(CASES[0], suite.made(CASES[0], TOKENS, LENGTHS), races=True)
    except jax.errors.JaxRuntimeError as error:
        said = str(error)
    assert "RACE DETECTED" in said or interpreter_state.get_races().races_found


@alone
def test_in_a_process_of_enough_threads(request):
    names = [
        "test_it_has_the_reference_s_integers",
        "test_it_gives_the_same_twice",
        "test_it_is_attention_within_what_int8_gives",
        "test_a_reader_that_does_not_wait_is_seen_to_race",
    ]
    run_threaded(request, names, len(CASES) + 3)


def test_a_layer_takes_it_where_its_spec_names_it():
    spec = dataclasses.replace(CASES[0], implementation="pallas_gpu")
    found = prompts.prompt_kernel(spec, TOKENS, compute_of(spec))
    assert isinstance(found, functools.partial)
    assert found.keywords == {"implementation": "pallas_gpu"}
    assert prompts.prompt_kernel(CASES[0], TOKENS, compute_of(spec)) is None
    assert prompts.prompt_kernel(spec, TOKENS, None) is None  # in floating point there is none


@pytest.mark.parametrize(
    ("changes", "tile", "reason"),
    [
        ({}, 32, "tiles of 32 tokens; it has 64"),
        ({"head_dim": 80, "width": 80}, 64, "heads of 80; it has 64, 96, 128"),
        ({"dtype": "float16"}, 64, "compute dtype float16; it has bfloat16 and float32"),
        ({"causal": False}, 64, "looks ahead"),
        ({"position": Position(kind="t5")}, 64, "adds to the scores"),
    ],
)
def test_what_it_does_not_serve_it_refuses(changes, tile, reason):
    spec = dataclasses.replace(CASES[0], **changes)
    q, k, v, length = suite.made(spec, 8, (8,))
    with pytest.raises(NotImplementedError, match=reason):
        prompt.attend_prompt(q, k, v, spec, length, suite.integer_of(CASES[0]), tile)


@pytest.mark.parametrize(("scheme", "shape"), gpu_cases.PROMPTS)
def test_it_is_lowered_for_cuda_without_a_gpu(scheme, shape):
    function, specs = gpu_cases.prompt_program(scheme, shape)
    assert gpu_aot.lower(function, *specs).as_text().count("custom_call @mosaic_gpu") == 1
    assert reductions_over_rows(function, *specs) == 0
