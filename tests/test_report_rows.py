"""The table of `slim_rows`: a line for each row and scheme, the worst number of all, a reason once."""

from slimjax.records import Record
from slimjax.report import report_tables, tables

REASON = "layer: scheme {}: position scheme 'none' rotates no keys; use k"


def row(
    scheme: str, position: str, dtype: str, error: float | None, method: str = "S9 rotated, D > E"
) -> Record:
    cell = {
        "experiment": "slim_rows",
        "method": method,
        "scheme": scheme,
        "position": position,
        "dtype": dtype,
    }
    if error is None:
        return Record(cell, status="refused", reason=REASON.format(scheme))
    return Record(cell, {"identity_error" if dtype == "float64" else "attention_error": error})


RECORDS = [
    row("k:int16", "none", "float32", 3e-4, "S1 K-cache"),
    *(row(scheme, "none", "float64", None) for scheme in ("kr:int16", "kr:int8")),
    row("kr:int16", "rope", "float64", 1e-15),
    row("kr:int16", "rope", "float32", 1e-4),
    row("kr:int16", "interleaved", "float64", 3e-15),
    row("kr:int16", "interleaved", "float32", 5e-5),
]


def test_a_line_holds_the_worst_of_its_cells_and_what_is_served():
    table = report_tables(RECORDS)["rows"]
    assert [column.title for column in table.columns][-2:] == [
        "float64 identity error",
        "attention error, float32",
    ]
    none = tables.MISSING
    assert table.written() == [
        ["S1", "K-cache", "k:int16", "none", none, "3.0e-4"],
        ["S9", "rotated, D > E", "kr:int16", "rope, interleaved", "3.0e-15", "1.0e-4"],
        ["S9", "rotated, D > E", "kr:int8", none, none, none],
    ]


def test_a_reason_stands_once_without_the_scheme_it_repeats():
    table = report_tables(RECORDS)["rows"]
    reason = "refused: position scheme 'none' rotates no keys; use k"
    assert table.remarks == ("", f"kr:int16 and kr:int8 with none: {reason}", "")
    assert tables.markdown(table).count("rotates no keys") == 1


def test_planned_cells_are_said_to_be_missing():
    table = report_tables([*RECORDS, Record(dict(row("kr:int8", "rope", "float32", 1.0).cell))])["rows"]
    assert table.remark(2) == tables.UNMEASURED
