"""Decode attention behind one call: ``slimjax.decode``."""
