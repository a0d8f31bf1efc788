"""XQuant against loops over a token's groups of channels, its bytes, and that a token's codes are its own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codec_checks import check_bytes, check_nan_shows, coded_line, rows, through

from slimjax import DecodeSpec, parse_scheme
from slimjax.attention.bases import basis
from slimjax.cache.codecs.xquant import XQuant

BITS = (2, 3, 4, 8)


@pytest.mark.parametrize(
    ("shape", "group", "dtype"), [((1, 2, 1, 201), 128, "float16"), ((1, 3, 2, 24), 16, "float32")]
)
@pytest.mark.parametrize("bits", BITS)
def test_values_are_the_formula(bits, shape, group, dtype):
    x = rows(shape)
    x[0, 0] = 0.75  # a group of equal values: its scale is zero
    decoded = through(XQuant(bits=bits, group=group, scale_dtype=dtype), x)
    expected = [coded_line(line, bits, group, np.dtype(dtype).type) for line in x.reshape(-1, shape[-1])]
    np.testing.assert_allclose(decoded.reshape(-1, shape[-1]), expected, atol=2e-6 * np.abs(x).max())


@pytest.mark.parametrize("bits", BITS)
def test_a_tokens_codes_are_its_own(bits):
    x = jnp.asarray(rows((2, 5, 1, 24)))
    codec = XQuant(bits=bits, group=16)
    encode = jax.jit(codec.encode)
    whole = jax.tree.leaves(encode(x))
    for token in range(5):
        for leaf, one in zip(whole, jax.tree.leaves(encode(x[:, token : token + 1])), strict=True):
            np.testing.assert_array_equal(leaf[:, token : token + 1], one)


@pytest.mark.parametrize("bits", BITS)
def test_bytes(bits):
    for group, dtype in ((128, "float16"), (7, "float32")):
        for shape in ((2, 5, 1, 576), (1, 1, 1, 7), (3, 4, 2, 96)):
            check_bytes(XQuant(bits=bits, group=group, scale_dtype=dtype), shape, "k")


@pytest.mark.parametrize(("bits", "each"), [(2, 2.25), (3, 3.25), (4, 4.25), (8, 8.25)])
def test_bits_of_a_value(bits, each):
    """At 4 bits 0.13 of bfloat16 keys and values of the same width, as published."""
    assert XQuant(bits=bits).nbytes((1, 1, 1, 4096)) * 8 == each * 4096
    assert round(4.25 / 32, 2) == 0.13


def test_nan_shows():
    check_nan_shows(XQuant(bits=2, group=8), "k")


@pytest.mark.parametrize("wrong", [{"bits": 16}, {"group": 0}, {"scale_dtype": "float64"}])
def test_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        XQuant(**wrong)


def test_inputs_wider_than_keys_and_values_are_refused():
    """SmolLM2-135M's layer: D 576, E 192. The codec is to save bytes, and X would cost more than keys and values."""
    layer = {"heads": 9, "head_dim": 64, "width": 576}
    narrow = DecodeSpec(scheme=parse_scheme("x1:xquant4"), kv_heads=3, **layer)
    with pytest.raises(NotImplementedError, match=r"D = 576 .* 2\*E = 384 .* use kv"):
        basis(narrow)
    basis(dataclasses.replace(narrow, scheme=parse_scheme("x1:bf16")))  # other codecs do as they are told
    basis(dataclasses.replace(narrow, scheme=parse_scheme("kv:xquant4")))
    basis(DecodeSpec(scheme=parse_scheme("x1:xquant4"), kv_heads=9, **layer))
