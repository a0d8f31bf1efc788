"""Sentences of `compare`: what each table supports or contradicts, from its figures alone.

Two ways to cache are told apart where the 95 % interval of their difference, paired block by block, leaves 0 out.
"""

import itertools
from collections.abc import Callable, Sequence

from slimjax.records import STATUSES, Record
from slimjax.report.ablation import described, told, ways
from slimjax.report.findings import listed, unmeasured, waiting
from slimjax.report.front import front
from slimjax.report.samples import Spread, distinct, measured, metric, sample, select
from slimjax.report.tables import number, scientific
from slimjax.statistics import Interval, mcnemar, paired_interval

FLAT = 1.1  # KL up to so many times the least counts as flat
LOST = 0.05  # p below which answers are lost, or won
Sentence = Callable[[Sequence[Record], str], list[str]]


def ablation_findings(records: Sequence[Record]) -> list[str]:
    """Study by study, model by model."""
    found = []
    for study in distinct(records, "study"):
        here = select(records, study=study)
        for model in distinct(here, "model"):
            asked = [record for record in select(here, model=model) if "logit_kl" in record.metrics]
            if asked:
                found += SENTENCES.get(study, _none)(asked, str(model))
                found += _answers(asked, str(model))
    found += [text for status in STATUSES if status != "ok" if (text := unmeasured(records, status))]
    found += [waiting(records)] if any(map(measured, records)) else []
    return [sentence for sentence in found if sentence]


# Two ways, or several ---------------------------------------------------------------------------------------


def kl(records: Sequence[Record]) -> float:
    """Mean over the seeds."""
    return float(metric(records, "logit_kl"))


def difference(first: Record, second: Record) -> Interval | None:
    """Of the KL, first less second, on the same blocks of tokens; None where they have other ones."""
    a, b = (record.metrics.get("logit_kl_blocks", ()) for record in (first, second))
    return paired_interval(a, b) if len(a) == len(b) > 1 else None


def one(records: Sequence[Record], scheme: str) -> Record | None:
    """The record of a scheme, the first where it has several."""
    return next(iter(select(records, scheme=scheme)), None)


def ordered(records: Sequence[Record]) -> str:
    """Whether the KL rises in the order given: 'supported', 'contradicted', or neither, because of the noise."""
    apart = [difference(a, b) for a, b in itertools.pairwise(records)]
    if any(found is not None and found.low > 0 for found in apart):
        return "contradicted"
    if all(found is not None and found.high < 0 for found in apart):
        return "supported"
    return "neither supported nor contradicted: neighbours cannot be told apart"


def versus(first: Record, second: Record) -> str:
    """`A has less KL than B (difference, interval)`, or that they cannot be told apart."""
    found = difference(first, second)
    names = str(first.cell["scheme"]), str(second.cell["scheme"])
    numbers = f"{scientific(kl([first]))} against {scientific(kl([second]))}"
    if found is None or not found.apart:
        return f"{names[0]} and {names[1]} cannot be told apart ({numbers})"
    return f"{names[0]} has {'less' if found.high < 0 else 'more'} KL than {names[1]} ({numbers})"


def _values(records: Sequence[Record], names: Sequence[str]) -> str:
    return listed([f"{scientific(kl(here))} {described(here[0], names)}" for here in ways(records).values()])


# Studies ----------------------------------------------------------------------------------------------------


def _none(records: Sequence[Record], model: str) -> list[str]:
    return []


