"""What a config says, line by line: bindings, the names they may have, and where a fault is to be looked for."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.settings import SECTIONS
from slimjax.config import ConfigError
from slimjax.scheme import suggest


class Fault(Exception):
    """A mistake in a config; the text is the one line the user sees."""


class Line(NamedTuple):
    """A line of config text and where it was written; number 0: on the command line."""

    text: str
    file: str
    number: int

    def fault(self, problem: str) -> Fault:
        return Fault(f"{self.file}:{self.number}: {problem}" if self.number else f"{self.file}: {problem}")


class Binding(NamedTuple):
    """One `scope/section.field = value`; a macro, `name = value`, has an empty field."""

    scope: str
    section: str
    field: str
    value: Any
    line: Line

    @property
    def name(self) -> str:
        return "/".join(filter(None, (self.scope, self.section))) + (f".{self.field}" if self.field else "")


class Macro(str):
    """The name in a value `%name`."""


def macros(value: Any) -> list[Macro]:
    """The macros in a value, however deep."""
    if isinstance(value, dict):
        value = (*value.keys(), *value.values())
    if isinstance(value, tuple | list):
        return [macro for item in value for macro in macros(item)]
    return [value] if isinstance(value, Macro) else []


def check_macros(bound: Sequence[Binding]) -> None:
    """Every macro used must be defined, and none by itself."""
    known = {binding.name for binding in bound if not binding.field} | {"gin.REQUIRED"}
    for binding in bound:
        for macro in macros(binding.value):
            if macro not in known:
                raise binding.line.fault(f"%{macro} is not defined{suggest(macro, known)}")
    last = {binding.name: binding for binding in bound if not binding.field}
    for name, binding in last.items():
        reached, ahead = set[str](), macros(binding.value)
        while ahead:
            if (macro := ahead.pop()) not in reached:
                reached.add(macro)
                ahead += macros(last[macro].value) if macro in last else []
        if name in reached:
            raise binding.line.fault(f"%{name} is defined by itself")


def check_name(binding: Binding) -> None:
    """The section and the field must be known."""
    section, field = binding.section, binding.field
    if not field:
        return  # a macro: whether it is used shows after the build
    if section not in SECTIONS:
        raise binding.line.fault(f"unknown section {section!r}{suggest(section, SECTIONS)}")
    fields = list(inspect.signature(SECTIONS[section]).parameters)
    if field not in fields:
        raise binding.line.fault(f"unknown field {section}.{field}{suggest(field, fields)}")


def located(error: ConfigError, bound: Sequence[Binding], path: Path) -> Fault:
    """The fault at the line that set its field: of several fields that clash, or in several places, the last.

    A scope's own binding counts before the plain one. Where none is bound, what the section has will do.
    """
    scope = error.scope
    last: dict[tuple[str, str], int] = {}  # the line that each field has its value from
    for index, binding in enumerate(bound):
        key = (binding.section, binding.field)
        if binding.scope == scope or (
            not binding.scope and not (key in last and bound[last[key]].scope == scope)
        ):
            last[key] = index
    near = [index for (section, _), index in last.items() if section == error.section]
    exact = [last[key] for key in error.places if key in last]
    name = f"{scope}/{error.section}" if scope else error.section
    problem = f"{name}: {error.problem}" if name else error.problem
    if exact or near:
        return bound[max(exact or near)].line.fault(problem)
    return Fault(f"{path}: {problem}")
