"""The alphabet of array axes, used by code, types, docs and byte formulas alike.

    B  batch (sequences)            N  query heads          E  key width, E = K*H
    T  query tokens of this call    K  key/value heads      L  layers
    S  cached tokens                H  head size            R  extra cached coordinates
    D  model width                  G  query heads per key/value head, G = N/K
    V  vocabulary                   F  width of the MLP     C  cache capacity in tokens

Shapes are written with these letters: ``Float[Array, "B T N H"]``.
"""

import os
from collections.abc import Callable, Mapping
from typing import TypeVar

from jaxtyping import Array, Float, Int, jaxtyped

Queries = Float[Array, "B T N H"]
Keys = Float[Array, "B S K H"]
Values = Float[Array, "B S K H"]
Scores = Float[Array, "B N T S"]
Inputs = Float[Array, "B T D"]
LogSums = Float[Array, "B T N"]  # of softmax: the logarithm of a query's sum of exponentials
Lengths = Int[Array, "B"]
Tokens = Int[Array, "B T"]
# Decoded rows of some consecutive slots of every stream of a cache, each [B, S, heads, size].
Block = Mapping[str, Array]

_Function = TypeVar("_Function", bound=Callable)


def typed(function: _Function) -> _Function:
    """Check the shapes and dtypes in ``function``'s annotations at every call (under jit: at every trace).

    Active only when the environment says ``SLIMJAX_TYPECHECK=1``, as the test-suite does; a plain
    call otherwise.
    """
    if os.environ.get("SLIMJAX_TYPECHECK") != "1":
        return function
    from beartype import beartype  # a test dependency: absent from a user's installation

    return jaxtyped(typechecker=beartype)(function)
