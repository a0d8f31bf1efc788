"""Tables of the `paper` experiment: the paper's own, then a scheme per row with the chips side by side."""

from collections.abc import Sequence

from slimjax.records import Record
from slimjax.report.generic import cells_table, column
from slimjax.report.samples import by_cell, distinct, measured, metric, select, trouble
from slimjax.report.tables import UNMEASURED, Column, Table, Value

PLACES = ("model", "batch", "context", "scheme")
METRICS = (
    "cache_bytes",
    "bytes_per_token",
    "compression",
    "bytes_read_per_token",
    "operations_per_byte",
    "break_even",
)
NOTE = (
    "Trained weights take 2 bytes, solved ones 4 and are counted. Speed-ups are bounds, bytes over bandwidth or "
    "operations over peak, against bf16 keys and values, a shared cross cache kept on the chip where it fits; "
    "whether a scheme is exact is another question."
)


def paper_tables(records: Sequence[Record]) -> dict[str, Table]:
    """`table_7` and `table_7_schemes`, for each table among the records."""
    made: dict[str, Table] = {}
    for name in distinct(records, "table"):
        here = select(records, table=name)
        rows = [record for record in here if "scheme" not in record.cell]
        schemes = [record for record in here if "scheme" in record.cell]
        slug = f"table_{name}".replace("-", "_")
        if rows:
            made[slug] = cells_table(rows, f"Table {name} of arXiv 2503.05840, computed")
        if schemes:
            made[f"{slug}_schemes"] = _schemes_table(schemes, f"The models of table {name} with these caches")
    return made


def _schemes_table(records: Sequence[Record], title: str) -> Table:
    chips = distinct(records, "chip")
    places = [name for name in PLACES if name in ("model", "scheme") or len(distinct(records, name)) > 1]
    metrics = [name for name in METRICS if any(name in record.metrics for record in records)]
    index = [*PLACES, "chip"]
    gained = {tuple(map(record.cell.get, index)): record.metrics.get("speedup") for record in records}
    rows: list[tuple[Value, ...]] = []
    remarks, names = [], []
    for here in by_cell(record for record in records if "chip" not in record.cell).values():
        cell = here[0].cell
        gains = [gained.get((*map(cell.get, PLACES), chip)) for chip in chips]
        rows.append(
            (*(_plain(cell.get(name)) for name in places), *(metric(here, name) for name in metrics), *gains)
        )
        waiting = UNMEASURED if not any(map(measured, here)) else ""
        remarks.append(trouble(here) or waiting)
        names.append(f"{cell.get('model')}, {cell.get('scheme')}")
    columns = (
        *(Column(name, "text" if name in ("model", "scheme") else "plain") for name in places),
        *(column(name) for name in metrics),
        *(Column(f"speed-up, {chip}", "ratio") for chip in chips),
    )
    return Table(title, columns, tuple(rows), tuple(remarks), NOTE, tuple(names), len(places))


def _plain(value: object) -> Value:
    return value if isinstance(value, str | int | float) else None
