"""The encoder-decoder and its caches: cached is uncached, shared is shared, bytes are counted; transcription."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_whisper as tiny
from flax import nnx

from slimjax.models.load import load_whisper
from slimjax.models.whisper import WhisperConfig
from slimjax.models.whisper_caches import begin, sharing
from slimjax.models.whisper_convert import convert_whisper
from slimjax.numerics import relative_l2
from slimjax.scheme import parse_scheme
from slimjax.text import word_errors, words
from slimjax.transcribe import greedy, listen, prepare, spectrogram

B, T, F = 2, 5, 2 * tiny.CONFIG.audio_positions


@pytest.fixture(scope="module")
def model():
    return tiny.random_model()


@pytest.fixture
def mel():
    return jnp.asarray(np.random.default_rng(1).standard_normal((B, F, tiny.CONFIG.mels)), jnp.float32)


@pytest.fixture
def tokens():
    return jnp.asarray(np.random.default_rng(2).integers(0, tiny.CONFIG.vocab, (B, T)), jnp.int32)


# Compiled whole: run one operation at a time, most of the time goes into compiling each of them.
@nnx.jit(static_argnames="dtype")
def encode(model, mel, dtype="float32"):
    return model.encode(mel, dtype)


@nnx.jit(static_argnames="dtype")
def decode(model, tokens, memory, dtype="float32"):
    return model.decode(tokens, memory, dtype)


@nnx.jit(static_argnames="prompt")
def through_caches(model, layers, memory, tokens, prompt=3):
    """Logits of a prefilled prompt and of the tokens behind it, one at a time."""
    caches = begin(layers, memory, capacity=T + 2)
    logits, caches = model.with_cache(tokens[:, :prompt], layers, caches, fresh=True)
    found = [logits]
    for t in range(prompt, T):
        logits, caches = model.with_cache(tokens[:, t : t + 1], layers, caches)
        found.append(logits)
    return jnp.concatenate(found, axis=1), caches


FLOAT64 = (
    ("kv:float64", "kv:float64"),
    ("k:float64", "k:float64"),
    ("k1:float64", "v:float64"),
    ("x:float64", "x:float64"),
    ("e:float64", "k:float64"),
    ("h:float64", "kv:float64"),
    ("k:float64+2", "k:float64+2"),
    (("e:float64", "kv:float64"), ("k:float64", "v:float64")),
)


@pytest.mark.parametrize(("cross", "own"), FLOAT64)
def test_cached_is_uncached(x64, model, mel, tokens, cross, own):
    memory = encode(model, mel, dtype="float64")
    wanted = decode(model, tokens, memory, dtype="float64")
    layers, _ = convert_whisper(model, cross, own, "float64")
    found, caches = through_caches(model, layers, memory, tokens)
    assert found.dtype == jnp.float64
    assert relative_l2(found, wanted) < 1e-9
    assert caches.self_caches[0].length.tolist() == [T, T]


def test_prompts_of_several_lengths(x64, model, mel, tokens):
    memory = encode(model, mel, dtype="float64")
    layers, _ = convert_whisper(model, "e:float64", "k:float64", "float64")

    @nnx.jit
    def run(model, memory, tokens, count):
        caches = begin(layers, memory, capacity=8)
        first, caches = model.with_cache(tokens[:, :3], layers, caches, count=count, fresh=True)
        second, caches = model.with_cache(tokens[:, 3:4], layers, caches)
        return first, second, caches

    first, second, caches = run(model, memory, tokens, jnp.asarray([3, 1], jnp.int32))
    alone = jnp.concatenate([tokens[1:, :1], tokens[1:, 3:4]], axis=1)
    wanted = decode(model, alone, memory[1:], dtype="float64")
    assert relative_l2(jnp.stack([first[1, 0], second[1, 0]]), wanted[0]) < 1e-9
    assert caches.self_caches[1].length.tolist() == [4, 2]


def test_the_decoder_is_causal_and_hears_all_of_the_sound(model, mel, tokens):
    """A changed token changes nothing before it; a changed frame, the last one too, the first logits."""
    memory = encode(model, mel)
    later = tokens.at[:, 2:].set(5)
    before, after = (decode(model, each, memory) for each in (tokens, later))
    np.testing.assert_array_equal(before[:, :2], after[:, :2])
    assert float(jnp.abs(before[:, 2:] - after[:, 2:]).min(axis=(0, 2)).max()) > 0
    for frame in (0, F - 1):
        other = decode(model, tokens, encode(model, mel.at[:, frame].add(1.0)))
        assert float(jnp.abs(other[:, 0] - before[:, 0]).max()) > 0


def test_one_cache_for_all_layers_and_its_bytes(model, mel):
    memory, width, slots = encode(model, mel), tiny.CONFIG.width, tiny.CONFIG.audio_positions
    caches = {}
    for cross, own in (("kv:bf16", "kv:bf16"), ("e:bf16", "k:bf16"), ("h:float32", "kv:float32")):
        layers, _ = convert_whisper(model, cross, own)
        caches[cross] = begin(layers, memory, capacity=10)
    one = B * slots * width
    assert caches["kv:bf16"].cross_bytes == 2 * one * 2 * 2  # two layers, keys and values, two bytes
    assert caches["kv:bf16"].self_bytes == 2 * B * 10 * width * 2 * 2
    assert caches["e:bf16"].cross_bytes == one * 2
    assert caches["e:bf16"].self_bytes == 2 * B * 10 * width * 2
    assert caches["h:float32"].cross_bytes == one * 4
    assert len(caches["e:bf16"].cross_caches) == 1
    assert caches["e:bf16"].cross(0) is caches["e:bf16"].cross(1)
    (stored,) = caches["e:bf16"].cross(0).streams.values()
    np.testing.assert_array_equal(
        np.asarray(stored.codes())[:, :, 0], np.asarray(memory.astype(jnp.bfloat16))
    )


def test_which_layers_share():
    schemes = tuple(map(parse_scheme, ("e:bf16", "k:bf16", "e:bf16", "e:int8", "k:bf16", "h:bf16")))
    assert sharing(schemes) == (0, 1, 0, 2, 3, 4)


def test_attention_inputs_of_every_layer(x64, model, mel, tokens):
    """One per layer; the first self-attention is given the normalised embeddings."""
    memory = encode(model, mel, dtype="float64")
    inputs = nnx.jit(lambda m, t, e: m.attention_inputs(t, e, "float64"))(model, tokens, memory)
    assert len(inputs.self_inputs) == len(inputs.cross_inputs) == tiny.CONFIG.decoder_layers
    np.testing.assert_array_equal(inputs.memory, memory)
    start = model.embedding[...][tokens] + model.text_positions[...][None, :T]
    first = model.decoder[0].self_norm(start.astype(jnp.float64))
    np.testing.assert_allclose(inputs.self_inputs[0], first, rtol=1e-12)
    assert inputs.cross_inputs[1].shape == (B, T, tiny.CONFIG.width)


def test_refusals(model, mel, tokens):
    with pytest.raises(ValueError, match=r"expected \[B, frames, 8\] with an even number of frames up to 40"):
        model.encode(jnp.zeros((1, 42, 8)))
    with pytest.raises(ValueError, match="a spectrogram of shape"):
        model.encode(mel[:, :, :7])
    with pytest.raises(ValueError, match=r"25 tokens are more than self.config.text_positions=24"):
        model.decode(jnp.zeros((1, 25), jnp.int32), jnp.zeros((1, 20, 16)))
    with pytest.raises(ValueError, match="3 cross schemes for 2 decoder layers"):
        convert_whisper(model, ["kv:bf16"] * 3, "kv:bf16")
    with pytest.raises(ValueError, match=r"solutions for \['decoder.9.self'\]"):
        convert_whisper(model, "kv:bf16", "kv:bf16", solutions={"decoder.9.self": None})
    with pytest.raises(NotImplementedError, match=r"decoder\.0\.self: scheme e:bf16: .*use x"):
        convert_whisper(model, "kv:bf16", "e:bf16")
    with pytest.raises(ValueError, match="heads"):
        WhisperConfig(width=16, heads=3, encoder_layers=1, decoder_layers=1, mlp_width=4, vocab=4)
    with pytest.raises(ValueError, match="expected a whole number"):
        dataclasses.replace(tiny.CONFIG, mels=0)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whisper")
    tiny.write_ctranslate2(folder, tiny.random_model(seed=10))  # one that does not repeat itself
    return load_whisper(folder)


@pytest.fixture(scope="module")
def transcriber(loaded):
    return prepare(loaded, convert_whisper(loaded.model, "kv:float32", "kv:float32")[0], max_tokens=9)


def sound(length):
    return np.random.default_rng(3).standard_normal(length).astype(np.float32)


def test_transcription_is_greedy_and_goes_by_chunks(loaded, transcriber):
    tokens, model = loaded.tokens, loaded.model
    said = transcriber(sound(tiny.SAMPLES))
    written = list(tokens.prompt())
    heard = encode(model, spectrogram(sound(tiny.SAMPLES), model))
    for _ in range(9):
        padded = jnp.asarray([written + [0] * (12 - len(written))], jnp.int32)
        logits = decode(model, padded, heard)[0, len(written) - 1, : tokens.start]
        if (new := int(jnp.argmax(logits))) == tokens.end:
            break
        written.append(new)
    assert list(said.tokens) == written[2:]
    assert said.text == tokens.text(written)
    twice = transcriber(np.concatenate([sound(tiny.SAMPLES), sound(tiny.SAMPLES)[:500]]))
    assert twice.tokens[: len(said.tokens)] == said.tokens
    assert twice.text.startswith(said.text)
    assert (twice.self_bytes, twice.cross_bytes) == (said.self_bytes, said.cross_bytes)
    assert said.self_bytes == 2 * 2 * tiny.CONFIG.text_positions * tiny.CONFIG.width * 4
    assert said.tokens_per_second > 0
    with pytest.raises(ValueError, match="without samples"):
        transcriber(sound(0))


def test_listening_gives_what_every_layer_is_given(loaded, transcriber):
    (heard, _) = listen(transcriber, [sound(tiny.SAMPLES), sound(700)])
    said = transcriber(sound(tiny.SAMPLES))
    assert heard.tokens[0].tolist() == [*loaded.tokens.prompt(), *said.tokens, loaded.tokens.end]
    memory = encode(loaded.model, spectrogram(sound(tiny.SAMPLES), loaded.model))
    exact = loaded.model.attention_inputs(jnp.asarray(heard.tokens), memory)
    for name in ("self_inputs", "cross_inputs"):
        for mine, wanted in zip(getattr(heard.inputs, name), getattr(exact, name), strict=True):
            np.testing.assert_allclose(mine, wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(heard.inputs.memory, memory, rtol=1e-4, atol=1e-5)


def test_greedy_ends_every_sequence_by_itself(model, mel):
    """Two sequences at once say what each says twice over, padded with the end."""
    graph, params = nnx.split(model)
    layers, _ = convert_whisper(model, "kv:float32", "kv:float32")
    memory = encode(model, 3 * mel)

    def run(part, end):
        caches = begin(layers, part, capacity=12)
        return greedy(graph, params, layers, caches, prompt, end=end, start=64, steps=6)

    for token in range(tiny.CONFIG.vocab):  # one that the two sequences answer differently
        prompt = jnp.full((B, 1), token, jnp.int32)
        logits = decode(model, jnp.full((B, T), token, jnp.int32), memory)[:, 0]
        said = np.asarray(logits).argmax(axis=-1).tolist()
        if said[0] != said[1]:
            break
    end = said[0]  # so the first sequence is over at once
    together, used = run(memory, end)
    each = [run(jnp.repeat(memory[i : i + 1], B, axis=0), end) for i in range(B)]
    assert said[1] != end
    assert int(each[0][1]) == 0
    assert int(used) == int(each[1][1]) > 0
    assert set(np.asarray(together[0]).tolist()) == {end}
    for row, (alone, _) in zip(together, each, strict=True):
        np.testing.assert_array_equal(row, alone[0])


def test_mistakes_of_preparing(loaded):
    layers, _ = convert_whisper(loaded.model, "kv:float32", "kv:float32")
    with pytest.raises(ValueError, match="knows English"):
        prepare(loaded, layers, language="de")
    with pytest.raises(ValueError, match="expected 1 to 22 new tokens"):
        prepare(loaded, layers, max_tokens=23)


def test_words_and_their_errors():
    assert words("And Mr. Smith's ill-disposed, he said: 3 times!") == [
        "and", "mister", "smith's", "ill", "disposed", "he", "said", "times",
    ]  # fmt: skip
    assert word_errors("the cat sat", "The cat sat.") == 0
    assert word_errors("the bat sat down", "the cat sat") == 2
    assert word_errors("", "three words here") == 3
    assert word_errors("three words here", "") == 3
    assert word_errors("a b c d", "b c d e") == 2
