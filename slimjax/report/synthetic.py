"""Tables and sentences of `synthetic`: one head's attention on Gaussian numbers."""

from collections.abc import Sequence

from slimjax.records import STATUSES, Record
from slimjax.report.findings import listed, unmeasured, waiting
from slimjax.report.generic import cells_table
from slimjax.report.samples import distinct, measured, metric, select
from slimjax.report.tables import Table, scientific


def synthetic_tables(records: Sequence[Record]) -> dict[str, Table]:
    """`sas`, and `schemes`, of Gaussian numbers."""
    made = {}
    sas = [record for record in records if record.cell.get("threshold") is not None]
    emulated = [record for record in records if record.cell.get("scheme") is not None]
    if sas:
        made["sas"] = cells_table(sas, "SAS on Gaussian logits")
    if emulated:
        made["emulated"] = cells_table(emulated, "Attention on N(0, 1) queries, keys and values")
    return made


def synthetic_findings(records: Sequence[Record]) -> list[str]:
    """What SAS loses with context, and what a scheme does to one head."""
    found = [_cut(records), _emulated(records)]
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
    longest = select(records, context=last)
    uncut = metric(longest, "attention_error", threshold=0, degree=3)
    degrees = [
        (d, metric(longest, "attention_error", threshold=6, degree=d)) for d in distinct(longest, "degree")
    ]
    sharper = max(((d, e) for d, e in degrees if e is not None), default=None)
    text = (
        f"SAS at threshold 6 loses {100 * lost:.1f} % of the softmax's mass over {first:,} keys and {100 * more:.1f} % "
        f"over {last:,}, and errs by {scientific(error)} and {scientific(worse)} (relative L2 of the output)"
    )
    if uncut is None or sharper is None:
        return f"{text}."
    verdict = "supported" if worse - uncut > worse - sharper[1] else "contradicted"
    return (
        f"{text}; at {last:,} keys it errs by {scientific(uncut)} without the cut, and by {scientific(sharper[1])} "
        f"with the cut and degree {sharper[0]}: that the cut, and not the polynomial, is the error is {verdict}."
    )


def _emulated(records: Sequence[Record]) -> str:
    rows = [record for record in records if record.cell.get("scheme") and "attention_l1" in record.metrics]
    if not rows:
        return ""
    parts = [
        f"{100 * metric(rows, 'attention_cosine', scheme=scheme):.3f} % and "
        f"{metric(rows, 'attention_l1', scheme=scheme):.3g} {scheme}"
        for scheme in distinct(rows, "scheme")
    ]
    return f"One head on N(0, 1) numbers, cosine and relative L1 of its output: {listed(parts)}."
