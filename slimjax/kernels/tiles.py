"""How a kernel cuts its work into tiles, and how that is chosen: asked for, else as much as fits."""

import dataclasses
import math

VMEM = (
    12 * 2**20
)  # bytes that tiles may take together: of the 16 MiB of v4, v5e and v5p, what leaves the compiler room
BLOCKS = (1024, 512, 256, 128)  # tokens; smaller ones wait for memory rather than move it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """Tokens of a tile of cached rows, and parts that the sequence is cut into (combined afterwards).

    Raises:
        ValueError: fewer than 16 tokens, which no layout of bfloat16 rows allows, or no part.
    """

    block: int
    splits: int = 1

    def __post_init__(self) -> None:
        if self.block < 16 or self.block % 16:
            raise ValueError(f"{self.block=}: a tile has a multiple of 16 tokens")
        if self.splits < 1:
            raise ValueError(f"{self.splits=}: expected at least one part")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of fast memory: ``fixed``, and so many for each token of a tile."""

    fixed: int
    token: int

    def of(self, block: int) -> int:
        """Of tiles of so many tokens."""
        return self.fixed + block * self.token


def choose(capacity: int, memory: Memory, *, tiles: Tiles | None = None, budget: int = VMEM) -> Tiles:
    """The tiles asked for, else the longest of ``BLOCKS`` that fit, cut to the capacity.

    Raises:
        NotImplementedError: not even the shortest fits, or those asked for do not.
    """
    whole = max(16, math.ceil(capacity / 16) * 16)
    if tiles is not None:
        if memory.of(min(tiles.block, whole)) > budget:
            needed = memory.of(min(tiles.block, whole))
            raise NotImplementedError(f"{tiles} takes {needed:,} bytes of VMEM, more than {budget:,}")
        return dataclasses.replace(tiles, block=min(tiles.block, whole))
    for block in BLOCKS:
        if memory.of(min(block, whole)) <= budget:
            return Tiles(block=min(block, whole))
    needed = memory.of(min(BLOCKS[-1], whole))
    raise NotImplementedError(
        f"{BLOCKS[-1]} tokens take {needed:,} bytes of VMEM with their queries and sums, more than {budget:,}"
    )
