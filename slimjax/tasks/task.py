"""What a task is: rows of text drawn at random, each a prompt and its worked answer; and which problems are held out.

A problem belongs to one split by the hash of what it asks, so no seed and no number of problems can bring one that
is tested into training.
"""

import hashlib
import inspect
import re
from dataclasses import dataclass
from typing import Literal, Protocol, cast, get_args

import numpy as np
from jaxtyping import Int, UInt8

from slimjax.scheme import parse_options, suggest
from slimjax.tasks.lookup import LookupSum
from slimjax.tasks.sort import Sort

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
_TWENTIETHS = (18, 1, 1)  # of all problems, in the order of SPLITS
TASKS: dict[str, type["Task"]] = {"lookup_sum": LookupSum, "sort": Sort}


class Task(Protocol):
    """A kind of problem; hashable, and ``str`` gives the text that ``parse_task`` reads.

    All rows of a task are equally long, and so are all prompts: T + 1 and P tokens, which are bytes.
    """

    @property
    def prompt_length(self) -> int:
        """P, tokens that are given."""
        ...

    @property
    def answer_length(self) -> int:
        """Tokens of the worked answer, which is to be generated."""
        ...

    def draw(
        self, generator: np.random.Generator, count: int
    ) -> tuple[UInt8[np.ndarray, "N T"], UInt8[np.ndarray, "N I"]]:
        """Random problems with their worked answers, and what each of them asks: equal where two ask the same."""
        ...

    def answer(self, worked: Int[np.ndarray, "G"] | UInt8[np.ndarray, "G"]) -> str | None:
        """The answer that a worked one comes to; None where it comes to none."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Problems:
    """Prompts and what is to be answered.

    Attributes:
        prompts: int32 [N, P], right-padded where lengths differ.
        lengths: int32 [N], tokens of each prompt.
        answers: N of them.
    """

    prompts: np.ndarray
    lengths: np.ndarray
    answers: tuple[str, ...]


def row_length(task: Task) -> int:
    """T: tokens that a model reads of a row, the last one being only a target."""
    return task.prompt_length + task.answer_length - 1


def split_of(asked: bytes) -> Split:
    """The split that a problem belongs to, whatever it was drawn for: 90, 5 and 5 % of them."""
    place = int.from_bytes(hashlib.sha256(asked).digest()[:8], "big") % sum(_TWENTIETHS)
    return SPLITS[int(np.searchsorted(np.cumsum(_TWENTIETHS), place, side="right"))]


def rows(task: Task, generator: np.random.Generator, count: int, split: Split) -> UInt8[np.ndarray, "N T"]:
    """Rows [count, T+1] of one split, in the order in which they are drawn.

    Raises ValueError where no problem of that split turns up: the task has too few problems.
    """
    share = _TWENTIETHS[SPLITS.index(split)] / sum(_TWENTIETHS)
    found: list[np.ndarray] = []
    for _ in range(100):
        lacking = count - sum(map(len, found))
        if lacking <= 0:
            return np.concatenate(found)[:count]
        drawn, asked = task.draw(generator, int(1.2 * lacking / share) + 16)
        found.append(drawn[[split_of(one.tobytes()) == split for one in asked]])
    raise ValueError(f"{task} has too few problems in its split {split!r} to draw {count} of them")


def problems(task: Task, seed: int, count: int, split: Split = "test") -> Problems:
    """Problems of a split, a pure function of the arguments.

    Raises ValueError: fewer than one, an unknown split, or a task with too few problems.
    """
    if count < 1 or split not in SPLITS:
        raise ValueError(
            f"{count} problems of {split!r}: expected at least one, of one of {', '.join(SPLITS)}"
        )
    drawn = rows(task, np.random.default_rng((seed, SPLITS.index(split))), count, split)
    given = task.prompt_length
    answers = [task.answer(row[given:]) for row in drawn]
    assert None not in answers
    return Problems(
        prompts=drawn[:, :given].astype(np.int32),
        lengths=np.full(count, given, np.int32),
        answers=cast(tuple[str, ...], tuple(answers)),
    )


def grade(task: Task, problems: Problems, generated: Int[np.ndarray, "N G"]) -> np.ndarray:
    """Which problems are solved, bool [N]: the generated text comes to the very answer; its steps are not graded."""
    pairs = zip(np.asarray(generated), problems.answers, strict=True)
    return np.asarray([task.answer(worked) == answer for worked, answer in pairs], bool)


def parse_task(text: str) -> Task:
    """A task from its text, such as ``lookup_sum(keys=40,steps=32)``.

    Raises ValueError naming what is wrong and what is known.
    """
    match = re.fullmatch(r"\s*([a-z][a-z0-9_]*)\s*(?:\(([^()]*)\))?\s*", text)
    if match is None:
        raise ValueError(f"task {text!r} is not of the form name(option=number,...)")
    if match[1] not in TASKS:
        raise ValueError(f"unknown task {match[1]!r}{suggest(match[1], TASKS)}")
    kind = TASKS[match[1]]
    try:
        options, known = dict(parse_options(match[2] or "")), list(inspect.signature(kind).parameters)
        if unknown := sorted(options.keys() - set(known)):
            raise ValueError(f"no option {unknown[0]!r}{suggest(unknown[0], known)}")
        return kind(**options)
    except ValueError as error:
        raise ValueError(f"task {text!r}: {error}") from None
