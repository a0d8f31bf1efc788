"""python -m experiments.tpu_matrix: compile every kernel for every generation of TPU, without a TPU.

One line of JSON a case and generation, then two tables. Each is compiled in a process of its own, so that a case
that aborts its compiler is a row as well. A run that is stopped goes on where it was.
"""

import argparse
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from experiments.directory import source_hash, write_text
from experiments.tpu_row import Row, kernel_source, measure
from slimjax.attention.bases import basis
from slimjax.kernels import tpu_aot
from slimjax.kernels.shapes import SHAPES
from slimjax.kernels.tpu.generations import GENERATIONS, MIB
from slimjax.kernels.tpu_cases import Case, cases
from slimjax.records import append_line, read_lines
from slimjax.scheme import suggest

RECORDS = Path(__file__).parent / "records" / "tpu_matrix.jsonl"
BAD = ("failed", "aborted")
PLAIN = "kv:bf16"  # what others are compared with
OWN = MIB  # bytes; one that writes into the cache that it is given needs fewer beside it


# Running -----------------------------------------------------------------------------------------------------


def key(row: Row) -> tuple[str, str, str]:
    """What makes two rows the same."""
    return row["kernel"], row["shape"], row["generation"]


def run(
    asked: Sequence[Case],
    generations: Sequence[str],
    out: Path,
    *,
    cycles: bool = False,
    known: Sequence[Case] = (),
    stream: TextIO | None = None,
) -> list[Row]:
    """Measure the cases, write `out` by rename, and return all its rows.

    Rows are kept in a second file while the run lasts; one that was stopped goes on from it, unless the source or
    the versions changed. Of the rows that `out` has already, those of `known` cases that were not asked for stay.
    """
    todo = [(case, generation) for case in asked for generation in generations]
    part = out.with_name(out.name + ".running")
    stamp = {"source": source_hash(), "versions": tpu_aot.versions(), "cycles": cycles}
    done = _resumed(part, stamp)
    for number, (case, generation) in enumerate(todo, start=1):
        name = (case.kernel, case.shape, generation)
        if name not in done:
            done[name] = measure(case, generation, cycles=cycles)
            append_line(part, json.dumps(done[name]))
        print(f"{number}/{len(todo)}  {_line(done[name])}", file=stream or sys.stdout, flush=True)
    fresh = {name: done[name] for name in ((c.kernel, c.shape, g) for c, g in todo)}
    rows = _ordered({key(row): row for row in read_lines(out)} | fresh, [*known, *asked])
    write_text(out, "".join(json.dumps(row) + "\n" for row in rows))
    part.unlink(missing_ok=True)
    return rows


def _resumed(part: Path, stamp: Row) -> dict[tuple[str, str, str], Row]:
    """The rows of a run that was stopped, if it was this one; the file then starts with its stamp."""
    lines = read_lines(part)
    if lines[:1] == [stamp]:
        return {key(row): row for row in lines[1:]}
    part.unlink(missing_ok=True)
    part.parent.mkdir(parents=True, exist_ok=True)
    append_line(part, json.dumps(stamp))
    return {}


def faults(row: Row) -> list[str]:
    """What is wrong with a row, in words; nothing with a kernel that compiled as it should, or was refused."""
    if row["status"] != "compiled":
        return [row["status"]] if row["status"] in BAD else []
    found, cached = [], row["cached_bytes"]
    most = min(cached, OWN) if row["donated_bytes"] else cached
    if row["vmem_bytes"] > row["vmem_limit"]:
        found.append(f"VMEM {_mib(row['vmem_bytes'])} of {_mib(row['vmem_limit'])}")
    if cached and row["temporary_bytes"] >= most:
        found.append(f"temporary {_mib(row['temporary_bytes'])}")
    elif cached and row["copied_bytes"] >= cached and not 0 < row["donated_bytes"] <= row["aliased_bytes"]:
        found.append(f"copies {_mib(row['copied_bytes'])}")
    if row["aliased_bytes"] < row["donated_bytes"]:
        found.append(f"not in place {_mib(row['donated_bytes'] - row['aliased_bytes'])}")
    return found