def _main(records: Sequence[Record], model: str) -> list[str]:
    """The paper's order of methods, at 4 bits and at about 3."""
    found = []
    for bits, schemes in (
        ("4 bits", ("kv:flashq4@sas", "kv:gear_l4", "kv:kivi4")),
        ("about 3 bits", ("kv:flashq2-4@sas", "kv:gear_l3", "kv:kivi3")),
    ):
        rows = [record for scheme in schemes if (record := one(records, scheme))]
        if len(rows) == len(schemes):
            numbers = listed([f"{scientific(kl([row]))} {row.cell['scheme']}" for row in rows])
            found.append(
                f"{model}, {bits}: KL {numbers}; that TurboAttention loses least, then GEAR-L, then KIVI, is "
                f"{ordered(rows)}."
            )
    plain, turbo = one(records, "kv:bf16"), one(records, "kv:flashq4@sas")
    if plain and turbo:
        before, now = plain.metrics["perplexity"], turbo.metrics["perplexity"]
        found.append(
            f"{model}: kv:flashq4@sas takes {turbo.metrics['compression']:.2f} times fewer bytes than bf16 KV and "
            f"raises perplexity from {before:.3f} to {now:.3f} ({100 * (now / before - 1):+.1f} %)."
        )
    return found


def _components(records: Sequence[Record], model: str) -> list[str]:
    """What FlashQ and SAS cost by themselves and together; of FlashQ, its arithmetic and its bits; the options."""
    found = []
    sas, flashq, both = (one(records, each) for each in ("kv:bf16@sas", "kv:flashq4", "kv:flashq4@sas"))
    if sas and flashq and both:
        found.append(
            f"{model}: KL {scientific(kl([sas]))} with SAS alone, {scientific(kl([flashq]))} with FlashQ alone, "
            f"{scientific(kl([both]))} with both; that SAS costs less than FlashQ, and both more than either, is "
            f"{ordered([sas, flashq, both])}."
        )
    arithmetic, bits = one(records, "kv:bf16#int8"), one(records, "kv:flashq4#float")
    if arithmetic and bits:
        found.append(f"{model}, halves of FlashQ: {versus(arithmetic, bits)}.")
    if both:
        others = [
            (difference(record, both), record)
            for record in records
            if str(record.cell["scheme"]).startswith("kv:flashq4@sas#int8(")
        ]
        told_apart = [
            f"{record.cell['scheme']} ({'-' if apart.high < 0 else '+'}{scientific(abs(apart.mean))})"
            for apart, record in others
            if apart is not None and apart.apart
        ]
        if others:
            which = (
                f"{listed(told_apart)} can be told from the default" if told_apart else "none is told from it"
            )
            found.append(
                f"{model}: of {len(others)} choices that the paper leaves open, by their KL, {which}."
            )
    return found


def _selectors(records: Sequence[Record], model: str) -> list[str]:
    """Whether the paper's priority beats its rivals, share by share."""
    found = []
    for scheme in distinct([r for r in records if r.cell.get("selector")], "scheme"):
        here = select(records, scheme=scheme)
        rows = {name: select(here, selector=name) for name in distinct(here, "selector")}
        mine = rows.get("priority")
        if not mine or len(rows) < 2:
            continue
        numbers = listed(
            [f"{scientific(kl(each))} {name}" for name, each in sorted(rows.items(), key=_least)]
        )
        beaten, better = [], []
        for name, rivals in rows.items():
            apart = [difference(mine[0], rival) for rival in rivals if name != "priority"]
            if apart and all(each is not None and each.high < 0 for each in apart):
                beaten.append(name)
            if apart and all(each is not None and each.low > 0 for each in apart):
                better.append(name)
        verdict = (
            f"contradicted by {listed(better)}"
            if better
            else f"supported against {listed(beaten)}"
            if beaten
            else "neither supported nor contradicted"
        )
        found.append(f"{model}, {scheme}: KL {numbers}; that priority chooses best is {verdict}.")
    return found


def _least(item: tuple[str, Sequence[Record]]) -> float:
    return kl(item[1])


