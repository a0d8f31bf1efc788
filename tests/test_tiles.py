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


grow = jax.jit(append, static_argnums=2, static_argnames=("prompt",))


def filled(made, given, chunks, prompts=0):
    """A cache of 192 slots appended to in chunks, the first ``prompts`` of which are a prompt."""
    cache = empty(STREAMS, made, batch=3, capacity=190)
    at = 0
    for index, chunk in enumerate(chunks):
        part = {name: jnp.asarray(values[:, at : at + chunk]) for name, values in given.items()}
        cache = grow(cache, part, made, None, prompt=index < prompts)
        at += chunk
    return cache


def encoded(made, values, role):
    """Whole tiles of rows [S, K, H], there and back."""
    tiles = jnp.asarray(values).reshape(1, len(values) // made.tile, made.tile, *values.shape[1:])
    return np.asarray(made.decode_tiles(made.encode_tiles(tiles, role))).reshape(values.shape)


def in_tiles(made, values, role, length):
    """What a cache should give back of one sequence [S, K, H]: whole windows encoded, the rest in bfloat16."""
    kept = np.asarray(jnp.asarray(values[:length]).astype(jnp.bfloat16).astype(jnp.float32))
    last = length - 1 if made.lazy else length  # a full buffer waits for the next token
    whole = last // made.span * made.span
    return np.concatenate([encoded(made, kept[:whole], role), kept[whole:]]) if whole else kept


@pytest.mark.parametrize(
    ("name", "options"), [("kivi", {"window": 32}), ("kivi", {"window": 64}), ("gear_l", {"bits": 2})]
)
@pytest.mark.parametrize("chunks", [(150,), (1,) * 70, (40, 1, 60, 27), (129,)])
def test_windows_are_tiles_and_the_rest_a_buffer(name, options, chunks):
    if name == "gear_l":
        # Rank as the buffer's tiles are corrected. float16 factors would turn a last bit of float32 into 1 in 2,000.
        options = options | {"rank": 2, "scale_dtype": "float32"}
    made, given = codec(name, group=32, **options), rows(sum(chunks))
    cache = filled(made, given, chunks)
    found = read(cache, made, jnp.float32)
    for stream, values in given.items():
        for sequence in range(3):
            expected = in_tiles(made, values[sequence], stream, sum(chunks))
            np.testing.assert_allclose(found[stream][sequence, : sum(chunks)], expected, atol=2e-6)
    assert not np.any(np.asarray(found["k"])[:, sum(chunks) :])  # zero past the length


@pytest.mark.parametrize("window", [32, 64])
def test_a_prompts_windows_are_encoded_from_its_rows(window):
    """Of a later chunk too, but only those that lie within one; the others come out of the buffer."""
    made, given = codec("kivi", group=32, window=window), rows(150)
    found = read(filled(made, given, (40, 109, 1), prompts=2), made, jnp.float32)["k"][1]
    values = given["k"][1]
    whole = 149 // window * window
    expected = in_tiles(made, values, "k", 150)
    for at in range(0, whole, window):
        if at + window <= 40 or at >= 40:
            expected[at : at + window] = encoded(made, values[at : at + window], "k")
    np.testing.assert_allclose(found[:150], expected, atol=2e-6)
    assert np.abs(expected - in_tiles(made, values, "k", 150)).max() > 1e-4


def test_the_window_that_kivi_has_in_use():
    assert [codec("kivi", group=group).span for group in (32, 64, 48)] == [128, 128, 144]
    assert codec("kivi", group=32, window=0).span == 32
    assert codec("kivi", bits="2-4").span == 128


def test_ragged_chunks():
    made, given = codec("kivi", group=32, window=32), rows(96)
    counts = np.array([[40, 0, 33], [24, 32, 31], [31, 5, 32]])
    cache = empty(STREAMS, made, batch=3, capacity=128)
    for index, chunk in enumerate((40, 32, 32)):
        at = counts[:index].sum(axis=0)
        part = {
            name: jnp.asarray(np.stack([np.resize(v[s, at[s] :], (chunk, *v.shape[2:])) for s in range(3)]))
            for name, v in given.items()
        }
        cache = append(cache, part, made, jnp.asarray(counts[index], jnp.int32), prompt=False)
    found = read(cache, made, jnp.float32)
    for sequence, length in enumerate(counts.sum(axis=0)):
        assert int(cache.length[sequence]) == length
        expected = in_tiles(made, given["v"][sequence], "v", length)
        np.testing.assert_allclose(found["v"][sequence, :length], expected, atol=1e-6)


def flashq_codes(values, chunks, *, bits, tile, window, margin=1.0):
    """The INT8 codes (and scales) of one head's rows [S, H] as FlashQ's cache should hold them.

    A prompt of chunks[0] tokens, then tokens one by one.
    """
    first = values[: chunks[0]]
    whole = len(first) // window * window
    done = [oracle_turbo.quantise(first[at : at + tile]) for at in range(0, whole, tile)]

    def scale_of(rows):
        return np.float32(np.abs(rows).max()) * np.float32(margin / 119)

    universal = scale_of(first)
    line = []
    for at in range(whole, len(values)):
        if len(first) <= at < window:  # nothing has been encoded yet
            universal = max(universal, scale_of(values[at]))
        line.append((oracle_turbo.clamp(values[at][None], universal or 1.0)[0], universal))
    while len(line) >= window:
        codes = np.array([np.rint(row * np.float32(mine / universal)) for row, mine in line[:window]]).astype(
            int
        )
        done += [(codes[at : at + tile], universal) for at in range(0, window, tile)]
        line = line[window:]
    tiles = [(oracle_turbo.squeeze(codes, bits), scale) for codes, scale in done]
    return tiles + [(row[None], scale) for row, scale in line]


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize(("chunks", "window"), [((100, 1, 1, 40), 0), ((20, 30, 20), 0), ((70, 1, 90), 64)])
def test_flashq_holds_what_the_paper_says(bits, chunks, window):
    made, given = codec("flashq", bits=bits, group=32, window=window), rows(sum(chunks))
    given = {
        name: values * np.linspace(1, 2, sum(chunks))[None, :, None, None] for name, values in given.items()
    }
    given = {name: values.astype(np.float32) for name, values in given.items()}
    found = read(filled(made, given, chunks, prompts=1), made, jnp.float32)
    for sequence, head in ((0, 0), (2, 1)):
        values = given["v"][sequence, :, head]
        parts = flashq_codes(values, chunks, bits=bits, tile=32, window=window or 32)
        expected = np.concatenate([codes * scale for codes, scale in parts])
        got = np.asarray(found["v"])[sequence, : len(values), head]
        # A division that lands on the other side of a tie moves a code by a step.
        assert np.mean(np.abs(got - expected) > 1e-5) < 0.01


@pytest.mark.parametrize("tokens", [20, 70])
def test_the_universal_scale_grows_until_a_window_is_encoded(tokens):
    """From the first token on, the largest so far; a code stays as it came until it is encoded; then no growth."""
    made, given = codec("flashq", bits=8, group=32), rows(tokens)
    given["k"] *= np.linspace(0.1, 3, tokens, dtype=np.float32)[None, :, None, None]
    given["k"][:, 0] = 0
    cache = filled(made, given, (1,) * tokens)
    values = given["k"][1, :, 0]
    parts = flashq_codes(values, (1,), bits=8, tile=32, window=32)
    found = np.asarray(read(cache, made, jnp.float32)["k"])[1, :tokens, 0]
    np.testing.assert_allclose(found, np.concatenate([c * s for c, s in parts]), atol=2e-6)
    error = np.abs(found - values)
    assert error[:20].max() < 3 / 119 * 3  # nothing is clamped while it grows
    if tokens == 70:
        assert error[40:].max() > 1  # and all is, afterwards


def test_where_the_universal_scale_comes_from():
    """All of a prompt, or its last window; and a part window's own scale, until it is encoded."""
    given = rows(80)
    given["k"][:, :40] *= 4
    scales = {}
    for options in ({}, {"universal": "last"}, {"partial": "own"}):
        made = codec("flashq", bits=8, group=32, **options)
        stored = filled(made, given, (80,), prompts=1).streams["k"]
        scales[str(options)] = np.asarray(stored.scale)[:, 0, :, 0], np.asarray(stored.scales)[:, 0, :, 0]
    whole, part, tail = (np.abs(given["k"][:, at:]).max(axis=(1, 3)) / 119 for at in (0, 48, 64))
    for text, universal, buffer in (("{}", whole, whole), ("{'universal': 'last'}", part, part),
                                    ("{'partial': 'own'}", whole, tail)):  # fmt: skip
        np.testing.assert_allclose(scales[text][0], universal, rtol=1e-6)
        np.testing.assert_allclose(scales[text][1], buffer, rtol=1e-6)


def test_a_margin_keeps_later_rows_from_clamping():
    given = rows(96)
    given["k"][:, 40:] *= 3
    errors = []
    for margin in (1.0, 3.0):
        made = codec("flashq", bits=8, group=32, margin=margin)
        found = read(filled(made, given, (40, 56), prompts=1), made, jnp.float32)
        errors.append(float(np.abs(np.asarray(found["k"])[:, 40:96] - given["k"][:, 40:]).mean()))
    assert errors[1] < errors[0] / 4


@pytest.mark.parametrize("name", ["kivi", "flashq", "gear_l"])
def test_nothing_past_a_length_is_read(name):
    made, given = codec(name, group=32, window=32), rows(70)
    cache = filled(made, given, (70,))

    def poison(stored):
        spoilt = jax.tree.map(lambda leaf: leaf.at[:, 2:].set(_worst(leaf)), stored.tiles.tiles())
        count = stored.tiles.count
        tiles = stored.tiles.written(spoilt, jnp.broadcast_to(jnp.arange(count), (cache.batch, count)))
        buffer = stored.buffer.at[:, 6:].set(_worst(stored.buffer))
        scales = None if stored.scales is None else stored.scales.at[:, 6:].set(jnp.nan)
        return TiledRows(tiles=tiles, buffer=buffer, scale=stored.scale, scales=scales)

    streams = {stream: poison(stored) for stream, stored in cache.streams.items()}
    clean = read(cache, made, jnp.float32)
    dirty = read(dataclasses.replace(cache, streams=streams), made, jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)


def _worst(leaf):
    return jnp.nan if jnp.issubdtype(leaf.dtype, jnp.floating) else jnp.iinfo(leaf.dtype).max


@pytest.mark.parametrize(("name", "bits"), [("kivi", 2), ("flashq", "2-4"), ("gear_l", 4), ("flashq", 3)])
def test_bytes_are_counted_from_tiles_and_buffer(name, bits):
    made = codec(name, bits=bits, group=32, window=32)
    cache = empty(STREAMS, made, batch=3, capacity=190)
    assert cache.capacity == 192
    per_tile = sum(made.tiles_nbytes((1, 32, *row), stream) for stream, row in STREAMS.items())
    buffer = 2 * 32 * 2 * 8 * (1 if name == "flashq" else 2)
    buffer += 2 * (32 + 1) * 2 * 4 if name == "flashq" else 0  # scales: each slot's and the universal one
    assert cache.nbytes == 3 * (6 * per_tile + buffer)


def test_mistakes():
    with pytest.raises(ValueError, match="whole tiles of 64"):
        codec("flashq", window=100)
    with pytest.raises(ValueError, match="positive"):
        codec("flashq", margin=0)
    with pytest.raises(ValueError, match="expected prefill or last"):
        codec("flashq", universal="first")
    with pytest.raises(ValueError, match="expected buffer or own"):
        codec("flashq", partial="tile")
    with pytest.raises(ValueError, match="is not encoded when flashq's is"):
        codec("flashq", extra="kivi4")
    with pytest.raises(ValueError, match=r"lies in \[0, 1\]"):
        codec("flashq", bits="2-4", share=1.5)
    with pytest.raises(ValueError, match="fewer, then more"):
        codec("flashq", bits="4-2")
