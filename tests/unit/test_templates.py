"""The base job templates, the Dockerfile, and the commands that docs/deploying.md names."""

import argparse
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from holdfast.cli import _parser, main
from holdfast.deployments.templates import template_file
from holdfast.settings import Settings

ROOT = Path(__file__).parents[2]
KINDS = ("process", "docker", "kubernetes")
PAGE = (ROOT / "docs" / "deploying.md").read_text()


def job(kind: str) -> tuple[dict[str, object], dict[str, dict[str, object]]]:
    template = json.loads(template_file(kind).read_text())
    assert set(template) == {"job_configuration", "variables"}
    return template["job_configuration"], template["variables"]["properties"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_template_is_one(kind: str) -> None:
    """Prefect's own checker, and both ways: what is used is declared, what is declared is used."""
    from prefect.server.schemas.core import WorkPool

    configuration, variables = job(kind)
    template = json.loads(template_file(kind).read_text())
    WorkPool(name="pool", type=kind, base_job_template=template)
    used = set(re.findall(r"{{\s*(\w+)\s*}}", json.dumps(configuration)))
    assert used == set(variables)
    for name, variable in variables.items():
        assert variable.get("description") or name in ("registry_credentials",), name


def test_a_pod_gets_more_time_than_a_search_needs() -> None:
    configuration, variables = job("kubernetes")
    grace = Settings.model_fields["grace_seconds"].default
    assert variables["termination_grace_period_seconds"]["default"] >= 2 * grace + 30
    manifest = configuration["job_manifest"]
    pod = manifest["spec"]["template"]["spec"]  # type: ignore[index]
    assert pod["terminationGracePeriodSeconds"] == "{{ termination_grace_period_seconds }}"
    assert pod["restartPolicy"] == "Never"
    assert variables["backoff_limit"]["default"] > 0  # another pod runs the same flow run, and goes on


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_prints_it(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["job-template", kind]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(template_file(kind).read_text())
    assert main(["job-template", kind, "--path"]) == 0
    assert capsys.readouterr().out.strip() == str(template_file(kind))


def test_the_image_has_what_the_package_is_made_of() -> None:
    """The Dockerfile installs the project from what .dockerignore lets through."""
    text = (ROOT / "Dockerfile").read_text()
    assert '-c constraints.txt ".[${EXTRAS}]"' in text
    assert re.search(r"^USER 1000", text, re.MULTILINE)
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    project = (ROOT / "pyproject.toml").read_text()
    folders = {"src", *re.findall(r'^"holdfast\.\w+" = "(\w+)"$', project, re.MULTILINE)}
    assert {*folders, "pyproject.toml", "constraints.txt", "README.md", "LICENSE"} == allowed
    extras = re.search(r"ARG EXTRAS=(\S+)", text)
    assert extras is not None
    assert all(f"\n{extra} = [" in project for extra in extras[1].split(","))


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_every_command_of_the_page_is_one() -> None:
    """Every `holdfast` command line in docs/deploying.md parses."""
    lines = "\n".join(blocks("sh")).replace("\\\n", " ").splitlines()
    found = [words for line in lines for words in re.findall(r"(?:^|\$\()holdfast ([^#|()>]*)", line)]
    commands = [shlex.split(text) for text in found]
    assert len(commands) >= 8
    parser = _parser()
    known = next(action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    for words in commands:
        assert words[0] in known, words
        parser.parse_args(words)


def test_the_pages_manifests_are_yaml() -> None:
    assert all(list(yaml.safe_load_all(text)) for text in blocks("yaml"))
