"""The tools that compile for a TPU: all that needs no libtpu. tests/tpu has the rest, `make test-tpu` runs it."""

import dataclasses
import functools
import io
import json
import os
import time
from types import SimpleNamespace

import jax
import pytest
import tpu_toys as toys

from experiments import readme, tpu_matrix, tpu_row
from experiments.tpu_row import _last_words, measure
from slimjax.kernels import tpu_aot
from slimjax.kernels.tpu.generations import GENERATIONS, MIB, running
from slimjax.kernels.tpu_aot import TILE_BYTES, Schedule, read_schedule
from slimjax.kernels.tpu_cases import cases
from slimjax.records import read_lines

# As libtpu writes it: a loop over the grid (1-12) with the pipeline's condition (3-11) and three conditions in it,
# one of which holds a loop (7-8).
LISTING = """
LB: loop body
     0   :  { %1 = vsyncpa [#allocation5], 0 } /* sbr.rel is explained elsewhere */
   0x1 LB: > { %s1 = sadd.s32 1, %s0 }
base_bounds: (512, 8)
   0x2   : > { %142 = sbr.rel (%p91_p5) target bundleno = 12 (0xc), region = 28 }
   0x3   : > { %174 = sbr.rel (%p4) target bundleno = 5 (0x5), region = 40  ;;  %v0 = vmov 0.0 }
   0x4   : > { %v1 = vmov 0.0 }
   0x5 PF: > { %12 = sbr.rel (%p2) target bundleno = 10 (0xa), region = 44 }
   0x6   : > { %v2 = vmov 0.0 }
   0x7 LB: >> { %v3 = vmov 0.0 }
   0x8   : >> { %13 = sbr.rel (!%p1) target bundleno = 7 (0x7), region = 89 }
   0x9   : > { %v2 = vmov 0.0 }
   0xa PF: > { %14 = sbr.rel (%p2) target bundleno = 12 (0xc), region = 55 }
   0xb   : > { %v2 = vmov 0.0 }
   0xc PF: > { %16 = sbr.rel (!%p16) target bundleno = 1 (0x1), region = 100 }
   0xd   :  { %2519 = vsyncpa [#allocation4], 1 }
"""


def build_slow(generation):
    time.sleep(60)


def row(kernel="kv", shape="small", generation="v5e", **changes):
    """A row of a kernel that compiled as it should."""
    return {
        "kernel": kernel,
        "shape": shape,
        "generation": generation,
        "status": "compiled",
        "reason": "",
        "vmem_bytes": 4 * MIB,
        "vmem_limit": 16 * MIB,
        "temporary_bytes": 0,
        "copied_bytes": 4,
        "cached_bytes": 256 * MIB,
        "donated_bytes": 0,
        "aliased_bytes": 0,
        "seconds": 1.0,
        "versions": {"jax": "1.2", "libtpu": "0.3"},
        "date": "2026-11-22",
        **changes,
    }


@pytest.mark.parametrize(
    ("generation", "cycles"), [("v4", 56), ("v5e", 60), ("v5p", 41.5), ("v6e", 35), ("v7x", 17)]
)
def test_a_tile_comes_from_hbm_in_the_known_cycles(generation, cycles):
    assert GENERATIONS[generation].hbm_cycles(TILE_BYTES) == pytest.approx(cycles, abs=0.3)


def test_the_generation_in_use_is_found_by_its_devices_name(monkeypatch):
    assert running() is None  # no TPU
    kinds = [kind for found in GENERATIONS.values() for kind in found.kinds]
    assert len(set(kinds)) == len(kinds)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    for kind, found in (
        ("TPU v5 lite", GENERATIONS["v5e"]),
        ("TPU v5", GENERATIONS["v5p"]),
        ("TPU v9", None),
    ):
        monkeypatch.setattr(jax, "devices", lambda kind=kind: [SimpleNamespace(device_kind=kind)])
        assert running() is found


def test_a_schedule_is_read_from_a_listing():
    schedule = read_schedule(LISTING)
    assert schedule == Schedule(total=14, step=12, blocks=(1, 4, 1), loops=((1, 2),))
    assert schedule.steady() == 12 - 2  # the longest block
    assert (
        schedule.steady(0) == schedule.steady(2) == schedule.steady(2, trips=9) == 12 - 5
    )  # no loop in these
    assert schedule.steady(trips=3) == schedule.steady(1, trips=3) == 12 - 2 + 2 * 2
    assert Schedule(total=9, step=9).steady() == 9


