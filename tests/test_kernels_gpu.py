"""The GPU kernels, interpreted: against the oracle, what must not be read poisoned, races looked for; and lowered."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import suites
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter_state

import oracle
from slimjax import DecodeSpec, DecodeWeights, Position, decode, parse_scheme
from slimjax.attention.bases import basis
from slimjax.cache import append, codec_of, empty, read
from slimjax.kernels import gpu_aot, gpu_cases, pallas_gpu, reference
from slimjax.kernels.gpu import grid, keys, latent, mosaic, ring
from slimjax.kernels.gpu.ring import BLOCK
from slimjax.kernels.gpu.rows import column_width
from slimjax.numerics import relative_l2

CAPACITY = 2 * BLOCK + 24  # the last block is not whole
LENGTHS = (0, 1, BLOCK - 1, BLOCK, BLOCK + 1, CAPACITY)  # one ragged batch
# Of the output's size: queries and weights are rounded to 2^-9, scores are a few units.
TOLERANCE = 1e-2
# The interpreter of jax 0.10 takes seven seconds a block of threads: a few small cases stand for all.
OLD = mosaic.OLD


@dataclasses.dataclass(frozen=True)
class Case:
    layout: tuple[int, int, int]  # N, K, H
    tokens: int = 1
    position: str = "none"
    options: tuple[tuple[str, object], ...] = ()
    splits: int = 1
    scheme: str = "kv:bf16"
    dtype: str = "bfloat16"
    lengths: tuple[int, ...] = LENGTHS
    capacity: int = CAPACITY
    k_bias: bool = False

    def __str__(self):
        more = [f"{name}={value}" for name, value in self.options]
        shape = "x".join(map(str, self.layout))
        return "-".join([self.scheme, shape, self.position, f"T{self.tokens}", f"P{self.splits}", *more])


EVERYTHING = (("window", 70), ("softcap", 5.0))
IN_OLD = [
    Case((1, 1, 64)),
    Case((4, 1, 64), 2, "rope", EVERYTHING),
    Case((1, 1, 64), scheme="k2:bf16"),
]
CASES = [
    *IN_OLD,
    Case((2, 2, 96), 1, "rope"),
    Case((2, 2, 128), 1, "learned", splits=2),
    Case((6, 2, 64), 3, "rope", splits=3),
    Case((8, 1, 128), 8),  # all 64 rows
    Case((2, 1, 96), 2, options=(("window", 5), ("scale", 0.3)), splits=2),
    # The first row sees a block whole, the last only the end of it.
    Case((1, 1, 64), 8, options=(("window", 70),), lengths=(2 * BLOCK + 9,)),
    Case((2, 2, 64), 2, options=(("causal", False),)),
    # A window that looks ahead of the query: to the end, whichever block that is in.
    Case((2, 1, 64), 2, options=(("window", 5), ("causal", False))),
    Case((2, 2, 64), scheme="k2:bf16"),
    Case((3, 3, 96), 2, "learned", splits=2, scheme="k2:bf16"),
    Case((2, 2, 128), 3, options=EVERYTHING, scheme="k2:bf16"),
    Case((3, 3, 64), 1, options=(("causal", False),), scheme="k2:bf16", k_bias=True),
    # So many blocks that every slot of shared memory is used again, by both readers.
    Case((1, 1, 128), lengths=(11 * BLOCK, 10 * BLOCK + 3), capacity=11 * BLOCK),
    Case((1, 1, 128), lengths=(21 * BLOCK, 15 * BLOCK + 3), capacity=21 * BLOCK, scheme="k2:bf16"),
]


def cases(chosen=CASES):
    """Each; where the interpreter is slow, a few cases of two sequences and no others."""
    if not OLD:
        return [pytest.param(case, id=str(case)) for case in chosen]
    skip = pytest.mark.skip(reason="the interpreter of jax 0.10 takes seven seconds a block of threads")
    return [
        pytest.param(
            dataclasses.replace(case, lengths=(0, BLOCK + 1)) if case in IN_OLD else case,
            marks=pytest.mark.slow if case in IN_OLD else skip,
            id=str(case),
        )
        for case in chosen
    ]


def made(case, seed=0):
    """Queries, a full cache, weights and a spec; rows, maps and queries are of size about 1."""
    heads_, kv_heads, size = case.layout
    spec = DecodeSpec(
        scheme=parse_scheme(case.scheme),
        heads=heads_,
        kv_heads=kv_heads,
        head_dim=size,
        width=kv_heads * size,
        position=Position(kind=case.position, theta=1000.0)
        if case.position == "rope"
        else Position(kind=case.position),
        dtype=case.dtype,
        **dict(case.options),
    )
    draw = np.random.default_rng(seed)

    def array(*shape):
        return jnp.asarray(draw.standard_normal(shape), jnp.float32)

    codec, batch, streams = codec_of(spec.scheme), len(case.lengths), basis(spec).streams(spec)
    cache = empty(streams, codec, batch=batch, capacity=case.capacity)
    rows = {name: array(batch, case.capacity, *row) for name, row in streams.items()}
    cache = dataclasses.replace(append(cache, rows, codec), length=jnp.asarray(case.lengths, jnp.int32))
    weights, wide = DecodeWeights(), kv_heads * size
    if spec.scheme.basis == "k":
        weights = DecodeWeights(
            w_kv=array(wide + spec.scheme.extra, kv_heads, size) * wide**-0.5,
            k_bias=array(kv_heads, size) if case.k_bias else None,
        )
    elif spec.scheme.basis in latent.BASES:
        wk, wv = (array(wide, kv_heads, size) * wide**-0.5 for _ in range(2))
        weights = DecodeWeights(wk=wk, wv=wv, k_bias=array(kv_heads, size) if case.k_bias else None)
    return array(batch, case.tokens, heads_, size), cache, weights, spec


def start_of(cache, spec, tokens):
    """Of the newest tokens; cross-attention's queries have no place among the keys."""
    return cache.length - tokens if spec.causal else jnp.zeros_like(cache.length)


