"""Sentences of `compare`: what each table supports or contradicts, from its figures alone.

What a sentence claims of two ways to cache rests on a paired test (`paired`), block by block of tokens or
problem by problem; where the test sees nothing the sentence says so.
"""

import math
import re
from collections.abc import Callable, Sequence

from slimjax.records import STATUSES, Record
from slimjax.report.ablation import by_window, described, told, ways
from slimjax.report.ablation_front import collected, defaults, front_sentence
from slimjax.report.ablation_slim import slim_turbo
from slimjax.report.findings import listed, unmeasured, waiting
from slimjax.report.paired import (
    LEVEL,
    bare,
    compared,
    difference,
    kl,
    one,
    ordered,
    probability,
    samples_of,
    verdict,
    versus,
)
from slimjax.report.positions import held_against, ranges, same_kl
from slimjax.report.samples import distinct, measured, select
from slimjax.report.tables import scientific
from slimjax.statistics import holm, mcnemar, paired_interval, paired_p

FLAT = 1.1  # KL up to so many times the least counts as flat
HOW = (
    "Differences of KL are paired, block by block of the same tokens (Student's t); where a sentence tests several, "
    f"their p is corrected by Holm's method, and a difference counts if that is below {LEVEL}."
)
ALL = "all studies"
Sentence = Callable[[Sequence[Record], str], list[str]]


def ablation_findings(records: Sequence[Record]) -> list[str]:
    """Study by study, model by model; of several studies, the front of them all."""
    found, studies = [], distinct(records, "study")
    for study in studies:
        here = by_window(select(records, study=study))
        for model in distinct(here, "model"):
            asked = [record for record in select(here, model=model) if "logit_kl" in record.metrics]
            if asked:
                found += SENTENCES.get(study, _none)(asked, str(model))
                found += _answers(asked, str(model))
    if len(studies) > 1:
        models = distinct(records, "model")
        found += [
            front_sentence(collected(defaults(select(records, model=m))), f"{m}, {ALL}") for m in models
        ]
    found = [HOW, *found] if any("KL" in text for text in found) else found
    found += [text for status in STATUSES if status != "ok" if (text := unmeasured(records, status))]
    found += [waiting(records)] if any(map(measured, records)) else []
    return [sentence for sentence in found if sentence]


def _none(records: Sequence[Record], model: str) -> list[str]:
    return []


def _main(records: Sequence[Record], model: str) -> list[str]:
    """The paper's order of methods, at 4 bits and at about 3; what TurboAttention costs in perplexity."""
    found = []
    for bits, schemes in (
        ("4 bits", ("kv:flashq4@sas", "kv:gear_l4", "kv:kivi4")),
        ("about 3 bits", ("kv:flashq2-4@sas", "kv:gear_l3", "kv:kivi3")),
    ):
        rows = [[record] for scheme in schemes if (record := one(records, scheme))]
        if len(rows) == len(schemes):
            held, words = ordered(rows)
            found.append(
                f"{model}, {bits}: that TurboAttention loses least, then GEAR-L, then KIVI, is {held}, by KL: {words}."
            )
    plain, turbo = one(records, "kv:bf16"), one(records, "kv:flashq4@sas")
    return found + ([_perplexity(plain, turbo, model)] if plain and turbo else [])


def _perplexity(plain: Record, turbo: Record, model: str) -> str:
    """With the interval of the change, where the likelihoods were kept block by block."""
    name, less = turbo.cell["scheme"], turbo.metrics["compression"]
    before, now = plain.metrics["perplexity"], turbo.metrics["perplexity"]
    start = f"{model}: {name} takes {less:.2f} times fewer bytes than bf16 KV"
    a, b = samples_of([turbo], "nats_blocks"), samples_of([plain], "nats_blocks")
    if a is None or b is None or not len(a) == len(b) > 1:
        return f"{start}; perplexity {now:.3f}, with bf16 KV {before:.3f}; no test of the difference."
    interval, p = paired_interval(a, b), paired_p(a, b)
    low, mean, high = (100 * math.expm1(each) for each in (interval.low, interval.mean, interval.high))
    verb = "raises" if mean > 0 else "lowers"
    what = f"{verb} perplexity from" if p < LEVEL else "does not change perplexity beyond the interval:"
    return (
        f"{start} and {what} {before:.3f} to {now:.3f} ({mean:+.2f} %, 95 % from {low:+.2f} to {high:+.2f} %, "
        f"{probability(p)})."
    )


