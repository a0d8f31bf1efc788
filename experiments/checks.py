"""What is looked at before the first cell: whether the text of a run is there, and is enough for what is asked of it.

Each raises ConfigError, which `experiments.run` puts at the line that is at fault.
"""

import math
from collections.abc import Mapping

from experiments.directory import Refused, RunDirectory
from slimjax.config import ConfigError, DataConfig, EquivalenceConfig, ModelConfig, TrainConfig
from slimjax.data import Corpus, load_corpus

SOURCES = ("Data.path", "Data.tokenizer", "Data.held_out_percent", "Data.task", "Pretrained.path")


def text(data: DataConfig, *, section: str = "Data") -> Corpus:
    """The text of a config. section: whose `path` it is."""
    try:
        return load_corpus(data)
    except ValueError as error:
        if str(error).startswith("tokenizer"):
            raise ConfigError(str(error), "tokenizer", "Data") from None
        raise ConfigError(str(error), "path", section) from None


def trainable(corpus: Corpus, model: ModelConfig, train: TrainConfig, scope: str = "") -> None:
    """That the model knows every token of the text, and that the text has a window to train on."""
    if corpus.vocab > model.vocab:
        raise ConfigError(
            f"vocab = {model.vocab}: the text has {corpus.vocab} tokens", "vocab", "Model", scope, SOURCES
        )
    try:
        corpus.batch(train.seed, 0, 1, train.length)
    except ValueError as error:
        raise ConfigError(f"length = {train.length}: {error}", "length", "Train", scope, SOURCES) from None


def held_out(corpus: Corpus, train: TrainConfig, tokens: int, scope: str = "") -> None:
    """That `slimjax.train.held_out` finds its tokens: whole batches."""
    batches = math.ceil(tokens / (train.batch * train.length))
    try:
        corpus.check_held_out(batches * train.batch, train.length)
    except ValueError as error:
        others = ("Train.batch", "Train.length", *SOURCES)
        problem = f"held_out_tokens = {tokens}: {error}"
        raise ConfigError(problem, "held_out_tokens", "Training", scope, others) from None


def measurable(corpus: Corpus, equivalence: EquivalenceConfig) -> None:
    """That `slimjax.evaluate` finds its windows and its prompts."""
    for field, count, length in (
        ("tokens", equivalence.tokens // equivalence.length, "length"),
        ("prompts", equivalence.prompts, "prompt_length"),
    ):
        try:
            corpus.check_held_out(count, getattr(equivalence, length))
        except ValueError as error:
            problem = f"{field} = {getattr(equivalence, field)}: {error}"
            raise ConfigError(problem, (field, length), "Equivalence", others=SOURCES) from None


def named(data: DataConfig, corpus: Corpus) -> Mapping[str, str]:
    """What a text is called in a run's stamp and records, and its digest."""
    return {_name(data): corpus.digest}


def loaded(data: DataConfig, directory: RunDirectory) -> Corpus:
    """The text of a run. Raises Refused where it is no more what it was when the run began."""
    corpus = load_corpus(data)
    if directory.inputs.get(_name(data), corpus.digest) != corpus.digest:
        raise Refused(f"{_name(data)}: changed since the run began; the same command starts another")
    return corpus


def _name(data: DataConfig) -> str:
    if data.task is not None:
        return f"task {data.task}"
    text = "standard library" if data.path is None else data.path
    return f"text {text}" + (f" by {data.tokenizer}" if data.tokenizer else "")
