"""The compute modes by the names of the scheme grammar: in what arithmetic queries meet a cache."""

import functools
import re
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from slimjax.attention import blocks
from slimjax.attention.blocks import Part
from slimjax.attention.integer import Integer
from slimjax.attention.projections import DecodeWeights
from slimjax.attention.reference import Geometry, attend
from slimjax.attention.sage import Sage
from slimjax.axes import Keys, Queries, Values
from slimjax.cache import Cache
from slimjax.kernels.spec import DecodeSpec
from slimjax.scheme import Scheme, parse_options, suggest


@runtime_checkable
class Compute(Protocol):
    """Attention in one arithmetic, through a cache and without one."""

    def refusal(self, spec: DecodeSpec) -> str | None:
        """Why ``spec`` cannot be computed so, or None."""
        ...

    def decode(
        self, q: Queries, cache: Cache, where: Geometry, weights: DecodeWeights, spec: DecodeSpec
    ) -> Part:
        """Attention of unrotated queries on a cache, in ``spec.dtype``; and log-sums where they are known."""
        ...

    def attend(self, q: Queries, k: Keys, v: Values, where: Geometry, spec: DecodeSpec) -> Queries:
        """Attention of unrotated queries on rotated keys and values, in ``spec.dtype``: a prompt on itself."""
        ...


class Float:
    """Floating point throughout: the default."""

    def refusal(self, spec: DecodeSpec) -> str | None:
        """Nothing is refused."""
        return None

    decode = staticmethod(blocks.decode)
    attend = staticmethod(attend)


# name -> what its options make of it.
COMPUTES: dict[str, Callable[..., Compute]] = {"float": Float, "int8": Integer, "sage": Sage}


@functools.cache
def compute_named(text: str) -> Compute:
    """The mode that ``name`` or ``name(option=value, ...)`` calls.

    Raises:
        ValueError: an unknown name (the nearest is named), or options that the mode does not take.
    """
    match = re.fullmatch(r"([a-z][a-z0-9_]*)(?:\(([^()]*)\))?", text)
    if match is None or match[1] not in COMPUTES:
        raise ValueError(f"unknown compute mode {text!r}{suggest(text, COMPUTES)}")
    chosen = dict(parse_options(match[2] or ""))
    try:
        return COMPUTES[match[1]](**chosen)
    except TypeError as error:
        raise ValueError(f"compute mode {match[1]!r} does not take the options {chosen}") from error


def compute_text(scheme: Scheme) -> str:
    """What a scheme computes in: as it says, else int8 for keys and values in FlashQ tiles, else float."""
    own = "int8" if (scheme.basis, scheme.codec) == ("kv", "flashq") else "float"
    return scheme.compute or own


def compute_of(spec: DecodeSpec) -> Compute:
    """The compute mode of a spec. Raises NotImplementedError with the reason where it cannot be used."""
    chosen = compute_named(compute_text(spec.scheme))
    reason = chosen.refusal(spec)
    if reason:
        raise NotImplementedError(f"scheme {spec.scheme}: {reason}")
    return chosen
