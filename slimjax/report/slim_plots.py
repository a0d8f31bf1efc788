"""Plots of `slim_error`: error against bytes, against extra coordinates, against what predicts it."""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation

from slimjax.records import Record
from slimjax.report.plots import (
    INK,
    MARKERS,
    PALETTE,
    basis_colour,
    bytes_axis,
    frame,
    label,
    legend,
    place_legend,
    spread_labels,
)
from slimjax.report.samples import distinct, metric, select
from slimjax.report.slim import PLAIN, TOLERATED, errors, extras, groups, predicted, size

WIDE = 3  # panels in a row
GREY = "#808080"
DASHED, DOTTED = (0, (4, 2)), (0, (1, 1.5))
BARE = 0.3  # where R = 0 stands on a logarithmic axis of R


def slim_plots(records: Sequence[Record]) -> dict[str, tuple[str, Figure]]:
    """Every plot that has something to show, by file name, with its caption."""
    made: dict[str, tuple[str, Figure]] = {}
    named = groups(records)
    if any(errors(here, str(scheme)) for here in named.values() for scheme in distinct(here, "scheme")):
        made["error_bytes"] = (
            f"Error against cache size: the worst layer, and down to the best. Dotted: {TOLERATED:g}.",
            bytes_plot(records),
        )
    if any(len(extras(here, "int16")) > 1 for here in named.values()):
        made["error_extra"] = ("Error against extra coordinates.", extra_plot(records))
    if any(predicted([record]) and "exact_error" in record.metrics for record in records):
        made["error_condition"] = (
            "Error of the exact map, layer by layer, and what predicts it.",
            condition_plot(records),
        )
    return made


def _panels(names: Sequence[str], height: float) -> tuple[Figure, dict[str, Axes]]:
    """A panel per name, `WIDE` in a row, errors on one logarithmic axis."""
    columns = min(WIDE, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(max(4.6 * columns, 6.4), height * rows + 0.6), layout="constrained")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    for line in grid:
        line[0].set_yscale("log")
        line[0].set_ylabel("error of keys or values (relative L2)", color=INK)
    return figure, dict(zip(names, grid.flat, strict=False))


# Against bytes ---------------------------------------------------------------------------------------------


def bytes_plot(records: Sequence[Record]) -> Figure:
    """Error of every scheme against its cache bytes per token, a panel per kind of layer."""
    named, bases = groups(records), distinct(records, "basis")
    figure, panels = _panels(list(named), 4.6)
    labels = {}
    for name, axes in panels.items():
        bytes_axis(axes, name)
        labels[axes] = _bytes_panel(axes, named[name], bases)
    legend(figure, bases, ())
    spread_labels(figure, labels)
    return figure


def _bytes_panel(axes: Axes, records: Sequence[Record], bases: Sequence[str]) -> list[Annotation]:
    """Marks, the lines of +R, and the labels, still on top of their marks."""
    labels, sizes, named = [], [], _named(records)
    for scheme in map(str, distinct(records, "scheme")):
        found, bytes_now = errors(records, scheme), size(records, scheme)
        if not found or not bytes_now:
            continue
        cell = select(records, scheme=scheme)[0].cell
        colour, extra = basis_colour(bases, str(cell.get("basis"))), cell.get("extra")
        axes.plot([bytes_now] * 2, [max(found), min(found)], "-", color=colour, alpha=0.35, linewidth=2)
        axes.plot(bytes_now, max(found), "o", color=colour, markersize=5 if extra else 7, markeredgewidth=0)
        sizes.append(bytes_now)
        if not extra or scheme in named:
            labels.append(label(axes, bytes_now, max(found), scheme, colour))
    for codec in distinct(select(records, basis="k"), "codec"):
        path = [
            (now, max(found))
            for scheme in extras(records, codec).values()
            if (now := size(records, scheme)) and (found := errors(records, scheme))
        ]
        if path:
            axes.plot(*zip(*path, strict=True), color=basis_colour(bases, "k"), linewidth=0.8)
    if sizes:  # not `axhline`: labels keep clear of lines in units of the data alone
        across = [min(sizes) / 1.3, max(sizes) * 1.3]
        axes.plot(across, [TOLERATED, TOLERATED], color=GREY, linewidth=1, linestyle=":")
    return labels


def _named(records: Sequence[Record]) -> set[str]:
    """The schemes with extra coordinates that have a label: of each codec the first that is enough, and the last."""
    found = set()
    for codec in distinct(select(records, basis="k"), "codec"):
        known = list(extras(records, codec).values())
        enough = [scheme for scheme in known if max(errors(records, scheme), default=1.0) <= TOLERATED]
        found |= {*enough[:1], *known[-1:]}
    return found


# Against R -------------------------------------------------------------------------------------------------


