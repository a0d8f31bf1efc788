"""The planner: for every layer the cheapest cache within an error budget, or the best within a byte budget."""

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from slimjax.scheme import Scheme, parse_scheme
from slimjax.solve.augment import Solution
from slimjax.solve.calibrate import Calibration
from slimjax.solve.options import Layer, Option, menu

RANKS = (0, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
INPUTS = ("bf16", "int16", "int8")  # codecs of an X-cache
FALLBACKS = ("kv:int8", "kv:bf16", "kv:int16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """A layer's line of a plan. Figures as in ``Option``; ``tried`` lists every scheme looked at."""

    name: str
    scheme: str
    error: float
    bytes_per_token: float
    weight_bytes: int
    reason: str
    how: str = ""
    calibration_error: float | None = None
    exact_error: float | None = None
    condition_number: float | None = None
    tried: tuple[Mapping[str, Any], ...] = ()

    @classmethod
    def of(
        cls, name: str, option: Option, reason: str, tried: tuple[Mapping[str, Any], ...] = ()
    ) -> "Choice":
        """The line that takes an option for the layer called ``name``."""
        return cls(
            name=name,
            scheme=str(option.scheme),
            error=option.error,
            bytes_per_token=option.bytes_per_token,
            weight_bytes=option.weight_bytes,
            reason=reason,
            how=option.how,
            calibration_error=option.calibration_error,
            exact_error=option.exact_error,
            condition_number=option.condition_number,
            tried=tried,
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """What every layer caches, and why.

    Attributes:
        layers: a choice for each layer, in the model's order.
        digest: of the weights that were planned for.
        budget: {"max_error": ...} or {"max_bytes_per_token": ...}.
        calibration: what the figures were measured on, in words.
        kv_bytes_per_token: of the same layers under kv:bf16.
        solutions: maps from calibration, by layer name; layers without one use the exact map.
    """

    layers: tuple[Choice, ...]
    digest: str
    budget: Mapping[str, float]
    calibration: str
    kv_bytes_per_token: int
    solutions: Mapping[str, Solution] = dataclasses.field(default_factory=dict)

    @property
    def schemes(self) -> dict[str, Scheme]:
        """Each layer's scheme, by its name."""
        return {choice.name: parse_scheme(choice.scheme) for choice in self.layers}

    @property
    def bytes_per_token(self) -> float:
        """Of all layers."""
        return sum(choice.bytes_per_token for choice in self.layers)

    @property
    def break_even(self) -> int | None:
        """Cached tokens (batch times context) below which a step reads more than kv:bf16; None: always."""
        saved = self.kv_bytes_per_token - self.bytes_per_token
        extra = sum(choice.weight_bytes for choice in self.layers)
        if extra <= 0:
            return 0
        return math.ceil(extra / saved) if saved > 0 else None


def candidates(layer: Layer, codecs: Sequence[str] = ("int16",)) -> tuple[Scheme, ...]:
    """The schemes looked at where none are named: k with growing R, then v, x and kv (v1 and x1 under RoPE).

    Keys narrower than the inputs need D - E coordinates at least, however many those are, and rule v out; of other
    codecs and of the shared caches none: they are named, or they are not looked at.
    """
    wide, lacking = layer.spec.key_width, layer.spec.width - layer.spec.key_width
    least, most = max(0, lacking), min(wide // 2, RANKS[-1])
    ranks = {rank for rank in RANKS if least <= rank <= most} | ({least} if least < wide else set())
    keys = [f"k:{codec}+{rank}" if rank else f"k:{codec}" for codec in codecs for rank in sorted(ranks)]
    option = "1" if layer.spec.position.rotary else ""
    values = [f"v{option}:int16"] if lacking <= 0 else []
    inputs = [f"x{option}:{codec}" for codec in INPUTS]
    return tuple(parse_scheme(text) for text in (*keys, *values, *inputs, *FALLBACKS))


def measure(
    layers: Sequence[Layer],
    calibrations: Sequence[Calibration] | None = None,
    schemes: Sequence[Scheme] | None = None,
    *,
    enough: float | None = None,
) -> tuple[tuple[Option, ...], ...]:
    """The menu of every layer, for ``choose``.

    Args:
        layers: the model's attention layers.
        calibrations: one for each, or None: figures are then predicted for white inputs.
        schemes: what may be chosen; None: each layer's ``candidates``.
        enough: of keys alone, wider rows than those that first err by at most this are not looked at:
            ``choose`` would not take them under that ``max_error``, and each is a solve.
    """
    given = calibrations or [None] * len(layers)
    return tuple(
        menu(layer, schemes or candidates(layer), seen, enough)
        for layer, seen in zip(layers, given, strict=True)
    )


def choose(
    layers: Sequence[Layer],
    menus: Sequence[Sequence[Option]],
    *,
    max_error: float | None = None,
    max_bytes_per_token: float | None = None,
    described: str = "",
) -> Plan:
    """Choose for every layer.

    Args:
        layers: the model's attention layers.
        menus: of each, from ``measure``.
        max_error: each layer takes the fewest bytes whose error is at most this. Where bases k and kr can, only kv
            competes with them: an X- or V-cache makes keys (and values) anew at every step (option 1), or
            multiplies whole rows for the scores of every head as well (option 2). Its line says so.
        max_bytes_per_token: of all layers together; the largest error of any layer is made as small as that
            allows. Exactly one of the two budgets is given.
        described: the calibration data in words.

    Raises:
        ValueError: not exactly one budget, or one that is not positive.
        NotImplementedError: a layer, named, that no scheme serves within the budget.
    """
    if (max_error is None) == (max_bytes_per_token is None):
        raise ValueError("a plan needs one budget: max_error or max_bytes_per_token")
    if max_bytes_per_token is not None:
        budget = {"max_bytes_per_token": max_bytes_per_token}
    else:
        budget = {"max_error": max_error or 0.0}
    if not min(budget.values()) > 0:
        raise ValueError(f"a budget is positive: {max_error=} {max_bytes_per_token=}")
    pick = _cheapest if max_error is not None else _smallest
    limit = max_error or _least_error(layers, menus, max_bytes_per_token or 0.0)
    picked = [pick(layer, options, limit) for layer, options in zip(layers, menus, strict=True)]
    return Plan(
        layers=tuple(
            _choice(layer, options, one, limit)
            for layer, options, one in zip(layers, menus, picked, strict=True)
        ),
        digest=weights_digest(layers),
        budget=budget,
        calibration=described,
        kv_bytes_per_token=sum(4 * layer.spec.key_width for layer in layers),
        solutions={
            layer.name: one.solution
            for layer, one in zip(layers, picked, strict=True)
            if one.solution is not None
        },
    )


def make_plan(
    layers: Sequence[Layer],
    calibrations: Sequence[Calibration] | None,
    *,
    max_error: float | None = None,
    max_bytes_per_token: float | None = None,
    schemes: Sequence[Scheme] | None = None,
    described: str = "",
) -> Plan:
    """``measure``, then ``choose``; raises as that does."""
    if not calibrations:
        described = described or "none: errors are predicted for white inputs"
    return choose(
        layers,
        measure(layers, calibrations, schemes, enough=max_error),
        max_error=max_error,
        max_bytes_per_token=max_bytes_per_token,
        described=described,
    )


def _cheapest(layer: Layer, options: Sequence[Option], limit: float) -> Option:
    """The fewest bytes within the limit, of k, kr and kv where keys alone can. Raises NotImplementedError for none."""
    if any(option.scheme.basis in ("k", "kr") and option.error <= limit for option in options):
        options = [option for option in options if option.scheme.basis in ("k", "kr", "kv")]
    return _smallest(layer, options, limit)


def _smallest(layer: Layer, options: Sequence[Option], limit: float) -> Option:
    """The fewest bytes within the limit; of equals the smaller error. Raises NotImplementedError for none."""
    fit = [option for option in options if option.refused is None and option.error <= limit]
    if not fit:
        served = [option for option in options if option.refused is None]
        best = min(served, key=lambda option: option.error, default=None)
        most = f"the best is {best.scheme} with {best.error:.1e}" if best else "every scheme is refused"
        raise NotImplementedError(f"{layer.name}: no scheme has an error of at most {limit:.1e}; {most}")
    return min(fit, key=lambda option: (option.bytes_per_token, option.error))


def _least_error(layers: Sequence[Layer], menus: Sequence[Sequence[Option]], most: float) -> float:
    """The smallest error limit whose cheapest choices take at most ``most`` bytes per token together."""
    errors = sorted({option.error for options in menus for option in options if option.refused is None})
    for limit in errors:
        try:
            chosen = [_smallest(layer, options, limit) for layer, options in zip(layers, menus, strict=True)]
        except NotImplementedError:
            continue
        if sum(option.bytes_per_token for option in chosen) <= most:
            return limit
    smallest = sum(
        min((o.bytes_per_token for o in options if o.refused is None), default=0) for options in menus
    )
    raise NotImplementedError(
        f"no choice of schemes takes at most {most:g} bytes per token; the smallest takes {smallest:,}"
    )


def _choice(layer: Layer, options: Sequence[Option], one: Option, limit: float) -> Choice:
    """The line of a layer, with its reason."""
    smaller = [o for o in options if o.refused is None and o.bytes_per_token < one.bytes_per_token]
    missing = [o for o in smaller if o.error > limit]
    kind = "keys alone" if one.scheme.basis in ("k", "kr") else "the schemes tried"
    reason = f"fewest bytes, of {kind}, with an error of at most {limit:.1e}"
    if missing:
        near = min(missing, key=lambda option: option.error)
        reason += f"; {near.scheme}, smaller, errs {near.error:.1e}"
    for option in smaller:
        if option.error <= limit:
            made = "keys" if option.scheme.basis == "v" else "keys and values"
            again = option.scheme.option == 1
            cost = f"make {made} anew" if again else "multiply whole rows for every head's scores too"
            reason += f"; {option.scheme} would take {option.bytes_per_token} bytes but {cost}"
    tried = tuple(
        {"scheme": str(o.scheme), "refused": o.refused}
        if o.refused
        else {"scheme": str(o.scheme), "error": o.error, "bytes_per_token": o.bytes_per_token}
        for o in options
    )
    return Choice.of(layer.name, one, reason, tried)


def weights_digest(layers: Iterable[Layer]) -> str:
    """sha256 (16 hex) of every layer's name, W_K and W_V in float32: a plan for other weights is stale."""
    total = hashlib.sha256()
    for layer in layers:
        total.update(layer.name.encode() + b"\0")
        for array in (layer.projections.wk, layer.projections.wv):
            total.update(np.ascontiguousarray(np.asarray(array).astype(np.float32)).tobytes())
    return total.hexdigest()[:16]
