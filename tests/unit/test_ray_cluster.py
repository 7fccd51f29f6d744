"""A Ray cluster is asked again while it begins, and of its nodes those that may be given a trial."""

from __future__ import annotations

from typing import Any

import pytest

from holdfast.core.errors import Infrastructure
from holdfast.core.execution_section import Resources

ray = pytest.importorskip("ray", reason="the package ray is missing")


def node(name: str, *, alive: bool = True, **resources: float) -> dict[str, Any]:
    return {"NodeID": name, "Alive": alive, "Resources": resources}


def test_nodes_that_get_no_trial_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    from holdfast.flows.runners.ray import RayRunner

    nodes = [
        node("head", memory=1e9),
        node("cpu", CPU=8.0),
        node("small", CPU=1.0, GPU=1.0),
        node("gone", alive=False, CPU=8.0, GPU=1.0),
    ]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    runner = RayRunner("ray://head:10001", Resources(cpu=2, gpu=1), 4)
    assert runner._fitting() is None
    nodes += [node("first", CPU=4.0, GPU=2.0), node("second", CPU=2.0, GPU=1.0)]
    assert [found["NodeID"] for found in runner._fitting() or ()] == ["first", "second"]


def test_a_cluster_that_refuses_at_first_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's head refuses a client when the process that it starts for it comes to nothing; the next one may be well."""
    from holdfast.flows.runners import ray as module

    asked: list[str] = []
    errors: list[Exception] = []

    def init(address: str, **_: Any) -> None:
        asked.append(address)
        if errors:
            raise errors.pop()

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(module, "_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(module, "_CONNECT_SECONDS", 0.0)  # each time took longer than a head gets that does not answer
    refusal = ConnectionAbortedError("Initialization failure from server: Starting Ray client server failed")
    errors += [refusal] * 3
    with module.RayRunner("ray://head:10001", Resources(), 1):
        assert asked == ["ray://head:10001"] * 4

    for error, times in ((refusal, 4), (ConnectionError("nobody"), 1)):
        asked.clear()
        errors[:] = [error] * 9
        refused = pytest.raises(
            Infrastructure, match=r"no Ray cluster answers at ray://head:10001 .*mend execution.address, or let "
        )
        with refused, module.RayRunner("ray://head:10001", Resources(), 1):
            pass
        assert len(asked) == times


def test_an_address_that_is_none_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from holdfast.flows.runners import ray as module

    asked: list[str] = []

    def init(address: str, **_: Any) -> None:
        asked.append(address)
        raise ValueError("Malformed address")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(Infrastructure, match="Malformed address"), module.RayRunner("head;", Resources(), 1):
        pass
    assert asked == ["head;"]
