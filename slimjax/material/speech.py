"""Speech for a Whisper: clips, the exact model's own transcripts of them, and what attention was given."""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from slimjax.attention.cross import Memory
from slimjax.audio import RATE, read_sound
from slimjax.axes import Tokens
from slimjax.material import Batch, Scores, files_of
from slimjax.models.load import LoadedWhisper
from slimjax.models.load.whisper import read_whisper
from slimjax.models.opened import OpenedModel
from slimjax.models.whisper_caches import WhisperLayers, begin
from slimjax.models.whisper_convert import convert_whisper, layer_names
from slimjax.numerics import logit_kl, top1_agreement
from slimjax.scheme import Scheme
from slimjax.solve.augment import Solution
from slimjax.transcribe import Heard, listen, prepare

Logits = Float[Array, "B T V"]


class Speech:
    """Clips heard by the uncompressed model."""

    def __init__(self, model: OpenedModel, data: Sequence[str]):
        assert model.whisper is not None
        self.files = files_of(data, ".wav")
        # Every file is read before the model is: a mistake in the last should cost no work.
        self.sounds = [read_sound(file) for file in self.files]
        self.loaded = read_whisper(model.whisper)
        exact = convert_whisper(self.loaded.model, "kv:float32", "kv:float32")[0]
        self.transcriber = prepare(self.loaded, exact)
        self.heard = listen(self.transcriber, self.sounds)
        seconds = sum(map(len, self.sounds)) / RATE
        self.described = f"{len(self.files)} recordings, {seconds:.1f} s, in {len(self.heard)} chunks"

    @property
    def batches(self) -> list[Batch]:
        """A chunk each: of a self-attention its tokens' inputs, of every cross-attention the encoder's output."""
        return [inputs_of(heard) for heard in self.heard]

    def score(self, schemes: Mapping[str, Scheme], solutions: Mapping[str, Solution]) -> Scores:
        layers = planned_layers(self.loaded, schemes, solutions)
        graph, params = nnx.split(self.loaded.model)
        divergence, same, count = 0.0, 0.0, 0
        skipped = len(self.transcriber.prompt) - 1  # nothing before the prompt's last token predicts text
        for heard in self.heard:
            memory, tokens = jnp.asarray(heard.inputs.memory), jnp.asarray(heard.tokens)
            exact = _exact(graph, params, tokens, memory)[:, skipped:-1]
            ours = _cached(graph, params, layers, tokens, memory)[:, skipped:-1]
            size = exact.shape[1]
            divergence += float(jnp.sum(logit_kl(ours, exact)))
            same += size * float(top1_agreement(ours, exact))
            count += size
        transcripts = self._transcripts(layers)
        return Scores(
            logit_kl=max(0.0, divergence / count) if np.isfinite(divergence) else float("nan"),
            top1_agreement=same / count,
            tokens=count,
            details={"transcripts": transcripts},
            same=sum(bool(line["equal"]) for line in transcripts) / len(transcripts),
        )

    @functools.cached_property
    def _exact_texts(self) -> list[str]:
        return [self.transcriber(sound).text for sound in self.sounds]

    def _transcripts(self, layers: WhisperLayers) -> list[dict[str, object]]:
        """Of every file: what is heard through the caches, and by the uncompressed model where that differs."""
        planned = prepare(self.loaded, layers)
        lines = []
        for file, sound, exact in zip(self.files, self.sounds, self._exact_texts, strict=True):
            ours = planned(sound).text
            lines.append({"audio": file, "text": ours, "exact": exact, "equal": ours == exact})
        return lines


def inputs_of(heard: Heard) -> Batch:
    """The inputs of the attention layers, self before cross, one layer after the other: [rows, D] each."""
    rows: list[np.ndarray] = []
    for own in heard.inputs.self_inputs:
        rows += [np.asarray(own)[0], np.asarray(heard.inputs.memory)[0]]
    return tuple(rows)


def planned_layers(
    loaded: LoadedWhisper, schemes: Mapping[str, Scheme], solutions: Mapping[str, Solution]
) -> WhisperLayers:
    """The decoder's layers converted, each to the scheme that its name has."""
    names = layer_names(loaded.model.config.decoder_layers)
    own, cross = ([schemes[pair[index]] for pair in names] for index in (0, 1))
    return convert_whisper(loaded.model, cross, own, solutions=solutions)[0]


@functools.partial(jax.jit, static_argnames="graph")
def _exact(graph: nnx.GraphDef, params: nnx.State, tokens: Tokens, memory: Memory) -> Logits:
    return nnx.merge(graph, params).decode(tokens, memory)


@functools.partial(jax.jit, static_argnames="graph")
def _cached(
    graph: nnx.GraphDef, params: nnx.State, layers: WhisperLayers, tokens: Tokens, memory: Memory
) -> Logits:
    """Teacher-forced through the caches: every token is written, rounded and read back."""
    caches = begin(layers, memory, capacity=tokens.shape[1])
    return nnx.merge(graph, params).with_cache(tokens, layers, caches)[0]
