"""Reports: pure functions of Records. `write_report` rebuilds every file of a report without measuring anything.

`samples` joins records (seeds, runs), `tables` are tables and their written forms, filled by `equivalence` (are
these caches exact?), `generic` (any other experiment) and `compare` (two runs); `plots` and `front` draw,
`findings` puts the numbers into sentences, `html` makes one page of all, `runs` reads runs from the disk.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from matplotlib.figure import Figure

from slimjax.records import Record
from slimjax.report import (
    ablation_findings,
    ablation_front,
    ablation_plots,
    compare,
    decoding,
    front,
    generic,
    paper,
    plots,
    rows,
    samples,
    slim,
    slim_plots,
    synthetic,
    tables,
    whisper,
)
from slimjax.report.equivalence import equivalence_table, models_table
from slimjax.report.findings import findings as _findings
from slimjax.report.html import Part, html
from slimjax.report.runs import Run, all_records, joined, load, pace

__all__ = [
    "facts",
    "findings",
    "joined",
    "load",
    "report_tables",
    "title_of",
    "write_comparison",
    "write_joined",
    "write_report",
]

EQUIVALENCE = "Which attention caches are exact?"
TITLES = {
    "quickstart": EQUIVALENCE,
    "equivalence": EQUIVALENCE,
    "train": "Training",
    "ablate": "Ablation",
    "decode_bench": "How long does a decoded token take?",
    "layer_bench": "How long does a layer take under each cache?",
    "ceilings": "What can this device do at best?",
    "parity": "Do the kernels give what the reference gives?",
    "breakdown": "What does a decode step take its time for?",
    "train_bench": "How long does a training step take?",
    "slim_error": "Where slim attention's error comes from",
    "reasoning": "How many problems does a model still solve through its cache?",
    "compare": "Caches side by side",
    "synthetic": "Attention on Gaussian numbers",
}
SLIM, COMPARE, DECODE = "slim_error", "compare", "decode_bench"
# Experiments with tables and sentences of their own.
TABLES = {
    SLIM: slim.slim_tables,
    COMPARE: ablation_front.comparison_tables,
    "synthetic": synthetic.synthetic_tables,
    "paper": paper.paper_tables,
    "slim_rows": rows.rows_tables,
}
FINDINGS = {
    SLIM: slim.slim_findings,
    COMPARE: ablation_findings.ablation_findings,
    "synthetic": synthetic.synthetic_findings,
    DECODE: decoding.decoding_findings,
}
MOST = 8  # models with a table each; beyond, one table of all cells is easier to read


def title_of(records: Sequence[Record]) -> str:
    """What a report of these records is called unless somebody says otherwise."""
    names = [name for name in generic.experiments(records) if name]
    return " · ".join(dict.fromkeys(TITLES.get(name, name.replace("_", " ")) for name in names)) or "Report"


def findings(records: Sequence[Record]) -> list[str]:
    """Plain sentences, experiment by experiment."""
    return [
        sentence
        for name, here in generic.experiments(records).items()
        for sentence in (FINDINGS[name](here) if name in FINDINGS else _findings(samples.qualified(here)))
    ]


def report_tables(records: Sequence[Record]) -> dict[str, tables.Table]:
    """Every table of a report by file name, which is letters, digits, `_` and `-`.

    Records of schemes on models: `schemes_MODEL` for each model, then `models`, side by side. Any other
    experiment: `cells`, and `worst`, its worst layers, where it measures layers one by one. Where there are several
    experiments their names follow: `cells_train`.
    """
    groups = generic.experiments(records)
    made: dict[str, tables.Table] = {}
    for experiment, found in groups.items():
        suffix = f"_{experiment}" if len(groups) > 1 else ""
        if experiment in TABLES:
            own = TABLES[experiment](found)
            made |= {_slug(f"{name}{suffix}"): table for name, table in own.items()}
            continue
        here = samples.qualified(found) if generic.is_equivalence(found) else found
        models = samples.distinct(here, "model")
        if generic.is_equivalence(found) and len(models) <= MOST:
            named = {_slug(f"schemes_{model}{suffix}"): equivalence_table(here, model) for model in models}
            if len(named) < len(models):  # names that differ in signs alone
                named = {f"schemes_{i}{suffix}": equivalence_table(here, m) for i, m in enumerate(models)}
            made |= named | {_slug(f"models{suffix}"): models_table(here)}
        else:
            title = "Cells" + (f" of {experiment.replace('_', ' ')}" if experiment else "")
            made[_slug(f"cells{suffix}")] = generic.cells_table(found, title)
            if worst := whisper.worst_table(experiment, found):
                made[_slug(f"worst{suffix}")] = worst
    return made or {"models": models_table([])}


def _slug(text: str) -> str:
    return "".join(sign if sign.isalnum() or sign in "_-" else "-" for sign in text.replace(", ", "_"))


def facts(records: Sequence[Record]) -> str:
    """One line: where and when, from the records' provenance; several values are told apart by a slash."""
    done = [record for record in records if samples.measured(record)]
    counted = (
        f"{len(done)} record{'s' * (len(done) != 1)}"
        if len(done) == len(records)
        else f"{len(done)} of {len(records)} cells"
    )
    sources = [record.provenance for record in done if record.provenance]
    if not sources:
        return counted

    def each(text: Any) -> str:
        return " / ".join(dict.fromkeys(filter(None, map(text, sources))))

    def commit(source: Mapping[str, Any]) -> str:
        return (source.get("git") or "")[:10] + (" with local changes" if source.get("dirty") else "")

    names = dict.fromkeys(name for source in sources for name in source.get("versions", {}))
    versions = [f"{name} {each(lambda source, n=name: source.get('versions', {}).get(n))}" for name in names]
    commits = each(commit)
    parts = [
        counted,
        f"run {ran}" if (ran := each(lambda source: source.get("config"))) else "",
        each(lambda source: f"{source.get('device')}, {source.get('cpus')} CPUs"),
        ", ".join(versions),
        f"commit {commits}" if commits else "",
        max(str(source.get("date", "")) for source in sources),
    ]
    return " · ".join(part for part in parts if part)


