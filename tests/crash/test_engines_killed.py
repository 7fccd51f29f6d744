"""A search by each engine dies after a proposal; restored, it proposes what one that was never interrupted would."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from support import DIED, Lab

from holdfast.core.ports import Proposal
from holdfast.core.search_section import ENGINES
from holdfast.core.space import config_text
from holdfast.core.trial import TrialStatus
from holdfast.engines.factory import make_proposer

OPTIONS: dict[str, dict[str, Any]] = {
    "tpe": {"n_startup_trials": 3},
    "gp": {"n_startup_trials": 3},
    "cmaes": {"n_startup_trials": 1, "popsize": 4},
    "nsga2": {"population_size": 3},
    "nsga3": {"population_size": 3},
}
"""What brings an engine beyond its random beginning, and over more than one of its generations, within a few trials."""
TRIALS = 11


@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine != "auto"])
def test_a_killed_search_goes_on_with_the_same_proposals(lab: Lab, engine: str) -> None:
    search = {"engine": engine, "num_trials": TRIALS, "options": OPTIONS.get(engine, {})}
    space = {
        "x": {"type": "float", "low": 0.0, "high": 4.0, **({"step": 1.0} if engine == "grid" else {})},
        "b": {"type": "int", "low": 1, "high": 9},
        "a": {"type": "categorical", "choices": ["r", "t"]},
    }
    spec = lab.spec(search=search, space=space, checkpoints={"enabled": False})
    lab.run("run", spec, fault="proposal.committed:8", code=DIED)
    lab.run("restore", lab.path())
    with lab.open() as experiment:
        stored, trials = experiment.spec, experiment.trials
    assert [trial.status for trial in trials] == [TrialStatus.COMPLETED] * TRIALS
    proposer = make_proposer(stored, 7)
    for trial in trials:
        offered = proposer.propose(trial.number)
        proposal = offered if isinstance(offered, Proposal) else Proposal(config=dict(offered))
        assert config_text(proposal.config) == config_text(trial.config), trial.number
        waiting = replace(trial, status=TrialStatus.PENDING, metrics={}, state=proposal.state)
        for status in (TrialStatus.PENDING, TrialStatus.RUNNING):
            proposer.observe(replace(waiting, status=status))
        proposer.observe(replace(trial, state=proposal.state))
