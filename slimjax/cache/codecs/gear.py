"""GEAR-L (Kang et al., arXiv 2403.05527): KIVI's groups, and a low-rank approximation of what they lose."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from slimjax.cache.codecs.base import Role, TiledCodec, Tiles
from slimjax.cache.codecs.groups import Groups
from slimjax.cache.codecs.kivi import Kivi
from slimjax.numerics import einsum
from slimjax.pytree import pytree


@pytree
class GearTiles:
    """KIVI's groups of tiles and left @ right^T for each head, which is added to them.

    Attributes:
        groups: KIVI's codes of the tiles.
        left: orthonormal columns over the tokens they were found for.
        right: one for each tile, or one for all tiles (``GearL.encode``).
    """

    groups: Groups
    left: Float[Array, "B n G K R"]
    right: Float[Array, "B #n K H R"]


def low_rank(
    error: Float[Array, "*batch S H"], rank: int, loops: int
) -> tuple[Float[Array, "*batch S R"], Float[Array, "*batch H R"]]:
    """Power iteration: left, orthonormal, and right with left @ right^T close to the best of that rank.

    ``loops`` times left = error @ right, right = error^T @ left, both orthonormalised in the last loop, from a
    fixed random start. R is ``rank``, or less where S or H is less. Being a projection it never adds to the error.
    """
    rank = min(rank, *error.shape[-2:])
    # Divided by its peak: the loops raise the error to a power that would leave float32 otherwise.
    peak = jnp.max(jnp.abs(error), axis=(-2, -1), keepdims=True)
    peak = jnp.where(peak == 0, jnp.ones_like(peak), peak)
    error = error / peak
    start = np.random.default_rng(0).standard_normal((error.shape[-1], rank))
    right = jnp.broadcast_to(jnp.asarray(start, error.dtype), (*error.shape[:-2], *start.shape))
    left = jnp.zeros((*error.shape[:-1], rank), error.dtype)
    for loop in range(loops):
        last = loop == loops - 1
        left = einsum("...sh,...hr->...sr", error, jnp.linalg.qr(right)[0] if last else right)
        left = jnp.linalg.qr(left)[0] if last else left
        right = einsum("...sh,...sr->...hr", error, left)
    return left, right * peak


@dataclasses.dataclass(frozen=True, kw_only=True)
class GearL(TiledCodec):
    """KIVI's codes plus, for each head, a rank-r approximation of their error; no sparse outliers ("-L").

    ``encode`` is GEAR's prefill: one approximation of rank ``rank`` for all tokens of the array. ``encode_tiles``
    is its decode buffer: one of rank ``tile_rank`` for every tile. Factors are stored as scales are.

    Bytes of ``encode``, beyond KIVI's, for n tiles of T tokens and w bytes of ``scale_dtype``: B*K*w*(n*T + H)*r,
    r = min(rank, S, H); of n tiles from ``encode_tiles``: ``tiles_nbytes``, B*n*K*w*(T + H)*min(tile_rank, T, H).

    Attributes:
        bits, group, scale_dtype: KIVI's.
        tile: the buffer, tokens encoded together: a multiple of ``group``.
        rank: of ``encode``.
        tile_rank: of ``encode_tiles``.
        loops: power iterations, at least 1.

    Raises:
        ValueError: a field that is none of these.
    """

    bits: int = 4
    group: int = 64
    scale_dtype: str = "float16"
    rank: int = 4
    tile_rank: int = 2
    loops: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.rank, self.tile_rank, self.loops) < 1:
            raise ValueError(f"{self.rank=}, {self.tile_rank=} and {self.loops=} are at least 1")
        _ = self.groups  # KIVI checks the fields that it shares

    @property
    def name(self) -> str:
        return "gear_l"

    @property
    def groups(self) -> Kivi:
        """The codec of the groups, which the low-rank part corrects."""
        return Kivi(bits=self.bits, group=self.group, tile=self.tile, scale_dtype=self.scale_dtype)

    def encode(self, rows: Float[Array, "B S K H"], role: Role = "k") -> Tiles:
        coded = self.groups.encode(rows, role)
        error = rows.astype(jnp.float32) - self.groups.decode(coded)
        left, right = low_rank(error.swapaxes(1, 2), self.rank, self.loops)
        batch, tokens, heads, _ = rows.shape
        count = math.ceil(tokens / self.tile)
        left = jnp.pad(left.swapaxes(1, 2), ((0, 0), (0, count * self.tile - tokens), (0, 0), (0, 0)))
        left = left.reshape(batch, count, self.tile, heads, -1)
        return Tiles(codes=self._codes(coded.codes, left, right[:, None]), tokens=tokens)

    def encode_tiles(self, rows: Float[Array, "B n G K H"], role: Role = "k") -> GearTiles:
        groups = self.groups.encode_tiles(rows, role)
        error = rows.astype(jnp.float32) - self.groups.decode_tiles(groups)
        left, right = low_rank(error.swapaxes(2, 3), self.tile_rank, self.loops)
        return self._codes(groups, left.swapaxes(2, 3), right)

    def _codes(self, groups: Groups, left: Array, right: Array) -> GearTiles:
        return GearTiles(
            groups=groups, left=left.astype(self.scale_dtype), right=right.astype(self.scale_dtype)
        )

    def decode_tiles(self, codes: GearTiles) -> Float[Array, "B n G K H"]:
        left, right = codes.left.astype(jnp.float32), codes.right.astype(jnp.float32)
        right = jnp.broadcast_to(right, (*left.shape[:2], *right.shape[2:]))
        return self.groups.decode_tiles(codes.groups) + einsum("bngkr,bnkhr->bngkh", left, right)

    def nbytes(self, shape: tuple[int, int, int, int], role: Role = "k") -> int:
        batch, tokens, heads, size = shape
        stored = math.ceil(tokens / self.tile) * self.tile
        factors = batch * heads * (stored + size) * min(self.rank, tokens, size)
        return self.groups.nbytes(shape, role) + factors * jnp.dtype(self.scale_dtype).itemsize

    def tiles_nbytes(self, shape: tuple[int, int, int, int], role: Role = "k") -> int:
        """Bytes of the tiles that ``encode_tiles`` makes of rows of shape [B, S, K, H]."""
        batch, tokens, heads, size = shape
        tiles = batch * math.ceil(tokens / self.tile) * heads
        factors = tiles * (self.tile + size) * min(self.tile_rank, self.tile, size)
        return self.groups.nbytes(shape, role) + factors * jnp.dtype(self.scale_dtype).itemsize
