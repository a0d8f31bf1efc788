"""FlashQ (TurboAttention, Kang et al., arXiv 2412.08585, section 3): tiles of INT8, compressed again to 4, 3 or 2 bits.

Everything that attention does with the codes is integer arithmetic: ``expand`` turns packed codes into INT8 codes
without a float, and the INT8 codes of a tile and head share one float scale, which multiplies a dot product, not
its operands. ``FlashQ`` is the codec; the functions beside it are its two stages, which integer attention uses
one at a time.
"""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int8, Int32

from slimjax.cache.codecs.base import IntegerTile, Role, TiledCodec
from slimjax.cache.codecs.extremes import largest
from slimjax.cache.pack import pack, packed_size, unpack
from slimjax.numerics import accumulation_dtype
from slimjax.pytree import pytree, static

# The largest INT8 code of stage 1. Stage 2's rounding may move a code up by as much as 8 (half of the largest
# step, 16, at 4 bits): codes up to 119 come back within int8, codes up to 127 would come back as high as 135.
LIMIT = 119


@pytree
class FlashQTiles:
    """Codes of tiles: INT8 code = low + code * step, value = INT8 code * scale.

    Attributes:
        packed: uint8, the codes of ``slimjax.cache.pack`` along the tile's tokens; at 8 bits the INT8 codes.
        step: integer scale of every channel over its tile, at least 1; None at 8 bits.
        low: the channel's least INT8 code in the tile, exactly; None at 8 bits.
        scale: float32, one for each head of a tile.
        bits: 2, 3, 4 or 8.
    """

    packed: Array  # [B, n, G*bits/8, K, H]
    step: Int8[Array, "*tiles K H"] | None
    low: Int8[Array, "*tiles K H"] | None
    scale: Float[Array, "*tiles K"]
    bits: int = static()


def quantise(
    rows: Float[Array, "*tiles G K H"], scale: Float[Array, "*tiles K"] | None = None
) -> tuple[Int8[Array, "*tiles G K H"], Float[Array, "*tiles K"]]:
    """Stage 1: INT8 codes within +-119 and the float32 scale of each head of a tile, symmetric.

    Args:
        rows: any float dtype; G tokens are one tile.
        scale: a scale chosen beforehand (the decode buffer's universal one): values beyond 119 times it are
            clamped. None: the tile's own, max|rows| / 119 (1 for a tile of zeros).

    A NaN in the rows makes the tile's own scale NaN, so that it shows; under a given scale it cannot show.
    """
    rows = rows.astype(accumulation_dtype(rows.dtype))
    if scale is None:
        own = (largest(jnp.abs(rows), axis=(-3, -1)) / LIMIT).astype(jnp.float32)
        scale = jnp.where(own == 0, jnp.ones_like(own), own)
    codes = jnp.round(rows / scale.astype(rows.dtype)[..., None, :, None])
    return jnp.clip(codes, -LIMIT, LIMIT).astype(jnp.int8), scale


def _divide(value: Int32[Array, "..."], by: Int32[Array, "..."]) -> Int32[Array, "..."]:
    """value / by for value >= 0, rounded half to even. Ties are common here, because both are small integers, and
    rounding them all one way would shift V's tiles: a shift does not average out over the tokens as noise does,
    and at 4 bits it makes the error of attention's output half as large again.
    """
    quotient, rest = value // by, value % by
    up = (2 * rest > by) | ((2 * rest == by) & (quotient % 2 == 1))
    return quotient + up.astype(quotient.dtype)


