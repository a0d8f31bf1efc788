"""A table of any experiment's records: a row per cell, the coordinates that vary, the metrics that were measured."""

import statistics
from collections.abc import Sequence
from typing import Any

from slimjax.record_names import METRICS
from slimjax.records import Record
from slimjax.report.samples import (
    PARTS_OF_SCHEME,
    by_cell,
    distinct,
    measured,
    sample,
    select,
    trouble,
    varying,
)
from slimjax.report.tables import UNMEASURED, Column, Table, Value, number, with_seeds

PARTS_OF_SHAPE = ("position", "heads", "kv_heads", "head_dim", "width", "layers")
# Titles with units, and how numbers are written; a metric that is not here has its own name and four digits.
COLUMNS = {
    "attention_error": Column("attention error (relative L2)", "error"),
    "value_error": Column("value error (relative L2)", "error"),
    "identity_error": Column("float64 identity error", "error"),
    "calibration_error": Column("calibration error (relative L2)", "error"),
    "exact_error": Column("exact inverse, value error", "error"),
    "chosen_error": Column("chosen map, value error", "error"),
    "predicted_error": Column("predicted attention error", "error"),
    "condition_number": Column("condition number", "large"),
    "logit_kl": Column("logit KL (nats)", "error"),
    "bits_per_byte": Column("held-out bits per byte", "bits"),
    "bits_per_byte_change": Column("bits per byte, change", "change"),
    "accuracy": Column("accuracy, %", "percent"),
    "accuracy_low": Column("95 % from", "percent"),
    "accuracy_high": Column("to", "percent"),
    "accuracy_change": Column("change, points", "percent"),
    "count": Column("count (n)", "count"),
    "p_value": Column("p", "number"),
    "word_errors": Column("word errors, %", "percent"),
    "equal_texts": Column("texts equal to kv:bf16's, %", "percent"),
    "top1_agreement": Column("top-1 agreement, %", "percent"),
    "greedy_agreement": Column("greedy agreement (tokens)", "tokens"),
    "generated": Column("generated (tokens)", "count"),
    "bytes_per_token": Column("cache (bytes per token)", "count"),
    "compression": Column("bf16 KV / this cache", "ratio"),
    "compression_without_e": Column("the same, E left out", "ratio"),
    "parameters": Column("parameters", "count"),
    "tokens_per_second": Column("tokens per second", "number"),
    "time_to_first_token": Column("time to first token (ms)", "number"),
    "milliseconds": Column("time of one call (ms)", "number"),
    "compile_seconds": Column("compilation (s)", "number"),
    "speed_over_peer": Column("fastest peer's time / this", "ratio"),
    "speed_over_bf16": Column("kv:bf16's time / this", "ratio"),
    "fastest_over_peer": Column("the same of the fastest calls", "ratio"),
    "copy_gigabytes_per_second": Column("copy, GB per second", "number"),
    "reference_error": Column("the reference's, same dtype", "error"),
    "teraflops_per_second": Column("TFLOP per second", "number"),
    "gigabytes_per_second": Column("GB per second", "number"),
    "share_of_copy_bandwidth": Column("share of copy bandwidth, %", "percent"),
    "vmem_bytes": Column("on-chip memory (bytes)", "count"),
    "values_per_token": Column("KV values per token", "count"),
    "context_memory": Column("cached values", "count"),
    "encoder_cache": Column("E, values", "count"),
    "cross_cache": Column("cross cache, values", "count"),
    "self_cache": Column("self cache, values", "count"),
    "cache_reduction": Column("cache reduction", "ratio"),
    "step_parameters": Column("weights per step", "count"),
    "reads_per_token": Column("values read per token", "count"),
    "self_share": Column("self cache, %", "percent"),
    "cross_share": Column("cross cache, %", "percent"),
    "cross_phase": Column("cross phase, %", "percent"),
    "tops": Column("TOPS (int8)", "number"),
    "bandwidth": Column("GB/s", "number"),
    "balance": Column("OPs per byte", "number"),
    "self_cache_bytes": Column("self cache (bytes)", "count"),
    "cross_cache_bytes": Column("cross cache (bytes)", "count"),
    "cross_milliseconds": Column("cross phase (ms)", "number"),
    "temporary_bytes": Column("temporaries (bytes)", "count"),
    "cache_bytes": Column("cache (bytes)", "count"),
    "bytes_read_per_token": Column("bytes read per token", "count"),
    "operations_per_byte": Column("OPs per byte", "number"),
    "break_even": Column("break-even B·S (with an encoder: B)", "count"),
    "skipped_by_head": Column("skipped by a head, %", "percent"),
    "skipped_by_group": Column("skipped by a group, %", "percent"),
    "skipped_by_all": Column("skipped by all heads, %", "percent"),
    "milliseconds_bound": Column("least time of a step (ms)", "number"),
    "speedup": Column("speed-up", "ratio"),
}


def column(name: str) -> Column:
    """A metric's title and form."""
    return COLUMNS.get(name, Column(name.replace("_", " "), "number"))


def metric_names(records: Sequence[Record]) -> list[str]:
    """The metrics among the records, in the registry's order."""
    found = {name for record in records for name in record.metrics}
    return [name for name in METRICS if name in found]


def coordinates(records: Sequence[Record]) -> list[str]:
    """The coordinates that tell the rows apart; a scheme's parts are left out where schemes are named."""
    schemes = all(record.cell.get("scheme") is not None for record in records)
    return varying(records, ("seed", *(PARTS_OF_SCHEME if schemes else ()))) or [
        next((name for name in ("model", "scheme", "experiment") if distinct(records, name)), "experiment")
    ]


