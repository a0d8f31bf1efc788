"""Two runs side by side, A and B: what differs in numbers, in which cells there are, in where they come from."""

from collections.abc import Mapping, Sequence
from typing import Any

from slimjax.records import Record
from slimjax.report.generic import (
    column,
    coordinate,
    coordinate_column,
    coordinates,
    metric_names,
    where,
)
from slimjax.report.runs import Run, flatten
from slimjax.report.samples import Spread, by_cell, sample, seeds, trouble
from slimjax.report.tables import SEEDS_NOTE, Column, Table, Value, change, number

Pair = tuple[
    list[Record], list[Record]
]  # one cell's records of A and of B, all seeds; one of them may be empty
ABSENT = "absent"


def pairs(a: Run, b: Run) -> list[Pair]:
    """Every cell of either run with the records of both, matched without the seed."""
    left, right = by_cell(a.records), by_cell(b.records)
    return [(left.get(key, []), right.get(key, [])) for key in dict.fromkeys((*left, *right))]


def comparison_tables(a: Run, b: Run) -> dict[str, Table]:
    """Every table of a comparison by file name; a table without rows is left out."""
    both, places = pairs(a, b), coordinates([*a.records, *b.records])
    compared = {name: metric_table(both, places, name) for name in _compared(both)}
    made = {
        "summary": summary_table(both, places),
        "provenance": provenance_table(a, b),
        "config": config_table(a, b),
        **{f"compare_{name}": table for name, table in compared.items()},
        "cells": cells_table(both, places),
    }
    return {name: table for name, table in made.items() if table.rows}


def _compared(both: Sequence[Pair]) -> list[str]:
    return metric_names([record for left, right in both for record in (*left, *right)])


def _values(both: Sequence[Pair], name: str) -> list[tuple[Pair, Spread, Spread]]:
    """The cells that have the metric in both runs."""
    found = ((pair, *(sample(side, name) for side in pair)) for pair in both)
    return [(pair, a, b) for pair, a, b in found if a is not None and b is not None]


def relative(a: float, b: float) -> float | None:
    """(b - a) / |a|, or None where a is 0."""
    return (b - a) / abs(a) if a else None


def metric_table(both: Sequence[Pair], places: Sequence[str], name: str) -> Table:
    """A row per cell in which the metric differs: A, B, B - A and that relative to A."""
    values, of = _values(both, name), column(name)
    rows, names = [], []
    for (left, right), a, b in values:
        if a.mean != b.mean:
            place = (coordinate(left[0].cell.get(coord)) for coord in places)
            ends = tuple(end if end.n > 1 else end.mean for end in (a, b))
            rows.append((*place, *ends, b.mean - a.mean, relative(a.mean, b.mean)))
            names.append(where(right[0], places))
    columns = (
        *(coordinate_column([pair[0][0] for pair, _, _ in values], coord) for coord in places),
        Column("A", "number"),
        Column("B", "number"),
        Column("B − A", "difference"),
        Column("relative, %", "relative"),
    )
    note = f"{len(rows)} of {len(values)} cells differ; the others are equal to the last bit."
    if any(isinstance(value, Spread) for row in rows for value in row):
        note += f" {SEEDS_NOTE}"
    title = f"{of.title[:1].upper()}{of.title[1:]}: A and B"
    return Table(title, columns, tuple(rows), note=note, names=tuple(names), labels=len(places))


def summary_table(both: Sequence[Pair], places: Sequence[str]) -> Table:
    """A row per metric: how many cells have it in both runs, in how many it differs, by how much at most."""
    rows = []
    for name in _compared(both):
        values = _values(both, name)
        changes = [(b.mean - a.mean, relative(a.mean, b.mean), pair) for pair, a, b in values]
        largest = max(changes, key=lambda each: abs(each[0]), default=None)
        most = [each for _, each, _ in changes if each is not None]
        differ = sum(bool(each[0]) for each in changes)
        row: tuple[Value, ...] = (column(name).title, len(values), differ)
        if largest and differ:
            row += (largest[0], max(most, key=abs, default=None), where(largest[2][0][0], places))
        else:
            row += (None, None, None)
        rows.append(row)
    columns = (
        Column("metric"),
        Column("cells in both", "count"),
        Column("of them different", "count"),
        Column("largest B − A", "difference"),
        Column("largest relative, %", "relative"),
        Column("where B − A is largest"),
    )
    return Table("Differences", columns, tuple(rows), note="Relative: (B − A) / |A|, where A is not 0.")


def _state(side: Sequence[Record]) -> str:
    return (trouble(side) or "ok") if side else ABSENT