def test_a_listing_without_bundles_is_an_error():
    with pytest.raises(RuntimeError, match="no bundles"):
        read_schedule("Schedule analysis:\n")


def test_the_schedule_of_one_kernel_is_found_among_others(tmp_path):
    for name in ("11-kv.1-64", "12-kv_slow.1-64", "13-kv.1-60"):
        text = LISTING if "kv.1" in name else LISTING + "   0xff  :  { %v2 = vmov 0.0 }\n"
        (tmp_path / f"{name}-packed-bundles-post-ra.txt").write_text(text)
    (tmp_path / "11-kv.1-63-schedule-analysis_packed-bundles-post-ra.txt").write_text("")
    assert tpu_aot.scheduled_cycles(tmp_path, "kv").total == 14
    assert tpu_aot.scheduled_cycles(tmp_path, "kv_slow").total == 256
    with pytest.raises(FileNotFoundError, match="no schedule of kernel 'k'"):
        tpu_aot.scheduled_cycles(tmp_path, "k")


def test_without_libtpu_or_before_prepare_it_is_said_what_to_do(monkeypatch):
    for name in tpu_aot.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tpu_aot, "missing", lambda: None)
    with pytest.raises(RuntimeError, match=r"call prepare\(\) before .* TPU_SKIP_MDS_QUERY=1"):
        tpu_aot.compile_for("v5e", abs)
    monkeypatch.setattr(tpu_aot, "missing", lambda: "libtpu is not installed: pip install it")
    with pytest.raises(ImportError, match="pip install"):
        tpu_aot.compile_for("v5e", abs)
    with pytest.raises(ValueError, match="'v3' is none of v4, v5e"):
        tpu_aot.compile_for("v3", abs)


def test_what_a_process_comes_to_is_a_row():
    made = measure(toys.case(toys.build_abort, kernel="bad"), "v4")
    assert (made["kernel"], made["generation"], made["status"]) == ("bad", "v4", "aborted")
    assert made["reason"] == "SIGABRT: Check failed: a type nobody knows"
    assert set(made["versions"]) == {"jax", "libtpu"}

    made = measure(toys.case(toys.build_refused), "v6e")
    assert (made["status"], made["reason"]) == ("refused", "toys do not run on v6e")
    made = measure(toys.case(toys.build_wrong), "v6e")
    assert (made["status"], made["reason"]) == ("failed", "ValueError: a mistake in two lines")
    made = measure(toys.case(build_slow), "v6e", limit=1.0)
    assert (made["status"], made["reason"]) == ("failed", "not compiled after 1 s")
    json.dumps(made)


def test_the_last_words_are_found(tmp_path):
    log = tmp_path / "log"
    assert _last_words(-9, log) == "SIGKILL"
    log.write_text("W0000 00:00:1 1 a.cc:1] a warning\n\n  @ 0x12 the last frame\n")
    assert _last_words(3, log) == "exit status 3: @ 0x12 the last frame"


def test_faults():
    assert tpu_matrix.faults(row()) == []
    assert tpu_matrix.faults(row(status="refused", reason="int8 on v4")) == []
    assert tpu_matrix.faults(row(status="aborted", reason="SIGABRT")) == ["aborted"]
    assert tpu_matrix.faults(row(temporary_bytes=256 * MIB, copied_bytes=256 * MIB)) == ["temporary 256"]
    assert tpu_matrix.faults(row(copied_bytes=256 * MIB)) == ["copies 256"]
    assert tpu_matrix.faults(row(donated_bytes=3 * MIB, aliased_bytes=MIB)) == ["not in place 2"]
    given = row(donated_bytes=MIB, aliased_bytes=MIB, temporary_bytes=32 * MIB)
    assert tpu_matrix.faults(given) == ["temporary 32"]
    assert tpu_matrix.faults(given | {"donated_bytes": 0}) == []  # far from a copy of the cache
    assert tpu_matrix.faults(row(vmem_bytes=17 * MIB)) == ["VMEM 17 of 16"]


