"""A model answers problems: greedy generation through the caches of given layers, then exact grading.

Answers through a cache are held against those through the unquantised one, problem by problem.
"""

from collections.abc import Sequence

import numpy as np

from slimjax.attention.layer import CachedAttention
from slimjax.generate import generate
from slimjax.models.decoder import DecoderLM
from slimjax.statistics import mcnemar, wilson
from slimjax.tasks.task import Problems, Task, grade

UNQUANTISED = "kv:float32"  # the cache against whose answers others are tested


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


def answered(right: np.ndarray, unquantised: np.ndarray) -> dict[str, float]:
    """What answers are worth: their share with its interval, and a paired test against an unquantised cache's.

    Args:
        right, unquantised: bool [N], ``solved`` through this cache and through the unquantised one, problem by problem.

    Returns:
        Metrics by name: `accuracy` in [0, 1], the ends `accuracy_low` and `accuracy_high` of its 95 % interval
        (Wilson's), `accuracy_change` against the unquantised cache and McNemar's exact two-sided `p_value`.

    Raises:
        ValueError: other lengths, or no problems.
    """
    share = wilson(int(right.sum()), right.size)
    return {
        "accuracy": share.mean,
        "accuracy_low": share.low,
        "accuracy_high": share.high,
        "accuracy_change": float(right.mean() - unquantised.mean()),
        "p_value": mcnemar(right, unquantised).p,
    }
