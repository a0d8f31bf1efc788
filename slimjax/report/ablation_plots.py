"""Plots of `compare`: KL against bytes per token of all ways to cache, and KL along the sequence."""

import itertools
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation

from slimjax.records import Record
from slimjax.report.ablation import by_window
from slimjax.report.ablation_front import collected, defaults, family
from slimjax.report.front import Point, front
from slimjax.report.plots import (
    INK,
    MARKERS,
    PALETTE,
    bytes_axis,
    frame,
    label,
    place_legend,
    spread_labels,
)
from slimjax.report.positions import ranges
from slimjax.report.samples import distinct, select

MODELS = 3  # panels side by side
LINES = 8  # in a panel of KL by position
LABEL = 26  # characters of a line of a label


def ablation_plots(records: Sequence[Record]) -> dict[str, tuple[str, Figure]]:
    """`kl_bytes` of all, `kl_bytes_STUDY` for each study, `kl_position`, those that have something to show."""
    found = {}
    caption = "KL to the exact model against cache size; dim caches are beaten in both by another."
    studies = distinct(records, "study")
    if len(studies) > 1 and (figure := pareto(defaults(records))):
        found["kl_bytes"] = (f"All studies: {caption}", figure)
    records = by_window(records)
    for study in studies:
        here = select(records, study=study)
        if figure := pareto(defaults(here) if study == "pareto" else here):
            found[f"kl_bytes_{study}"] = (caption, figure)
    if figure := positions(select(records, study="context")):
        caption = "KL to the exact model along the sequence; bars are 95 % intervals over blocks of tokens."
        found["kl_position"] = (caption, figure)
    return found


def families(records: Sequence[Record]) -> list[str]:
    """What is told apart by colour: the codecs, of basis kv without it, of other bases with it; and SAS."""
    return list(dict.fromkeys(map(family, records)))


def look(names: Sequence[str], name: str) -> tuple[str, str]:
    """Colour and mark."""
    place = names.index(name)
    return PALETTE[place % len(PALETTE)], MARKERS[place // len(PALETTE) % len(MARKERS)]


def pareto(records: Sequence[Record]) -> Figure | None:
    """A panel per model; caches on the front are filled, labelled and joined. None where all are of one size."""
    models = [model for model in distinct(records, "model") if _sizes(select(records, model=model)) > 1][
        :MODELS
    ]
    if not models:
        return None
    names = families(records)
    figure = Figure(figsize=(max(5.6 * len(models), 7.5), 5.6), layout="constrained")
    panels = figure.subplots(1, len(models), squeeze=False)[0]
    labels = {}
    for model, axes in zip(models, panels, strict=True):
        bytes_axis(axes, str(model))
        axes.set_yscale("log")
        labels[axes] = _panel(axes, _points(select(records, model=model)), names)
    panels[0].set_ylabel("KL to the exact model (nats per token)", color=INK)
    handles = [
        Line2D([], [], linestyle="none", label=name, marker=look(names, name)[1], color=look(names, name)[0])
        for name in names
    ]
    place_legend(figure, handles)
    spread_labels(figure, labels)
    return figure


def _points(records: Sequence[Record]) -> list[Point]:
    """Of all ways; a log axis has no room for a KL of 0."""
    return [point for point in collected(records).points if point[1].mean > 0]


def _sizes(records: Sequence[Record]) -> int:
    return len({size for size, *_ in _points(records)})


def _panel(axes: Axes, found: Sequence[Point], names: Sequence[str]) -> list[Annotation]:
    """Marks and the front's steps; the labels are still on top of their marks."""
    best = front(found)
    for point in found:
        size, cost, _, name = point
        (colour, mark), kept = look(names, name), point in best
        axes.plot(
            size,
            cost.mean,
            mark,
            color=colour,
            markersize=8 if kept else 6,
            markeredgewidth=0,
            alpha=1.0 if kept else 0.45,
            zorder=4 if kept else 3,
        )
    path = [(size, cost.mean) for size, cost, *_ in best]
    corners = [(right[0], left[1]) for left, right in itertools.pairwise(path)]
    steps = [point for step in itertools.zip_longest(path, corners) for point in step if point]
    if steps:
        xs, ys = zip(*steps, strict=True)
        axes.plot(xs, ys, color="#808080", linewidth=1.2, linestyle=(0, (4, 2)), zorder=2)
    alone = {
        (size, cost.mean): (text, name) for size, cost, text, name in reversed(best)
    }  # of equals the first
    return [
        label(axes, size, mean, _folded(text), look(names, name)[0])
        for (size, mean), (text, name) in alone.items()
    ]


def _folded(text: str) -> str:
    """A long label in two lines, options in the second: a panel is not wide."""
    return text.replace("(", "\n(", 1) if len(text) > LABEL else text


def positions(records: Sequence[Record]) -> Figure | None:
    """KL by ranges of positions, a line per way; None where no window is long enough."""
    asked = [record for record in records if "logit_kl_by_position" in record.metrics]
    models = distinct(asked, "model")[:MODELS]
    if not models:
        return None
    schemes = distinct(asked, "scheme")[:LINES]
    figure = Figure(figsize=(max(4.8 * len(models), 6.4), 4.6), layout="constrained")
    panels = figure.subplots(1, len(models), squeeze=False)[0]
    for model, axes in zip(models, panels, strict=True):
        frame(axes, str(model), "position (tokens)")
        for record in select(asked, model=model):
            if record.cell["scheme"] not in schemes or min(record.metrics["logit_kl_by_position"]) <= 0:
                continue
            colour, mark = look(schemes, str(record.cell["scheme"]))
            axes.plot(
                record.metrics["positions"],
                record.metrics["logit_kl_by_position"],
                marker=mark,
                color=colour,
                linewidth=1.6,
            )
            for place in ranges(record):
                if (interval := place.interval) and interval.low > 0:  # a log axis ends above 0
                    ends = [interval.low, interval.high]
                    axes.plot([place.last + 1] * 2, ends, color=colour, linewidth=1.0, alpha=0.6)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    panels[0].set_ylabel("KL to the exact model (nats per token)", color=INK)
    handles = [
        Line2D([], [], label=scheme, marker=look(schemes, scheme)[1], color=look(schemes, scheme)[0])
        for scheme in schemes
    ]
    place_legend(figure, handles)
    return figure