def write_report(
    folder: Path,
    records: Sequence[Record],
    *,
    title: str,
    config: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]] = (),
    planned: Sequence[Mapping[str, Any]] = (),
    remarks: Sequence[str] = (),
    sweep: Mapping[str, Any] = MappingProxyType({}),
) -> Path:
    """Write report.html, tables/ (md, csv, tex) and plots/ (png, svg) into `folder`; returns report.html's path.

    config: the resolved JSON of the run; metrics: the lines of metrics.jsonl; planned: all cells of the run, where
    known; remarks: sentences to follow the findings; sweep: how fast the cells were measured, as in result.json.
    Works on the records of a half-finished run: what is missing is shown as missing. Tables and plots of an earlier
    report that this one does not have are deleted.
    """
    everything = samples.with_planned(records, planned) if planned else list(records)
    made = report_tables(everything)
    drawn = _draw(folder, _figures(everything, metrics))
    sentences = findings(everything)
    page = html(
        title=title,
        facts=" · ".join(filter(None, (facts(everything), pace(sweep)))),
        findings=[*sentences, *remarks],
        parts=_in_order(list(made.values()), drawn),
        config=json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True) if config else "",
        records=records,
    )
    return _write(folder, made, page, plots=drawn)


def write_joined(folder: Path, runs: Sequence[Run], *, title: str = "") -> Path:
    """`write_report` of runs read from the disk, several joined into one.

    Raises ValueError for equal cells of the same seed. Runs that are joined should differ in the seed alone where
    they share cells: what else differs is said below the findings.
    """
    whole = joined(runs)
    return write_report(
        folder,
        whole.records,
        title=title or title_of(whole.records),
        config=whole.config,
        metrics=whole.metrics,
        planned=whole.planned,
        remarks=[sentence for run in runs[1:] for sentence in _apart(runs[0], run)],
        sweep=whole.sweep,
    )


