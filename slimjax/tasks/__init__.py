"""Tasks with exact answers, for models trained until they solve them: what a damaged cache costs, in answers lost.

`task` says what a task is and how its problems are split, `lookup` and `sort` are tasks, `corpus` feeds one to
training, `solve` has a model answer its problems through given caches.
"""

from slimjax.tasks.corpus import TaskCorpus, task_corpus
from slimjax.tasks.lookup import LookupSum
from slimjax.tasks.solve import UNQUANTISED, answered, solved
from slimjax.tasks.sort import Sort
from slimjax.tasks.task import SPLITS, Problems, Split, Task, grade, parse_task, problems

__all__ = [
    "SPLITS",
    "UNQUANTISED",
    "LookupSum",
    "Problems",
    "Sort",
    "Split",
    "Task",
    "TaskCorpus",
    "answered",
    "grade",
    "parse_task",
    "problems",
    "solved",
    "task_corpus",
]
