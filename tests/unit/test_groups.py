"""Tests of one group share servers and scenarios, so they have to run in one process."""

import os

import pytest


@pytest.mark.xdist_group("together")
def test_groups_are_heeded(request: pytest.FixtureRequest) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ and request.config.getvalue("loadgroup"):
        assert request.node.nodeid.endswith("@together")
