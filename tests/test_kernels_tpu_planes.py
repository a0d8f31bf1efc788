"""int16 keys as planes of INT8 in the TPU kernel: the integers, and what the kernel makes of them, interpreted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_kernels_tpu as suite

from slimjax.kernels import pallas_tpu
from slimjax.kernels.tiles import Tiles
from slimjax.kernels.tpu.generations import GENERATIONS
from slimjax.kernels.tpu.planes import LARGEST, SHIFT, digits, multiplied, planes
from slimjax.numerics import relative_l2

Case = suite.Case


def test_planes_are_the_codes():
    codes = np.arange(-(2**15), 2**15, dtype=np.int16).reshape(-1, 128)
    high, low = (np.asarray(each, np.int64) for each in jax.jit(planes)(jnp.asarray(codes)))
    np.testing.assert_array_equal(256 * high + low + SHIFT, codes)


def test_digits_and_planes_are_multiplied_exactly():
    draw = np.random.default_rng(0)
    x = draw.standard_normal((5, 64)) * np.array([1.0, 1e-6, 1e4, 0.0, 1.0])[:, None]
    x[4, 1:] = 0  # one number, and the largest codes: nothing may overflow
    codes = draw.integers(-32767, 32768, (64, 96)).astype(np.int16)
    codes[:, :2] = [-32767, 32767]
    parted, pair = digits(jnp.asarray(x, jnp.float32)), jax.jit(planes)(jnp.asarray(codes))
    products = sum(f * multiplied(parted.codes, p, 0) for f, p in zip((256.0, 1.0), pair, strict=True))
    scale = np.asarray(parted.scale, np.float64)
    rounded = np.round(np.asarray(x, np.float32) / np.asarray(parted.scale))
    assert np.abs(rounded).max() == LARGEST
    size = np.abs(rounded * scale) @ np.abs(codes.astype(np.float64))
    np.testing.assert_array_less(
        np.abs(np.asarray(parted.whole(products)) - (rounded * scale) @ codes.astype(np.float64)),
        1e-6 * size + 1e-30,  # float32 sums of four exact products
    )


CASES = [
    Case("k2:int16", lengths=suite.LENGTHS),
    Case("k2:int16+8", tokens=2, lengths=suite.LENGTHS),
    Case("k2:int16", suite.TINY, "rope", tokens=2, splits=2),
    Case("k2:int16", suite.TINY, "alibi", options=(("window", 20), ("softcap", 4.0))),
    Case("x2:int16", suite.GQA),
]


def answer(case, generation, interpret=True):
    q, cache, weights, spec = suite.made(case)
    start = suite.start_of(cache, spec, case.tokens)
    found = pallas_tpu.decode(
        q,
        suite.poisoned(cache),
        weights,
        spec,
        start,
        tiles=Tiles(block=suite.BLOCK, splits=case.splits),
        generation=GENERATIONS[generation],
        interpret=interpret,
    )
    return np.asarray(found, np.float64), suite.expected(q, cache, weights, spec, start)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_they_are_no_worse_than_products_of_bfloat16(case):
    """Those of v4, which multiplies no INT8."""
    (mine, wanted), (other, _) = (answer(case, generation) for generation in ("v5e", "v4"))
    assert not np.array_equal(mine, other)
    assert relative_l2(mine, wanted) < 1.1 * relative_l2(other, wanted)


@pytest.mark.parametrize("case", CASES[1:3], ids=str)
def test_nothing_behind_a_length_is_read(case):
    found, wanted = answer(case, "v5e", suite.HOSTILE)
    assert relative_l2(found, wanted) < suite.TOLERANCE["bfloat16"]
    assert not suite.races_found()


def test_large_scores_are_as_precise():
    """Where few tokens decide, an error of a score is one of the answer."""
    case = Case("k2:int16", lengths=(suite.CAPACITY,))
    q, cache, weights, spec = suite.made(case)
    q = q * 40.0
    start = suite.start_of(cache, spec, 1)
    wanted = suite.expected(q, cache, weights, spec, start)
    tiles = Tiles(block=suite.BLOCK)
    found = pallas_tpu.decode(q, cache, weights, spec, start, tiles=tiles, interpret=True)
    assert relative_l2(np.asarray(found, np.float64), wanted) < suite.TOLERANCE["bfloat16"]


@pytest.mark.parametrize(("position", "floats"), [("none", 0), ("rope", 2)])
def test_no_key_becomes_a_float_unless_it_is_turned(position, floats):
    """Of the products in the kernel's program: those of codes are integers."""
    case = Case("k2:int16", suite.TINY, position, lengths=(9,))
    q, cache, weights, spec = suite.made(case)

    def run(q, cache, weights):
        return pallas_tpu.decode(
            q, cache, weights, spec, cache.length - 1, tiles=Tiles(block=suite.BLOCK), interpret=True
        )

    found = list(_kernel_products(jax.make_jaxpr(run)(q, cache, weights).jaxpr))
    wide = [operands for operands in found if max(shape[0] for shape, _ in operands) == suite.BLOCK]
    integers = [operands for operands in wide if {dtype for _, dtype in operands} == {jnp.dtype("int8")}]
    # A full block and a ragged one, each with its scores and its sums, of two planes; RoPE turns rows twice.
    assert len(wide) - len(integers) == 2 * floats
    assert len(integers) == 2 * (4 if position == "none" else 2)


def _kernel_products(jaxpr, inside=False):
    for equation in jaxpr.eqns:
        here = inside or equation.primitive.name == "pallas_call"
        if here and equation.primitive.name == "dot_general":
            yield [(each.aval.shape, each.aval.dtype) for each in equation.invars]
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _kernel_products(inner, here)