def poisoned(cache):
    """NaN, or the least of integers, behind each sequence's tokens."""
    past = jnp.arange(cache.capacity)[None] >= cache.length[:, None]

    def spoil(leaf, tokens_last):
        bad = jnp.nan if jnp.issubdtype(leaf.dtype, jnp.floating) else jnp.iinfo(leaf.dtype).min
        return jnp.where(
            past[:, None] if tokens_last else past[..., None], jnp.asarray(bad, leaf.dtype), leaf
        )

    streams = {
        name: dataclasses.replace(held, leaves=tuple(map(spoil, held.leaves, held.tokens_last)))
        for name, held in cache.streams.items()
    }
    return dataclasses.replace(cache, streams=streams)


def expected(q, cache, weights, spec, start):
    """The oracle on the rows that the codes stand for, float64."""
    rows = {
        name: np.asarray(each, np.float64)
        for name, each in read(cache, codec_of(spec.scheme), "float32").items()
    }
    q, start, rope = np.asarray(q, np.float64), np.asarray(start), suites.rope_of(spec)
    if rope:
        steps = np.arange(q.shape[1])
        q = np.concatenate([oracle.rotate(each[None], start[b] + steps, *rope) for b, each in enumerate(q)])
    if spec.scale is not None:
        q = q * spec.scale * spec.head_dim**0.5
    mask = {"start": start, "length": np.asarray(cache.length), "causal": spec.causal}
    mask |= {"window": spec.window, "softcap": spec.softcap}
    if spec.scheme.basis == "kv":
        return oracle.attend(q, rows["k"], rows["v"], **mask)
    bias = None if weights.k_bias is None else np.asarray(weights.k_bias)
    if spec.scheme.basis in latent.BASES:
        whole, maps = rows[spec.scheme.basis][:, :, 0], (np.asarray(weights.wk), np.asarray(weights.wv))
        return oracle.from_rows(q, whole, *maps, option=2, key_bias=bias, **mask)
    mask["extra"] = rows["r"][:, :, 0] if "r" in rows else None
    return oracle.k_basis(q, rows["k"], np.asarray(weights.w_kv), option=2, rope=rope, key_bias=bias, **mask)


