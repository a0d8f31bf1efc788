"""A model's parameters by their paths in our modules, read one at a time, whatever the files call them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

Model = TypeVar("Model", bound=nnx.Module)


class Parameters(Protocol):
    """Where parameters come from. A path is the attributes to a parameter: "decoder.0.mlp.up.kernel"."""

    def dtype(self, path: str) -> np.dtype:
        """The dtype that a parameter is stored in."""
        ...

    def file(self, path: str) -> Path:
        """The file with a parameter, for messages."""
        ...

    def read(self, path: str, shape: tuple[int, ...]) -> np.ndarray:
        """A parameter of that shape, in the dtype it is stored in.

        Raises ValueError where it is absent, of another shape or not finite; names file and parameter.
        """
        ...


def abstract(make: Callable[[], Model]) -> Model:
    """The module that ``make`` makes, with shapes in place of parameters."""
    return nnx.eval_shape(make)


def shapes_of(make: Callable[[], nnx.Module]) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of the module that ``make`` makes, in its order; nothing is allocated."""
    state = nnx.state(abstract(make), nnx.Param)
    return {path_of(keys): leaf.shape for keys, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}


def build(make: Callable[[], Model], parameters: Parameters) -> Model:
    """The module that ``make`` makes with parameters read into float32, one at a time."""
    module = abstract(make)
    leaves, structure = jax.tree_util.tree_flatten_with_path(nnx.state(module, nnx.Param))

    def read(keys: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(parameters.read(path_of(keys), leaf.shape).astype(np.float32))

    return nnx.merge(nnx.graphdef(module), structure.unflatten([read(*leaf) for leaf in leaves]))


def path_of(keys: tuple[Any, ...]) -> str:
    """A parameter's path from its keys in a module's state."""
    return ".".join(str(key.key) for key in keys if isinstance(key, jax.tree_util.DictKey))


def finite(rows: np.ndarray, file: Path, name: str) -> np.ndarray:
    """The array itself. Raises ValueError where it holds NaN or infinity."""
    if not np.isfinite(rows.astype(np.float32)).all():
        raise ValueError(f"{file}: tensor {name!r} holds values that are not finite")
    return rows
