"""Text for a decoder language model: windows of it, and what attention was given."""

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from slimjax.attention.layer import CachedAttention
from slimjax.config import ModelConfig
from slimjax.data import load_corpus
from slimjax.material import BATCHES, Batch, Scores, files_of
from slimjax.models.decoder import DecoderLM, init_caches
from slimjax.models.load.parameters import build
from slimjax.models.load.text_tokens import read_tokenizer, tokenizer_of
from slimjax.models.opened import OpenedModel, data_config
from slimjax.numerics import cross_entropy, logit_kl, top1_agreement
from slimjax.scheme import Scheme
from slimjax.solve.augment import Solution
from slimjax.solve.convert import convert

WINDOW = 256  # tokens
CORPUS = "corpus"  # as data: the text that the model was trained on


class Text:
    """Windows of text read by the uncompressed model."""

    def __init__(self, model: OpenedModel, data: Sequence[str], *, tokens: int, held_out: bool):
        assert isinstance(model.sizes, ModelConfig)
        self.opened = model
        found = _tokens(model, data, tokens, held_out)
        most = min(WINDOW, model.sizes.max_length)
        width = min(most, (len(found) - 1) // BATCHES)
        if width < 2:
            raise ValueError(
                f"{len(found)} tokens of text are too few: {BATCHES} windows of two or more are needed"
            )
        count = max(BATCHES, min(tokens, len(found) - 1) // width)
        count = min(count, (len(found) - 1) // width)
        starts = np.linspace(0, len(found) - 1 - width, count).astype(int)
        self.windows = np.stack([found[start : start + width + 1] for start in starts]).astype(np.int32)
        self.model: DecoderLM = build(lambda: _made(model), model.parameters)
        self.described = f"{count} windows of {width} tokens of {', '.join(data)}"

    @property
    def batches(self) -> list[Batch]:
        """A window each."""
        graph, params = nnx.split(self.model)
        return [
            tuple(np.asarray(x)[0] for x in _inputs(graph, params, jnp.asarray(window[None, :-1])))
            for window in self.windows
        ]

    def score(self, schemes: Mapping[str, Scheme], solutions: Mapping[str, Solution]) -> Scores:
        layers = planned_layers(self.opened, schemes, solutions)
        graph, params = nnx.split(self.model)
        sums, count = np.zeros(4), 0
        for window in self.windows:
            tokens, targets = jnp.asarray(window[None, :-1]), jnp.asarray(window[None, 1:])
            sums += [float(x) for x in _compare(graph, params, layers, tokens, targets)]
            count += 1
        divergence, same, exact, ours = (sums / count).tolist()
        return Scores(
            logit_kl=max(0.0, divergence) if math.isfinite(divergence) else float("nan"),
            top1_agreement=same,
            tokens=count * (self.windows.shape[1] - 1),
            details={
                "bits_per_token": ours / math.log(2),
                "bits_per_token_change": (ours - exact) / math.log(2),
            },
        )


def planned_layers(
    opened: OpenedModel, schemes: Mapping[str, Scheme], solutions: Mapping[str, Solution]
) -> tuple[CachedAttention, ...]:
    """The model's layers converted, each to the scheme that its name has."""
    return tuple(
        convert(
            layer.projections,
            layer.under(schemes[layer.name]),
            layer=layer.name,
            solution=solutions.get(layer.name),
        ).layer
        for layer in opened.layers()
    )


def _made(model: OpenedModel) -> DecoderLM:
    made = model.make()
    assert isinstance(made, DecoderLM)
    return made


def _tokens(model: OpenedModel, data: Sequence[str], most: int, held_out: bool) -> np.ndarray:
    """The tokens of files, or of the corpus. Raises ValueError for tokens that the model does not know."""
    if CORPUS in data:
        if list(data) != [CORPUS]:
            raise ValueError(f"data {' '.join(data)}: {CORPUS!r} stands alone")
        corpus = load_corpus(data_config(model.details))
        found = corpus.held_out if held_out else corpus.train
    else:
        text = b"\n".join(Path(file).read_bytes() for file in files_of(data))
        if not text:
            raise ValueError(f"{', '.join(data)}: no text there")
        found = _encoded(text, model)
    if found.max(initial=0) >= model.sizes.vocab:
        raise ValueError(f"token {found.max()} is not among the model's {model.sizes.vocab}")
    return found


def _encoded(text: bytes, model: OpenedModel) -> np.ndarray:
    """By the tokenizer that goes with the weights, or the one that the model was trained with, or as bytes."""
    if model.tokenizer is not None:
        tokenizer = tokenizer_of(model.tokenizer(), model.directory)
    elif "data" not in model.details:
        raise ValueError(f"{model.directory}: no tokenizer.json beside the weights, which text would need")
    elif (path := data_config(model.details).tokenizer) is not None:
        tokenizer = tokenizer_of(read_tokenizer(Path(path)), Path(path))
    else:
        return np.frombuffer(text, np.uint8)
    return np.asarray(
        tokenizer.encode(text.decode("utf-8", "replace"), add_special_tokens=False).ids, np.int32
    )


@functools.partial(jax.jit, static_argnames="graph")
def _inputs(graph: nnx.GraphDef, params: nnx.State, tokens: Int[Array, "B T"]) -> tuple[Array, ...]:
    return nnx.merge(graph, params).attention_inputs(tokens)


@functools.partial(jax.jit, static_argnames="graph")
def _compare(
    graph: nnx.GraphDef,
    params: nnx.State,
    layers: tuple[CachedAttention, ...],
    tokens: Int[Array, "B T"],
    targets: Int[Array, "B T"],
) -> tuple[Float[Array, ""], ...]:
    """Mean KL, agreement, and the nats per token of the exact model and of the one with caches."""
    model = nnx.merge(graph, params)
    exact = model(tokens)
    ours, _ = model.with_cache(tokens, layers, init_caches(layers, *tokens.shape))
    return (
        jnp.mean(logit_kl(ours, exact)),
        top1_agreement(ours, exact),
        cross_entropy(exact, targets),
        cross_entropy(ours, targets),
    )
