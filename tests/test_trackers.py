"""Trackers are told the metrics, imported when asked for alone, and missed before the run starts."""

import sys
import types

import pytest

from slimjax import trackers
from slimjax.config import ConfigError, TrackingConfig


class Fake(types.ModuleType):
    """Writes down every call; a class of it does too."""

    def __init__(self, name, monkeypatch):
        super().__init__(name)
        self.__spec__ = types.SimpleNamespace(name=name)
        self.calls = []
        monkeypatch.setitem(sys.modules, name, self)

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)

        def call(*arguments, **options):
            self.calls.append((name, arguments, options))
            return self

        return call


def tracked(config, folder, step=0):
    with trackers.tracking(config, folder=folder, name="a-1", values={"x": 1}, step=step) as found:
        for tracker in found:
            tracker.log({"loss": 2.5, "learning_rate": 0.1}, 10)
    return found


@pytest.mark.parametrize("module", ["wandb", "trackio"])
def test_a_run_is_opened_told_and_finished(monkeypatch, tmp_path, module):
    fake = Fake(module, monkeypatch)
    tracked(TrackingConfig(tracker=module, project="p"), tmp_path)
    (init, _, options), log, finish = fake.calls
    assert init == "init"
    assert options.pop("id", None) == ("a-1" if module == "wandb" else None)
    assert options == {"project": "p", "name": "a-1", "config": {"x": 1}, "resume": "allow"}
    assert log == ("log", ({"loss": 2.5, "learning_rate": 0.1},), {"step": 10})
    assert finish == ("finish", (), {})


@pytest.mark.parametrize(("step", "hidden_from"), [(0, None), (7, 8)])
def test_tensorboard_hides_what_is_done_again(monkeypatch, tmp_path, step, hidden_from):
    fake = Fake("tensorboardX", monkeypatch)
    tracked(TrackingConfig(tensorboard=True), tmp_path, step)
    assert fake.calls == [
        ("SummaryWriter", (str(tmp_path),), {"purge_step": hidden_from}),
        ("add_scalar", ("loss", 2.5, 10), {}),
        ("add_scalar", ("learning_rate", 0.1, 10), {}),
        ("flush", (), {}),
        ("close", (), {}),
    ]


def test_they_are_finished_when_the_work_fails(monkeypatch, tmp_path):
    fakes = [Fake("tensorboardX", monkeypatch), Fake("wandb", monkeypatch)]
    config = TrackingConfig(tensorboard=True, tracker="wandb")
    opened = trackers.tracking(config, folder=tmp_path, name="a", values={})
    with pytest.raises(ZeroDivisionError), opened:
        1 / 0  # noqa: B018
    assert [fake.calls[-1][0] for fake in fakes] == ["close", "finish"]


def test_nothing_is_imported_unasked(monkeypatch, tmp_path):
    for name in trackers.EXTRAS:
        monkeypatch.setitem(sys.modules, name, None)
    trackers.check(TrackingConfig())
    assert tracked(TrackingConfig(), tmp_path) == []


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            TrackingConfig(tensorboard=True),
            r"tensorboard = True: tensorboardX is not.*slimjax\[tensorboard\]",
        ),
        (TrackingConfig(tracker="trackio"), r"tracker = 'trackio': trackio is not.*slimjax\[trackers\]"),
    ],
)
def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch, config, message):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=message):
        trackers.check(config)
