"""The TPU kernel of prompts in INT8 tiles, interpreted: the reference's integers, and the oracle's attention."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import suites
import test_kernels_tpu as rows_suite

import oracle
from slimjax import DecodeSpec, Position, parse_scheme
from slimjax.attention.compute import compute_of
from slimjax.attention.integer import Integer
from slimjax.attention.positions import rotate
from slimjax.attention.reference import geometry
from slimjax.kernels.tpu import flashq_prompt
from slimjax.numerics import relative_l2

TOKENS, LENGTHS = 300, (300, 130, 0)  # tiles that are not whole, and several blocks of queries
# The same integers: what is left is the order of sums in float32. Where an exponential differs in its last bit, a
# weight's code may differ by one in a million of them.
SAME = 2e-6


def spec_of(heads, kv_heads, size, scheme="kv:flashq4", position="none", **options):
    return DecodeSpec(
        scheme=parse_scheme(scheme),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=size,
        width=heads * size,
        position=Position(kind=position),
        dtype="float32",
        **options,
    )


CASES = [
    spec_of(1, 1, 64),
    spec_of(2, 2, 128, "kv:flashq4@sas", "rope"),
    spec_of(4, 2, 64, "kv:flashq2-4@sas", "rope", window=70, softcap=4.0),
    spec_of(1, 1, 96, "kv:flashq4/32", scale=0.2),
    spec_of(1, 1, 64, "kv:flashq4/128", window=5),
    spec_of(2, 1, 64, "kv:flashq4#int8(p=row)"),
    spec_of(1, 1, 64, "kv:flashq4@sas#int8(p=static,denominator=after,rescale=softmax)"),
    spec_of(1, 1, 64, "kv:bf16#int8(tile=32)"),
]
names = pytest.mark.parametrize(
    "spec", CASES, ids=lambda s: f"{s.scheme}-{s.heads}x{s.kv_heads}x{s.head_dim}"
)


def integer_of(spec):
    found = compute_of(spec)
    assert isinstance(found, Integer)
    return found


def made(spec, tokens=TOKENS, lengths=LENGTHS):
    draw = np.random.default_rng(0)

    def array(heads):
        return jnp.asarray(draw.standard_normal((len(lengths), tokens, heads, spec.head_dim)), jnp.float32)

    positions = jnp.arange(tokens, dtype=jnp.int32)
    q, k, v = array(spec.heads), array(spec.kv_heads), array(spec.kv_heads)
    return q, rotate(k, positions[None], spec.position), v, jnp.asarray(lengths, jnp.int32)


def expected(q, k, v, length, spec):
    """The reference, as ``attend_full`` calls it."""
    positions = jnp.arange(q.shape[1], dtype=jnp.int32)
    everywhere = jnp.broadcast_to(positions[None], q.shape[:2])
    where = geometry(everywhere, positions, length, None, spec)
    where = where.restrict((everywhere < length[:, None])[:, None, :, None])
    return compute_of(spec).attend(q, k, v, where, spec)


def run(spec, given, **options):
    q, k, v, length = given
    past = (jnp.arange(q.shape[1])[None] >= length[:, None])[:, :, None, None]
    spoilt = (jnp.where(past, jnp.nan, rows) for rows in (q, k, v))
    integer = integer_of(spec)
    call = functools.partial(
        flashq_prompt.attend_prompt, spec=spec, integer=integer, tile=integer.tokens(spec), **options
    )
    return np.asarray(jax.jit(lambda *a: call(*a[:3], length=a[3]))(*spoilt, length))


@names
def test_it_has_the_reference_s_integers(spec):
    given = made(spec)
    found = run(spec, given, interpret=True)
    wanted = np.asarray(expected(*given, spec))
    for index, length in enumerate(LENGTHS):
        assert not np.any(found[index, length:])
        if length:
            assert relative_l2(found[index, :length], wanted[index, :length]) < SAME


def test_bfloat16_products_have_the_same_sums():
    spec = CASES[2]
    given = made(spec)
    np.testing.assert_array_equal(
        run(spec, given, interpret=True), run(spec, given, interpret=True, int8=False)
    )


def test_hostile_memory_and_races_change_nothing():
    spec = dataclasses.replace(CASES[2], head_dim=128)
    given = made(spec, 140, (140, 70))
    found = run(spec, given, interpret=rows_suite.HOSTILE)
    assert not rows_suite.races_found()
    np.testing.assert_array_equal(found, run(spec, given, interpret=rows_suite.HOSTILE))
    wanted = np.asarray(expected(*given, spec))
    assert relative_l2(found[0], wanted[0]) < SAME
    assert relative_l2(found[1, :70], wanted[1, :70]) < SAME


def test_it_is_attention_within_what_int8_gives():
    """119 levels of queries, keys, weights and values: each a relative error of some 0.4 % of its largest."""
    spec = CASES[1]
    q, k, v, length = made(spec)
    found = run(spec, (q, k, v, length), interpret=True)[0]
    exact = [np.asarray(each, np.float64)[:1] for each in (q, k, v)]
    rope = suites.rope_of(spec)
    assert rope is not None
    exact[0] = oracle.rotate(exact[0], np.arange(TOKENS), *rope)
    wanted = oracle.attend(*exact, start=np.zeros(1, int), length=np.asarray(length[:1]), causal=True)[0]
    assert 2e-3 < relative_l2(found, wanted) < 4e-2


@pytest.mark.parametrize(
    ("changes", "tile", "reason"),
    [
        ({}, 48, "tiles of 48 tokens; it has 32, 64, 128"),
        ({"dtype": "float16"}, 64, "compute dtype float16; it has bfloat16 and float32"),
        ({"causal": False}, 64, "looks ahead"),
        ({"position": Position(kind="t5")}, 64, "adds to the scores"),
    ],
)
def test_what_it_does_not_serve_it_refuses(changes, tile, reason):
    spec = dataclasses.replace(CASES[0], **changes)
    q, k, v, length = made(CASES[0])
    with pytest.raises(NotImplementedError, match=reason):
        flashq_prompt.attend_prompt(q, k, v, spec, length, integer_of(CASES[0]), tile)
