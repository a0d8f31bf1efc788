"""How a cluster of blocks of threads shares rows of keys alone: whole heads to each, in pieces for shared memory."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from slimjax.kernels.gpu.ring import BLOCK, ROWS, SHARED_LIMIT

MIXERS = 2
SCORER, LOADER, GROUPS = MIXERS, MIXERS + 1, MIXERS + 2
SUMS = 96  # registers of a mixer's thread that may hold sums; of more some were seen to be spilled
CLUSTERS = (1, 2, 4, 8)
PIECES = {64: 64, 96: 192, 128: 128}  # columns of a piece, whole heads, by the size of a head
TURNED = {64: 32, 96: 16, 128: 32}  # columns that RoPE turns at a time, of each half of a head
OTHER = 8192  # bytes of shared memory for reductions and barriers, counted from above


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
    """How rows of keys are parted.

    Attributes:
        blocks: C, of threads, in a cluster.
        width: E/C, columns of a block.
        size: H.
        rows: query rows of a block's heads, filled up to a multiple of 8 for their product,
        held: and of 4 for TMA, which brings 16 bytes at least.
        rotary: whether keys are turned.
        slots: pieces of 64 tokens that shared memory holds, two blocks of tokens at least.
    """

    blocks: int
    width: int
    size: int
    rows: int
    held: int
    rotary: bool
    slots: int

    @property
    def queries(self) -> int:
        """M, columns of all scores."""
        return self.blocks * self.held

    @property
    def piece(self) -> int:
        """Columns that come and go together."""
        return PIECES[self.size]

    @property
    def pieces(self) -> int:
        """Pieces of a block of tokens."""
        return self.width // self.piece

    def slot(self, j: Any, index: Any) -> Any:
        """Of a piece of the j-th block of tokens."""
        return jax.lax.rem(j * self.pieces + index, jnp.int32(self.slots))

    @property
    def ahead(self) -> int:
        """Blocks of tokens whose scores may be on their way at a time."""
        return self.slots // self.pieces


def share(kv_heads: int, size: int, rows: int, *, rotary: bool) -> Share | None:
    """The smallest cluster for so many key heads of H = ``size`` and query rows of each; None if there is none."""
    if size not in PIECES:
        return None
    piece = PIECES[size]
    for blocks in CLUSTERS:
        width, own = kv_heads * size // blocks, -(-rows * kv_heads // blocks)
        filled, sent = -(-own // 8) * 8, -(-own // (4 if blocks > 1 else 8)) * (4 if blocks > 1 else 8)
        queries = sent * blocks
        taken = (6 * BLOCK + 12) * queries + filled * (2 * width + 4 * BLOCK)
        taken += 4 * BLOCK * size if rotary else 0
        slots = (SHARED_LIMIT - OTHER - taken) // (2 * BLOCK * piece)
        whole = kv_heads % blocks == 0 and width % (MIXERS * piece) == 0
        fits = queries <= ROWS and width * queries <= 128 * SUMS * MIXERS and slots * piece >= 2 * width
        if whole and fits:
            return Share(
                blocks=blocks, width=width, size=size, rows=filled, held=sent, rotary=rotary, slots=slots
            )
    return None
