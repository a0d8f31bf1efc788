"""A task as a corpus: every batch is of new problems, a pure function of (seed, step) as a text's are."""

import hashlib
from dataclasses import dataclass

import numpy as np

from slimjax.data import Corpus
from slimjax.tasks.task import SPLITS, Task, row_length, rows

_SAMPLE = 256  # rows of either side that stand for the task where tokens in one long row are wanted


@dataclass(frozen=True, kw_only=True, eq=False)
class TaskCorpus(Corpus):
    """Rows of a task in place of windows of a text.

    Attributes:
        task: whose; `train` and `held_out` are samples of its rows.
        first, first_steps: an easier task whose rows the first steps have in place of its own, or None.
    """

    task: Task
    first: Task | None = None
    first_steps: int = 0

    def batch(self, seed: int, step: int, batch: int, length: int) -> np.ndarray:
        """New problems with their worked answers, int32 [B, T+1]; a prompt's tokens t are written ~t: see `masked`.

        Of the easier task there are as many times more rows as fit into theirs: [n B, T'+1], n T' <= T.

        Raises:
            ValueError: any other length than that of the task's rows.
        """
        if length != (whole := row_length(self.task)):
            raise ValueError(f"a row of {self.task} has {whole} tokens to read, not {length}")
        task = self.task
        if self.first is not None and step < self.first_steps:
            task, batch = self.first, batch * max(1, whole // row_length(self.first))
        drawn = rows(task, np.random.default_rng((seed, step)), batch, "train").astype(np.int32)
        drawn[:, : task.prompt_length] ^= -1
        return drawn

    def held_out_windows(self, count: int, length: int) -> np.ndarray:
        """The first ``length`` + 1 tokens of problems held out for validation, int32 [count, length+1].

        Raises ValueError: rows are shorter than that.
        """
        self.check_held_out(count, length)
        generator = np.random.default_rng((0, SPLITS.index("validation")))
        return rows(self.task, generator, count, "validation")[:, : length + 1].astype(np.int32)

    def check_held_out(self, count: int, length: int) -> None:
        """Raise what ``held_out_windows`` would."""
        if count < 1 or length < 1:
            raise ValueError(f"{count=} windows of {length=} tokens: expected at least one of each")
        if length > (whole := row_length(self.task)):
            raise ValueError(f"a row of {self.task} has {whole} tokens to read, not {length}")


def task_corpus(task: Task, first: Task | None = None, first_steps: int = 0) -> TaskCorpus:
    """The corpus of a task; its digest is of the rows themselves, so that another generator has another one."""
    train, held_out = (
        rows(task, np.random.default_rng((0, SPLITS.index(split))), _SAMPLE, split)
        for split in ("train", "validation")
    )
    text = f"{task} {first} {first_steps}"
    digest = hashlib.sha256(text.encode() + train.tobytes() + held_out.tobytes()).hexdigest()[:12]
    return TaskCorpus(
        train=train.ravel(),
        held_out=held_out.ravel(),
        vocab=256,
        digest=digest,
        masked=True,
        task=task,
        first=first,
        first_steps=first_steps,
    )
