"""Pareto fronts: which caches are worth having, and which another beats in size and in error at once."""

import itertools
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import MaxNLocator

from slimjax.records import Record
from slimjax.report.equivalence import compute_dtypes
from slimjax.report.plots import INK, basis_colour, bytes_axis, label, legend, spread_labels
from slimjax.report.samples import Spread, distinct, sample, select

MODELS = 3  # panels side by side
SMALL = 1e-4  # bits per byte; the axis of changes is linear below
Point = tuple[float, Spread, str, str]  # bytes per token, what the cache costs, scheme, basis
METRICS = {
    "attention_error": "attention error, worst layer (relative L2)",
    "bits_per_byte_change": "bits per byte, size of the change",
}


def points(records: Sequence[Record], name: str) -> list[Point]:
    """A point per scheme that has both numbers, in the order of the records; a change counts by its size."""
    found = []
    for scheme in distinct(records, "scheme"):
        here = select(records, scheme=scheme)
        size, cost = sample(here, "bytes_per_token"), sample(here, name)
        if size is not None and cost is not None:
            basis = str(here[0].cell.get("basis", ""))
            found.append((float(size.mean), Spread(abs(cost.mean), cost.deviation, cost.n), scheme, basis))
    return found


def front(found: Sequence[Point]) -> list[Point]:
    """The points that no other beats: none is as small and as good, and better in one of both. Smallest first.

    Of points that are equal in both numbers all stay.
    """

    def beaten(point: Point) -> bool:
        return any(
            other[0] <= point[0]
            and other[1].mean <= point[1].mean
            and (other[0] < point[0] or other[1].mean < point[1].mean)
            for other in found
        )

    return sorted((point for point in found if not beaten(point)), key=lambda point: (point[0], point[2]))


def pareto_plot(records: Sequence[Record]) -> Figure | None:
    """Cost against cache bytes per token: a row per cost, a column per model; None if nothing has both numbers.

    Points on the front are filled, labelled and joined by the steps of what is attainable; the others are dim.
    Bars are the standard deviation over seeds. The first compute dtype stands for the model.
    """
    models, bases = distinct(records, "model")[:MODELS], distinct(records, "basis")
    dtype = next(iter(compute_dtypes(records)), None)
    here = select(records, dtype=dtype) if dtype else list(records)
    rows = [name for name in METRICS if any(points(select(here, model=model), name) for model in models)]
    if not rows:
        return None
    figure = Figure(figsize=(max(4.3 * len(models), 6.4), 4.1 * len(rows) + 0.5), layout="constrained")
    panels = figure.subplots(len(rows), len(models), sharex=True, sharey="row", squeeze=False)
    labels = {}
    for name, line in zip(rows, panels, strict=True):
        line[0].set_ylabel(METRICS[name], color=INK)
        for model, axes in zip(models, line, strict=True):
            title = f"{model}, {dtype} compute" if dtype else str(model)
            bytes_axis(axes, title if name == rows[0] else "", last=name == rows[-1])
            labels[axes] = _panel(axes, points(select(here, model=model), name), bases, name)
        if name != "attention_error":
            _changes_axis(
                line[0], [point for model in models for point in points(select(here, model=model), name)]
            )
    legend(figure, bases, ())
    spread_labels(figure, labels)
    return figure


def _panel(axes: Axes, found: Sequence[Point], bases: Sequence[str], name: str) -> list[Annotation]:
    """One panel's marks; the labels are still on top of them."""
    if name == "attention_error":
        found = [point for point in found if point[1].mean > 0]  # a log axis has no room for 0
        axes.set_yscale("log")
    best = front(found)
    for point in found:
        size, cost, _, basis = point
        colour, kept = basis_colour(bases, basis), point in best
        look = {"color": colour, "alpha": 1.0 if kept else 0.35, "zorder": 4 if kept else 3}
        axes.plot(size, cost.mean, "o", markersize=8 if kept else 6, markeredgewidth=0, **look)
        if cost.n > 1:
            low = cost.mean - min(cost.deviation, cost.mean * 0.999)  # a log axis ends above 0
            axes.plot([size, size], [low, cost.mean + cost.deviation], **look)
    path = [(size, cost.mean) for size, cost, *_ in best]
    corners = [(right[0], left[1]) for left, right in itertools.pairwise(path)]
    path = [point for step in itertools.zip_longest(path, corners) for point in step if point]
    if path:
        xs, ys = zip(*path, strict=True)
        axes.plot(xs, ys, color="#808080", linewidth=1.2, linestyle=(0, (4, 2)), zorder=2)
    return [
        label(axes, size, cost.mean, scheme, basis_colour(bases, basis)) for size, cost, scheme, basis in best
    ]


def _changes_axis(axes: Axes, found: Sequence[Point]) -> None:
    """The axis of a row of changes: from 0, which no log axis has; linear where decades would have no tick but 0.

    Below 0 there is room for the marks at 0. Called last, because it ends the scaling.
    """
    top = max(cost.mean + cost.deviation for _, cost, *_ in found)
    if top > SMALL:
        axes.set_yscale("symlog", linthresh=SMALL, linscale=0.6)
        axes.set_ylim(bottom=-0.3 * SMALL)
        return
    top = top or SMALL
    axes.set_ylim(-0.1 * top, 1.15 * top)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(_scientific)


def _scientific(value: float, _: float) -> str:
    """`2e-5`, `1.5e-5`, `0`."""
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}" if value else "0"
