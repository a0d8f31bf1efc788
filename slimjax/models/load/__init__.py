"""Checkpoints of others: one reader per format, one table of names per format and family."""

from slimjax.models.load.llama import LoadedDecoder, load_decoder
from slimjax.models.load.whisper import LoadedWhisper, load_whisper, open_whisper

__all__ = ["LoadedDecoder", "LoadedWhisper", "load_decoder", "load_whisper", "open_whisper"]
