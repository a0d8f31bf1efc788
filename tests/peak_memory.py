"""python peak_memory.py FOLDER...: convert each FOLDER/model by FOLDER/plan.json; print what memory that took.

A line of JSON: for each folder the most bytes of its own that the process held beyond what it held before. The first
conversion also imports and compiles; give a small model first.
"""

import json
import sys
import threading
from pathlib import Path

from slimjax.models.convert import convert_model
from slimjax.models.opened import open_model
from slimjax.solve.planfile import load_plan

STATUS = Path("/proc/self/status")


def held() -> int:
    """Bytes of the process's own; pages of mapped files are the system's to keep or drop."""
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


class Peak(threading.Thread):
    """Looks every half millisecond."""

    def __init__(self):
        super().__init__(daemon=True)
        self.most, self.done = 0, threading.Event()

    def run(self):
        while not self.done.wait(0.0005):
            self.most = max(self.most, held())


def converted(folder: Path) -> int:
    """What one conversion takes, from opening the model and the plan."""
    before, peak = held(), Peak()
    peak.start()
    made = convert_model(
        open_model(folder / "model"), load_plan(folder / "plan.json"), folder / "out", shard_bytes=10**7
    )
    peak.done.set()
    peak.join()
    assert made
    return peak.most - before


if __name__ == "__main__":
    print(json.dumps([converted(Path(folder)) for folder in sys.argv[1:]]))
