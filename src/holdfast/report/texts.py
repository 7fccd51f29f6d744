"""Foreign text made harmless: what user code says goes into logs, tables and markdown that others read."""

from __future__ import annotations

import re
import shlex

LONGEST_LINE = 2000
"""Characters of a line of a log, or of a command, that are kept."""

WIDTH = 80
"""Characters of a line that is shown whole in Prefect's UI."""

_MARKUP = re.compile(r"([\\`*_{}\[\]<>#|~!&$])")


def printable(text: str) -> str:
    """Return ``text`` with what would break a line, or cannot be printed, escaped."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape", "backslashreplace").decode() for letter in text
    )


def one_line(text: str, limit: int = LONGEST_LINE) -> str:
    """Return ``text`` as one printable line of at most ``limit`` characters: the beginning of a longer one, and dots."""
    shown = printable(text[: limit + 1])
    return shown if len(shown) <= limit else f"{shown[: max(limit - 4, 0)]} ..."


def marked_down(text: str, limit: int = 500) -> str:
    """Return ``text`` as one line of markdown that shows it as it is: also in a cell of a table, and without HTML."""
    return _MARKUP.sub(r"\\\1", one_line(text, limit))


def code_block(text: str, limit: int = 2 * LONGEST_LINE) -> str:
    """Return ``text`` as a block of code in markdown, which nothing in it ends."""
    return _fenced(one_line(text, limit))


def command_block(command: str, limit: int = 2 * LONGEST_LINE) -> str:
    """Return a command of a shell as a block of code: a long one on several lines, which the shell takes for one."""
    shown = one_line(command, limit)
    try:
        words = [shlex.quote(word) for word in shlex.split(shown)]
    except ValueError:  # its end, with a quote, was too much
        return _fenced(shown)
    if len(shown) <= WIDTH or shlex.join(shlex.split(shown)) != shown:
        return _fenced(shown)
    lines = [words[0]]
    for word in words[1:]:
        if word.startswith("-"):  # a path stays beside its command, however long: it is searched for, and copied
            lines.append(f"  {word}")
        else:
            lines[-1] += f" {word}"
    return _fenced(" \\\n".join(lines))


def _fenced(shown: str) -> str:
    fence = "`" * max(3, *(len(found) + 1 for found in re.findall("`+", shown) or [""]))
    return f"{fence}\n{shown}\n{fence}"
