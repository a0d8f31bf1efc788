"""What a compiled decoding step does, against the formulas: multiplications, and how large its temporaries are."""

import math

import jax
import jax.numpy as jnp
import pytest
import suites
import tiny_whisper as tiny
from flax import nnx

import slimjax
from slimjax.attention.layer import init_cache
from slimjax.cost import model
from slimjax.cost.architectures import Architecture
from slimjax.models.whisper_caches import begin
from slimjax.models.whisper_convert import convert_whisper
from slimjax.scheme import parse_scheme
from slimjax.solve import convert


def multiplications(jaxpr) -> int:
    """2 per multiply-add of every product that a jaxpr, and those inside it, make; of a loop, all its rounds."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            first = equation.invars[0].aval.shape
            inner = math.prod(first[axis] for axis in contracted)
            total += 2 * inner * math.prod(equation.outvars[0].aval.shape)
        assert equation.primitive.name != "while", "a loop of unknown length"
        rounds = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            inside = getattr(value, "jaxpr", value)
            if hasattr(inside, "eqns"):
                total += rounds * multiplications(inside)
    return total


def layer(scheme, sizes=(4, 4, 6, 24)):
    case = suites.subject(scheme, sizes, "none", dtype="float32", causal=False)
    return case, convert(case.projections, case.spec).layer


def step_of(scheme, slots, batch=1, sizes=(4, 4, 6, 24)):
    """The step of one cross-attention layer on a cache of ``slots`` rows, its inputs, and the layer's sizes."""
    case, made = layer(scheme, sizes)
    cache = init_cache(case.spec, batch=batch, capacity=slots)
    x = jnp.zeros((batch, 1, case.spec.width), jnp.float32)
    return (lambda x, cache: slimjax.attend_filled(x, made, cache)), (x, cache), case.spec


@pytest.mark.parametrize("sizes", [(4, 4, 6, 24), (4, 2, 6, 24), (6, 6, 8, 16)])
@pytest.mark.parametrize("slots", [7, 2048])
def test_a_step_on_the_encoders_output_multiplies_as_often_as_the_formula_says(sizes, slots):
    """Per layer and token 4DA for queries and output, 4DA to absorb, and N heads of 2SD + 2SD on whole rows."""
    step, inputs, spec = step_of("e:bf16", slots, sizes=sizes)
    heads, width = spec.heads, spec.width
    across = heads * spec.head_dim
    expected = 8 * width * across + heads * 4 * slots * width
    found = multiplications(jax.make_jaxpr(step)(*inputs).jaxpr)
    assert found == expected
    assert found == of_model(spec, slots)


@pytest.mark.parametrize("scheme", ["k:bf16", "k:bf16+4", "h:bf16"])
def test_the_cost_model_counts_what_is_multiplied(scheme):
    step, inputs, spec = step_of(scheme, 40)
    assert multiplications(jax.make_jaxpr(step)(*inputs).jaxpr) == of_model(spec, 40, like=scheme)


def of_model(spec, slots, like="e:bf16"):
    """The cost model's operations of one cross-attention layer and token, in the same order of its terms."""
    scheme = parse_scheme(like)
    sizes = Architecture(
        name="one", width=spec.width, heads=spec.heads, kv_heads=spec.kv_heads, head_dim=spec.head_dim, layers=1
    )  # fmt: skip
    per_head = model.score_operations(sizes, scheme, slots) + model.weighing_operations(sizes, scheme, slots)
    return model.projections(sizes, scheme, slots, cross=True).operations + spec.heads * per_head


def test_a_whole_step_of_whisper_on_the_encoders_output():
    """All layers, MLPs, norms and logits: the difference to a step with twice the encoder's rows is 4SDN a layer."""
    whisper = tiny.random_model()
    config = whisper.config
    layers, _ = convert_whisper(whisper, "e:bf16", "k:int16+4")
    graph, params = nnx.split(whisper)

    def step(params, token, caches):
        return nnx.merge(graph, params).with_cache(token, layers, caches)[0]

    token = jnp.zeros((1, 1), jnp.int32)
    counts = []
    for slots in (8, 16):
        memory = jnp.zeros((1, slots, config.width), jnp.float32)
        caches = begin(layers, memory, capacity=4)
        counts.append(multiplications(jax.make_jaxpr(step)(params, token, caches).jaxpr))
    heads = layers.cross_layers[0].spec.heads
    assert counts[1] - counts[0] == config.decoder_layers * heads * 4 * 8 * config.width


def temporaries(scheme):
    """Bytes of a compiled step's temporaries; rows narrow, keys wide: S = 1024, D = 16, E = 256."""
    step, inputs, spec = step_of(scheme, 1024, sizes=(2, 2, 128, 16))
    compiled = jax.jit(step).lower(*inputs).compile()
    return compiled.memory_analysis().temp_size_in_bytes, 4 * 1024 * spec.key_width, compiled


def test_a_compiled_step_on_the_encoders_output_has_no_keys_or_values_in_memory():
    """Neither all temporaries together nor any instruction's result; the control, option 1, has both."""
    held, keys, compiled = temporaries("e:bf16")
    assert held < keys / 4
    assert 4 * largest(compiled.as_text()) < keys / 4
    held, keys, compiled = temporaries("e1:bf16")
    assert held >= keys
    assert 4 * largest(compiled.as_text()) >= keys


def largest(hlo: str) -> int:
    """Elements of the largest array that any instruction of an optimised module makes."""
    most = 0
    for line in hlo.splitlines():
        made = line.strip().partition(" = ")[2]
        if not made or " parameter(" in made:
            continue
        shape = made.partition("[")[2].partition("]")[0]
        if made.startswith(("f", "bf", "s", "u")) and shape.replace(",", "").isdigit():
            most = max(most, math.prod(int(n) for n in shape.split(",")))
    return most
