"""Speech to text: a Whisper model, the caches of its decoder, greedy decoding without timestamps.

Three compiled programs, so that each phase can be timed by itself: the encoder, the cross phase (filling the
cross caches from the encoder's output), and decoding (the prompt, then a ``while_loop`` over new tokens).
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from slimjax.attention.cross import Memory
from slimjax.audio import HOP, RATE, chunks, log_mel
from slimjax.axes import Tokens
from slimjax.generate import bucket
from slimjax.models.load import LoadedWhisper
from slimjax.models.whisper import AttentionInputs, Mel, WhisperModel
from slimjax.models.whisper_caches import WhisperCaches, WhisperLayers, begin


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transcript:
    """What was heard, and what it took; times in seconds, compilation left out.

    Attributes:
        text: of all 30 s chunks.
        tokens: generated, prompts and ends left out.
        generated: how many tokens were generated, ends included.
        sound_seconds: how long the recording is.
        encode_seconds, cross_seconds, decode_seconds: spectrogram and encoder; filling the cross caches;
            prompt and new tokens.
        self_bytes, cross_bytes: of the caches of one chunk, at full capacity, measured from their leaves.
    """

    text: str
    tokens: tuple[int, ...]
    generated: int
    sound_seconds: float
    encode_seconds: float
    cross_seconds: float
    decode_seconds: float
    self_bytes: int
    cross_bytes: int

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second of decoding."""
        return self.generated / self.decode_seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transcriber:
    """The compiled programs of one model with one choice of caches. Call it with mono samples at 16 kHz."""

    loaded: LoadedWhisper
    layers: WhisperLayers
    prompt: tuple[int, ...]
    encode: Callable[[Mel], Memory]
    cross: Callable[[Memory], WhisperCaches]
    decode: Callable[[WhisperCaches], tuple[Int[Array, "B T"], Int[Array, ""]]]

    def __call__(self, samples: Float[np.ndarray, "samples"]) -> Transcript:
        """Transcribe a recording, in chunks of 30 s. Raises ValueError where it is empty."""
        if not len(samples):
            raise ValueError("a recording without samples cannot be transcribed")
        tokens = self.loaded.tokens
        spent, texts, found, generated, caches = np.zeros(3), [], [], 0, None
        for chunk in chunks(samples, _chunk_length(self.loaded.model)):
            mel, seconds = _timed(lambda chunk=chunk: self.encode(spectrogram(chunk, self.loaded.model)))
            caches, cross = _timed(lambda memory=mel: self.cross(memory))
            (buffer, count), decode = _timed(lambda caches=caches: self.decode(caches))
            spent += seconds, cross, decode
            new = np.asarray(buffer)[0, : int(count)].tolist()
            texts.append(tokens.text(new).strip())
            found += new
            generated += min(len(new) + 1, buffer.shape[1])
        assert caches is not None  # there is a chunk where there are samples
        return Transcript(
            text=" ".join(text for text in texts if text),
            tokens=tuple(found),
            generated=generated,
            sound_seconds=len(samples) / RATE,
            encode_seconds=float(spent[0]),
            cross_seconds=float(spent[1]),
            decode_seconds=float(spent[2]),
            self_bytes=caches.self_bytes,
            cross_bytes=caches.cross_bytes,
        )


def spectrogram(chunk: Float[np.ndarray, "samples"], model: WhisperModel) -> Mel:
    """The encoder's input [1, F, M] for one chunk."""
    return jnp.asarray(log_mel(chunk, model.config.mels, _chunk_length(model))[None])


def prepare(
    loaded: LoadedWhisper, layers: WhisperLayers, *, language: str = "en", max_tokens: int | None = None
) -> Transcriber:
    """Compile what transcribing takes, so that no later time contains it.

    Args:
        loaded: the model.
        layers: its layers converted to cache schemes (``convert_whisper``).
        language: of the speech; English-only models know "en".
        max_tokens: new tokens per chunk at most; None: half of the decoder's positions.

    Raises:
        ValueError: an unknown language, or more tokens than positions.
    """
    config, tokens = loaded.model.config, loaded.tokens
    prompt = tokens.prompt(language)
    steps = config.text_positions // 2 if max_tokens is None else max_tokens
    if not 1 <= steps <= config.text_positions - len(prompt):
        raise ValueError(f"{steps=}: expected 1 to {config.text_positions - len(prompt)} new tokens")
    graph, params = nnx.split(loaded.model)
    mel = jax.ShapeDtypeStruct((1, 2 * config.audio_positions, config.mels), jnp.float32)
    encode = _encode.lower(graph, params, mel).compile()
    memory = jax.eval_shape(functools.partial(_encode, graph), params, mel)
    cross = _begin.lower(layers, memory, capacity=config.text_positions).compile()
    caches = jax.eval_shape(functools.partial(begin, capacity=config.text_positions), layers, memory)
    asked = jnp.asarray([prompt], jnp.int32)
    static = {"end": tokens.end, "start": tokens.start, "steps": steps}
    decode = greedy.lower(graph, params, layers, caches, asked, **static).compile()
    return Transcriber(
        loaded=loaded,
        layers=layers,
        prompt=prompt,
        encode=lambda mel: encode(params, mel),
        cross=lambda memory: cross(layers, memory),
        decode=lambda caches: decode(params, layers, caches, asked),
    )


