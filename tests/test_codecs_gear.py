"""GEAR-L: its low-rank part against loops, what it adds to KIVI, its bytes, and the published errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codec_checks import check_bytes, check_nan_shows, external_input, relative_mse, rows, through

from slimjax.cache import append, codec as codec_named, empty, read
from slimjax.cache.codecs.base import measured_bytes
from slimjax.cache.codecs.corrected import low_rank, orthonormal
from slimjax.cache.codecs.gear import gear_l
from slimjax.cache.codecs.kivi import Kivi

BITS = (2, 3, 4, 8)
jitted = jax.jit(low_rank, static_argnums=(1, 2))
ROLES = ("k", "v")


def gram_schmidt(columns: np.ndarray) -> np.ndarray:
    done = np.zeros((len(columns), 0))
    for column in columns.T:
        rest = column - sum(((other @ column) * other for other in done.T), np.zeros(len(column)))
        done = np.column_stack([done, rest / np.linalg.norm(rest)])
    return done


def power_iteration(error: np.ndarray, rank: int, loops: int) -> np.ndarray:
    """The approximation of one head's error [S, H]: a subspace, so any orthonormal basis of it will do."""
    right = np.random.default_rng(0).standard_normal((error.shape[1], rank))
    for _ in range(loops - 1):
        right = error.T @ (error @ right)
    left = gram_schmidt(error @ gram_schmidt(right))
    return left @ (left.T @ error)


@pytest.mark.parametrize(("bits", "role"), [(2, "k"), (3, "v"), (4, "k"), (8, "v")])
def test_low_rank_is_the_power_iteration_of_every_tile_s_error(bits, role):
    """37 tokens are two tiles and a part, whose missing tokens are copies of the last one."""
    x = rows((2, 37, 2, 12))
    codec = gear_l(bits=bits, group=8, tile=16, rank=3, decode_rank=2, scale_dtype="float32")
    plain = Kivi(bits=bits, group=8, tile=16, scale_dtype="float32")
    filled = np.concatenate([x, np.repeat(x[:, -1:], 11, axis=1)], axis=1)
    grouped = through(plain, filled, role).astype(np.float64)
    decoded = through(codec, x, role)
    size = np.abs(filled - grouped).max()
    for b, n, k in np.ndindex(2, 3, 2):
        part = slice(16 * n, 16 * n + 16)
        error = filled[b, part, k] - grouped[b, part, k]
        expected = grouped[b, part, k] + power_iteration(error, 3, 3)
        found = decoded[b, part, k]
        np.testing.assert_allclose(found, expected[: len(found)], atol=1e-3 * size)


@pytest.mark.parametrize("name", ["gear_l", "flashq"])
def test_a_cache_corrects_a_prompt_at_one_rank_and_what_follows_at_the_other(name):
    """Rank 5 in the two tiles of the prompt, rank 1 in the tile that the buffer fills: told from the rows read."""
    made = codec_named(name, bits=2, group=32, rank=5, decode_rank=1, loops=4)
    x = jnp.asarray(rows((1, 96, 2, 16)))
    cache = empty({"v": (2, 16)}, made, batch=1, capacity=96)
    grow = jax.jit(append, static_argnums=2)
    for part in (x[:, :70], x[:, 70:]):
        cache = grow(cache, {"v": part}, made)
    tiles = cache.streams["v"].tiles.tiles()
    columns = np.linalg.norm(np.asarray(tiles.left, np.float64), axis=2)[0]  # [n, K, R]
    assert np.all(columns[:2] > 0.9)
    assert np.all(columns[2, :, 0] > 0.9)
    assert not np.any(columns[2, :, 1:])
    # The prompt's tiles are those of encode.
    found = jax.jit(read, static_argnums=(1, 2))(cache, made, "float32")["v"]
    np.testing.assert_array_equal(found[:, :64], through(made, np.asarray(x[:, :64]), "v"))
    error = np.linalg.norm(np.asarray(found - x), axis=(2, 3))[0]
    assert error[:64].mean() < error[64:].mean()


@pytest.mark.parametrize("bits", [2, 4])
def test_flashq_with_a_correction_loses_less_and_stays_integral(bits):
    x = np.random.default_rng(0).standard_normal((1, 128, 2, 32)).astype(np.float32)
    plain, made = (
        codec_named("flashq", bits=bits, group=64),
        codec_named("flashq", bits=bits, group=64, rank=4),
    )
    errors = [relative_mse(through(codec, x, "v"), x) for codec in (plain, made)]
    assert errors[1] < 0.75 * errors[0]
    tiles = jax.jit(made.encode_tiles)(jnp.asarray(x).reshape(1, 2, 64, 2, 32))
    whole = jax.jit(made.integers)(tiles)
    assert whole.codes.dtype == jnp.int8
    np.testing.assert_array_equal(
        jax.jit(made.decode_tiles)(tiles), whole.codes.astype(jnp.float32) * whole.scale[..., None, :, None]
    )
    # The best of rank 4 that there is, but for the rounding of factors and codes.
    base = np.asarray(jax.jit(made.base.decode_tiles)(tiles.base), np.float64)
    error = (x.reshape(1, 2, 64, 2, 32) - base).swapaxes(2, 3)
    values = np.linalg.svd(error, compute_uv=False)
    least = (values[..., 4:] ** 2).sum() / (x**2).sum()
    assert least < errors[1] < 1.12 * least


