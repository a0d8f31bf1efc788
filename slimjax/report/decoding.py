"""What `decode_bench` shows of attention by itself over contexts: plots, and whether time grows as the bytes do."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from slimjax.records import Record
from slimjax.report.findings import findings, listed
from slimjax.report.plots import INK, MARKERS, PALETTE, frame, place_legend
from slimjax.report.samples import by_cell, distinct, metric, sample, select

PANELS = 4  # beside each other
APART = 4  # contexts between which growth is measured: the longest, and one that is as many times shorter
ALLOWED = 0.1  # of the ratio of bytes
PLACE = ("shape", "batch", "dtype")
LINE = ("scheme", "backend")


def decoding_findings(records: Sequence[Record]) -> list[str]:
    """The general sentences, and one on growth where there are contexts to tell it from."""
    return [*findings(records), *_growth(records)]


def _growth(records: Sequence[Record]) -> list[str]:
    """How a step's time grows with the context, beside how its bytes do."""
    within, beyond = 0, []
    for names, line in _lines(records, (*PLACE, *LINE)).items():
        contexts = sorted(distinct(line, "context"))
        pair = [context for context in contexts if context * APART == contexts[-1]] + contexts[-1:]
        times, sizes = ([value(line, context) for context in pair] for value in (_time, _bytes))
        if len(pair) < 2 or not all(times) or not all(sizes):
            continue
        grown, more = times[1] / times[0], sizes[1] / sizes[0]
        if abs(grown / more - 1) <= ALLOWED:
            within += 1
        else:
            shape, batch, dtype, scheme, backend = names
            beyond.append(
                f"{scheme} ({backend}, {shape}, batch {batch}, {dtype}: {grown:.2f} for {more:.2f})"
            )
    if not within + len(beyond):
        return []
    said = (
        f"To the longest context from one {APART} times shorter, a step's time grows as its bytes do, within "
    )
    said += f"{ALLOWED:.0%}, in {within} of {within + len(beyond)} cells"
    return [said + (f"; not in {listed(beyond)}." if beyond else ".")]


def decoding_plots(records: Sequence[Record]) -> dict[str, tuple[str, Figure]]:
    """`decode_time` and `bandwidth` against context, where there are several contexts."""
    records = [record for record in records if "context" in record.cell and "shape" in record.cell]
    if len({record.cell["context"] for record in records if record.metrics}) < 2:
        return {}
    return {
        "decode_time": (
            "Milliseconds of a step against the tokens in the cache.",
            _panels(records, "milliseconds", "milliseconds of a step", log=True),
        ),
        "bandwidth": (
            "Bytes that a step must read, over its time, as a share of the bandwidth of a plain copy.",
            _panels(records, "share_of_copy_bandwidth", "% of copy bandwidth", log=False),
        ),
    }


def _panels(records: Sequence[Record], name: str, title: str, *, log: bool) -> Figure:
    """A panel per shape, batch and dtype; a line per scheme and implementation."""
    places = list(_lines(records, PLACE).items())
    lines = [names for names, here in _lines(records, LINE).items() if any(name in r.metrics for r in here)]
    columns = min(PANELS, len(places))
    rows = -(-len(places) // columns)
    figure = Figure(figsize=(max(3.6 * columns, 6.5), 3.4 * rows + 1.2), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flat
    for axes, (place, here) in zip(panels, places, strict=False):
        shape, batch, dtype = place
        frame(axes, f"{shape}, batch {batch}, {dtype}", "tokens in the cache")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        if log:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        for index, names in enumerate(lines):
            points = _points(select(here, **dict(zip(LINE, names, strict=True))), name, 1 if log else 100)
            colour, mark = _look(index)
            axes.plot(*zip(*points, strict=True), color=colour, marker=mark, markersize=4) if points else None
    for axes in list(panels):
        axes.set_visible(False)
    figure.supylabel(title, color=INK, fontsize=10)
    handles = [
        Line2D([], [], color=_look(index)[0], marker=_look(index)[1], label=" ".join(map(str, names)))
        for index, names in enumerate(lines)
    ]
    place_legend(figure, handles)
    return figure


def _points(records: Sequence[Record], name: str, times: int) -> list[tuple[float, float]]:
    found = ((context, sample(records, name, context=context)) for context in distinct(records, "context"))
    return sorted((context, times * value.mean) for context, value in found if value is not None)


def _look(index: int) -> tuple[str, str]:
    return PALETTE[index % len(PALETTE)], MARKERS[index // len(PALETTE) % len(MARKERS)]


def _lines(records: Sequence[Record], names: Sequence[str]) -> dict[tuple[object, ...], list[Record]]:
    """Records that agree in these coordinates, in the order in which they come."""
    found: dict[tuple[object, ...], list[Record]] = {}
    for here in by_cell(records).values():
        found.setdefault(tuple(here[0].cell.get(name) for name in names), []).extend(here)
    return found


def _time(records: Sequence[Record], context: int) -> float:
    return metric(records, "milliseconds", context=context) or 0.0


def _bytes(records: Sequence[Record], context: int) -> float:
    """Megabytes: GB/s times milliseconds."""
    return (metric(records, "gigabytes_per_second", context=context) or 0.0) * _time(records, context)