def _flat(records: Sequence[Record], model: str, claim: str) -> list[str]:
    """Whether KL stays about the same over all rows."""
    groups = list(ways(records).values())
    if len(groups) < 2:
        return []
    names = told(records)
    low, high = (pick(groups, key=kl) for pick in (min, max))
    apart = difference(high[0], low[0])
    ratio = kl(high) / max(kl(low), 1e-12)
    steady = ratio <= FLAT or apart is None or not apart.apart
    noise = ", within the noise" if steady and ratio > FLAT else ""
    text = (
        f"{model}: KL from {scientific(kl(low))} ({described(low[0], names)}) to {scientific(kl(high))} "
        f"({described(high[0], names)}), {ratio:.2f} times as much{noise}; that {claim} is "
        f"{'supported' if steady else 'contradicted'}."
    )
    return [text]


def _tiles(records: Sequence[Record], model: str) -> list[str]:
    found = []
    for bits in distinct(records, "bits"):
        here = select(records, bits=bits)
        found += _flat(here, f"{model}, {bits} bits", "the size of a tile does not matter from 32 to 128")
    return found


def _buffer(records: Sequence[Record], model: str) -> list[str]:
    return _flat(records, model, "neither the buffer's size nor its universal scale matters")


def _sas(records: Sequence[Record], model: str) -> list[str]:
    """The cut against the polynomial, on a model."""
    plain, uncut, sharper = (one(records, f"kv:bf16@sas{args}") for args in ("", "(0,3)", "(6,5)"))
    uncut = uncut or one(records, "kv:bf16@sas(0)")
    if not plain or not uncut or not sharper:
        return []
    cut = kl([plain]) - kl([uncut])
    degree = kl([plain]) - kl([sharper])
    text = (
        f"{model}: without the cut the KL of SAS falls from {scientific(kl([plain]))} to {scientific(kl([uncut]))}, "
        f"with degree 5 to {scientific(kl([sharper]))}; that the cut, and not the cubic, is the error is "
        f"{'supported' if cut > degree else 'contradicted'}."
    )
    return [text]


def _protection(records: Sequence[Record], model: str) -> list[str]:
    """Whether sparing the ends pays."""
    found = []
    for scheme in distinct(records, "scheme"):
        rows = select(records, scheme=scheme)
        base = next((row for row in rows if not row.cell.get("protected")), None)
        for row in rows:
            apart = None if base is None or row is base else difference(row, base)
            if base is None or apart is None:
                continue
            more = 100 * (row.metrics["bytes_per_token"] / base.metrics["bytes_per_token"] - 1)
            layers = row.cell["protected"]
            found.append(
                f"{model}, {scheme}: {layers} protected layer{'s' * (layers != 1)} at either end change KL from "
                f"{scientific(kl([base]))} to {scientific(kl([row]))} for {more:.0f} % more bytes; that the ends are "
                f"sensitive is {'supported' if apart.high < 0 else 'contradicted' if apart.low > 0 else 'not shown'}."
            )
    return found


def _slim_turbo(records: Sequence[Record], model: str) -> list[str]:
    """The two targets: beat 2-bit KV with fewer bytes, match 4-bit X at equal bytes."""
    slim = [record for record in records if record.cell.get("basis") == "k"]
    found = []
    two = [r for r in records if r.cell.get("basis") == "kv" and r.cell.get("bits") == "2"]
    if slim and two:
        best = min(two, key=lambda record: kl([record]))
        under = [r for r in slim if r.metrics["bytes_per_token"] <= best.metrics["bytes_per_token"]]
        won = [r for r in under if (d := difference(r, best)) is not None and d.high < 0]
        named = f" ({versus(min(won, key=lambda r: kl([r])), best)})" if won else ""
        found.append(
            f"{model}: {len(won)} of the {len(under)} caches of keys alone that take no more bytes than the best 2-bit "
            f"KV cache, {best.cell['scheme']}, have less KL{named}: the first target is "
            f"{'reached' if won else 'not reached'}."
        )
    yard = one(records, "x1:xquant4")
    if slim and yard:
        limit = 1.02 * yard.metrics["bytes_per_token"]
        under = [r for r in slim if r.metrics["bytes_per_token"] <= limit]
        if under:
            best = min(under, key=lambda record: kl([record]))
            apart = difference(best, yard)
            reached = kl([best]) <= kl([yard]) or (apart is not None and not apart.apart)
            found.append(
                f"{model}: of the caches of keys alone within the bytes of x1:xquant4 (and 2 %), the best against it: "
                f"{versus(best, yard)}; the second target, no worse than 4-bit X, is "
                f"{'reached' if reached else 'not reached'}."
            )
    return found


