"""Tables as pure functions of Records, and their three forms: Markdown, CSV, LaTeX (booktabs).

A table keeps the numbers; only the forms round. Rows and columns come in a stable order: that in which
models, schemes and dtypes first appear in the records.
"""

import csv as csv_module
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from slimjax.records import Record

MISSING = "–"

Value = str | float | int | None


def scientific(value: float, digits: int = 1) -> str:
    """1.5e-3 rather than 1.5e-03."""
    mantissa, _, exponent = f"{value:.{digits}e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if value else "0"


def large(value: float) -> str:
    """A condition number: as many digits as it takes to tell 1.2 from 1.3, no more than are worth reading."""
    if value >= 1e6:
        return scientific(value)
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def change(value: float) -> str:
    """With its sign, unless all that is written of it is 0."""
    text = f"{value:+.4f}"
    return text if float(text) else "0.0000"


FORMATS: dict[str, Callable[[Any], str]] = {
    "text": str,
    "error": scientific,
    "large": large,
    "change": change,
    "bits": "{:.4f}".format,
    "percent": lambda share: f"{100 * share:.2f}",
    "tokens": "{:.1f}".format,
    "count": "{:,.0f}".format,
    "ratio": "{:.2f}×".format,
}


@dataclass(frozen=True)
class Column:
    """A column's title, with its unit, and how its numbers are written."""

    title: str
    form: str = "text"

    def write(self, value: Value) -> str:
        if value is None:
            return MISSING
        return value if isinstance(value, str) else FORMATS[self.form](value)


@dataclass(frozen=True)
class Table:
    """remarks: per row, why it lacks numbers; empty where it does not."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Value, ...], ...]
    remarks: tuple[str, ...] = ()
    note: str = ""

    def written(self) -> list[list[str]]:
        """The cells as text, rounded."""
        return [
            [column.write(value) for column, value in zip(self.columns, row, strict=True)]
            for row in self.rows
        ]

    def remark(self, row: int) -> str:
        return self.remarks[row] if self.remarks else ""


def distinct(records: Sequence[Record], name: str) -> list[Any]:
    """Values of one coordinate in the order in which they first appear."""
    return list(dict.fromkeys(record.cell[name] for record in records if record.cell.get(name) is not None))


def select(records: Sequence[Record], **cell: Any) -> list[Record]:
    """The records at the given coordinates."""
    return [
        record for record in records if all(record.cell.get(name) == value for name, value in cell.items())
    ]


def metric(records: Sequence[Record], name: str, **cell: Any) -> Any:
    """The first value of a metric among the records at the given coordinates, or None."""
    values = (record.metrics[name] for record in select(records, **cell) if name in record.metrics)
    return next(values, None)


def trouble(records: Sequence[Record]) -> str:
    """Why these records lack numbers: each status with the last reason given for it."""
    reasons: dict[str, str] = {}
    for record in records:
        if record.status != "ok":
            reasons[record.status] = record.reason
    return "; ".join(f"{status}: {reason}" for status, reason in reasons.items())


def compute_dtypes(records: Sequence[Record]) -> list[str]:
    """Dtypes with an attention error; float64 is left out, it proves the algebra rather than a precision."""
    return [dtype for dtype in distinct(records, "dtype") if dtype != "float64"]


def equivalence_table(records: Sequence[Record], model: str) -> Table:
    """One row per scheme of `model`: is its cache the same attention, and at which cost."""
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
        (Column("condition number", "large"), "condition_number", {}),
    ]
    rows, remarks = [], []
    for scheme in distinct(here, "scheme"):
        row = select(here, scheme=scheme)
        rows.append((scheme, *(metric(row, name, **cell) for _, name, cell in columns)))
        remarks.append(trouble(row))
    note = "Errors: relative L2 of the attention output against exact attention, worst layer."
    if scored:
        note += f" Bits per byte and agreement: against the exact model, {compute_dtypes(here)[0]} compute."
    titles = (Column("scheme"), *(column for column, _, _ in columns))
    return Table(f"Schemes on model {model}", titles, tuple(rows), tuple(remarks), note)


def models_table(records: Sequence[Record]) -> Table:
    """One row per model: its quality, its conditioning, what each scheme that solves with W_K makes of it."""
    solved = [
        scheme for scheme in distinct(records, "scheme") if metric(records, "condition_number", scheme=scheme)
    ]
    columns = (
        Column("model"),
        Column("training steps", "count"),
        Column("held-out bits per byte", "bits"),
        Column("condition number, worst layer", "large"),
        *(Column(f"bits per byte, change, {scheme}", "change") for scheme in solved),
    )
    rows = []
    for model in distinct(records, "model"):
        here = select(records, model=model)
        rows.append(
            (
                model,
                next((record.cell["steps"] for record in here if "steps" in record.cell), None),
                exact_bits(here),
                metric(here, "condition_number"),
                *(metric(here, "bits_per_byte_change", scheme=scheme) for scheme in solved),
            )
        )
    note = "The change is against the same model with exact attention."
    return Table("Models", columns, tuple(rows), note=note)


def exact_bits(records: Sequence[Record]) -> float | None:
    """Held-out bits per byte of a model with exact attention, from any of its records."""
    for record in records:
        if {"bits_per_byte", "bits_per_byte_change"} <= record.metrics.keys():
            return record.metrics["bits_per_byte"] - record.metrics["bits_per_byte_change"]
    return None


def markdown(table: Table) -> str:
    """A pipe table; remarks follow it, a line each."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(plain_markdown(cell) for cell in cells) + " |"

    titles = [column.title for column in table.columns]
    ruler = "|" + "|".join("---" if column.form == "text" else "---:" for column in table.columns) + "|"
    lines = [line(titles), ruler, *(line(row) for row in table.written())]
    remarks = [
        f"* {row[0]}: {remark}" for row, remark in zip(table.rows, table.remarks, strict=False) if remark
    ]
    return "\n".join(lines + ["", *map(plain_markdown, remarks)] * bool(remarks)) + "\n"


def plain_markdown(text: str) -> str:
    """Text that Markdown shows as it is, inside a table or outside."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("_", "\\_")


def csv(table: Table) -> str:
    """Full precision; a missing value is an empty field; remarks are a last column."""
    text = io.StringIO()
    writer = csv_module.writer(text, lineterminator="\n")
    writer.writerow([*(column.title for column in table.columns), "remark"])
    for index, row in enumerate(table.rows):
        writer.writerow([*("" if value is None else value for value in row), table.remark(index)])
    return text.getvalue()


_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
        "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
        "<": r"\textless{}", ">": r"\textgreater{}", MISSING: "--", "×": r"$\times$",
    }
)  # fmt: skip


def latex(table: Table) -> str:
    """A booktabs tabular, to be \\input inside a table environment; a remark fills its row."""
    wide = rf"\multicolumn{{{len(table.columns) - 1}}}{{p{{0.7\linewidth}}}}"

    def line(cells: Sequence[str], remark: str = "") -> str:
        texts = [cell.translate(_LATEX) for cell in cells]
        if remark:
            texts = [texts[0], f"{wide}{{{remark.translate(_LATEX)}}}"]
        return " & ".join(texts) + r" \\"

    shape = "".join("l" if column.form == "text" else "r" for column in table.columns)
    titles = line([column.title for column in table.columns])
    rows = [line(row, table.remark(index)) for index, row in enumerate(table.written())]
    parts = [rf"\begin{{tabular}}{{{shape}}}", r"\toprule", titles, r"\midrule", *rows, r"\bottomrule"]
    return "\n".join([*parts, r"\end{tabular}"]) + "\n"