def test_the_tables():
    rows = [
        row(cycles=640, tiles=64.0, step_bytes=64 * TILE_BYTES, loops=[], trips=1),
        row(generation="v4", status="refused", reason="int8 products on v4"),
        row("k", generation="v5e", cycles=5000, tiles=64.0, step_bytes=64 * TILE_BYTES, loops=[32], trips=1),
        row("k", generation="v4", status="aborted", reason="SIGABRT: a type"),
    ]
    assert tpu_matrix.table(rows).splitlines() == [
        "| kernel | shape | v4 | v5e |",
        "|---|---|---|---|",
        "| kv | small | refused | 4 / 16 |",
        "| k | small | **aborted** | 4 / 16 |",
        "",
        "* refused: int8 products on v4 (kv small v4)",
        "* aborted: SIGABRT: a type (k small v4)",
    ]
    assert tpu_matrix.cycles_table(rows).splitlines()[2:] == [
        "| kv | small | 10 / 60 |",
        "| k | small | **78+** / 60 |",
    ]
    assert tpu_matrix.cycles_table(rows[1:2]) == ""
    assert tpu_matrix.expected_table(rows[1:2]) == ""
    made = "Compiled without a TPU: 2026-11-22, jax 1.2, libtpu 0.3"
    assert tpu_matrix.versions_line(rows) == f"{made}."
    rows = [*rows, *(row(source="0123abcd") for _ in range(2))]
    wanted = f"{made}; 2026-11-22, jax 1.2, libtpu 0.3, source 0123abcd (2 of 6 rows)."
    assert tpu_matrix.versions_line(rows) == wanted


def test_the_source_of_rows_is_what_modules_do(tmp_path, monkeypatch):
    """Comments and docstrings may change, and nothing else."""
    folder = tmp_path / "kernels"
    folder.mkdir()
    monkeypatch.setattr(tpu_row.slimjax, "__file__", str(tmp_path / "__init__.py"))

    def hashed(text):
        (folder / "tiles.py").write_text(text)
        return tpu_row.kernel_source.__wrapped__()

    first = hashed('"""Short."""\n\n\ndef f(x):\n    """Doc."""\n    return x + 1\n')
    assert hashed('"""Longer."""\n\ndef f(x):\n    # why\n    return x + 1\n') == first
    assert hashed("def f(x):\n    return x + 2\n") != first


def test_what_a_tpu_is_to_show():
    """The longer of schedule and transfer, a token: k caches half the values of kv."""

    def made(kernel, cycles):
        fields = {"tiles": 64.0, "step_bytes": 64 * TILE_BYTES, "loops": [], "trips": 1}
        return row(kernel, "llama-2-7b", "v5e", cycles=cycles, **fields)

    rows = [made("kv:bf16", 640), made("k2:bf16", 640), made("k2:int16 T4", 2 * 64 * 59.94)]
    assert tpu_matrix.expected_table(rows).splitlines()[2:] == [
        "| kv:bf16 | llama-2-7b | 820, 1.00× |",
        "| k2:bf16 | llama-2-7b | 820, 2.00× |",
        "| k2:int16 T4 | llama-2-7b | 410, 1.00× |",
    ]


@pytest.fixture
def measured(monkeypatch):
    """The cases that were measured, in place of measuring them; one named "stop" ends the run."""
    names = []

    def fake(case, generation, *, cycles=False):
        if case.kernel == "stop" and not names.count("stop"):
            names.append("stop")
            raise KeyboardInterrupt
        names.append(f"{case.kernel} {generation}")
        return row(case.kernel, case.shape, generation)

    monkeypatch.setattr(tpu_matrix, "measure", fake)
    return names


def test_a_stopped_run_goes_on_where_it_was(measured, tmp_path):
    asked = [toys.case(toys.build_sum, kernel=name) for name in ("a", "stop", "b")]
    out = tmp_path / "rows.jsonl"
    run = functools.partial(tpu_matrix.run, asked, ["v5e", "v6e"], out, stream=io.StringIO())
    with pytest.raises(KeyboardInterrupt):
        run()
    assert not out.exists()
    rows = run()
    assert measured == ["a v5e", "a v6e", "stop", "stop v5e", "stop v6e", "b v5e", "b v6e"]
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows
    assert os.listdir(tmp_path) == ["rows.jsonl"]
    run()  # a finished run is not gone on with
    assert len(measured) == 7 + 6


