"""Linear maps between projections, solved in float64 on the host, and how they amplify noise."""

import contextlib

import numpy as np


def solve_map(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """M with source @ M = target, so that rows x @ target = (x @ source) @ M for every x.

    Args:
        source: float64 [D, E], E >= D, of full row rank.
        target: float64 [D, F].

    Returns:
        float64 [E, F]: the solution for E = D; for E > D the one of least norm, which is the right inverse
        source^T (source source^T)^-1 times target (arXiv 2503.05840, non-square weight matrices). Where the source
        has no inverse at all, the best there is: who asks looks at its condition.

    Raises:
        ValueError: E < D, where no such M exists in general.
    """
    width, key_width = source.shape
    if key_width < width:
        raise ValueError(f"a map out of [D={width}, E={key_width}] needs E >= D")
    if key_width == width:
        with contextlib.suppress(np.linalg.LinAlgError):
            return np.linalg.solve(source, target)
    return np.linalg.lstsq(source, target, rcond=None)[0]


def condition_number(matrix: np.ndarray) -> float:
    """Largest over smallest singular value of a float64 [D, E] matrix; inf where the smallest is 0."""
    values = np.linalg.svd(matrix, compute_uv=False)
    return float(values[0] / values[-1]) if values[-1] > 0 else float("inf")


def noise_gain(source: np.ndarray, solved: np.ndarray, target: np.ndarray) -> float:
    """How many times larger a relative error is in x @ target than in x @ source, for white inputs x.

    Independent noise on element e of a source row, in proportion to that element's rms |source[:, e]|,
    reaches the target multiplied by row e of ``solved``: gain = sqrt(sum_e |source_e|^2 |M_e|^2) / |target|.
    It lies between 1 and the condition number for square matrices of even columns.
    """
    spread = np.sum(source**2, axis=0) @ np.sum(solved**2, axis=1)
    return float(np.sqrt(spread) / np.linalg.norm(target))
