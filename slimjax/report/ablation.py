"""Tables of `compare`: ways to cache side by side, on language models.

A *way* is all of a cell but its model and seed: scheme, selector, fraction, protected layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from slimjax.records import Record
from slimjax.report.paired import same_method
from slimjax.report.positions import LEAST, ranges, windows
from slimjax.report.samples import distinct, measured, metric, sample, select, trouble
from slimjax.report.tables import UNMEASURED, Column, Table, Value, with_seeds

WAY = ("scheme", "selector", "fraction", "protected", "protect", "protection")
Method = tuple[str, str | None, str]


@dataclass(frozen=True, kw_only=True)
class Published:
    """The paper's figures beside a table's (arXiv 2412.08585): accuracy in % by codec, bits and softmax."""

    title: str
    note: str
    accuracy: Mapping[Method, float]


PUBLISHED: Mapping[str, Published] = {
    "main": Published(  # the first is FP16
        title="paper: mean accuracy, %",
        note="The paper's figures are means of its nine cells: three models of 4 to 8 billion parameters, three sets "
        "of questions, 8-shot chain of thought.",
        accuracy={
            ("bf16", None, "exact"): 61.89,
            ("flashq", "4", "sas"): 60.27,
            ("gear_l", "4", "exact"): 55.97,
            ("kivi", "4", "exact"): 51.85,
            ("flashq", "2-4", "sas"): 53.31,
            ("gear_l", "3", "exact"): 51.10,
            ("kivi", "3", "exact"): 50.01,
        },
    ),
    "components": Published(
        title="paper: accuracy on AQuA, %",
        note="The paper's figures are of 254 questions, where one standard error is 3.1 points: they cannot tell "
        "these rows apart.",
        accuracy={
            ("bf16", None, "exact"): 50.79,
            ("flashq", "4", "exact"): 49.60,
            ("bf16", None, "sas"): 50.12,
            ("flashq", "4", "sas"): 48.03,
        },
    ),
}
COLUMNS = {
    "bytes_per_token": Column("cache (bytes per token)", "count"),
    "compression": Column("bf16 KV / this cache", "ratio"),
    "map_bytes": Column("map in the weights (bytes)", "count"),
    "perplexity": Column("perplexity", "number"),
    "bits_per_byte_change": Column("bits per byte, change", "change"),
    "logit_kl": Column("logit KL (nats)", "error"),
    "logit_kl_low": Column("95 % from", "error"),
    "logit_kl_high": Column("to", "error"),
    "top1_agreement": Column("top-1 agreement, %", "percent"),
    "attention_cosine": Column("cosine, worst layer", "number"),
    "attention_cosine_mean": Column("mean", "number"),
    "attention_l1": Column("relative L1, worst layer", "error"),
    "attention_l1_mean": Column("mean", "error"),
    "attention_rmse": Column("RMSE, worst layer", "error"),
    "attention_rmse_mean": Column("mean", "error"),
    "accuracy": Column("accuracy, %", "percent"),
    "accuracy_low": Column("95 % from", "percent"),
    "accuracy_high": Column("to", "percent"),
    "p_value": Column("p (McNemar)", "number"),
}
TITLES = {
    "main": "Methods and bits",
    "components": "Components of TurboAttention, and its unverifiable options",
    "selectors": "Head selectors and the share of 2-bit heads",
    "tiles": "Tile size",
    "buffer": "Buffer size and universal scale",
    "sas": "SAS on language models",
    "protection": "Protected layers",
    "slim_turbo": "Slim attention's caches in few bits",
    "context": "Error and context length",
    "pareto": "All methods",
}
NOTE = (
    "Against the same model without a cache, on tokens that nothing was chosen on. The KL's interval is Student's t "
    "over blocks of consecutive tokens of one window. Cosine, L1 and RMSE are of attention's output on the exact "
    "model's inputs."
)
MAP = " The map in the weights stands for W_V, or W_K, of all layers; it is no part of the cache."
ANSWERS = " Accuracy has Wilson's interval, p is McNemar's exact test against the unquantised cache."
SIDE = (
    "compression", "logit_kl", "logit_kl_low", "logit_kl_high", "perplexity", "accuracy", "accuracy_low",
    "accuracy_high",
)  # fmt: skip


def way(record: Record) -> tuple[Any, ...]:
    """What the records of other models and seeds share."""
    return tuple(record.cell.get(name) for name in WAY)


def ways(records: Sequence[Record]) -> dict[tuple[Any, ...], list[Record]]:
    """The records by their way, in order of appearance."""
    found: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        found.setdefault(way(record), []).append(record)
    return found


def told(records: Sequence[Record]) -> list[str]:
    """The parts of a way that tell rows apart; the scheme always."""
    several = [name for name in WAY[1:] if len({record.cell.get(name) for record in records}) > 1]
    shares = "fraction" in several and len(distinct(records, "scheme")) > 1
    return ["scheme", *(name for name in several if not (shares and name == "fraction"))]


def described(record: Record, names: Sequence[str]) -> str:
    """A way in words: `kv:flashq2-4, selector priority`."""
    scheme, *rest = names
    parts = [f"{name} {record.cell[name]}" for name in rest if record.cell.get(name) not in (None, "none", 0)]
    return ", ".join([str(record.cell.get(scheme)), *parts])


def by_window(records: Sequence[Record]) -> list[Record]:
    """Models of a study that were read in windows of several lengths or prompts, each under a name of its own."""
    found = {(record.cell.get("study"), record.cell.get("model"), *window_of(record)) for record in records}
    names = [key[:2] for key in found]

    def named(record: Record) -> Record:
        model = record.cell.get("model")
        if names.count((record.cell.get("study"), model)) < 2:
            return record
        length, prompt = window_of(record)
        return replace(
            record, cell={**record.cell, "model": f"{model}, windows of {length}, prompt {prompt or 0}"}
        )

    return [named(record) for record in records]


def window_of(record: Record) -> tuple[Any, Any]:
    """Tokens of its windows, and how many of these are a prompt, which is not scored."""
    return record.cell.get("length"), record.cell.get("prompt")


def ablation_tables(records: Sequence[Record]) -> dict[str, Table]:
    """`STUDY` side by side where several models are in it, `STUDY_MODEL` with all columns, `positions_MODEL`."""
    made: dict[str, Table] = {}
    records = by_window(records)
    for study in distinct(records, "study"):
        here = select(records, study=study)
        models = distinct(here, "model")
        if len(models) > 1 or study == "main":
            made[str(study)] = side_by_side(here, str(study))
        for model in models:
            found = select(here, model=model)
            made[f"{study}_{model}"] = model_table(found, f"{TITLES.get(study, study)}: {model}")
            if study == "context":
                made[f"positions_{model}"] = positions_table(found, f"KL by position: {model}")
    return made


def model_table(records: Sequence[Record], title: str) -> Table:
    """Everything measured of one model, a row per way; several seeds are mean and spread."""
    names = told(records)
    metrics = [name for name in COLUMNS if any(name in record.metrics for record in records)]
    rows, remarks, labels, counts = [], [], [], []
    for here in ways(records).values():
        first = here[0]
        rows.append((*_labels(first, names), *(sample(here, name) for name in metrics)))
        remarks.append(_remark(here))
        labels.append(described(first, names))
        counts.append(sum(map(measured, here)))
    columns = (*way_columns(names), *(COLUMNS[name] for name in metrics))
    note = NOTE + (MAP if "map_bytes" in metrics else "") + sizes(records)
    table = Table(title, columns, tuple(rows), tuple(remarks), note, tuple(labels), len(names))
    return with_seeds(table, counts)


def sizes(records: Sequence[Record]) -> str:
    """` n = 4,096 tokens in 64 blocks, 500 problems`, and how those are tested; "" of nothing measured."""
    count, problems = metric(records, "count"), metric(records, "problems")
    found = next((len(r.metrics["logit_kl_blocks"]) for r in records if "logit_kl_blocks" in r.metrics), 0)
    parts = [f"{int(count):,} tokens" + (f" in {found:,} blocks" if found else "")] if count else []
    parts += [f"{int(problems):,} problems"] if problems else []
    return f" n = {', '.join(parts)}.{ANSWERS if problems else ''}" if parts else ""


def way_columns(names: Sequence[str]) -> list[Column]:
    """Those of a way."""
    return [Column(name, "text" if name == "scheme" else "plain") for name in names]


def _labels(record: Record, names: Sequence[str]) -> tuple[Value, ...]:
    return tuple(None if record.cell.get(name) is None else record.cell[name] for name in names)


def _remark(records: Sequence[Record]) -> str:
    return trouble(records) or ("" if any(map(measured, records)) else UNMEASURED)


def _remarks(records: Sequence[Record], models: Sequence[str]) -> str:
    """The remarks of every model, with its name where not all of them have the same."""
    found = {model: _remark(select(records, model=model)) for model in models}
    said = {model: text for model, text in found.items() if text}
    if len(said) == len(models) and len(set(said.values())) == 1:
        return next(iter(said.values()))
    return "; ".join(f"{model}: {text}" for model, text in said.items())


def side_by_side(records: Sequence[Record], study: str) -> Table:
    """KL, perplexity and accuracy of every model beside each other, and what the paper has for that method."""
    names, models, paper = told(records), distinct(records, "model"), PUBLISHED.get(study)
    parts = {
        model: [name for name in SIDE if any(name in r.metrics for r in select(records, model=model))]
        for model in models
    }
    rows, remarks, labels, counts = [], [], [], []
    for here in ways(records).values():
        first = here[0]
        numbers = [sample(select(here, model=model), name) for model in models for name in parts[model]]
        rows.append((*_labels(first, names), *numbers, *([] if paper is None else [published(first, paper)])))
        remarks.append(_remarks(here, models) if len(models) > 1 else _remark(here))
        labels.append(described(first, names))
        counts.append(max(len(select(here, model=model)) for model in models))
    columns = (
        *way_columns(names),
        *(
            Column(f"{model}: {COLUMNS[name].title}", COLUMNS[name].form)
            for model in models
            for name in parts[model]
        ),
        *([] if paper is None else [Column(paper.title, "plain")]),
    )
    note = NOTE + "".join(
        f" {model}:{text.removesuffix(ANSWERS)}"
        for model in models
        if (text := sizes(select(records, model=model)))
    )
    note += ANSWERS if any("accuracy" in found for found in parts.values()) else ""
    note += "" if paper is None else f" {paper.note}"
    table = Table(
        TITLES.get(study, study), columns, tuple(rows), tuple(remarks), note, tuple(labels), len(names)
    )
    return with_seeds(table, counts)


def published(record: Record, paper: Published) -> float | None:
    """The paper's figure of a method and its bits; options that leave it the method are no matter."""
    cell = record.cell
    plain = cell.get("basis") == "kv" and not cell.get("compute") and not cell.get("protected")
    if cell.get("fraction") not in (None, 0.5) or not same_method(record):
        return None
    key = (str(cell.get("codec")), cell.get("bits"), str(cell.get("softmax")))
    return paper.accuracy.get(key) if plain else None  # type: ignore[arg-type]


