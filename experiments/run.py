"""python -m experiments.run CONFIG [--set 'Section.field = value']... [--out DIR] [--jobs N] [--dry-run]
                             [--resume | --no-resume | --reuse] [--retry]

Reads a gin config, checks it whole before anything runs, and runs the experiment it names. The only file
that imports gin. gin never sees a file: includes are put in place here, confined to the config folder, and
only text that parses to plain bindings of known fields is handed over, so a config cannot import or call.
"""

import argparse
import functools
import os
import sys
import tokenize
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn

import gin
from gin import config_parser
from gin.config_parser import BindingStatement, BlockDeclaration, IncludeStatement

from experiments.bindings import Binding, Fault, Line, Macro, check_macros, check_name, located
from experiments.directory import DISK, Refused
from experiments.estimate import check_sane, cost, estimate, listing
from experiments.launch import cells_of, checked_units, launch
from experiments.settings import SECTIONS, Plan, RunConfig, load_experiment
from experiments.stopping import GO_ON, Terminated, hush_late_writes, terminable
from slimjax.config import ConfigError, canonical_json
from slimjax.scheme import suggest

# Reading: text -> lines -> bindings -----------------------------------------------------------------------


class _ValuesOnly(config_parser.ParserDelegate):
    """Lets literals and %macros through; an @reference would hand gin something to call."""

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> NoReturn:
        raise SyntaxError(f"@{scoped_configurable_name}: references are not allowed, only values")

    def macro(self, macro_name: str) -> Any:
        return Macro(macro_name)


def parse(lines: Sequence[Line]) -> list[Any]:
    """The statements of some lines, by gin's own grammar; nothing is evaluated but literals."""
    statements: list[Any] = []
    try:
        statements.extend(config_parser.ConfigParser("\n".join(line.text for line in lines), _ValuesOnly()))
    except (SyntaxError, tokenize.TokenError, ValueError, RecursionError, MemoryError) as error:
        last = statements[-1].location.line_num if statements else 1
        problem = str(error.args[0]).splitlines()[0].partition(": <")[0]  # without the address of an object
        raise lines[min(_line_number(error, last), len(lines)) - 1].fault(problem) from None
    return statements


def _line_number(error: Exception, default: int) -> int:
    """Where a parser found its fault: (text, gin's Location), (text, (row, column)), (text, (file, row, ...))."""
    place = error.args[1] if len(error.args) > 1 else ()
    numbers = [part for part in place[:2] if isinstance(part, int)] if isinstance(place, tuple) else []
    return max(numbers[0], 1) if numbers else default


