"""Trials on a Dask cluster of this machine, of real processes, on SQLite and a local path."""

from __future__ import annotations

import pytest
from support import Lab
from support_runners import goes_through_everything

pytestmark = [pytest.mark.xdist_group("dask"), pytest.mark.timeout(1800)]


def test_a_search_goes_through_everything(lab: Lab) -> None:
    goes_through_everything(lab, "dask")
