"""Sums over a table that has to be looked up: many keys, one exact recall a step, and one wrong step is a wrong answer.

    c4a7b9d1;00b          the table in random order, the sum so far, the key to begin with
    990c431d141a712       for every step value, sum (mod 100, units first) and the next key

reads: b is 9, sum 09; c is 4, sum 13; d is 1, sum 14; a is 7, sum 21. The keys that follow are those of the alphabet,
round and round. Worked steps and units first make each token depend on one value to recall and on a few tokens just
before, which a small model learns quickly. A value stands anywhere in the prompt, so it is old, and in a part of the
cache that is compressed, when it is read; the running sum is always recent.
"""

import string
from dataclasses import dataclass

import numpy as np

LETTERS = np.frombuffer(string.ascii_letters.encode(), np.uint8)
_ZERO = ord("0")
_START = np.frombuffer(b";00", np.uint8)


@dataclass(frozen=True, kw_only=True)
class LookupSum:
    """Running sums, modulo 100, of values looked up in a table of single digits.

    Attributes:
        keys: of the table, 4..52: neighbours in the alphabet.
        steps: values that are summed, 1..keys.
        letters: of the alphabet, the first of a-z, A-Z; keys..52, or 0: as many as keys. Whatever a table leaves
            out, a model has to know all letters: small tables of many letters prepare for large ones.
    """

    keys: int = 40
    steps: int = 32
    letters: int = 0

    def __post_init__(self) -> None:
        ranges = [("keys", 4, len(LETTERS)), ("steps", 1, self.keys)]
        ranges += [("letters", self.keys, len(LETTERS))] if self.letters else []
        for name, least, most in ranges:
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise ValueError(f"{name} = {value!r}: expected a whole number of {least}..{most}")

    def __str__(self) -> str:
        letters = f",letters={self.letters}" if self.letters else ""
        return f"lookup_sum(keys={self.keys},steps={self.steps}{letters})"

    @property
    def prompt_length(self) -> int:
        """Table, sum so far, first key."""
        return 2 * self.keys + len(_START) + 1

    @property
    def answer_length(self) -> int:
        """Value, two digits and the next key for every step; no key after the last."""
        return 4 * self.steps - 1

    def draw(self, generator: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows, uint8 [count, T+1], and what is in the tables, uint8 [count, keys + 1].

        In what order a table has its values, and where the sum begins, makes no other problem.
        """
        letters = self.letters or self.keys
        values = generator.integers(0, 10, (count, self.keys), dtype=np.uint8)
        order = np.argsort(generator.random((count, self.keys)), axis=1)
        lowest = (
            generator.integers(0, letters, (count, 1)) if letters > self.keys else np.zeros((count, 1), int)
        )
        # A table of the whole alphabet goes round; one of a part has no more than its keys.
        begins = self.keys if letters == self.keys else self.keys - self.steps + 1
        used = (generator.integers(0, begins, (count, 1)) + np.arange(self.steps)) % self.keys
        table = np.stack(
            [LETTERS[(lowest + order) % letters], _ZERO + np.take_along_axis(values, order, axis=1)], axis=2
        )
        added = np.take_along_axis(values, used, axis=1)
        total = np.cumsum(added, axis=1, dtype=np.int64) % 100
        key = LETTERS[(lowest + used) % letters]
        steps = np.stack([key, _ZERO + added, _ZERO + total % 10, _ZERO + total // 10], axis=2)
        start = np.broadcast_to(_START, (count, len(_START)))
        parts = (table.reshape(count, -1), start, steps.reshape(count, -1))
        asked = np.concatenate([lowest, values], axis=1)
        return np.concatenate(parts, axis=1).astype(np.uint8), asked.astype(np.uint8)

    def answer(self, worked: np.ndarray) -> str | None:
        """The last sum, as in '07'; None where its place holds no digits, or the text is of another length."""
        last = [int(token) - _ZERO for token in worked[:-3:-1]]  # tens, then units
        if len(worked) != self.answer_length or not all(0 <= digit < 10 for digit in last):
            return None
        return "".join(map(str, last))
