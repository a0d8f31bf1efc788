"""The subjects that attention is tested on, and what the oracle says of each: one list, many readers."""

import dataclasses

import jax.numpy as jnp
import numpy as np

import oracle
from slimjax import DecodeSpec, Position, Projections, parse_scheme

# name -> N, K, H, D. E = K*H is D in mha and square, less in gqa and mqa, more in wide.
LAYOUTS = {
    "mha": (4, 4, 6, 24),
    "gqa": (4, 2, 6, 24),
    "mqa": (4, 1, 6, 24),
    "square": (4, 2, 12, 24),
    "wide": (3, 3, 8, 16),
}
POSITIONS = {
    "none": Position(),
    "learned": Position(kind="learned"),
    "rope": Position(kind="rope", theta=100.0),
    "interleaved": Position(kind="rope", theta=100.0, interleaved=True),
    "alibi": Position(kind="alibi"),
    "t5": Position(kind="t5", buckets=8, max_distance=16),
    "fire": Position(kind="fire", hidden=5),
    "kerple": Position(kind="kerple"),
    "kerple_power": Position(kind="kerple", power=True),
}
VARIANTS = ("kv", "k1", "k2", "v1", "v2", "x1", "x2")


def is_refused(variant: str, layout: str, position: str) -> bool:
    """Written down apart from the package: narrow keys for k and v, RoPE for what absorbs the key weights."""
    if variant[0] in "kv" and variant != "kv" and layout in ("gqa", "mqa"):
        return True
    return variant in ("v2", "x2") and position in ("rope", "interleaved")


GRID = [
    (variant, layout, position)
    for variant in VARIANTS
    for layout in LAYOUTS
    for position in POSITIONS
    # Every layout with three kinds of position, and mha with all of them.
    if layout == "mha" or position in ("none", "rope", "alibi")
]
SERVED = [case for case in GRID if not is_refused(*case)]
REFUSED = [case for case in GRID if is_refused(*case)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """A layer with random weights and inputs: float64 numpy for the oracle, and the same for slimjax."""

    spec: DecodeSpec
    arrays: dict[str, np.ndarray]
    bias: dict[str, np.ndarray] | None
    x: np.ndarray

    @property
    def projections(self) -> Projections:
        dtype = "float64" if self.spec.dtype == "float64" else "float32"
        bias = None if self.bias is None else {n: jnp.asarray(a, dtype) for n, a in self.bias.items()}
        return Projections(position=bias, **{n: jnp.asarray(a, dtype) for n, a in self.arrays.items()})

    @property
    def inputs(self):
        return jnp.asarray(self.x, "float64" if self.spec.dtype == "float64" else "float32")

    @property
    def condition(self) -> float:
        """Of what the basis inverts; 1 where it inverts nothing."""
        inverted = {"k": "wk", "v": "wv"}.get(self.spec.scheme.basis)
        return (
            1.0
            if inverted is None
            else float(np.linalg.cond(self.arrays[inverted].reshape(self.spec.width, -1)))
        )


def subject(
    scheme: str,
    layout: str,
    position: str,
    *,
    dtype="float64",
    batch=2,
    tokens=9,
    biases=True,
    seed=0,
    **options,
) -> Subject:
    """Weights rounded to float32 first, so that float32 and float64 tests see the same layer."""
    heads, kv_heads, size, width = LAYOUTS[layout] if isinstance(layout, str) else layout
    draw = np.random.default_rng(seed)

    def array(*shape):
        return (draw.standard_normal(shape) / np.sqrt(width)).astype(np.float32).astype(np.float64)

    arrays = {
        "wq": array(width, heads, size) * 2,
        "wk": array(width, kv_heads, size),
        "wv": array(width, kv_heads, size),
        "wo": array(heads, size, width),
    }
    if biases:
        arrays |= {
            "bq": array(heads, size),
            "bk": array(kv_heads, size),
            "bv": array(kv_heads, size),
            "bo": array(width),
        }
    where = POSITIONS[position]
    spec = DecodeSpec(
        scheme=parse_scheme(scheme),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=size,
        width=width,
        position=where,
        dtype=dtype,
        **options,
    )
    x = (array(batch, tokens, width) * np.sqrt(width)).astype(np.float32).astype(np.float64)
    return Subject(spec=spec, arrays=arrays, bias=bias_parameters(where, heads, draw), x=x)


def bias_parameters(position: Position, heads: int, draw) -> dict[str, np.ndarray] | None:
    def array(*shape):
        return draw.standard_normal(shape).astype(np.float32).astype(np.float64)

    if position.kind == "t5":
        return {"table": array(position.buckets, heads)}
    if position.kind == "kerple":
        return {"r1": array(heads), "r2": array(heads)}
    if position.kind == "fire":
        hidden = position.hidden
        return {
            "scale": np.asarray(0.5),
            "threshold": np.asarray(4.0),
            "w1": array(hidden),
            "b1": array(hidden),
            "w2": array(hidden, heads),
            "b2": array(heads),
        }
    return None


def oracle_bias(case: Subject, query_positions, key_positions) -> np.ndarray | None:
    """[N, T, S] by the papers' formulas, or None."""
    return bias_of(case.spec.position, case.bias, case.spec.heads, query_positions, key_positions)


def bias_of(position: Position, value, heads: int, query_positions, key_positions) -> np.ndarray | None:
    """The same of a position scheme and its trained parameters."""
    if position.kind == "alibi":
        of_pair = oracle.alibi(heads)
    elif position.kind == "t5":
        of_pair = oracle.t5(value["table"], position.bidirectional, position.max_distance)
    elif position.kind == "fire":
        layers = (value[name] for name in ("w1", "b1", "w2", "b2", "scale", "threshold"))
        of_pair = oracle.fire(*layers)
    elif position.kind == "kerple":
        softplus, bounded = (lambda r: np.log1p(np.exp(r))), (lambda r: 2 / (1 + np.exp(-r)))
        r2 = (bounded if position.power else softplus)(value["r2"])
        of_pair = oracle.kerple(softplus(value["r1"]), r2, position.power)
    else:
        return None
    return oracle.additive_bias(of_pair, heads, query_positions, key_positions)


def rope_of(spec: DecodeSpec) -> tuple[float, bool] | None:
    return (spec.position.theta, spec.position.interleaved) if spec.position.rotary else None


def oracle_output(case: Subject, *, length=None) -> np.ndarray:
    """[B, T, D]: the layer on all its tokens at once, from exact keys and values. No cache, no algebra."""
    a, spec, x = case.arrays, case.spec, case.x
    steps = np.arange(x.shape[1])
    q = oracle.project(x, a["wq"], a.get("bq"))
    k = oracle.project(x, a["wk"], a.get("bk"))
    if rope_of(spec):
        q, k = (oracle.rotate(rows, steps, *rope_of(spec)) for rows in (q, k))
    out = oracle.attend(
        q,
        k,
        oracle.project(x, a["wv"], a.get("bv")),
        start=0,
        length=x.shape[1] if length is None else length,
        causal=spec.causal,
        window=spec.window,
        softcap=spec.softcap,
        scale=spec.scale,
        bias=oracle_bias(case, steps, steps),
    )
    return oracle.merge(out, a["wo"], a.get("bo"))


def equations(jaxpr):
    """All of a jaxpr, with those within its equations."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for part in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)
