"""Tasks: rows say what they claim, splits share no problem, batches are pure, answers are graded exactly."""

import string

import numpy as np
import pytest

from slimjax.config import ConfigError, DataConfig
from slimjax.data import load_corpus
from slimjax.tasks import SPLITS, LookupSum, Sort, grade, parse_task, problems
from slimjax.tasks.task import row_length, rows, split_of

TASK = LookupSum(keys=6, steps=4)
SORT = Sort(symbols=14, items=6, asked=4)


def text(row):
    return bytes(np.asarray(row, np.uint8)).decode()


def worked_by_hand(prompt, steps, letters=0):
    """The worked answer of a prompt, by another road than the generator's: a dict and Python's own sums."""
    table, start = prompt.split(";")
    values = {table[i]: int(table[i + 1]) for i in range(0, len(table), 2)}
    alphabet = string.ascii_letters[: letters or len(values)]
    key, total, worked = start[-1], int(start[:2]), ""
    for _ in range(steps):
        total = (total + values[key]) % 100
        worked += f"{key}{values[key]}{total % 10}{total // 10}"
        key = alphabet[(alphabet.index(key) + 1) % len(alphabet)]
    return worked[1:], f"{total:02d}"


@pytest.mark.parametrize(
    "task",
    [TASK, LookupSum(keys=52, steps=52), LookupSum(keys=4, steps=1), LookupSum(keys=8, steps=8, letters=9)],
    ids=str,
)
def test_rows_are_prompts_with_their_worked_answers(task):
    for row in rows(task, np.random.default_rng(3), 20, "train"):
        assert len(row) == task.prompt_length + task.answer_length == row_length(task) + 1
        prompt, worked = text(row[: task.prompt_length]), text(row[task.prompt_length :])
        assert (worked, task.answer(row[task.prompt_length :])) == worked_by_hand(
            prompt, task.steps, task.letters
        )


def test_the_documented_row_is_one():
    assert worked_by_hand("c4a7b9d1;00b", 4) == ("990c431d141a712", "21")


@pytest.mark.parametrize("task", [SORT, Sort(further=8), Sort(symbols=255, items=254, asked=254)], ids=str)
def test_rows_of_sorting_are_distinct_symbols_and_the_smallest_in_order(task):
    """By another road than the generator's: all symbols are asked, one after the other, whether they are there."""
    for row in rows(task, np.random.default_rng(4), 20, "train").tolist():
        given, ask, worked = row[: task.items], row[task.items], row[task.prompt_length :]
        assert len(row) == task.prompt_length + task.answer_length == row_length(task) + 1
        assert (len(set(given)), ask) == (task.items, 255)
        assert worked == [symbol for symbol in range(task.symbols) if symbol in given][: len(worked)]
        assert len(worked) == task.asked + task.further


def test_sorting_asks_for_sets_in_any_order_and_its_splits_share_none():
    found = {split: rows(SORT, np.random.default_rng(0), 4000, split)[:, :6].tolist() for split in SPLITS}
    asked = {split: {frozenset(given) for given in found[split]} for split in SPLITS}
    assert not asked["train"] & asked["test"]
    assert not asked["train"] & asked["validation"]
    assert not asked["validation"] & asked["test"]
    orders = {tuple(given) for given in found["test"]}
    assert len(orders) > 10 * len(asked["test"])  # many orders of few sets
    first = np.bincount([given[0] for given in found["train"]], minlength=14)
    assert first.min() > 4000 / 14 / 2  # any symbol may come first


def test_sorting_is_solved_by_all_symbols_in_order():
    asked = problems(SORT, 0, 4)
    right = [sorted(prompt)[:4] for prompt in asked.prompts[:, :6].tolist()]
    generated = np.asarray(right, np.int32)
    assert asked.answers == tuple(" ".join(map(str, one)) for one in right)
    assert grade(SORT, asked, generated).tolist() == [True] * 4
    generated[1, 0] += 1  # one of the middle is enough
    generated[2] = generated[2, [1, 0, 2, 3]]  # the symbols in another order
    assert grade(SORT, asked, generated).tolist() == [True, False, False, True]
    assert not grade(SORT, asked, generated[:, :-1]).any()


