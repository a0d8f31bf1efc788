"""Frozen dataclasses that jax sees as pytrees; fields made with ``static()`` are part of the structure."""

import dataclasses
from typing import Any, TypeVar, dataclass_transform

import jax

_Class = TypeVar("_Class")


def static(**kwargs: Any) -> Any:
    """A field that belongs to the tree's structure: hashable, compared when jit looks for a trace to reuse."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


@dataclass_transform(frozen_default=True, kw_only_default=True, eq_default=False, field_specifiers=(static,))
def pytree(cls: type[_Class]) -> type[_Class]:
    """Class decorator: frozen, keyword-only, registered with jax.

    Equality is identity, because comparing arrays gives arrays. Copy with ``dataclasses.replace``.
    """
    frozen = dataclasses.dataclass(frozen=True, kw_only=True, eq=False)(cls)
    return jax.tree_util.register_dataclass(frozen)
