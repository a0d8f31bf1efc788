"""Planned caches against the full-precision model on data of one's own: every layer's error, and what changes."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from slimjax.material import Material, Scores
from slimjax.models.opened import OpenedModel
from slimjax.scheme import Scheme, parse_scheme
from slimjax.solve.calibrate import strided
from slimjax.solve.measure import scheme_error
from slimjax.solve.options import Layer
from slimjax.solve.plan import Choice, Plan

ROWS = 4096  # of a layer's inputs, evenly strided, that its error is measured on
KV = parse_scheme("kv:bf16")
SLACK = 2.0  # of the plan's own figures, where no limit was given


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCheck:
    """One layer: its scheme, its relative L2 error of keys or values on the data, and the most it may be."""

    name: str
    scheme: str
    error: float
    planned: float
    limit: float

    @property
    def passed(self) -> bool:
        """NaN does not pass."""
        return self.error <= self.limit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """All layers, the model's scores through the planned caches and through ordinary bf16 ones, and the limits.

    Attributes:
        layers: each layer.
        scores: through the planned caches.
        ordinary: through kv:bf16, on the same data.
        max_kl: the most that ``scores.logit_kl`` may be.
        min_agreement: the least that ``scores.top1_agreement`` may be.
        data: in words.
    """

    layers: tuple[LayerCheck, ...]
    scores: Scores
    ordinary: Scores
    max_kl: float
    min_agreement: float
    data: str

    @property
    def failures(self) -> tuple[str, ...]:
        """What is past its limit, one line each."""
        lines = [
            f"{each.name}: {each.scheme} errs by {each.error:.2e}, at most {each.limit:.2e} is allowed"
            for each in self.layers
            if not each.passed
        ]
        if not self.scores.logit_kl <= self.max_kl:
            lines.append(
                f"KL of the logits is {self.scores.logit_kl:.2e}, at most {self.max_kl:.2e} is allowed"
            )
        if not self.scores.top1_agreement >= self.min_agreement:
            lines.append(
                f"top-1 agreement is {self.scores.top1_agreement:.4f}, at least {self.min_agreement:.4f} is needed"
            )
        return tuple(lines)


def verify(
    model: OpenedModel,
    plan: Plan,
    found: Material,
    *,
    max_error: float | None = None,
    max_kl: float | None = None,
    min_agreement: float = 0.0,
) -> Verdict:
    """Measure a plan on data.

    Args:
        model: the full-precision model.
        plan: for it.
        found: the model at work on the data.
        max_error: of every layer; None: twice the plan's budget or the layer's planned error.
        max_kl: mean, in nats; None: twice that of kv:bf16 on the same data.
        min_agreement: of the most likely next tokens.

    Raises:
        NotImplementedError: a layer cannot use its scheme.
    """
    schemes, budget = plan.schemes, plan.budget.get("max_error", 0.0)
    inputs = zip(*found.batches, strict=True)
    first: dict[str, Layer] = {}  # the layer that fills the cache which layers of one scheme of basis h share
    checks = []
    for layer, choice, batches in zip(model.layers(), _in_order(model, plan), inputs, strict=True):
        scheme = schemes[layer.name]
        if scheme.basis == "h":
            first.setdefault(choice.scheme, layer)
        error = scheme_error(
            layer,
            scheme,
            strided(np.concatenate(batches), ROWS),
            solution=plan.solutions.get(layer.name),
            first=first.get(choice.scheme),
        )
        limit = SLACK * max(budget, choice.error) if max_error is None else max_error
        checks.append(
            LayerCheck(name=layer.name, scheme=choice.scheme, error=error, planned=choice.error, limit=limit)
        )
    scores, ordinary = found.score(schemes, plan.solutions), found.score(_ordinary(schemes), {})
    return Verdict(
        layers=tuple(checks),
        scores=scores,
        ordinary=ordinary,
        max_kl=SLACK * ordinary.logit_kl if max_kl is None else max_kl,
        min_agreement=min_agreement,
        data=found.described,
    )


def finite_or_none(value: float) -> float | None:
    """A figure for JSON, which knows no NaN."""
    return value if math.isfinite(value) else None


def _in_order(model: OpenedModel, plan: Plan) -> list[Choice]:
    """The plan's lines in the model's order of layers."""
    lines = {choice.name: choice for choice in plan.layers}
    return [lines[place.name] for place in model.places]


def _ordinary(schemes: Mapping[str, Scheme]) -> dict[str, Scheme]:
    return dict.fromkeys(schemes, KV)
