"""How a kernel cuts its work into tiles, and how that is chosen: asked for, else as much as fits."""

import dataclasses
import math

VMEM = 16 * 2**20  # bytes of fast memory that every kernel may take, on every TPU
SHARE = 0.75  # of it for tiles: the rest is the compiler's
BLOCKS = (1024, 512, 256, 128)  # tokens; smaller ones wait for memory rather than move it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """Tokens of a tile of cached rows, parts that the sequence is cut into (combined afterwards), and the fast memory
    that a kernel asks for, bytes.

    Raises:
        ValueError: fewer than 16 tokens, which no layout of bfloat16 rows allows, or no part.
    """

    block: int
    splits: int = 1
    vmem: int = VMEM

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


def choose(
    capacity: int,
    memory: Memory,
    *,
    tiles: Tiles | None = None,
    vmem: int = VMEM,
    unit: int = 16,
    splits: int = 1,
) -> Tiles:
    """The tiles asked for, else the longest of ``BLOCKS`` that fit into ``vmem`` bytes; both cut to the capacity.

    splits: parts, unless tiles are asked for, or there are fewer blocks. unit: tokens; a tile has a multiple of them,
    so that of ``BLOCKS`` others are left out, or ``unit`` itself.

    Raises:
        NotImplementedError: not even the shortest fits, or those asked for do not, or are no multiple of ``unit``.
    """
    whole = max(unit, math.ceil(capacity / unit) * unit)
    vmem = vmem if tiles is None else tiles.vmem
    if tiles is not None and tiles.block % unit:
        raise NotImplementedError(
            f"{tiles.block=}: the kernel takes multiples of {unit} tokens of these rows"
        )
    asked = BLOCKS if tiles is None else (tiles.block,)
    blocks = [min(block, whole) for block in asked if block % unit == 0] or [unit]
    for block in blocks:
        if memory.of(block) <= SHARE * vmem:
            if tiles is not None:
                return dataclasses.replace(tiles, block=block)
            return Tiles(block=block, vmem=vmem, splits=min(splits, math.ceil(capacity / block)))
    raise NotImplementedError(
        f"{blocks[-1]} tokens take {memory.of(blocks[-1]):,} bytes of VMEM with their queries and sums, "
        f"more than {int(SHARE * vmem):,}"
    )
