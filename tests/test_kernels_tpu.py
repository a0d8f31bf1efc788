"""The TPU kernels, interpreted: against the oracle, what must not be read poisoned, and races looked for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import suites
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

import oracle
from slimjax import DecodeSpec, DecodeWeights, Position, Projections, decode, parse_scheme
from slimjax.attention.bases import basis
from slimjax.attention.layer import attend_cached, init_cache
from slimjax.cache import append, codec_of, empty, read
from slimjax.kernels import api, pallas_tpu, reference
from slimjax.kernels.shapes import SHAPES
from slimjax.kernels.tiles import Tiles
from slimjax.numerics import relative_l2
from slimjax.solve import convert

BLOCK, CAPACITY = 32, 72
LENGTHS = (0, 1, BLOCK - 1, BLOCK, BLOCK + 1, CAPACITY)  # one ragged batch
# Of the output's size, against exact arithmetic on the same codes. float32: sums of up to CAPACITY products twice
# over. bfloat16: queries and weights are rounded to 2^-9, under RoPE keys, too; scores are a few units.
TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2}

TINY = (4, 4, 16, 64)  # N, K, H, D
GQA = (4, 2, 16, 64)
FEW = (0, BLOCK + 1, CAPACITY)
ODD = (3, 3, 24, 72)
# Two cores, which share the parallel axes of a grid out: races are between them.
HOSTILE = pltpu.InterpretParams(
    detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise", num_cores_or_threads=2
)


@dataclasses.dataclass(frozen=True)
class Case:
    scheme: str
    layout: tuple[int, int, int, int] = TINY
    position: str = "none"
    dtype: str = "bfloat16"
    tokens: int = 1
    options: tuple[tuple[str, object], ...] = ()
    k_bias: bool = False
    splits: int = 1
    lengths: tuple[int, ...] = LENGTHS

    def __str__(self):
        more = [f"{name}={value}" for name, value in self.options]
        return "-".join(
            [self.scheme, self.position, self.dtype, f"T{self.tokens}", *more, f"{self.layout[2]}"]
        )


def windowed(size):
    return (("window", size),)


CASES = [
    Case("kv:bf16", dtype="float32"),
    Case("kv:float32", GQA, dtype="float32", tokens=3),
    Case("kv:bf16", ODD, "rope", splits=2),
    Case("kv:bf16", GQA, "alibi", dtype="float32", tokens=8),
    Case("kv:bf16", GQA, "rope", "float32", 2, (*windowed(17), ("softcap", 5.0))),
    Case("kv:bf16", GQA, "none", "float32", 1, windowed(40), splits=2),
    # A window that looks ahead of the query: to the end, whichever block that is in.
    Case("kv:bf16", GQA, "none", "float32", 2, (*windowed(5), ("causal", False))),
    Case("kv:int8", GQA, dtype="float32", tokens=2),
    Case("kv:int16", GQA),
    Case("kv:fp8", GQA, dtype="float32"),
    Case("kv:fp8(scale=none)", GQA),
    Case("k2:bf16", dtype="float32"),
    Case("k2:bf16", ODD, tokens=2),
    Case("k2:int16", dtype="float32", splits=3),
    Case("k2:int16+8", dtype="float32", tokens=2),
    Case("k2:int16+8"),
    Case("k2:int16(extra=int8)+8", TINY, "rope", "float32"),
    Case("k2:bf16", TINY, "rope", "float32", k_bias=True),
    Case("k2:bf16", TINY, "interleaved", "float32", 4),
    Case("k2:int16+8", TINY, "rope"),
    Case("k2:int16+8", ODD, "rope", "float32", 2, windowed(20), splits=2),
    Case("k2:bf16", TINY, "none", "float32", 1, (("softcap", 3.0),), k_bias=True),
    Case("k2:int16", TINY, "alibi", "float32", 2, k_bias=True),
    Case("k2:int16+8", k_bias=True),
    Case("k2:bf16", k_bias=True),
    Case("x2:bf16", GQA, "alibi", "float32", 2),
    Case("x2:int16", GQA, dtype="float32"),
    Case("x2:bf16", GQA),
    Case("kv:bf16", GQA, "t5", "float32", 3),
    Case("k2:int16+8", TINY, "fire", "float32"),
    Case("x2:bf16", GQA, "kerple", "float32", 2, splits=2),
    Case("e2:bf16", GQA, "none", "float32", 3, (("causal", False),)),
    Case("e2:bf16", TINY, "none", "bfloat16", 1, (("causal", False),)),
    Case("h2:bf16", TINY, "none", "float32", 2, (("causal", False),)),
    Case("h2:int16", TINY, options=(("causal", False),), splits=2),
    Case("x2:int8", GQA, dtype="float32", tokens=2),
    Case("k2:fp8(scale=token)", dtype="float32"),
    # Heads that are no power of two, whose columns no lanes divide, and one that is wider than lanes.
    Case("kv:bf16", (2, 2, 48, 96), "rope", "float32", lengths=FEW),
    Case("k2:int16", (2, 2, 48, 96), "rope", lengths=FEW),
    Case("kv:int8", (4, 2, 80, 320), dtype="float32", lengths=FEW),
    Case("k2:bf16", (2, 2, 80, 160), "rope", "float32", lengths=FEW),
    Case("kv:int16", (2, 1, 256, 512), "rope", lengths=FEW),
    Case("k2:bf16", (2, 2, 256, 512), "rope", "float32", lengths=FEW),
]
SHORT = (5, 40)
REAL = [
    Case(scheme, (s.heads, s.kv_heads, s.head_dim, s.width), s.position, "bfloat16", lengths=SHORT)
    for name, schemes in (
        ("llama-2-7b", ("kv:bf16", "k2:bf16", "k2:int16+16")),
        ("phi-3-mini", ("k2:int16+16",)),
        ("smollm2-1.7b", ("k2:int16+16",)),
        ("whisper-large-self", ("k2:int16",)),
    )
    for scheme in schemes
    for s in (SHAPES[name],)
]
CROSS = SHAPES["t5-11b-cross"]
REAL.append(
    Case(
        "e2:bf16",
        (CROSS.heads, CROSS.kv_heads, CROSS.head_dim, CROSS.width),
        options=(("causal", False),),
        lengths=SHORT,
    )
)


def made(case, seed=0):
    """Queries, a full cache, weights, spec and starts; rows, maps and queries are of size about 1."""
    heads, kv_heads, size, width = case.layout
    interleaved = case.position == "interleaved"
    kind = "rope" if interleaved else case.position
    position = dataclasses.replace(
        suites.POSITIONS.get(kind, Position(kind=kind)), theta=1000.0, interleaved=interleaved
    )
    spec = DecodeSpec(
        scheme=parse_scheme(case.scheme),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=size,
        width=width,
        position=position,
        dtype=case.dtype,
        **dict(case.options),
    )
    draw = np.random.default_rng(seed)

    def array(*shape, scale=1.0):
        return jnp.asarray(scale * draw.standard_normal(shape), jnp.float32)

    method, codec, batch = basis(spec), codec_of(spec.scheme), len(case.lengths)
    streams = method.streams(spec)
    cache = empty(streams, codec, batch=batch, capacity=CAPACITY)
    cache = append(cache, {name: array(batch, CAPACITY, *row) for name, row in streams.items()}, codec)
    cache = dataclasses.replace(cache, length=jnp.asarray(case.lengths, jnp.int32))
    wide, kept = kv_heads * size, spec.scheme.extra
    weights = DecodeWeights()
    if spec.scheme.basis == "k":
        weights = DecodeWeights(
            w_kv=array(wide + kept, kv_heads, size, scale=wide**-0.5),
            k_bias=array(kv_heads, size) if case.k_bias else None,
        )
    elif spec.scheme.basis != "kv":
        wk, wv = (array(width, kv_heads, size, scale=width**-0.5) for _ in range(2))
        weights = DecodeWeights(wk=wk, wv=wv)
    learned = suites.bias_parameters(position, heads, draw)
    if learned is not None:
        learned = {name: jnp.asarray(each, jnp.float32) for name, each in learned.items()}
        weights = dataclasses.replace(weights, position=learned)
    return array(batch, case.tokens, heads, size), cache, weights, spec


def start_of(cache, spec, tokens):
    """Of the newest tokens; cross-attention's queries have no place among the keys."""
    return cache.length - tokens if spec.causal else jnp.zeros_like(cache.length)