def test_further_symbols_are_learnt_and_not_graded():
    further = Sort(symbols=14, items=6, asked=4, further=2)
    asked, shorter = problems(further, 0, 3), problems(SORT, 0, 3)
    assert asked.answers == shorter.answers
    np.testing.assert_array_equal(asked.prompts, shorter.prompts)
    worked = np.sort(asked.prompts[:, :6], axis=1)
    worked[0, 4:] = 0
    worked[1, 3] = 0
    assert grade(further, asked, worked).tolist() == [True, False, True]


def test_splits_share_no_problem_and_their_shares_are_90_5_and_5():
    asked = {split: set() for split in SPLITS}
    for split in SPLITS:
        for row in rows(LookupSum(keys=4, steps=2), np.random.default_rng(0), 4000, split):
            table = text(row).split(";")[0]
            asked[split].add(tuple(sorted(table[i : i + 2] for i in range(0, len(table), 2))))
    assert not asked["train"] & asked["test"]
    assert not asked["train"] & asked["validation"]
    assert not asked["validation"] & asked["test"]
    drawn = [split_of(np.random.default_rng(i).bytes(8)) for i in range(4000)]
    assert drawn.count("train") / 4000 == pytest.approx(0.9, abs=0.02)
    assert drawn.count("validation") / 4000 == pytest.approx(0.05, abs=0.01)


def test_the_split_of_today_is_the_split_of_tomorrow():
    assert [split_of(bytes([i])) for i in range(40)].count("train") == 38
    assert [i for i in range(100) if split_of(bytes([i])) == "test"] == [19, 54, 60, 77, 91, 94]


def test_batches_are_a_pure_function_of_seed_and_step_and_hold_no_test_problem():
    corpus = load_corpus(DataConfig(task=str(TASK)))
    length = row_length(TASK)
    first = corpus.batch(3, 7, 5, length)
    corpus.batch(3, 8, 5, length)
    np.testing.assert_array_equal(first, corpus.batch(3, 7, 5, length))
    assert (first.dtype, first.shape) == (np.int32, (5, length + 1))
    for other in (corpus.batch(3, 8, 5, length), corpus.batch(4, 7, 5, length)):
        assert not np.array_equal(first, other)
    batch = corpus.batch(0, 0, 200, length)
    assert (batch[:, : TASK.prompt_length] < 0).all()
    assert (batch[:, TASK.prompt_length :] >= 0).all()
    tables = {text(~row[: TASK.prompt_length]).split(";")[0] for row in batch}
    assert all(len(table) == 12 for table in tables)
    tested = {text(row).split(";")[0] for row in problems(TASK, 0, 200).prompts}
    assert not tables & tested


def test_the_first_steps_have_an_easier_task_and_as_many_tokens():
    data = DataConfig(task=str(TASK), first_task="lookup_sum(keys=4,steps=1)", first_steps=2)
    corpus, plain = load_corpus(data), load_corpus(DataConfig(task=str(TASK)))
    assert corpus.batch(0, 1, 5, 30).shape == (10, 15)  # rows of 14 tokens to read: twice in 30
    np.testing.assert_array_equal(corpus.batch(0, 2, 5, 30), plain.batch(0, 2, 5, 30))
    assert corpus.digest != plain.digest


@pytest.mark.parametrize(
    "fields",
    [{"first_task": "lookup_sum"}, {"first_steps": 3}, {"first_task": "lookup_sum", "first_steps": 3}],
)
def test_an_easier_task_leads_to_another(fields):
    data = {"task": str(TASK)} if len(fields) == 1 else {}
    with pytest.raises(ConfigError, match="belong together"):
        DataConfig(**data, **fields)


def test_held_out_windows_are_validation_rows():
    corpus = load_corpus(DataConfig(task=str(TASK)))
    windows = corpus.held_out_windows(9, row_length(TASK))
    np.testing.assert_array_equal(
        windows, rows(TASK, np.random.default_rng((0, 1)), 9, "validation").astype(np.int32)
    )
    np.testing.assert_array_equal(corpus.held_out_windows(9, 5), windows[:, :6])
    with pytest.raises(ValueError, match=r"lookup_sum\(keys=6,steps=4\) has 30 tokens to read, not 31"):
        corpus.held_out_windows(9, 31)
    with pytest.raises(ValueError, match="has 30 tokens to read, not 16"):
        corpus.batch(0, 0, 2, 16)


