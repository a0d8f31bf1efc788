"""Plots as pure functions of Records and metrics; matplotlib's object interface, no global state.

Colours are mid-tones that read on white and on near-black; a saved file has a white ground, an inlined SVG
(`inline_svg`) none, with text and axes in the colour of the page.
"""

import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation, Text
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from slimjax.records import Record
from slimjax.report.equivalence import compute_dtypes
from slimjax.report.samples import distinct, sample, select

INK = "#1a1b1e"  # no series has this colour: `inline_svg` replaces it
PALETTE = ("#2f7ed8", "#e0632b", "#2a9d68", "#a65fd0", "#b8860b", "#c93c63", "#5b6b7b")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")


def equivalence_plot(records: Sequence[Record]) -> Figure:
    """Attention error against cache bytes per token: a panel per compute dtype, a label per scheme.

    The first model is filled and labelled; the others are smaller hollow marks of the same colour (the basis).
    """
    dtypes, models, bases = compute_dtypes(records), distinct(records, "model"), distinct(records, "basis")
    figure = Figure(figsize=(4.1 * max(len(dtypes), 1), 4.9), layout="constrained")
    panels = figure.subplots(1, max(len(dtypes), 1), sharey=True, squeeze=False)[0]
    labels = {}
    for axes, dtype in zip(panels, dtypes, strict=False):
        bytes_axis(axes, f"{dtype} compute")
        axes.set_yscale("log")
        labels[axes] = _scatter(axes, select(records, dtype=dtype), models, bases)
    panels[0].set_ylabel("attention error, worst layer (relative L2)", color=INK)
    legend(figure, bases, models)
    spread_labels(figure, labels)
    return figure


def _scatter(
    axes: Axes, records: Sequence[Record], models: Sequence[str], bases: Sequence[str]
) -> list[Annotation]:
    """Marks of every model; the labels of the first, still on top of their marks."""
    labels = []
    for model, basis in itertools.product(models, bases):
        points = _points(select(records, model=model, basis=basis))
        colour, first = basis_colour(bases, basis), model == models[0]
        axes.plot(
            [x for x, _, _ in points],
            [y for _, y, _ in points],
            linestyle="none",
            marker=MARKERS[models.index(model) % len(MARKERS)],
            markersize=8 if first else 5.5,
            markerfacecolor=colour if first else "none",
            markeredgecolor=colour,
            zorder=3 if first else 2,
        )
        labels += [label(axes, x, y, text, colour) for x, y, text in points if first]
    return labels


def loss_plot(metrics: Sequence[Mapping[str, Any]]) -> Figure:
    """Training loss against step, a curve per model and run, in bits per byte or else nats per token.

    Of a step that was repeated after an interruption the last line counts; a resume is a dotted line.
    """
    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    axes = figure.subplots()
    unit = "bits_per_byte" if any("bits_per_byte" in line for line in metrics) else "loss"
    curves: dict[str, dict[int, float]] = {}
    resumed = []
    for line in metrics:
        name = " · ".join(str(line[key]) for key in ("model", "run") if line.get(key))
        if line.get("event") == "resume":
            resumed.append(line["step"])
        elif unit in line and "step" in line:
            curves.setdefault(name, {})[line["step"]] = line[unit]
    for index, (name, curve) in enumerate(curves.items()):
        steps, colour = sorted(curve), PALETTE[index % len(PALETTE)]
        style = ("-", "--", ":")[index // len(PALETTE) % 3]
        mark = "o" if len(steps) == 1 else ""  # a curve of one point would not show
        axes.plot(steps, [curve[s] for s in steps], style + mark, color=colour, linewidth=1.8, label=name)
    for step in dict.fromkeys(resumed):
        axes.axvline(step, color="#808080", linewidth=1, linestyle=":")
    frame(axes, "", "training step" + (" (dotted: resumed)" if resumed else ""))
    axes.set_ylabel(
        "training loss (bits per byte)" if unit == "bits_per_byte" else "training loss (nats per token)",
        color=INK,
    )
    if any(curves):
        axes.legend(frameon=False, labelcolor=INK)
    _settle(figure)
    return figure


def save(figure: Figure, stem: Path) -> str:
    """Write stem.png (180 dpi) and stem.svg on a white ground; the latter is returned."""
    figure.savefig(stem.with_suffix(".png"), dpi=180, facecolor="white")
    text = _svg(figure)
    stem.with_suffix(".svg").write_text(text)
    return text


def inline_svg(text: str, name: str) -> str:
    """A saved plot as an <svg> element in the colours of the page around it; `name` keeps its ids apart."""
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = text.replace("fill: #ffffff", "fill: none", 1)  # the ground, which is drawn first
    return re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", text)


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    with matplotlib.rc_context(
        {"svg.fonttype": "path", "svg.hashsalt": "slimjax"}
    ):  # equal plots, equal bytes
        figure.savefig(text, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})
    return text.getvalue()


