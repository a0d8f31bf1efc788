"""What training shows of itself: a bar on a terminal, lines everywhere else."""

import io

import pytest

from experiments import progress

LINE = {
    "step": 500,
    "steps": 2000,
    "loss": 2.0,
    "mean_loss": 1.25,
    "bits_per_byte": 0.9,
    "tokens_per_second": 12345.6,
    "seconds_left": 65.2,
}
TEXT = "small: step 500/2000  1:05 left  loss 1.250  0.900 bits per byte  12,346 tokens/s"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """A terminal of so many columns."""

    def of(columns):
        monkeypatch.setenv("COLUMNS", str(columns))
        return Terminal()

    return of


def shown(stream, *steps):
    for step in steps:
        progress.show("small", LINE | {"step": step}, stream)
    return stream.getvalue()


def test_elsewhere_it_is_a_line_each_time():
    assert shown(io.StringIO(), 500, 2000) == f"{TEXT}\n{TEXT.replace('500/', '2000/')}\n"


def test_on_a_terminal_one_line_is_rewritten_and_has_a_bar(terminal):
    first, second = shown(terminal(140), 500, 2000).removeprefix("\r").split("\r")
    assert first.rstrip() == f"{TEXT}  [{'#' * 7}{'.' * 23}]"
    assert second.rstrip() == f"{TEXT.replace('500/', '2000/')}  [{'#' * 30}]"
    assert second.endswith("\n")  # what follows is below it
    assert (len(first), len(second)) == (139, 140)


def test_a_line_never_wraps_on_a_narrow_terminal(terminal):
    assert shown(terminal(96), 500) == f"\r{TEXT}  [##........]".ljust(96)
    assert shown(terminal(90), 500) == f"\r{TEXT}".ljust(90)
    assert shown(terminal(50), 500) == f"\r{TEXT[:49]}"


def test_processes_at_work_beside_each_other_write_lines(terminal, monkeypatch):
    monkeypatch.setattr(progress.multiprocessing, "parent_process", object)
    assert shown(terminal(140), 500) == f"{TEXT}\n"