def over_floor(row: Row) -> bool:
    """Whether the schedule of a step takes longer than its bytes from HBM: arithmetic decides, and not memory."""
    return row["cycles"] > GENERATIONS[row["generation"]].hbm_cycles(row["step_bytes"])


def _ordered(rows: dict[tuple[str, str, str], Row], known: Sequence[Case]) -> list[Row]:
    """Those of known cases, in the order of the cases and generations."""
    names = dict.fromkeys((case.kernel, case.shape, name) for case in known for name in GENERATIONS)
    return [rows[name] for name in names if name in rows]


def _line(row: Row) -> str:
    """A row as progress."""
    text = f"{row['kernel']}  {row['shape']}  {row['generation']}  {row['status']}"
    if row["status"] == "compiled":
        text += f"  VMEM {_mib(row['vmem_bytes'])} of {_mib(row['vmem_limit'])} MiB"
        text += f"  temporary {_mib(row['temporary_bytes'])} MiB"
    if row.get("cycles"):
        text += f"  {row['cycles']} cycles a step"
    return f"{text}  {row['seconds']:.1f} s" + (f"  {row['reason']}" if row["reason"] else "")


# Tables ------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """What became of each, in Markdown: VMEM used / its limit in MiB, faults in bold, and every reason."""
    below = "".join(f"* {line}\n" for line in _reasons(rows))
    return _grid(rows, _fate) + (f"\n{below}" if below else "")


def cycles_table(rows: Sequence[Row]) -> str:
    """Scheduled cycles beside the cycles in which the same bytes come from HBM, in Markdown; "" where there are none.

    For a 128x128 tile of cached values where the case says how many a step works on, otherwise for the step.
    """
    found = [row for row in rows if row.get("cycles")]
    return _grid(found, _pace) if found else ""


def expected_table(rows: Sequence[Row]) -> str:
    """What decoding on a TPU is to show if these schedules hold, in Markdown.

    The longer of the schedule's time and the bytes' time for a cached token: the GB/s of a chip's HBM that it takes,
    and how many times faster it is than keys and values in bfloat16 of the same shape.
    """
    found = [row for row in rows if row.get("cycles") and row["step_bytes"] and row["tiles"]]
    plain = {(row["shape"], row["generation"]): row for row in found if row["kernel"] == PLAIN}

    def cell(row: Row) -> str:
        here = GENERATIONS[row["generation"]]
        rate = here.cores * row["step_bytes"] / (_step_cycles(row) / here.clock)
        beside = plain.get((row["shape"], row["generation"]))
        faster = "" if beside is None else f", {_token_cycles(beside) / _token_cycles(row):.2f}×"
        return f"{rate / 1e9:,.0f}{faster}"

    return _grid(found, cell) if found else ""


def _step_cycles(row: Row) -> float:
    return max(row["cycles"], GENERATIONS[row["generation"]].hbm_cycles(row["step_bytes"]))


def _token_cycles(row: Row) -> float:
    """Of a cached token: as many values as the scheme caches of it."""
    spec = SHAPES[row["shape"]].spec(row["kernel"].split()[0], "bfloat16")
    values = sum(math.prod(each) for each in basis(spec).streams(spec).values())
    return _step_cycles(row) / row["tiles"] * values / 128**2


