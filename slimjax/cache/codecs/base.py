"""What every codec offers. A codec is frozen, hashable data: it may sit in a jit's static arguments."""

import abc
import dataclasses
from typing import Any

from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Codec(abc.ABC):
    """How rows of a cache are stored. Every array of the codes keeps the leading axes [B, S].

    A codec is *token-local*: the codes of a token depend on that token alone, so a cache appends by
    writing them at the token's slot, and chunks, one token at a time and all at once store the same codes.
    """

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """The name that the scheme grammar knows it by."""

    @abc.abstractmethod
    def encode(self, rows: Float[Array, "B S K H"]) -> Any:
        """Rows of any float dtype to a pytree of codes."""

    @abc.abstractmethod
    def decode(self, codes: Any) -> Float[Array, "B S K H"]:
        """Codes back to rows, in float32 (float64 for a float64 codec): no further rounding."""

    @abc.abstractmethod
    def nbytes(self, shape: tuple[int, int, int, int]) -> int:
        """Bytes that the codes of rows of shape [B, S, K, H] take, scales included."""
