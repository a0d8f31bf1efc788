"""The noise-aware solve: the best linear estimate of V from rows as the cache gives them back.

An exact inverse multiplies the codec's rounding by up to cond(W_K). The linear minimum-mean-square-error
(LMMSE) map weighs that against what it loses by not inverting: M = argmin E|x W_V - (x A + n) M|^2 with
A = [W_K, U], the inputs' second moments and the codec's own rounding noise. Without noise it is the inverse.
"""

from collections.abc import Sequence

import numpy as np
import scipy.linalg


def lmmse_maps(
    source: np.ndarray,
    target: np.ndarray,
    second: np.ndarray,
    noise: np.ndarray,
    ridges: Sequence[float] = (0.0,),
) -> list[np.ndarray]:
    """argmin over M of E|x target - (x source + n) M|^2, as least-squares problems (never squared).

    Args:
        source: A = [W_K, U], float64 [D, M].
        target: W_V, float64 [D, F].
        second: mean of x x^T, float64 [D, D].
        noise: variance of n for every column of the rows, [M], positive; independent of x.
        ridges: second moments are shrunk towards white ones, second + ridge * mean eigenvalue * I. The
            larger it is, the nearer the exact inverse: noise counts for less against louder inputs.

    Returns:
        float64 [M, F] for each ridge.
    """
    values, vectors = np.linalg.eigh(second)
    quiet = np.diag(np.sqrt(noise))
    nothing = np.zeros((source.shape[1], target.shape[1]))
    maps = []
    for ridge in ridges:
        shrunk = np.maximum(values, 0.0) + ridge * np.mean(values)
        root = np.sqrt(shrunk)[:, None] * vectors.T  # root^T root = second
        stacked = np.concatenate([root @ source, quiet])
        wanted = np.concatenate([root @ target, nothing])
        solved = scipy.linalg.lstsq(stacked, wanted, lapack_driver="gelsy")  # QR: an SVD would take minutes
        assert solved is not None  # only for an array without elements
        maps.append(solved[0])
    return maps


def residual(source: np.ndarray, second: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Covariance of the inputs that noisy rows x source + n leave unexplained, float64 [D, D]."""
    explained = second @ source
    gram = source.T @ explained + np.diag(noise)
    return second - explained @ scipy.linalg.solve(gram, explained.T, assume_a="pos")


def worst_values(
    source: np.ndarray, target: np.ndarray, second: np.ndarray, noise: np.ndarray, rank: int
) -> np.ndarray:
    """U from calibration, [D, R]: the directions of V in which its estimate from noisy keys errs most.

    Observing R linear functions of x lowers the expected squared error of V most when they are the leading
    principal components of that error, and those are functions of V itself: U = W_V B.

    Args:
        source: W_K, float64 [D, E]; noise: variance per key element, [E].
        target: W_V; second: mean of x x^T; rank: R.
    """
    error = target.T @ residual(source, second, noise) @ target
    vectors = np.linalg.eigh((error + error.T) / 2)[1]
    return target @ vectors[:, ::-1][:, :rank]