def _components(records: Sequence[Record], model: str) -> list[str]:
    """What FlashQ and SAS cost by themselves and together; of FlashQ, its arithmetic and its bits; the options."""
    found = []
    sas, flashq, both = (one(records, each) for each in ("kv:bf16@sas", "kv:flashq4", "kv:flashq4@sas"))
    if sas and flashq and both:
        held, words = ordered([[sas], [flashq], [both]])
        found.append(
            f"{model}: that SAS costs less than FlashQ, and both more than either, is {held}, by KL: {words}."
        )
    arithmetic, bits = one(records, "kv:bf16#int8"), one(records, "kv:flashq4#float")
    if arithmetic and bits:
        (each,) = compared([([arithmetic], [bits])])
        found.append(f"{model}, halves of FlashQ, KL: {versus([arithmetic], [bits], each)}.")
    for base in (both, one(records, "kv:flashq2@sas")):
        found += [] if base is None else _choices(base, records, model)
    return found


def _choices(base: Record, records: Sequence[Record], model: str) -> list[str]:
    """The options of a scheme that the paper leaves open, each against the default."""

    def plain(record: Record) -> str:
        return re.sub(r"\([^)]*\)", "", str(record.cell["scheme"])).removesuffix("#int8")

    same = [r for r in records if plain(r) == base.cell["scheme"] and r is not base]
    others = [r for r in same if re.search(r"#int8\(|universal=|partial=", str(r.cell["scheme"]))]
    if not others:
        return []
    each = list(zip(others, compared([([other], [base]) for other in others]), strict=True))
    told_apart = [f"{r.cell['scheme']} ({t})" for r, t in each if t is not None and (t.less or t.more)]
    which = f"{listed(told_apart)} can be told from it" if told_apart else "none can be told from it"
    text = (
        f"{model}: of {len(others)} choices that the paper leaves open, by the KL they add to {base.cell['scheme']}, "
        f"{which}."
    )
    return [text]


def _selectors(records: Sequence[Record], model: str) -> list[str]:
    """Whether the paper's priority beats its rivals, share by share; of random the mean over its seeds."""
    found = []
    for scheme in distinct([r for r in records if r.cell.get("selector")], "scheme"):
        here = select(records, scheme=scheme)
        rows = {
            "heads in order" if name == "none" else name: select(here, selector=name)
            for name in distinct(here, "selector")
        }
        mine = rows.pop("priority", None)
        if not mine or not rows:
            continue
        apart = dict(zip(rows, compared([(mine, rival) for rival in rows.values()]), strict=True))
        order = sorted({"priority": mine, **rows}.items(), key=lambda item: kl(item[1]))
        numbers = listed([f"{scientific(kl(each))} {name}" for name, each in order])
        beaten = [f"{name} ({each})" for name, each in apart.items() if each is not None and each.less]
        better = [f"{name} ({each})" for name, each in apart.items() if each is not None and each.more]
        rest = [name for name, each in apart.items() if each is None or not (each.less or each.more)]
        parts = [
            f"contradicted by {listed(better)}" if better else "",
            f"supported against {listed(beaten)}" if beaten else "",
            f"not told from {listed(rest)}" if rest else "",
        ]
        found.append(
            f"{model}, {scheme}: KL {numbers}; that priority chooses best is {'; '.join(filter(None, parts))}."
        )
    return found + _corrections(records, model)


def _corrections(records: Sequence[Record], model: str) -> list[str]:
    """What a correction of every tile at a low rank is worth: against the same codec without one."""
    pairs = [
        (record, base)
        for record in records
        if "rank=" in str(record.cell["scheme"])
        and (base := next(iter(select(records, scheme=bare(str(record.cell["scheme"])))), None))
    ]
    found = []
    for (record, base), each in zip(pairs, compared([([a], [b]) for a, b in pairs]), strict=True):
        more = 100 * (record.metrics["bytes_per_token"] / base.metrics["bytes_per_token"] - 1)
        found.append(
            f"{model}, correction of tiles, for {more:+.0f} % bytes: {versus([record], [base], each)}."
        )
    return found


