"""XQuant (Tomar et al., arXiv 2508.10395): the layer's inputs X, of which K and V are rebuilt, in few bits."""

import dataclasses
from collections.abc import Mapping

from jaxtyping import Array, Float

from slimjax.cache.codecs.base import Codec, Role, needless_extra
from slimjax.cache.codecs.groups import Groups, checked, decode_groups, encode_groups, groups_nbytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class XQuant(Codec):
    """Asymmetric codes of groups of channels within a token, for rows [B, S, 1, D] of basis x. Token-local.

    scale = (max - min) / (2^bits - 1), value = min + code * scale; packed along the channels. Rows of several
    heads are taken too: groups then end with the head. Of models with grouped heads whose X is wider than keys and
    values together (D > 2*E) basis x is refused: the paper's singular-value form for those is not here.

    Bytes: B*S*K*(H*bits/8 + 2*w*ceil(H/group)) for scales of w bytes, codes filling whole bytes: at 4 bits, group
    128 and float16 4.25 bits a value, 0.13 of the bfloat16 K and V of a model without grouped heads.

    Attributes:
        bits: 2, 3, 4 or 8.
        group: channels under one scale; the last group is shorter where it does not divide the row.
        scale_dtype: float16, bfloat16 or float32.

    Raises:
        ValueError: a field that is none of these.
    """

    bits: int = 4
    group: int = 128
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        checked(self.bits, self.group, self.scale_dtype)

    @property
    def name(self) -> str:
        return "xquant"

    def refusal(self, basis: str, streams: Mapping[str, tuple[int, int]], plain: int) -> str | None:
        width = streams["x"][1] if basis == "x" else 0
        if width > plain:
            return (
                f"X of D = {width} values a token is wider than the 2*E = {plain} of keys and values, which XQuant is "
                "to save on (grouped heads): use kv with codec xquant, kivi or flashq"
            )
        return needless_extra(self, streams)

    def encode(self, rows: Float[Array, "B S K H"], role: Role = "k") -> Groups:
        return encode_groups(rows, bits=self.bits, group=self.group, axis=-1, scale_dtype=self.scale_dtype)

    def decode(self, codes: Groups) -> Float[Array, "B S K H"]:
        return decode_groups(codes)

    def nbytes(self, shape: tuple[int, int, int, int], role: Role = "k") -> int:
        return groups_nbytes(shape, bits=self.bits, group=self.group, axis=-1, scale_dtype=self.scale_dtype)
