"""Chips, as data: what bounds the time of a token.

The first six are table 3 of arXiv 2503.05840 (int8 peak and bandwidth, and where it took them from); memory and
the 16-bit peak are the makers' specifications. The others are the makers' specifications throughout.
"""

import dataclasses
import types
from collections.abc import Mapping

from slimjax.scheme import suggest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """Peak rates of one chip.

    Attributes:
        name: as its maker has it.
        tops: dense int8 peak, 10^12 operations per second.
        bandwidth: memory, 10^9 bytes per second.
        tflops: dense bfloat16 peak, 10^12 operations per second; None: not published.
        memory: 10^9 bytes; None where it depends on the device.
        on_chip: 10^6 bytes of the largest memory on the chip that data can stay in; None: not published.
        source: where the figures are from.
    """

    name: str
    tops: float
    bandwidth: float
    tflops: float | None = None
    memory: float | None = None
    on_chip: float | None = None
    source: str

    @property
    def balance(self) -> float:
        """Operations (int8) per byte at which memory and arithmetic take equally long."""
        return self.tops * 1e12 / (self.bandwidth * 1e9)

    def peak(self, bits: int = 16) -> float:
        """Operations per second on operands of 8 or 16 bits; the int8 peak where no 16-bit one is published."""
        return 1e12 * (self.tops if bits <= 8 or self.tflops is None else self.tflops)


_WIKI = "arXiv 2503.05840, table 3 (Wikipedia)"

TABLE_3 = (
    Chip(name="A18", tops=35, bandwidth=60, memory=8, source=_WIKI),
    Chip(name="M4 Max", tops=38, bandwidth=410, memory=36, source=_WIKI),
    Chip(
        name="TPU v4",
        tops=275,
        bandwidth=1200,
        tflops=275,
        memory=34,
        on_chip=134,
        source=_WIKI + "; Google Cloud",
    ),
    Chip(name="TPU v5p", tops=918, bandwidth=2765, tflops=459, memory=95, source=_WIKI + "; Google Cloud"),
    Chip(
        name="H200", tops=1980, bandwidth=4800, tflops=989, memory=141, on_chip=50, source=_WIKI + "; NVIDIA"
    ),
    Chip(
        name="B200",
        tops=4500,
        bandwidth=8000,
        tflops=2250,
        memory=180,
        on_chip=126,
        source=_WIKI + "; NVIDIA",
    ),
)

OTHERS = (
    Chip(name="TPU v5e", tops=394, bandwidth=819, tflops=197, memory=16, on_chip=134, source="Google Cloud"),
    Chip(
        name="TPU v6e", tops=1836, bandwidth=1640, tflops=918, memory=32, on_chip=134, source="Google Cloud"
    ),
    Chip(name="A100", tops=624, bandwidth=2039, tflops=312, memory=80, on_chip=40, source="NVIDIA"),
    Chip(name="H100", tops=1979, bandwidth=3350, tflops=989, memory=80, on_chip=50, source="NVIDIA"),
)

CHIPS: Mapping[str, Chip] = types.MappingProxyType({chip.name: chip for chip in (*TABLE_3, *OTHERS)})


def chip(name: str) -> Chip:
    """The chip of that name, whatever its case and spaces. Raises ValueError, with the nearest name, for another."""

    def plain(text: str) -> str:
        return text.lower().replace(" ", "").replace("-", "").replace("_", "")

    found = [known for known in CHIPS.values() if plain(known.name) == plain(name)]
    if not found:
        raise ValueError(f"unknown chip {name!r}{suggest(name, CHIPS)}")
    return found[0]