def _grid(rows: Sequence[Row], cell: Callable[[Row], str]) -> str:
    shown = [name for name in GENERATIONS if any(row["generation"] == name for row in rows)]
    lines = [f"| kernel | shape | {' | '.join(shown)} |", "|---" * (2 + len(shown)) + "|"]
    of = {key(row): row for row in rows}
    for kernel, shape in dict.fromkeys((row["kernel"], row["shape"]) for row in rows):
        found = (of.get((kernel, shape, name)) for name in shown)
        cells = [cell(row) if row else "" for row in found]
        lines.append(f"| {kernel} | {shape} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _fate(row: Row) -> str:
    if row["status"] == "refused":
        return "refused"
    sizes = [f"{_mib(row['vmem_bytes'])} / {_mib(row['vmem_limit'])}"] if row["status"] == "compiled" else []
    return ", ".join(sizes + [f"**{fault}**" for fault in faults(row)])


def _pace(row: Row) -> str:
    """Cycles / HBM cycles; bold where the schedule is the longer. A + marks loops that are counted once."""
    tiles = row["tiles"] or 1
    text = f"{row['cycles'] / tiles:.0f}{'+' if row['loops'] and row['trips'] == 1 else ''}"
    if not row["step_bytes"]:
        return text
    floor = GENERATIONS[row["generation"]].hbm_cycles(row["step_bytes"])
    return f"{f'**{text}**' if over_floor(row) else text} / {floor / tiles:.0f}"


def _reasons(rows: Sequence[Row]) -> list[str]:
    """Each reason once, behind all it is the reason of."""
    of: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["reason"]:
            of.setdefault((row["status"], row["reason"]), []).append(
                f"{row['kernel']} {row['shape']} {row['generation']}"
            )
    return [f"{status}: {reason} ({', '.join(names)})" for (status, reason), names in of.items()]


def _mib(size: int) -> str:
    return f"{size / MIB:.1f}".removesuffix(".0") if size >= MIB / 20 or not size else "<0.1"


def versions_line(rows: Sequence[Row]) -> str:
    """What made the rows, when, and how many of which source; those from before sources were noted tell none."""

    def said(row: Row) -> str:
        versions = "".join(f", {name} {found}" for name, found in row["versions"].items())
        return row["date"] + versions + (f", source {row['source']}" if "source" in row else "")

    def counted(text: str, many: int) -> str:
        return f"{text} ({many} of {len(rows)} rows)" if "source" in text else text

    made = Counter(map(said, rows))
    return f"Compiled without a TPU: {'; '.join(counted(*each) for each in made.items())}."


def rendered(path: Path, name: str) -> str:
    """A table of the committed rows, and what made them: `matrix`, `cycles` or `expected`, else ValueError."""
    rows, made = read_lines(path), {"matrix": table, "cycles": cycles_table, "expected": expected_table}
    if not rows:
        raise ValueError(f"{path}: no rows")
    if name not in made:
        raise ValueError(f"unknown table {name!r}{suggest(name, made)}")
    return f"{made[name](rows)}\n{versions_line(rows)}\n"


# The command -------------------------------------------------------------------------------------------------


def chosen(kernels: str | None, generations: Sequence[str], *, ci: bool = False) -> list[Case]:
    """The cases of those kernels, None: of all. Raises ValueError for a name that is not known."""
    names = None if kernels is None else kernels.split(",")
    for kind, given, known in (
        ("kernel", names or (), {case.kernel for case in cases()}),
        ("generation", generations, GENERATIONS),
    ):
        for name in given:
            if name not in known:
                raise ValueError(f"no {kind} {name!r}{suggest(name, known)}")
    return [case for case in cases() if (names is None or case.kernel in names) and (case.ci or not ci)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; 1 where a row has a fault, 2 where nothing can be run."""
    parser = argparse.ArgumentParser(prog="python -m experiments.tpu_matrix", description=__doc__)
    parser.add_argument("--out", type=Path, default=RECORDS, help="the rows, %(default)s")
    parser.add_argument("--generations", default=",".join(GENERATIONS), help="%(default)s")
    parser.add_argument("--kernels", help="names, with commas between; all if not given")
    parser.add_argument(
        "--cycles", action="store_true", help="also read the schedules (a row made anew without has none)"
    )
    parser.add_argument("--ci", action="store_true", help="only the cases that are compiled in every CI run")
    options = parser.parse_args(argv)
    generations = options.generations.split(",")
    try:
        asked = chosen(options.kernels, generations, ci=options.ci)
    except ValueError as error:
        parser.error(str(error))
    problem = tpu_aot.missing() or (tpu_aot.unpinned() if options.cycles else None)
    if problem:
        print(f"tpu_matrix: {problem}", file=sys.stderr)
        return 2
    os.environ["JAX_PLATFORMS"] = "cpu"  # for the process that the others are forked from
    rows = run(asked, generations, options.out, cycles=options.cycles, known=cases())
    print("\n".join(filter(None, ("", table(rows), cycles_table(rows), versions_line(rows)))))
    present = sum(row.get("source") == kernel_source() for row in rows)
    print(f"{present} of {len(rows)} rows are of the present source, {kernel_source()}.")
    return 1 if any(faults(row) for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
