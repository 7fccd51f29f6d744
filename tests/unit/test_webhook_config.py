"""What a receiver's configuration says, and how it is refused: where, why, what is allowed; never with a secret in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from holdfast.cli import main
from holdfast.core.errors import SpecError
from holdfast.deployments.webhook.checking import check
from holdfast.deployments.webhook.config import WebhookConfig

HOOK = {"signature": "standard", "secrets": {"env": "HOOK_SECRET"}}
EXAMPLES = Path(__file__).parents[2] / "examples" / "webhooks"


def read(folder: Path, **changes: Any) -> WebhookConfig:
    hook = {**HOOK, **changes.pop("hook", {})}
    file = folder / "hooks.yaml"
    file.write_text(yaml.safe_dump({"roots": ["./runs"], "hooks": {"nightly": hook}, **changes}))
    return WebhookConfig.from_file(file)


def test_what_is_relative_is_taken_from_the_files_folder(tmp_path: Path) -> None:
    hook = {"secrets": [{"file": "secret.txt"}, {"block": "hook-secret"}]}
    found = read(tmp_path, hook=hook, roots=["./runs", "s3://bucket/lab/", {"location": "block:lab"}], specs="./specs")
    assert [root.location for root in found.roots] == [str(tmp_path / "runs"), "s3://bucket/lab", "block:lab"]
    assert found.specs == (str(tmp_path / "specs"),)
    assert found.hooks["nightly"].secrets[0].file == str(tmp_path / "secret.txt")
    assert found.hooks["nightly"].target == "restore/restore"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hook": {"secrets": "whsec_geheim"}}, "never written into the configuration"),
        ({"hook": {"secrets": ["whsec_geheim"]}}, "never written into the configuration"),
        ({"hook": {"secrets": {"value": "geheim"}}}, "unknown key 'hooks.nightly.secrets.0.value'"),
        ({"hook": {"secrets": {"env": "geheim geheim"}}}, "no name of an environment variable"),
        ({"hook": {"secrets": {"env": ["geheim"]}}}, "are names"),
        ({"hook": {"secrets": {"env": "A", "file": "b"}}}, "say where the secret is, once"),
        ({"hook": {"secrets": []}}, "1 to 5 places of secrets"),
        ({"hook": {"secret": "geheim"}}, "did you mean 'secrets'"),
        ({"hook": {"signature": "none"}}, "allowed: standard, github"),
        ({"hook": {"deployment": "restore"}}, "FLOW/DEPLOYMENT"),
        ({"hook": {"allow": {"changes": {"trainable": 1}}}}, "allowed: search.num_trials, search.time_budget, search.max_cost"),
        ({"hook": {"allow": {"changes": {"search.num_trials": 0}}}}, "a number above 0"),
        ({"hook": {"runs": "search", "allow": {"overrides": ["storage"]}}, "specs": ["."]}, "may name code or a place"),
        ({"hook": {"parameters": {"trainable": "x.py:f"}}}, "parameters.trainable is no parameter of this hook"),
        ({"hook": {"parameters": {"force": "true"}}}, "parameters.force is no parameter of this hook"),
        ({"hook": {"defaults": {"database": "x"}}}, "defaults.database is no parameter of this hook"),
        ({"hook": {"when": "{{ body.a"}}, "when is no template"),
        ({"hook": {"when": "{% for x in body %}{% endfor %}"}}, "it uses For"),
        ({"hooks": {"../x": HOOK}}, "small letters, digits"),
        ({"hooks": {}}, "hooks is"),
        ({"roots": []}, "roots is missing"),
        ({"hook": {"runs": "search"}}, "specs is missing"),
        ({"roots": ["s3://key:geheim@bucket/x"]}, "no credentials"),
        ({"roots": [{"location": "s3://b", "storage_options": {"secret": "geheim"}}]}, "credentials are never written"),
        ({"roots": [{"location": "s3://b", "storage_options": {"a": {"aws_secret_access_key": "geheim"}}}]}, "never"),
        ({"roots": [{"location": ".", "database": "postgresql://u:geheim@h/d"}]}, "a password is never written"),
        ({"memory": {"database": "postgresql://u:geheim@h/d"}}, "a password is never written"),
        ({"memory": {"retention": 0}}, "memory.retention is 0"),
        ({"memory": {"retention": 599}}, "memory.retention is 599 s, but a delivery counts for up to 600 s"),
        ({"hook": {"tolerance": 86400 * 4}}, "sent again"),
        ({"limits": {"body": "large"}}, "limits.body is 'large'"),
        ({"limit": {}}, "did you mean 'limits'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_where_it_stands(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError) as caught:
        read(tmp_path, **changes)
    assert words in str(caught.value)
    assert str(tmp_path / "hooks.yaml") in str(caught.value)
    assert "geheim" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"), [("", "must be a mapping"), ("- 1", "holds a list"), ("hooks: {}\nhooks: {}", "stands here again")]
)
def test_what_is_no_configuration_is_refused(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "hooks.yaml"
    file.write_text(text)
    with pytest.raises(SpecError, match=words):
        WebhookConfig.from_file(file)


@pytest.mark.parametrize(
    ("signature", "secret", "words"),
    [
        ("standard", None, "environment variable HOOK_SECRET is not set"),
        ("standard", "whsec_no base64!", "holds no Standard Webhooks secret"),
        ("standard", "whsec_c2hvcnQ=", "a secret of 5 bytes"),
        ("github", "short", "a secret of 5 bytes"),
    ],
)
def test_an_unfit_secret_is_refused_and_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signature: str, secret: str | None, words: str
) -> None:
    monkeypatch.delenv("HOOK_SECRET", raising=False)
    if secret is not None:
        monkeypatch.setenv("HOOK_SECRET", secret)
    with pytest.raises(SpecError, match=words) as caught:
        check(read(tmp_path, hook={"signature": signature}))
    assert secret is None or secret not in str(caught.value)


def test_a_secret_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("a secret of some length\n")
    assert check(read(tmp_path, hook={"signature": "github", "secrets": {"file": "secret"}}))["hooks"]
    (tmp_path / "secret").write_text("x" * 5000)
    with pytest.raises(SpecError, match="more than 4096 bytes"):
        check(read(tmp_path, hook={"signature": "github", "secrets": {"file": "secret"}}))
    (tmp_path / "secret").unlink()
    with pytest.raises(SpecError, match="cannot be read"):
        check(read(tmp_path, hook={"signature": "github", "secrets": {"file": "secret"}}))


def test_the_example_is_checked_and_told_for_cloud(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("HOOK_SECRET", "MONITOR_SECRET", "SEARCH_HOOK_SECRET"):
        monkeypatch.setenv(name, "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    monkeypatch.setenv("GITHUB_HOOK_SECRET", "It's a Secret to Everybody")
    assert main(["webhook", str(EXAMPLES / "hooks.yaml"), "--check"]) == 0
    assert "/hooks/github: restore/restore, signed by github" in capsys.readouterr().out
    assert main(["webhook", str(EXAMPLES / "hooks.yaml"), "--cloud", "github"]) == 0
    shown = capsys.readouterr().out
    assert '"event": "holdfast.webhook.github' in shown
    assert "/runs/" in shown
    assert main(["webhook", str(EXAMPLES / "hooks.yaml"), "--cloud", "nothing"]) == 2
    assert "there is no hook 'nothing'" in capsys.readouterr().err
