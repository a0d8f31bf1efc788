"""Llama, Mistral and Qwen2 against transformers: logits of random tiny models read from their own files."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from parity.need import need
from slimjax.models.decoder import convert_model, init_caches
from slimjax.models.load import load_decoder

torch = need("torch")
transformers = need("transformers")

COMMON = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-3,  # large, so that a wrong one shows
    "rope_parameters": {"rope_type": "default", "rope_theta": 300.0},
}
KINDS = {
    "llama": ("Llama", {"num_key_value_heads": 4}),
    "llama-gqa": ("Llama", {"num_key_value_heads": 2, "head_dim": 6, "tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 4}),
    "mistral-whole": ("Mistral", {"num_key_value_heads": 4, "sliding_window": None}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "qwen2-window": (
        "Qwen2",
        {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0},
    ),
}


def random_theirs(kind):
    name, special = KINDS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**COMMON | special)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():  # what starts at zero or one should matter too
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_logits(tmp_path, kind):
    theirs = random_theirs(kind)
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = load_decoder(tmp_path)
    tokens = np.random.default_rng(1).integers(0, 50, (2, 13))
    with torch.no_grad():
        wanted = theirs(torch.tensor(tokens)).logits.numpy()
    ours = nnx.jit(lambda model, said: model(said))(loaded.model, jnp.asarray(tokens, jnp.int32))
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("kind", ["llama", "mistral-whole", "qwen2"])
def test_logits_from_keys_alone(tmp_path, kind):
    """MHA: values rebuilt from keys, which are cached before they are rotated."""
    theirs = random_theirs(kind)
    theirs.save_pretrained(tmp_path)
    model = load_decoder(tmp_path).model
    tokens = np.random.default_rng(1).integers(0, 50, (2, 13))
    with torch.no_grad():
        wanted = theirs(torch.tensor(tokens)).logits.numpy()
    layers, figures = convert_model(model, "k:float32")
    said = jnp.asarray(tokens, jnp.int32)
    ours, _ = model.with_cache(said, layers, init_caches(layers, 2, 13))
    condition = max(each.condition_number for each in figures)
    assert condition < 1e3
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-6 * condition * np.abs(wanted).max())
