"""Offline weight algebra: from a layer's projections to what its cache scheme needs."""

from slimjax.solve.augment import Solution
from slimjax.solve.convert import Converted, Figures, convert

__all__ = ["Converted", "Figures", "Solution", "convert"]
