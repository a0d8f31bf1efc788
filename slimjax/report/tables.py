"""Tables and their three forms: Markdown, CSV, LaTeX (booktabs). A table keeps the numbers; only the forms round."""

import csv as csv_module
import io
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from slimjax.report.samples import Spread

MISSING = "–"
UNMEASURED = "not measured yet"

Value = str | float | int | Spread | None


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


def number(value: float) -> str:
    """Any size, four digits at least."""
    if value and not 1e-3 <= abs(value) < 1e9:
        return scientific(value, 3)
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"


def difference(value: float) -> str:
    """`number` with its sign."""
    return f"+{number(value)}" if value > 0 else number(value)


FORMATS: dict[str, Callable[[Any], str]] = {
    "text": str,
    "plain": str,
    "error": scientific,
    "large": large,
    "change": change,
    "bits": "{:.4f}".format,
    "percent": lambda share: f"{100 * share:.2f}",
    "tokens": "{:.1f}".format,
    "count": "{:,.0f}".format,
    "ratio": "{:.2f}×".format,
    "number": number,
    "difference": difference,
    "relative": lambda share: difference(100 * share),
}


@dataclass(frozen=True)
class Column:
    """A column's title, with its unit, and how its numbers are written."""

    title: str
    form: str = "text"

    def write(self, value: Value, seeds: int = 1) -> str:
        """seeds: how many its row has; a number of fewer says so."""
        if value is None:
            return MISSING
        if isinstance(value, str):
            return value
        form = FORMATS[self.form]
        if not isinstance(value, Spread):
            return form(value)
        spread = f" ± {form(value.deviation).lstrip('+')}" if value.deviation else ""
        return f"{form(value.mean)}{spread}" + (f" (n = {value.n})" if value.n < seeds else "")


@dataclass(frozen=True)
class Table:
    """remarks: per row, why it lacks numbers, empty where it does not; names: per row, what a remark calls it."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Value, ...], ...]
    remarks: tuple[str, ...] = ()
    note: str = ""
    names: tuple[str, ...] = ()
    labels: int = 1  # leading columns that say which row this is
    seeds: tuple[int, ...] = ()  # per row, how many it has; a number of fewer says so

    def written(self) -> list[list[str]]:
        """The cells as text, rounded."""
        return [
            [column.write(value, seeds) for column, value in zip(self.columns, row, strict=True)]
            for row, seeds in zip(self.rows, self.seeds or (1,) * len(self.rows), strict=True)
        ]

    def remark(self, row: int) -> str:
        return self.remarks[row] if self.remarks else ""

    def name(self, row: int) -> str:
        return self.names[row] if self.names else str(self.rows[row][0])

    def empty(self, row: int) -> bool:
        """Whether the row has no number at all, so that a remark may take their place."""
        return all(value is None for value in self.rows[row][self.labels :])


SEEDS_NOTE = "± is the standard deviation over seeds (n - 1), left out where all are equal."


def with_seeds(table: Table, seeds: Sequence[int]) -> Table:
    """The table with a column of how many seeds each row has, if any row has several; else single numbers."""
    several = max(seeds, default=1) > 1
    rows = tuple(
        (*row[: table.labels], *([count] if several else []), *row[table.labels :])
        if several
        else tuple(value.mean if isinstance(value, Spread) else value for value in row)
        for row, count in zip(table.rows, seeds, strict=True)
    )
    column = (Column("seeds (n)", "count"),) if several else ()
    return Table(
        table.title,
        (*table.columns[: table.labels], *column, *table.columns[table.labels :]),
        rows,
        table.remarks,
        f"{table.note} {SEEDS_NOTE}".strip() if several else table.note,
        table.names,
        table.labels + several,
        tuple(seeds) if several else (),
    )


def markdown(table: Table) -> str:
    """A pipe table; remarks follow it, a line each."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(plain_markdown(cell) for cell in cells) + " |"

    titles = [column.title for column in table.columns]
    ruler = "|" + "|".join("---" if column.form == "text" else "---:" for column in table.columns) + "|"
    lines = [line(titles), ruler, *(line(row) for row in table.written())]
    remarks = [f"* {table.name(row)}: {remark}" for row, remark in enumerate(table.remarks) if remark]
    return "\n".join(lines + ["", *map(plain_markdown, remarks)] * bool(remarks)) + "\n"


def aligned(text: str) -> str:
    """A written pipe table with its columns padded, for a terminal; its remarks as they are."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    if not rows:
        return text
    right = [part.endswith(":") for part in text.splitlines()[1].strip("|").split("|")]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def padded(row: Sequence[str]) -> str:
        parts = zip(row, widths, right, strict=True)
        return "  ".join(part.rjust(width) if end else part.ljust(width) for part, width, end in parts)

    remarks = [line for line in text.splitlines() if not line.startswith("|")]
    return "\n".join([*map(str.rstrip, map(padded, rows)), *remarks]).replace("\\_", "_")


def plain_markdown(text: str) -> str:
    """Text that Markdown shows as it is, inside a table or outside."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("_", "\\_")


def csv(table: Table) -> str:
    """Full precision; a missing value is an empty field; remarks are a last column.

    A column with several seeds is three: mean, standard deviation, n.
    """
    spread = [any(isinstance(row[i], Spread) for row in table.rows) for i in range(len(table.columns))]

    def fields(value: Value, wide: bool) -> list[Any]:
        if isinstance(value, Spread):
            return [value.mean, value.deviation if value.n > 1 else "", value.n]
        return ["" if value is None else value, *([""] * (2 * wide))]

    def heads(title: str, wide: bool) -> list[str]:
        return [title, *((f"{title}: standard deviation", f"{title}: n") if wide else ())]

    text = io.StringIO()
    writer = csv_module.writer(text, lineterminator="\n")
    titles = [column.title for column in table.columns]
    writer.writerow([*itertools.chain(*map(heads, titles, spread)), "remark"])
    for index, row in enumerate(table.rows):
        writer.writerow([*itertools.chain(*map(fields, row, spread)), table.remark(index)])
    return text.getvalue()


_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
        "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
        "<": r"\textless{}", ">": r"\textgreater{}", MISSING: "--", "×": r"$\times$", "±": r"$\pm$",
        "−": "$-$",
    }
)  # fmt: skip


def latex(table: Table) -> str:
    """A booktabs tabular, to be \\input inside a table environment.

    A remark fills the row that has no numbers; it follows a row that has some.
    """
    wide = rf"\multicolumn{{{len(table.columns) - table.labels}}}{{p{{0.7\linewidth}}}}"

    def line(cells: Sequence[str]) -> str:
        return " & ".join(cell.translate(_LATEX) for cell in cells) + r" \\"

    def lines(index: int, cells: Sequence[str]) -> list[str]:
        remark = table.remark(index).translate(_LATEX)
        if not remark:
            return [line(cells)]
        places = cells[: table.labels] if table.empty(index) else [""] * table.labels
        alone = " & ".join([*(place.translate(_LATEX) for place in places), f"{wide}{{{remark}}}"]) + r" \\"
        return [alone] if table.empty(index) else [line(cells), alone]

    shape = "".join("l" if column.form == "text" else "r" for column in table.columns)
    titles = line([column.title for column in table.columns])
    rows = [text for index, row in enumerate(table.written()) for text in lines(index, row)]
    parts = [rf"\begin{{tabular}}{{{shape}}}", r"\toprule", titles, r"\midrule", *rows, r"\bottomrule"]
    return "\n".join([*parts, r"\end{tabular}"]) + "\n"
