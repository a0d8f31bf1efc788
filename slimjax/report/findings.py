"""Plain sentences about what the records show; generated, so that prose cannot drift from the numbers."""

import math
from collections.abc import Sequence

from slimjax.records import STATUSES, Record
from slimjax.report.equivalence import compute_dtypes, exact_bits
from slimjax.report.generic import coordinates, spans, where
from slimjax.report.samples import by_cell, distinct, measured, metric, seeds, select, trouble
from slimjax.report.tables import change, large, scientific

KEPT = 1e-3  # bits per byte; a change up to this size counts as none
ALGEBRA = 1e-6  # relative L2 in float64; an error beyond it is not one of rounding


def findings(records: Sequence[Record]) -> list[str]:
    """One sentence per finding: the main model's, then what conditioning does; empty while nothing is measured.

    Records that ask another question than whether caches are exact give a sentence per metric, its range.
    """
    models, schemes = distinct(records, "model"), distinct(records, "scheme")
    main = select(records, model=models[0]) if models else []
    sentences = [
        _identity(records),
        *(_kept(main, model) for model in models[:1]),
        *(_changed(main, scheme) for scheme in schemes),
        _smallest(main),
        _floor(main),
        *(_kept(select(records, model=model), model) for model in models[1:]),
        *(_conditioning(records, scheme) for scheme in schemes),
    ]
    found = [sentence for sentence in sentences if sentence] or _trained(records) or spans(records)
    found += [_seeds(records)] if found else []
    found += [unmeasured(records, status) for status in STATUSES if status != "ok"]
    found += [waiting(records)] if any(map(measured, records)) else []
    return [sentence for sentence in found if sentence]


def _seeds(records: Sequence[Record]) -> str:
    several = [seed for seed in seeds(filter(measured, records)) if seed is not None]
    return f"Numbers are means over the seeds {listed(list(map(str, several)))}." if len(several) > 1 else ""


def waiting(records: Sequence[Record]) -> str:
    """How far a half-finished run is."""
    done = sum(map(measured, records))
    return f"The run is not finished: {done} of {len(records)} cells are done." if done < len(records) else ""


def _change(records: Sequence[Record], scheme: str) -> float | None:
    return metric(records, "bits_per_byte_change", scheme=scheme)


def listed(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else "".join(names)


def _identity(records: Sequence[Record]) -> str:
    here = [record for record in records if "identity_error" in record.metrics]
    if not here:
        return ""
    schemes, worst = len(distinct(here, "scheme")), max(record.metrics["identity_error"] for record in here)
    which = f"all {schemes} schemes measured equal" if schemes > 1 else "the one scheme measured equals"
    rest = ": what they lose elsewhere" if schemes > 1 else ": what it loses elsewhere"
    return (
        f"In float64, from a cache stored exactly, {which} exact attention to {_at_most(worst)} or better "
        f"(relative L2){f'{rest} is precision' if worst <= ALGEBRA else ''}."
    )


def _trained(records: Sequence[Record], most: int = 8) -> list[str]:
    """A sentence per trained model, in order of appearance, means over seeds; empty for any other experiment."""
    done = [record for record in select(records, experiment="train") if "bits_per_byte" in record.metrics]
    apart = [name for name in coordinates(done) if name not in ("model", "steps")] if done else []
    return [_training(here, where(here[0], ["model", *apart])) for here in by_cell(done).values()][:most]


def _training(records: Sequence[Record], model: str) -> str:
    bits, size, speed = (
        metric(records, name) for name in ("bits_per_byte", "parameters", "tokens_per_second")
    )
    steps = records[0].cell.get("steps")
    parameters = "" if size is None else f", {large(size)} parameters,"
    after = f" after {large(steps)} step{'s' * (steps != 1)}" if isinstance(steps, int) else ""
    rate = "" if speed is None else f" ({large(float(f'{speed:.2g}'))} tokens per second)"
    return f"Model {model}{parameters} needs {bits:.3f} bits per byte on held-out text{after}{rate}."


def _at_most(value: float) -> str:
    """A bound of one digit: rounded up, because a bound rounded down is not one."""
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(value))
    digit = math.ceil(value / 10.0**exponent)
    return f"{digit}e{exponent}" if digit < 10 else f"1e{exponent + 1}"


