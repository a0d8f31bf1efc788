"""Caches side by side on language models: what each does to the model's text, to its layers, and to its answers.

A cell is one way to cache on one model: a scheme, how its heads of fewer bits are chosen, which layers are spared.
The exact model is run once for all cells of a model. Maps and heads are chosen on tokens that are not scored.
"""

import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from experiments import schemes
from experiments.compare_settings import LEAST, CompareConfig
from experiments.directory import Refused, RunDirectory
from experiments.known import check_known, known_records
from experiments.settings import Build, Cell, Forecast, Measure, Unit
from slimjax import pretrained
from slimjax.compare import DYNAMIC, Choice, choose, measure, named
from slimjax.config import ELSEWHERE, Config, ConfigError, DataConfig, ModelConfig
from slimjax.data import Corpus, load_corpus
from slimjax.models.decoder import DecoderLM, convert_model
from slimjax.models.load import load_decoder
from slimjax.models.load.llama import is_decoder, open_decoder
from slimjax.models.load.text_tokens import tokenizer_of
from slimjax.records import Record
from slimjax.scheme import parse_scheme
from slimjax.tasks import UNQUANTISED, Task, answered, parse_task, problems, solved
from slimjax.tasks.task import row_length, rows
from slimjax.windows import BATCH_TOKENS, Exact, overlapping, prepare as prepare_exact

TITLE = "Caches side by side"
DTYPE = "float32"  # of queries, weights and output, so that what differs is the cache's
ASKED = 1  # seed of the problems: those of seed 0 are what tasks were chosen on


@dataclass(frozen=True, kw_only=True)
class Subject(Config):
    """A model. It counts by its contents (`digest`), wherever it lies.

    `text` is what a model of others reads, "" for one trained here (`data` says what); `length` is that of its
    windows and `prompt` of what they begin with: a task's rows have their own.
    """

    folder: str = field(metadata=ELSEWHERE)
    text: str = field(metadata=ELSEWHERE)
    name: str
    digest: str
    model: ModelConfig
    data: DataConfig
    length: int
    prompt: int

    @property
    def task(self) -> Task | None:
        """What the model was trained on, where that is no text."""
        return None if self.data.task is None else parse_task(self.data.task)

    def windows(self, tokens: int) -> int:
        """So many windows score at least ``tokens`` targets."""
        return -(-tokens // (self.length - self.prompt))


@dataclass(frozen=True, kw_only=True)
class Compare(Config):
    """The whole run."""

    subjects: tuple[Subject, ...]
    grid: CompareConfig

    def validate(self) -> None:
        names = [subject.name for subject in self.subjects]
        if len(set(names)) < len(names):
            raise ConfigError(f"two models are called {names}: rename a folder", "trained", "Compare")


def resolve(build: Build) -> Compare:
    """The run from its section; models are looked at, not loaded."""
    grid = build("Compare")
    check_known(grid)
    subjects = []
    for name, places in (("models", grid.models), ("trained", grid.trained)):
        for place in places:
            try:
                sizes = grid.length, grid.prompt
                found = _trained(place, *sizes) if name == "trained" else _given(place, grid.text, *sizes)
            except (OSError, ValueError, NotImplementedError) as error:
                more = "" if name == "trained" else "; `make models` fetches SmolLM2 and a text"
                raise ConfigError(f"{error}{more}", name, "Compare") from None
            subjects.append(found)
    return Compare(subjects=tuple(subjects), grid=grid)


@functools.lru_cache(maxsize=16)
def _trained(place: str, length: int, prompt: int) -> Subject:
    found = pretrained.find(place)
    if found.data.task is not None:
        task = parse_task(found.data.task)
        length, prompt = row_length(task), task.prompt_length
        if length <= prompt:
            raise ValueError(
                f"{place}: answers of {task} are one token, which a prompt's exact attention gives"
            )
    return Subject(
        folder=str(found.folder),
        text="",
        name=found.folder.name,
        digest=found.digest,
        model=found.model,
        data=found.data,
        length=length,
        prompt=prompt,
    )


@functools.lru_cache(maxsize=16)
def _given(place: str, text: str, length: int, prompt: int) -> Subject:
    folder = Path(place)
    if not is_decoder(folder):
        raise FileNotFoundError(f"{place}: no Llama-like language model there")
    if not Path(text).is_file():
        raise FileNotFoundError(f"{text}: no such file, which {folder.name} would read")
    opened = open_decoder(folder)
    if opened.tokenizer is None:
        raise ValueError(f"{place}: no tokenizer.json beside the weights")
    total = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".gguf", ".safetensors", ".json"):
            total.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return Subject(
        folder=place,
        text=text,
        name=folder.name,
        digest=total.hexdigest()[:12],
        model=opened.config,
        data=DataConfig(),
        length=length,
        prompt=prompt,
    )


