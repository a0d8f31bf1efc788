"""Position schemes: rotations of queries and keys (RoPE) and additive score biases (ALiBi, T5, FIRE, Kerple).

``none`` and ``learned`` leave attention alone: learned position vectors are added at the embedding.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from slimjax.axes import typed
from slimjax.numerics import accumulation_dtype, einsum
from slimjax.scheme import suggest

KINDS = ("none", "learned", "rope", "alibi", "t5", "fire", "kerple")

# Trained parameters of a bias, by name; None for schemes that have none.
BiasParameters = dict[str, Array] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Position:
    """A position scheme without its trained parameters. Hashable.

    Attributes:
        kind: one of ``KINDS``.
        theta: base of RoPE's frequencies, theta^(-2i/H).
        interleaved: RoPE rotates the pairs (2i, 2i+1); else (i, i + H/2), the halves.
        buckets, max_distance, bidirectional: T5's relative buckets.
        hidden: width of FIRE's MLP.
        power: Kerple's power form, -r1 |i-j|^r2, instead of -r1 log(1 + r2 |i-j|).
    """

    kind: str = "none"
    theta: float = 10_000.0
    interleaved: bool = False
    buckets: int = 32
    max_distance: int = 128
    bidirectional: bool = False
    hidden: int = 32
    power: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown position scheme {self.kind!r}{suggest(self.kind, KINDS)}")
        if self.theta <= 0 or self.buckets < 4 or self.max_distance <= self.buckets // 2 or self.hidden < 1:
            raise ValueError(f"{self} needs theta > 0, buckets >= 4, max_distance > buckets/2, hidden >= 1")

    @property
    def rotary(self) -> bool:
        """Whether queries and keys are rotated, so that a key cannot be absorbed into the query."""
        return self.kind == "rope"

    @property
    def trained(self) -> bool:
        """Whether the scheme's bias has trained parameters (``init_bias``)."""
        return self.kind in ("t5", "fire", "kerple")


@typed
def rotate(
    x: Float[Array, "B T N H"], positions: Int[Array, "#B T"], position: Position
) -> Float[Array, "B T N H"]:
    """RoPE (arXiv 2104.09864): turn every pair of x by positions * theta^(-2i/H); x unchanged for other kinds.

    Angles and products are in the accumulation dtype, which is also what comes back. Raises ValueError
    for an odd head size.
    """
    if not position.rotary:
        return x
    dtype = accumulation_dtype(x.dtype)
    cos, sin = _table(positions, x.shape[-1], position, dtype)
    first, second = _pairs(x.astype(dtype), position)
    turned = first * cos - second * sin, second * cos + first * sin
    if position.interleaved:
        return jnp.stack(turned, axis=-1).reshape(x.shape)
    return jnp.concatenate(turned, axis=-1)


def _table(
    positions: Int[Array, "#B T"], size: int, position: Position, dtype: jax.typing.DTypeLike
) -> tuple[Float[Array, "#B T 1 H/2"], Float[Array, "#B T 1 H/2"]]:
    """Cosine and sine of every pair's angle."""
    if size % 2:
        raise ValueError(f"RoPE turns pairs of coordinates and needs an even head size, got H={size}")
    frequency = jnp.asarray(position.theta ** (-np.arange(0, size, 2) / size), dtype)
    angle = positions.astype(dtype)[:, :, None, None] * frequency[None, None, None, :]
    # A table of its own, or XLA computes sine and cosine anew for every head and sequence.
    return jax.lax.optimization_barrier((jnp.cos(angle), jnp.sin(angle)))


def _pairs(x: Float[Array, "... H"], position: Position) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """The coordinates that are turned into each other."""
    if position.interleaved:
        return x[..., 0::2], x[..., 1::2]
    first, second = jnp.split(x, 2, axis=-1)
    return first, second


