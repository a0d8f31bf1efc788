"""Whisper's tokenizer: text of tokens, and the special tokens that frame them, by name and never by number."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# A vocabulary of at least this many tokens has languages: the published models' own rule.
_MULTILINGUAL = 51_865
_LANGUAGE = re.compile(r"<\|([a-z]{2,3})\|>")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeechTokens:
    """Tokenizer and special tokens of one model.

    Attributes:
        tokenizer: of the text.
        end: ends the text.
        start: starts a transcript. Itself and all after it are special and never generated.
        no_timestamps: asks for text alone.
        transcribe: asks for a transcript and not a translation; None for English-only models.
        languages: code -> token; empty for English-only models.
    """

    tokenizer: "Tokenizer"
    end: int
    start: int
    no_timestamps: int
    transcribe: int | None = None
    languages: dict[str, int] = dataclasses.field(default_factory=dict)

    def prompt(self, language: str = "en") -> tuple[int, ...]:
        """The tokens that a transcript without timestamps begins with. ValueError for an unknown language."""
        if self.transcribe is None:
            if language != "en":
                raise ValueError(f"{language=}: this model knows English (en) alone")
            return (self.start, self.no_timestamps)
        if language not in self.languages:
            raise ValueError(f"{language=} is not known to this model: {', '.join(sorted(self.languages))}")
        return (self.start, self.languages[language], self.transcribe, self.no_timestamps)

    def text(self, tokens: Sequence[int]) -> str:
        """The text of generated tokens, special ones left out."""
        return self.tokenizer.decode([token for token in tokens if token != self.end and token < self.start])


def speech_tokens(path: Path, vocab: int, multilingual: bool | None = None) -> SpeechTokens:
    """Read a ``tokenizer.json``.

    Args:
        path: of the file.
        vocab: tokens that the model knows.
        multilingual: whether the model has languages; None: told by ``vocab``.

    Raises:
        OSError: no such file.
        ValueError: not a tokenizer, or one without a special token that Whisper needs, or with more than
            the model knows.
    """
    from tokenizers import Tokenizer

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; the tokenizer belongs beside the weights")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise ValueError(f"{path}: not a readable tokenizer: {error}") from error

    def special(name: str) -> int:
        token = tokenizer.token_to_id(f"<|{name}|>")
        if token is None or token >= vocab:
            raise ValueError(
                f"{path}: token <|{name}|> is "
                f"{'missing' if token is None else f'{token}, the model knows {vocab}'}"
            )
        return token

    several = vocab >= _MULTILINGUAL if multilingual is None else bool(multilingual)
    languages = {}
    if several:
        first, last = special("startoftranscript"), special("transcribe")
        for name, token in tokenizer.get_vocab(with_added_tokens=True).items():
            code = _LANGUAGE.fullmatch(name)
            if code and first < token < last:
                languages[code[1]] = token
    return SpeechTokens(
        tokenizer=tokenizer,
        end=special("endoftext"),
        start=special("startoftranscript"),
        no_timestamps=special("notimestamps"),
        transcribe=special("transcribe") if several else None,
        languages=languages,
    )
