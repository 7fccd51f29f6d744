"""What docs/restore.md names is there."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from holdfast.cli import _parser
from holdfast.core.resume import ResumePolicy
from holdfast.core.spec import CHANGEABLE

PAGE = (Path(__file__).parents[2] / "docs" / "restore.md").read_text()


def flags_of(command: str) -> set[str]:
    (commands,) = (one for one in _parser()._actions if isinstance(one, argparse._SubParsersAction))
    return {flag for action in commands.choices[command]._actions for flag in action.option_strings}


def test_every_flag_of_a_restore_is_explained_and_no_other() -> None:
    there = flags_of("restore") - {"-h", "--help"}
    named = set(re.findall(r"(--[a-z][a-z-]+)", PAGE)) - {"--trial"}
    assert named == there
    assert "--trial" in flags_of("trials")


def test_every_key_that_can_be_changed_is_named() -> None:
    for key in CHANGEABLE:
        section = key.partition(".")[0]
        assert f"`{key}`" in PAGE or f"every key of `{section}`" in PAGE or f"`failure` and `{section}`" in PAGE, key
    for name in re.findall(r"`search\.([a-z_]+)`", PAGE):
        assert f"search.{name}" in CHANGEABLE


def test_the_policy_on_the_page_is_one_and_the_default_is_the_default() -> None:
    policies = re.findall(r"unfinished=[a-z]+,errored=[a-z]+,finished=[a-z]+", PAGE)
    assert len(policies) == 2
    assert ResumePolicy.of(policies[1]) == ResumePolicy()
    assert ResumePolicy.of(policies[0]).errored == "restart"
