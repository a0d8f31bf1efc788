"""The benches' PyTorch peer computes what slimjax computes: else the ratio of their times means nothing."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from parity.need import need
from slimjax.config import ModelConfig, TrainConfig
from slimjax.generate import generate
from slimjax.models.decoder import DecoderLM, convert_model
from slimjax.numerics import relative_l2
from slimjax.optimizer import numbers, schedule
from slimjax.train import initial_state, train_step

torch = need("torch")

SIZE = {"layers": 2, "width": 32, "heads": 4, "vocab": 50}
MODELS = {
    "llama": ModelConfig(**SIZE),
    "gqa": ModelConfig(**SIZE, kv_heads=2, tied=False),
    "gelu": ModelConfig(**SIZE, mlp="gelu", norm="layernorm", bias=True, position="none"),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_generated_text(name):
    from experiments.torch_peer import Peer

    config = MODELS[name]
    model = DecoderLM(config, rngs=nnx.Rngs(0))
    prompts = np.random.default_rng(0).integers(0, 50, (2, 9)).astype(np.int32)
    peer = Peer(config, nnx.state(model, nnx.Param), train=False)
    logits = peer.forward(torch.from_numpy(prompts).long(), peer.angles(9)).detach().numpy()
    assert relative_l2(model(jnp.asarray(prompts)), logits) < 1e-5
    layers, _ = convert_model(model, "kv:float32")
    ours = generate(model, prompts, layers=layers, max_new_tokens=12)
    np.testing.assert_array_equal(ours, peer.generate(prompts, 12))


@pytest.mark.parametrize("name", ["llama", "gelu"])
def test_training_takes_the_same_steps(name):
    from experiments.torch_peer import Peer

    config, training = MODELS[name], TrainConfig(steps=20, warmup=2, batch=2, length=8, learning_rate=1e-2)
    batches = np.random.default_rng(0).integers(0, 50, (6, 2, 9)).astype(np.int32)
    state, step = initial_state(config, training), train_step(config, training)
    given = numbers(training)
    theirs = Peer(config, state.params, train=True).training_step(training, schedule(training))
    for batch in batches:
        state, loss = step(state, jnp.asarray(batch), given)
        assert theirs(batch) == pytest.approx(float(loss), rel=2e-5)


def test_what_the_peer_does_not_cover():
    from experiments.torch_peer import Peer

    config = ModelConfig(**SIZE, position="alibi")
    params = nnx.state(DecoderLM(config, rngs=nnx.Rngs(0)), nnx.Param)
    with pytest.raises(NotImplementedError, match="alibi"):
        Peer(config, params, train=True)
