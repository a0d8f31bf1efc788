"""Tables of `slim_whisper`'s layers, several to a row: schemes, arithmetics and thresholds by their worst layer."""

from collections.abc import Callable, Mapping, Sequence

from slimjax.records import Record
from slimjax.report.samples import distinct, measured, select, trouble
from slimjax.report.slim import PLAIN, TOLERATED, errors, size
from slimjax.report.tables import UNMEASURED, Column, Table, Value, scientific

Kinds = Mapping[str, Sequence[Record]]  # "self" and "cross" -> the records of those layers
WITHIN = Column(f"layers within {scientific(TOLERATED, 0)}", "plain")


def worst_table(experiment: str, records: Sequence[Record]) -> Table | None:
    """The table of one of the experiments on layers; None for any other experiment."""
    return _TABLES[experiment](records) if experiment in _TABLES else None


def _kinds(records: Sequence[Record]) -> dict[str, list[Record]]:
    return {kind: select(records, attention=kind) for kind in distinct(records, "attention")}


def _rows(
    records: Sequence[Record], name: str, row: Callable[[Sequence[Record], Kinds], tuple[Value, ...]]
) -> tuple[tuple[tuple[Value, ...], ...], tuple[str, ...]]:
    """A row for each value of the coordinate `name` (and each model, where there are several), with its remark."""
    rows, remarks = [], []
    models = distinct(records, "model")
    for model in models:
        for value in distinct(select(records, model=model), name):
            here = select(records, model=model, **{name: value})
            title = str(value) if len(models) == 1 else f"{model}, {value}"
            rows.append((title, *row(here, _kinds(here))))
            remarks.append(trouble(here) or ("" if any(map(measured, here)) else UNMEASURED))
    return tuple(rows), tuple(remarks)


def _worst(kind: Sequence[Record], name: str = "value_error") -> float | None:
    return max(errors(kind, str(kind[0].cell["scheme"]), name), default=None)


def _mean(kind: Sequence[Record], name: str) -> float | None:
    found = errors(kind, str(kind[0].cell["scheme"]), name)
    return sum(found) / len(found) if found else None


def _within(records: Sequence[Record]) -> str | None:
    found = [record.metrics.get("value_error") for record in records]
    known = [error for error in found if error is not None]
    return (
        f"{sum(error <= TOLERATED for error in known)} of {len(known)}" if len(known) == len(found) else None
    )


def _sized(records: Sequence[Record], kinds: Kinds) -> int | None:
    sizes = [size(kind, str(records[0].cell["scheme"])) for kind in kinds.values()]
    return None if None in sizes else sum(each for each in sizes if each is not None)


def _layers(records: Sequence[Record]) -> Table:
    def row(here: Sequence[Record], kinds: Kinds) -> tuple[Value, ...]:
        plain = _kinds(select(records, model=here[0].cell.get("model"), scheme=PLAIN))
        now, then = _sized(here, kinds), _sized(select(records, scheme=PLAIN), plain) if plain else None
        ratio = then / now if now and then else None
        pairs = [_worst(kind, name) for kind in kinds.values() for name in ("exact_error", "value_error")]
        return now, ratio, *pairs, _within(here)

    rows, remarks = _rows(records, "scheme", row)
    columns = (
        Column("scheme"),
        Column("cache (bytes per token, all layers)", "count"),
        Column("bf16 KV / this cache", "ratio"),
        *(
            Column(f"{which}, {kind}", "error")
            for kind in _kinds(records)
            for which in ("exact inverse", "chosen map")
        ),
        WITHIN,
    )
    note = (
        "Relative L2 of keys or values, whichever is larger, as attention reads them, on held-out speech; worst layer. "
        "Exact inverse: of V, the map that needs no calibration."
    )
    return Table("Errors of layers", columns, rows, remarks, note)


def _products(records: Sequence[Record]) -> Table:
    def row(here: Sequence[Record], kinds: Kinds) -> tuple[Value, ...]:
        return *(_worst(kind) for kind in kinds.values()), _within(here)

    rows, remarks = _rows(records, "compute", row)
    columns = (
        Column("rows times W_KV in"),
        *(Column(f"value error, {kind}", "error") for kind in _kinds(records)),
        WITHIN,
    )
    note = (
        f"All rows: {', '.join(map(str, distinct(records, 'scheme')))}, the same maps. Relative L2 of V on held-out "
        "speech, worst layer. What an accelerator does by default is emulated."
    )
    return Table("Arithmetic of the product with the map", columns, rows, remarks, note)


# What may be spared -> the title of its column. A group of one is a head.
SKIPS = {"skipped_by_head": "by a head", "skipped_by_group": "by a group", "skipped_by_all": "by all heads"}


def _sparse(records: Sequence[Record]) -> Table:
    grouped = any(r.metrics.get("skipped_by_group") != r.metrics.get("skipped_by_head") for r in records)
    skips = {name: title for name, title in SKIPS.items() if grouped or name != "skipped_by_group"}

    def row(here: Sequence[Record], kinds: Kinds) -> tuple[Value, ...]:
        found: list[Value] = []
        for kind in kinds.values():
            found += [_worst(kind, "attention_error"), *(_mean(kind, name) for name in skips)]
        return tuple(found)

    rows, remarks = _rows(records, "scheme", row)
    columns = [Column("scheme")]
    for kind in _kinds(records):
        columns.append(Column(f"attention error, {kind}", "error"))
        columns += [Column(f"skipped {title}, %, {kind}", "percent") for title in skips.values()]
    note = (
        "Error: relative L2 of the attention output against exact attention on held-out speech, worst layer. Skipped: "
        "share of visible (query, key) pairs whose weight is below the threshold, mean of the layers, all clips; by a "
        "head: what kv and option 1 need not read or multiply, and option 2 not multiply; by all heads: what option 2 "
        "need not read."
    )
    return Table("Thresholded softmax", tuple(columns), rows, remarks, note)


_TABLES: dict[str, Callable[[Sequence[Record]], Table]] = {
    "whisper_layers": _layers,
    "whisper_products": _products,
    "whisper_sparse": _sparse,
}