def corpus_of(subject: Subject, grid: CompareConfig) -> Corpus:
    """What a model reads: of a single text, the last tokens are scored, and those before them calibrate.

    Raises ValueError (with the field first) where it cannot be read.
    """
    if not subject.text:
        return load_corpus(subject.data)
    opened = open_decoder(subject.folder)
    assert opened.tokenizer is not None  # `_given` has looked
    text = book(Path(subject.text).read_bytes().decode("utf-8", "replace"))
    tokenizer = tokenizer_of(opened.tokenizer(), Path(subject.folder))
    ids = np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
    needed = subject.windows(grid.tokens) * (subject.length - subject.prompt) + subject.prompt + 1
    first = max(0, min(grid.calibration, len(ids) - needed))
    raw = text.encode()
    return Corpus(
        train=ids[:first],
        held_out=ids[first:],
        vocab=subject.model.vocab,
        bytes_per_token=len(raw) / max(len(ids), 1),
        digest=hashlib.sha256(raw).hexdigest()[:12],
    )


def book(text: str) -> str:
    """What is between the lines that begin with *** START and *** END, as Project Gutenberg has them; else all."""
    lines = text.splitlines(keepends=True)
    first = next((i + 1 for i, line in enumerate(lines) if line.startswith("*** START")), 0)
    last = next((i for i, line in enumerate(lines) if line.startswith("*** END")), len(lines))
    return "".join(lines[first:last])