def test_a_corpus_says_what_it_is():
    corpus = load_corpus(DataConfig(task=str(TASK)))
    assert (corpus.vocab, corpus.masked) == (256, True)
    assert corpus.digest != load_corpus(DataConfig(task="lookup_sum(keys=6,steps=5)")).digest
    assert corpus.digest == load_corpus(DataConfig(task=str(TASK))).digest
    assert len(corpus.train) % (row_length(TASK) + 1) == len(corpus.held_out) % (row_length(TASK) + 1) == 0


def test_only_the_very_answer_is_right():
    asked = problems(TASK, 0, 4)
    worked = [worked_by_hand(text(prompt), TASK.steps)[0] for prompt in asked.prompts]
    last = worked[1][-1]
    worked[1] = worked[1][:-1] + str((int(last) + 1) % 10)  # a digit of the sum
    worked[2] = worked[2][:-1] + "x"  # no digit
    worked[3] = "?" * (len(worked[3]) - 2) + worked[3][-2:]  # no steps, and yet the answer
    generated = np.stack([np.frombuffer(one.encode(), np.uint8) for one in worked]).astype(np.int32)
    assert grade(TASK, asked, generated).tolist() == [True, False, False, True]
    assert not grade(TASK, asked, generated[:, :-1]).any()


def test_problems_are_a_function_of_their_seed():
    one, two = problems(TASK, 1, 5), problems(TASK, 1, 5)
    np.testing.assert_array_equal(one.prompts, two.prompts)
    assert one.answers == two.answers
    assert problems(TASK, 2, 5).answers != one.answers
    assert one.lengths.tolist() == [TASK.prompt_length] * 5
    with pytest.raises(ValueError, match="0 problems of 'test'"):
        problems(TASK, 0, 0)


def test_a_tasks_text_reads_back_as_itself():
    assert parse_task(str(TASK)) == TASK
    assert parse_task("lookup_sum") == LookupSum()
    assert parse_task(str(LookupSum(letters=41))) == LookupSum(letters=41)
    assert parse_task(" lookup_sum( keys=8 , steps=2 )") == LookupSum(keys=8, steps=2)
    assert parse_task(str(SORT)) == SORT
    assert parse_task("sort") == Sort()
    assert parse_task(str(Sort(further=3))) == Sort(further=3)


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ("lookup_sums", "unknown task 'lookup_sums'; did you mean 'lookup_sum'"),
        ("lookup sum", "not of the form"),
        ("lookup_sum(key=4)", "no option 'key'; did you mean 'keys'"),
        ("lookup_sum(keys=3)", r"keys = 3: expected a whole number of 4\.\.52"),
        ("lookup_sum(keys=8,steps=9)", r"steps = 9: expected a whole number of 1\.\.8"),
        ("lookup_sum(keys=4.5)", "keys = 4.5"),
        ("sort(item=4)", "no option 'item'; did you mean 'items'"),
        ("sort(symbols=256)", r"symbols = 256: expected a whole number of 4\.\.255"),
        ("sort(symbols=9,items=9)", r"items = 9: expected a whole number of 2\.\.8"),
        ("sort(symbols=9,items=4,asked=5)", r"asked = 5: expected a whole number of 1\.\.4"),
        ("sort(symbols=9,items=4,asked=3,further=2)", r"further = 2: expected a whole number of 0\.\.1"),
        ("lookup_sum(keys=8,steps=2,letters=7)", r"letters = 7: expected a whole number of 8\.\.52"),
    ],
)
def test_a_wrong_task_is_named(wrong, problem):
    with pytest.raises(ConfigError, match=problem) as caught:
        DataConfig(task=wrong)
    assert caught.value.field == "task"


def test_a_task_has_no_text_beside_it():
    with pytest.raises(ConfigError, match="task makes its own text"):
        DataConfig(task="lookup_sum", path="somewhere")


def test_a_task_without_enough_problems_is_named():
    class One(LookupSum):
        def draw(self, generator, count):
            return np.zeros((count, 2), np.uint8), np.zeros((count, 1), np.uint8)

        def __str__(self):
            return "one"

    assert split_of(b"\0") == "train"
    with pytest.raises(ValueError, match="one has too few problems in its split 'test' to draw 1 of them"):
        rows(One(), np.random.default_rng(0), 1, "test")