def poisoned(cache):
    """Behind each sequence's tokens: NaN, or the integers that codes never are."""
    slots = jnp.broadcast_to(jnp.arange(cache.capacity), (cache.batch, cache.capacity))
    past = slots >= cache.length[:, None]

    def spoil(leaf):
        worst = jnp.nan if jnp.issubdtype(leaf.dtype, jnp.floating) else jnp.iinfo(leaf.dtype).min
        mask = past.reshape(*past.shape, *(1,) * (leaf.ndim - 2))
        return jnp.where(mask, jnp.asarray(worst).astype(leaf.dtype), leaf)

    streams = {
        name: held.written(jax.tree.map(spoil, held.codes()), slots) for name, held in cache.streams.items()
    }
    return dataclasses.replace(cache, streams=streams)


def expected(q, cache, weights, spec, start):
    """The oracle on the rows that the codes stand for, float64."""
    rows = {
        name: np.asarray(each, np.float64)
        for name, each in read(cache, codec_of(spec.scheme), "float32").items()
    }
    tokens = q.shape[1]
    mask = {
        "start": np.asarray(start),
        "length": np.asarray(cache.length),
        "causal": spec.causal,
        "window": spec.window,
        "softcap": spec.softcap,
    }
    if spec.position.kind in ("alibi", "t5", "fire", "kerple"):
        value = {name: np.asarray(each, np.float64) for name, each in (weights.position or {}).items()}
        steps = [np.asarray(start)[:, None] + np.arange(tokens)[None], np.arange(cache.capacity)]
        biases = [suites.bias_of(spec.position, value, spec.heads, at, steps[1]) for at in steps[0]]
        mask["bias"] = np.stack(biases)
    rope, q = suites.rope_of(spec), np.asarray(q, np.float64)
    if rope:
        q = np.stack(
            [
                oracle.rotate(each[None], np.asarray(start)[b] + np.arange(tokens), *rope)[0]
                for b, each in enumerate(q)
            ]
        )
    if spec.scheme.basis == "kv":
        return oracle.attend(q, rows["k"], rows["v"], **mask)
    if spec.scheme.basis == "k":
        extra = rows["r"][:, :, 0] if "r" in rows else None
        bias = None if weights.k_bias is None else np.asarray(weights.k_bias)
        return oracle.k_basis(
            q, rows["k"], np.asarray(weights.w_kv), option=2, rope=rope, key_bias=bias, extra=extra, **mask
        )
    (row,) = rows.values()
    return oracle.x_basis(q, row[:, :, 0], np.asarray(weights.wk), np.asarray(weights.wv), option=2, **mask)


