"""What all token-local codecs of few bits owe: exact bytes, any shape, tokens by themselves, nothing swallowed."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slimjax.cache.codecs.absmax import AbsmaxCodec
from slimjax.cache.codecs.base import measured_bytes
from slimjax.cache.codecs.fp8 import Fp8Codec
from slimjax.cache.codecs.hadamard import HadamardCodec
from slimjax.cache.codecs.narrow import pack_rows, row_bytes, unpack_rows
from slimjax.cache.codecs.nvfp4 import Nvfp4Codec
from slimjax.cache.codecs.turboquant import TurboQuantCodec

# A codec, and its bytes of a token's row of K heads of H channels, written down from the layout.
CASES = [
    *((AbsmaxCodec(bits=b), lambda k, h, b=b: k * (packed(h, b) + 4)) for b in (2, 3, 4)),
    (AbsmaxCodec(group=4, scale_dtype="bfloat16"), lambda k, h: k * (packed(h, 4) + 2 * math.ceil(h / 4))),
    *((HadamardCodec(bits=b), lambda k, h, b=b: k * (packed(h, b) + 8)) for b in (2, 3, 4, 8)),
    (
        HadamardCodec(group=4, scale_dtype="float16", seed=3),
        lambda k, h: k * (packed(h, 4) + 4 * math.ceil(h / 4)),
    ),
    *((TurboQuantCodec(bits=b), lambda k, h, b=b: k * (packed(h, b) + 4)) for b in (1, 2, 3, 4)),
    (TurboQuantCodec(scale_dtype="float16"), lambda k, h: k * (packed(h, 4) + 2)),
    (Fp8Codec(), lambda k, h: k * (h + 4)),
    (Fp8Codec(scale="token"), lambda k, h: k * h + 4),
    (Fp8Codec(scale="none"), lambda k, h: k * h),
    (Fp8Codec(scale=0.02), lambda k, h: k * h),
    (Nvfp4Codec(), lambda k, h: k * (packed(h, 4) + math.ceil(h / 16)) + 4),
    (Nvfp4Codec(scale=0.02), lambda k, h: k * (packed(h, 4) + math.ceil(h / 16))),
    (Nvfp4Codec(group=4), lambda k, h: k * (packed(h, 4) + math.ceil(h / 4)) + 4),
]
CODECS = [pytest.param(codec, id=str(codec)) for codec, _ in CASES]


def packed(size, bits):
    """Whole bytes; the two planes of 3 bits fill up together."""
    return 3 * math.ceil(size / 8) if bits == 3 else math.ceil(size * bits / 8)


def rows(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@functools.cache
def jitted(codec):
    return jax.jit(codec.encode), jax.jit(codec.decode)


def through(codec, x):
    encode, decode = jitted(codec)
    return decode(encode(x))


@pytest.mark.parametrize("shape", [(1, 1, 1, 64), (3, 2, 1, 7), (2, 5, 3, 20), (2, 1, 4, 1)])
@pytest.mark.parametrize(("codec", "row"), CASES)
def test_bytes_are_those_of_the_leaves(codec, row, shape):
    codes = jax.eval_shape(codec.encode, jax.ShapeDtypeStruct(shape, jnp.float32))
    assert all(leaf.shape[:2] == shape[:2] for leaf in jax.tree.leaves(codes))
    assert codec.nbytes(shape) == measured_bytes(codes) == shape[0] * shape[1] * row(*shape[2:])
    decoded = jax.eval_shape(codec.decode, codes)
    assert (decoded.shape, decoded.dtype) == (shape, jnp.float32)


@pytest.mark.parametrize("codec", CODECS)
def test_tokens_are_coded_by_themselves(codec):
    """Codes of a token are the same alone and among others, and under jit; keys and values alike."""
    x = rows((1, 5, 2, 12)) * jnp.asarray([1.0, 50.0, 0.01, 3.0, 0.2], jnp.float32)[None, :, None, None]
    whole = jitted(codec)[0](x)
    again = jitted(codec)[0](x[:, ::-1])
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b)[:, ::-1])
    assert hash(codec) == hash(type(codec)(**vars(codec)))
    values = jax.eval_shape(lambda rows: codec.encode(rows, "v"), x)
    assert jax.tree.structure(values) == jax.tree.structure(whole)


@pytest.mark.parametrize(
    "codec", [AbsmaxCodec(scale_dtype="bfloat16"), HadamardCodec(scale_dtype="float16"), Nvfp4Codec()]
)
def test_codes_are_those_of_the_scale_as_stored_under_jit_too(codec):
    """A compiler that left out the scale's rounding would code rows with another scale than is read."""
    x = rows((1, 60, 2, 16))
    for a, b in zip(jax.tree.leaves(codec.encode(x)), jax.tree.leaves(jax.jit(codec.encode)(x)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert "optimization_barrier" in str(jax.make_jaxpr(codec.encode)(x))


@pytest.mark.parametrize("codec", CODECS)
def test_zero_rows_stay_zero_and_what_is_not_finite_is_seen(codec):
    x = rows((1, 5, 2, 12)).at[0, 0].set(0.0)
    for place, value in ((1, math.nan), (2, math.inf), (3, -math.inf)):
        x = x.at[0, place, 1, 5].set(value)
    found = np.asarray(through(codec, x))
    np.testing.assert_array_equal(found[0, 0], 0)
    for place in (1, 2, 3):
        assert not np.isfinite(found[0, place, 1, 5])
    assert np.all(np.isfinite(found[0, 4]))


@pytest.mark.parametrize(
    "codec", [AbsmaxCodec(), HadamardCodec(), TurboQuantCodec(bits=1), Fp8Codec(), Nvfp4Codec()], ids=str
)
def test_zero_rows_are_divided_by_no_zero(codec):
    """What a platform makes of NaN as an integer is its own affair."""
    with jax.debug_nans(True):
        codec.encode(jnp.zeros((1, 1, 1, 4), jnp.float32))


@pytest.mark.parametrize("codec", CODECS)
def test_bfloat16_rows_are_coded_at_full_precision(codec):
    x = rows((1, 5, 2, 12)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(through(codec, x), through(codec, x.astype(jnp.float32)))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("size", [1, 6, 8, 9, 64])
def test_packing_of_any_number_of_channels(bits, size):
    codes = np.random.default_rng(0).integers(0, 2**bits, (1, 2, 3, size)).astype(np.uint8)
    stored = pack_rows(jnp.asarray(codes), bits)
    assert stored.shape == (1, 2, 3, row_bytes(size, bits))
    np.testing.assert_array_equal(unpack_rows(stored, bits, size), codes)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: AbsmaxCodec(bits=8), "absmax: bits=8 is none of 2, 3, 4"),
        (lambda: AbsmaxCodec(scale_dtype="int8"), "absmax: scale_dtype='int8' is none of float32"),
        (lambda: AbsmaxCodec(group=0), "absmax: group=0"),
        (lambda: HadamardCodec(bits=1), "hadamard_int4: bits=1 is none of 2, 3, 4, 8"),
        (lambda: TurboQuantCodec(bits=8), "turboquant: bits=8 is none of 1, 2, 3, 4"),
        (lambda: TurboQuantCodec(scale_dtype="x"), "turboquant: scale_dtype='x'"),
        (lambda: Fp8Codec(scale="tensor"), "fp8: scale='tensor'.*changes with every token"),
        (lambda: Fp8Codec(scale=0.0), "fp8: scale=0.0 is none of"),
        (lambda: Fp8Codec(scale=math.inf), "fp8: scale=inf"),
        (lambda: Nvfp4Codec(scale="tensor"), "nvfp4: scale='tensor'.*changes with every token"),
        (lambda: Nvfp4Codec(scale="head"), "nvfp4: scale='head'"),
        (lambda: Nvfp4Codec(group=0), "nvfp4: self.group=0"),
    ],
)
def test_refusals_name_the_field(make, match):
    with pytest.raises(ValueError, match=match):
        make()
