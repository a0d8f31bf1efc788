"""How a cluster of blocks of threads shares rows of keys alone: whole heads to each, in pieces for shared memory."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp

from slimjax.kernels.gpu.ring import BLOCK, ROWS, SHARED_LIMIT

MIXERS = 2
SCORER, LOADER, GROUPS = MIXERS, MIXERS + 1, MIXERS + 2
PLAIN, CODED = (
    96,
    80,
)  # registers of a mixer's thread that may hold sums; with more some were seen to be spilled
CLUSTERS = (1, 2, 4, 8)
PIECES = {64: (128, 64), 96: (192,), 128: (128,)}  # columns of a piece, whole heads, by the size of a head
TURNED = {64: 32, 96: 16, 128: 32}  # columns that RoPE turns at a time, of each half of a head
SLOTS = 2  # blocks of tokens whose scales and extra coordinates are in shared memory
OTHER = 8192  # bytes of shared memory for reductions and barriers, counted from above


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
    """How rows of keys are parted.

    Attributes:
        blocks: C, of threads, in a cluster.
        width: E/C, columns of a block.
        size: H.
        piece: columns that come and go together.
        rows: query rows of a block's heads, filled up to a multiple of 8 for their product,
        held: and of 4 for TMA, which brings 16 bytes at least.
        rotary: whether keys are turned.
        codes: whether keys, and extra coordinates, are int16 codes with a scale for each token, else bfloat16.
        extra: R, coordinates of a row besides its keys, weighed alike.
        slots: pieces of 64 tokens that shared memory holds, two blocks of tokens at least.
    """

    blocks: int
    width: int
    size: int
    piece: int
    rows: int
    held: int
    rotary: bool
    codes: bool
    extra: int
    slots: int

    @property
    def queries(self) -> int:
        """M, columns of all scores."""
        return self.blocks * self.held

    @property
    def pieces(self) -> int:
        """Pieces of a block of tokens."""
        return self.width // self.piece

    def slot(self, j: Any, index: Any) -> Any:
        """Of a piece of the j-th block of tokens."""
        return jax.lax.rem(j * self.pieces + index, jnp.int32(self.slots))

    @property
    def column(self) -> int:
        """Columns whose sums are one product."""
        return BLOCK if self.codes else self.piece

    @property
    def sums(self) -> int:
        """Products of a mixer."""
        return self.width // (MIXERS * self.column)

    @property
    def ahead(self) -> int:
        """Blocks of tokens whose scores may be on their way at a time."""
        return self.slots // self.pieces


def share(
    kv_heads: int, size: int, rows: int, *, rotary: bool = False, codes: bool = False, extra: int = 0
) -> Share | None:
    """The smallest cluster for so many key heads of H = ``size`` and query rows of each; None if there is none."""
    if size not in PIECES:
        return None
    for blocks, piece in itertools.product(CLUSTERS, PIECES[size]):
        width, own = kv_heads * size // blocks, -(-rows * kv_heads // blocks)
        filled, sent = -(-own // 8) * 8, -(-own // (4 if blocks > 1 else 8)) * (4 if blocks > 1 else 8)
        queries = sent * blocks
        taken = (6 * BLOCK + 12) * queries + filled * (2 * width + 4 * BLOCK)
        taken += 4 * BLOCK * size if rotary else 0
        taken += SLOTS * 4 * BLOCK * (2 if extra else 1) if codes else 0
        taken += 2 * BLOCK * (SLOTS * BLOCK + queries) if extra else 0
        slots = (SHARED_LIMIT - OTHER - taken) // (2 * BLOCK * piece)
        sums = width // MIXERS + (BLOCK if extra else 0)
        whole = kv_heads % blocks == 0 and width % (MIXERS * piece) == 0
        fits = (
            queries <= ROWS
            and sums * queries <= 128 * (CODED if codes else PLAIN)
            and slots * piece >= 2 * width
        )
        if whole and fits:
            return Share(
                blocks=blocks,
                width=width,
                size=size,
                piece=piece,
                rows=filled,
                held=sent,
                rotary=rotary,
                codes=codes,
                extra=extra,
                slots=slots,
            )
    return None
