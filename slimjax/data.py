"""Text as one long row of tokens: bytes by default, split by file into training and held-out text.

A batch is a pure function of (seed, step), so a resumed run needs nothing but its step number.
"""

import dataclasses
import glob
import hashlib
import sysconfig
from pathlib import Path

import numpy as np

from slimjax.config import DataConfig

# Not text that a reader of the standard library would call its source: tests, and what pip installed.
_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """Tokens of the training files and of the held-out files.

    Attributes:
        train, held_out: [tokens], uint8 for bytes, else int32.
        vocab: V.
        bytes_per_token: of the held-out text; bits per byte = bits per token / bytes_per_token.
        digest: sha256 (12 hex) of the files it was read from, their names, contents and split; "": of no files.
        masked: whether ``batch`` writes ~t (below 0) for a token t that is given, and that training does not learn.
    """

    train: np.ndarray
    held_out: np.ndarray
    vocab: int
    bytes_per_token: float = 1.0
    digest: str = ""
    masked: bool = False

    def batch(self, seed: int, step: int, batch: int, length: int) -> np.ndarray:
        """Random training windows, a pure function of its arguments.

        Returns:
            int32 [B, T+1]: inputs are [:, :-1], targets [:, 1:].

        Raises:
            ValueError: the training text is shorter than one window.
        """
        last = len(self.train) - length
        if last < 1:
            raise ValueError(f"training text of {len(self.train)} tokens has no window of {length + 1}")
        starts = np.random.default_rng((seed, step)).integers(0, last, batch)
        return _windows(self.train, starts, length)

    def held_out_windows(self, count: int, length: int) -> np.ndarray:
        """Windows spread evenly over the held-out text; targets do not overlap, so no token is scored twice.

        Returns:
            int32 [count, T+1].

        Raises:
            ValueError: the held-out text is too short for that many.
        """
        self.check_held_out(count, length)
        stride = length + (len(self.held_out) - (count * length + 1)) // max(count - 1, 1)
        return _windows(self.held_out, np.arange(count) * stride, length)

    def check_held_out(self, count: int, length: int) -> None:
        """Raise what ``held_out_windows`` would."""
        if count < 1 or length < 1:
            raise ValueError(f"{count=} windows of {length=} tokens: expected at least one of each")
        if len(self.held_out) < count * length + 1:
            raise ValueError(
                f"held-out text of {len(self.held_out)} tokens has no {count} windows of {length} + 1; "
                "ask for fewer tokens or hold out a larger share"
            )


def _windows(tokens: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    return tokens[starts[:, None] + np.arange(length + 1)[None, :]].astype(np.int32)


def load_corpus(config: DataConfig = DataConfig()) -> Corpus:
    """The corpus of a config: a task's, a file, a folder with all below it, a glob, or the standard library's source.

    Files go to the held-out side by a hash of their path relative to the corpus, so the split is the same
    on every machine and a new file moves no other. A single file is split near its end instead.

    Raises:
        ValueError: no files, or nothing in them, or one that cannot be read, under ``config.path``; a
            tokenizer.json that cannot be read. The message begins with the field.
    """
    if config.task is not None:
        from slimjax.tasks import parse_task, task_corpus  # tasks import this module

        first = None if config.first_task is None else parse_task(config.first_task)
        return task_corpus(parse_task(config.task), first, config.first_steps)
    root, files = _standard_library() if config.path is None else _files(config.path)
    try:
        texts = {str(file.relative_to(root).as_posix()): file.read_bytes() for file in files}
    except OSError as error:
        raise ValueError(f"path = {config.path!r}: {error.filename}: {error.strerror}") from None
    texts = {name: text for name, text in texts.items() if text}
    if not texts:
        raise ValueError(f"path = {config.path!r}: its {len(files)} files are all empty")
    try:
        train, held_out = _split(texts, config.held_out_percent)
    except ValueError as error:
        raise ValueError(f"path = {config.path!r}: {error}") from None
    digest = _digest(texts, config)
    if config.tokenizer is None:
        return Corpus(train=_bytes(train), held_out=_bytes(held_out), vocab=256, digest=digest)
    return dataclasses.replace(_tokenized(train, held_out, config.tokenizer), digest=digest)


def _digest(texts: dict[str, bytes], config: DataConfig) -> str:
    """What the tokens are a function of."""
    total = hashlib.sha256(repr(config.held_out_percent).encode())
    for name, text in texts.items():
        total.update(f"{name}\0".encode())
        total.update(hashlib.sha256(text).digest())
    if config.tokenizer is not None and (tokenizer := Path(config.tokenizer)).is_file():
        total.update(tokenizer.read_bytes())
    return total.hexdigest()[:12]


def _standard_library() -> tuple[Path, list[Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(root.rglob("*.py"))
    return root, [file for file in files if not _SKIPPED & set(file.relative_to(root).parts)]


def _files(path: str) -> tuple[Path, list[Path]]:
    """The folder that names are relative to, and the files, sorted."""
    given = Path(path).expanduser()
    if given.is_file():
        return given.parent, [given]
    if given.is_dir():
        root, found = given, given.rglob("*")
    else:
        # The folder above the first wildcard: names stay the same wherever the corpus is put.
        parts = given.parts
        fixed = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
        root, found = Path(*parts[:fixed]), map(Path, glob.glob(str(given), recursive=True))
    files = sorted(file for file in found if file.is_file())
    if not files:
        raise ValueError(f"path = {path!r}: expected a file, a folder with files or a glob that matches some")
    return root, files


def _split(texts: dict[str, bytes], percent: float) -> tuple[list[bytes], list[bytes]]:
    """(training, held-out) texts; neither is empty."""
    if len(texts) == 1:
        (text,) = texts.values()
        if len(text) < 2:
            raise ValueError(f"{next(iter(texts))}: one byte cannot be split into training and held-out text")
        cut = min(max(round(len(text) * (1 - percent / 100)), 1), len(text) - 1)
        return [text[:cut]], [text[cut:]]
    # 1/100 of a percent is fine enough, and leaves every run the same files.
    rank = {
        name: int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 10_000 for name in texts
    }
    held = {name for name in texts if rank[name] < percent * 100} or {min(texts, key=lambda n: (rank[n], n))}
    if len(held) == len(texts):
        held.remove(max(held, key=lambda n: (rank[n], n)))
    return [t for n, t in texts.items() if n not in held], [t for n, t in texts.items() if n in held]


def _bytes(texts: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(texts), np.uint8)


def _tokenized(train: list[bytes], held_out: list[bytes], path: str) -> Corpus:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(path)
    except Exception as error:  # the library raises nothing more specific
        raise ValueError(f"tokenizer = {path!r}: not a readable tokenizer.json: {error}") from error

    def encode(texts: list[bytes]) -> np.ndarray:
        found = tokenizer.encode_batch(
            [t.decode("utf-8", "replace") for t in texts], add_special_tokens=False
        )
        return np.concatenate([np.asarray(text.ids, np.int32) for text in found])

    scored = encode(held_out)
    return Corpus(
        train=encode(train),
        held_out=scored,
        vocab=tokenizer.get_vocab_size(),
        bytes_per_token=sum(map(len, held_out)) / max(len(scored), 1),
    )
