"""KL along the windows of a language model: its ranges of positions, and whether it grows from one to another.

Records keep the mean KL of every block of 64 scored tokens, window after window; a range of positions is some blocks
of every window.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from slimjax.records import Record
from slimjax.statistics import Interval, mean_interval, welch_p

BLOCK = 64  # tokens, as `slimjax.compare` has it
LEAST = 256  # tokens before the first range that others are held against: before, a cache holds little but its buffer


@dataclass(frozen=True, eq=False)
class Range:
    """Positions first to last of every window.

    Attributes:
        kl: mean over them, nats.
        samples: of every window and block in it, [W, n]; None where blocks do not end where the range does.
        count: tokens, of all windows.
    """

    first: int
    last: int
    kl: float
    samples: np.ndarray | None
    count: int

    @property
    def ends(self) -> tuple[int, int]:
        return self.first, self.last

    @property
    def interval(self) -> Interval | None:
        """95 % over the blocks; None of fewer than two."""
        few = self.samples is None or self.samples.size < 2
        return None if few else mean_interval(np.ravel(self.samples))  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"tokens {self.first:,} to {self.last:,} (n = {self.count:,})"


def windows(record: Record) -> int:
    """How many the record's scored tokens are in; 1 where it does not say."""
    prompt, length = (int(record.cell.get(name) or 0) for name in ("prompt", "length"))
    length = length or int(record.metrics["positions"][-1])
    return max(1, int(record.metrics.get("count", 0)) // max(1, length - prompt))


def ranges(record: Record) -> list[Range]:
    """The record's ranges of positions; the first starts behind the prompt. [] where it has none."""
    ends = [int(end) for end in record.metrics.get("positions", ())]
    values = record.metrics.get("logit_kl_by_position", ())
    if not ends or len(values) != len(ends):
        return []
    prompt, many = int(record.cell.get("prompt") or 0), windows(record)
    blocks = np.asarray(record.metrics.get("logit_kl_blocks", ()), np.float64)
    whole = blocks.size > 0 and blocks.size * BLOCK == many * (ends[-1] - prompt)
    grid = blocks.reshape(many, -1) if whole else None
    found = []
    for first, end, value in zip([prompt, *ends[:-1]], ends, values, strict=True):
        fits = grid is not None and (first - prompt) % BLOCK == 0 and (end - prompt) % BLOCK == 0
        part = (
            grid[:, (first - prompt) // BLOCK : (end - prompt) // BLOCK]
            if fits and grid is not None
            else None
        )
        found.append(Range(first, end - 1, float(value), part, many * (end - first)))
    return found


def held_against(found: Sequence[Range]) -> tuple[Range, Range] | None:
    """The first range that starts at ``LEAST`` or behind it, and the last; None where these are not two."""
    later = [each for each in found if each.first >= LEAST]
    return (later[0], later[-1]) if len(later) > 1 else None


def same_kl(early: Range, late: Range) -> float | None:
    """p that both ranges have the same KL: Welch's t over their blocks, which are of other tokens. None: no blocks."""
    if early.samples is None or late.samples is None:
        return None
    return welch_p(np.ravel(late.samples), np.ravel(early.samples))
