"""What a watch shows fits the terminal, and loses nothing in a pipe."""

from __future__ import annotations

from typing import Any, cast

from holdfast.flows.abandoned import Places, Row
from holdfast.flows.watching import Surroundings, Watch


def watch_of(*rows: Row) -> Watch:
    around = Surroundings(say=lambda text: None, warn=lambda text: None)
    watch = Watch(Places(storages=("runs",)), cast(Any, None), around)
    watch.rows = list(rows)
    return watch


LEFT = Row(path="/data/runs/digits", name="digits", verdict="left alone", why="stopped on request")
WAITS = Row(path="/data/runs/b", name="b", verdict="waits", why="its process died", restores=1, next=0.0)


def test_a_pipe_gets_every_column() -> None:
    header, first = watch_of(LEFT).lines()
    assert header.split() == ["name", "verdict", "restores", "next", "what", "path"]
    assert first.endswith(LEFT.path)


def test_a_narrow_terminal_gets_no_empty_columns_and_then_no_paths() -> None:
    whole = max(map(len, watch_of(LEFT).lines()))
    assert watch_of(LEFT).lines(whole) == watch_of(LEFT).lines()
    assert watch_of(LEFT).lines(whole - 1)[0].split() == ["name", "verdict", "next", "what", "path"]
    assert watch_of(LEFT).lines(50)[0].split() == ["name", "verdict", "what"]
    lines = watch_of(LEFT, WAITS).lines(80)
    assert lines[0].split() == ["name", "verdict", "restores", "next", "what"]
    assert max(map(len, lines)) <= 80
