"""Records: names from the registries, equal cells refused, nothing written is lost to a torn line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from slimjax.record_names import CELL, METRICS
from slimjax.records import Record, RecordLog, append_line, provenance, read, read_lines


def record(scheme: str = "kv:bf16", **metrics: float) -> Record:
    return Record({"model": "default", "scheme": scheme}, metrics or {"attention_error": 0.5})


def test_names_come_from_the_registries():
    with pytest.raises(ValueError, match=r"cell coordinate 'shceme'; did you mean 'scheme'"):
        Record({"shceme": "kv:bf16"})
    with pytest.raises(ValueError, match=r"metric 'atention_error'; did you mean 'attention_error'"):
        Record({}, {"atention_error": 1.0})


def test_the_registry_is_open(monkeypatch):
    with pytest.raises(ValueError, match="flavour"):
        Record({"flavour": "sweet"})
    monkeypatch.setitem(CELL, "flavour", "a coordinate of a later experiment")
    monkeypatch.setitem(METRICS, "sweetness", "per spoon")
    assert Record({"flavour": "sweet"}, {"sweetness": 2}).metrics["sweetness"] == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1", None, True, [1.0, float("nan")]])
def test_a_metric_is_a_finite_number(value):
    with pytest.raises(ValueError, match=r"attention_error = .* expected a finite number"):
        record(attention_error=value)


def test_samples_stand_beside_their_median():
    assert (
        record(milliseconds=2.0, milliseconds_samples=[1.0, 2.0, 9.0]).metrics["milliseconds_samples"][2]
        == 9.0
    )


def test_status_and_reason_belong_together():
    with pytest.raises(ValueError, match="reason"):
        Record({}, status="refused")
    with pytest.raises(ValueError, match="reason"):
        Record({}, reason="why")
    with pytest.raises(ValueError, match="expected one of ok, refused, failed, out-of-memory"):
        Record({}, status="fine", reason="x")  # type: ignore[arg-type]


def test_round_trip(tmp_path):
    log = RecordLog(tmp_path / "records.jsonl")
    refused = Record({"model": "ö", "extra": 0}, status="refused", reason="layer 0: no\nway")
    log.add(record())
    log.add(refused)
    assert read(tmp_path / "records.jsonl") == [record(), refused]


def test_equal_cells_are_refused_whatever_the_order(tmp_path):
    log = RecordLog(tmp_path / "records.jsonl")
    log.add(record())
    again = Record({"scheme": "kv:bf16", "model": "default"}, {"attention_error": 0.1})
    assert again.cell in log
    with pytest.raises(ValueError, match="second record"):
        log.add(again)
    append_line(log.path, again.to_json())
    with pytest.raises(ValueError, match=r"records.jsonl:2: a second record"):
        read(log.path)


def test_a_torn_last_line_is_passed_over_and_written_over(tmp_path):
    path = tmp_path / "records.jsonl"
    RecordLog(path).add(record("kv:bf16"))
    whole = path.read_bytes()
    line = record("k:int16").to_json().encode()
    for cut in (1, len(line) // 2, len(line)):  # without its newline even a whole line may be half of one
        path.write_bytes(whole + line[:cut])
        assert read(path) == [record("kv:bf16")]
        RecordLog(path).add(record("k:int16"))
        assert read(path) == [record("kv:bf16"), record("k:int16")]


def test_a_bad_line_before_the_last_is_an_error(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text(record().to_json()[:20] + "\n" + record().to_json() + "\n")
    with pytest.raises(ValueError, match=r"records.jsonl:1: not a JSON object"):
        read_lines(path)
    path.write_text('{"cell": {}, "metric": {}}\n')
    with pytest.raises(ValueError, match=r"records.jsonl:1: .*metric"):
        read(path)


def test_provenance_is_plain_data():
    source = provenance(config="0123456789ab", seed=3, seconds=1.23456)
    assert json.loads(json.dumps(source)) == source
    assert {"jax", "jaxlib", "flax", "numpy", "python"} == source["versions"].keys()
    assert source["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert (source["config"], source["seed"], source["seconds"]) == ("0123456789ab", 3, 1.235)
    assert source["date"].endswith("+00:00")
    assert {"git", "dirty", "platform", "device", "cpus", "xla_flags"} <= source.keys()


def test_provenance_names_the_versions_of_further_packages_where_installed():
    versions = provenance(config="0123456789ab", packages=("pytest", "no-such-package"))["versions"]
    assert versions["pytest"] == pytest.__version__
    assert "no-such-package" not in versions
    assert "pytest" not in provenance(config="0123456789ab")["versions"]


def test_processes_that_append_to_one_file_tear_no_lines(tmp_path):
    """Without the lock one would cut away what another is about to finish."""
    path, program = tmp_path / "lines", tmp_path / "program.py"
    program.write_text(
        "import sys; from pathlib import Path; from slimjax.records import append_line\n"
        'for n in range(150): append_line(Path(sys.argv[1]), \'{"n": %d, "x": "%s"}\' % (n, \'x\' * 20000))\n'
    )
    root = str(Path(__file__).parent.parent)
    environment = os.environ | {"PYTHONPATH": root, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, str(program), str(path)]
    processes = [subprocess.Popen(command, env=environment) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert sorted(line["n"] for line in read_lines(path)) == sorted([*range(150), *range(150)])
