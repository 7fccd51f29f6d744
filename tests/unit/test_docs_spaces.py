"""What docs/spaces.md shows is what the program takes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from holdfast.core.space import Space
from holdfast.specfile import ExperimentSpec

PAGE = (Path(__file__).parents[2] / "docs" / "spaces.md").read_text()
HEAD = "name: a\ntrainable: t.py:f\nobjectives: {loss: min}\nsearch: {num_trials: 1}\n"


@pytest.mark.parametrize("text", re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL))
def test_every_space_on_the_page_is_one(text: str) -> None:
    assert ExperimentSpec.from_text(HEAD + text).space.parameters


@pytest.mark.parametrize("text", sorted(set(re.findall(r"`(\{type: [^`]*\})`", PAGE))))
def test_every_parameter_on_the_page_is_one(text: str) -> None:
    assert Space.model_validate({"x": yaml.safe_load(text)}).parameters["x"]


@pytest.mark.parametrize("text", re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
def test_the_code_on_the_page_runs(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(text, "spaces.md", "exec"), {})


def test_the_page_maps_every_word_of_ray_tune_and_optuna() -> None:
    numbers = "uniform loguniform quniform qloguniform randn qrandn randint lograndint qrandint qlograndint"
    assert [word for word in f"{numbers} choice grid_search sample_from".split() if f"tune.{word}(" not in PAGE] == []
    optuna = "suggest_float suggest_int suggest_categorical suggest_loguniform suggest_discrete_uniform"
    assert [word for word in optuna.split() if word not in PAGE] == []
