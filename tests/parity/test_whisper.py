"""Whisper against transformers: the spectrogram, and the logits of a random tiny model read from its own files."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_whisper as tiny
from flax import nnx

from parity.need import need
from slimjax import audio
from slimjax.models.load import load_whisper

torch = need("torch")
need("transformers")

from transformers import WhisperFeatureExtractor  # noqa: E402
from transformers.models.whisper.configuration_whisper import WhisperConfig  # noqa: E402
from transformers.models.whisper.modeling_whisper import WhisperForConditionalGeneration  # noqa: E402


@pytest.mark.parametrize("bands", [80, 128])
def test_spectrogram(bands):
    theirs = WhisperFeatureExtractor(feature_size=bands)
    np.testing.assert_allclose(audio.mel_filters(bands), theirs.mel_filters, rtol=0, atol=1e-12)
    sound = np.random.default_rng(0).standard_normal(40_000).astype(np.float32) * 0.1
    wanted = theirs(sound, sampling_rate=16_000, return_tensors="np")["input_features"][0].T
    np.testing.assert_allclose(audio.log_mel(sound, bands), wanted, rtol=0, atol=1e-4)


def random_theirs(dtype):
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=tiny.CONFIG.vocab,
        num_mel_bins=8,
        encoder_layers=2,
        encoder_attention_heads=4,
        decoder_layers=2,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        d_model=32,
        max_source_positions=20,
        max_target_positions=24,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=0,
    )
    model = WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():  # what starts at zero or one should matter too
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_logits(tmp_path, dtype):
    theirs = random_theirs(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path)
    tiny.write_tokenizer(tmp_path)
    theirs = theirs.float()
    ours = load_whisper(tmp_path).model
    rng = np.random.default_rng(1)
    mel = rng.standard_normal((2, 40, 8)).astype(np.float32)
    tokens = rng.integers(0, tiny.CONFIG.vocab, (2, 9))
    with torch.no_grad():
        features = torch.tensor(mel.transpose(0, 2, 1).copy())
        out = theirs(input_features=features, decoder_input_ids=torch.tensor(tokens))
    memory = nnx.jit(lambda model, mel: model.encode(mel))(ours, jnp.asarray(mel))
    np.testing.assert_allclose(memory, out.encoder_last_hidden_state.numpy(), rtol=1e-4, atol=1e-4)
    said = jnp.asarray(tokens, jnp.int32)
    logits = nnx.jit(lambda model, said, memory: model.decode(said, memory))(ours, said, memory)
    np.testing.assert_allclose(logits, out.logits.numpy(), rtol=1e-4, atol=2e-4)
