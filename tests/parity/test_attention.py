"""Attention and position schemes, slimjax's and the oracle's, against torch and transformers."""

import jax.numpy as jnp
import numpy as np
import pytest

import oracle
from parity.need import need
from slimjax.attention.layer import attend_full
from slimjax.attention.positions import Position, alibi_slopes, bias, rotate, t5_bucket
from slimjax.attention.projections import Projections
from slimjax.attention.reference import attend, geometry
from slimjax.kernels.spec import DecodeSpec
from slimjax.scheme import parse_scheme

torch = need("torch")
need("transformers")

from transformers.models.bloom.modeling_bloom import build_alibi_tensor  # noqa: E402
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as rotate_interleaved  # noqa: E402
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as rotate_halves  # noqa: E402
from transformers.models.t5.configuration_t5 import T5Config  # noqa: E402
from transformers.models.t5.modeling_t5 import T5Attention  # noqa: E402

B, T, N, H = 2, 7, 4, 8


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_scaled_dot_product_attention(rng, x64, kv_heads, causal):
    q = rng.standard_normal((B, T, N, H))
    k, v = rng.standard_normal((2, B, T, kv_heads, H))
    heads_first = [torch.tensor(array).transpose(1, 2) for array in (q, k, v)]
    theirs = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=causal, enable_gqa=True)
    theirs = theirs.transpose(1, 2).numpy()
    np.testing.assert_allclose(oracle.attend(q, k, v, causal=causal), theirs, rtol=1e-10, atol=1e-12)

    spec = DecodeSpec(
        scheme=parse_scheme("kv:float64"), heads=N, kv_heads=kv_heads, head_dim=H, width=N * H,
        dtype="float64", causal=causal,
    )  # fmt: skip
    at = jnp.arange(T, dtype=jnp.int32)
    where = geometry(jnp.broadcast_to(at, (B, T)), at, jnp.full((B,), T, jnp.int32), None, spec)
    ours = attend(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), where, spec)
    np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope(rng, x64, interleaved):
    x = rng.standard_normal((B, T, N, H))
    angle = np.arange(T)[:, None] * 10_000.0 ** (-np.arange(0, H, 2) / H)
    if interleaved:  # GPT-J: [B,T,N,H], sin and cos repeated inside
        sin, cos = torch.tensor(np.sin(angle))[None], torch.tensor(np.cos(angle))[None]
        theirs = rotate_interleaved(torch.tensor(x), sin, cos).numpy()
    else:  # Llama: [B,N,T,H], both halves given
        both = torch.tensor(np.concatenate([angle, angle], axis=-1))[None]
        q = torch.tensor(x).transpose(1, 2)
        theirs = rotate_halves(q, q, both.cos(), both.sin())[0].transpose(1, 2).numpy()
    np.testing.assert_allclose(oracle.rotate(x, range(T), interleaved=interleaved), theirs, atol=1e-12)
    at = jnp.arange(T, dtype=jnp.int32)[None]
    ours = rotate(jnp.asarray(x), at, Position(kind="rope", interleaved=interleaved))
    np.testing.assert_allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 16, 20])
def test_alibi_slopes(heads):
    ones = torch.ones((1, 2), dtype=torch.int64)
    theirs = build_alibi_tensor(ones, heads, torch.float32)[:, 0, 1].numpy()  # the second key: 1 * slope
    np.testing.assert_allclose(oracle.alibi_slopes(heads), theirs, rtol=1e-6)
    np.testing.assert_allclose(alibi_slopes(heads), theirs, rtol=1e-6)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (16, 64), (32, 100)])
def test_t5_buckets(bidirectional, buckets, max_distance):
    distance = np.arange(-300, 301)
    theirs = T5Attention._relative_position_bucket(
        torch.tensor(distance), bidirectional=bidirectional, num_buckets=buckets, max_distance=max_distance
    )
    by_definition = [oracle.t5_bucket(int(d), bidirectional, buckets, max_distance) for d in distance]
    np.testing.assert_array_equal(by_definition, theirs.numpy())
    position = Position(kind="t5", buckets=buckets, max_distance=max_distance, bidirectional=bidirectional)
    ours = t5_bucket(jnp.asarray(distance, jnp.int32), position)
    np.testing.assert_array_equal(ours, theirs.numpy())


@pytest.mark.parametrize("is_decoder", [True, False])
def test_t5_bias(is_decoder):
    torch.manual_seed(0)
    config = T5Config(d_model=16, d_kv=4, num_heads=N, is_decoder=is_decoder)
    layer = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    theirs = layer.compute_bias(T, 40).detach().numpy()[0]
    table = layer.relative_attention_bias.weight.detach().numpy()
    by_definition = oracle.additive_bias(oracle.t5(table, not is_decoder), N, range(T), range(40))
    np.testing.assert_array_equal(by_definition, theirs)
    ours = bias(
        Position(kind="t5", bidirectional=not is_decoder), {"table": jnp.asarray(table)},
        jnp.arange(T, dtype=jnp.int32)[None], jnp.arange(40, dtype=jnp.int32), N, jnp.float32,
    )  # fmt: skip
    np.testing.assert_array_equal(ours[0], theirs)


def test_t5_attention_layer(rng, x64):
    """A whole T5 encoder layer: no scale, relative bias, no biases on projections."""
    torch.manual_seed(0)
    config = T5Config(d_model=N * H, d_kv=H, num_heads=N)
    layer = T5Attention(config, has_relative_attention_bias=True, layer_idx=0).double().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    x = rng.standard_normal((B, T, N * H))
    theirs = layer(torch.tensor(x))[0].detach().numpy()
    weight = {name: jnp.asarray(getattr(layer, name).weight.detach().numpy().T) for name in "qkvo"}
    projections = Projections(
        **{f"w{name}": weight[name].reshape(N * H, N, H) for name in "qkv"},
        wo=weight["o"].reshape(N, H, N * H),
        position={"table": jnp.asarray(layer.relative_attention_bias.weight.detach().numpy())},
    )
    spec = DecodeSpec(
        scheme=parse_scheme("kv:float64"), heads=N, kv_heads=N, head_dim=H, width=N * H, causal=False, scale=1.0,
        position=Position(kind="t5", bidirectional=True), dtype="float64",
    )  # fmt: skip
    np.testing.assert_allclose(attend_full(jnp.asarray(x), projections, spec), theirs, rtol=1e-9, atol=1e-10)
