"""Attention as pure functions: the plain reference, positions, masks, and one file per cache basis."""