@functools.partial(jax.jit, static_argnames="graph")
def _encode(graph: nnx.GraphDef, params: nnx.State, mel: Mel) -> Memory:
    return nnx.merge(graph, params).encode(mel)


@functools.partial(jax.jit, static_argnames="capacity")
def _begin(layers: WhisperLayers, memory: Memory, *, capacity: int) -> WhisperCaches:
    return begin(layers, memory, capacity=capacity)


@functools.partial(jax.jit, static_argnames="graph")
def _inputs(graph: nnx.GraphDef, params: nnx.State, tokens: Tokens, memory: Memory) -> AttentionInputs:
    return nnx.merge(graph, params).attention_inputs(tokens, memory)


@functools.partial(jax.jit, static_argnames=("graph", "end", "start", "steps"))
def greedy(
    graph: nnx.GraphDef,
    params: nnx.State,
    layers: WhisperLayers,
    caches: WhisperCaches,
    prompt: Int[Array, "B P"],
    *,
    end: int,
    start: int,
    steps: int,
) -> tuple[Int[Array, "B T"], Int[Array, ""]]:
    """The most likely token again and again, until every sequence has ended or ``steps`` are made.

    Args:
        graph, params: ``nnx.split`` of a ``WhisperModel``.
        layers, caches: the caches as the cross phase left them, self caches empty.
        prompt: what the transcript begins with; it is read with exact self-attention (prefill).
        end: the token that ends a text.
        start: this token and all after it are never generated.
        steps: T.

    Returns:
        [B, T] new tokens, ``end`` behind each end, and how many places of them were used.
    """
    model = nnx.merge(graph, params)

    def likeliest(logits: Float[Array, "B V"]) -> Int[Array, "B"]:
        return jnp.argmax(logits[:, :start], axis=-1).astype(jnp.int32)

    def unfinished(carry: tuple[Array, Array, Array, WhisperCaches]) -> Array:
        step, last, _, _ = carry
        return (step < steps) & jnp.any(last != end)

    def advance(carry: tuple[Array, Array, Array, WhisperCaches]) -> tuple[Any, ...]:
        step, last, tokens, held = carry
        tokens = jax.lax.dynamic_update_slice(tokens, last[:, None], (jnp.zeros_like(step), step))
        logits, held = model.with_cache(last[:, None], layers, held)
        new = likeliest(logits[:, -1])
        return step + 1, jnp.where(last == end, last, new), tokens, held

    logits, held = model.with_cache(prompt, layers, caches, fresh=True)
    tokens = jnp.full((len(prompt), steps), end, jnp.int32)
    first = (jnp.zeros((), jnp.int32), likeliest(logits[:, -1]), tokens, held)
    used, _, tokens, _ = jax.lax.while_loop(unfinished, advance, first)
    return tokens, used


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heard:
    """One chunk as the uncompressed model hears it: the material of calibration and of error measurement.

    Attributes:
        tokens: [1, T], the prompt, what was generated, and the end.
        inputs: of every attention layer of the decoder while it reads ``tokens``, float32 on the host.
    """

    tokens: Int[np.ndarray, "1 T"]
    inputs: AttentionInputs


def listen(transcriber: Transcriber, recordings: Iterable[Float[np.ndarray, "samples"]]) -> tuple[Heard, ...]:
    """Transcribe recordings (with whatever caches the transcriber has) and gather the exact attention inputs.

    Args:
        transcriber: best prepared with "kv:float32", so that its text is the uncompressed model's.
        recordings: mono samples at 16 kHz.
    """
    model, end = transcriber.loaded.model, transcriber.loaded.tokens.end
    graph, params = nnx.split(model)
    heard = []
    for chunk in (chunk for samples in recordings for chunk in chunks(samples, _chunk_length(model))):
        memory = transcriber.encode(spectrogram(chunk, model))
        buffer, count = transcriber.decode(transcriber.cross(memory))
        said = np.asarray(buffer)[0, : int(count)].tolist()
        read = [*transcriber.prompt, *said, end][: model.config.text_positions]
        # Padded to a bucket behind the last token, where causality keeps it from mattering.
        width = min(bucket(len(read)), model.config.text_positions)
        padded = jnp.asarray([read + [end] * (width - len(read))], jnp.int32)
        inputs = _inputs(graph, params, padded, memory)
        cut = {
            name: tuple(np.asarray(x)[:, : len(read)] for x in getattr(inputs, name))
            for name in ("self_inputs", "cross_inputs")
        }
        exact = AttentionInputs(memory=np.asarray(memory), **cut)  # pyright: ignore[reportArgumentType]
        heard.append(Heard(tokens=np.asarray([read], np.int32), inputs=exact))
    return tuple(heard)


def _chunk_length(model: WhisperModel) -> int:
    """Samples that the encoder takes at once: two frames a position."""
    return 2 * model.config.audio_positions * HOP


def _timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """What a function returns, once it is there, and the seconds that took."""
    began = time.perf_counter()
    out = jax.block_until_ready(function())
    return out, time.perf_counter() - began