def gather(path: Path, root: Path, above: tuple[Path, ...] = ()) -> list[Line]:
    """The lines of a config with its includes in place; an include is found beside the file that names it."""
    real = path.resolve()
    try:
        text = real.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Fault(f"{path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None
    lines = [Line(part, str(path), number) for number, part in enumerate(text.split("\n"), start=1)]
    _check_plain(lines)
    for statement in reversed(parse(lines)):  # from the end, so that earlier line numbers stay true
        index = statement.location.line_num - 1
        if isinstance(statement, IncludeStatement):
            target = path.parent / statement.filename
            _check_include(lines[index], target, root, (*above, real))
            lines[index : index + 1] = gather(target, root, (*above, real))
    return lines


def _check_include(line: Line, target: Path, root: Path, above: Sequence[Path]) -> None:
    real = target.resolve()  # where a link leads counts
    if not real.is_relative_to(root):
        raise line.fault(f"include of {target}, which is outside the config folder {root}")
    if not real.is_file():
        raise line.fault(f"include of {target}, which is not a file")
    if real in above:
        raise line.fault(f"include of {target}, which includes this file")


def overriding(texts: Sequence[str]) -> list[Line]:
    """The lines of --set, each a whole statement of its own."""
    lines = [Line(text, f"--set {text!r}", 0) for text in texts]
    _check_plain(lines)
    for line in lines:
        if len(parse([line])) != 1:
            raise line.fault("expected one 'Section.field = value'")
    return [Line(text, "--set", 0) for text in ("", "# Given with --set:") if lines] + lines


def _check_plain(lines: Sequence[Line]) -> None:
    """A line must be one line to every reader of it, or a fault would be reported, or checked, elsewhere."""
    for line in lines:
        if any(ord(letter) < 32 and letter != "\t" for letter in line.text):
            raise line.fault("control character")


def bindings(lines: Sequence[Line]) -> list[Binding]:
    """The bindings of the gathered lines. Raises Fault at anything else, an unknown name, or a repeated one."""
    found: dict[tuple[str, str], Binding] = {}
    for statement in parse(lines):
        line = lines[statement.location.line_num - 1]
        if isinstance(statement, BlockDeclaration):
            continue  # the bindings under it follow as statements of their own
        if not isinstance(statement, BindingStatement):
            raise line.fault(
                f"only 'Section.field = value' lines and includes are allowed, not {line.text.strip()!r}"
            )
        scope, section, field, value, _ = statement
        binding = Binding(scope or "", section, field or "", value, line)
        check_name(binding)
        place = line.file if line.number else ""  # every --set is one place
        if (binding.name, place) in found:
            raise line.fault(f"{binding.name} is bound twice {'in one file' if place else 'by --set'}")
        found[binding.name, place] = binding
    check_macros(list(found.values()))
    return list(found.values())


def standing(lines: Sequence[Line]) -> str:
    """The text of checked lines without the bindings that later ones replace: of the same values, in one file."""
    kept = {number: line.text for number, line in enumerate(lines)}
    later: set[str] = set()
    in_block = False  # whether the block that is being read, from its end, keeps a binding
    for statement in reversed(parse(lines)):
        start = statement.location.line_num - 1
        if isinstance(statement, BlockDeclaration):
            if not in_block:
                del kept[start]
            in_block = False
            continue
        name = f"{statement.scope or ''}/{statement.selector}.{statement.arg_name or ''}"
        if name in later:
            for number in range(start, _end(lines, start)):
                del kept[number]
        in_block |= name not in later and kept[start][:1].isspace()
        later.add(name)
    return "\n".join(kept.values()).rstrip("\n") + "\n"


def _end(lines: Sequence[Line], start: int) -> int:
    """The index after the last line of the statement that begins at a line."""
    rest = iter([line.text + "\n" for line in lines[start:]])
    tokens = tokenize.generate_tokens(lambda: next(rest, ""))
    return start + next(token.end[0] for token in tokens if token.type == tokenize.NEWLINE)


# Building: bindings -> frozen configs ---------------------------------------------------------------------


def load(path: Path, overrides: Sequence[str] = ()) -> Plan:
    """Read, check and build a config. Raises Fault; when it returns, every value is checked and every binding used."""
    real = path.resolve()
    root = next((folder for folder in real.parents if folder.name == "configs"), real.parent)
    lines = gather(path, root) + overriding(overrides)
    bound = bindings(lines)
    source = standing(lines)
    gin.clear_config()
    try:
        for name in SECTIONS:
            _configurable(name)
        gin.parse_config(source, skip_unknown=False)
        gin.finalize()
    except (ValueError, SyntaxError) as error:  # a %gin.REQUIRED left open
        raise Fault(f"{path}: {str(error).strip().splitlines()[0]}") from None

    build = _Build(bound, path)
    run: RunConfig = build("Run")
    experiment = load_experiment(run.experiment)
    try:
        config = experiment.resolve(build)
    except ConfigError as error:
        raise located(error, bound, path) from None
    operative = gin.operative_config_str()
    _check_used(bound, operative)
    return Plan(
        experiment, run.experiment, config, source, operative, lambda error: located(error, bound, path)
    )


class _Build:
    """See `experiments.settings.Build`."""

    def __init__(self, bound: Sequence[Binding], path: Path):
        self._bindings, self._path = bound, path
        self.bound: Collection[str] = {binding.name for binding in bound}

    def __call__(self, section: str, scope: str = "") -> Any:
        try:
            with gin.config_scope(scope or None):
                return _configurable(section)()
        except ConfigError as error:
            error.section, error.scope = section, scope
            raise located(error, self._bindings, self._path) from None


@functools.cache
def _configurable(section: str) -> Any:
    return gin.external_configurable(SECTIONS[section], name=section, module="slimjax")


def _check_used(bound: Sequence[Binding], operative: str) -> None:
    """Every binding must have reached a config that was built."""
    used = {
        (statement.scope or "", statement.selector, statement.arg_name or "")
        for statement in parse([Line(text, "operative config", 0) for text in operative.split("\n")])
        if isinstance(statement, BindingStatement)
    }
    scopes = {scope for scope, _, _ in used if scope}
    own = {(binding.scope, binding.section, binding.field) for binding in bound}
    for binding in bound:
        _, section, field = key = (binding.scope, binding.section, binding.field)
        reached = {
            scope
            for scope in scopes
            if (scope, section, field) in used and (scope, section, field) not in own
        }
        if key not in used and not (reached and not binding.scope):
            hint = suggest(binding.scope, scopes) if binding.scope and binding.scope not in scopes else ""
            raise binding.line.fault(f"{binding.name} is bound but never used{hint}")


# Running --------------------------------------------------------------------------------------------------


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, as the head of this file has it."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.run", description="Run the experiment of a config."
    )
    parser.add_argument("config", type=Path, help="a .gin file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="'Section.field = value'", help="bind over it"
    )
    parser.add_argument("--out", type=Path, help="run directory (default: results/EXPERIMENT/RUN_ID)")
    parser.add_argument(
        "--jobs", type=int, default=0, metavar="N", help="work in N processes (default: in this one)"
    )
    parser.add_argument("--dry-run", action="store_true", help="check, print the config and the cells, stop")
    going_on = parser.add_mutually_exclusive_group()
    going_on.add_argument(
        "--resume", action=argparse.BooleanOptionalAction, default=True, help="go on where it stopped"
    )
    going_on.add_argument(
        "--reuse",
        action="store_true",
        help="go on with results of other code, versions or data, and say so in them",
    )
    parser.add_argument(
        "--retry", action="store_true", help="measure cells again that failed or ran out of memory"
    )
    options = parser.parse_args(argv)
    if options.jobs < 0:
        parser.error(f"--jobs {options.jobs}: expected a number of processes, or 0 for this one")
    if options.retry and not options.resume:
        parser.error("--retry goes on with a run, --no-resume starts over: expected one of them")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 a cell failed, 2 refused, 130 interrupted, 141 output closed, 143 terminated."""
    options = arguments(argv)
    try:
        status = _ended(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # `| head` has read enough; what is left goes nowhere, at exit too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not options.dry_run:
            print(f"standard output was closed; {GO_ON}", file=sys.stderr)
        return 141


def _ended(options: argparse.Namespace) -> int:
    """`_start`, with the ends that a user or a machine makes of it."""
    try:
        with terminable():
            return _start(options)
    except (Fault, Refused) as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in DISK:
            raise
        print(f"error: {error}; that mended, the same command goes on", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted; {GO_ON}", file=sys.stderr)
        return 130
    except Terminated:
        print(f"terminated; {GO_ON}", file=sys.stderr)
        return 143


def _start(options: argparse.Namespace) -> int:
    if options.jobs > 1:  # before anything starts a backend: the processes share an accelerator's memory
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    plan = load(options.config, options.set)
    units = checked_units(plan)
    found = estimate(plan.experiment, units, plan.config)
    check_sane(found)
    inputs = plan.checked()
    print(f"{plan.name} {plan.run}: {found}", flush=True)
    if price := cost(found):
        print(price, flush=True)
    if options.dry_run:
        print(canonical_json(plan.resolved) + listing(cells_of(units), found.refused))
        return 0
    return launch(
        plan,
        options.out,
        resume=options.resume,
        reuse=options.reuse,
        retry=options.retry,
        jobs=options.jobs,
        inputs=inputs,
    )


if __name__ == "__main__":
    hush_late_writes()
    sys.exit(main())
