"""Decode-attention schemes by name: ``basis[option]:codec[bits][(options)][/group][+R][@softmax][#compute]``.

    kv:bf16          keys and values, bfloat16            k:int16+16       keys and 16 extra coordinates
    k:bf16           keys only, V = K W_KV absorbed       kv:flashq4/64    4 bits, groups of 64 tokens
    k1:bf16          the same, V rebuilt before weighing  kv:flashq2-4@sas mixed 2 and 4 bits, SAS softmax
    kv:bf16#sage     scores from INT8 queries and keys    kv:kivi2(window=128)/32  a codec's own options
    k:flashq4(extra=flashq8)+16   extra coordinates in a codec of their own
    kv:flashq2-4(share=0.25)      a quarter of the heads in 2 bits, the others in 4
    kv:flashq2(rank=2)            the error of every tile corrected at rank 2

``option`` is how a cache that lacks K or V stands in for it (arXiv 2503.05840, section 1):
1 rebuilds the missing rows and then attends, 2 (the default) absorbs the weights and works on the
cached rows themselves. Several schemes are separated by commas (cross attention, then self attention).
"""

import dataclasses
import difflib
import re
from collections.abc import Collection

BASES = {
    "kv": "keys and values",
    "k": "keys only",
    "kr": "keys after RoPE only",
    "v": "values only",
    "x": "attention inputs",
    "e": "encoder output, one cache for all layers",
    "h": "keys of the first cross-attention layer, one cache for all layers",
}
_OPTIONS = {
    "kv": 0,
    "k": 2,
    "kr": 2,
    "v": 2,
    "x": 2,
    "e": 2,
    "h": 2,
}  # the default; 0 = the basis has no option
_FORM = re.compile(
    r"(?P<basis>[a-z]+)(?P<option>\d?):(?P<codec>[a-z][a-z0-9_-]*)(?:\((?P<options>[^()]*)\))?"
    r"(?:/(?P<group>\d+))?(?:\+(?P<extra>\d+))?"
    r"(?:@(?P<softmax>[a-z][a-z0-9_]*(?:\([^()]*\))?))?(?:#(?P<compute>[a-z][a-z0-9_]*(?:\([^()]*\))?))?"
)
# Options of a codec or a compute mode: name -> a number or a word.
Options = tuple[tuple[str, int | float | str], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
    """What is cached, how it is stored and how its scores are weighed. Hashable; ``str`` gives the grammar.

    Attributes:
        basis: a name in ``BASES``.
        option: 1 (rebuild) or 2 (absorb); 0 for kv, which lacks nothing.
        codec: a name that ``slimjax.codec`` knows.
        bits: bits per value where the codec offers a choice, such as "4" or "2-4" (mixed); else None.
        group: tokens or values per quantisation group; None for the codec's default.
        extra: R, extra cached coordinates per token (k and kr only).
        softmax: "exact", or another name of ``slimjax.attention.softmax`` with its numbers, "sparse(1e-4)".
        compute: a name of ``slimjax.attention.compute`` with its options, "int8(p=row)"; "" for the codec's own.
        options: of the codec, by name.
    """

    basis: str
    codec: str
    option: int = 0
    bits: str | None = None
    group: int | None = None
    extra: int = 0
    softmax: str = "exact"
    compute: str = ""
    options: Options = ()

    def __post_init__(self) -> None:
        if self.basis not in BASES:
            raise ValueError(f"unknown basis {self.basis!r}{suggest(self.basis, BASES)}")
        if not self.option:
            object.__setattr__(self, "option", _OPTIONS[self.basis])
        if self.option not in ((0,) if self.basis == "kv" else (1, 2)):
            raise ValueError(f"basis {self.basis!r} has no option {self.option}")
        if self.group is not None and self.group < 1:
            raise ValueError(f"a group has at least one member, not {self.group}")
        if self.extra and self.basis not in ("k", "kr"):
            raise ValueError(f"+{self.extra} extra coordinates belong to basis k or kr, not {self.basis!r}")

    def __str__(self) -> str:
        option = "" if self.option == _OPTIONS[self.basis] else str(self.option)
        chosen = f"({','.join(f'{name}={value}' for name, value in self.options)})" if self.options else ""
        group = f"/{self.group}" if self.group else ""
        extra = f"+{self.extra}" if self.extra else ""
        softmax = "" if self.softmax == "exact" else f"@{self.softmax}"
        compute = f"#{self.compute}" if self.compute else ""
        return f"{self.basis}{option}:{self.codec}{self.bits or ''}{chosen}{group}{extra}{softmax}{compute}"


def suggest(name: str, known: Collection[str]) -> str:
    """The tail of an error message about an unknown name: the nearest known one, and all of them."""
    near = difflib.get_close_matches(name, list(known), n=1)
    nearest = f"; did you mean {near[0]!r}?" if near else ""
    return f"{nearest} (known: {', '.join(known)})"


def parse_scheme(text: str) -> Scheme:
    """One scheme from its text. Raises ValueError naming the part that is wrong and what is known."""
    from slimjax.attention.compute import compute_named  # the registries import Scheme's users
    from slimjax.attention.softmax import softmax_of
    from slimjax.cache.codecs import CODECS, codec_of

    match = _FORM.fullmatch(text.strip())
    if match is None:
        raise ValueError(
            f"scheme {text!r} is not of the form basis[option]:codec[bits][(options)][/group][+R][@softmax]"
            "[#compute], e.g. k:int16+16"
        )
    part = match.groupdict()
    try:
        name, bits = split_codec(part["codec"], CODECS)
        scheme = Scheme(
            basis=part["basis"],
            option=int(part["option"] or 0),
            codec=name,
            bits=bits,
            group=int(part["group"]) if part["group"] else None,
            extra=int(part["extra"] or 0),
            softmax=part["softmax"] or "exact",
            compute=part["compute"] or "",
            options=parse_options(part["options"] or ""),
        )
        codec_of(scheme)
        softmax_of(scheme.softmax)
        compute_named(scheme.compute or "float")
    except ValueError as error:
        raise ValueError(f"scheme {text!r}: {error}") from None
    return scheme


def parse_schemes(text: str) -> tuple[Scheme, ...]:
    """Comma-separated schemes, such as ``e:bf16,k:int16+16`` (cross attention, then self attention)."""
    return tuple(parse_scheme(part) for part in re.split(r",(?![^()]*\))", text))


def parse_options(text: str) -> Options:
    """``window=128,p=row`` -> (("window", 128), ("p", "row")), in the order of names.

    Raises ValueError where a part is not ``name=value`` or a name comes twice.
    """
    found: dict[str, int | float | str] = {}
    for part in text.split(",") if text.strip() else ():
        match = re.fullmatch(r"\s*([a-z][a-z0-9_]*)\s*=\s*([A-Za-z0-9_.+-]+)\s*", part)
        if match is None or match[1] in found:
            raise ValueError(f"options ({text}): expected name=value, each name once, not {part.strip()!r}")
        found[match[1]] = _value(match[2])
    return tuple(sorted(found.items()))


def _value(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def split_codec(text: str, known: Collection[str]) -> tuple[str, str | None]:
    """``flashq2-4`` -> ("flashq", "2-4"): the longest known name, then its bits. ValueError for no known name."""
    for name in sorted(known, key=len, reverse=True):
        rest = text[len(name) :]
        if rest and name[-1].isdigit():  # its width is its name
            continue
        if text.startswith(name) and re.fullmatch(r"(\d(-\d)?)?", rest):
            return name, rest or None
    raise ValueError(f"unknown codec {text!r}{suggest(text, known)}")