def _flat(records: Sequence[Record], model: str, claim: str) -> list[str]:
    """Whether KL stays about the same over all rows: the largest against the least, among all pairs (Bonferroni)."""
    groups = list(ways(records).values())
    if len(groups) < 2:
        return []
    names = told(records)
    low, high = (pick(groups, key=kl) for pick in (min, max))
    pairs = math.comb(len(groups), 2)
    apart = difference(high, low, 1 - LEVEL / pairs)
    ratio = kl(high) / max(kl(low), 1e-12)
    if apart is None:
        held = "not tested"
    elif apart.high <= (FLAT - 1) * kl(low):
        held = f"supported (within {100 * (FLAT - 1):.0f} %)"
    elif apart.low > 0 and ratio > FLAT:
        held = "contradicted"
    else:
        held = "neither supported nor contradicted"
    spread = (
        ""
        if apart is None
        else f" (difference {scientific(apart.mean)}, from {scientific(apart.low)} to {scientific(apart.high)} at 95 % "
        f"for all {pairs} pairs together)"
        if pairs > 1
        else f" (difference {scientific(apart.mean)}, 95 % from {scientific(apart.low)} to {scientific(apart.high)})"
    )
    text = (
        f"{model}: KL from {scientific(kl(low))} ({described(low[0], names)}) to {scientific(kl(high))} "
        f"({described(high[0], names)}), {ratio:.2f} times as much{spread}; that {claim} is {held}."
    )
    return [text]


def _tiles(records: Sequence[Record], model: str) -> list[str]:
    found = []
    for bits in distinct(records, "bits"):
        here = select(records, bits=bits)
        found += _flat(here, f"{model}, {bits} bits", "the size of a tile does not matter from 32 to 128")
    return found


def _buffer(records: Sequence[Record], model: str) -> list[str]:
    found = []
    for bits in distinct(records, "bits"):
        here = select(records, bits=bits)
        found += _flat(
            here, f"{model}, {bits} bits", "neither the buffer's size nor its universal scale matters"
        )
        base = one(here, f"kv:flashq{bits}")
        found += [] if base is None else _choices(base, here, model)
    return found


def _sas(records: Sequence[Record], model: str) -> list[str]:
    """The cut against the polynomial, on a model."""
    plain, uncut, sharper = (one(records, f"kv:bf16@sas{args}") for args in ("", "(0,3)", "(6,5)"))
    uncut = uncut or one(records, "kv:bf16@sas(0)")
    if not plain or not uncut or not sharper:
        return []
    (each,) = compared([([uncut], [sharper])])
    text = (
        f"{model}: the KL of SAS is {scientific(kl([plain]))}, without the cut {scientific(kl([uncut]))}, with degree "
        f"5 {scientific(kl([sharper]))}; that the cut, and not the cubic, is the error is {verdict(each)}: "
        f"{versus([uncut], [sharper], each)}."
    )
    return [text]


def _protection(records: Sequence[Record], model: str) -> list[str]:
    """Whether sparing the ends pays, and more than sparing as many layers in the middle."""
    found = []
    for scheme in distinct(records, "scheme"):
        rows = select(records, scheme=scheme)
        bases = [row for row in rows if not row.cell.get("protected")]
        ends = [row for row in rows if row.cell.get("protected") and row.cell.get("protect") != "middle"]
        tests = compared([([row], bases[:1]) for row in ends]) if bases else []
        for row, each in zip(ends, tests, strict=False):
            more = 100 * (row.metrics["bytes_per_token"] / bases[0].metrics["bytes_per_token"] - 1)
            layers = row.cell["protected"]
            which = "1 protected layer" if layers == 1 else f"{layers} protected layers"
            found.append(
                f"{model}, {scheme}: with {which} at either end KL is {scientific(kl([row]))}, without "
                f"{scientific(kl(bases[:1]))} ({each or 'not tested'}), for {more:.0f} % more bytes; that it helps is "
                f"{verdict(each)}."
            )
        found += _middle(ends, rows, f"{model}, {scheme}")
    return found


