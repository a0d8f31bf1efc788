"""Sentences of `slim_turbo`: whether keys alone in few bits reach their targets, and if not what the front is.

Targets: less KL than each of the 2-bit caches of keys and values at fewer bytes; no more than 4-bit X at equal bytes.
"""

from collections.abc import Sequence

from slimjax.records import Record
from slimjax.report.ablation import described, told, ways
from slimjax.report.ablation_front import bytes_of, collected
from slimjax.report.findings import listed
from slimjax.report.paired import Compared, compared, kl, one, versus
from slimjax.report.samples import select
from slimjax.report.tables import scientific

RIVALS = ("kv:flashq2", "kv:kivi2")
YARD = "x1:xquant4"
EQUAL = 1.02  # times the bytes that still count as equal
SLIM = ("k", "kr")
Group = Sequence[Record]


def slim_turbo(records: Sequence[Record], model: str) -> list[str]:
    """Both targets, and the front where one is not reached."""
    slim = [group for group in ways(records).values() if group[0].cell.get("basis") in SLIM]
    if not slim:
        return []
    first, reached = _below_two_bits(slim, records, model)
    second, equal = _equal_bytes(slim, records, model)
    found = [text for text in (first, second) if text]
    if found and not (reached and equal):
        found += [_front(records, model), *_why(records, model)]
    return [text for text in found if text]


def _below_two_bits(slim: Sequence[Group], records: Sequence[Record], model: str) -> tuple[str, bool]:
    """Every slim cache of fewer bytes against every rival by name, as one family of tests."""
    rivals = [[record] for scheme in RIVALS if (record := one(records, scheme))]
    if len(rivals) < len(RIVALS):
        return "", True
    pairs = [(group, rival) for rival in rivals for group in slim if bytes_of(group) < bytes_of(rival)]
    found = list(zip(pairs, compared(pairs), strict=True))
    parts, winners = [], [set[int](), set[int]()]
    for index, rival in enumerate(rivals):
        here = [(group, each) for (group, other), each in found if other is rival]
        winners[index] = {id(group) for group, each in here if each is not None and each.less}
        parts.append(_against(here, rival, winners[index]))
    both = [group for group in slim if all(id(group) in won for won in winners)]
    verdict = "reached" if both else "not reached"
    by = f" by {listed([described(group[0], told(records)) for group in both])}" if both else ""
    text = (
        f"{model}, keys alone at fewer bytes than 2-bit keys and values: {'; '.join(parts)}; the target, less KL than "
        f"each of {listed(list(RIVALS))} at fewer bytes, is {verdict}{by}."
    )
    return text, bool(both)


def _against(here: Sequence[tuple[Group, Compared | None]], rival: Group, won: set[int]) -> str:
    """Of the slim caches smaller than a rival, how many beat it, and the best of them beside it."""
    name, size = rival[0].cell["scheme"], bytes_of(rival)
    if not here:
        return f"none is smaller than {name} ({size:,.0f} bytes per token)"
    best, each = min(here, key=lambda pair: kl(pair[0]))
    return (
        f"of {len(here)} smaller than {name} ({size:,.0f} bytes per token) {len(won)} "
        f"{'has' if len(won) == 1 else 'have'} less KL, the best of all ({bytes_of(best):,.0f} bytes): "
        f"{versus(best, rival, each)}"
    )


def _equal_bytes(slim: Sequence[Group], records: Sequence[Record], model: str) -> tuple[str, bool]:
    """The slim caches within the bytes of 4-bit X against it."""
    yard = one(records, YARD)
    if yard is None:
        return "", True
    limit = EQUAL * bytes_of([yard])
    under = [group for group in slim if bytes_of(group) <= limit]
    start = f"{model}, keys alone within the bytes of {YARD} ({bytes_of([yard]):,.0f} per token, and 2 %)"
    if not under:
        return f"{start}: none; the target, no more KL than 4-bit X at equal bytes, is not reached.", False
    found = compared([(group, [yard]) for group in under])
    best, each = min(zip(under, found, strict=True), key=lambda pair: kl(pair[0]))
    if each is None:
        verdict = "not tested"
    elif each.more:
        verdict = "not reached"
    else:
        verdict = (
            "reached" if each.less else "neither reached nor missed: the difference is within the interval"
        )
    text = (
        f"{start}: the best of {len(under)} ({bytes_of(best):,.0f} bytes): {versus(best, [yard], each)}; the target, "
        f"no more KL than 4-bit X at equal bytes, is {verdict}."
    )
    return text, verdict == "reached"


def _front(records: Sequence[Record], model: str) -> str:
    """What is attainable."""
    found = collected(records)
    parts = [
        f"{described(group[0], found.names)} ({bytes_of(group):,.0f} bytes, {scientific(kl(group))})"
        for group in found.best
    ]
    slim = sum(group[0].cell.get("basis") in SLIM for group in found.best)
    return (
        f"{model}: the front of bytes and KL is {listed(parts)}; {slim} of {len(parts)} "
        f"{'is' if slim == 1 else 'are'} of keys alone."
    )


def _why(records: Sequence[Record], model: str) -> list[str]:
    """What the map from keys to values adds: with the same codes of keys, and with keys stored as good as exactly."""
    found = []
    bits = [
        str(record.cell["bits"])
        for record in select(records, basis="k", codec="flashq")
        if record.cell.get("bits")
    ]
    pairs = [
        ([mine], [whole])
        for each in dict.fromkeys(bits)
        if (
            mine := next(
                (r for r in select(records, basis="k", codec="flashq", bits=each, softmax="exact")), None
            )
        )
        and (whole := one(records, f"kv:flashq{each}"))
    ]
    if pairs:
        parts = [versus(*pair, each) for pair, each in zip(pairs, compared(pairs), strict=True)]
        found.append(
            f"{model}, the same codes of keys, values of their own or by the map from keys: {'; '.join(parts)}."
        )
    fine = [r for r in select(records, basis="k") if r.cell.get("codec") in ("int16", "float32", "bf16")]
    rough = [r for r in select(records, basis="k", codec="flashq") if r.cell.get("bits") in ("4", "3", "2")]
    if fine and rough:
        least, best = min(fine, key=lambda r: kl([r])), min(rough, key=lambda r: kl([r]))
        (each,) = compared([([least], [best])])
        if each is not None and each.less and kl([least]) < kl([best]) / 2:
            found.append(
                f"{model}, why: {versus([least], [best], each)}: most of the KL comes with the rounding of the keys, "
                "which the map passes on to the values."
            )
    return found