def test_rows_of_a_run_with_other_settings_are_not_gone_on_with(measured, tmp_path):
    asked = [toys.case(toys.build_sum, kernel=name) for name in ("a", "stop")]
    with pytest.raises(KeyboardInterrupt):
        tpu_matrix.run(asked, ["v5e"], tmp_path / "rows.jsonl", stream=io.StringIO())
    tpu_matrix.run(asked, ["v5e"], tmp_path / "rows.jsonl", cycles=True, stream=io.StringIO())
    assert measured == ["a v5e", "stop", "a v5e", "stop v5e"]


def test_other_rows_stay_while_their_case_is_there(measured, tmp_path):
    a, b, gone = (toys.case(toys.build_sum, kernel=name) for name in ("a", "b", "gone"))
    out = tmp_path / "rows.jsonl"
    tpu_matrix.run([gone, b, a], ["v6e", "v5e"], out, stream=io.StringIO())
    rows = tpu_matrix.run([b], ["v6e"], out, known=[a, b], stream=io.StringIO())
    assert [tpu_matrix.key(one) for one in rows] == [
        ("a", "small", "v5e"),
        ("a", "small", "v6e"),
        ("b", "small", "v5e"),
        ("b", "small", "v6e"),
    ]


def test_the_command(measured, tmp_path, monkeypatch, capsys):
    given = (toys.case(toys.build_sum, kernel="a"), dataclasses.replace(toys.case(toys.build_sum), ci=True))
    monkeypatch.setattr(tpu_matrix, "cases", lambda: given)
    monkeypatch.setattr(tpu_aot, "missing", lambda: None)
    out = ["--out", str(tmp_path / "rows.jsonl"), "--generations", "v5e"]
    assert tpu_matrix.main([*out, "--kernels", "a"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "1/1  a  small  v5e  compiled  VMEM 4 of 16 MiB  temporary 0 MiB  1.0 s"
    assert "| a | small | 4 / 16 |" in said
    assert tpu_matrix.main([*out, "--ci"]) == 0
    assert measured == ["a v5e", "toy v5e"]


def test_the_command_says_what_it_cannot_do(monkeypatch, capsys):
    for wrong in (["--kernels", "kv8"], ["--generations", "v5"]):
        with pytest.raises(SystemExit):
            tpu_matrix.main(wrong)
    said = capsys.readouterr().err
    assert "error: no kernel 'kv8'" in said
    assert "error: no generation 'v5'" in said
    monkeypatch.setattr(tpu_aot, "missing", lambda: "libtpu is not installed")
    assert tpu_matrix.main([]) == 2
    monkeypatch.setattr(tpu_aot, "missing", lambda: None)
    monkeypatch.setattr(tpu_aot, "versions", lambda: {"jax": "0.10.2", "libtpu": "0.0.52"})
    assert tpu_matrix.main(["--cycles"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "tpu_matrix: libtpu is not installed",
        "tpu_matrix: jax 0.10.2, pinned 0.12.0.1",
    ]


def test_committed_rows_are_those_of_the_cases():
    expected = [(case.kernel, case.shape, name) for case in cases() for name in GENERATIONS]
    assert [tpu_matrix.key(one) for one in read_lines(tpu_matrix.RECORDS)] == expected, "run make tpu-matrix"


def test_a_table_between_markers(tmp_path):
    text = "before\n<!-- table:tpu_matrix/{} -->\nold\n<!-- /table -->\nafter\n"
    with pytest.raises(ValueError, match="no rows"):
        readme.render(text.format("matrix"), tmp_path)
    (tmp_path / "tpu_matrix.jsonl").write_text(json.dumps(row()) + "\n")
    fresh = readme.render(text.format("matrix"), tmp_path)
    assert "old" not in fresh
    assert "| kv | small | 4 / 16 |\n\nCompiled without a TPU" in fresh
    with pytest.raises(ValueError, match="unknown table 'matrx'; did you mean"):
        readme.render(text.format("matrx"), tmp_path)