def races_found():
    """Of the last hostile interpretation; jax says it nowhere else."""
    assert interpreter.races is not None
    return interpreter.races.races_found


def holds_sas(found, other, wanted, whole, tolerance):
    """A kernel cuts against the maximum so far: the reference's answers where that is the last, and not worse ones.

    whole: sequences of one block; wanted: by an exact softmax.
    """
    found, other = np.asarray(found, np.float64), np.asarray(other, np.float64)
    error = relative_l2(other, wanted)
    assert error > 3 * tolerance, "SAS cannot be told from an exact softmax"
    assert error / 2 < relative_l2(found, wanted) < 1.1 * error
    assert relative_l2(found[whole], other[whole]) < tolerance


@pytest.mark.parametrize(
    "case",
    [
        Case("kv:bf16@sas(2)", dtype="float32"),
        Case("k2:int16+8@sas(2)", TINY, "rope"),
        Case("k2:bf16@sas(2,2)", TINY, "none", "float32", 2),
        Case("x2:bf16@sas(2)", GQA, dtype="float32"),
    ],
    ids=str,
)
def test_sas_is_the_reference_s_where_its_maximum_is(case):
    q, cache, weights, spec = made(case)
    start = start_of(cache, spec, case.tokens)
    tiles = Tiles(block=BLOCK)
    found = pallas_tpu.decode(q, poisoned(cache), weights, spec, start, tiles=tiles, interpret=True)
    other = reference.decode(q, cache, weights, spec, start)
    whole = np.asarray((cache.length > 0) & (cache.length <= BLOCK))
    holds_sas(found, other, expected(q, cache, weights, spec, start), whole, TOLERANCE[case.dtype])