def extra_plot(records: Sequence[Record]) -> Figure:
    """Error against R: int16 layer by layer, exact and chosen map; bf16's worst layer."""
    named = groups(records)
    figure, panels = _panels(list(named), 3.9)
    for name, axes in panels.items():
        _extra_panel(axes, name, named[name])
    layers = max(len(distinct(here, "layer")) for here in named.values())
    handles = [Line2D([], [], color=PALETTE[i], label=f"layer {i}") for i in range(layers)]
    handles += [
        Line2D([], [], color=INK, label="k:int16+R, chosen map"),
        Line2D([], [], color=INK, linestyle=DOTTED, label="k:int16+R, exact map"),
        Line2D([], [], color=GREY, linestyle=DASHED, marker="s", markersize=4, label="k:bf16+R, worst layer"),
        Line2D([], [], color=GREY, linestyle=":", label=f"{PLAIN}, worst layer"),
    ]
    place_legend(figure, handles)
    spread_labels(figure, {})
    return figure


def _extra_panel(axes: Axes, name: str, records: Sequence[Record]) -> None:
    frame(axes, name, "extra coordinates R")
    found = extras(records, "int16")
    places = [max(extra, BARE) for extra in found]
    chosen = [errors(records, scheme) for scheme in found.values()]
    exact = [_exact(records, scheme) for scheme in found.values()]
    for style, curves in (("-", chosen), (DOTTED, exact)):
        if all(curves):
            for index, curve in enumerate(zip(*curves, strict=True)):
                axes.plot(places, curve, linestyle=style, color=PALETTE[index % len(PALETTE)], linewidth=1.6)
    coarse = {
        max(r, BARE): max(e)
        for r, scheme in extras(records, "bf16").items()
        if (e := errors(records, scheme))
    }
    if coarse:
        axes.plot(list(coarse), list(coarse.values()), color=GREY, linestyle=DASHED, marker="s", markersize=4)
    if plain := errors(records, PLAIN):
        axes.axhline(max(plain), color=GREY, linewidth=1.2, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_xticks(places)
    axes.xaxis.set_major_formatter(lambda place, _: f"{place:.0f}")
    axes.minorticks_off()


def _exact(records: Sequence[Record], scheme: str) -> list[float]:
    """Errors of the exact map layer by layer: of the values, or of the cached rows where that is larger."""
    both = (errors(records, scheme, name) for name in ("exact_error", "rounding_error"))
    return [max(pair) for pair in zip(*both, strict=True)]


# Against what predicts it ----------------------------------------------------------------------------------


def condition_plot(records: Sequence[Record]) -> Figure:
    """Error of the exact map against condition number and against rounding times noise gain; hollow: R > 0."""
    here = [r for r in records if predicted([r]) and r.metrics.get("exact_error")]
    named, codecs = groups(here), distinct(here, "codec")
    figure = Figure(figsize=(11.5, 5.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _scatter(left, named, codecs, lambda record: record.metrics["condition_number"])
    _scatter(right, named, codecs, lambda record: predicted([record]) or 0.0)
    for axes, what in (
        (left, "condition number of [W_K, U]"),
        (right, "predicted error: rounding times noise gain"),
    ):
        frame(axes, "", what)
        axes.set_xscale("log")
        axes.set_yscale("log")
    left.set_ylabel("error of V, exact inverse (relative L2)", color=INK)
    for index, codec in enumerate(codecs):
        rounding = float(np.median([metric([r], "rounding_error") for r in select(here, codec=codec)]))
        ends = np.array(
            [
                min(r.metrics["condition_number"] for r in here),
                max(r.metrics["condition_number"] for r in here),
            ]
        )
        left.plot(ends, rounding * ends, color=PALETTE[index], linewidth=1, linestyle=DASHED, zorder=1)
    both = np.array([min(predicted([r]) or 1.0 for r in here), max(predicted([r]) or 1.0 for r in here)])
    right.plot(both, both, color=GREY, linewidth=1, linestyle=DASHED, zorder=1)
    handles = [
        Line2D([], [], linestyle="none", marker="o", color=PALETTE[i], label=str(c))
        for i, c in enumerate(codecs)
    ]
    handles += [
        Line2D([], [], linestyle="none", marker=mark, color=INK, label=name)
        for mark, name in zip(itertools.cycle(MARKERS), named, strict=False)
    ]
    handles += [
        Line2D([], [], linestyle="none", marker="o", mfc="none", mec=INK, label="with R > 0"),
        Line2D(
            [], [], color=GREY, linewidth=1, linestyle=DASHED, label="left: rounding times condition number"
        ),
        Line2D([], [], color=GREY, linewidth=1, linestyle=DASHED, label="right: as predicted"),
    ]
    place_legend(figure, handles)
    spread_labels(figure, {})
    return figure


def _scatter(
    axes: Axes, named: dict[str, list[Record]], codecs: Sequence[str], across: Callable[[Record], float]
) -> None:
    for mark, records in zip(itertools.cycle(MARKERS), named.values(), strict=False):
        for record in records:
            colour = PALETTE[codecs.index(record.cell["codec"])]
            face = "none" if record.cell.get("extra") else colour
            look = {"marker": mark, "markersize": 5.5, "markeredgecolor": colour, "markerfacecolor": face}
            axes.plot(across(record), record.metrics["exact_error"], linestyle="none", alpha=0.8, **look)
