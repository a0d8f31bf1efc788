"""GEAR-L: its low-rank part against loops, what it adds to KIVI, its bytes, and the published errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codec_checks import check_bytes, check_nan_shows, external_input, relative_mse, rows, through

from slimjax.cache.codecs.base import measured_bytes
from slimjax.cache.codecs.gear import GearL, low_rank
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
def test_low_rank_is_the_power_iteration_of_the_error(bits, role):
    """Prefill: one approximation over 37 tokens, two tiles and a part. Decode: one for every tile."""
    x = rows((2, 37, 2, 12))
    codec = GearL(bits=bits, group=8, tile=16, rank=3, tile_rank=2, scale_dtype="float32")
    plain = Kivi(bits=bits, group=8, tile=16, scale_dtype="float32")
    grouped = through(plain, x, role).astype(np.float64)
    decoded = np.asarray(
        codec.decode(jax.jit(codec.encode, static_argnames="role")(jnp.asarray(x), role=role))
    )
    tiles = x[:, :32].reshape(2, 2, 16, 2, 12)
    by_tile = jax.jit(lambda given: codec.decode_tiles(codec.encode_tiles(given, role)))(jnp.asarray(tiles))
    size = np.abs(x - grouped).max()
    for b, k in np.ndindex(2, 2):
        error = x[b, :, k] - grouped[b, :, k]
        expected = grouped[b, :, k] + power_iteration(error, 3, 3)
        np.testing.assert_allclose(decoded[b, :, k], expected, atol=1e-3 * size)
        for n in range(2):
            part = slice(16 * n, 16 * n + 16)
            expected = grouped[b, part, k] + power_iteration(error[part], 2, 3)
            np.testing.assert_allclose(by_tile[b, n, :, k], expected, atol=1e-3 * size)


PUBLISHED = {2: (1.94e-1, 1.92e-1), 3: (3.53e-2, 3.52e-2), 4: (7.64e-3, 7.60e-3)}


@pytest.mark.parametrize("bits", PUBLISHED)
def test_published_errors_within_a_hundredth(bits):
    x = external_input()
    for role, published in zip(ROLES, PUBLISHED[bits], strict=True):
        codec = GearL(bits=bits, group=64, rank=2)
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
    codec = GearL(bits=4, group=8, tile=8)
    assert np.all(np.isfinite(through(codec, rows(shape), role)))
    constant = np.full(shape, 0.5, np.float32)
    np.testing.assert_array_equal(through(codec, constant, role), constant)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("bits", BITS)
def test_bytes(bits, role):
    for group, tile, dtype in ((64, 64, "float16"), (8, 16, "float32")):
        codec = GearL(bits=bits, group=group, tile=tile, scale_dtype=dtype, rank=5, tile_rank=3)
        for shape in ((2, 130, 3, 96), (1, 1, 1, 2)):
            check_bytes(codec, shape, role)
            count = -(-shape[1] // tile)
            tiles = jax.ShapeDtypeStruct((shape[0], count, tile, *shape[2:]), jnp.float32)
            codes = jax.eval_shape(lambda x, codec=codec: codec.encode_tiles(x, role), tiles)
            assert codec.tiles_nbytes(shape, role) == measured_bytes(codes)
            assert all(leaf.shape[:2] == (shape[0], count) for leaf in jax.tree.leaves(codes))


def test_bits_of_a_value():
    """Rank 4 over 1024 tokens of 64 channels: 4 factors of (1024 + 64) halves beside 4.5 bits a value."""
    assert GearL(bits=4).nbytes((1, 1024, 1, 64)) * 8 == 4.5 * 1024 * 64 + 16 * 4 * (1024 + 64)


@pytest.mark.parametrize("role", ROLES)
def test_nan_shows(role):
    check_nan_shows(GearL(bits=4, group=8, tile=8), role)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [({"bits": 5}, "bits=5"), ({"rank": 0}, "rank=0"), ({"tile_rank": 0}, "tile_rank=0"), ({"loops": 0}, "loops=0"),
     ({"group": 48}, "group=48"), ({"scale_dtype": "int8"}, "scale_dtype='int8'")],
)  # fmt: skip
def test_refused(wrong, named):
    with pytest.raises(ValueError, match=named):
        GearL(**wrong)
