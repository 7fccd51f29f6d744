"""What the tests of the engines that Optuna computes share: specs, and searches that are simulated."""

import os

from holdfast.engines.optuna_engine import make
from holdfast.testing.proposers import SPACES, simulate
from holdfast.testing.samples import sample_spec

os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch reads it when it is imported; its threads get in the way of others

SMALL = {
    "tpe": {},
    "gp": {"n_startup_trials": 4},
    "cmaes": {"popsize": 4},
    "nsga2": {"population_size": 4},
    "nsga3": {"population_size": 4},
}
"""Options with which a few trials leave the start-up and see several generations."""
ENGINES = tuple(SMALL)
KEEPING = ("cmaes", "nsga2", "nsga3")
LOSS, BOTH = {"loss": "min"}, {"loss": "min", "size": "max"}


def spec_of(engine, space="mixed", objectives=None, options=None, **changes):
    return sample_spec(
        space=SPACES[space] if isinstance(space, str) else space,
        objectives=objectives or LOSS,
        search={"engine": engine, "num_trials": 500, "options": SMALL[engine] if options is None else options},
        **changes,
    )


def simulated(engine, count, *, space="numbers", concurrent=2, objectives=None, options=None, **changes):
    """A search of ``count`` trials: the proposer, and the trials as they are stored."""
    spec = spec_of(engine, space, objectives, options, **changes)
    proposer, trials = make(spec, 1), {}
    for _ in simulate(proposer, trials, until=count, concurrent=concurrent):
        pass
    return spec, proposer, trials
