import subprocess
import sys

import pytest

from holdfast.core.errors import SpecError
from holdfast.specfile import ExperimentSpec, apply_overrides, without_options

TEXT = """\
name: digits
trainable: train.py:train
objectives: {loss: min}
space:
  lr:  {type: float, low: 1e-4, high: 1e-1, log: true}
  act: {type: categorical, choices: [relu, tanh]}
search: {num_trials: 20, seed: 7}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "digits.yaml"
    path.write_text(TEXT)
    return path


def problem(text, overrides=()):
    with pytest.raises(SpecError) as refused:
        ExperimentSpec.from_text(text, source="digits.yaml", overrides=overrides)
    return str(refused.value)


def test_relative_paths_are_taken_from_the_file(file, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    spec = ExperimentSpec.from_file(file)
    assert spec.storage == str(tmp_path / "runs")
    assert spec.trainable == f"{tmp_path}/train.py:train"
    assert spec.trainable_name == "train:train"
    monkeypatch.chdir(tmp_path)
    assert ExperimentSpec.from_file("digits.yaml") == spec
    changed = ExperimentSpec.from_file(
        file, ["storage=/data/../elsewhere", "trainable=package.module:train", "database=sqlite:///x.db"]
    )
    assert (changed.storage, changed.trainable) == ("/elsewhere", "package.module:train")
    assert changed.database == "sqlite:///x.db"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("on", "on"), ("no", "no"), ("yes", "yes"), ("True", True), ("false", False), ("~", None), ("null", None), ("", None),
        ("1e-4", 1e-4), ("1E3", 1e3), (".5", 0.5), ("1.", 1.0),
        ("-.inf", float("-inf")), ("010", 10), ("0x1F", 31), ("0o17", 15),
        ("-0", 0), ("+3", 3), ("2026-01-01", "2026-01-01"), ("1_000", "1_000"), ("1:30", "1:30"), ("'1'", "1"), ("=", "="),
        ("[1, a, 1e2]", [1, "a", 100.0]), ("{a: {b: no}}", {"a": {"b": "no"}}), ("a: b # c", "a: b # c"), ("e1", "e1"),
        (".", "."),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text, value):
    for found in (
        apply_overrides({}, [f"references.x={text}"])["references"]["x"],
        ExperimentSpec.from_text(f"{TEXT}references:\n  x: {text}\n").references["x"] if ": b" not in text else value,
    ):
        assert (type(found), found) == (type(value), value)


def test_anchors_and_merges():
    text = TEXT.replace("  act:", "  l2: &small {type: float, low: 0.0, high: 0.1}\n  l1: {<<: *small, high: 0.2}\n  act:")
    spec = ExperimentSpec.from_text(text)
    assert (spec.space.parameters["l2"].high, spec.space.parameters["l1"].high) == (0.1, 0.2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "digits.yaml is empty; it needs at least name"),
        ("# nothing\n", "digits.yaml is empty"),
        ("- a\n", "digits.yaml holds a list; it must be a mapping"),
        ("name", "digits.yaml holds a string; it must be a mapping"),
        (TEXT + "name: again\n", "line 8, column 1: not valid YAML: key 'name' stands here again (first in line 1)"),
        ("name: [a\n", "not valid YAML: expected ',' or ']'"),
        ("name: a: b\n", "digits.yaml, line 1, column 8: not valid YAML"),
        ("a: 1\n\tb: 2\n", "digits.yaml, line 2, column 1: not valid YAML"),
        ("a: \x00\n", "digits.yaml, line 1: character"),
        ("a: !thing 1\n", "could not determine a constructor for the tag '!thing'"),
        (TEXT + "---\nname: b\n", "expected a single document"),
        ("{a: 1}: 2\n", "digits.yaml, line 1, column 1: not valid YAML: found unhashable key"),
        ("[" * 5000, "not readable as YAML"),
        (TEXT.replace("log:", "lgo:"), "digits.yaml, line 5: unknown key 'space.lr.lgo'; did you mean 'log'?"),
        (TEXT.replace("seed:", "sede:"), "digits.yaml, line 7: unknown key 'search.sede'; did you mean 'seed'?"),
        (TEXT.replace("20", "twenty"), "digits.yaml, line 7: search.num_trials is 'twenty'; it must be a whole number"),
        (TEXT.replace("1e-4", "1"), "digits.yaml, line 5: space.lr: low (1.0) is above high (0.1); swap them"),
        (TEXT.replace("1e-4", "0"), "digits.yaml, line 5: space.lr: log: true needs low above 0"),
        (TEXT.replace("[relu, tanh]", "[]"), "digits.yaml, line 6: space.act: choices is empty"),
        (TEXT.replace("[relu, tanh]", "[relu, [1]]"), "digits.yaml, line 6: space.act.choices"),
        (TEXT.replace("name: digits\n", ""), "digits.yaml: name is missing; add it"),
        (TEXT.replace("low: 1e-4, ", ""), "digits.yaml, line 5: space.lr.low is missing; add it"),
    ],
)  # fmt: skip
def test_messages(text, message):
    assert message in problem(text)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("search.seed", "--set search.seed: expected key=value, such as --set search.seed=1"),
        ("=1", "expected key=value"),
        ("search.=1", "expected key=value"),
        ("search.sede=1", "--set search.sede=1: unknown key 'search.sede'; did you mean 'search.seed'?"),
        ("serach.seed=1", "unknown key 'serach'; did you mean 'search'?"),
        ("space.lr.lgo=true", "unknown key 'space.lr.lgo'; did you mean 'space.lr.log'?"),
        ("search.seed.x=1", "search.seed is no mapping, so it has no key 'x'"),
        ("search.seed=abc", "digits.yaml with --set search.seed=abc: search.seed is 'abc'"),
        ("search.seed=[1", "--set search.seed=[1, line 1"),
        ("space.lr.high=1e-5", "digits.yaml with --set space.lr.high=1e-5: space.lr: low (0.0001) is above high"),
        ("space.lr=3", "with --set space.lr=3: space.lr is 3"),
    ],
)
def test_bad_overrides(override, message):
    assert message in problem(TEXT, [override])


def test_overrides_change_and_add():
    overrides = ["search.seed=1", "space.beta={type: float, low: 0, high: 1}", "failure.max_failures=2", "search.seed = 2"]
    spec = ExperimentSpec.from_text(TEXT, overrides=[*overrides, "description=a=b: c", "objectives.acc=max"])
    assert (spec.search.seed, spec.search.num_trials, spec.failure.max_failures) == (2, 20, 2)
    assert list(spec.space.parameters) == ["lr", "act", "beta"]
    assert (spec.description, list(spec.objectives)) == ("a=b: c", ["loss", "acc"])
    data = {"search": {"seed": 1}}
    assert apply_overrides(data, ["search.seed=2"]) == {"search": {"seed": 2}}
    assert data == {"search": {"seed": 1}}


def test_files_that_cannot_be_read(file, tmp_path):
    def refused(path):
        with pytest.raises(SpecError) as error:
            ExperimentSpec.from_file(path)
        return str(error.value)

    assert f"there is no such file; did you mean {file}?" in refused(tmp_path / "digit.yaml")
    assert "specs in that folder: digits.yaml" in refused(tmp_path / "other")
    assert f"and no folder {tmp_path / 'nowhere'}" in refused(tmp_path / "nowhere" / "digits.yaml")
    assert f"is a folder; name the spec file in it, such as {file}" in refused(tmp_path)
    file.write_bytes(b"name: a\ntrainable: \xff\n")
    assert "digits.yaml, line 2: byte 19 is not UTF-8" in refused(file)
    file.write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    assert ExperimentSpec.from_file(file).name == "digits"


def test_reading_a_spec_imports_nothing_heavy():
    code = "import sys, holdfast.specfile;assert not {'prefect', 'sqlalchemy', 'pandas', 'numpy', 'optuna'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "text",
    [
        "storage: s3://b/x\nstorage_options:\n  # mine\n  key: abcd\n\n  secret: word\n  x: {x: [deep]}\nname: exp\n",
        'name: exp\n"storage_options": {key: abcd, secret: "word", client_kwargs: {x: [deep]}}\nstorage: s3://b/x\n',
        '{"name": "exp", "storage": "s3://b/x", "storage_options": {"key": "abcd", "secret": "word", "x": ["deep"]}}',
    ],
)
def test_the_kept_text_holds_no_credentials(text):
    options = {"key": "abcd", "secret": "word", "client_kwargs": {"x": ["deep"]}}
    spec = ExperimentSpec.from_text(TEXT, source="digits.yaml").model_copy(update={"storage_options": options})
    kept = without_options(text, spec)
    assert not any(word in kept for word in ("abcd", "word", "deep"))
    assert "exp" in kept
    assert "s3://b/x" in kept
    assert without_options("# a\nname: exp\n", spec) == "# a\nname: exp\n"
