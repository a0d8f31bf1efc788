"""Caches of tiles: what is in tiles, what in the buffer, and that chunks of any size store the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle_turbo
import pytest

from slimjax.cache import append, codec, empty, read
from slimjax.cache.tiled import TiledRows

STREAMS = {"k": (2, 8), "v": (2, 8)}


def rows(tokens, seed=0, batch=3):
    draw = np.random.default_rng(seed)
    return {
        name: draw.standard_normal((batch, tokens, *row)).astype(np.float32) for name, row in STREAMS.items()
    }


def filled(made, given, chunks, counts=None):
    """A cache of 192 slots appended to in chunks; ``counts`` [chunks][batch] of each chunk's rows."""
    cache = empty(STREAMS, made, batch=3, capacity=190)
    at = 0
    grow = jax.jit(append, static_argnums=2)
    for index, chunk in enumerate(chunks):
        part = {name: jnp.asarray(values[:, at : at + chunk]) for name, values in given.items()}
        count = None if counts is None else jnp.asarray(counts[index], jnp.int32)
        cache = grow(cache, part, made, count)
        at += chunk
    return cache


def in_tiles(made, values, role, length):
    """What a cache should give back of one sequence [S, K, H]: whole windows encoded, the rest in bfloat16."""
    kept = np.asarray(jnp.asarray(values[:length]).astype(jnp.bfloat16).astype(jnp.float32))
    whole = length // made.span * made.span
    if whole == 0:
        return kept
    tiles = jnp.asarray(kept[:whole]).reshape(1, whole // made.tile, made.tile, *kept.shape[1:])
    decoded = np.asarray(made.decode_tiles(made.encode_tiles(tiles, role))).reshape(whole, *kept.shape[1:])
    return np.concatenate([decoded, kept[whole:]])


@pytest.mark.parametrize(
    ("name", "options"), [("kivi", {}), ("kivi", {"window": 64}), ("gear_l", {"bits": 2})]
)
@pytest.mark.parametrize("chunks", [(150,), (1,) * 70, (40, 1, 60, 31, 1)])
def test_windows_are_tiles_and_the_rest_a_buffer(name, options, chunks):
    made, given = codec(name, group=32, **options), rows(sum(chunks))
    cache = filled(made, given, chunks)
    found = read(cache, made, jnp.float32)
    for stream, values in given.items():
        for sequence in range(3):
            expected = in_tiles(made, values[sequence], stream, sum(chunks))
            np.testing.assert_allclose(found[stream][sequence, : sum(chunks)], expected, atol=2e-6)
    assert not np.any(np.asarray(found["k"])[:, sum(chunks) :])  # zero past the length


def test_ragged_chunks():
    made, given = codec("kivi", group=32), rows(96)
    counts = np.array([[40, 0, 33], [24, 32, 31], [31, 5, 32]])
    cache = empty(STREAMS, made, batch=3, capacity=128)
    for index, chunk in enumerate((40, 32, 32)):
        at = counts[:index].sum(axis=0)
        part = {
            name: jnp.asarray(np.stack([np.resize(v[s, at[s] :], (chunk, *v.shape[2:])) for s in range(3)]))
            for name, v in given.items()
        }
        cache = append(cache, part, made, jnp.asarray(counts[index], jnp.int32))
    found = read(cache, made, jnp.float32)
    for sequence, length in enumerate(counts.sum(axis=0)):
        assert int(cache.length[sequence]) == length
        expected = in_tiles(made, given["v"][sequence], "v", length)
        np.testing.assert_allclose(found["v"][sequence, :length], expected, atol=1e-6)


def flashq_codes(values, chunks, *, bits, tile, window, margin=1.0):
    """The INT8 codes (and scales) of one head's rows [S, H] as FlashQ's cache should hold them."""
    first = values[: chunks[0]]
    whole = len(first) // window * window
    done = [oracle_turbo.quantise(first[at : at + tile]) for at in range(0, whole, tile)]
    universal = float(np.float32(np.abs(first).max()) * np.float32(margin / 119))
    line = [oracle_turbo.clamp(row[None], universal)[0] for row in values[whole:]]
    while len(line) >= window:
        done += [(np.array(line[at : at + tile]), universal) for at in range(0, window, tile)]
        line = line[window:]
    tiles = [(oracle_turbo.squeeze(codes, bits), scale) for codes, scale in done]
    return [*tiles, (np.array(line), universal)] if line else tiles


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize(("chunks", "window"), [((100, 1, 1, 40), 0), ((20, 30, 20), 0), ((70, 1, 90), 64)])
def test_flashq_holds_what_the_paper_says(bits, chunks, window):
    made, given = codec("flashq", bits=bits, group=32, window=window), rows(sum(chunks))
    given = {
        name: values * np.linspace(1, 2, sum(chunks))[None, :, None, None] for name, values in given.items()
    }
    given = {name: values.astype(np.float32) for name, values in given.items()}
    found = read(filled(made, given, chunks), made, jnp.float32)
    for sequence, head in ((0, 0), (2, 1)):
        values = given["v"][sequence, :, head]
        parts = flashq_codes(values, chunks, bits=bits, tile=32, window=window or 32)
        expected = np.concatenate([codes * scale for codes, scale in parts])
        got = np.asarray(found["v"])[sequence, : len(values), head]
        # A division that lands on the other side of a tie moves a code by a step.
        assert np.mean(np.abs(got - expected) > 1e-5) < 0.01


def test_a_margin_keeps_later_rows_from_clamping():
    given = rows(96)
    given["k"][:, 40:] *= 3
    errors = []
    for margin in (1.0, 3.0):
        made = codec("flashq", bits=8, group=32, margin=margin)
        found = read(filled(made, given, (40, 56)), made, jnp.float32)
        errors.append(float(np.abs(np.asarray(found["k"])[:, 40:96] - given["k"][:, 40:]).mean()))
    assert errors[1] < errors[0] / 4


@pytest.mark.parametrize("name", ["kivi", "flashq", "gear_l"])
def test_nothing_past_a_length_is_read(name):
    made, given = codec(name, group=32), rows(70)
    cache = filled(made, given, (70,))

    def poison(stored):
        tiles = jax.tree.map(lambda leaf: leaf.at[:, 2:].set(_worst(leaf)), stored.tiles)
        return TiledRows(
            tiles=tiles, buffer=stored.buffer.at[:, 6:].set(_worst(stored.buffer)), scale=stored.scale
        )

    streams = {stream: poison(stored) for stream, stored in cache.streams.items()}
    clean = read(cache, made, jnp.float32)
    dirty = read(dataclasses.replace(cache, streams=streams), made, jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)


def _worst(leaf):
    return jnp.nan if jnp.issubdtype(leaf.dtype, jnp.floating) else jnp.iinfo(leaf.dtype).max


@pytest.mark.parametrize(("name", "bits"), [("kivi", 2), ("flashq", "2-4"), ("gear_l", 4), ("flashq", 3)])
def test_bytes_are_counted_from_tiles_and_buffer(name, bits):
    made = codec(name, bits=bits, group=32)
    cache = empty(STREAMS, made, batch=3, capacity=190)
    assert cache.capacity == 192
    per_tile = sum(made.tiles_nbytes((1, 32, *row), stream) for stream, row in STREAMS.items())
    buffer = 2 * 32 * 2 * 8 * (1 if name == "flashq" else 2) + (2 * 2 * 4 if name == "flashq" else 0)
    assert cache.nbytes == 3 * (6 * per_tile + buffer)


def test_mistakes():
    with pytest.raises(ValueError, match="whole tiles of 64"):
        codec("flashq", window=100)
    with pytest.raises(ValueError, match="positive"):
        codec("flashq", margin=0)
    with pytest.raises(ValueError, match=r"lies in \[0, 1\]"):
        codec("flashq", bits="2-4", share=1.5)
    with pytest.raises(ValueError, match="fewer, then more"):
        codec("flashq", bits="4-2")
