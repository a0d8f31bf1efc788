"""Tokenizers of decoders as ``tokenizer.json``: the one beside the weights, or made of what a GGUF holds."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER = "tokenizer.json"
_SPECIAL, _GIVEN = 3, 4  # types of tokens that no merge makes: control tokens, and those a user has added
# Of those that GGUF names, the ways of cutting text before merging that are known here -> digits apart.
_CUTS = {"default": False, "gpt-2": False, "gpt2": False, "smollm": True}


def tokenizer_of(text: str, where: Path) -> "Tokenizer":
    """The tokenizer in the text of a ``tokenizer.json``. Raises ValueError, naming the file, where it is none."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing more specific
        raise ValueError(f"{where}: not a readable tokenizer: {' '.join(str(error).split())}") from error


def read_tokenizer(path: Path) -> str:
    """The text of a ``tokenizer.json``. Raises OSError, or ValueError where it is no text."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a readable tokenizer: {error}") from None


def gguf_tokenizer(values: Mapping[str, Any], path: Path) -> str:
    """The ``tokenizer.json`` of a GGUF's byte-level BPE (GPT-2's), from its vocabulary and merges.

    Args:
        values: of the file.
        path: of the file, for messages.

    Raises:
        NotImplementedError: a tokenizer of another kind; the message says what helps.
        ValueError: tokens or merges are missing, or do not fit each other.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind, cut = values.get("tokenizer.ggml.model"), values.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or cut not in _CUTS:
        raise NotImplementedError(
            f"{path}: its tokenizer is {kind!r}, {cut!r}; known are 'gpt2' with {', '.join(map(repr, _CUTS))}; put "
            f"the model's {TOKENIZER} beside it"
        )
    tokens, merges = (_strings(values, name, path) for name in ("tokens", "merges"))
    types = values.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if not isinstance(types, list) or len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise ValueError(f"{path}: tokenizer.ggml: {len(tokens)} tokens, some alike or without a type")
    if wrong := next((merge for merge in merges if merge.count(" ") != 1), None):
        raise ValueError(f"{path}: tokenizer.ggml.merges: {wrong!r} is no pair")
    pairs = [(first, second) for first, _, second in (merge.partition(" ") for merge in merges)]
    try:
        made = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs))
    except Exception as error:  # the library raises nothing more specific
        raise ValueError(f"{path}: tokenizer.ggml: {' '.join(str(error).split())}") from error
    apart = [pre_tokenizers.Digits(individual_digits=True)] if _CUTS[cut] else []
    made.pre_tokenizer = pre_tokenizers.Sequence([*apart, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.decoder = decoders.ByteLevel()
    for token, sort in zip(tokens, types, strict=True):
        if sort in (_SPECIAL, _GIVEN):
            made.add_tokens([AddedToken(token, special=sort == _SPECIAL, normalized=False)])
    return made.to_str()


def _strings(values: Mapping[str, Any], name: str, path: Path) -> list[str]:
    found = values.get(f"tokenizer.ggml.{name}")
    if not isinstance(found, list) or not found or not all(isinstance(each, str) for each in found):
        raise ValueError(f"{path}: tokenizer.ggml.{name}: expected a list of strings")
    return found
