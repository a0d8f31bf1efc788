"""Reports: pure functions of Records. `write_report` rebuilds every file of a report without measuring anything.

`tables` makes and writes tables, `plots` draws, `findings` puts the numbers into sentences, `html` joins them.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slimjax.records import Record
from slimjax.report import plots, tables
from slimjax.report.findings import findings
from slimjax.report.html import Part, html


def report_tables(records: Sequence[Record]) -> dict[str, tables.Table]:
    """Every table of a report by file name: one per model, then the models side by side."""
    made = {
        f"schemes_{model}": tables.equivalence_table(records, model)
        for model in tables.distinct(records, "model")
    }
    return {**made, "models": tables.models_table(records)}


def facts(records: Sequence[Record]) -> str:
    """One line: where and when, from the records' provenance."""
    sources = [record.provenance for record in records if record.provenance]
    if not sources:
        return f"{len(records)} records"
    first, last = sources[0], sources[-1]
    versions = ", ".join(f"{name} {version}" for name, version in first.get("versions", {}).items())
    commit = (first.get("git") or "")[:10] + (" with local changes" if first.get("dirty") else "")
    parts = [
        f"{len(records)} records",
        f"run {first.get('config')}",
        f"{first.get('device')}, {first.get('cpus')} CPUs",
        versions,
        f"commit {commit}" if commit else "",
        str(last.get("date", "")),
    ]
    return " · ".join(part for part in parts if part)


def write_report(
    folder: Path,
    records: Sequence[Record],
    *,
    title: str,
    config: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Write report.html, tables/ (md, csv, tex) and plots/ (png, svg) into `folder`; returns report.html's path.

    config: the resolved JSON of the run; metrics: the lines of metrics.jsonl. Works on the records of a
    half-finished run: what is missing is shown as missing.
    """
    made = report_tables(records)
    (folder / "tables").mkdir(parents=True, exist_ok=True)
    for name, table in made.items():
        for suffix, form in (("md", tables.markdown), ("csv", tables.csv), ("tex", tables.latex)):
            (folder / "tables" / f"{name}.{suffix}").write_text(form(table), encoding="utf-8")
    (folder / "plots").mkdir(exist_ok=True)
    drawn = {}
    for name, figure in (("error", plots.equivalence_plot(records)), ("loss", plots.loss_plot(metrics))):
        plots.save(figure, folder / "plots" / name)
        drawn[name] = plots.inline_svg(figure, name)
    page = html(
        title=title,
        facts=facts(records),
        findings=findings(records),
        parts=_in_order(list(made.values()), drawn),
        config=json.dumps(config, indent=2, ensure_ascii=False),
        records=records,
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _in_order(made: Sequence[tables.Table], drawn: Mapping[str, str]) -> list[Part]:
    """The main model's table, its plot, the models side by side, then the other models."""
    *schemes, models = made
    error: Part = ("Attention error against cache size.", drawn["error"])
    loss: Part = ("Training loss.", drawn["loss"])
    return [*schemes[:1], error, models, *schemes[1:], loss] if models.rows else [loss]
