"""DecoderLM with the weights of random tiny Llama and GPT-2 models of transformers: equal logits, every cache.

Whole models in float64, so that only algebra is compared; transformers itself computes RMSNorm and the angles of
RoPE in float32, which is what Llama's tolerance allows for.
"""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from parity.need import need
from slimjax.config import ModelConfig
from slimjax.models.decoder import DecoderLM, convert_model, init_caches
from slimjax.numerics import relative_l2

torch = need("torch")
transformers = need("transformers")

VOCAB, WIDTH, HEADS, LAYERS, BATCH, TOKENS = 50, 16, 4, 2, 2, 11
FLOAT32 = 1e-6  # some eight roundings; 1.4e-7 is usual
FLOAT64 = 1e-14


def randomised(model):
    """In float64, every parameter random, so that no bias is 0 and no norm's scale is 1."""
    torch.manual_seed(0)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model, {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}


def assign(parameter, array):
    assert parameter is not None
    array = np.asarray(array)
    assert array.size == parameter[...].size, f"{array.shape=} {parameter.shape=}"
    parameter.set_value(jnp.asarray(array.reshape(parameter.shape), jnp.float64))


def part_of(state, prefix):
    return {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}


def llama(kv_heads, tied):
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=kv_heads, max_position_embeddings=64,
        rms_norm_eps=1e-6, tie_word_embeddings=tied, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    theirs, state = randomised(transformers.LlamaForCausalLM(config))
    ours = DecoderLM(
        ModelConfig(
            vocab=VOCAB, layers=LAYERS, width=WIDTH, heads=HEADS, kv_heads=kv_heads, mlp="swiglu", mlp_width=24,
            norm="rmsnorm", bias=False, tied=tied, position="rope",
        ),
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    assign(ours.embedding, state["model.embed_tokens.weight"])
    assign(ours.norm.scale, state["model.norm.weight"])
    if not tied:
        assign(ours.unembedding, state["lm_head.weight"])
    for i, block in enumerate(ours.blocks):
        weights = part_of(state, f"model.layers.{i}.")
        attention, mlp = block.attention, block.mlp
        assign(attention.query.kernel, weights["self_attn.q_proj.weight"].T)  # torch: [out, in]
        assign(attention.key.kernel, weights["self_attn.k_proj.weight"].T)
        assign(attention.value.kernel, weights["self_attn.v_proj.weight"].T)
        assign(attention.out.kernel, weights["self_attn.o_proj.weight"].T)
        assign(mlp.gate.kernel, weights["mlp.gate_proj.weight"].T)
        assign(mlp.up.kernel, weights["mlp.up_proj.weight"].T)
        assign(mlp.down.kernel, weights["mlp.down_proj.weight"].T)
        assign(block.attention_norm.scale, weights["input_layernorm.weight"])
        assign(block.mlp_norm.scale, weights["post_attention_layernorm.weight"])
    return theirs, ours, FLOAT32


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=64, layer_norm_epsilon=1e-6,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    theirs, state = randomised(transformers.GPT2LMHeadModel(config))
    ours = DecoderLM(
        ModelConfig(
            vocab=VOCAB, layers=LAYERS, width=WIDTH, heads=HEADS, mlp="gelu", norm="layernorm", bias=True, tied=True,
            position="learned", max_length=64,
        ),
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    assign(ours.embedding, state["transformer.wte.weight"])
    assign(ours.positions, state["transformer.wpe.weight"])
    assign(ours.norm.scale, state["transformer.ln_f.weight"])
    assign(ours.norm.bias, state["transformer.ln_f.bias"])
    for i, block in enumerate(ours.blocks):
        part = part_of(state, f"transformer.h.{i}.")
        attention = block.attention
        thirds = zip(
            *(np.split(part[f"attn.c_attn.{kind}"], 3, axis=-1) for kind in ("weight", "bias")), strict=True
        )
        for linear, (kernel, bias) in zip(
            (attention.query, attention.key, attention.value), thirds, strict=True
        ):
            assign(linear.kernel, kernel)  # Conv1D: [in, out]
            assign(linear.bias, bias)
        rest = {
            "attn.c_proj": attention.out, "mlp.c_fc": block.mlp.up, "mlp.c_proj": block.mlp.down,
        }  # fmt: skip
        for name, linear in rest.items():
            assign(linear.kernel, part[f"{name}.weight"])
            assign(linear.bias, part[f"{name}.bias"])
        for name, norm in {"ln_1": block.attention_norm, "ln_2": block.mlp_norm}.items():
            assign(norm.scale, part[f"{name}.weight"])
            assign(norm.bias, part[f"{name}.bias"])
    return theirs, ours, FLOAT64


MODELS = {
    "llama-mha": lambda: llama(HEADS, tied=False),
    "llama-mha-tied": lambda: llama(HEADS, tied=True),
    "llama-gqa": lambda: llama(2, tied=False),
    "llama-mqa": lambda: llama(1, tied=False),
    "gpt2": gpt2,
}
SCHEMES = {
    "llama-mha": ["kv", "k1", "k", "v1", "x1"],
    "llama-gqa": ["kv", "x1"],
    "gpt2": ["kv", "k1", "k", "v1", "v", "x1", "x"],
}


def pair(name):
    """Their logits [B,T,V], our model, the tokens and the tolerance."""
    theirs, ours, tolerance = MODELS[name]()
    tokens = np.random.default_rng(1).integers(0, VOCAB, (BATCH, TOKENS))
    with torch.no_grad():
        logits = theirs(torch.tensor(tokens)).logits.numpy()
    return SimpleNamespace(
        logits=logits, model=ours, tokens=jnp.asarray(tokens, jnp.int32), tolerance=tolerance
    )


@pytest.mark.parametrize("name", MODELS)
def test_logits_without_a_cache(x64, name):
    case = pair(name)
    assert relative_l2(case.model(case.tokens, "float64"), case.logits) < case.tolerance


@pytest.mark.parametrize(
    ("name", "basis"), [(name, basis) for name, bases in SCHEMES.items() for basis in bases]
)
def test_logits_through_a_cache(x64, name, basis):
    """Prefill of 4, a chunk of 4, then token by token."""
    case = pair(name)
    layers, figures = convert_model(case.model, f"{basis}:float64", "float64")
    caches = init_caches(layers, BATCH, TOKENS + 3)
    logits = []
    for first, last in [(0, 4), (4, 8), *((t, t + 1) for t in range(8, TOKENS))]:
        step, caches = case.model.with_cache(case.tokens[:, first:last], layers, caches, fresh=first == 0)
        logits.append(step)
    condition = max(layer.condition_number or 1.0 for layer in figures)
    assert relative_l2(np.concatenate(logits, axis=1), case.logits) < max(case.tolerance, 1e-14 * condition)
