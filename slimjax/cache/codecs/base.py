"""What every codec offers. A codec is frozen, hashable data: it may sit in a jit's static arguments."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int8

from slimjax.pytree import pytree, static

# What a stream's rows are: keys (and whatever stands in for them) or values, which some codecs group otherwise.
Role = Literal["k", "v"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Codec(abc.ABC):
    """How rows of a cache are stored. Every array of the codes keeps the leading axes [B, S].

    A codec is *token-local* unless it is a ``TiledCodec``: the codes of a token depend on that token alone, so
    a cache appends by writing them at the token's slot, and chunks, one token at a time and all at once store
    the same codes.

    Attributes:
        extra: the codec of the extra coordinates of bases k and kr, stream "r"; None: this one.
    """

    extra: "Codec | None" = None

    def stream(self, name: str) -> "Codec":
        """The codec of one stream of a cache."""
        return self.extra if name == "r" and self.extra is not None else self

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """The name that the scheme grammar knows it by."""

    @abc.abstractmethod
    def encode(self, rows: Float[Array, "B S K H"], role: Role = "k") -> Any:
        """Rows of any float dtype to a pytree of codes."""

    @abc.abstractmethod
    def decode(self, codes: Any) -> Float[Array, "B S K H"]:
        """Codes back to rows, in float32 (float64 for a float64 codec): no further rounding."""

    @abc.abstractmethod
    def nbytes(self, shape: tuple[int, int, int, int], role: Role = "k") -> int:
        """Bytes that the codes of rows of shape [B, S, K, H] take, scales included."""

    def refusal(self, basis: str, streams: Mapping[str, tuple[int, int]], plain: int) -> str | None:
        """Why rows of a basis cannot be stored so (what to use instead included), or None.

        Args:
            basis: its name.
            streams: what it caches of a token, name -> (heads, size).
            plain: 2*E, what plain keys and values would be.
        """
        return needless_extra(self, streams)


def needless_extra(codec: Codec, streams: Mapping[str, tuple[int, int]]) -> str | None:
    """Why a codec of extra coordinates is out of place where there are none, or None."""
    if codec.extra is None or "r" in streams:
        return None
    return "the option extra is the codec of extra coordinates (k:...+R), and there are none; use it with +R"


@pytree
class Tiles:
    """Codes of n whole tiles, [B, n, ...], of which the first ``tokens`` tokens are meant."""

    codes: Any
    tokens: int = static()


@pytree
class IntegerTile:
    """INT8 codes and one scale per tile and head: value = codes * scale. What integer attention multiplies."""

    codes: Int8[Array, "*tiles G K H"]
    scale: Float[Array, "*tiles K"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TiledCodec(Codec):
    """A codec whose codes depend on ``tile`` consecutive tokens together: scales shared along tokens.

    A cache keeps the newest tokens in a buffer and encodes whole tiles of them at once.

    Attributes:
        tile: G, tokens encoded together.
        window: W, tokens of a cache's buffer, encoded at once when it is full; 0: one tile.
    """

    tile: int = 64
    window: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.tile, int) or self.tile < 1:
            raise ValueError(f"{self.tile=}: a tile has at least one token")
        if not isinstance(self.window, int) or self.window < 0 or self.window % self.tile:
            raise ValueError(f"{self.window=}: a buffer holds whole tiles of {self.tile} tokens")

    @property
    def span(self) -> int:
        """W, tokens of the buffer."""
        return self.window or self.tile

    @property
    def prefills(self) -> bool:
        """Whether windows that lie within one call of a prompt are encoded from its rows, not from the buffer's."""
        return False

    @property
    def lazy(self) -> bool:
        """Whether a full buffer is encoded when the next token comes, rather than at once."""
        return False

    @property
    def integral(self) -> bool:
        """Whether tiles and buffer are INT8 codes to integer attention: ``integers``, and codes of ``hold``."""
        return False

    def integers(self, codes: Any) -> IntegerTile:
        """Codes of tiles expanded by integer arithmetic alone, where the codec is ``integral``."""
        raise NotImplementedError(f"codec {self.name} has no integers to expand to")

    def tiles_nbytes(self, shape: tuple[int, int, int, int], role: Role = "k") -> int:
        """Bytes of the tiles that a cache makes of rows of shape [B, S, K, H]; ``nbytes`` is of ``encode``."""
        return self.nbytes(shape, role)

    def buffer_scale(
        self, rows: Float[Array, "B T K H"], given: Bool[Array, "B T"]
    ) -> Float[Array, "B 1 K 1"] | None:
        """What these rows ask for as the scale of the buffer's codes, 0 where none is given; None: no scale."""
        return None

    def tail_scale(
        self, rows: Float[Array, "B T K H"], given: Bool[Array, "B T"]
    ) -> Float[Array, "B 1 K 1"] | None:
        """A scale for the part of a prompt that stays in the buffer; None: the universal one."""
        return None

    def hold(self, rows: Float[Array, "B T K H"], scale: Float[Array, "B #T K 1"] | None) -> Array:
        """New rows as the buffer stores them: here in bfloat16."""
        return rows.astype(jnp.bfloat16)

    def held(self, codes: Array, scale: Float[Array, "B #T K 1"] | None) -> Float[Array, "B T K H"]:
        """The buffer's codes back to rows, float32."""
        return codes.astype(jnp.float32)

    def flush(self, codes: Array, scale: Float[Array, "B 1 K 1"] | None, role: Role = "k") -> Any:
        """Whole tiles of the buffer's codes, [B, n, G, K, H], all under the universal scale, to codes of tiles."""
        return self.encode_tiles(codes.astype(jnp.float32), role)

    @abc.abstractmethod
    def encode_tiles(self, rows: Float[Array, "B n G K H"], role: Role = "k") -> Any:
        """Whole tiles to codes; every array of the codes keeps the leading axes [B, n]."""

    @abc.abstractmethod
    def decode_tiles(self, codes: Any) -> Float[Array, "B n G K H"]:
        """Codes of whole tiles back to rows, float32."""

    def encode(self, rows: Float[Array, "B S K H"], role: Role = "k") -> Tiles:
        """Any number of tokens; the last tile is filled up with copies of the last token."""
        batch, tokens, *row = rows.shape
        count = -(-tokens // self.tile)
        filled = jnp.pad(rows, ((0, 0), (0, count * self.tile - tokens), (0, 0), (0, 0)), mode="edge")
        codes = self.encode_tiles(filled.reshape(batch, count, self.tile, *row), role)
        return Tiles(codes=codes, tokens=tokens)

    def decode(self, codes: Tiles) -> Float[Array, "B S K H"]:
        rows = self.decode_tiles(codes.codes)
        batch, count, tile, *row = rows.shape
        return rows.reshape(batch, count * tile, *row)[:, : codes.tokens]


def measured_bytes(codes: Any) -> int:
    """Bytes of the arrays (or shapes) of codes."""
    return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(codes))
