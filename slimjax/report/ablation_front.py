"""All ways to cache of several studies as points of bytes and KL: one front for each model.

Studies share cells: a way that several of them measured on the same windows is one point.
"""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from slimjax.records import Record
from slimjax.report.ablation import (
    COLUMNS,
    NOTE,
    ablation_tables,
    described,
    sizes,
    told,
    way_columns,
    ways,
    window_of,
)
from slimjax.report.findings import listed
from slimjax.report.front import Point, front
from slimjax.report.paired import compared
from slimjax.report.samples import Spread, distinct, sample, select
from slimjax.report.tables import Column, Table, Value, scientific, with_seeds

NUMBERS = ("bytes_per_token", "compression", "logit_kl", "logit_kl_low", "logit_kl_high", "top1_agreement")
PRIORITY = "priority"
NAMED = 24  # caches on a front that a sentence names


@dataclass(frozen=True)
class Collected:
    """The measured ways of one model.

    Attributes:
        groups: the records of each way (seeds, and studies that share it), in order of size.
        names: the parts of a way that tell them apart.
        left_out: records of windows of another length, prompt or context than most have.
    """

    groups: tuple[tuple[Record, ...], ...]
    names: tuple[str, ...]
    left_out: int

    @property
    def records(self) -> list[Record]:
        return [record for group in self.groups for record in group]

    @property
    def points(self) -> list[Point]:
        """Bytes, KL, what a label has room for, codec family, in the order of the groups."""
        return [
            (bytes_of(group), Spread(*_kl(group)), short(group[0], self.names), family(group[0]))
            for group in self.groups
        ]

    @property
    def best(self) -> list[tuple[Record, ...]]:
        """The ways on the front, the smallest first; of equal points the first."""
        kept = {(size, cost.mean) for size, cost, *_ in front(self.points)}
        found = {
            (size, cost.mean): group
            for (size, cost, *_), group in zip(self.points[::-1], self.groups[::-1], strict=True)
        }
        return [found[place] for place in sorted(kept)]


def short(record: Record, names: Sequence[str]) -> str:
    """A way in as few words as tell it: `kv:flashq2-4(share=0.5), entropy`."""
    shown = [name for name in names if name not in ("protect", "protection")]
    return described(record, shown).replace(" selector ", " ")


def defaults(records: Sequence[Record]) -> list[Record]:
    """One way of each scheme: no protected layers; where heads are chosen, by the paper's priority or the first there
    is. The best of many variants of one scheme would be on a front by luck.
    """
    plain = [record for record in records if not record.cell.get("protected")]
    chosen: dict[str, str] = {}
    for record in plain:
        scheme, selector = str(record.cell.get("scheme")), str(record.cell.get("selector"))
        if selector == PRIORITY or scheme not in chosen:
            chosen[scheme] = selector
    return [r for r in plain if chosen[str(r.cell.get("scheme"))] == str(r.cell.get("selector"))]


def bytes_of(group: Sequence[Record]) -> float:
    """Bytes per token."""
    found = sample(group, "bytes_per_token")
    assert found is not None  # `collected` keeps those that have them
    return float(found.mean)


def _kl(group: Sequence[Record]) -> tuple[float, float, int]:
    found = sample(group, "logit_kl")
    assert found is not None
    return found.mean, found.deviation, found.n


def collected(records: Sequence[Record]) -> Collected:
    """Of the records of one model those that a front can be of: with bytes and KL, on the windows that most are of."""
    asked = [r for r in records if "logit_kl" in r.metrics and "bytes_per_token" in r.metrics]
    if not asked:
        return Collected((), (), 0)
    conditions = Counter((*window_of(r), r.cell.get("context"), r.metrics.get("count")) for r in asked)
    most = conditions.most_common(1)[0][0]
    same = [r for r in asked if (*window_of(r), r.cell.get("context"), r.metrics.get("count")) == most]
    groups = sorted((tuple(group) for group in ways(same).values()), key=bytes_of)
    return Collected(tuple(groups), tuple(told(same)), len(asked) - len(same))


