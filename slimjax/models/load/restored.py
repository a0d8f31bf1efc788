"""The parameters of a checkpoint of a decoder that was trained here."""

import functools
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from slimjax.models.load.parameters import finite, path_of
from slimjax.pretrained import Pretrained, restore


class RestoredParameters:
    """All of them are restored, and verified, when the first is asked for: checkpoints are read whole.

    Raises (then) ValueError where the checkpoint is damaged or not what its model.json says.
    """

    def __init__(self, found: Pretrained):
        self.found = found

    @functools.cached_property
    def _arrays(self) -> dict[str, jax.Array]:
        state = nnx.state(restore(self.found), nnx.Param)
        return {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}

    def dtype(self, path: str) -> np.dtype:
        return np.dtype(self._arrays[path].dtype)

    def file(self, path: str) -> Path:
        return self.found.folder

    def read(self, path: str, shape: tuple[int, ...]) -> np.ndarray:
        array = self._arrays.get(path)
        if array is None or array.shape != shape:
            state = "missing" if array is None else f"of shape {array.shape}"
            raise ValueError(f"{self.found.folder}: parameter {path!r} is {state}, expected {shape}")
        return finite(np.asarray(array), self.found.folder, path)
