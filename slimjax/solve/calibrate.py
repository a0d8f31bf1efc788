"""What calibration keeps of a layer's real inputs: second moments, and rows set apart for choosing and reporting."""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

# Of every five batches three are fitted on, one chooses between candidates, one only reports.
TURN = ("fit", "fit", "fit", "choose", "held_out")
SAMPLE = 2048  # rows kept of each part, evenly strided


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Calibration:
    """Inputs of one attention layer, seen once.

    Attributes:
        second: float64 [D, D], mean of x x^T over the rows fitted on.
        fit: [n, D] some of the rows fitted on; their error is the calibration error.
        choose: [n, D] rows that decide between candidates.
        held_out: [n, D] rows that nothing was fitted or chosen on; their error is the one to believe.
        count: rows behind ``second``.
    """

    second: np.ndarray
    fit: np.ndarray
    choose: np.ndarray
    held_out: np.ndarray
    count: int


class Collector:
    """Streams the inputs of several layers into their calibrations; memory does not grow with the data.

    Neighbouring tokens resemble each other, so parts are whole batches (a clip, a window of text), never
    tokens of one batch.
    """

    def __init__(self, layers: int, sample: int = SAMPLE):
        self.sample = sample
        self._batches = 0
        self._second: list[np.ndarray | None] = [None] * layers
        self._count = [0] * layers
        self._rows = [{part: [] for part in set(TURN)} for _ in range(layers)]

    def add(self, inputs: Sequence[np.ndarray]) -> None:
        """One batch: for each layer its inputs, [rows, D].

        Raises:
            ValueError: another number of layers than before, or inputs that are not finite.
        """
        if len(inputs) != len(self._rows):
            raise ValueError(f"inputs of {len(inputs)} layers, expected {len(self._rows)}")
        part = TURN[self._batches % len(TURN)]
        self._batches += 1
        for layer, given in enumerate(inputs):
            rows = np.asarray(given, np.float64)
            if not np.isfinite(rows).all():
                raise ValueError(f"layer {layer}: inputs that are not finite")
            if part == "fit":
                before = self._second[layer]
                product = rows.T @ rows
                self._second[layer] = product if before is None else before + product
                self._count[layer] += len(rows)
            kept = self._rows[layer][part]
            kept.append(rows.astype(np.float32))
            if sum(map(len, kept)) > 2 * self.sample:
                kept[:] = [strided(np.concatenate(kept), self.sample)]

    def finish(self) -> tuple[Calibration, ...]:
        """The calibrations. Raises ValueError where fewer than five batches leave a part empty."""
        if self._batches < len(TURN):
            raise ValueError(
                f"{self._batches} batches of calibration data: at least {len(TURN)} are needed (three to fit, "
                "one to choose, one to report); give more clips or text, or cut them shorter"
            )
        return tuple(self._finished(layer) for layer in range(len(self._rows)))

    def _finished(self, layer: int) -> Calibration:
        second = self._second[layer]
        assert second is not None  # five batches hold a fitted one
        parts = {part: strided(np.concatenate(rows), self.sample) for part, rows in self._rows[layer].items()}
        return Calibration(second=second / self._count[layer], count=self._count[layer], **parts)


def strided(rows: np.ndarray, most: int) -> np.ndarray:
    """At most ``most`` rows, evenly spread."""
    return rows if len(rows) <= most else rows[np.linspace(0, len(rows) - 1, most).astype(int)]


def collect(batches: Iterable[Sequence[np.ndarray]], layers: int) -> tuple[Calibration, ...]:
    """The calibration of every layer from batches of inputs, each [rows, D]."""
    collector = Collector(layers)
    for batch in batches:
        collector.add(batch)
    return collector.finish()