def cells_table(both: Sequence[Pair], places: Sequence[str]) -> Table:
    """A row per cell that is not the same thing in both runs: in one of them only, or refused or failed in one."""
    rows = []
    for left, right in both:
        states = _state(left), _state(right)
        if states[0] != states[1]:
            cell = (left or right)[0].cell
            rows.append((*(coordinate(cell.get(coord)) for coord in places), *states))
    everything = [record for left, right in both for record in (*left, *right)]
    columns = (
        *(coordinate_column(everything, coord) for coord in places),
        Column("A"),
        Column("B"),
    )
    return Table("Cells that only one run has", columns, tuple(rows), labels=len(places))


def provenance(run: Run) -> dict[str, str]:
    """Where a run comes from, a line per fact; several values are told apart by a slash."""
    sources = [{**record.provenance} for record in run.records if record.provenance]
    flat = [flatten({key: item for key, item in each.items() if key != "seconds"}) for each in sources]
    facts = {}
    for name in dict.fromkeys(name for each in flat for name in each if name not in ("date", "seed")):
        values = dict.fromkeys(str(each[name]) for each in flat if each.get(name) is not None)
        facts[name] = " / ".join(values)
    dates = sorted(each["date"] for each in sources if each.get("date"))
    facts["seeds"] = ", ".join(str(seed) for seed in seeds(run.records) if seed is not None)
    facts["date"] = " to ".join(dict.fromkeys((dates[0], dates[-1]))) if dates else ""
    facts["seconds, all cells"] = number(sum(each.get("seconds") or 0.0 for each in sources))
    facts["source of the code (hash)"] = str(run.stamp.get("source", ""))
    return {name.replace("config", "run id"): text for name, text in facts.items()}


def provenance_table(a: Run, b: Run) -> Table:
    """A row per fact of provenance that differs."""
    return _facts_table("Provenance that differs", provenance(a), provenance(b))


def config_table(a: Run, b: Run) -> Table:
    """A row per setting that differs; empty where either run came without its config."""
    if not a.config or not b.config:
        return _facts_table("Settings that differ", {}, {})
    left, right = flatten(a.config), flatten(b.config)
    return _facts_table(
        "Settings that differ", *({key: _text(v) for key, v in s.items()} for s in (left, right))
    )


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def differences(a: Run, b: Run) -> list[tuple[str, str, str]]:
    """What is known of both runs and differs, dates and times aside: what, in A, in B."""
    rows = [*provenance_table(a, b).rows, *config_table(a, b).rows]
    known = [(str(what), str(left), str(right)) for what, left, right in rows if left and right]
    return [row for row in known if row[0] not in ("date", "seconds, all cells")]


def _facts_table(title: str, a: Mapping[str, str], b: Mapping[str, str]) -> Table:
    names = [name for name in dict.fromkeys((*a, *b)) if a.get(name, "") != b.get(name, "")]
    rows = tuple((name, a.get(name) or None, b.get(name) or None) for name in names)
    return Table(title, (Column("what"), Column("A"), Column("B")), rows)


def comparison_findings(a: Run, b: Run) -> list[str]:
    """What the comparison comes to, a sentence each."""
    both, places = pairs(a, b), coordinates([*a.records, *b.records])
    shared = [pair for pair in both if all(pair)]
    only = [sum(not pair[1 - side] for pair in both) for side in (0, 1)]
    sentences = [
        f"{len(shared)} cells are in both runs; {only[0]} are in A alone, {only[1]} in B alone.",
    ]
    states = [(_state(left), _state(right)) for left, right in shared]
    for run, here, there in (("A", 0, 1), ("B", 1, 0)):
        lost = sum(state[here] == "ok" != state[there] for state in states)
        if lost:
            sentences.append(
                f"{lost} cells worked out in {run} alone; in the other run they have no numbers."
            )
    differ = [name for name in _compared(both) if metric_table(both, places, name).rows]
    equal = [name for name in _compared(both) if name not in differ and _values(both, name)]
    if equal and not differ:
        sentences.append("Every number that both runs have is equal to the last bit.")
    elif equal:
        sentences.append(f"Equal to the last bit in both: {', '.join(column(name).title for name in equal)}.")
    shifts = (_shift(_values(both, name), places, name) for name in ("bits_per_byte_change", "bits_per_byte"))
    sentences += [next((shift for shift in shifts if shift), "")]
    told = [what for what, *_ in differences(a, b)]
    sentences.append(
        f"The runs differ in {', '.join(told[:12])}{' and more' if len(told) > 12 else ''}."
        if told
        else "Their provenance and settings, as far as they are known, are the same."
    )
    return [sentence for sentence in sentences if sentence]


def _shift(values: Sequence[tuple[Pair, Spread, Spread]], places: Sequence[str], name: str) -> str:
    if not values:
        return ""
    pair, a, b = max(values, key=lambda each: abs(each[2].mean - each[1].mean))
    if a.mean == b.mean:
        return ""
    return (
        f"The largest difference in {column(name).title} is {change(b.mean - a.mean)}, "
        f"at {where(pair[0][0], places)} ({column(name).write(a.mean)} in A, {column(name).write(b.mean)} in B)."
    )