def _points(records: Sequence[Record]) -> list[tuple[float, float, str]]:
    """Bytes, error (means over seeds) and scheme where there are both; a log axis has no room for an error of 0."""
    points = []
    for scheme in distinct(records, "scheme"):
        here = select(records, scheme=scheme)
        size, error = sample(here, "bytes_per_token"), sample(here, "attention_error")
        if size is not None and error is not None and error.mean > 0:
            points.append((size.mean, error.mean, str(scheme)))
    return points


def basis_colour(bases: Sequence[str], basis: str) -> str:
    """One colour per basis; grey where it is not told."""
    return PALETTE[bases.index(basis) % len(PALETTE)] if basis in bases else "#808080"


def frame(axes: Axes, title: str, xlabel: str) -> None:
    """Title, grid and spines as all plots have them; the x axis is one of plain numbers."""
    axes.set_facecolor("none")
    axes.set_title(title, color=INK, fontsize=11)
    axes.set_xlabel(xlabel, color=INK)
    axes.tick_params(colors=INK, which="both")
    axes.grid(True, which="major", color="#808080", alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(_thousands)


def bytes_axis(axes: Axes, title: str, *, last: bool = True) -> None:
    """An axis of bytes per token in powers of 2; last: whether it is the lowest panel, which names it."""
    frame(axes, title, "cache (bytes per token, all layers)" if last else "")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(_thousands)
    axes.margins(x=0.22, y=0.12)


def _thousands(value: float, _: float) -> str:
    return f"{value:,.0f}"


def legend(figure: Figure, bases: Sequence[str], models: Sequence[str]) -> None:
    """Colours of the bases and, where there are several, marks of the models; below the panels."""

    def mark(label: str, marker: str, edge: str, face: str) -> Line2D:
        return Line2D([], [], linestyle="none", label=label, marker=marker, mec=edge, mfc=face)

    handles = [
        mark(f"basis {basis}", "o", basis_colour(bases, basis), basis_colour(bases, basis)) for basis in bases
    ]
    if len(models) > 1:
        marks = itertools.cycle(MARKERS)
        handles += [
            mark(f"model {model}", next(marks), INK, "none" if i else INK) for i, model in enumerate(models)
        ]
    if handles:
        place_legend(figure, handles)


def place_legend(figure: Figure, handles: Sequence[Line2D]) -> None:
    """In as many columns as fit into the figure; for a name wider than the figure the figure grows."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    for columns in range(len(handles), 0, -1):
        box = figure.legend(
            handles=handles, loc="outside lower center", ncols=columns, frameon=False, labelcolor=INK
        )
        wide = box.get_window_extent(renderer).width
        if wide <= figure.bbox.width:
            return
        if columns == 1:
            figure.set_figwidth(wide / figure.dpi + 0.1)
        else:
            box.remove()


def label(axes: Axes, x: float, y: float, text: str, colour: str) -> Annotation:
    """A label on top of its mark, for `spread_labels` to move."""
    leader = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}
    return axes.annotate(
        text,
        (x, y),
        xytext=(0, 0),
        textcoords="offset points",
        ha="center",
        va="center",
        fontsize=9,
        color=colour,
        arrowprops=leader,
    )


def spread_labels(figure: Figure, labels: Mapping[Axes, Sequence[Annotation]]) -> None:
    """Move each label to the nearest place where it covers no mark and no other label; ticks are thinned first."""
    canvas = _settle(figure)
    renderer = canvas.get_renderer()
    _thin_ticks(figure, renderer)
    for axes, texts in labels.items():
        frame = axes.get_window_extent(renderer)
        marks = [_pixels(line) for line in axes.lines]
        taken = [
            Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in np.concatenate([np.empty((0, 2)), *marks])
        ]
        for text in texts:
            size = Text.get_window_extent(text, renderer)  # of an Annotation it would include the leader
            anchor = axes.transData.transform(np.asarray(text.xy))
            box, offset = _free_place(anchor, size.width + 4, size.height + 2, taken, frame)
            text.set_position((offset[0] * 72 / figure.dpi, offset[1] * 72 / figure.dpi))
            taken.append(box)


def _thin_ticks(figure: Figure, renderer: RendererAgg, gap: float = 10) -> None:
    """Drop, in all panels alike, each x tick whose label comes within `gap` pixels of the one before it.

    The one before may be the next panel's: panels stand closer than a wide label at their edge has room for.
    """
    rows: dict[int, list[tuple[Bbox, float]]] = {}
    for axes in figure.axes:
        row = rows.setdefault(round(axes.get_window_extent(renderer).y0), [])
        inside = set(_ticks(axes))
        for tick in axes.xaxis.get_major_ticks():
            if tick.get_loc() in inside and tick.label1.get_visible():  # upper panels may have none
                row.append((tick.label1.get_window_extent(renderer), float(tick.get_loc())))
    dropped: set[float] = set()
    for row in rows.values():
        end = -math.inf
        for box, tick in sorted(row, key=lambda pair: pair[0].x0):
            if tick in dropped or not box.width:
                continue
            if box.x0 < end + gap:
                dropped.add(tick)
            else:
                end = box.x1
    for axes in figure.axes if dropped else ():
        axes.set_xticks([tick for tick in _ticks(axes) if tick not in dropped])


def _ticks(axes: Axes) -> list[float]:
    """The x ticks between the limits: a locator gives some beyond."""
    low, high = axes.get_xlim()
    return [float(tick) for tick in axes.get_xticks() if low <= tick <= high]


def _settle(figure: Figure) -> FigureCanvasAgg:
    """Lay the panels out, once for all: places are only known after it, and each saving would do it again."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    figure.set_layout_engine("none")
    return canvas


def _pixels(line: Line2D) -> np.ndarray:
    """Where a line is on the canvas [points, 2]: its marks, or if it is drawn, places 6 pixels apart along it."""
    assert line.axes is not None
    corners = line.axes.transData.transform(np.asarray(line.get_xydata()))
    if line.get_linestyle() in ("None", "none", "") or len(corners) < 2:
        return corners
    pieces = [
        np.linspace(a, b, max(2, int(np.hypot(*(b - a)) // 6) + 1)) for a, b in itertools.pairwise(corners)
    ]
    return np.concatenate(pieces)


def _free_place(
    anchor: np.ndarray, width: float, height: float, taken: Sequence[Bbox], frame: Bbox
) -> tuple[Bbox, tuple[float, float]]:
    """The box of the label and its centre's offset from the anchor, in pixels; tried from near to far."""
    for ring in range(1, 9):
        for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1)):
            offset = (dx * (width / 2 + 4 + 6 * ring), dy * (height / 2 + 2 + 6 * ring))
            box = Bbox.from_bounds(
                anchor[0] + offset[0] - width / 2, anchor[1] + offset[1] - height / 2, width, height
            )
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in taken):
                return box, offset
    return Bbox.from_bounds(anchor[0], anchor[1], width, height), (width / 2 + 8, 0.0)
