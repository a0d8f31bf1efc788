"""What the TPU kernels choose before they run: tiles that fit, parts for cores, and whether a TPU is known at all."""

import dataclasses
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_kernels_tpu import Case, made

from slimjax import decode, parse_scheme
from slimjax.attention.bases import basis
from slimjax.attention.compute import compute_of
from slimjax.cache import codec_of, empty
from slimjax.kernels import pallas_tpu, reference
from slimjax.kernels.prompts import attend_prompt, prompt_kernel
from slimjax.kernels.tiles import Memory, Tiles, choose
from slimjax.kernels.tpu.generations import GENERATIONS
from slimjax.kernels.tpu.online import LANES, at_once
from slimjax.kernels.tpu.operands import angles_period, operands
from slimjax.kernels.tpu.room import memory


def test_tiles_are_those_asked_for_or_as_much_as_fits():
    used = Memory(fixed=1000, token=100)
    assert choose(4096, used).block == 1024
    assert choose(100, used).block == 112  # whole sublanes
    assert choose(4096, used, vmem=4 * (1000 + 100 * 300) // 3) == Tiles(block=256, vmem=41333)
    assert choose(4096, used, tiles=Tiles(block=64, splits=2)) == Tiles(block=64, splits=2)
    assert choose(4096, used, splits=2) == Tiles(block=1024, splits=2)
    assert choose(100, used, splits=2).splits == 1
    with pytest.raises(NotImplementedError, match="128 tokens take 13,800 bytes"):
        choose(4096, used, vmem=2000)
    with pytest.raises(NotImplementedError, match=r"64 tokens take 7,400 bytes .*, more than 1,500"):
        choose(4096, used, tiles=Tiles(block=64, vmem=2000))
    for wrong in ({"block": 8}, {"block": 40}, {"block": 32, "splits": 0}):
        with pytest.raises(ValueError, match=r"tile has|one part"):
            Tiles(**wrong)


@pytest.mark.parametrize(
    ("scheme", "cut"),
    [
        ("kv:bf16", True),
        ("kv:flashq4", True),
        ("kv:flashq2-4", True),
        ("kv:flashq4@sas", False),  # what it cuts off depends on the maximum so far, a part's own
        ("kv:flashq4#int8(p=static)", False),
    ],
)
def test_one_sequence_is_cut_for_the_cores_of_a_device(scheme, cut):
    *_, weights, spec = made(Case(scheme, lengths=(1,)))

    def parts(name, batch):
        cache = empty(basis(spec).streams(spec), codec_of(spec.scheme), batch=batch, capacity=4096)
        q = jnp.zeros((batch, 1, spec.heads, spec.head_dim))
        return pallas_tpu.tiles_of(q, cache, weights, spec, GENERATIONS[name]).splits

    for name, one in (("v4", 2), ("v5p", 2), ("v5e", 1), ("v7x", 1)):
        assert (parts(name, 1), parts(name, 2)) == (one if cut else 1, 1), name


def test_a_tpu_that_is_not_known_is_refused_before_it_is_compiled_for(monkeypatch):
    """So that ``implementation=None`` falls back: a kernel that its compiler refuses comes too late for that."""
    q, cache, weights, spec = made(Case("k2:int16", lengths=(9,)))
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind="TPU v9")])
    start, integral = cache.length - 1, dataclasses.replace(spec, scheme=parse_scheme("kv:flashq4"))
    for call in (
        lambda: decode(q, cache, weights, spec, implementation="pallas_tpu"),
        lambda: pallas_tpu.tiles_of(q, cache, weights, spec),
        lambda: attend_prompt(q, q, q, integral, cache.length, implementation="pallas_tpu"),
    ):
        with pytest.raises(NotImplementedError, match="TPU 'TPU v9' is not known"):
            call()
    np.testing.assert_array_equal(
        decode(q, cache, weights, spec), reference.decode(q, cache, weights, spec, start)
    )
    assert prompt_kernel(integral, 64, compute_of(integral)) is None
    pallas_tpu.decode(q, cache, weights, spec, start, interpret=True)  # compiles nothing
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind="TPU v5e")])
    assert prompt_kernel(integral, 64, compute_of(integral)) is not None


@pytest.mark.parametrize(
    "case",
    [
        Case("kv:int8", (16, 8, 128, 2048), "alibi"),
        Case("k2:int16+16", (16, 16, 64, 1024), "rope"),
        Case("k2:int16", (16, 16, 64, 1024)),  # in planes
        Case("k2:bf16", (16, 16, 48, 768), "rope", k_bias=True),  # whose tables repeat with all columns only
        Case("x2:bf16", (16, 4, 128, 2048), "t5", tokens=2),
    ],
    ids=str,
)
def test_what_a_kernel_holds_is_counted(case):
    """Blocks twice, those that every step reads whole once, and scratch; the rest is of scores and columns at work."""
    q, cache, weights, spec = made(dataclasses.replace(case, lengths=(5,)))
    cache = jax.eval_shape(
        lambda: empty(basis(spec).streams(spec), codec_of(spec.scheme), batch=2, capacity=512)
    )
    q, start = jax.ShapeDtypeStruct((2, *q.shape[1:]), q.dtype), jax.ShapeDtypeStruct((2,), jnp.int32)
    here, found = GENERATIONS["v5e"], []

    def look(q, cache, weights, start):
        given, rules = operands(q, cache, weights, spec, start, int8=True)
        used, tiles = memory(given, rules), Tiles(block=128)
        turned = given.turned is not None
        period = angles_period(spec.head_dim, given.keys.width) if turned else LANES
        columns = at_once(given.keys.width, period)
        wide = turned or bool(given.keys.operands(jnp.bfloat16))
        found.append(used.of(128) - 128 * ((24 if wide else 8) * columns + 12 * given.rows))
        return pallas_tpu.decode(
            q, cache, weights, spec, start, tiles=tiles, generation=here, interpret=False
        )

    program = jax.make_jaxpr(look)(q, cache, weights, start)
    (call,) = (each for each in program.eqns if each.primitive.name == "pallas_call")
    grid = call.params["grid_mapping"]

    def size(held):
        shape = held.shape
        return math.prod(shape[:-1]) * math.ceil(shape[-1] / LANES) * LANES * held.dtype.itemsize

    scratch = call.params["jaxpr"].invars[-grid.num_scratch_operands :]
    declared = sum(
        (1 if block.has_trivial_window() else 2) * size(block.block_aval.inner_aval)
        for block in grid.block_mappings
    ) + sum(size(each.aval.inner_aval) for each in scratch)
    assert found == [declared]


@pytest.mark.parametrize(
    ("case", "left_out"),
    [
        (Case("k2:bf16", k_bias=True), True),
        (Case("k2:int16", position="alibi", k_bias=True), True),
        (Case("k2:bf16", position="rope", k_bias=True), False),
        (Case("k2:bf16", options=(("softcap", 3.0),), k_bias=True), False),
        (Case("k2:flashq4", k_bias=True), False),  # the newest tokens, in no tile, have it
    ],
    ids=str,
)
def test_a_key_bias_that_cancels_is_left_out(case, left_out):
    """Keys are then met as they are stored, and not in float32."""
    q, cache, weights, spec = made(dataclasses.replace(case, lengths=(5,)))
    given, _ = operands(q, cache, weights, spec, cache.length - 1, int8=True)
    assert (given.key_bias is None) == left_out
