"""SIGTERM and Ctrl-C: what a run does when it is told to stop, so that the same command can go on."""

import asyncio
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker
from types import TracebackType
from typing import Any, NoReturn

GO_ON = "the same command goes on from here"
AGAIN = 0.05  # seconds until a signal that was dropped is sent again


class Terminated(BaseException):
    """SIGTERM arrived. Like KeyboardInterrupt, no `except Exception` takes it for a failure."""


def _terminate(number: int, frame: Any) -> NoReturn:
    raise Terminated


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises Terminated, wherever the program is, as Ctrl-C raises KeyboardInterrupt.

    Ctrl-C's signal counts even where it came ignored, as to a program that a script starts behind `&`: whoever
    sends it there means it. Either counts where it arrives in a destructor or a callback of the garbage collector, out
    of which Python lets no exception: it is sent again.
    """
    if threading.current_thread() is not threading.main_thread():  # elsewhere signals do not arrive
        yield
        return
    previous = {signal.SIGTERM: signal.signal(signal.SIGTERM, _terminate)}
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        previous[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    otherwise = sys.unraisablehook

    def again(dropped: "sys.UnraisableHookArgs") -> None:
        number = {KeyboardInterrupt: signal.SIGINT, Terminated: signal.SIGTERM}.get(dropped.exc_type)
        if number is None:
            otherwise(dropped)
        else:
            threading.Timer(AGAIN, os.kill, (os.getpid(), number)).start()

    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = otherwise
        for name, handler in previous.items():
            signal.signal(name, handler or signal.SIG_DFL)


def hush_late_writes() -> None:
    """For the rest of this process: what is left of a failed save says nothing more.

    Orbax raises at the first array that does not fit the disk, and closes the event loop that the others would report
    to. They do so from TensorStore's C++, in any thread, one traceback each, behind the line that says what has
    happened. No Python called them: their tracebacks begin where the loop is asked, those of other errors above that.
    """
    shown = sys.excepthook
    asked = asyncio.BaseEventLoop.call_soon_threadsafe.__code__

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        late = kind is RuntimeError and str(error) == "Event loop is closed"
        if not late or trace is None or trace.tb_frame.f_code is not asked:
            shown(kind, error, trace)

    sys.excepthook = hook


@contextlib.contextmanager
def withheld(number: signal.Signals) -> Iterator[None]:
    """A process that `multiprocessing` starts inside begins with the signal blocked, before it can ignore it."""
    resource_tracker.ensure_running()  # if it had to be started inside, that would lift the block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def deferred_signals() -> Iterator[list[signal.Signals]]:
    """A list that the first SIGTERM or Ctrl-C is put into, for the work to end well; a second acts at once."""
    caught: list[signal.Signals] = []
    previous: dict[signal.Signals, Any] = {}

    def note(number: int, frame: Any) -> None:
        caught.append(signal.Signals(number))
        say(f"{caught[-1].name}: saving after this step")
        for name, handler in previous.items():
            signal.signal(name, handler)

    if threading.current_thread() is threading.main_thread():  # elsewhere signals do not arrive
        for name in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(name) is not signal.SIG_IGN:  # a worker leaves Ctrl-C to its parent
                previous[name] = signal.getsignal(name) or signal.SIG_DFL
                signal.signal(name, note)
    try:
        yield caught
    finally:
        for name, handler in previous.items():
            signal.signal(name, handler)


def say(text: str) -> None:
    """A line about stopping, on standard error; of several processes at work each would say it, and none does."""
    if multiprocessing.parent_process() is None:
        print(text, file=sys.stderr, flush=True)


def stop(caught: signal.Signals) -> NoReturn:
    """End the run as the signal would have, had it not been deferred."""
    if caught is signal.SIGINT:
        raise KeyboardInterrupt
    raise Terminated
