"""A model answers problems: greedy generation through the caches of given layers, then exact grading."""

from collections.abc import Sequence

import numpy as np

from slimjax.attention.layer import CachedAttention
from slimjax.generate import generate
from slimjax.models.decoder import DecoderLM
from slimjax.tasks.task import Problems, Task, grade


def solved(
    model: DecoderLM, layers: Sequence[CachedAttention], task: Task, problems: Problems, *, batch: int = 125
) -> np.ndarray:
    """Which problems a model solves when it attends through the caches of its layers, bool [N].

    Prompts are read with exact attention and written to the cache; the worked answer is generated through it, the
    likeliest token each time, so the same arguments give the same answers.

    Args:
        model: trained on the task.
        layers: from ``convert_model``.
        task, problems: see there; the prompts are all of the task's length.
        batch: problems that are answered together; the last batch is filled up with its last problem, so that
            all are one compilation.

    Raises:
        ValueError: a batch of fewer than one; else what ``generate`` raises.
    """
    if batch < 1:
        raise ValueError(f"{batch=}: expected at least one problem")
    count = len(problems.answers)
    batch = min(batch, count)
    worked = np.empty((count, task.answer_length), np.int32)
    for start in range(0, count, batch):
        taken = np.minimum(np.arange(start, start + batch), count - 1)
        found = generate(
            model,
            problems.prompts[taken],
            problems.lengths[taken],
            layers=layers,
            max_new_tokens=task.answer_length,
        )
        worked[taken] = np.asarray(found)
    return grade(task, problems, worked)


def accuracy(
    model: DecoderLM, layers: Sequence[CachedAttention], task: Task, problems: Problems, *, batch: int = 125
) -> float:
    """The share of ``solved`` problems, in [0, 1]."""
    return float(np.mean(solved(model, layers, task, problems, batch=batch)))