def windows_of(corpus: Corpus, subject: Subject, grid: CompareConfig) -> tuple[np.ndarray, np.ndarray]:
    """The scored windows, int32 [W, T+1], and those that calibrate, [C, T']. Raises ValueError: too little text.

    Windows that calibrate do not overlap, and are shorter where there would be fewer than five.
    """
    count, task = subject.windows(grid.tokens), subject.task
    if task is not None:
        scored = corpus.held_out_windows(count, subject.length)
        drawn = rows(task, np.random.default_rng(0), max(LEAST, grid.calibration // subject.length), "train")
        return scored, drawn[:, : subject.length].astype(np.int32)
    scored = overlapping(corpus.held_out, count, subject.length, subject.prompt)
    most = min(grid.calibration, len(corpus.train) - 1)
    width = min(subject.length, most // LEAST)
    if width < 1:
        raise ValueError(f"{most} tokens to calibrate on are not {LEAST} windows")
    return scored, overlapping(corpus.train, most // width, width)[:, :-1]


def check(config: Compare) -> Mapping[str, str]:
    """Of the text of every model, which has to be enough; and that the models fit it."""
    found: dict[str, str] = {}
    for subject in config.subjects:
        field_at_fault = ("tokens", "length", "prompt", "calibration")
        try:
            corpus = corpus_of(subject, config.grid)
            windows_of(corpus, subject, config.grid)
        except (OSError, ValueError) as error:
            problem = f"tokens = {config.grid.tokens}, {subject.name}: {error}"
            others = ("Compare.trained", "Compare.text")
            raise ConfigError(problem, field_at_fault, "Compare", others=others) from None
        if subject.model.position == "learned" and subject.model.max_length < subject.length:
            problem = f"{subject.name}: learned positions end at {subject.model.max_length}"
            raise ConfigError(problem, "length", "Compare")
        found[f"text of {subject.name}"] = corpus.digest
    return found


def units(config: Compare) -> list[Unit]:
    """A model each."""
    return [
        Unit(subject.name, tuple(_cells(subject, config.grid)), subject, divisible=True)
        for subject in config.subjects
    ]


def _cells(subject: Subject, grid: CompareConfig) -> Iterator[Cell]:
    for text in grid.schemes:
        mixed = "-" in (parse_scheme(text).bits or "")
        for fraction in grid.fractions if mixed and grid.fractions else (None,):
            for selector in grid.selectors if mixed else ("none",):
                for seed in grid.seeds if selector == "random" else grid.seeds[:1]:
                    for layers in _protected(grid):
                        yield {
                            "experiment": "compare",
                            "study": grid.study,
                            "model": subject.name,
                            **schemes.parts(named(text, fraction)),
                            "selector": selector if mixed else None,
                            "fraction": fraction,
                            **layers,
                            "position": subject.model.position,
                            "dtype": DTYPE,
                            "length": subject.length,
                            "prompt": subject.prompt,
                            "context": grid.context,
                            "seed": seed,
                        }


def _protected(grid: CompareConfig) -> Iterator[Cell]:
    """How many layers are protected, where, and how."""
    for count in grid.protected:
        for place in grid.protect if count else (None,):
            yield {"protected": count, "protect": place, "protection": grid.protection if count else None}


def measured_elsewhere(config: Compare, cells: Sequence[Cell], directory: RunDirectory) -> list[Record]:
    """Those that the runs of `Compare.known` have measured for other tables."""
    return known_records(config, cells, directory)


def forecast(unit: Unit, config: Compare) -> Forecast:
    """Forward passes over the scored tokens; what no layer takes is refused.

    In memory: the weights, the exact model's logits of the scored tokens and of every layer its inputs, prompts
    included, its outputs, and what calibration looks at; the largest caches of the windows read at once, twice.
    """
    subject, grid = unit.data, config.grid
    size, layers = schemes.floats(subject.model), subject.model.layers
    refused, largest = {}, 0
    for index, cell in enumerate(unit.cells):
        try:
            largest = max(largest, layers * _fits(cell, subject, grid))
        except NotImplementedError as refusal:
            refused[index] = str(refusal)
    windows = subject.windows(grid.tokens)
    scored = windows * (subject.length - subject.prompt)
    rows_kept = windows * subject.length + 2 * scored + grid.calibration
    together = max(1, BATCH_TOKENS // subject.length)
    return Forecast(
        flops=2.0 * size * scored * (len(unit.cells) - len(refused) + 1),
        bytes=4 * (size + scored * subject.model.vocab + layers * rows_kept * subject.model.width)
        + 2 * together * largest,
        refused=refused,
    )


def _fits(cell: Cell, subject: Subject, grid: CompareConfig) -> int:
    """Bytes of one layer's cache of a window. NotImplementedError, with the reason: the model cannot be cached so."""
    choice = _choice(cell)
    choice.check_selector()
    if choice.selector == DYNAMIC and subject.task is not None and grid.problems:
        raise NotImplementedError(
            "the dynamic selector gives every prompt layers of its own, and problems are answered in batches; "
            "Compare.problems = 0 leaves them out"
        )
    found = [
        schemes.cache_bytes(schemes.layer_spec(subject.model, str(scheme), DTYPE), 1, subject.length)
        for scheme in set(choice.schemes(subject.model.layers))
    ]
    return max(found)


def prepare(unit: Unit, config: Compare, directory: RunDirectory) -> Measure:
    """Load the model and run it without a cache."""
    subject, grid = unit.data, config.grid
    try:
        corpus = corpus_of(subject, grid)
        key = f"text of {subject.name}"
        if directory.inputs.get(key, corpus.digest) != corpus.digest:
            raise Refused(f"{key}: changed since the run began; the same command starts another")
        scored, calibration = windows_of(corpus, subject, grid)
        model = _loaded(subject)
    except (OSError, ValueError) as error:
        raise Refused(str(error)) from error
    exact = prepare_exact(
        model, scored, calibration, prompt=subject.prompt, bytes_per_token=corpus.bytes_per_token
    )
    return measuring(exact, subject, grid)


def _loaded(subject: Subject) -> DecoderLM:
    if subject.text:
        return load_decoder(subject.folder).model
    found = pretrained.find(subject.folder)
    if found.digest != subject.digest:
        raise Refused(f"{subject.folder}: changed since the run began; the same command starts another run")
    return pretrained.restore(found)


def measuring(exact: Exact, subject: Subject, grid: CompareConfig) -> Measure:
    """Measures one way to cache; where there is a task, with the model's answers through that cache."""
    task = subject.task if grid.problems else None
    asked = None if task is None else problems(task, ASKED, grid.problems)

    @functools.cache
    def unquantised() -> np.ndarray:
        assert task is not None
        assert asked is not None
        return solved(exact.model, convert_model(exact.model, UNQUANTISED)[0], task, asked)

    def measured(cell: Cell) -> dict[str, Any]:
        choice = _choice(cell)
        layers, dynamic = choose(exact, choice), choice.selector == DYNAMIC
        found: dict[str, Any] = measure(exact, layers, context=grid.context, dynamic=dynamic)
        if task is None or asked is None:
            return found
        right = solved(exact.model, layers, task, asked)
        samples = {"problems": int(right.size), "solved_samples": right.astype(int).tolist()}
        return found | answered(right, unquantised()) | samples

    return measured


def _choice(cell: Cell) -> Choice:
    protection = cell.get("protection")
    return Choice(
        scheme=parse_scheme(str(cell["scheme"])),
        selector=str(cell.get("selector") or "none"),
        protected=int(cell.get("protected") or 0),
        protection=None if protection is None else parse_scheme(str(protection)),
        protect=str(cell.get("protect") or "ends"),
        seed=int(cell.get("seed") or 0),
        dtype=DTYPE,
    )
