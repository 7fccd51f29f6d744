"""Whether a flow run's end waits for its heartbeats is Prefect's affair again once no search of ours runs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
from prefect import flow_engine

from holdfast.flows.prefect_runs import ended_at_once


def test_nobody_waits_for_heartbeats_while_a_search_runs_and_everybody_does_after(monkeypatch: pytest.MonkeyPatch) -> None:
    joined: list[bool] = []

    def beats(engine: Any, join_on_exit: bool = True) -> AbstractContextManager[None]:
        joined.append(join_on_exit)
        return nullcontext()

    monkeypatch.setattr(flow_engine, "_send_heartbeats", beats)
    engine: Any = None
    with ended_at_once():
        with ended_at_once():  # of another thread, or of a flow within
            flow_engine._send_heartbeats(engine)
        flow_engine._send_heartbeats(engine)
    flow_engine._send_heartbeats(engine)
    assert joined == [False, False, True]
    assert flow_engine._send_heartbeats is beats


def test_prefects_engine_still_beats_by_that_name() -> None:
    """Else ``ended_at_once`` would change nothing."""
    assert "_send_heartbeats" in flow_engine.FlowRunEngine.run_context.__wrapped__.__code__.co_names  # type: ignore[attr-defined]
    assert "join_on_exit" in flow_engine._send_heartbeats.__wrapped__.__code__.co_varnames  # type: ignore[attr-defined]
