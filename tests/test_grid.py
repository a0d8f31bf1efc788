"""Every cell of basis x codec x softmax x compute mode either runs or is refused with a reason."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import schemes
from slimjax import DecodeSpec, Position, Projections, parse_scheme
from slimjax.attention.compute import COMPUTES
from slimjax.attention.cross import attend_filled, fill
from slimjax.attention.layer import attend_cached, init_cache, prefill
from slimjax.attention.softmax import SOFTMAXES
from slimjax.cache import CODECS
from slimjax.scheme import BASES
from slimjax.solve import convert

SOFTMAX = {"exact": "", "sas": "@sas", "sparse": "@sparse(1e-3)"}
COMPUTE = {"float": "#float", "int8": "#int8", "sage": "#sage"}
WIDTHS = {"flashq": ("8", "4", "3", "2", "2-4"), "kivi": ("4", "3", "2", "2-4"), "gear_l": ("4", "3", "2", "2-4"),
          "xquant": ("8", "4", "3", "2"), "turboquant": ("4", "3", "2", "1", "2-4"), "hadamard": ("4", "2-4"),
          "absmax": ("4", "2-4")}  # fmt: skip


def layer_of(basis):
    """A square layer, with RoPE where rotated keys are asked for, and of cross-attention for shared caches."""
    draw = np.random.default_rng(0)
    wq, wk, wv = (jnp.asarray(draw.standard_normal((32, 4, 8)) / 6, jnp.float32) for _ in range(3))
    wo = jnp.asarray(draw.standard_normal((4, 8, 32)) / 6, jnp.float32)
    spec = DecodeSpec(
        scheme=parse_scheme(f"{basis}:float32"), heads=4, kv_heads=4, head_dim=8, width=32,
        position=Position(kind="rope" if basis == "kr" else "none"), causal=basis not in ("e", "h"),
    )  # fmt: skip
    return convert(Projections(wq=wq, wk=wk, wv=wv, wo=wo), spec).layer


LAYERS = {}


def cell(text):
    """A prompt and a step through the cache; what it gives and stores."""
    scheme = parse_scheme(text)
    plain = LAYERS.setdefault(scheme.basis, layer_of(scheme.basis))
    layer = dataclasses.replace(plain, spec=dataclasses.replace(plain.spec, scheme=scheme))

    def run(x):
        cache = init_cache(layer.spec, batch=2, capacity=80)
        if not layer.spec.causal:
            cache = fill(x, layer, cache)
            return attend_filled(x[:, -1:], layer, cache), cache
        if x.shape[1] > 1:
            _, cache = prefill(x[:, :-1], layer, cache)
        return attend_cached(x[:, -1:], layer, cache)

    return run


def cache_bytes(spec, scheme):
    return schemes.cache_bytes(dataclasses.replace(spec, scheme=scheme), 2, 80)


def cells(basis, codec):
    """The default width with everything, every other width with nothing else."""
    first, *others = WIDTHS.get(codec, ("",))
    for softmax in SOFTMAX.values():
        for compute in COMPUTE.values():
            yield f"{basis}:{codec}{first}{softmax}{compute}"
    for width in others:
        yield f"{basis}:{codec}{width}"


def test_the_axes_are_all_here():
    assert set(SOFTMAX) == set(SOFTMAXES)
    assert set(COMPUTE) == set(COMPUTES)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("basis", BASES)
def test_every_cell_runs_or_says_why_not(basis, codec):
    ran = 0
    for text in cells(basis, codec):
        try:
            out, cache = jax.eval_shape(cell(text), jax.ShapeDtypeStruct((2, 1, 32), jnp.float32))
        except (NotImplementedError, ValueError) as refusal:
            reason = str(refusal)
            with pytest.raises(
                type(refusal)
            ) as early:  # an estimate knows it, too, which traces no attention
                cache_bytes(LAYERS[basis].spec, parse_scheme(text))
            assert reason.removeprefix("reference: ") in str(early.value)
            assert "use " in reason or "64-bit mode" in reason, f"{text}: {reason}"
            continue
        assert out.shape == (2, 1, 32)
        assert out.dtype == jnp.float32
        assert cache.nbytes > 0
        ran += 1
    # Only keys and values meet in integers, and not under a sparse softmax; in floats, all.
    refused = codec == "float64" or (codec == "fixed16" and basis != "k")
    others = len(WIDTHS.get(codec, ("",))) - 1
    if basis in ("x", "e", "h"):  # one row for all heads has no heads of two widths
        others -= "2-4" in WIDTHS.get(codec, ("",))
    assert ran == (0 if refused else others + (8 if basis == "kv" else 3))


@pytest.mark.parametrize("text", ["kv:flashq2-4@sas", "k:flashq4", "kr:kivi4@sas", "v:gear_l4", "x:xquant4@sas(8)",
                                  "e:turboquant4", "h:flashq8", "kv:nvfp4#int8", "kv:fp8#sage"])  # fmt: skip
def test_cells_that_run_give_finite_answers(text):
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 71, 32)), jnp.float32)
    out, _ = jax.jit(cell(text))(x)
    assert bool(jnp.all(jnp.isfinite(out)))
    exact, _ = jax.jit(cell(f"{text.partition(':')[0]}:float32"))(x)
    # Four bits of keys alone are of no use (the values are lost): a finite answer is all that is asked there.
    limit = 10 if text[0] == "k" and text[1] != "v" else 1
    assert 0 < float(jnp.linalg.norm(out - exact) / jnp.linalg.norm(exact)) < limit