def family(record: Record) -> str:
    """What is told apart by colour: the codec, of basis kv without it, of other bases with it: `kivi`, `k:flashq`."""
    basis, codec = record.cell.get("basis"), str(record.cell.get("codec"))
    return codec if basis == "kv" else f"{basis}:{codec}"


def wanted(records: Sequence[Record]) -> bool:
    """Whether a front of all is more than a study's own table: several studies, or the one that is for it."""
    studies = distinct(records, "study")
    return len(studies) > 1 or "pareto" in studies


def comparison_tables(records: Sequence[Record]) -> dict[str, Table]:
    """The fronts of all studies, where there are any, then every study's own tables."""
    return front_tables(records) | ablation_tables(records)


def front_tables(records: Sequence[Record]) -> dict[str, Table]:
    """`front_MODEL`, all schemes of all studies, the smallest first; {} of a single other study."""
    found = {
        f"front_{model}": front_table(collected(defaults(select(records, model=model))), str(model))
        for model in (distinct(records, "model") if wanted(records) else ())
    }
    return {name: table for name, table in found.items() if table.rows}


def front_table(found: Collected, model: str) -> Table:
    """A row per way, with whether it is on the front, and which studies measured it."""
    best, names = found.best, list(found.names)
    numbers = [name for name in NUMBERS if any(name in record.metrics for record in found.records)]
    rows: list[tuple[Value, ...]] = []
    for group in found.groups:
        place = [None if group[0].cell.get(name) is None else group[0].cell[name] for name in names]
        studies = ", ".join(map(str, distinct(group, "study")))
        rows.append(
            (*place, *(sample(group, name) for name in numbers), "front" if group in best else "", studies)
        )
    columns = (
        *way_columns(names), *(COLUMNS[name] for name in numbers), Column("on the front", "plain"), Column("studies")
    )  # fmt: skip
    note = f"{NOTE}{sizes(found.records)}"
    if found.left_out:
        note += f" Left out, of other windows: {found.left_out}."
    labels = tuple(described(group[0], names) for group in found.groups)
    table = Table(f"KL against bytes: {model}", columns, tuple(rows), (), note, labels, len(names))
    return with_seeds(table, [len({r.cell.get("seed") for r in group}) for group in found.groups])


def front_sentence(found: Collected, model: str) -> str:
    """Which ways no other beats in bytes and KL at once, and which neighbours on that front a test tells apart."""
    best = found.best
    if not best:
        return ""
    names = [described(group[0], found.names) for group in best]
    turbo = sum(is_turbo(group[0]) for group in best)
    shown = [
        f"{name} ({bytes_of(group):,.0f} bytes, {scientific(_kl(group)[0])})"
        for name, group in list(zip(names, best, strict=True))[:NAMED]
    ]
    more = f" and {len(best) - NAMED} more" if len(best) > NAMED else ""
    pairs = list(itertools.pairwise(best))
    noise = [
        f"{b} from {a}"
        for (a, b), each in zip(itertools.pairwise(names), compared(pairs), strict=True)
        if each is None or not each.more
    ]
    apart = (
        f"; not told from the next smaller by a paired test: {listed(noise)}"
        if noise
        else "; each is told from the next by a paired test"
        if pairs
        else ""
    )
    return (
        f"{model}: of {len(found.groups)} caches {len(best)} are on the front of bytes and KL, from the smallest: "
        f"{listed(shown)}{more}; {turbo} of them {'is' if turbo == 1 else 'are'} TurboAttention's{apart}."
    )


def is_turbo(record: Record) -> bool:
    """FlashQ's codes of keys and values; a slim cache in them is not TurboAttention."""
    return record.cell.get("basis") == "kv" and record.cell.get("codec") == "flashq"
