"""Checkpoints of others: one reader per format, one table of names per format and family."""

from slimjax.models.load.whisper import LoadedWhisper, load_whisper, open_whisper

__all__ = ["LoadedWhisper", "load_whisper", "open_whisper"]
