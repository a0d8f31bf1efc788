"""How a cluster of blocks of threads shares cached rows: whole heads of keys, or columns that every head meets."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from slimjax.kernels.gpu.packed import Packing
from slimjax.kernels.gpu.ring import BLOCK, ROWS, SHARED_LIMIT

MIXERS = 2
SCORER, LOADER, GROUPS = MIXERS, MIXERS + 1, MIXERS + 2
# Registers of a mixer's thread that may hold sums: of bfloat16; of codes, or where the loader expands them and has
# registers for it; and turned in heads of 64, where the loader expands them, or not. With more some were seen to be
# spilled.
PLAIN, CODED, TIGHT, TIGHTEST = 96, 80, 64, 56
CLUSTERS = (1, 2, 4, 8)
PIECES = {64: (128, 64), 96: (192,), 128: (128,)}  # columns of a piece, whole heads, by the size of a head
TURNED = {64: 32, 96: 16, 128: 32}  # columns that RoPE turns at a time, of each half of a head
PACKED = 32  # columns that are made of packed bytes at a time
BYTES = 4  # pieces of packed bytes, with their steps, lows and scales, that shared memory holds
SLOTS = 2  # blocks of tokens whose scales and extra coordinates are in shared memory
OTHER = 8192  # bytes of shared memory for reductions and barriers, counted from above


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
    """How rows are parted.

    Attributes:
        blocks: C, of threads, in a cluster.
        width: W, columns of a block.
        size: H, columns that a query meets; W where every query meets all columns.
        piece: columns that come and go together.
        rows: query rows of a block, filled up to a multiple of 8, as products want.
        sent: those of them whose scores go round, a multiple of 4: TMA brings 16 bytes at least.
        rotary: whether keys are turned.
        codes: whether rows, and extra coordinates, are int16 codes with a scale for each token, else bfloat16.
        packing: of FlashQ's codes, which are made bfloat16 rows on the way to the slots, or None.
        extra: R, coordinates of a row besides its keys, weighed alike.
        groups: clusters that the query rows of a sequence are cut into; each reads all rows.
        slots: pieces of 64 tokens that shared memory holds, two blocks of tokens at least; see ``fitted``.
    """

    blocks: int
    width: int
    size: int
    piece: int
    rows: int
    sent: int
    rotary: bool = False
    codes: bool = False
    packing: Packing | None = None
    extra: int = 0
    groups: int = 1
    slots: int = 0

    @property
    def latent(self) -> bool:
        """Whether every query meets all columns, so that a block's scores are a part of each sum."""
        return self.size == self.width

    @property
    def queries(self) -> int:
        """M, columns of all weights."""
        return self.sent if self.latent else self.blocks * self.sent

    @property
    def pieces(self) -> int:
        """Pieces of a block of tokens."""
        return self.width // self.piece

    @property
    def heads(self) -> int:
        """Key heads of the cluster."""
        return self.blocks * self.width // self.size

    @property
    def columns(self) -> int | None:
        """Columns that are read or written at a time, where shared memory has to be laid out for them."""
        return TURNED[self.size] if self.rotary else PACKED if self.packing else None

    @property
    def span(self) -> int:
        """Tokens that lie one behind the other, of as many blocks as share their bytes."""
        return self.packing.span if self.packing else BLOCK

    def begin(self, block: Any) -> tuple[Any, Any]:
        """Where the span of a block of tokens begins, and the token of its first row."""
        if self.packing is None:
            return block * BLOCK, block * BLOCK
        step, part = self.packing.split(block)
        return step * self.span, step * self.span + part * self.packing.rows

    def offset(self, row: Any) -> Any:
        """Tokens from a block's first row to this one."""
        return self.packing.offset(row) if self.packing else row

    def slot(self, j: Any, index: Any) -> Any:
        """Of a piece of the j-th block of tokens."""
        return jax.lax.rem(j * self.pieces + index, jnp.int32(self.slots))

    def wait_free(self, shared: dict[str, Any], j: Any, index: Any) -> None:
        """Until what was in the slot of a piece is no longer needed."""

        @pl.when(j * self.pieces + index >= self.slots)
        def wait() -> None:
            plgpu.barrier_wait(shared["keys_free"].at[self.slot(j, index)])

    @property
    def product(self) -> int:
        """Columns whose sums are one product."""
        return BLOCK if self.codes else self.piece

    @property
    def sums(self) -> int:
        """Products of a mixer."""
        return self.width // (MIXERS * self.product)

    @property
    def ahead(self) -> int:
        """Blocks of tokens whose scores may be on their way at a time."""
        return self.slots // self.pieces

    @property
    def places(self) -> int:
        """Blocks of tokens whose scores have a place in global memory.

        Who writes those of block n has weighed block n - 2. So all had written theirs of that one, had weighed block
        n - 3 before, and so had read its scores: its place is free.
        """
        return 3

    def fitted(self) -> "Share | None":
        """The same with all the slots that there is room for, or None if a block of threads cannot hold it."""
        taken = 4 * BLOCK * self.blocks * self.sent + (2 * BLOCK + 12) * self.queries
        taken += self.rows * (2 * self.width + 4 * BLOCK)
        taken += 4 * BLOCK * self.size if self.rotary else 0
        taken += SLOTS * 4 * BLOCK * (2 if self.extra else 1) if self.codes else 0
        taken += 2 * BLOCK * (SLOTS * BLOCK + self.queries) if self.extra else 0
        if self.packing:
            scales, steps = 4 * self.heads, self.piece if self.packing.bits < 8 else 0  # bytes of a tile
            marks = scales * self.packing.brought(scales) + (
                2 * steps * self.packing.brought(steps) if steps else 0
            )
            taken += BYTES * (BLOCK * self.piece + marks)
        slots = (SHARED_LIMIT - OTHER - taken) // (2 * BLOCK * self.piece)
        sums = (self.width // MIXERS + (BLOCK if self.extra else 0)) * self.queries
        most = CODED if self.codes or self.packing else PLAIN
        if most == CODED and self.rotary and self.size == 64:
            most = TIGHT if self.packing else TIGHTEST
        if self.queries > ROWS or sums > 128 * most or slots < 2 * self.pieces:
            return None
        return dataclasses.replace(self, slots=slots)


def share(
    kv_heads: int,
    size: int,
    rows: int,
    *,
    rotary: bool = False,
    codes: bool = False,
    packing: Packing | None = None,
    extra: int = 0,
) -> Share | None:
    """The smallest cluster for so many key heads of H = ``size`` and query rows of each; None if there is none."""
    for blocks, piece in itertools.product(CLUSTERS, PIECES.get(size, ())):
        width, own = kv_heads * size // blocks, -(-rows * kv_heads // blocks)
        if kv_heads % blocks or width % (MIXERS * piece):
            continue
        multiple = 4 if blocks > 1 else 8  # of all together 8, as products want
        filled, sent = -(-own // 8) * 8, -(-own // multiple) * multiple
        found = Share(
            blocks=blocks,
            width=width,
            size=size,
            piece=piece,
            rows=filled,
            sent=sent,
            rotary=rotary,
            codes=codes,
            packing=packing,
            extra=extra,
        ).fitted()
        if found is not None:
            return found
    return None


def share_latent(width: int, rows: int, *, codes: bool = False) -> Share | None:
    """How so many query rows meet rows of ``width`` columns with the least to move within the GPU, or None."""
    found = []
    for blocks, piece, groups in itertools.product(CLUSTERS, (128, 64), range(1, -(-rows // 8) + 1)):
        own, mine = width // blocks, -(-rows // groups // 8) * 8
        if width % (blocks * MIXERS * piece) == 0:
            part = Share(
                blocks=blocks,
                width=own,
                size=own,
                piece=piece,
                rows=mine,
                sent=mine,
                codes=codes,
                groups=groups,
            )
            found.append(part.fitted())
    return min((each for each in found if each is not None), key=_moved, default=None)


def _moved(part: Share) -> int:
    """Bytes a token from and to L2: columns, and scores that go round."""
    return part.groups * part.blocks * (2 * part.width + 4 * part.sent * (part.blocks + 1))