def run(case, interpret=None, seed=0, passes=2):
    """What the kernel answers, float64, and the oracle."""
    q, clean, weights, spec = made(case, seed)
    start = start_of(clean, spec, case.tokens)
    found = pallas_gpu.decode(
        q, poisoned(clean), weights, spec, start, splits=case.splits, passes=passes, interpret=interpret
    )
    return np.asarray(found, np.float64), expected(q, clean, weights, spec, start)


@pytest.mark.parametrize("case", cases())
def test_the_kernel_is_the_oracle(case):
    found, wanted = run(case, interpret=mosaic.interpreter(detect_races=True))
    assert relative_l2(found, wanted) < TOLERANCE
    assert not interpreter_state.get_races().races_found
    if 0 in case.lengths:
        assert not np.any(found[0])  # a sequence without tokens


@pytest.mark.parametrize("case", cases([Case((2, 2, 96), 1, "rope"), Case((2, 2, 96), scheme="k2:bf16")]))
def test_it_errs_no_more_than_twice_as_much_as_the_reference_and_always_the_same(case):
    """And not much less than the tolerance above: one ten times as narrow would not hold."""
    case = dataclasses.replace(case, lengths=(40, 64, CAPACITY))
    mine, wanted = run(case)
    q, cache, weights, spec = made(case)
    other = reference.decode(q, cache, weights, spec, start_of(cache, spec, case.tokens))
    error = relative_l2(mine, wanted)
    assert TOLERANCE / 10 < error < 2 * relative_l2(np.asarray(other, np.float64), wanted)
    np.testing.assert_array_equal(mine, run(case)[0])


@pytest.mark.parametrize(
    "case", cases([Case((1, 1, 64), lengths=(9, CAPACITY + 1, 2**30), options=(("window", 5),))])
)
def test_the_public_call_takes_it_by_name_and_an_overfull_cache_is_nan(case):
    q, cache, weights, spec = made(case)
    out = np.asarray(decode(q, cache, weights, spec, implementation="pallas_gpu"), np.float32)
    assert np.isfinite(out[0]).all()
    assert np.isnan(out[1:]).all()


@pytest.mark.parametrize("case", cases(CASES[-1:]))
def test_a_planted_race_is_seen(case, monkeypatch):
    """A loader that does not wait for its slots."""
    load, wait = ring.load, ring.plgpu.barrier_wait

    def hasty(*args):
        monkeypatch.setattr(ring.plgpu, "barrier_wait", lambda barrier: None)
        load(*args)
        monkeypatch.setattr(ring.plgpu, "barrier_wait", wait)

    monkeypatch.setattr(ring, "load", hasty)
    said = ""
    try:
        run(case, interpret=mosaic.interpreter(detect_races=True))
    except jax.errors.JaxRuntimeError as error:
        said = str(error)
    assert "RACE DETECTED" in said or interpreter_state.get_races().races_found


REFUSED = [
    ({"scheme": "v2:bf16"}, "basis v has no kernel .*; it has kv, k, x, e and h"),
    (
        {"scheme": "x2:bf16", "layout": (3, 3, 64)},
        "rows of 192 columns for 1 query tokens of 3 heads|jax 0.10",
    ),
    ({"scheme": "x2:bf16", "tokens": 600}, "600 query tokens of 2 heads|jax 0.10"),
    ({"scheme": "k2:bf16+16", "capacity": 72}, "extra coordinates of 72 slots .* take a multiple of 64"),
    ({"scheme": "k2:int16(extra=bf16)+16"}, "extra coordinates in another codec than the keys"),
    ({"scheme": "k2:bf16(extra=int16)+16"}, "extra coordinates in another codec than the keys"),
    ({"scheme": "k1:bf16"}, "option 1 rebuilds rows"),
    ({"scheme": "k2:int8"}, "codec int8 has no kernel"),
    ({"scheme": "k2:bf16+12"}, "12 extra coordinates have no kernel .* multiples of 8 up to 64"),
    ({"scheme": "k2:bf16", "k_bias": True, "options": (("softcap", 1.0),)}, "a key bias under a softcap"),
    ({"scheme": "k2:bf16", "k_bias": True, "position": "rope"}, "a key bias under RoPE"),
    ({"scheme": "k2:bf16", "tokens": 1000}, r"1000 query tokens .* decode at most (512|32) at a time"),
    (
        {"scheme": "k2:bf16", "layout": (33, 33, 64), "position": "rope"},
        "before RoPE.* (33 heads of 64|jax 0.10)",
    ),
    ({"scheme": "kv:int8"}, "codec int8 has no kernel"),
    ({"scheme": "kv:fp16"}, "codec fp16 has no kernel"),
    ({"scheme": "kv:bf16@sas"}, "softmax sas has no kernel"),
    ({"scheme": "kv:bf16#int8"}, "compute mode int8 has no kernel"),
    ({"dtype": "float32"}, "float32 has no kernel .*; use bfloat16"),
    ({"position": "alibi"}, "position scheme 'alibi' has no kernel"),
    ({"layout": (2, 2, 80)}, "head_dim=80 has no kernel .*; it has 64, 96, 128"),
    ({"layout": (9, 1, 64), "tokens": 8}, "8 query tokens of 9 heads .* at most 7 at a time"),
    ({"capacity": 100}, "100 slots has no kernel .*; take a multiple of 8"),
]