def _context(records: Sequence[Record], model: str) -> list[str]:
    """Whether the error grows along the sequence."""
    parts, grown = [], 0
    for record in records:
        values = record.metrics.get("logit_kl_by_position", ())
        if len(values) > 1 and values[0] > 0:
            ratio = values[-1] / values[0]
            grown += ratio > FLAT
            parts.append(f"{ratio:.2f} {record.cell['scheme']}")
    if not parts:
        return []
    ends = next(r.metrics["positions"] for r in records if "positions" in r.metrics)
    text = (
        f"{model}: KL of tokens {int(ends[-2])} to {int(ends[-1]) - 1} over that of tokens 0 to {int(ends[0]) - 1}: "
        f"{listed(parts)}; it grows with context in {grown} of {len(parts)}."
    )
    return [text]


def _pareto(records: Sequence[Record], model: str) -> list[str]:
    """Which ways no other beats in bytes and KL at once."""
    points = []
    for here in ways(records).values():
        size, cost = sample(here, "bytes_per_token"), sample(here, "logit_kl")
        if size is not None and cost is not None:
            points.append(
                (float(size.mean), Spread(cost.mean, 0.0, 1), described(here[0], told(records)), "")
            )
    best = front(points)
    turbo = [name for *_, name, _ in best if "flashq" in name]
    text = (
        f"{model}: of {len(points)} caches {len(best)} are on the front of bytes and KL, from the smallest: "
        f"{listed([f'{name} ({size:,.0f} bytes, {scientific(cost.mean)})' for size, cost, name, _ in best])}; "
        f"{len(turbo)} of them {'is' if len(turbo) == 1 else 'are'} TurboAttention's."
    )
    return [text]


def _answers(records: Sequence[Record], model: str) -> list[str]:
    """Which caches lose answers, by the paired test against the unquantised cache."""
    asked = [record for record in records if "accuracy" in record.metrics]
    if not asked:
        return []
    names = told(records)
    lost = [r for r in asked if r.metrics["p_value"] < LOST and r.metrics["accuracy_change"] < 0]
    parts = [f"{described(r, names)} ({100 * r.metrics['accuracy_change']:+.1f} points)" for r in lost]
    kept = f"{len(asked) - len(lost)} of {len(asked)} caches lose no answers that a paired test would see"
    found = [
        f"{model}, {asked[0].metrics['problems']} problems: {kept} (p >= {LOST})"
        + (f"; the others are {listed(parts)}." if parts else ".")
    ]
    turbo = [r for r in asked if r.cell["scheme"] == "kv:flashq4@sas"]
    for rival in ("kv:kivi4", "kv:gear_l4"):
        other = one(asked, rival)
        if turbo and other:
            test = mcnemar(turbo[0].metrics["solved_samples"], other.metrics["solved_samples"])
            found.append(
                f"{model}: kv:flashq4@sas solves {test.first} problems that {rival} does not, and {rival} "
                f"{test.second} that it does not (p = {number(test.p)})."
            )
    return found


SENTENCES: dict[str, Sentence] = {
    "main": _main,
    "components": _components,
    "selectors": _selectors,
    "tiles": _tiles,
    "buffer": _buffer,
    "sas": _sas,
    "protection": _protection,
    "slim_turbo": _slim_turbo,
    "context": _context,
    "pareto": _pareto,
}
