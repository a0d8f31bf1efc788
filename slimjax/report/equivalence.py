"""Tables that ask whether a scheme's cache is the same attention: schemes of one model, models side by side.

Rows and columns come in a stable order: that in which models, schemes and dtypes first appear in the records.
"""

from collections.abc import Sequence

from slimjax.records import Record
from slimjax.report.samples import Spread, distinct, measured, metric, sample, seed_of, seeds, select, trouble
from slimjax.report.tables import UNMEASURED, Column, Table, with_seeds


def compute_dtypes(records: Sequence[Record]) -> list[str]:
    """Dtypes with an attention error; float64 is left out, it proves the algebra rather than a precision."""
    return [dtype for dtype in distinct(records, "dtype") if dtype != "float64"]


def equivalence_table(records: Sequence[Record], model: str) -> Table:
    """One row per scheme: is its cache the same attention on `model`, and at which cost."""
    here = select(records, model=model)
    n, generated, sequences = (metric(here, name) for name in ("count", "generated", "sequences"))
    scored = "" if n is None else f" (n = {n:,})"
    greedy = "" if generated is None else f" of {generated}, n = {sequences}"
    columns: list[tuple[Column, str, dict[str, str]]] = [
        (Column("float64 identity error", "error"), "identity_error", {}),
        *(
            (Column(f"attention error, {dtype}", "error"), "attention_error", {"dtype": dtype})
            for dtype in compute_dtypes(here)
        ),
        (Column(f"bits per byte, change{scored}", "change"), "bits_per_byte_change", {}),
        (Column(f"top-1 agreement, %{scored}", "percent"), "top1_agreement", {}),
        (Column(f"greedy agreement (tokens{greedy})", "tokens"), "greedy_agreement", {}),
        (Column("cache (bytes per token)", "count"), "bytes_per_token", {}),
        (Column("bf16 KV / this cache", "ratio"), "compression", {}),
        (Column("condition number of W_K (k) or W_V (v)", "large"), "condition_number", {}),
    ]
    rows, remarks, counts = [], [], []
    for scheme in distinct(here, "scheme"):
        row = select(here, scheme=scheme)
        rows.append((scheme, *(sample(row, name, **cell) for _, name, cell in columns)))
        remarks.append(_remark(row))
        counts.append(len(seeds(filter(measured, row))))
    note = "Errors: relative L2 of the attention output against exact attention, worst layer."
    if scored:
        note += f" Bits per byte and agreement: against the exact model, {compute_dtypes(here)[0]} compute."
    titles = (Column("scheme"), *(column for column, _, _ in columns))
    table = Table(f"Schemes on model {model}", titles, tuple(rows), tuple(remarks), note)
    return with_seeds(table, counts)


def _remark(row: Sequence[Record]) -> str:
    """What is wrong or still missing in a row."""
    waiting = [record for record in row if not measured(record)]
    missing = UNMEASURED if len(waiting) == len(row) else f"{len(waiting)} of {len(row)} cells {UNMEASURED}"
    return "; ".join(part for part in (trouble(row), missing if waiting else "") if part)


def models_table(records: Sequence[Record]) -> Table:
    """One row per model: its quality, its conditioning, what each scheme that solves with W_K makes of it."""
    solved = [
        scheme for scheme in distinct(records, "scheme") if metric(records, "condition_number", scheme=scheme)
    ]
    columns = (
        Column("model"),
        Column("training steps", "count"),
        Column("held-out bits per byte", "bits"),
        Column("condition number of W_K, worst layer", "large"),
        *(Column(f"bits per byte, change, {scheme}", "change") for scheme in solved),
    )
    rows, counts = [], []
    for model in distinct(records, "model"):
        here = select(records, model=model)
        rows.append(
            (
                model,
                next((record.cell["steps"] for record in here if "steps" in record.cell), None),
                exact_bits(here),
                sample(here, "condition_number", basis="k"),
                *(sample(here, "bits_per_byte_change", scheme=scheme) for scheme in solved),
            )
        )
        counts.append(len(seeds(filter(measured, here))))
    note = "The change is against the same model with exact attention."
    return with_seeds(Table("Models", columns, tuple(rows), note=note), counts)


def exact_bits(records: Sequence[Record]) -> Spread | None:
    """Held-out bits per byte of a model with exact attention, over its seeds, from any of its records."""
    values: dict[object, float] = {}
    for record in records:
        if {"bits_per_byte", "bits_per_byte_change"} <= record.metrics.keys():
            exact = record.metrics["bits_per_byte"] - record.metrics["bits_per_byte_change"]
            values.setdefault(seed_of(record), exact)
    return Spread.of(list(values.values())) if values else None
