"""The README keeps its promises: its code runs, its tables are what the records say."""

import re
from pathlib import Path

import pytest

from experiments import readme

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def test_there_is_code():
    assert len(BLOCKS) >= 2


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[-1][:20])
def test_code_runs(block, capsys):
    exec(compile(block, "README.md", "exec"), {})  # noqa: S102  our own README
    said = re.search(r"# (\d+) bytes", block)
    if said:
        assert said[1] in capsys.readouterr().out


@pytest.mark.parametrize(
    "path",
    readme.FILES,
    ids=lambda path: path.name if path.parent == readme.ROOT else path.parent.name + path.name,
)
def test_tables_are_what_the_records_say(path):
    assert readme.stale(path) is None


def test_paths_in_the_map_exist():
    section = (ROOT / "README.md").read_text().split("## Map")[1].split("## Add")[0]
    for name in re.findall(r"`((?:slimjax|experiments|configs|tests)/[\w/.]*)`", section):
        assert (ROOT / name).exists(), name