def positions_table(records: Sequence[Record], title: str) -> Table:
    """KL with its interval, and attention error, by ranges of positions; the first seed's."""
    asked = [record for record in records if "positions" in record.metrics]
    if not asked:
        return Table(title, (Column("scheme"),), (), ())
    places = ranges(asked[0])
    names = told(records)
    rows, remarks = [], []
    for here in ways(records).values():
        found = next(
            (r for r in here if r in asked and [p.ends for p in ranges(r)] == [p.ends for p in places]), None
        )
        numbers: list[Value] = []
        for index in range(len(places)):
            place = None if found is None else ranges(found)[index]
            interval = place and place.interval
            numbers += [place and place.kl, interval and interval.low, interval and interval.high]
        errors = () if found is None else found.metrics.get("attention_error_by_position", ())
        numbers += [errors[index] if len(errors) == len(places) else None for index in range(len(places))]
        rows.append((*_labels(here[0], names), *numbers))
        remarks.append(_remark(here))
    columns = [*way_columns(names)]
    for place in places:
        columns += [Column(f"KL, {place}", "error"), Column("95 % from", "error"), Column("to", "error")]
    columns += [Column(f"attention error, {place}", "error") for place in places]
    note = (
        f"KL in nats, its interval Student's t over blocks of tokens in {windows(asked[0]):,} windows; attention "
        f"error: relative L2, mean over layers. What grows is told from the first range that starts at {LEAST} or "
        "behind it."
    )
    labels = tuple(described(here[0], names) for here in ways(records).values())
    return Table(title, tuple(columns), tuple(rows), tuple(remarks), note, labels, len(names))