def _kept(records: Sequence[Record], model: str) -> str:
    measured = [scheme for scheme in distinct(records, "scheme") if _change(records, scheme) is not None]
    kept = [scheme for scheme in measured if abs(_change(records, scheme) or 0.0) <= KEPT]
    bits = exact_bits(records)
    if not measured or bits is None:
        return ""
    share = f"all {len(kept)}" if len(kept) == len(measured) else f"{len(kept)} of {len(measured)}"
    which = f": {listed(kept)}" if 0 < len(kept) < len(measured) else ""
    return (
        f"Model {model} needs {bits.mean:.3f} bits per byte on held-out text with exact attention; "
        f"{share} caches stay within {KEPT} of that{which}."
    )


def _changed(records: Sequence[Record], scheme: str) -> str:
    difference = _change(records, scheme)
    if difference is None or abs(difference) <= KEPT:
        return ""
    top1 = metric(records, "top1_agreement", scheme=scheme)
    agreement = "" if top1 is None else f" and keeps {100 * top1:.1f} % of the most likely tokens"
    number = metric(records, "condition_number", scheme=scheme)
    condition = "" if number is None else f" (condition number {large(number)} in the worst layer)"
    return f"{scheme} does not: it changes bits per byte by {change(difference)}{agreement}{condition}."


def _floor(records: Sequence[Record]) -> str:
    """What each compute dtype costs whatever the cache."""
    lowest = {}
    for dtype in compute_dtypes(records):
        here = select(records, dtype=dtype)
        errors = [record.metrics["attention_error"] for record in here if "attention_error" in record.metrics]
        if errors:
            lowest[dtype] = min(errors)
    if len(lowest) < 2:
        return ""
    parts = [f"{scientific(error, 0)} in {dtype}" for dtype, error in lowest.items()]
    return f"No cache does better than the arithmetic around it: the smallest attention error is {listed(parts)}."


def _smallest(records: Sequence[Record]) -> str:
    sizes = []
    for scheme in distinct(records, "scheme"):
        difference, ratio = _change(records, scheme), metric(records, "compression", scheme=scheme)
        if difference is not None and ratio is not None and abs(difference) <= KEPT:
            sizes.append((ratio, scheme))
    if not sizes:
        return ""
    ratio, scheme = max(sizes)
    return f"The smallest cache that stays within {KEPT} is {scheme}: {ratio:.2f} times smaller than bf16 KV."


def _conditioning(records: Sequence[Record], scheme: str) -> str:
    """How a scheme fares on each model, where it fails on one of them and the models differ in conditioning."""
    fared: list[tuple[str, float, float]] = []
    for model in distinct(records, "model"):
        number = metric(records, "condition_number", scheme=scheme, model=model)
        difference = _change(select(records, model=model), scheme)
        if number is not None and difference is not None:
            fared.append((model, difference, number))
    if len(fared) < 2 or max(abs(difference) for _, difference, _ in fared) <= KEPT:
        return ""
    parts = [f"{change(difference)} on {model} ({large(number)})" for model, difference, number in fared]
    return f"Conditioning and {scheme}, as change of bits per byte (condition number): {listed(parts)}."


def unmeasured(records: Sequence[Record], status: str) -> str:
    """The cells of a status other than ok, with their reasons."""
    missing = [record for record in records if record.status == status]
    if not missing:
        return ""
    parts = [
        f"{scheme} ({trouble(select(missing, scheme=scheme))})" for scheme in distinct(missing, "scheme")
    ]
    other = [record for record in missing if record.cell.get("scheme") is None]
    parts += [f"{len(other)} cells ({trouble(other)})"] if other else []
    return f"Not measured: {listed(parts)}."
