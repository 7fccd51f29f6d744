"""Which of the known words somebody most likely meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the word of ``known`` that ``word`` most likely stands for: letters exchanged first, then the closest spelling."""
    words = sorted(known)
    letters = sorted(word.lower())
    swapped = [other for other in words if sorted(other.lower()) == letters]
    return next(iter(swapped or difflib.get_close_matches(word, words, n=1, cutoff=0.5)), None)


def hint(word: object, known: Iterable[str]) -> str:
    """Return `` (did you mean 'momentum'?)``, or nothing where no known word is near."""
    near = nearest(word, known) if isinstance(word, str) else None
    return f" (did you mean {near!r}?)" if near else ""