def _middle(ends: Sequence[Record], rows: Sequence[Record], start: str) -> list[str]:
    """The ends against as many layers in the middle."""
    pairs = [
        (row, other)
        for row in ends
        for other in rows
        if other.cell.get("protect") == "middle" and other.cell.get("protected") == row.cell.get("protected")
    ]
    tests = compared([([row], [other]) for row, other in pairs])
    return [
        f"{start}: with {2 * row.cell['protected']} protected layers KL is {scientific(kl([row]))} at the ends, "  # type: ignore[operator]
        f"{scientific(kl([other]))} in the middle ({each or 'not tested'}); that the ends are the sensitive ones is "
        f"{verdict(each)}."
        for (row, other), each in zip(pairs, tests, strict=True)
    ]


def _context(records: Sequence[Record], model: str) -> list[str]:
    """Whether KL grows along the windows: the last range of positions against an early one."""
    found = [(record, both) for record in records if (both := held_against(ranges(record)))]
    if not found:
        return []
    (first, last), names = found[0][1], told(records)
    ends = first.ends, last.ends
    asked = [(r, early, late) for r, (early, late) in found if (early.ends, late.ends) == ends]
    ps = [same_kl(early, late) for _, early, late in asked]
    corrected = iter(holm([p for p in ps if p is not None]))
    parts, grown, fallen = [], 0, 0
    for (record, early, late), p in zip(asked, ps, strict=True):
        whole = None if p is None else next(corrected)
        sure = whole is not None and whole < LEVEL
        grown, fallen = grown + (sure and late.kl > early.kl), fallen + (sure and late.kl < early.kl)
        ratio = f"{late.kl / early.kl:.2f}" if early.kl > 0 else "-"
        test = "not tested" if whole is None else probability(whole)
        parts.append(f"{ratio} {described(record, names)} ({test})")
    text = (
        f"{model}: KL of {last} over that of {first}, by Welch's t over blocks, p by Holm: {listed(parts)}; it grows "
        f"with context in {grown} of {len(asked)}, falls in {fallen}, and is not told apart in the others."
    )
    return [text]


def _pareto(records: Sequence[Record], model: str) -> list[str]:
    return [front_sentence(collected(defaults(records)), model)]


def _answers(records: Sequence[Record], model: str) -> list[str]:
    """Which caches lose answers, by the paired test against the unquantised cache, corrected for their number."""
    asked = [record for record in records if "accuracy" in record.metrics]
    if not asked:
        return []
    names = told(records)
    each = list(zip(asked, holm([r.metrics["p_value"] for r in asked]), strict=True))
    lost = [(r, p) for r, p in each if p < LEVEL and r.metrics["accuracy_change"] < 0]
    parts = [
        f"{described(r, names)} ({100 * r.metrics['accuracy_change']:+.1f} points, {probability(p)})"
        for r, p in lost
    ]
    kept = (
        f"of {len(asked)} caches {len(asked) - len(lost)} lose no answers that McNemar's test would see "
        "(p by Holm)"
    )
    others = f"; {listed(parts)} {'does' if len(lost) == 1 else 'do'}" if parts else ""
    return [f"{model}, {asked[0].metrics['problems']} problems: {kept}{others}.", *_rivals(asked, model)]


def _rivals(asked: Sequence[Record], model: str) -> list[str]:
    """TurboAttention's answers against its rivals', pair by pair."""
    turbo = one(asked, "kv:flashq4@sas")
    others = [other for scheme in ("kv:kivi4", "kv:gear_l4") if (other := one(asked, scheme))]
    if turbo is None or not others:
        return []
    tests = [mcnemar(turbo.metrics["solved_samples"], r.metrics["solved_samples"]) for r in others]
    found, mine = [], turbo.cell["scheme"]
    for other, test, p in zip(others, tests, holm([test.p for test in tests]), strict=True):
        rival = other.cell["scheme"]
        better = "it solves more" if test.first > test.second else "it solves fewer"
        found.append(
            f"{model}: {mine} solves {test.first} problems that {rival} does not, and {rival} {test.second} that it "
            f"does not ({probability(p)}{' by Holm' * (len(tests) > 1)}): "
            f"{better if p < LEVEL else 'they cannot be told apart'}."
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
    "slim_turbo": slim_turbo,
    "context": _context,
    "pareto": _pareto,
}
