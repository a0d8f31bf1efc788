"""Tables and sentences of `slim_error`: what caches do to attention layers, what mends it, what predicts it."""

from collections.abc import Mapping, Sequence

from slimjax.records import STATUSES, Record
from slimjax.report.findings import listed, unmeasured, waiting
from slimjax.report.samples import distinct, measured, metric, select, trouble
from slimjax.report.tables import UNMEASURED, Column, Table, Value, large, scientific

PLAIN = "kv:bf16"
TOLERATED = 2e-3  # relative L2; what bf16 does to keys and values themselves is 1.7e-3
SHARED = ("e", "h")  # bases of one cache for all layers
ALONE = ("k:bf16", "k:fp16", "k:int16", "v1:bf16", "v1:int16")
TRAINED = "lm-"  # how the names of models trained here begin
ERRORS = (
    "Relative L2 of keys or values, whichever is larger, as attention reads them from the cache, on held-out inputs; "
    "of bases k and kr with the map that calibration chooses. Options 1 and 2 read the same rows. Bases e and h keep "
    "one cache for all layers."
)
Groups = Mapping[str, Sequence[Record]]


def groups(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records of each model's attention layers of one kind, by a name: `whisper-tiny.en, cross`."""
    found: dict[str, list[Record]] = {}
    for model in distinct(records, "model"):
        here = select(records, model=model)
        kinds = distinct(here, "attention")
        for kind in kinds:
            found[f"{model}, {kind}" if len(kinds) > 1 else str(model)] = select(here, attention=kind)
    return found


def errors(records: Sequence[Record], scheme: str, name: str = "value_error") -> list[float]:
    """A number of each layer of a group, first to last; empty unless all of them have it."""
    here = select(records, scheme=scheme)
    found = [metric(here, name, layer=layer) for layer in distinct(records, "layer")]
    return [] if None in found else found


def size(records: Sequence[Record], scheme: str) -> int | None:
    """Cache bytes per token of a group's layers together; None unless all are measured."""
    found = errors(records, scheme, "bytes_per_token")
    if not found:
        return None
    shared = select(records, scheme=scheme)[0].cell.get("basis") in SHARED
    return int(max(found) if shared else sum(found))


def extras(records: Sequence[Record], codec: str) -> dict[int, str]:
    """R -> scheme of basis k with this codec, R from 0 upwards."""
    here = select(records, basis="k", codec=codec)
    found = {record.cell.get("extra"): str(record.cell["scheme"]) for record in here}
    return {extra: found[extra] for extra in sorted(key for key in found if isinstance(key, int))}


# Tables ----------------------------------------------------------------------------------------------------


def slim_tables(records: Sequence[Record]) -> dict[str, Table]:
    """`errors_MODEL_KIND` for each group, `coordinates` (error against R) and `conditioning` (of W_K)."""
    named = groups(records)
    made = {f"errors_{name.replace(', ', '_')}": _errors_table(name, here) for name, here in named.items()}
    return made | {"coordinates": _coordinates_table(named), "conditioning": _conditioning_table(named)}


def _errors_table(name: str, records: Sequence[Record]) -> Table:
    layers, plain = distinct(records, "layer"), size(records, PLAIN)
    rows: list[tuple[Value, ...]] = []
    remarks = []
    for scheme in distinct(records, "scheme"):
        here, bytes_now = select(records, scheme=scheme), size(records, scheme)
        ratio = plain / bytes_now if plain and bytes_now else None
        values = (metric(here, "value_error", layer=layer) for layer in layers)
        rows.append((scheme, bytes_now, ratio, *values))
        remarks.append(trouble(here) or ("" if any(map(measured, here)) else UNMEASURED))
    columns = (
        Column("scheme"),
        Column("cache (bytes per token, all layers)", "count"),
        Column("bf16 KV / this cache", "ratio"),
        *(Column(f"error, layer {layer}", "error") for layer in layers),
    )
    return Table(f"Errors on {name}", columns, tuple(rows), tuple(remarks), ERRORS)


def _coordinates_table(named: Groups) -> Table:
    rows: list[tuple[Value, ...]] = []
    for name, here in named.items():
        for codec in distinct(select(here, basis="k"), "codec"):
            for extra, scheme in extras(here, codec).items():
                found = errors(here, scheme)
                names = ("exact_error", "calibration_error", "chosen_error")
                worst = (_most(errors(here, scheme, each)) for each in names)
                kept = f"{sum(error <= TOLERATED for error in found)} of {len(found)}" if found else None
                rows.append((name, codec, extra, size(here, scheme), *worst, kept))
    columns = (
        Column("layers"),
        Column("codec"),
        Column("R", "plain"),
        Column("cache (bytes per token, all layers)", "count"),
        Column("exact map, held-out", "error"),
        Column("chosen map, calibration", "error"),
        Column("chosen map, held-out", "error"),
        Column(f"layers within {scientific(TOLERATED, 0)}", "plain"),
    )
    note = "Relative L2 of V, worst layer. The exact map needs no calibration. The last column counts K's rounding."
    return Table("Extra coordinates", columns, tuple(rows), (), note, (), 3)


def _most(values: Sequence[float]) -> float | None:
    return max(values) if values else None


def _conditioning_table(named: Groups) -> Table:
    plain = [record for here in named.values() for record in select(here, basis="k", extra=0)]
    codecs = distinct(plain, "codec")
    rows: list[tuple[Value, ...]] = []
    for name, here in named.items():
        for layer in distinct(here, "layer"):
            at = select(here, layer=layer, extra=0, basis="k")
            row: list[Value] = [name, layer, metric(at, "condition_number"), metric(at, "noise_gain")]
            for codec in codecs:
                one = select(at, codec=codec)
                row += [predicted(one), metric(one, "exact_error"), metric(one, "chosen_error")]
            rows.append(tuple(row))
    columns = (
        Column("layers"),
        Column("layer", "plain"),
        Column("condition number of W_K", "large"),
        Column("noise gain", "large"),
        *(
            Column(f"k:{codec}, {what}", "error")
            for codec in codecs
            for what in ("predicted", "exact inverse", "chosen map")
        ),
    )
    note = (
        "Predicted, from the weights and the codec: rounding error of the cached rows times noise gain. Errors: "
        "relative L2 of V on held-out inputs."
    )
    return Table("Error and condition", columns, tuple(rows), (), note, (), 2)


def predicted(records: Sequence[Record]) -> float | None:
    """Rounding error times noise gain, of the first record that has both."""
    gain, rounding = metric(records, "noise_gain"), metric(records, "rounding_error")
    return None if gain is None or rounding is None else gain * rounding


# Sentences -------------------------------------------------------------------------------------------------


def slim_findings(records: Sequence[Record]) -> list[str]:
    """What holds and what fails, remedy by remedy; empty while nothing is measured."""
    named = groups(records)
    sentences = [
        _yardstick(named),
        *(_alone(named, scheme) for scheme in ALONE),
        *(_coordinates(named, codec) for codec in ("int16", "bf16")),
        _chosen(records),
        *(_smallest(name, here) for name, here in named.items()),
        *(_trained(named, scheme) for scheme in ("k:bf16", "v1:bf16")),
        _prediction(records),
    ]
    found = [sentence for sentence in sentences if sentence]
    found += [unmeasured(records, status) for status in STATUSES if status != "ok"]
    found += [waiting(records)] if any(map(measured, records)) else []
    return [sentence for sentence in found if sentence]


def _yardstick(named: Groups) -> str:
    worst = [max(found) for here in named.values() if (found := errors(here, PLAIN))]
    if not worst:
        return ""
    return (
        f"An ordinary {PLAIN} cache errs by {scientific(min(worst))} to {scientific(max(worst))} (relative L2 of "
        "keys or values on held-out inputs, worst layer); here an error up to "
        f"{scientific(TOLERATED, 0)} counts as none."
    )


def _alone(named: Groups, scheme: str) -> str:
    """How one 16-bit stream fares by itself, and whether a noise-aware map is enough."""
    places = [
        (name, layer, error)
        for name, here in named.items()
        for layer, error in zip(distinct(here, "layer"), errors(here, scheme), strict=False)
    ]
    if not places:
        return ""
    over = [place for place in places if place[2] > TOLERATED]
    if not over:
        return f"{scheme} alone stays within {scientific(TOLERATED, 0)} in all {len(places)} layers."
    name, layer, error = max(places, key=lambda place: place[2])
    exact = [value for here in named.values() for value in errors(here, scheme, "exact_error")]
    before = f"the exact inverse errs by up to {scientific(max(exact))}, " if exact else ""
    which = "the map that calibration chooses" if exact else "it errs"
    return (
        f"{scheme} alone fails: {before}{which} by more than {scientific(TOLERATED, 0)} in {len(over)} of "
        f"{len(places)} layers, by up to {scientific(error)} ({name}, layer {layer})."
    )


def _coordinates(named: Groups, codec: str) -> str:
    """From which R on every layer is within the tolerance; where none is enough, the page says so."""
    enough, never = [], []
    for name, here in named.items():
        found = {extra: errors(here, scheme) for extra, scheme in extras(here, codec).items()}
        found = {extra: values for extra, values in found.items() if values}
        if not max(found, default=0):
            continue
        good = [extra for extra in found if all(max(found[r]) <= TOLERATED for r in found if r >= extra)]
        last = max(found)
        if good:
            enough.append(f"R = {min(good)} on {name}")
        else:
            over = sum(error > TOLERATED for error in found[last])
            never.append(
                f"{name} ({over} of {len(found[last])} layers, up to {scientific(max(found[last]))} at +{last})"
            )
    if not enough and not never:
        return ""
    parts = []
    if enough:
        parts.append(f"bring every layer within {scientific(TOLERATED, 0)} from {listed(enough)}")
    if never:
        parts.append(f"are not enough on {listed(never)}")
    return f"Extra coordinates in {codec}: they {'; they '.join(parts)}."


def _chosen(records: Sequence[Record]) -> str:
    """Whether what calibration chooses is ever worse than the exact map on inputs that neither has seen."""
    cases = []
    for record in records:
        exact, chosen = (record.metrics.get(name) for name in ("exact_error", "chosen_error"))
        if exact and chosen:
            cases.append((chosen / exact, record.cell))
    if not cases:
        return ""
    worse = [case for case in cases if case[0] > 1.05]
    better = sum(ratio < 0.5 for ratio, _ in cases)
    half = f"less than half the exact map's error in {better} of {len(cases)} cases"
    if not worse:
        return f"The map that calibration chooses has {half}, and in none is it more than 5 % worse on held-out inputs."
    ratio, cell = max(cases, key=lambda case: case[0])
    place = f"{cell['scheme']}, {cell['model']}, {cell['attention']}, layer {cell['layer']}"
    return (
        f"The map that calibration chooses has {half}, but is more than 5 % worse on held-out inputs in "
        f"{len(worse)}, by up to {100 * (ratio - 1):.0f} % ({place})."
    )


def _smallest(name: str, records: Sequence[Record]) -> str:
    plain = size(records, PLAIN)
    smaller = []
    for scheme in distinct(records, "scheme"):
        now = size(records, scheme)
        if plain and now and now < plain:
            smaller.append((now, max(errors(records, scheme)), str(scheme)))
    good = sorted(each for each in smaller if each[1] <= TOLERATED)
    if not plain or not smaller:
        return ""
    if not good:
        return (
            f"On {name} none of the {len(smaller)} caches smaller than {PLAIN} keeps every layer within "
            f"{scientific(TOLERATED, 0)}."
        )
    now, _, scheme = good[0]
    which = listed([scheme for *_, scheme in good])
    return (
        f"On {name} {len(good)} of the {len(smaller)} caches smaller than {PLAIN} keep every layer within "
        f"{scientific(TOLERATED, 0)} ({which}); the smallest is {scheme}, "
        f"{plain / now:.2f} times smaller."
    )


def _trained(named: Groups, scheme: str) -> str:
    """The models trained here, side by side: does an easier W_K make plain slim attention work?"""
    parts, good, bad = [], [], []
    for name, here in named.items():
        found = errors(here, scheme, "exact_error") or errors(here, scheme)
        plain, condition = errors(here, PLAIN), errors(here, scheme, "condition_number")
        if not name.startswith(TRAINED) or not found or not plain:
            continue
        number = f" (condition number {large(max(condition))})" if condition else ""
        parts.append(f"{scientific(max(found))} on {name}{number}")
        (good if max(found) <= 2 * max(plain) else bad).append(name)
    if len(parts) < 2:
        return ""
    held = (
        f"{listed(good)} {'stays' if len(good) == 1 else 'stay'} within twice {PLAIN}'s error" if good else ""
    )
    lost = f"{listed(bad)} {'does' if len(bad) == 1 else 'do'} not" if bad else ""
    verdict = (
        ", ".join(filter(None, (held, lost if good else ""))) or f"none stays within twice {PLAIN}'s error"
    )
    kind = "with the exact inverse" if scheme.startswith("k") else "from the values"
    return f"{scheme} {kind} on the models trained here, worst layer: {listed(parts)}; {verdict}."


def _prediction(records: Sequence[Record]) -> str:
    ratios, bounded = [], 0
    for record in records:
        expected, error = predicted([record]), record.metrics.get("exact_error")
        if expected and error:
            ratios.append(error / expected)
            bound = record.metrics["rounding_error"] * record.metrics["condition_number"]
            bounded += error <= bound
    if not ratios:
        return ""
    near = sum(0.5 <= ratio <= 2 for ratio in ratios)
    return (
        "Rounding error times noise gain, from the weights and the codec, predicts the exact map's error within a "
        f"factor of 2 in {near} of {len(ratios)} cases (measured over predicted: {min(ratios):.2g} to "
        f"{max(ratios):.2g}); rounding error times condition number exceeds it in {bounded}."
    )
