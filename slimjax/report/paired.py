"""Two ways to cache, told apart: paired tests of their KL over the same blocks of tokens.

A difference counts where its p, corrected by Holm's method for the tests that a sentence makes together, is below
``LEVEL``; its 95 % interval is uncorrected.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from slimjax.records import Record
from slimjax.report.samples import metric, seed_of, select
from slimjax.report.tables import scientific
from slimjax.scheme import parse_options
from slimjax.statistics import Interval, holm, paired_interval, paired_p

LEVEL = 0.05
# Options after which a codec is another method than the one that a paper describes: corrected codes, another share of
# heads in fewer bits, other codes of the extra coordinates.
OTHER_METHOD = {("flashq", "rank"), ("flashq", "decode_rank"), ("kivi", "rank")}
OPTIONS = re.compile(r"^([^(@#/+]*)\(([^)]*)\)")
Records = Sequence[Record]


@dataclass(frozen=True)
class Compared:
    """A difference of KL, first less second.

    Attributes:
        interval: 95 %, of this difference alone.
        p: two-sided, corrected by Holm for the tests made along with it.
        tests: how many those are, this one included.
    """

    interval: Interval
    p: float
    tests: int

    @property
    def less(self) -> bool:
        return self.p < LEVEL and self.interval.mean < 0

    @property
    def more(self) -> bool:
        return self.p < LEVEL and self.interval.mean > 0

    def __str__(self) -> str:
        """`difference -1.0e-2, 95 % from -1.1e-2 to -9.0e-3, p < 1e-6`."""
        found, p = self.interval, probability(self.p)
        ends = f"95 % from {scientific(found.low)} to {scientific(found.high)}"
        return f"difference {scientific(found.mean)}, {ends}, {p}{f' by Holm over {self.tests}' * (self.tests > 1)}"


def probability(p: float) -> str:
    """`p = 0.012`, `p < 1e-6`."""
    return "p < 1e-6" if p < 1e-6 else f"p = {p:.2g}"


def kl(records: Records) -> float:
    """Mean over the seeds."""
    return float(metric(records, "logit_kl"))


def samples_of(records: Records, name: str = "logit_kl_blocks") -> np.ndarray | None:
    """A metric block by block, the mean over the seeds; None where they have none, or of unlike numbers."""
    by_seed: dict[object, Sequence[float]] = {}
    for record in records:
        if found := record.metrics.get(name):
            by_seed.setdefault(seed_of(record), found)
    if not by_seed or len({len(found) for found in by_seed.values()}) > 1:
        return None
    return np.mean([np.asarray(found, np.float64) for found in by_seed.values()], axis=0)


def compared(
    pairs: Sequence[tuple[Records, Records]], name: str = "logit_kl_blocks"
) -> list[Compared | None]:
    """The difference of each pair, all as one family of tests; None where their blocks are not the same tokens."""
    both = [(samples_of(first, name), samples_of(second, name)) for first, second in pairs]
    valid = [(a, b) for a, b in both if a is not None and b is not None and len(a) == len(b) > 1]
    corrected = iter(holm([paired_p(a, b) for a, b in valid]))
    return [
        Compared(paired_interval(a, b), next(corrected), len(valid))
        if a is not None and b is not None and len(a) == len(b) > 1
        else None
        for a, b in both
    ]


def difference(first: Records, second: Records, level: float = 1 - LEVEL) -> Interval | None:
    """Of the KL, first less second, at a level; None where their blocks are not the same tokens."""
    a, b = samples_of(first), samples_of(second)
    return None if a is None or b is None or not len(a) == len(b) > 1 else paired_interval(a, b, level)


def versus(first: Records, second: Records, found: Compared | None) -> str:
    """`A has less KL than B (numbers, difference)`, or that they cannot be told apart."""
    names = str(first[0].cell["scheme"]), str(second[0].cell["scheme"])
    numbers = f"{scientific(kl(first))} against {scientific(kl(second))}"
    if found is None:
        return f"{names[0]} and {names[1]} cannot be compared block by block ({numbers})"
    if not found.less and not found.more:
        return f"{names[0]} and {names[1]} cannot be told apart ({numbers}; {found})"
    return f"{names[0]} has {'less' if found.less else 'more'} KL than {names[1]} ({numbers}; {found})"


def ordered(groups: Sequence[Records]) -> tuple[str, str]:
    """Whether the KL rises in the order given, and every neighbouring pair in words.

    'supported': each is told from the next; 'contradicted': some next one has less; or neither of both.
    """
    pairs = list(itertools.pairwise(groups))
    found = compared(pairs)
    words = "; ".join(versus(*pair, each) for pair, each in zip(pairs, found, strict=True))
    if any(each is not None and each.more for each in found):
        return "contradicted", words
    if all(each is not None and each.less for each in found):
        return "supported", words
    return "neither supported nor contradicted", words


def verdict(found: Compared | None) -> str:
    """Of the claim that the first has less KL."""
    if found is None:
        return "not tested"
    return "supported" if found.less else "contradicted" if found.more else "not shown (within the interval)"


# Schemes by name --------------------------------------------------------------------------------------------


def bare(scheme: str) -> str:
    """Without its codec's options: `kv:gear_l4(rank=2)` is `kv:gear_l4`; those of softmax and compute stay."""
    return OPTIONS.sub(r"\1", scheme)


def same_method(record: Record) -> bool:
    """Whether the options in parentheses, if any, leave the codec the method whose name it has."""
    found = OPTIONS.match(str(record.cell.get("scheme")))
    options = parse_options(found[2]) if found else ()
    codec = str(record.cell.get("codec"))
    return not any(
        name == "extra" or (name == "share" and value != 0.5) or (codec, name) in OTHER_METHOD
        for name, value in options
    )


def one(records: Records, scheme: str) -> Record | None:
    """The record of a scheme, the first where it has several; if there is none, of the scheme with options."""
    exact = select(records, scheme=scheme)
    like = (r for r in records if bare(str(r.cell.get("scheme"))) == scheme and same_method(r))
    return next(iter(exact), None) or next(like, None)
