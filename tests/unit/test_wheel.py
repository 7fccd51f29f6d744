import os
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("flows", "tasks", "storage", "deployments")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of links, so that nothing is written to the source tree; without network access."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("src", *FOLDERS, "pyproject.toml", "README.md", "LICENSE"):
        (source / name).symlink_to(ROOT / name)
    built = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return next(out.glob("*.whl"))


def test_the_wheel_holds_every_module_and_nothing_else(wheel):
    expected = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src" / "holdfast").rglob("*.py")}
    for folder in FOLDERS:
        expected |= {f"holdfast/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / folder).rglob("*.py")}
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    assert {name for name in names if name.endswith(".py")} == expected
    assert {name for name in names if not name.endswith(".py")} == {"holdfast/py.typed", *DATA}


DATA = {f"holdfast/deployments/templates/{kind}.json" for kind in ("docker", "kubernetes", "process")}
"""Files other than modules that the package ships."""


def test_the_wheel_runs_from_a_folder(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = "import holdfast, holdfast.core.loop, holdfast.specfile; print(holdfast.__file__, holdfast.__version__)"
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert found[0] == str(tmp_path / "holdfast" / "__init__.py")
    entry_points = ConfigParser()
    entry_points.read(next(tmp_path.glob("*.dist-info")) / "entry_points.txt")
    assert entry_points["console_scripts"]["holdfast"] == "holdfast.cli:main"
    assert (next(tmp_path.glob("*.dist-info")) / "licenses" / "LICENSE").exists()
    assert wheel.name.startswith(f"holdfast-{found[1]}-")
