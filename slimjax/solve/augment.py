"""Which extra coordinates X U to cache beside the keys, and the map from both to the values."""

import dataclasses

import numpy as np

from slimjax.solve.linear import solve_map


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Solution:
    """What basis k needs of a layer: V = [X W_K / scale, X extra] weight. float64, on the host.

    Attributes:
        weight: [E+R, E].
        extra: [D, R], or None where R = 0.
        how: the way it was found, in words.
        scale: [E], what each channel of the keys is divided by before it is stored (``solve.scales``); None: 1.
    """

    weight: np.ndarray
    extra: np.ndarray | None = None
    how: str = "exact"
    scale: np.ndarray | None = None

    @property
    def rank(self) -> int:
        """R."""
        return 0 if self.extra is None else self.extra.shape[1]

    def cached(self, source: np.ndarray) -> np.ndarray:
        """What rows of the cache are, of inputs: [W_K / scale, extra], [D, E+R], from W_K."""
        return augmented(source if self.scale is None else source / self.scale, self.extra)


def augmented(source: np.ndarray, extra: np.ndarray | None) -> np.ndarray:
    """[W_K, U], float64 [D, E+R]."""
    return source if extra is None else np.concatenate([source, extra], axis=1)


def lost_directions(source: np.ndarray, rank: int) -> np.ndarray:
    """U without calibration: the input directions that the keys see least, [D, R].

    The left singular vectors of W_K (float64 [D, E]) with the smallest singular values, those it does not
    see at all (E < D) included, scaled so that X U is as large as X W_K for white inputs.
    """
    left = np.linalg.svd(source, full_matrices=True)[0]
    return left[:, source.shape[0] - rank :] * level(source)


def level(source: np.ndarray) -> float:
    """Root mean square of a key's elements for white inputs: the scale of X U beside X W_K."""
    return float(np.linalg.norm(source) / np.sqrt(source.shape[1]))


def exact_solution(source: np.ndarray, target: np.ndarray, rank: int) -> Solution:
    """The map that is exact in exact arithmetic, from the keys and ``rank`` calibration-free coordinates.

    Args:
        source: W_K, float64 [D, E].
        target: W_V, float64 [D, E].
        rank: R, with E + R >= D.
    """
    extra = lost_directions(source, rank) if rank else None
    how = "exact inverse" if extra is None else "exact, lost directions of W_K"
    return Solution(weight=solve_map(augmented(source, extra), target), extra=extra, how=how)
