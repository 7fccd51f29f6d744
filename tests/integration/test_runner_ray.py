"""Trials on a Ray cluster of this machine, on SQLite and a local path."""

from __future__ import annotations

import pytest
from support import Lab
from support_runners import goes_through_everything

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.timeout(1800)]


def test_a_search_goes_through_everything(lab: Lab) -> None:
    goes_through_everything(lab, "ray")
