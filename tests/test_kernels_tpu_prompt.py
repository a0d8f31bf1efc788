"""A prompt's attention by splash attention, interpreted, beside the oracle."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import suites

import oracle
from slimjax import DecodeSpec, Position, parse_scheme
from slimjax.attention import layer
from slimjax.attention.compute import compute_of
from slimjax.attention.positions import rotate
from slimjax.kernels import prompts
from slimjax.kernels.shapes import SHAPES
from slimjax.kernels.tpu import flashq_prompt, prompt
from slimjax.kernels.tpu.generations import GENERATIONS
from slimjax.numerics import relative_l2
from slimjax.solve import convert

# Queries, keys, values and weights are rounded to 2^-9.
TOLERANCE = 6e-3
TOKENS = 300  # three blocks of 128, the last not whole


def spec_of(heads, kv_heads, size, position="none", **options):
    return DecodeSpec(
        scheme=parse_scheme("kv:bf16"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=size,
        width=heads * size,
        position=Position(kind=position),
        dtype="bfloat16",
        **options,
    )


CASES = [
    spec_of(2, 2, 64, "rope"),
    spec_of(4, 2, 128, "rope", window=140),
    spec_of(1, 1, 96, softcap=3.0, scale=0.2),
    spec_of(3, 1, 64, "learned", window=5),
]


def rows(spec, lengths):
    draw = np.random.default_rng(0)

    def array(heads):
        return jnp.asarray(draw.standard_normal((len(lengths), TOKENS, heads, spec.head_dim)), jnp.float32)

    k, v = (array(spec.kv_heads).astype(jnp.bfloat16) for _ in "kv")
    return array(spec.heads), k, v


@pytest.mark.parametrize(
    "spec", CASES, ids=lambda s: f"{s.heads}x{s.kv_heads}x{s.head_dim}-{s.position.kind}"
)
def test_it_is_the_oracle(spec):
    lengths = (TOKENS, 130)
    q, k, v = rows(spec, lengths)
    keys = rotate(k, jnp.arange(TOKENS, dtype=jnp.int32)[None], spec.position).astype(jnp.bfloat16)
    past = (jnp.arange(TOKENS)[None] >= jnp.asarray(lengths)[:, None])[:, :, None, None]
    k_spoilt, v_spoilt = (jnp.where(past, jnp.nan, each).astype(jnp.bfloat16) for each in (keys, v))
    found = prompt.attend_prompt(q, k_spoilt, v_spoilt, spec, jnp.asarray(lengths, jnp.int32), interpret=True)
    rope = suites.rope_of(spec)
    exact = [np.asarray(each, np.float64) for each in (q, keys, v)]
    if rope:
        exact[0] = oracle.rotate(exact[0], np.arange(TOKENS), *rope)
    if spec.scale is not None:
        exact[0] = exact[0] * spec.scale * spec.head_dim**0.5
    wanted = oracle.attend(
        *exact,
        start=np.zeros(2, int),
        length=np.asarray(lengths),
        causal=True,
        window=spec.window,
        softcap=spec.softcap,
    )
    for index, length in enumerate(lengths):
        error = relative_l2(np.asarray(found[index, :length], np.float64), wanted[index, :length])
        assert TOLERANCE / 10 < error < TOLERANCE


@pytest.mark.parametrize(
    ("changes", "tokens", "reason"),
    [
        ({"dtype": "float32"}, 200, "dtype float32"),
        ({"causal": False}, 200, "looks ahead"),
        ({"position": Position(kind="alibi")}, 200, "adds to the scores"),
        ({}, 127, "fewer than 128"),
    ],
)
def test_what_it_does_not_serve_it_refuses(changes, tokens, reason):
    spec = dataclasses.replace(CASES[0], **changes)
    array = jnp.zeros((1, tokens, 2, 64), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=reason):
        prompt.attend_prompt(array, array, array, spec, jnp.asarray([tokens], jnp.int32))


def test_prefill_takes_it_on_a_tpu_and_nowhere_else(monkeypatch):
    shape = SHAPES["tiny-gqa"]
    spec = shape.spec("kv:bf16", "bfloat16")
    key = jax.random.key(0)

    def weight(index, *size):
        return 0.1 * jax.random.normal(jax.random.fold_in(key, index), size)

    made = layer.Projections(
        wq=weight(0, 128, 4, 32), wk=weight(1, 128, 2, 32), wv=weight(2, 128, 2, 32), wo=weight(3, 4, 32, 128)
    )
    converted = convert(made, spec).layer
    x = jax.random.normal(key, (1, 130, 128))
    asked = []

    def attend(q, k, v, spec, length):
        asked.append(q.shape)
        return real(q, k, v, spec, length, interpret=True)

    real = prompt.attend_prompt
    monkeypatch.setattr(prompt, "attend_prompt", attend)
    plain, _ = layer.prefill(x, converted, layer.init_cache(spec, batch=1, capacity=256))
    assert not asked
    monkeypatch.setattr(prompts.jax, "default_backend", lambda: "tpu")
    found, _ = layer.prefill(x, converted, layer.init_cache(spec, batch=1, capacity=256))
    assert asked == [(1, 130, 4, 32)]
    assert relative_l2(np.asarray(found, np.float64), np.asarray(plain, np.float64)) < 2 * TOLERANCE
    layer.attend_full(x, converted.projections, spec)  # of which a gradient may be asked
    assert len(asked) == 1


@pytest.mark.parametrize(("scheme", "served"), [("kv:flashq4@sas", True), ("kv:bf16#sage", False)])
def test_other_arithmetic_has_a_kernel_of_its_own_or_none(scheme, served, monkeypatch):
    spec = SHAPES["tiny-gqa"].spec(scheme, "bfloat16")
    compute = compute_of(spec)
    assert prompts.prompt_kernel(spec, 300, compute) is None
    monkeypatch.setattr(prompts.jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(prompts, "running", lambda: GENERATIONS["v4"])
    found = prompts.prompt_kernel(spec, 300, compute)
    assert (found is not None) == served
    if served:
        assert isinstance(found, functools.partial)
        assert found.func is flashq_prompt.attend_prompt
        assert found.keywords == {"integer": compute, "tile": 64, "int8": False}
