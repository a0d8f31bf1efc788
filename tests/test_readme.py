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


def test_a_marked_plot_is_drawn_beside_its_records(tmp_path):
    text = "<!-- table:decode_contexts/plot_bandwidth -->\n<!-- /table -->"
    source = ROOT / "experiments" / "records" / "decode_contexts.jsonl"
    (tmp_path / source.name).write_text(source.read_text())
    target = tmp_path / "decode_contexts_bandwidth.png"
    wanted = f"]({tmp_path.name}/{target.name})\n<!-- /table -->"
    assert readme.render(text, tmp_path).endswith(wanted)
    assert not target.exists()
    assert readme.render(text, tmp_path, draw=True).endswith(wanted)
    assert target.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="unknown plot 'bandwith'; did you mean 'bandwidth'"):
        readme.render(text.replace("bandwidth", "bandwith"), tmp_path)
    assert "Not run" in readme.render(text.replace("decode_contexts", "gpu_decode"), tmp_path)
