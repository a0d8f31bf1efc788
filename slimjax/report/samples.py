"""Which records belong together: selection by coordinate, several seeds as one number, several runs as one list."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from slimjax.record_names import CELL
from slimjax.records import Record, cell_key

# Coordinates that tell the rows of one model's table apart; `scheme` holds all of the second line.
PARTS_OF_SCHEME = ("basis", "option", "extra", "codec", "bits", "group", "softmax")
WITHIN_MODEL = ("layer", "attention", "scheme", *PARTS_OF_SCHEME, "compute", "dtype", "seed")


@dataclass(frozen=True)
class Spread:
    """The mean of one number over n seeds and its sample standard deviation (divisor n - 1; 0 for n = 1)."""

    mean: float
    deviation: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Equal values keep their type and every digit: their mean is that value."""
        if all(value == values[0] for value in values):
            return cls(values[0], 0.0, len(values))
        mean = math.fsum(values) / len(values)
        squares = math.fsum((value - mean) ** 2 for value in values)
        return cls(mean, math.sqrt(squares / (len(values) - 1)), len(values))


def distinct(records: Iterable[Record], name: str) -> list[Any]:
    """Values of one coordinate in the order in which they first appear."""
    return list(dict.fromkeys(record.cell[name] for record in records if record.cell.get(name) is not None))


def select(records: Iterable[Record], **cell: Any) -> list[Record]:
    """The records at the given coordinates."""
    return [
        record for record in records if all(record.cell.get(name) == value for name, value in cell.items())
    ]


def seed_of(record: Record) -> Any:
    """The record's seed: a coordinate of its cell, or else what its provenance says."""
    return record.cell["seed"] if "seed" in record.cell else record.provenance.get("seed")


def seeds(records: Iterable[Record]) -> list[Any]:
    """Every seed among the records, in order of appearance; [None] where none is told."""
    return list(dict.fromkeys(seed_of(record) for record in records))


def sample(records: Sequence[Record], name: str, **cell: Any) -> Spread | None:
    """A metric at the given coordinates over the seeds, or None; of each seed the first record that has it."""
    values: dict[Any, float] = {}
    for record in select(records, **cell):
        value = record.metrics.get(name)
        if isinstance(value, int | float):
            values.setdefault(seed_of(record), value)
    return Spread.of(list(values.values())) if values else None


def metric(records: Sequence[Record], name: str, **cell: Any) -> Any:
    """`sample` without its spread: the value, the mean where there are several seeds, or None."""
    found = sample(records, name, **cell)
    return None if found is None else found.mean


def trouble(records: Sequence[Record]) -> str:
    """Why these records lack numbers: each status with the last reason given for it."""
    reasons: dict[str, str] = {}
    for record in records:
        if record.status != "ok":
            reasons[record.status] = record.reason
    return "; ".join(f"{status}: {reason}" for status, reason in reasons.items())


def measured(record: Record) -> bool:
    """False for a cell that is only planned: nothing came of it yet, and it comes from nowhere."""
    return record.status != "ok" or bool(record.metrics) or bool(record.provenance)


def without_seed(cell: Mapping[str, Any]) -> dict[str, Any]:
    """The cell that other seeds share."""
    return {name: value for name, value in cell.items() if name != "seed"}


def by_cell(records: Iterable[Record]) -> dict[str, list[Record]]:
    """The records of each cell, seeds together, by a key without the seed; in order of appearance."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(cell_key(without_seed(record.cell)), []).append(record)
    return groups


def join(runs: Sequence[tuple[str, Sequence[Record]]]) -> list[Record]:
    """The records of several runs, (name, records) each, as one list.

    Equal cells of different seeds are kept, to be one row. Raises ValueError, naming both runs, for equal cells
    of the same seed: which of them is right, nobody could tell.
    """
    owners: dict[tuple[str, Any], str] = {}
    for name, records in runs:
        for record in records:
            key = cell_key(without_seed(record.cell)), seed_of(record)
            if key in owners:
                raise ValueError(
                    f"{owners[key]} and {name} both hold cell {key[0]} with seed {key[1]}: "
                    f"leave one of them out, or put them side by side with --compare"
                )
            owners[key] = name
    return [record for _, records in runs for record in records]


def with_planned(records: Sequence[Record], planned: Iterable[Mapping[str, Any]]) -> list[Record]:
    """The records in the order of the plan, with an empty record for each planned cell that has none yet."""
    found = {record.key: record for record in records}
    unique = {cell_key(cell): cell for cell in planned}
    ordered = [found.pop(key, None) or Record(dict(cell)) for key, cell in unique.items()]
    return [*ordered, *found.values()]


def varying(records: Sequence[Record], apart: Iterable[str] = ()) -> list[str]:
    """Coordinates that differ among the records, in the registry's order; never those named in `apart`."""
    names = [name for name in CELL if name not in set(apart)]
    return [name for name in names if len({cell_key({"": record.cell.get(name)}) for record in records}) > 1]


def qualified(records: Sequence[Record]) -> list[Record]:
    """The records with each model's name extended by what else tells its tables apart: `base, position rope`.

    Two runs may call different models by one name; a table must not mix their numbers.
    """
    names = {
        model: varying(select(records, model=model), ("model", *WITHIN_MODEL))
        for model in distinct(records, "model")
    }

    def label(record: Record) -> Record:
        model = record.cell.get("model")
        parts = [f"{name} {record.cell[name]}" for name in names.get(model, ()) if name in record.cell]
        return replace(record, cell={**record.cell, "model": ", ".join([str(model), *parts])})

    return [label(record) if names.get(record.cell.get("model")) else record for record in records]
