"""A model at work on its user's data: what its attention layers are given, and how caches change what it says."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from slimjax.attention.bases import basis
from slimjax.models.opened import OpenedModel
from slimjax.scheme import Scheme
from slimjax.solve.augment import Solution
from slimjax.solve.calibrate import Calibration, collect
from slimjax.solve.fit import fit

BATCHES = 5  # that calibration needs at least
Batch = tuple[np.ndarray, ...]  # for each attention layer its inputs, [rows, D]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """What caches change in what the model says.

    Attributes:
        logit_kl: mean KL divergence of the next-token distribution from the float32 model's, in nats,
            teacher-forced through the caches.
        top1_agreement: share of tokens at which both have the same most likely next one.
        tokens: how many were scored.
        details: what else the kind of model has, as JSON.
        same: share of transcripts that are equal, of models that transcribe; else None.
    """

    logit_kl: float
    top1_agreement: float
    tokens: int
    details: Mapping[str, Any]
    same: float | None = None


class Material(Protocol):
    """A model and the data it was run on."""

    described: str

    @property
    def batches(self) -> Sequence[Batch]:
        """Inputs of the exact model's attention layers, in the model's order of layers, one batch a piece."""
        ...

    def score(self, schemes: Mapping[str, Scheme], solutions: Mapping[str, Solution]) -> Scores:
        """The model through caches. Raises NotImplementedError where a layer cannot use its scheme."""
        ...


def material(
    model: OpenedModel, data: Sequence[str], *, tokens: int = 16_384, held_out: bool = False
) -> Material:
    """Run the exact model on data.

    Args:
        model: opened.
        data: wav files for a Whisper; for a decoder text files, or "corpus", the text it was trained on.
            A directory stands for the files in it.
        tokens: of text at most.
        held_out: of "corpus", the part that training did not see.

    Raises:
        OSError: a file is missing.
        ValueError: data that is not what the model takes, or too little of it.
    """
    if model.kind == "whisper":
        from slimjax.material.speech import Speech

        return Speech(model, data)
    from slimjax.material.text import Text

    return Text(model, data, tokens=tokens, held_out=held_out)


def calibrate(found: Material) -> tuple[tuple[Calibration, ...], str]:
    """The calibration of every layer, and in words what it was made of.

    Of fewer than five batches each is cut into contiguous pieces, so that there are five to part.
    """
    batches, cut = found.batches, ""
    if len(batches) < BATCHES:
        parts = math.ceil(BATCHES / len(batches))
        cut = f", each cut into {parts} because calibration parts at least {BATCHES}"
        batches = [piece for batch in batches for piece in _pieces(batch, parts)]
    return collect(batches, len(batches[0])), f"{found.described}{cut}; three of five fitted, one held out"


def fitted(model: OpenedModel, schemes: Mapping[str, Scheme], data: Sequence[str]) -> dict[str, Solution]:
    """Maps learnt from data for the layers whose schemes have one, by their names. Raises as ``material``."""
    calibrations, _ = calibrate(material(model, data))
    found = {}
    for layer, calibration in zip(model.layers(), calibrations, strict=True):
        spec = layer.under(schemes[layer.name])
        if spec.scheme.basis in ("k", "kr"):
            basis(spec)
            found[layer.name] = fit(layer.keys, layer.values, spec, calibration).solution
    return found


def _pieces(batch: Batch, parts: int) -> list[Batch]:
    """A batch in contiguous pieces. Raises ValueError where a layer has fewer rows than pieces."""
    least = min(len(rows) for rows in batch)
    if least < parts:
        raise ValueError(f"{least} tokens cannot be cut into {parts} pieces for calibration; give more data")
    return [
        tuple(rows[len(rows) * i // parts : len(rows) * (i + 1) // parts] for rows in batch)
        for i in range(parts)
    ]


def files_of(data: Sequence[str], suffix: str | None = None) -> list[str]:
    """The files that are named, those of a directory sorted. Raises FileNotFoundError, naming what is missing."""
    found: list[str] = []
    for name in data:
        path = Path(name)
        if path.is_dir():
            inside = sorted(str(file) for file in path.rglob(f"*{suffix or ''}") if file.is_file())
            if not inside:
                raise FileNotFoundError(f"{name}: a directory without {suffix or 'files'}")
            found += inside
        elif path.is_file():
            found.append(name)
        else:
            raise FileNotFoundError(f"{name}: no such file")
    if not found:
        raise ValueError("no data was given")
    return found
