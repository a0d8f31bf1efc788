"""Models built on the pure attention functions."""
