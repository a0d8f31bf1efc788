"""A low-rank approximation of what a codec of tiles loses, stored beside its codes: a local error correction.

GEAR (Kang et al., arXiv 2403.05527) does so for KIVI's groups (``gear``); here any codec of tiles may be the base,
FlashQ's included (``flashq4(rank=2)``).
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from slimjax.cache.codecs.base import IntegerTile, Role, TiledCodec
from slimjax.cache.codecs.groups import SCALE_DTYPES
from slimjax.numerics import einsum
from slimjax.pytree import pytree


@pytree
class CorrectedTiles:
    """The base's codes of tiles, and left @ right^T for each tile and head, which is added to them.

    Attributes:
        base: codes of the base codec.
        left: orthonormal columns over the tile's tokens.
        right: over the channels. Columns past the rank of a tile are zero.
    """

    base: Any
    left: Float[Array, "B n G K R"]
    right: Float[Array, "B n K H R"]


def low_rank(
    error: Float[Array, "*batch S H"], rank: int, loops: int
) -> tuple[Float[Array, "*batch S R"], Float[Array, "*batch H R"]]:
    """Power iteration: left, orthonormal, and right with left @ right^T close to the best of that rank.

    ``loops`` times left = error @ right, right = error^T @ left, from a fixed random start. R is ``rank``, or less
    where S or H is less. Being a projection it never adds to the error. Both are orthonormalised in every loop: that
    leaves what they span as it is, which unlike GEAR's last loop alone does not lose the weaker directions in float32.
    """
    rank = min(rank, *error.shape[-2:])
    # Divided by its peak: squares of very small or large errors would leave float32.
    peak = jnp.max(jnp.abs(error), axis=(-2, -1), keepdims=True)
    peak = jnp.where(peak == 0, jnp.ones_like(peak), peak)
    error = error / peak
    start = np.random.default_rng(0).standard_normal((error.shape[-1], rank))
    right = jnp.broadcast_to(jnp.asarray(start, error.dtype), (*error.shape[:-2], *start.shape))
    left = jnp.zeros((*error.shape[:-1], rank), error.dtype)
    for _ in range(loops):
        left = orthonormal(einsum("...sh,...hr->...sr", error, orthonormal(right)))
        right = einsum("...sh,...sr->...hr", error, left)
    return left, right * peak


def orthonormal(columns: Float[Array, "*batch S R"]) -> Float[Array, "*batch S R"]:
    """An orthonormal basis of what the columns span, by Gram and Schmidt, every column made orthogonal twice.

    A column that depends on those before it, to 1 in 100,000 of its norm, becomes zero. Not ``jnp.linalg.qr``: LAPACK's
    calls in a CPU program wait for the threads that they run on, and a program with many of them can wait for ever.
    """
    made: list[Array] = []
    for index in range(columns.shape[-1]):
        column = columns[..., index]
        size = jnp.linalg.norm(column, axis=-1, keepdims=True)
        for _ in range(2):
            for other in made:
                column = column - jnp.sum(other * column, axis=-1, keepdims=True) * other
        left = jnp.linalg.norm(column, axis=-1, keepdims=True)
        independent = left > 1e-5 * size
        made.append(jnp.where(independent, column, 0.0) / jnp.where(independent, left, 1.0))
    return jnp.stack(made, axis=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corrected(TiledCodec):
    """The base's codes plus, for each tile and head, a rank-r approximation of their error.

    One rule, for ``encode`` and in a cache: a tile made of rows that were given at once (``encode``; a sequence's
    first chunk, its prompt) is corrected at ``rank``, one that a cache's buffer has filled (decoding) at
    ``decode_rank``. Both are stored in as many columns, the larger rank's, so that a cache's tiles have one shape.

    Where the base is integral the correction is rounded to its INT8 codes, clamped to +-127, so that integer
    attention and float attention read the same rows.

    Bytes, beyond the base's, of n tiles of G tokens and w bytes of ``factor_dtype``: B*n*K*w*(G + H)*r, where r is
    min(max(rank, decode_rank), G, H).

    Attributes:
        base: the codec that is corrected; tile and window are its own.
        rank: of tiles encoded from rows given at once, at least 1.
        decode_rank: of tiles that the buffer filled, at least 1.
        loops: power iterations, at least 1.
        factor_dtype: float16, bfloat16 or float32.

    Raises:
        ValueError: a field that is none of these.
    """

    base: TiledCodec
    rank: int = 4
    decode_rank: int = 2
    loops: int = 3
    factor_dtype: str = "float16"

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.rank, self.decode_rank, self.loops) < 1:
            raise ValueError(f"{self.rank=}, {self.decode_rank=} and {self.loops=} are at least 1")
        if self.factor_dtype not in SCALE_DTYPES:
            raise ValueError(f"{self.factor_dtype=} is none of {', '.join(SCALE_DTYPES)}")
        if (self.tile, self.span) != (self.base.tile, self.base.span):
            raise ValueError(f"{self.tile=} and {self.window=} are not those of {self.base}")

    @property
    def name(self) -> str:
        return "gear_l" if self.base.name == "kivi" else self.base.name

    @property
    def prefills(self) -> bool:
        return self.base.prefills or self.rank != self.decode_rank

    @property
    def integral(self) -> bool:
        return self.base.integral

    def encode_tiles(self, rows: Float[Array, "B n G K H"], role: Role = "k") -> CorrectedTiles:
        return self._corrected(self.base.encode_tiles(rows, role), rows.astype(jnp.float32), self.rank)

    def flush(self, codes: Array, scale: Float[Array, "B 1 K 1"] | None, role: Role = "k") -> CorrectedTiles:
        rows = self.base.held(codes, None if scale is None else scale[:, None])
        return self._corrected(self.base.flush(codes, scale, role), rows, self.decode_rank)

    def _corrected(self, base: Any, rows: Float[Array, "B n G K H"], rank: int) -> CorrectedTiles:
        error = rows - self.base.decode_tiles(base)
        left, right = low_rank(error.swapaxes(2, 3), rank, self.loops)
        more = self._columns(self.tile, rows.shape[-1]) - left.shape[-1]
        left, right = (
            jnp.pad(part, ((0, 0),) * 4 + ((0, more),)).astype(self.factor_dtype)
            for part in (left.swapaxes(2, 3), right)
        )
        return CorrectedTiles(base=base, left=left, right=right)

    def _columns(self, tokens: int, size: int) -> int:
        return min(max(self.rank, self.decode_rank), tokens, size)

    def decode_tiles(self, codes: CorrectedTiles) -> Float[Array, "B n G K H"]:
        if self.integral:
            whole = self.integers(codes)
            return whole.codes.astype(jnp.float32) * whole.scale[..., None, :, None]
        return self.base.decode_tiles(codes.base) + _product(codes)

    def integers(self, codes: CorrectedTiles) -> IntegerTile:
        plain = self.base.integers(codes.base)
        steps = jnp.round(_product(codes) / plain.scale[..., None, :, None])
        whole = jnp.clip(plain.codes.astype(jnp.float32) + steps, -127, 127)
        return IntegerTile(codes=whole.astype(jnp.int8), scale=plain.scale)

    def nbytes(self, shape: tuple[int, int, int, int], role: Role = "k") -> int:
        batch, tokens, heads, size = shape
        tiles = batch * math.ceil(tokens / self.tile) * heads
        factors = tiles * (self.tile + size) * self._columns(self.tile, size)
        return self.base.nbytes(shape, role) + factors * jnp.dtype(self.factor_dtype).itemsize

    def buffer_scale(
        self, rows: Float[Array, "B T K H"], given: Bool[Array, "B T"]
    ) -> Float[Array, "B 1 K 1"] | None:
        return self.base.buffer_scale(rows, given)

    def tail_scale(
        self, rows: Float[Array, "B T K H"], given: Bool[Array, "B T"]
    ) -> Float[Array, "B 1 K 1"] | None:
        return self.base.tail_scale(rows, given)

    def hold(self, rows: Float[Array, "B T K H"], scale: Float[Array, "B #T K 1"] | None) -> Array:
        return self.base.hold(rows, scale)

    def held(self, codes: Array, scale: Float[Array, "B #T K 1"] | None) -> Float[Array, "B T K H"]:
        return self.base.held(codes, scale)


def _product(codes: CorrectedTiles) -> jax.Array:
    """left @ right^T, float32 [B, n, G, K, H]."""
    left, right = codes.left.astype(jnp.float32), codes.right.astype(jnp.float32)
    return einsum("bngkr,bnkhr->bngkh", left, right)