def compress(codes: Int8[Array, "*tiles G K H"], scale: Float[Array, "*tiles K"], bits: int) -> FlashQTiles:
    """Stage 2: the INT8 codes of a tile, channel by channel along its tokens, at ``bits`` bits, asymmetric.

    step = ceil((max - min) / (2^bits - 1)), 1 where all codes of a channel are equal; the minimum is kept exactly,
    as a rounded zero point would overshoot int8 (to 158 at 2 bits). The codes come back within step/2.

    Args:
        codes: within +-119 (``quantise``), or the codes that come back may wrap around.
        scale: stage 1's, stored beside the codes.
        bits: 2, 3 or 4; 8 keeps the codes as they are.
    """
    if bits == 8:
        return FlashQTiles(packed=codes, step=None, low=None, scale=scale, bits=bits)
    wide = codes.astype(jnp.int32)
    low = jnp.min(wide, axis=-3, keepdims=True)
    spread = jnp.max(wide, axis=-3, keepdims=True) - low
    levels = 2**bits - 1
    step = jnp.maximum((spread + (levels - 1)) // levels, 1)
    packed = pack(_divide(wide - low, step).astype(jnp.uint8), bits, axis=-3)
    step, low = (jnp.squeeze(array, -3).astype(jnp.int8) for array in (step, low))
    return FlashQTiles(packed=packed, step=step, low=low, scale=scale, bits=bits)


def expand(tiles: FlashQTiles) -> Int8[Array, "*tiles G K H"]:
    """Stage 2 undone, by integer arithmetic alone: the INT8 codes, low + code * step.

    A product may pass int8's end and wrap, but the sum lies within int8, and int8 arithmetic is exact modulo 256;
    so nothing wider than a byte is ever made.
    """
    if tiles.step is None or tiles.low is None:
        return tiles.packed
    codes = unpack(tiles.packed, tiles.bits, axis=-3).astype(jnp.int8)
    return codes * tiles.step[..., None, :, :] + tiles.low[..., None, :, :]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlashQ(TiledCodec):
    """FlashQ's progressive quantisation of tiles, the same for keys and values.

    Bytes, for n = ceil(S/G) tiles: B*n*K*(G*H*bits/8 + 2*H + 4), without 2*H at 8 bits. At 4 bits, G = 64 and
    H = 64 that is 4.26 bits a value, 3.76 times less than bfloat16.

    Attributes:
        bits: 2, 3, 4 or 8 (8: stage 1 alone).
        tile: G, tokens encoded together: a multiple of 8 from 32 to 128.
        window: tokens of a cache's buffer; they are INT8 codes under one *universal* scale per sequence and
            head, clamped, and stage 2 compresses them as they are. 0: one tile.
        margin: the universal scale is max|rows| / 119, times this.
        universal: of which rows: a prompt's "prefill", all of them, or its "last" window's worth of tokens, the
            likest to those to come. Tokens that come while nothing has been encoded yet make it grow: each is
            rounded under the largest so far and keeps that scale; when the first window is encoded, codes under
            a smaller scale than the last are rounded once more, half to even. From then on it is fixed.
        partial: what does not fill a window at the end of a prompt starts the "buffer", under the universal
            scale, or is a tile of its "own" until it is encoded: max|rows| / 119 of these tokens, where less.

    Raises:
        ValueError: other bits, another tile, a window that is not whole tiles, a margin that is not positive, or
            another word.
    """

    bits: int = 4
    margin: float = 1.0
    universal: str = "prefill"
    partial: str = "buffer"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.margin < math.inf:
            raise ValueError(f"{self.margin=}: the universal scale is multiplied by a positive number")
        for name, known in (("universal", ("prefill", "last")), ("partial", ("buffer", "own"))):
            if getattr(self, name) not in known:
                raise ValueError(f"flashq({name}={getattr(self, name)}): expected {' or '.join(known)}")
        if self.bits not in (2, 3, 4, 8):
            raise ValueError(f"{self.bits=}: FlashQ stores 2, 3, 4 or 8 bits")
        if not 32 <= self.tile <= 128 or self.tile % 8:
            raise ValueError(f"{self.tile=}: FlashQ's tiles are a multiple of 8 tokens from 32 to 128")

    @property
    def name(self) -> str:
        return "flashq"

    def encode_tiles(self, rows: Float[Array, "B n G K H"], role: Role = "k") -> FlashQTiles:
        return compress(*quantise(rows), bits=self.bits)

    def decode_tiles(self, codes: FlashQTiles) -> Float[Array, "B n G K H"]:
        return expand(codes).astype(jnp.float32) * codes.scale[..., None, :, None]

    @property
    def prefills(self) -> bool:
        return True

    @property
    def integral(self) -> bool:
        return True

    def integers(self, codes: FlashQTiles) -> IntegerTile:
        return IntegerTile(codes=expand(codes), scale=codes.scale)

    def buffer_scale(
        self, rows: Float[Array, "B T K H"], given: Bool[Array, "B T"]
    ) -> Float[Array, "B 1 K 1"]:
        if self.universal == "last":
            counted = jnp.cumsum(given[:, ::-1].astype(jnp.int32), axis=1)[:, ::-1]
            given = given & (counted <= self.span)
        return _peak(rows, given) * (self.margin / LIMIT)

    def tail_scale(
        self, rows: Float[Array, "B T K H"], given: Bool[Array, "B T"]
    ) -> Float[Array, "B 1 K 1"] | None:
        return _peak(rows, given) / LIMIT if self.partial == "own" else None

    def hold(
        self, rows: Float[Array, "B T K H"], scale: Float[Array, "B #T K 1"] | None
    ) -> Int8[Array, "B T K H"]:
        assert scale is not None  # ``buffer_scale`` gives one
        each = jnp.broadcast_to(scale[..., 0], rows.shape[:3])
        return quantise(rows[:, :, None], each)[0][:, :, 0]

    def held(
        self, codes: Int8[Array, "B T K H"], scale: Float[Array, "B #T K 1"] | None
    ) -> Float[Array, "B T K H"]:
        assert scale is not None
        return codes.astype(jnp.float32) * scale

    def flush(
        self, codes: Int8[Array, "B n G K H"], scale: Float[Array, "B 1 K 1"] | None, role: Role = "k"
    ) -> FlashQTiles:
        assert scale is not None
        tiles = jnp.broadcast_to(scale[:, :, :, 0], (*codes.shape[:2], codes.shape[3]))
        return compress(codes, tiles, bits=self.bits)

    def nbytes(self, shape: tuple[int, int, int, int], role: Role = "k") -> int:
        batch, tokens, heads, size = shape
        tiles = batch * math.ceil(tokens / self.tile) * heads
        return tiles * (packed_size(self.tile, self.bits) * size + (2 * size if self.bits < 8 else 0) + 4)


def _peak(rows: Float[Array, "B T K H"], given: Bool[Array, "B T"]) -> Float[Array, "B 1 K 1"]:
    """The largest magnitude of each head among the given rows, 0 where there are none."""
    size = jnp.abs(rows.astype(jnp.float32))
    return largest(jnp.where(given[:, :, None, None], size, jnp.zeros_like(size)), axis=(1, 3))[
        :, None, :, None
    ]
