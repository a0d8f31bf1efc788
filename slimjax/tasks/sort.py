"""Sorting: every step recalls one symbol of many that are nearly as good, and one wrong step is a wrong answer.

    7 2 9 4 > 2 4 7       four distinct symbols in random order, then the three smallest in order

Which symbol comes next depends on all of the prompt: of those above the last one the model has to find the smallest,
so it attends with sharp weights to one of many near neighbours. Margins are thin where symbols are many and heads
small, and a cache that moves its keys by a little moves the answer. What is recalled stands anywhere in the prompt.
"""

from dataclasses import dataclass

import numpy as np

MOST = 255
_ASK = MOST  # the token that ends the prompt; symbols are 0..254


@dataclass(frozen=True, kw_only=True)
class Sort:
    """The smallest of distinct symbols, in order.

    Attributes:
        symbols: that there are, 4..255; token s is the s-th in order.
        items: distinct ones in a prompt, 2..symbols-1 (all of them would be the same problem each time).
        asked: how many of the smallest are answered, 1..items.
        further: ones behind them that a worked answer goes on to and that are not graded, 0..items-asked. The
            largest symbols of worked answers are rare there, and learnt last: with some to spare they are not asked.
    """

    symbols: int = 160
    items: int = 128
    asked: int = 40
    further: int = 0

    def __post_init__(self) -> None:
        ranges = [("symbols", 4, MOST), ("items", 2, self.symbols - 1), ("asked", 1, self.items)]
        ranges += [("further", 0, self.items - self.asked)]
        for name, least, most in ranges:
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise ValueError(f"{name} = {value!r}: expected a whole number of {least}..{most}")

    def __str__(self) -> str:
        further = f",further={self.further}" if self.further else ""
        return f"sort(symbols={self.symbols},items={self.items},asked={self.asked}{further})"

    @property
    def prompt_length(self) -> int:
        """The symbols and the token that asks."""
        return self.items + 1

    @property
    def answer_length(self) -> int:
        """A token for each symbol that is asked for, and for each further one."""
        return self.asked + self.further

    def draw(self, generator: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows, uint8 [count, T+1], and the symbols of each prompt in order, uint8 [count, items].

        In what order a prompt has its symbols makes no other problem.
        """
        order = np.argsort(generator.random((count, self.symbols)), axis=1)[:, : self.items]
        given, ordered = order.astype(np.uint8), np.sort(order, axis=1).astype(np.uint8)
        ask = np.full((count, 1), _ASK, np.uint8)
        return np.concatenate([given, ask, ordered[:, : self.answer_length]], axis=1), ordered

    def answer(self, worked: np.ndarray) -> str:
        """The symbols asked for in the order given, as in '2 4 7'."""
        return " ".join(map(str, worked[: self.asked]))
