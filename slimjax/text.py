"""Words of a transcript, and how many of them are wrong."""

import re


def words(text: str) -> list[str]:
    """Lower-case words of letters and apostrophes; hyphens part words, and "mr." is "mister"."""
    lowered = text.lower().replace("-", " ")
    spelled = re.sub(r"\bmr\.", "mister", lowered)
    return "".join(letter for letter in spelled if letter.isalpha() or letter in "' \n\t").split()


def word_errors(heard: str, said: str) -> int:
    """Words to substitute, delete or insert to make ``said`` of ``heard``, after ``words``."""
    ours, theirs = words(heard), words(said)
    row = list(range(len(theirs) + 1))
    for i, word in enumerate(ours, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(theirs, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (word != other))
    return row[-1]
