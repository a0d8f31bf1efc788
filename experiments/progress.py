"""Progress of training: a line every so many steps, or one line that is rewritten on a terminal."""

import multiprocessing
import sys
from collections.abc import Iterable, Mapping
from typing import Any, TextIO


def show(name: str, line: Mapping[str, Any], stream: TextIO | None = None) -> None:
    """line: `step`, `steps`, `bits_per_byte`, `tokens_per_second`, `seconds_left`, as training reports them."""
    out = stream or sys.stdout
    text = (
        f"{name}: step {line['step']}/{line['steps']}  {line['bits_per_byte']:.3f} bits per byte  "
        f"{line['tokens_per_second']:,.0f} tokens/s  {clock(line['seconds_left'])} left"
    )
    if (
        out.isatty() and multiprocessing.parent_process() is None
    ):  # several at work would overwrite each other
        out.write(f"\r{text:<78}" + ("\n" if line["step"] == line["steps"] else ""))
    else:
        out.write(text + "\n")
    out.flush()


def clock(seconds: float) -> str:
    """Minutes and seconds, 1:05."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def steps_once(lines: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The lines of metrics.jsonl that report progress; of steps taken again after a restart, the last."""
    last = {(line["model"], line["step"]): line for line in lines if "tokens_per_second" in line}
    return list(last.values())
