"""One receiver of webhooks, on the tests' Prefect server, for all of its tests."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from support_webhook import Prefect, Receiver, Scene, data_environment

SPEC = """\
name: looked-for
trainable: train.py:train
storage: ../runs
objectives: {loss: min}
space: {x: {type: float, low: 0.0, high: 1.0}}
search: {num_trials: 2}
"""


@pytest.fixture(scope="session")
def scene(tmp_path_factory: pytest.TempPathFactory, server_environment: dict[str, str]) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("hooks")
    prefect = Prefect(server_environment["PREFECT_API_URL"])
    (folder / "specs").mkdir()
    (folder / "runs").mkdir()
    (folder / "specs" / "looked-for.yaml").write_text(SPEC)
    restore = {"deployment": "restore/hooked"}
    config = {
        "roots": ["./runs"],
        "specs": ["./specs"],
        "limits": {
            "body": 100_000,
            "body_seconds": 5.0,
            "header_seconds": 5.0,
            "per_client": {"times": 10_000},
            "per_hook": {"times": 500},
        },
        "hooks": {
            "plain": {
                "signature": "standard",
                "secrets": [{"env": "HOOK_STANDARD"}, {"env": "HOOK_ROTATED"}],
                "allow": {"changes": {"search.num_trials": 50}},
                **restore,
            },
            "strong": {"signature": "standard", "secrets": {"env": "HOOK_STANDARD"}, "allow": {"force": True}, **restore},
            "github": {
                "signature": "github",
                "secrets": {"env": "HOOK_GITHUB"},
                "when": "{{ event == 'workflow_run' and body.action == 'completed' }}",
                "parameters": {"experiment": "{{ body.workflow_run.name }}", "resume_errored": "true"},
                **restore,
            },
            "looks": {
                "signature": "standard",
                "secrets": {"env": "HOOK_STANDARD"},
                "runs": "search",
                "deployment": "search/hooked",
                "allow": {"overrides": ["search.seed", "name"]},
            },
            "lost": {"signature": "standard", "secrets": {"env": "HOOK_STANDARD"}, "deployment": "restore/nowhere"},
            "rare": {"signature": "standard", "secrets": {"block": "no-such-block"}, **restore},
        },
    }
    receiver = Receiver(folder, data_environment(server_environment, folder), config)
    receiver.start()
    found = Scene(receiver, prefect, prefect.deployment("restore", "hooked"), prefect.deployment("search", "hooked"), folder)
    yield found
    assert receiver.stop() in (0, -signal.SIGTERM)
    assert "Traceback" not in receiver.log()
