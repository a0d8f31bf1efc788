"""python -m experiments.readme [--check]: write the tables of the READMEs from the committed records.

A table stands between `<!-- table:RECORDS/NAME -->` and `<!-- /table -->`: RECORDS is a file of
experiments/records/, NAME one of its report's tables, or `findings`, or `plot_` and one of its plots, which is
drawn beside the records. --check changes nothing and exits with 1 if a README is stale.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments import tpu_matrix
from slimjax import records, report
from slimjax.scheme import suggest

ROOT = Path(__file__).parent.parent
FILES = tuple(
    ROOT / name for name in ("README.md", "experiments/README.md", "experiments/ABLATION.md", "TPU_NOTES.md")
)
GPU = "gpu_"  # records of a part of `make gpu`
PLOT, DPI = "plot_", 140
MARKED = re.compile(
    r"(<!-- table:(?P<source>[\w-]+)/(?P<name>[\w-]+) -->\n)(?P<body>.*?)(<!-- /table -->)", re.S
)


def render(text: str, folder: Path = ROOT / "experiments" / "records", *, draw: bool = False) -> str:
    """The text with every marked table as its records have it; ``draw``: marked plots are drawn anew.

    A part of `make gpu` without records is said to be not run.

    Raises ValueError for an unknown table or plot, or any other file without records.
    """

    def fresh(match: re.Match[str]) -> str:
        if match["source"] == tpu_matrix.RECORDS.stem:  # rows of another kind
            path = folder / tpu_matrix.RECORDS.name
            return f"{match[1]}{tpu_matrix.rendered(path, match['name'])}{match[5]}"
        found = records.read(folder / f"{match['source']}.jsonl")
        if not found and match["source"].startswith(GPU):
            part = match["source"].removeprefix(GPU)
            return f"{match[1]}Not run: no GPU was at hand. `make gpu PART={part}` runs it.\n{match[5]}"
        if not found:
            raise ValueError(f"{folder / match['source']}.jsonl: no records")
        if match["name"].startswith(PLOT):
            target = folder / f"{match['source']}_{match['name'].removeprefix(PLOT)}.png"
            return f"{match[1]}{_plot(found, match['name'].removeprefix(PLOT), target, draw)}{match[5]}"
        return f"{match[1]}{_body(found, match['name'])}{match[5]}"

    return MARKED.sub(fresh, text)


def _plot(found: Sequence[records.Record], name: str, target: Path, draw: bool) -> str:
    """An image and its caption."""
    made = report.report_plots(found)
    if name not in made and target.name.startswith(GPU):  # of a run with one context
        return "Not drawn: these records have nothing to draw.\n"
    if name not in made:
        raise ValueError(f"unknown plot {name!r}{suggest(name, made)}")
    caption, figure = made[name]
    if draw:
        figure.savefig(target, dpi=DPI, facecolor="white")
    return f"![{caption}]({target.parent.name}/{target.name})\n"


def _body(found: Sequence[records.Record], name: str) -> str:
    if name == "findings":
        return (
            "\n".join(f"* {report.tables.plain_markdown(sentence)}" for sentence in report.findings(found))
            + "\n"
        )
    made = report.report_tables(found)
    if name not in made:
        raise ValueError(f"unknown table {name!r}{suggest(name, made)}")
    table = made[name]
    below = report.tables.plain_markdown(f"{table.note} {report.facts(found)}.".strip())
    return f"{report.tables.markdown(table)}\n{below}\n"


def stale(path: Path) -> str | None:
    """Why a README is not what its records say, or None if it is."""
    text = path.read_text(encoding="utf-8")
    if not MARKED.search(text):
        return f"{path}: no table markers"
    for name in re.findall(r"\]\((records/[^)]*)\)", text):
        if not (path.parent / name).exists():
            return f"{path}: {name} is missing, run python -m experiments.readme"
    return None if render(text) == text else f"{path}: stale, run python -m experiments.readme"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the tables, or with --check only look."""
    parser = argparse.ArgumentParser(prog="python -m experiments.readme", description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="change nothing, exit with 1 if a README is stale"
    )
    check = parser.parse_args(argv).check
    problems = []
    for path in FILES:
        if check:
            problems.append(stale(path))
        else:
            path.write_text(render(path.read_text(encoding="utf-8"), draw=True), encoding="utf-8")
    problems = [problem for problem in problems if problem]
    print("\n".join(problems), file=sys.stderr, end="\n" if problems else "")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
