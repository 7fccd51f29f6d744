import subprocess
import sys

import pytest

HEAVY = {"prefect", "sqlalchemy", "pandas", "numpy", "pydantic", "optuna", "fastapi", "fsspec", "rich", "plotly"}


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("holdfast", set()),
        ("holdfast.core.trial", set()),
        ("holdfast.core.loop", {"pydantic"}),
        ("holdfast.specfile", {"pydantic"}),
        ("holdfast.engines.factory", {"pydantic"}),
    ],
)
def test_importing_costs_little(module, allowed):
    """Not by the clock: by what is imported with it."""
    code = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not HEAVY & set(loaded) - allowed