def scores_of_one(
    q: Float[Array, "B 1 N H"], k: Float[Array, "B S K H"], positions: Int[Array, "#B S"], position: Position
) -> Float[Array, "B N 1 S"]:
    """The products of one rotated query per sequence with ``rotate(k)``, whose rows are never made.

    Pair by pair, q . R k = (q1 k1 + q2 k2) cos + (q2 k1 - q1 k2) sin. For one query that is less work than turning
    the keys, which XLA on CPU besides does anew while it copies them for the product.
    """
    batch, _, heads, size = q.shape
    cos, sin = (each[:, :, :, None] for each in _table(positions, size, position, k.dtype))
    q1, q2 = _pairs(q.astype(k.dtype).reshape(batch, 1, k.shape[2], heads // k.shape[2], size), position)
    k1, k2 = (each[:, :, :, None] for each in _pairs(k, position))
    products = jnp.sum((k1 * q1 + k2 * q2) * cos + (k1 * q2 - k2 * q1) * sin, axis=-1)
    return jnp.moveaxis(products, 1, -1).reshape(batch, heads, 1, k.shape[1])


def unrotate(
    x: Float[Array, "B T N H"], positions: Int[Array, "#B T"], position: Position
) -> Float[Array, "B T N H"]:
    """The inverse of ``rotate``: the same turn by the negative angle, exact up to rounding."""
    return rotate(x, -positions, position)


def quarter_turn(x: Float[Array, "B T N H"], position: Position) -> Float[Array, "B T N H"]:
    """J x: every pair turned by 90 degrees, (a, b) to (-b, a). A turn by an angle is cos x + sin J x."""
    first, second = _pairs(x, position)
    if position.interleaved:
        return jnp.stack([-second, first], axis=-1).reshape(x.shape)
    return jnp.concatenate([-second, first], axis=-1)


def init_bias(position: Position, heads: int, key: Array) -> BiasParameters:
    """Trainable parameters of an additive bias, float32; None for schemes without any.

    t5: ``table`` [buckets, N]. fire: ``scale`` [], ``threshold`` [], ``w1`` [F], ``b1`` [F], ``w2`` [F, N],
    ``b2`` [N]. kerple: ``r1`` [N], ``r2`` [N], made positive by softplus (r2 of the power form: between 0 and 2, by
    a sigmoid).
    """
    first, second = jax.random.split(key)
    if position.kind == "t5":
        return {"table": 0.02 * jax.random.normal(first, (position.buckets, heads), jnp.float32)}
    if position.kind == "fire":
        width = position.hidden
        return {
            "scale": jnp.asarray(0.1, jnp.float32),
            "threshold": jnp.asarray(512.0, jnp.float32),
            "w1": jax.random.normal(first, (width,), jnp.float32),
            "b1": jnp.zeros((width,), jnp.float32),
            "w2": jax.random.normal(second, (width, heads), jnp.float32) / math.sqrt(width),
            "b2": jnp.zeros((heads,), jnp.float32),
        }
    if position.kind == "kerple":
        keys = {"r1": first, "r2": second}
        return {name: jax.random.normal(key, (heads,), jnp.float32) for name, key in keys.items()}
    return None


def alibi_slopes(heads: int) -> np.ndarray:
    """Slopes of ALiBi (arXiv 2108.12409), float64 [N]: 2^(-8i/N), i = 1..N, for a power of two.

    Otherwise the slopes of the next lower power of two, then every other slope of the next higher one,
    as the authors' code has it.
    """
    lower = 2 ** int(math.log2(heads))
    slopes = 2.0 ** (-8.0 * np.arange(1, lower + 1) / lower)
    if lower < heads:
        between = 2.0 ** (-8.0 * np.arange(1, 2 * lower + 1, 2) / (2 * lower))
        slopes = np.concatenate([slopes, between[: heads - lower]])
    return slopes


def t5_bucket(distance: Int[Array, "*T"], position: Position) -> Int[Array, "*T"]:
    """T5's bucket (arXiv 1910.10683) of distance = key - query: exact when near, logarithmic further away."""
    count, offset = position.buckets, jnp.zeros_like(distance)
    if position.bidirectional:
        count //= 2
        offset = jnp.where(distance > 0, count, 0).astype(distance.dtype)
        behind = jnp.abs(distance)
    else:
        behind = jnp.maximum(-distance, 0)
    exact = count // 2
    # Kept >= 1 before the logarithm: smaller distances take the exact branch anyway.
    ratio = jnp.log(jnp.maximum(behind, 1).astype(jnp.float32) / exact) / math.log(
        position.max_distance / exact
    )
    far = jnp.minimum(exact + (ratio * (count - exact)).astype(distance.dtype), count - 1)
    return offset + jnp.where(behind < exact, behind, far)


@typed
def bias(
    position: Position,
    parameters: BiasParameters,
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "S"],
    heads: int,
    dtype: jax.typing.DTypeLike,
) -> Float[Array, "B N T S"] | None:
    """What is added to the scaled scores, in ``dtype``; None where the scheme adds nothing.

    Sources: ALiBi 2108.12409, T5 1910.10683, FIRE 2310.04418 (section 3), Kerple 2205.09921 (section 4).
    """
    if position.kind != "alibi" and not position.trained:
        return None
    query, key = query_positions[:, :, None], key_positions[None, None, :]
    behind = jnp.abs(query - key).astype(dtype)  # [B, T, S]
    if position.kind == "alibi":
        slopes = jnp.asarray(alibi_slopes(heads), dtype)
        return -slopes[None, :, None, None] * behind[:, None]
    if parameters is None:
        raise ValueError(f"position scheme {position.kind!r} needs its trained parameters, got None")
    value = {name: array.astype(dtype) for name, array in parameters.items()}
    if position.kind == "t5":
        by_head = value["table"][t5_bucket(key - query, position)]  # [B, T, S, N]
    elif position.kind == "fire":
        by_head = _fire(value, query, key, dtype)
    else:
        r1, r2 = (value[name][None, None, None, :] for name in ("r1", "r2"))
        # Positive definite for r1 > 0 and r2 > 0; the power form needs r2 <= 2 besides.
        r1, r2 = jax.nn.softplus(r1), 2 * jax.nn.sigmoid(r2) if position.power else jax.nn.softplus(r2)
        distance = behind[..., None]
        # 0 ** r2 has an infinite derivative; the distance 0 contributes 0 whatever r2 is.
        powered = jnp.where(distance == 0, distance, jnp.where(distance == 0, 1, distance) ** r2)
        by_head = -r1 * (powered if position.power else jnp.log1p(r2 * distance))
    return jnp.moveaxis(by_head, -1, 1)


def _fire(
    value: dict[str, Array], query: Int[Array, "B T 1"], key: Int[Array, "1 1 S"], dtype: jax.typing.DTypeLike
) -> Float[Array, "B T S N"]:
    """FIRE: an MLP of log(c d + 1) / log(c max(i, L) + 1), d the distance and i the query's position."""
    scale, threshold = jnp.abs(value["scale"]), jnp.abs(value["threshold"])
    near = jnp.log1p(scale * jnp.abs(query - key).astype(dtype))
    far = jnp.log1p(scale * jnp.maximum(query.astype(dtype), threshold))
    relative = (near / jnp.maximum(far, jnp.finfo(dtype).tiny))[..., None]  # scale may reach 0
    hidden = jax.nn.relu(relative * value["w1"][None, None, None, :] + value["b1"][None, None, None, :])
    return einsum("btsf,fn->btsn", hidden, value["w2"]) + value["b2"][None, None, None, :]
