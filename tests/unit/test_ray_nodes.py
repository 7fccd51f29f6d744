"""Which nodes of a Ray cluster are asked whether they can run trials: those that may be given one."""

from __future__ import annotations

from typing import Any

import pytest

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
