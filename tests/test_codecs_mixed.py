"""Two widths of one codec, a codec of their own for extra coordinates, and what both refuse."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codec_checks import check_bytes, rows, through

from slimjax import DecodeSpec, codec, parse_scheme
from slimjax.attention.bases import basis
from slimjax.attention.layer import init_cache
from slimjax.cache import append, codec_of, empty, read, row_bytes
from slimjax.cache.codecs.mixed import actual_share

SPEC = DecodeSpec(scheme=parse_scheme("kv:bf16"), heads=4, kv_heads=4, head_dim=8, width=32)


def under(text, **fields):
    return dataclasses.replace(SPEC, scheme=parse_scheme(text), **fields)


@pytest.mark.parametrize(
    ("heads", "share", "few"), [(4, 0.5, 2), (3, 0.5, 1), (3, 0.34, 1), (4, 0.25, 1), (2, 1, 2), (3, 0, 0)]
)
@pytest.mark.parametrize("name", ["flashq", "hadamard"])
def test_the_first_heads_get_fewer_bits(name, heads, share, few):
    made, x = codec(name, bits="2-4", share=share), rows((1, 64, heads, 8))
    assert actual_share(heads, share) == few / heads
    found = through(made, x)
    for head in range(heads):
        alone = codec(name, bits=2 if head < few else 4)
        expected = through(alone, x[:, :, head : head + 1])
        np.testing.assert_allclose(found[:, :, head : head + 1], expected, atol=1e-5 * np.abs(x).max())
    check_bytes(made, (2, 64, heads, 8), "k")
    two, four = (codec(name, bits=bits).nbytes((1, 64, 1, 8)) for bits in (2, 4))
    assert made.nbytes((1, 64, heads, 8)) == few * two + (heads - few) * four


@pytest.mark.parametrize("name", ["flashq", "hadamard", "kivi"])
@pytest.mark.parametrize(("heads", "share"), [(1, 0.5), (3, 0.3)])
def test_a_share_that_is_no_head_is_refused(name, heads, share):
    made = codec(name, bits="2-4", share=share)
    for act in (lambda: made.encode(jnp.zeros((1, 64, heads, 8))), lambda: made.nbytes((1, 64, heads, 8))):
        with pytest.raises(ValueError, match=r"no whole head .* use one width"):
            act()


def test_where_two_widths_are_refused():
    with pytest.raises(NotImplementedError, match=r"of 1 head is no whole head .* use one width"):
        basis(under("kv:flashq2-4", kv_heads=1))
    with pytest.raises(NotImplementedError, match="of 1 head is no whole head"):
        basis(under("x:kivi2-4"))
    with pytest.raises(NotImplementedError, match=r"or a share of 0\.25 or more"):
        basis(under("k:flashq2-4(share=0.2)"))
    basis(under("kv:flashq2-4(share=0)", kv_heads=1))  # said so
    basis(under("k:flashq2-4+4"))  # the extra coordinates are one row, of the wider width


# A codec of their own for extra coordinates ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "keys", "extra"),
    [
        (
            "k:flashq4(extra=flashq8)/32+4",
            codec("flashq", bits=4, group=32),
            codec("flashq", bits=8, group=32),
        ),
        ("k:flashq2-4(extra=int8)/32+4", codec("flashq", bits="2-4", group=32), codec("int8")),
        ("k:flashq2-4/32+4", codec("flashq", bits="2-4", group=32), codec("flashq", bits=4, group=32)),
        (
            "k:kivi2(extra=kivi8,tile=64,window=64)/32+4",
            codec("kivi", bits=2, group=32, tile=64, window=64),
            codec("kivi", bits=8, window=64),
        ),
        ("k:int4(extra=int16)+4", codec("int4"), codec("int16")),
        (
            "kr:flashq3(extra=gear_l4)/32+4",
            codec("flashq", bits=3, group=32),
            codec("gear_l", bits=4, group=32),
        ),
    ],
)
def test_each_stream_is_stored_by_its_codec(text, keys, extra):
    """In chunks and read in parts, each stream is what a cache of that stream alone would hold, byte for byte."""
    made = codec_of(parse_scheme(text))
    given = {"k": rows((2, 100, 4, 8)), "r": rows((2, 100, 1, 4), seed=1)}
    streams = {"k": (4, 8), "r": (1, 4)}
    together = empty(streams, made, batch=2, capacity=128)
    alone = {
        name: empty({name: streams[name]}, each, batch=2, capacity=128)
        for name, each in (("k", keys), ("r", extra))
    }
    grow = jax.jit(append, static_argnums=2)
    look = jax.jit(read, static_argnums=(1, 2), static_argnames=("start", "size"))
    for chunk in (slice(0, 70), slice(70, 100)):
        part = {name: jnp.asarray(each[:, chunk]) for name, each in given.items()}
        together = grow(together, part, made)
        for name, each in (("k", keys), ("r", extra)):
            alone[name] = grow(alone[name], {name: part[name]}, each)
    for start, size in ((0, None), (64, 64)):
        found = look(together, made, "float32", start=start, size=size)
        for name, each in (("k", keys), ("r", extra)):
            expected = look(alone[name], each, "float32", start=start, size=size)[name]
            # To the last bits: a product and a sum may be one step in one program and two in another.
            np.testing.assert_allclose(found[name], expected, atol=1e-5 * np.abs(given[name]).max())
    assert together.nbytes == alone["k"].nbytes + alone["r"].nbytes
    assert row_bytes(streams, made) == row_bytes({"k": (4, 8)}, keys) + row_bytes({"r": (1, 4)}, extra)


def test_bytes_of_low_bits_beside_wider_coordinates():
    """A tile of 64 tokens: 4 heads of 8 channels in 4 bits and 2 extra bytes a channel; 4 coordinates in 8 bits."""
    spec = under("k:flashq4(extra=flashq8)+4")
    tile = 4 * (64 * 8 // 2 + 2 * 8 + 4) + (64 * 4 + 4)
    assert row_bytes(basis(spec).streams(spec), codec_of(spec.scheme)) == tile / 64
    cache = init_cache(spec, batch=1, capacity=640)
    buffers = 64 * (4 * 8 + 4) + 4 * (4 + 1) * (64 + 1)  # a scale for each slot, and the universal one
    assert cache.nbytes == 10 * tile + buffers


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("k:int4(extra=flashq8)+4", "need a codec of tiles beside them.* use int8"),
        ("k:flashq4(extra=fixed16)+4", "without static scales; use int8"),
        ("k:flashq4(extra=flashq2-4)+4", "one row for all heads.* use int8"),
        ("k:flashq4(extra=nothing)+4", "unknown codec 'nothing'"),
        ("kv:int8/64", "no groups .* use absmax"),
        ("kv:fp8/64", "no groups"),
        ("kv:turboquant4/64", "no groups"),
    ],
)
def test_mistakes(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_scheme(text)


@pytest.mark.parametrize(
    "text", ["kv:flashq4(extra=int8)", "k:fixed16(extra=int8)", "k:flashq2-4(extra=int8)"]
)
def test_a_codec_for_coordinates_that_are_not_there(text):
    with pytest.raises(NotImplementedError, match=r"there are none; use it with \+R"):
        basis(under(text))


@pytest.mark.parametrize("name", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_scales_of_a_narrower_dtype(name, dtype):
    """Two bytes for every scale; the codes fit the scale as stored, so the error is the codec's own."""
    plain, made = codec(name), codec(name, scale_dtype=dtype)
    x = rows((2, 20, 2, 32))
    x[0, 0] = 0
    wide, narrow = (np.linalg.norm(through(each, x) - x) / np.linalg.norm(x) for each in (plain, made))
    assert narrow < 1.2 * wide
    check_bytes(made, x.shape, "k")
    assert plain.nbytes(x.shape) - made.nbytes(x.shape) == 2 * 2 * 20 * 2
    with pytest.raises(ValueError, match="scale_dtype='int8' is none of"):
        codec(name, scale_dtype="int8")