def test_a_correction_goes_with_two_widths():
    made = codec_named("flashq", bits="2-4", group=32, rank=2)
    x = rows((1, 64, 2, 16))
    found = through(made, x)
    for head, bits in ((0, 2), (1, 4)):
        alone = codec_named("flashq", bits=bits, group=32, rank=2)
        np.testing.assert_array_equal(found[:, :, head : head + 1], through(alone, x[:, :, head : head + 1]))
    with pytest.raises(ValueError, match="use rank=2"):
        codec_named("flashq", loops=2)


PUBLISHED = {2: (1.94e-1, 1.92e-1), 3: (3.53e-2, 3.52e-2), 4: (7.64e-3, 7.60e-3)}


@pytest.mark.parametrize("bits", PUBLISHED)
def test_published_errors_within_a_hundredth(bits):
    x = external_input()
    for role, published in zip(ROLES, PUBLISHED[bits], strict=True):
        codec = gear_l(bits=bits, group=64, tile=256, rank=2)  # all tokens are one matrix, as published
        decoded = through(codec, x.astype(np.float32), role)
        assert abs(relative_mse(decoded, x) / published - 1) < 0.01


def test_low_rank_never_adds_to_the_error_and_finds_what_is_of_low_rank():
    random = np.random.default_rng(1)
    of_rank_two = random.standard_normal((3, 20, 2)) @ random.standard_normal((3, 2, 7))
    for size in (1e-12, 1e12):  # powers of these leave float32
        error = jnp.asarray(size * of_rank_two, jnp.float32)
        left, right = jitted(error, 2, 3)
        np.testing.assert_allclose(left @ right.swapaxes(1, 2), error, atol=1e-4 * size)
    noise = jnp.asarray(random.standard_normal((3, 20, 7)), jnp.float32)
    left, right = jitted(noise, 1, 1)
    assert np.all(
        np.linalg.norm(noise - left @ right.swapaxes(1, 2), axis=(1, 2)) < np.linalg.norm(noise, axis=(1, 2))
    )


@pytest.mark.parametrize(("shape", "role"), [((1, 1, 1, 3), "k"), ((1, 5, 2, 96), "v"), ((2, 3, 1, 2), "k")])
def test_small_and_exact_arrays(shape, role):
    """Fewer tokens or channels than the rank, and rows without any error."""
    codec = gear_l(bits=4, group=8, tile=8)
    assert np.all(np.isfinite(through(codec, rows(shape), role)))
    constant = np.full(shape, 0.5, np.float32)
    np.testing.assert_array_equal(through(codec, constant, role), constant)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("bits", BITS)
def test_bytes(bits, role):
    cases = [
        gear_l(bits=bits, rank=5, decode_rank=3),
        gear_l(bits=bits, group=8, tile=16, scale_dtype="float32", rank=3, decode_rank=5),
        codec_named("flashq", bits=bits, group=32, rank=3),
    ]
    for codec in cases:
        for shape in ((2, 130, 3, 96), (1, 1, 1, 2)):
            check_bytes(codec, shape, role)
            count = -(-shape[1] // codec.tile)
            tiles = jax.ShapeDtypeStruct((shape[0], count, codec.tile, *shape[2:]), jnp.float32)
            codes = jax.eval_shape(lambda x, codec=codec: codec.encode_tiles(x, role), tiles)
            assert codec.tiles_nbytes(shape, role) == measured_bytes(codes)
            assert all(leaf.shape[:2] == (shape[0], count) for leaf in jax.tree.leaves(codes))


def test_bits_of_a_value():
    """Of tiles of 64 x 64 with a scale and a minimum for 64 values: 4.5 bits, and 2 of rank 4 in halves."""
    assert gear_l(bits=4).nbytes((1, 1024, 1, 64)) * 8 == (4.5 + 4 * 16 * (64 + 64) / 64**2) * 1024 * 64
    assert gear_l(bits=4, rank=2).nbytes((1, 64, 1, 64)) * 8 == (4.5 + 1) * 64**2


@pytest.mark.parametrize("role", ROLES)
def test_nan_shows(role):
    check_nan_shows(gear_l(bits=4, group=8, tile=8), role)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [({"bits": 5}, "bits=5"), ({"rank": 0}, "rank=0"), ({"decode_rank": 0}, "decode_rank=0"), ({"loops": 0}, "loops=0"),
     ({"group": 48, "tile": 64}, "group=48"), ({"scale_dtype": "int8"}, "scale_dtype='int8'")],
)  # fmt: skip
def test_refused(wrong, named):
    with pytest.raises(ValueError, match=named):
        gear_l(**wrong)


def test_the_basis_is_orthonormal_and_spans_the_columns():
    columns = np.random.default_rng(3).standard_normal((5, 2, 33, 4)).astype(np.float32)
    columns[0, 0, :, 2] = 3 * columns[0, 0, :, 0] - columns[0, 0, :, 1]  # depends on those before it
    columns[1, 1] *= 1e-12
    columns[2, 0] = 0
    found = np.asarray(orthonormal(jnp.asarray(columns)), np.float64)
    gram = np.einsum("...sr,...st->...rt", found, found)
    rank = np.full((5, 2, 4), 1.0)
    rank[0, 0, 2] = rank[2, 0] = 0
    np.testing.assert_allclose(gram, rank[..., None] * np.eye(4), atol=1e-6)
    back = np.einsum("...sr,...tr,...tq->...sq", found, found, columns.astype(np.float64))
    assert np.all(np.abs(back - columns) <= 1e-5 * np.abs(columns).max(axis=(-2, -1), keepdims=True))


def test_no_program_of_it_calls_lapack():
    codec = gear_l(bits=2, window=64)
    rows = jax.ShapeDtypeStruct((1, 128, 2, 32), jnp.float32)
    compiled = jax.jit(codec.encode).lower(rows).compile().as_text()
    assert "custom_call_target" not in compiled
