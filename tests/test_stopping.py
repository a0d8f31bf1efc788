"""Signals: none is lost in a destructor, and a process that is only starting does not take its parent's Ctrl-C."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import stopping


class Dropped:
    """Its destructor is where the signal arrives; what it raises there goes nowhere."""

    def __init__(self, number):
        self.number = number

    def __del__(self):
        os.kill(os.getpid(), self.number)
        time.sleep(0.01)


def interrupted(number):
    """The exception of the destructor is dropped; the next lines are never reached."""
    with stopping.terminable():
        held = Dropped(number)
        del held
        time.sleep(10)


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGTERM, stopping.Terminated), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_signal_that_arrives_in_a_destructor_still_stops_the_run(number, raised, capsys):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(raised):
            interrupted(number)
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == ""


def test_what_else_a_destructor_raises_is_told_as_before(monkeypatch):
    class Broken:
        def __del__(self):
            raise ValueError("a mishap")

    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda dropped: told.append(str(dropped.exc_value)))
    with stopping.terminable():
        held = Broken()
        del held
    assert told == ["a mishap"]


def _tell(pipe):
    pipe.send(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ()))
    pipe.close()


def test_a_process_that_starts_does_not_get_ctrl_c():
    mine, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_tell, args=(theirs,))
    with stopping.withheld(signal.SIGINT):
        process.start()
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert mine.poll(60)
    assert mine.recv() is True
    process.join()


LATE = """
import asyncio, functools, sys, threading
from experiments.stopping import hush_late_writes
if sys.argv[1] == "hushed":
    hush_late_writes()
loop = asyncio.new_event_loop()
loop.close()
def report(call):
    try:
        call()
    except RuntimeError as error:
        # as C++ does for what it asked of Python, which knows of no caller
        sys.excepthook(type(error), error, error.__traceback__.tb_next)
def wrong():
    raise RuntimeError("another")
late = functools.partial(loop.call_soon_threadsafe, print)
for call in (late, wrong):
    thread = threading.Thread(target=report, args=(call,))
    thread.start()
    thread.join()
report(late)
report(lambda: late())
"""


@pytest.mark.parametrize("hushed", [True, False])
def test_what_is_left_of_a_failed_save_says_nothing_more(hushed):
    """Of a closed loop alone, and where no Python asked it."""
    command = [sys.executable, "-c", LATE, "hushed" if hushed else "heard"]
    found = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent
    )
    said = [line for line in found.stderr.splitlines() if line.startswith("RuntimeError")]
    closed = "RuntimeError: Event loop is closed"
    late = [] if hushed else [closed]
    assert said == [*late, "RuntimeError: another", *late, closed]
