"""The table of `slim_rows`: every row of the paper's features and every scheme that serves it, in a line each."""

import re
from collections.abc import Mapping, Sequence

from slimjax.records import Record
from slimjax.report.findings import listed
from slimjax.report.generic import cells_table
from slimjax.report.samples import distinct, measured, select
from slimjax.report.tables import UNMEASURED, Column, Table, Value

# Where a refusal happened, which the line it stands in says already: `layer: scheme k:int16+16: `.
PLACE = re.compile(r"^layer: (scheme \S+: )?")
IDENTITY = "float64"  # exact caches: the algebra
NOTE = (
    "Relative L2 of the output of prefill and decoding against attention without a cache (a thresholded softmax: "
    "against basis kv with the same), the worst over position schemes and shapes of the layer. float64 from exact "
    "caches: the identity; the other dtypes from caches as stored."
)


def rows_tables(records: Sequence[Record]) -> dict[str, Table]:
    """`rows`, a line for each row and scheme, and `cells`, everything."""
    return {"rows": _rows_table(records), "cells": cells_table(records, "Cells of slim rows")}


def _rows_table(records: Sequence[Record]) -> Table:
    """A refusal stands once, with all that its row refuses for it, below the first scheme that it concerns."""
    dtypes = [dtype for dtype in distinct(records, "dtype") if dtype != IDENTITY]
    columns = (
        Column("row"),
        Column("what"),
        Column("scheme"),
        Column("position schemes served"),
        Column("float64 identity error", "error"),
        *(Column(f"attention error, {dtype}", "error") for dtype in dtypes),
    )
    rows: list[tuple[Value, ...]] = []
    remarks, names = [], []
    for method in distinct(records, "method"):
        name, _, what = str(method).partition(" ")
        whole = select(records, method=method)
        reasons = _reasons(whole)
        for scheme in distinct(whole, "scheme"):
            here = select(whole, scheme=scheme)
            served = distinct([record for record in here if record.metrics], "position")
            errors = (_worst(here, "attention_error", dtype) for dtype in dtypes)
            identity = _worst(here, "identity_error", IDENTITY)
            rows.append((name, what, scheme, ", ".join(map(str, served)) or None, identity, *errors))
            missing = [] if all(map(measured, here)) else [UNMEASURED]
            remarks.append(". ".join([*reasons.get(scheme, ()), *missing]))
            names.append(name)
    return Table("Rows", columns, tuple(rows), tuple(remarks), NOTE, tuple(names), 3)


def _worst(records: Sequence[Record], name: str, dtype: str) -> float | None:
    """The largest, or None where nothing is measured."""
    found = (record.metrics.get(name) for record in select(records, dtype=dtype))
    return max((value for value in found if value is not None), default=None)


def _reasons(records: Sequence[Record]) -> Mapping[str, Sequence[str]]:
    """Scheme -> the reasons that first concern it: `kr:int16 with none, alibi: refused: ...`."""
    found: dict[str, list[Record]] = {}
    for record in records:
        if record.status != "ok":
            found.setdefault(f"{record.status}: {PLACE.sub('', record.reason)}", []).append(record)
    made: dict[str, list[str]] = {}
    for reason, here in found.items():
        schemes = distinct(here, "scheme")
        where = f"{listed(schemes)} with {listed(distinct(here, 'position'))}"
        made.setdefault(schemes[0], []).append(f"{where}: {reason}")
    return made
