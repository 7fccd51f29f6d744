"""Bad input: exit code 2, one readable message that names what is wrong and helps, nothing created, Prefect not imported."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import Lab, holdfast_environment, tree

import holdfast


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    """A laboratory without any Prefect server: nothing here may need one."""
    return Lab(tmp_path / "lab", holdfast_environment(PREFECT_API_URL="http://127.0.0.1:9/api", PREFECT_HOME=str(tmp_path)))


def refused(lab: Lab, *arguments: object) -> str:
    """Run a command that must be refused; return its message."""
    before = tree(lab.folder)
    ended = lab.light(*arguments)
    assert ended.code == 2, ended.output
    assert ended.output.startswith("holdfast: ")
    assert "Traceback" not in ended.output
    after = tree(lab.folder)
    assert after == before
    return ended.output


PARAMETER: dict[str, Any] = {"type": "float", "low": 0.0, "high": 1.0}
SPECS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown key": ({"serach": {"num_trials": 3}}, ["exp.yaml", "serach", "search"]),
    "unknown key in a section": ({"search": {"num_trails": 3}}, ["exp.yaml", "search.num_trails", "num_trials"]),
    "wrong type": ({"search": {"num_trials": "many"}}, ["exp.yaml", "search.num_trials", "many", "whole number"]),
    "low above high": ({"space": {"x": {**PARAMETER, "low": 2.0}}}, ["exp.yaml", "space.x", "low", "high"]),
    "log with 0": ({"space": {"x": {**PARAMETER, "log": True}}}, ["exp.yaml", "space.x", "log"]),
    "empty categorical": ({"space": {"x": {"type": "categorical", "choices": []}}}, ["exp.yaml", "space.x", "choices"]),
    "trainable without a function": ({"trainable": "train.py"}, ["exp.yaml", "trainable", "train.py:train"]),
    "trainable's file is missing": ({"trainable": "absent.py:train"}, ["absent.py"]),
    "trainable's name is missing": ({"trainable": "train.py:fit"}, ["train.py", "fit"]),
    "ImportError inside": ({"trainable": "imports.py:train"}, ["imports.py", "no_such_package"]),
    "SyntaxError inside": ({"trainable": "syntax.py:train"}, ["syntax.py", "line 2"]),
    "trainable of no kind": ({"trainable": "train.py:STEPS"}, ["train.py", "STEPS"]),
    "storage is a file": ({"storage": "train.py"}, ["train.py"]),
}


@pytest.mark.parametrize("case", SPECS)
def test_a_bad_spec(lab: Lab, case: str) -> None:
    changes, words = SPECS[case]
    (lab.folder / "imports.py").write_text("import no_such_package\n\n\ndef train(trial):\n    pass\n")
    (lab.folder / "syntax.py").write_text("def train(trial):\n    return return\n")
    message = refused(lab, "run", lab.spec(**changes))
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["absent.yaml", "no such file"]),
        ("name: [1, 2\nspace: {", ["bad.yaml", "line", "YAML"]),
        ("", ["bad.yaml", "empty"]),
        ("- a list", ["bad.yaml", "mapping"]),
    ],
)
def test_a_file_that_is_no_spec(lab: Lab, text: str | None, words: list[str]) -> None:
    if text is not None:
        (lab.folder / "bad.yaml").write_text(text)
    message = refused(lab, "run", lab.folder / ("absent.yaml" if text is None else "bad.yaml"))
    for word in words:
        assert word in message


def test_a_storage_that_cannot_be_written(lab: Lab) -> None:
    if os.geteuid() == 0:
        storage = Path("/proc/holdfast")  # root may write wherever there is a file system that can be written
        message = refused(lab, "run", lab.spec(storage=str(storage)))
    else:
        storage = lab.folder / "closed"
        storage.mkdir()
        spec = lab.spec(storage=str(storage))
        storage.chmod(0o500)
        message = refused(lab, "run", spec)
        storage.chmod(0o700)
    assert str(storage) in message


@pytest.mark.parametrize(("fault", "word"), [("nowhere", "search.finished"), ("search.finished:x", "whole number")])
def test_a_crash_point_that_does_not_exist(lab: Lab, fault: str, word: str) -> None:
    ended = lab.run("list", code=2, HOLDFAST_FAULT=fault)
    assert ended.output.startswith("holdfast: ")
    assert word in ended.output


@pytest.fixture
def made(lab: Lab) -> Lab:
    """A laboratory with an experiment that was created and never run."""
    spec = lab.spec()
    data = yaml.safe_load(spec.read_text())
    data |= {"storage": str(lab.folder / "runs"), "trainable": str(lab.folder / "train.py") + ":train"}
    holdfast.create(data).close()
    return lab


def refuse_taken_name(lab: Lab) -> str:
    return refused(lab, "run", lab.folder / "exp.yaml")


def refuse_both_flags(lab: Lab) -> str:
    return refused(lab, "restore", lab.path(), "--resume-errored", "--restart-errored")


def refuse_foreign_path(lab: Lab) -> str:
    return refused(lab, "restore", lab.folder / "orders")


def refuse_missing_path(lab: Lab) -> str:
    return refused(lab, "trials", lab.folder / "runs/none")


def refuse_unknown_override(lab: Lab) -> str:
    return refused(lab, "restore", lab.path(), "--set", "search.num_trails=9")


def refuse_fixed_key(lab: Lab) -> str:
    return refused(lab, "restore", lab.path(), "--set", "search.seed=9")


def refuse_other_trainable(lab: Lab) -> str:
    return refused(lab, "restore", lab.path(), "--trainable", "other.py:fit")


def refuse_missing_trial(lab: Lab) -> str:
    return refused(lab, "cancel", lab.path(), "--trial", 7)


def refuse_config(config: str, *options: object) -> Callable[[Lab], str]:
    return lambda lab: refused(lab, "enqueue", lab.path(), "--config", config, *options)


GOOD = '{"x": 1.5, "b": 2, "a": "r"}'


def refuse_merging_itself(lab: Lab) -> str:
    return refused(lab, "merge", lab.path(), "exp")


def refuse_merging_the_unknown(lab: Lab) -> str:
    return refused(lab, "merge", lab.path(), "nobody")


def refuse_a_spec_that_merges_the_unknown(lab: Lab) -> str:
    return refused(lab, "run", lab.spec(name="second", merge=["exp", "nobody"]))


@pytest.mark.parametrize(
    ("refuse", "words"),
    [
        (refuse_config('{"x": NaN, "b": 2, "a": "r"}'), ["x = nan", "finite"]),
        (refuse_config('{"x": 9, "b": 2, "a": "r"}'), ["x = 9", "[0.0, 4.0]"]),
        (refuse_config('{"x": 1}'), ["lacks 'b'"]),
        (refuse_config('{"x": 1, "b": 2, "a": "r", "c": 1}'), ["'c'", "x, b, a"]),
        (refuse_config('{"x": 1, "x": 2, "b": 2, "a": "r"}'), ["'x' twice"]),
        (refuse_config("x=1"), ["--config holds no JSON"]),
        (refuse_config("[1]"), ["config is a list"]),
        (refuse_config("@absent.json"), ["absent.json cannot be read"]),
        (refuse_config("-"), ["the standard input holds no JSON"]),
        (refuse_config(GOOD, "--at", "2026-01-01T00:00:00"), ["time zone"]),
        (refuse_config(GOOD, "--at", "tomorrow"), ["--at 'tomorrow'", "ISO 8601"]),
        (refuse_config(GOOD, "--repeat", 0), ["repeats is 0"]),
        (refuse_config(GOOD, "--metadata", "why"), ["KEY=VALUE"]),
        (refuse_config(GOOD, "--metadata", "a=1", "--metadata", "a=2"), ["'a' twice"]),
        (refuse_merging_itself, ["'exp' is this experiment itself"]),
        (refuse_merging_the_unknown, ["no experiment 'nobody'", "no other"]),
        (refuse_a_spec_that_merges_the_unknown, ["no experiment 'nobody'", "'exp'"]),
        (refuse_taken_name, ["'exp' is taken", "holdfast restore", "if_exists"]),
        (refuse_both_flags, ["resume_errored", "restart_errored", "choose one"]),
        (refuse_foreign_path, ["orders is no experiment", "holdfast list"]),
        (refuse_missing_path, ["runs/none is no experiment"]),
        (refuse_unknown_override, ["num_trails", "num_trials"]),
        (refuse_fixed_key, ["search.seed", "allowed", "search.num_trials"]),
        (refuse_other_trainable, ["train:train", "other:fit"]),
        (refuse_missing_trial, ["no trial 7", "holdfast trials"]),
    ],
)
def test_a_bad_request_of_an_experiment(made: Lab, refuse: Callable[[Lab], str], words: list[str]) -> None:
    message = refuse(made)
    for word in words:
        assert word in message