@pytest.mark.parametrize("hostile", [False, True], ids=["plain", "hostile"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_are_the_oracle(case, hostile):
    q, cache, weights, spec = made(case)
    start = start_of(cache, spec, case.tokens)
    tiles = Tiles(block=BLOCK, splits=case.splits)

    def run():
        mode = HOSTILE if hostile else True
        return pallas_tpu.decode(q, poisoned(cache), weights, spec, start, tiles=tiles, interpret=mode)

    found = np.asarray(run(), np.float64)
    wanted = expected(q, cache, weights, spec, start)
    assert relative_l2(found, wanted) < TOLERANCE[case.dtype]
    assert not np.any(found[0])  # a sequence without tokens
    if hostile:
        assert not races_found()
    else:
        np.testing.assert_array_equal(found, np.asarray(run(), np.float64))


@pytest.mark.slow
@pytest.mark.parametrize("case", REAL, ids=str)
def test_kernels_are_the_oracle_at_real_sizes(case):
    q, cache, weights, spec = made(case)
    start = start_of(cache, spec, case.tokens)
    found = pallas_tpu.decode(
        q, poisoned(cache), weights, spec, start, tiles=Tiles(block=BLOCK), interpret=True
    )
    wanted = expected(q, cache, weights, spec, start)
    assert relative_l2(np.asarray(found, np.float64), wanted) < TOLERANCE[case.dtype]


@pytest.mark.parametrize("scheme", ["kv:bf16", "k2:int16", "x2:bf16"])
def test_bfloat16_errs_no_more_than_twice_as_much_as_the_reference(scheme):
    """And not much less than the tolerance above: one ten times as narrow would not hold."""
    case = Case(scheme, position="rope" if scheme[0] == "k" else "none", lengths=(40, 64, CAPACITY))
    q, cache, weights, spec = made(case)
    start = start_of(cache, spec, 1)
    wanted = expected(q, cache, weights, spec, start)
    mine, other = (
        relative_l2(np.asarray(each(q, cache, weights, spec, start), np.float64), wanted)
        for each in (pallas_tpu.decode, reference.decode)
    )
    assert TOLERANCE["bfloat16"] / 10 < mine < 2 * other


def test_the_public_call_takes_it_by_name_and_an_overfull_cache_is_nan():
    q, cache, weights, spec = made(Case("k2:int16", position="rope", lengths=(9, CAPACITY + 1)))
    out = np.asarray(decode(q, cache, weights, spec, implementation="pallas_tpu"), np.float32)
    assert np.isfinite(out[0]).all()
    assert np.isnan(out[1]).all()


def test_on_a_tpu_a_layer_takes_it_unless_it_refuses(monkeypatch):
    taken = []

    def kernel(*args):
        out = pallas_tpu.decode_part(*args, interpret=True)
        taken.append(args[3].scheme)
        return out

    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setitem(api.IMPLEMENTATIONS, "pallas_tpu", kernel)
    draw = np.random.default_rng(0)
    wq, wk, wv = (jnp.asarray(draw.standard_normal((64, 4, 16)) / 8, jnp.float32) for _ in range(3))
    projections = Projections(wq=wq, wk=wk, wv=wv, wo=jnp.swapaxes(wq, 0, 2).reshape(4, 16, 64))
    for scheme, served in (("k2:bf16", True), ("kv:kivi4", False)):
        spec = DecodeSpec(scheme=parse_scheme(scheme), heads=4, kv_heads=4, head_dim=16, width=64)
        layer, cache = convert(projections, spec).layer, init_cache(spec, batch=1, capacity=64)
        out, _ = attend_cached(jnp.ones((1, 1, 64)), layer, cache)
        assert np.isfinite(np.asarray(out)).all()
        assert bool(taken) == served
        taken.clear()


REFUSED = [
    (Case("k1:bf16"), "option 1 rebuilds rows"),
    (Case("kr:bf16", position="rope"), "basis kr has no kernel"),
    (Case("v2:bf16"), "basis v has no kernel"),
    (Case("kv:kivi4"), "codec kivi has no kernel"),
    (Case("kv:fp16"), "codec fp16 has no kernel"),
    (Case("kv:bf16@sparse(0.01)"), "softmax sparse.* has no kernel; it has exact, and SAS"),
    (Case("kv:bf16@sas(0)"), "softmax sas.* it has exact, and SAS with a cut of at most 16"),
    (Case("kv:bf16@sas(17)"), "SAS with a cut of at most 16"),
    (Case("kv:bf16#int8"), "compute mode int8 has no kernel"),
    (Case("kv:bf16", dtype="float16"), "float16 is none of a TPU's"),
    (Case("k2:int8"), "one scale for all heads"),
    (Case("k2:fp8"), "one scale for all heads"),
    (Case("kv:fp8(scale=0.1)"), "known scale"),
    (Case("k2:int16", position="rope", k_bias=True), "key bias beside scaled keys"),
    (Case("k2:int16", options=(("softcap", 3.0),), k_bias=True), "key bias beside scaled keys"),
]


@pytest.mark.parametrize(("case", "reason"), REFUSED, ids=str)
def test_what_it_does_not_serve_it_refuses_with_the_reason(case, reason):
    q, cache, weights, spec = made(dataclasses.replace(case, lengths=(4,)))
    with pytest.raises(NotImplementedError, match=reason):
        decode(q, cache, weights, spec, implementation="pallas_tpu")


def test_a_planted_race_is_seen():
    """Two cores that write the same output: what the hostile interpreter is for."""

    def kernel(x, out):
        out[...] = x[...]

    call = pl.pallas_call(
        kernel,
        grid=(2,),
        in_specs=[pl.BlockSpec((8, 128), lambda i: (i, 0))],
        out_specs=pl.BlockSpec((8, 128), lambda i: (0, 0)),
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=HOSTILE,
    )
    said = ""
    try:
        call(jnp.ones((16, 128), jnp.float32)).block_until_ready()
    except jax.errors.JaxRuntimeError as error:  # from jax 0.12 on
        said = str(error)
    assert "RACE DETECTED" in said or races_found()