@pytest.mark.parametrize(("changes", "reason"), REFUSED, ids=str)
def test_what_it_does_not_serve_it_refuses_with_the_reason(changes, reason):
    q, cache, weights, spec = made(Case(**{"layout": (2, 2, 64), "lengths": (4,), **changes}))
    with pytest.raises(NotImplementedError, match=reason):
        decode(q, cache, weights, spec, implementation="pallas_gpu")


def test_other_gpus_are_refused(monkeypatch):
    q, cache, weights, spec = made(Case((2, 2, 64), lengths=(4,)))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(NotImplementedError, match=r"compute capability unknown: .* 9.0 \(Hopper\)"):
        pallas_gpu.decode(q, cache, weights, spec, cache.length - 1)
    with pytest.raises(ValueError, match="splits=0: expected at least one part"):
        pallas_gpu.decode(q, cache, weights, spec, cache.length - 1, splits=0, interpret=False)


def test_parts_keep_all_processors_at_work():
    assert grid.parts(32, 32768) == 4  # 128 parts on 132 processors
    assert grid.parts(132, 32768) == 1
    assert grid.parts(1, 64) == 1
    for heads_ in (8, 20, 32, 256, 1024):
        work = heads_ * grid.parts(heads_, 32768) / grid.PROCESSORS
        assert work / -(-work // 1) > 0.9


SERVED = [
    case
    for case in gpu_cases.CASES
    if not case.scheme.startswith("kv:flashq")
    and not pallas_gpu.refusal(case.spec, case.tokens, gpu_cases.CAPACITY)
]


def test_only_jax_0_10_refuses_cases():
    assert len(SERVED) == (
        15 if OLD else sum(not case.scheme.startswith("kv:flashq") for case in gpu_cases.CASES)
    )


@pytest.mark.parametrize("case", SERVED, ids=str)
def test_it_is_lowered_for_cuda_without_a_gpu(case):
    function, specs = gpu_cases.program(case)
    text = gpu_aot.lower(function, *specs).as_text()
    count = 1
    if case.scheme.startswith("k2"):
        found = keys.plan(case.spec, case.tokens, None)
        count = 2 if found is None else len(found)
    assert text.count("custom_call @mosaic_gpu") == count


@pytest.mark.parametrize("size", pallas_gpu.SIZES)
def test_every_reader_has_two_slots(size):
    """One block is worked on while the other comes."""
    for row in (4 * size, 2 * size, 2 * (size + BLOCK)):  # keys and values, keys, keys and weights
        slots = ring.depth(BLOCK * row)
        assert slots >= 2 * ring.READERS
        assert slots % ring.READERS == 0


def test_columns_of_a_block_of_threads():
    assert [column_width(width) for width in (4096, 1280, 96, 64)] == [128, 128, 96, 64]
    with pytest.raises(ValueError, match="width=80: expected a multiple of one of 128, 96, 64"):
        column_width(80)