def coordinate_column(records: Sequence[Record], name: str) -> Column:
    """A coordinate's title; numbers stand right."""
    numbers = all(isinstance(value, int | float) for value in distinct(records, name))
    return Column(name.replace("_", " "), "plain" if numbers else "text")


def coordinate(value: Any) -> Value:
    """A coordinate as a table has it."""
    return str(value) if isinstance(value, bool) else value


def where(record: Record, names: Sequence[str]) -> str:
    """The record's place in words: `scheme k:int16, context 1024`; a value that names itself goes without."""
    parts = [(name, record.cell.get(name)) for name in names]
    plain = ("scheme", "model", "dtype", "experiment", "backend")
    return ", ".join(
        str(value) if name in plain else f"{name.replace('_', ' ')} {value}"
        for name, value in parts
        if value is not None
    )


def cells_table(records: Sequence[Record], title: str) -> Table:
    """The table. A metric that lists its samples, `NAME_samples`, is given by their quartiles and number."""
    places, metrics = coordinates(records), metric_names(records)
    rows, remarks, names, counts = [], [], [], []
    for here in by_cell(records).values():
        first = here[0]
        numbers = [_value(here, name) for name in metrics]
        rows.append((*(coordinate(first.cell.get(name)) for name in places), *(numbers or [None])))
        waiting = UNMEASURED if not any(map(measured, here)) else ""
        remarks.append("; ".join(part for part in (trouble(here), waiting) if part))
        names.append(where(first, places))
        counts.append(sum(map(measured, here)))
    columns = (
        *(coordinate_column(records, name) for name in places),
        *([_column(records, name) for name in metrics] or [Column("result")]),
    )
    table = Table(
        title, columns, tuple(rows), tuple(remarks), _shared(records, places), tuple(names), len(places)
    )
    return with_seeds(table, counts)


def brief_table(records: Sequence[Record], metrics: Sequence[str]) -> Table:
    """A table for a terminal: of these metrics alone, and of coordinates only what no shape or model stands for."""

    def brief(record: Record) -> Record:
        cell = {name: value for name, value in record.cell.items() if name not in PARTS_OF_SHAPE}
        found = {name: record.metrics[name] for name in metrics if name in record.metrics}
        return Record(cell, found, record.status, record.reason, record.provenance)

    return cells_table(list(map(brief, records)), "Cells")


def _shared(records: Sequence[Record], places: Sequence[str]) -> str:
    """What all rows have in common, in a sentence."""
    skipped = {*places, *varying(records), "experiment"}
    if distinct(records, "scheme"):
        skipped |= set(PARTS_OF_SCHEME)
    names = [name for name in (records[0].cell if records else ()) if name not in skipped]
    parts = [f"{name.replace('_', ' ')} {records[0].cell[name]}" for name in names]
    return f"All rows: {', '.join(parts)}." if parts else ""


def _lists(records: Sequence[Record], name: str) -> bool:
    return any(isinstance(record.metrics.get(name), list | tuple) for record in records)


def _column(records: Sequence[Record], name: str) -> Column:
    if not _lists(records, name):
        return column(name)
    of = column(name.removesuffix("_samples"))
    return Column(f"{of.title}: quartiles (n)", "plain")


def _value(here: Sequence[Record], name: str) -> Value:
    """A number over the seeds; of lists, pooled, the quartiles."""
    if not _lists(here, name):
        return sample(here, name)
    pooled = [value for record in here for value in record.metrics.get(name, ())]
    if len(pooled) < 2:
        return ", ".join(map(number, pooled)) + f" ({len(pooled)})"
    low, _, high = statistics.quantiles(pooled, n=4, method="inclusive")
    return f"{number(low)} – {number(high)} ({len(pooled)})"


def spans(records: Sequence[Record], most: int = 8) -> list[str]:
    """A sentence per metric that varies over the cells: its lowest and its highest value and where they are."""
    sentences = []
    groups = by_cell(record for record in records if record.status == "ok")
    places = coordinates(records) if records else []
    for name in metric_names(records):
        if name in ("count", "generated", "sequences") or _lists(records, name):
            continue
        values = [
            (found.mean, here[0]) for here in groups.values() if (found := sample(here, name)) is not None
        ]
        if not values:
            continue
        (low, least), (high, greatest) = (pick(values, key=lambda pair: pair[0]) for pick in (min, max))
        title, write = column(name).title, column(name).write
        if low == high:
            everywhere = " in every cell" if len(values) > 1 else ""
            sentences.append(f"{_upper(title)}: {write(low)}{everywhere}.")
        else:
            sentences.append(
                f"{_upper(title)}: from {write(low)} ({where(least, places)}) to {write(high)} "
                f"({where(greatest, places)})."
            )
    return sentences[:most]


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def is_equivalence(records: Sequence[Record]) -> bool:
    """Whether these records ask if schemes are exact on models: those have tables of their own."""
    if not distinct(records, "scheme") or not distinct(records, "model"):
        return False
    if distinct(records, "layer"):  # one layer at a time is another question
        return False
    asked = {"identity_error", "attention_error", "bits_per_byte_change"}
    found = set(metric_names(records))
    return bool(found & asked) or not found


def experiments(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records of each experiment; those that name none are together under ''."""
    names = list(dict.fromkeys(record.cell.get("experiment") for record in records))
    return {str(name or ""): select(records, experiment=name) for name in names}
