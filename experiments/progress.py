"""Progress of training: a line every so many steps, or one line with a bar that is rewritten on a terminal."""

import multiprocessing
import shutil
import sys
from collections.abc import Iterable, Mapping
from typing import Any, TextIO


def show(name: str, line: Mapping[str, Any], stream: TextIO | None = None) -> None:
    """A line of progress; where `stream` is a terminal one that is rewritten, with a bar in what room it leaves.

    line: `step`, `steps`, `mean_loss` (nats per token), `bits_per_byte`, `tokens_per_second`, `seconds_left`, as
    training reports them.
    """
    out = stream or sys.stdout
    text = (
        f"{name}: step {line['step']}/{line['steps']}  {clock(line['seconds_left'])} left  "
        f"loss {line['mean_loss']:.3f}  {line['bits_per_byte']:.3f} bits per byte  "
        f"{line['tokens_per_second']:,.0f} tokens/s"
    )
    # Several at work would overwrite each other.
    if out.isatty() and multiprocessing.parent_process() is None:
        room = shutil.get_terminal_size().columns - 1  # a line that wraps cannot be rewritten
        text += _bar(line["step"] / line["steps"], room - len(text) - 2)
        out.write(f"\r{text[:room]:<{room}}" + ("\n" if line["step"] == line["steps"] else ""))
    else:
        out.write(text + "\n")
    out.flush()


def _bar(done: float, room: int) -> str:
    """Two spaces and a bar of at most 32 columns; nothing where there are less than 10."""
    width = min(room, 32) - 2
    return f"  [{'#' * int(done * width):.<{width}}]" if width >= 8 else ""


def clock(seconds: float) -> str:
    """Minutes and seconds, 1:05."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def steps_once(lines: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The lines of metrics.jsonl that report progress; of steps taken again after a restart, the last."""
    last = {(line["model"], line["step"]): line for line in lines if "tokens_per_second" in line}
    return list(last.values())
