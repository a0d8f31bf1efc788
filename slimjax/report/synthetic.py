"""Tables and sentences of `synthetic`: one head's attention on Gaussian numbers."""

import dataclasses
from collections.abc import Mapping, Sequence

from slimjax.records import STATUSES, Record
from slimjax.report.findings import listed, unmeasured, waiting
from slimjax.report.generic import cells_table
from slimjax.report.paired import bare
from slimjax.report.samples import by_cell, distinct, measured, metric, seed_of, select
from slimjax.report.tables import Column, Table, Value, scientific
from slimjax.statistics import Interval, next_interval, paired_interval

# Cosine and relative L1 that others found with 1,024 tokens, H = 64 and N(0, 1) numbers, each of one draw. INT8
# products are theirs of a prompt, whose queries share the scales of tiles.
ELSEWHERE: Mapping[str, tuple[float, float]] = {
    "kv:bf16#int8": (0.99964, 0.0256),
    "kv:flashq4": (0.99107, 0.134),
    "kv:flashq3": (0.9644, 0.281),
    "kv:flashq2": (0.816, 0.688),
    "kv:kivi4": (0.99233, 0.124),
}
SHAPE = (1024, 64)  # tokens and H of those


def synthetic_tables(records: Sequence[Record]) -> dict[str, Table]:
    """`sas`, and `schemes`, of Gaussian numbers."""
    made = {}
    sas = [record for record in records if record.cell.get("threshold") is not None]
    emulated = [record for record in records if record.cell.get("scheme") is not None]
    if sas:
        made["sas"] = cells_table(sas, "SAS on Gaussian logits")
    if emulated:
        made["emulated"] = _beside_others(emulated)
    return made


def _beside_others(records: Sequence[Record]) -> Table:
    """`cells_table` with the figures of others in the rows that have any."""
    table = cells_table(records, "Attention on N(0, 1) queries, keys and values")
    found = [elsewhere(group[0]) for group in by_cell(records).values()]
    if not any(found):
        return table
    rows: list[tuple[Value, ...]] = [
        (*row, *(other or (None, None))) for row, other in zip(table.rows, found, strict=True)
    ]
    columns = (*table.columns, Column("elsewhere: cosine", "number"), Column("relative L1", "number"))
    return dataclasses.replace(table, columns=columns, rows=tuple(rows))


def elsewhere(record: Record) -> tuple[float, float] | None:
    """Cosine and relative L1 that others found of this scheme on numbers of this kind."""
    same = (record.cell.get("context"), record.cell.get("head_dim")) == SHAPE
    scheme = bare(str(record.cell.get("scheme")))
    if "#int8" in scheme and record.cell.get("backend") != "prompt":
        return None
    return ELSEWHERE.get(scheme) if same else None


def synthetic_findings(records: Sequence[Record]) -> list[str]:
    """What SAS loses with context, and what a scheme does to one head."""
    found = [_cut(records), *_emulated(records)]
    found += [text for status in STATUSES if status != "ok" if (text := unmeasured(records, status))]
    found += [waiting(records)] if any(map(measured, records)) else []
    return [sentence for sentence in found if sentence]


def _cut(records: Sequence[Record]) -> str:
    paper = select(records, threshold=6, degree=3)
    contexts = sorted(distinct(paper, "context"))
    shares = [
        (c, metric(paper, "lost_mass", context=c), metric(paper, "attention_error", context=c))
        for c in contexts
    ]
    shares = [row for row in shares if None not in row]
    if len(shares) < 2:
        return ""
    (first, lost, error), (last, more, worse) = shares[0], shares[-1]
    text = (
        f"SAS at threshold 6 loses {100 * lost:.1f} % of the softmax's mass over {first:,} keys and {100 * more:.1f} % "
        f"over {last:,}, and errs by {scientific(error)} and {scientific(worse)} (relative L2 of the output)"
    )
    longest = select(records, context=last)
    uncut = select(longest, threshold=0, degree=3)
    sharper = select(longest, threshold=6, degree=max(distinct(longest, "degree"), default=0))
    apart = _apart(uncut, sharper, "attention_error")
    if apart is None:
        return f"{text}."
    verdict = "supported" if apart.high < 0 else "contradicted" if apart.low > 0 else "not shown"
    uncut_error, sharper_error = (metric(rows, "attention_error") for rows in (uncut, sharper))
    return (
        f"{text}; at {last:,} keys it errs by {scientific(uncut_error)} without the cut, and by "
        f"{scientific(sharper_error)} with the cut and degree {sharper[0].cell['degree']} (difference "
        f"{scientific(apart.mean)}, {_ends(apart)}): that the cut, and not the polynomial, is the error is {verdict}."
    )


def _apart(first: Sequence[Record], second: Sequence[Record], name: str) -> Interval | None:
    """First less second, seed by seed: equal seeds draw equal numbers. None without a seed that both have."""
    mine, other = (
        {seed_of(r): r.metrics[name] for r in rows if name in r.metrics} for rows in (first, second)
    )
    both = [seed for seed in mine if seed in other]
    return paired_interval([mine[seed] for seed in both], [other[seed] for seed in both]) if both else None


def _ends(interval: Interval) -> str:
    """`95 % from a to b over the draws`."""
    if interval.low == -interval.high:
        return "one draw, no interval"
    return f"95 % from {scientific(interval.low)} to {scientific(interval.high)} over the draws"


def _emulated(records: Sequence[Record]) -> list[str]:
    """What every scheme does, and how far that is from what others found."""
    rows = [record for record in records if record.cell.get("scheme") and "attention_l1" in record.metrics]
    if not rows:
        return []
    groups = list(by_cell(rows).values())
    parts = [
        f"{100 * metric(here, 'attention_cosine'):.3f} % and {metric(here, 'attention_l1'):.3g} {_named(here[0])}"
        for here in groups
    ]
    found = [f"One head on N(0, 1) numbers, cosine and relative L1 of its output: {listed(parts)}."]
    return [*found, *_checks([here for here in groups if elsewhere(here[0])])]


def _named(record: Record) -> str:
    ways = {"encode and decode": " by encode and decode alone", "prompt": " as a prompt"}
    return f"{record.cell['scheme']}{ways.get(str(record.cell.get('backend')), '')}"


def _checks(groups: Sequence[Sequence[Record]]) -> list[str]:
    """Whether what others found of one draw is where one more draw here would lie; of fewer than two draws nothing."""
    inside, outside = [], []
    for here in groups:
        other, places = elsewhere(here[0]), []
        for name, theirs in zip(("attention_cosine", "attention_l1"), other or (), strict=True):
            values = [record.metrics[name] for record in here]
            if len(values) > 1:
                place = next_interval(values)
                places.append((theirs, place, place.low <= theirs <= place.high))
        if len(places) < 2:
            continue
        (cosine, cosines, _), (l1, l1s, _) = places
        theirs, ours = f"{100 * cosine:.3f} % and {l1:.3g}", f"{100 * cosines.mean:.3f} % and {l1s.mean:.3g}"
        (inside if all(fits for *_, fits in places) else outside).append(
            f"{_named(here[0])} ({theirs}; here {ours})"
        )
    if not inside and not outside:
        return []
    parts = [
        f"within the 95 % range of one more draw here: {listed(inside)}" if inside else "",
        f"not within it: {listed(outside)}" if outside else "",
    ]
    return [f"What others found of one draw, cosine and relative L1, is {'; '.join(filter(None, parts))}."]