def _apart(first: Run, other: Run) -> list[str]:
    """A warning that two joined runs differ in more than their seeds, where they share cells."""
    cells = [set(samples.by_cell(run.records)) for run in (first, other)]
    if not cells[0] & cells[1]:
        return []
    parts = [
        f"{what} ({left} / {right})"
        for what, left, right in compare.differences(first, other)
        if what not in ("seeds", "run id") and what.rsplit(".", maxsplit=1)[-1] != "seed"
    ]
    return (
        [f"{first.name} and {other.name} differ in more than the seed: {'; '.join(parts)}."] if parts else []
    )


def write_comparison(folder: Path, a: Run, b: Run, *, title: str = "") -> Path:
    """Two runs side by side: report.html and tables/ in `folder`; returns report.html's path."""
    made = compare.comparison_tables(a, b)
    page = html(
        title=title or f"{title_of(a.records)} A and B",
        facts=f"A: {a.name}, {facts(all_records(a))} · B: {b.name}, {facts(all_records(b))}",
        findings=compare.comparison_findings(a, b),
        parts=list(made.values()),
        config=json.dumps({"A": a.config, "B": b.config}, indent=2, ensure_ascii=False, sort_keys=True),
        records=[*a.records, *b.records],
    )
    return _write(folder, made, page)


def report_plots(records: Sequence[Record]) -> dict[str, tuple[str, Figure]]:
    """Every plot of these records that has something to show, with its caption."""
    return _figures(records, ())


def _figures(
    records: Sequence[Record], metrics: Sequence[Mapping[str, Any]]
) -> dict[str, tuple[str, Figure]]:
    """Every plot that has something to show, with its caption."""
    asked = [
        here
        for name, here in generic.experiments(records).items()
        if name not in TABLES and generic.is_equivalence(here)
    ]
    here = samples.qualified([record for group in asked for record in group])
    found: dict[str, tuple[str, Figure]] = {}
    if any("attention_error" in record.metrics for record in here):
        found["error"] = ("Attention error against cache size.", plots.equivalence_plot(here))
    if best := front.pareto_plot(here):
        found["pareto"] = (
            "Pareto front: dim caches are beaten, by one as small and as close to exact attention or better.",
            best,
        )
    found |= slim_plots.slim_plots(samples.select(records, experiment=SLIM))
    found |= ablation_plots.ablation_plots(samples.select(records, experiment=COMPARE))
    found |= decoding.decoding_plots(samples.select(records, experiment=DECODE))
    if any("step" in line and ("loss" in line or "bits_per_byte" in line) for line in metrics):
        found["loss"] = ("Training loss.", plots.loss_plot(metrics))
    return found


def _draw(folder: Path, figures: Mapping[str, tuple[str, Figure]]) -> dict[str, Part]:
    """Save every plot into plots/; the page's share of each."""
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    drawn: dict[str, Part] = {}
    for name, (caption, figure) in figures.items():
        text = plots.save(figure, folder / "plots" / name)
        drawn[name] = (caption, plots.inline_svg(text, name))
    return drawn


def _write(
    folder: Path, made: Mapping[str, tables.Table], page: str, plots: Collection[str] = frozenset()
) -> Path:
    """The page and its tables; what an earlier report had besides goes, or it would outlive its numbers."""
    (folder / "tables").mkdir(parents=True, exist_ok=True)
    for name, table in made.items():
        for suffix, form in (("md", tables.markdown), ("csv", tables.csv), ("tex", tables.latex)):
            (folder / "tables" / f"{name}.{suffix}").write_text(form(table), encoding="utf-8")
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    for part, names, endings in (
        ("tables", made, (".md", ".csv", ".tex")),
        ("plots", plots, (".png", ".svg")),
    ):
        for old in (folder / part).glob("*"):
            if old.suffix in endings and old.stem not in names:
                old.unlink()
    return path


def _in_order(made: Sequence[tables.Table], drawn: Mapping[str, Part]) -> list[Part]:
    """The main model's table, its plots, the models side by side, then the other models."""
    about = [part for name, part in drawn.items() if name != "loss"]
    loss = [drawn["loss"]] if "loss" in drawn else []
    shown = [table for table in made if table.rows]
    if not shown:
        return loss
    *schemes, last = shown
    return [*schemes[:1], *about, last, *schemes[1:], *loss]
