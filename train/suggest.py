"""What a message offers a user in place of a word that is not accepted."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def nearest(given: str, accepted: Iterable[str]) -> str | None:
    """The accepted word that `given` is most likely a misspelling of, or None where none comes close."""
    words = list(accepted)
    close = difflib.get_close_matches(given, words, n=1)
    if close:
        return close[0]
    folded = {word.casefold(): word for word in words}
    close = difflib.get_close_matches(given.casefold(), folded, n=1)
    return folded[close[0]] if close else None


def did_you_mean(given: str, accepted: Iterable[str]) -> str:
    """The clause "did you mean 'x'?; " with its end, or nothing, to be put before a list of what is accepted."""
    word = nearest(given, accepted)
    return "" if word is None else f"did you mean '{word}'? "


def one_of(words: Sequence[str]) -> str:
    """a / a or b / a, b or c."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
