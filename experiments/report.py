"""python -m experiments.report RUN... --out DIR: rebuild a report from records alone; nothing is measured.

RUN is a run directory or a file of records (records.jsonl). Several runs are joined into one report: equal cells of
different seeds give mean, spread and n; equal cells of the same seed are refused. --compare A B puts two runs side by
side instead. A run still at work can be reported: what is missing is shown as missing.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from slimjax.report import load, write_comparison, write_joined


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, as the head of this file has it."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run directory or file of records")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="two runs side by side")
    parser.add_argument("--out", required=True, type=Path, help="folder for report.html, tables/ and plots/")
    parser.add_argument("--title", default="", help="the report's title (default: by experiment)")
    options = parser.parse_args(argv)
    if bool(options.runs) == bool(options.compare):
        parser.error("expected either runs (RUN...) or --compare A B")
    return options


def check_out(folder: Path) -> None:
    """Raises ValueError if `folder` is in the way: not a folder, or one with files that no report made."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: not a folder")
    kept = sorted(child.name for child in folder.iterdir()) if folder.exists() else []
    if kept and "report.html" not in kept:
        raise ValueError(
            f"{folder}: holds {kept[0]!r} but no report; give an empty folder or an earlier report's"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 wrong arguments or records."""
    options = arguments(argv)
    try:
        check_out(options.out)
        runs = [load(path) for path in options.compare or options.runs]
        if options.compare:
            path = write_comparison(options.out, *runs, title=options.title)
        else:
            path = write_joined(options.out, runs, title=options.title)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"report: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
