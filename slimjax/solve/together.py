"""Plans in which some layers are given one scheme: cross-attention layers that share a cache above all."""

import dataclasses
from collections.abc import Sequence

from slimjax.scheme import Scheme
from slimjax.solve.calibrate import Calibration
from slimjax.solve.measure import first_layer_option
from slimjax.solve.options import Layer, Option, option
from slimjax.solve.plan import Choice, Plan, make_plan, weights_digest

SHARED = ("e", "h")  # bases whose rows do not depend on the layer that reads them


def plan_with_fixed(
    layers: Sequence[Layer],
    calibrations: Sequence[Calibration] | None,
    fixed: Scheme,
    *,
    max_error: float | None = None,
    max_bytes_per_token: float | None = None,
    schemes: Sequence[Scheme] | None = None,
    described: str = "",
) -> Plan:
    """As ``make_plan``, but every cross-attention layer has the scheme ``fixed``.

    Its error may exceed the budget, and its line then says so: it was asked for. Layers that share one cache
    count its bytes once, with the first of them.

    Raises:
        ValueError: no layer is cross-attention, or as ``make_plan`` does.
        NotImplementedError: a cross-attention layer cannot use the scheme, or as ``make_plan`` does.
    """
    seen = dict(zip((layer.name for layer in layers), calibrations or [None] * len(layers), strict=True))
    cross = [layer for layer in layers if not layer.spec.causal]
    if not cross:
        raise ValueError(f"{fixed} for cross-attention: this model has none")
    options = {layer.name: _fixed_option(layer, fixed, seen[layer.name], cross[0]) for layer in cross}
    if refused := [f"{name}: {each.refused}" for name, each in options.items() if each.refused]:
        raise NotImplementedError("; ".join(refused))
    spent = sum(each.bytes_per_token for each in options.values())
    if max_bytes_per_token is not None and spent >= max_bytes_per_token:
        raise NotImplementedError(
            f"{fixed} takes {spent:,} bytes per position for cross-attention, and {max_bytes_per_token:g} is all"
        )
    own = [layer for layer in layers if layer.spec.causal]
    plan = make_plan(
        own,
        [found for layer in own if (found := seen[layer.name]) is not None] or None,
        max_error=max_error,
        max_bytes_per_token=None if max_bytes_per_token is None else max_bytes_per_token - spent,
        schemes=schemes,
        described=described,
    )
    choices = {choice.name: choice for choice in plan.layers} | {
        name: _choice(name, each, max_error) for name, each in options.items()
    }
    solutions = {name: each.solution for name, each in options.items() if each.solution is not None}
    return dataclasses.replace(
        plan,
        layers=tuple(choices[layer.name] for layer in layers),
        digest=weights_digest(layers),
        budget={"max_error": max_error}
        if max_error is not None
        else {"max_bytes_per_token": max_bytes_per_token or 0},
        kv_bytes_per_token=sum(4 * layer.spec.key_width for layer in layers),
        solutions=dict(plan.solutions) | solutions,
    )


def _fixed_option(layer: Layer, scheme: Scheme, calibration: Calibration | None, first: Layer) -> Option:
    """The scheme on a layer; of a cache that all share only the first layer has the bytes."""
    if scheme.basis == "h":
        found = first_layer_option(layer, scheme, calibration, first)
    else:
        found = option(layer, scheme, calibration)
    if found.refused or scheme.basis not in SHARED or layer is first:
        return found
    return dataclasses.replace(found, bytes_per_token=0)


def _choice(name: str, option: Option, max_error: float | None) -> Choice:
    """The line of a layer whose scheme was asked for."""
    reason = "asked for"
    if option.scheme.basis in SHARED:
        reason += (
            ", one cache for all cross-attention layers"
            if option.bytes_per_token
            else ", reads the first's cache"
        )
    if max_error is not None and not option.error <= max_error:
        reason += f"; its error exceeds {max_error:.1e}"
    return Choice.of(name, option, reason)
