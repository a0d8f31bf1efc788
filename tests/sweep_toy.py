"""An experiment without arrays, for sweeps to be tried on, in any process: three units of four cells.

SLIMJAX_TOY, JSON, says what goes wrong: {"die": {"SIGNAL": [cells]}, "raise": {"EXCEPTION": [cells]}, "unopened":
SIGNAL, "slow": seconds a cell}. Every cell measured, and every unit opened, is a line in measured.txt beside the run
directory. As a program it is `experiments.run` with this experiment known.
"""

import json
import os
import sys
import time
from pathlib import Path

from experiments import run, settings
from experiments.directory import Refused
from experiments.settings import Forecast, Unit
from slimjax.records import append_line

TITLE = "Toy"
UNITS, CELLS = 3, 4
RAISED = {
    error.__name__: error
    for error in (NotImplementedError, MemoryError, RuntimeError, KeyboardInterrupt, Refused)
}


def behaviour():
    return json.loads(os.environ.get("SLIMJAX_TOY", "{}"))


def resolve(build):
    return build("Train")


def units(config):
    cells = [{"experiment": "toy", "seed": config.seed, "batch": batch} for batch in range(UNITS * CELLS)]
    return [Unit(f"unit{n}", tuple(cells[n * CELLS : (n + 1) * CELLS]), n) for n in range(UNITS)]


def forecast(unit, config):
    refused = behaviour().get("raise", {}).get("NotImplementedError", [])
    return Forecast(
        refused={i: "as foreseen" for i, cell in enumerate(unit.cells) if cell["batch"] in refused}
    )


def prepare(unit, config, directory):
    wrong = behaviour()
    append_line(directory.path.parent / "measured.txt", json.dumps({"open": unit.name, "pid": os.getpid()}))
    if unit.data == 1 and (number := wrong.get("unopened")):
        os.kill(os.getpid(), number)

    def measure(cell):
        batch = cell["batch"]
        append_line(directory.path.parent / "measured.txt", json.dumps({"batch": batch, "pid": os.getpid()}))
        directory.metric({"model": unit.name, "step": batch, "value": "x" * 2000})
        time.sleep(wrong.get("slow", 0.0))
        for number, cells in wrong.get("die", {}).items():
            if batch in cells:
                os.kill(os.getpid(), int(number))
                time.sleep(30)
        for name, cells in wrong.get("raise", {}).items():
            if batch in cells:
                raise RAISED[name](f"toy {batch}")
        return {"count": batch, "perplexity": 1 / (1 + batch)}

    return measure


def report(config, directory, records):
    (directory.path / "report.html").write_text(f"{[record.cell['batch'] for record in records]}")


def known():
    """Make `Run.experiment = 'toy'` mean this module."""
    settings.EXPERIMENTS["toy"] = "sweep_toy"


def seen(folder):
    """The cells measured in a folder's runs, in order."""
    path = Path(folder) / "measured.txt"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line["batch"] for line in lines if "batch" in line]


if __name__ == "__main__":
    known()
    sys.exit(run.main())
