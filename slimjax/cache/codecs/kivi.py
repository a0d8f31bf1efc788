"""KIVI (Liu et al., arXiv 2402.02750): keys in groups along tokens, values in groups along channels."""

import dataclasses
import math
from typing import Any

from jaxtyping import Array, Float

from slimjax.cache.codecs.base import Role, TiledCodec
from slimjax.cache.codecs.groups import Groups, checked, decode_groups, encode_groups, groups_nbytes

WINDOW = 128  # tokens of the buffer where nothing else is said
# Of [B, n, G, K, H]: a key's channel is quantised over the tile's tokens, a value's token over its channels.
_AXIS = {"k": -3, "v": -1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kivi(TiledCodec):
    """KIVI's asymmetric quantisation: scale = (max - min) / (2^bits - 1), value = min + code * scale.

    Keys: every channel of every head over groups of ``group`` tokens, packed along the tokens. Values: every token
    of every head over groups of ``group`` channels, packed along the channels. The released packer holds 2, 4 and 8
    bits; 3 is packed here.

    A cache keeps the newest tokens, up to ``window`` of them, in bfloat16, and encodes them when the next token
    comes to a full buffer; a prompt's whole windows are encoded from its rows as they come. So do the released
    code's keys. Its values leave the buffer one by one, so that always the newest ``window`` are in full
    precision; here they leave it along with the keys, 1 to ``window`` of them being in it. The release holds the
    buffer in the model's own dtype.

    Codes are those of the released code on float32 rows. It keeps scales and minima in the model's dtype, in
    practice float16, as is the default here; with ``scale_dtype="float32"`` they are as computed, at twice the
    bytes, and float16 adds about 0.03 % to the squared error of 4-bit codes of normal values.

    Bytes for n = ceil(S/tile) tiles of T tokens, scales of w bytes: keys B*n*K*H*(T*bits/8 + 2*w*T/group); values
    B*n*T*K*(H*bits/8 + 2*w*ceil(H/group)); codes along the packed axis fill whole bytes. At group 32 and float16,
    2 bits are 3 bits a value.

    Attributes:
        bits: 2, 3, 4 or 8.
        group: tokens of a key's group and channels of a value's (the last shorter where it does not divide H).
        tile: tokens encoded together: a multiple of ``group``.
        scale_dtype: float16, bfloat16 or float32.

    Raises:
        ValueError: a field that is none of these.
    """

    bits: int = 4
    group: int = 64
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        super().__post_init__()
        checked(self.bits, self.group, self.scale_dtype)
        if self.tile % self.group:
            raise ValueError(
                f"{self.tile=} is not a multiple of {self.group=}: a tile is whole groups of tokens"
            )

    @property
    def name(self) -> str:
        return "kivi"

    @property
    def prefills(self) -> bool:
        return True

    @property
    def lazy(self) -> bool:
        return True

    def encode_tiles(self, rows: Float[Array, "B n G K H"], role: Role = "k") -> Groups:
        return encode_groups(
            rows, bits=self.bits, group=self.group, axis=_AXIS[role], scale_dtype=self.scale_dtype
        )

    def decode_tiles(self, codes: Groups) -> Float[Array, "B n G K H"]:
        return decode_groups(codes)

    def nbytes(self, shape: tuple[int, int, int, int], role: Role = "k") -> int:
        batch, tokens, *row = shape
        tiles = (batch, math.ceil(tokens / self.tile), self.tile, *row)
        return groups_nbytes(
            tiles, bits=self.bits, group=self.group, axis=_AXIS[role], scale_dtype=self.scale_dtype
        )


def kivi(*, group: int = 64, tile: int | None = None, window: int | None = None, **options: Any) -> Kivi:
    """``Kivi`` with the buffer that the release uses: 128 tokens, or the next multiple of ``tile``.

    Args:
        group: as in ``Kivi``.
        tile: None: one group.
        window: None: as said; 0: one tile.
        options: the other fields.
    """
    tile = group if tile is None else tile
    window = math.ceil(WINDOW / tile) * tile if window is None and tile > 0 else window or 0
    return Kivi(group=group, tile=tile, window=window, **options)
