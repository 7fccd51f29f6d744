"""An engine of one's own: a (1+1) evolution strategy. The best config so far is changed a little, until something is better.

It works on shares: where each value lies in its parameter's range, from 0 to 1. They are the state that it keeps with each
proposal; all else follows from the trials that it has observed, so a restored search goes on as if nothing had happened.
"""

import json
import math
import random

from holdfast import Proposal, config_at


class Evolution:
    def __init__(self, space, objectives, seed, width=0.2):
        self.space, self.goal, self.seed, self.width = space, objectives[0], seed, width
        self.results = {}

    def observe(self, trial):
        value = trial.metrics.get(self.goal.name)
        self.results.pop(trial.number, None)
        if trial.state and trial.status in ("COMPLETED", "PRUNED") and value is not None and math.isfinite(value):
            self.results[trial.number] = (value if self.goal.direction == "min" else -value, json.loads(trial.state))

    def propose(self, number):
        dice = random.Random(f"{self.seed}/{number}")
        shares = {name: dice.random() for name in self.space.parameters}
        if self.results:
            best = min(self.results.items(), key=lambda item: (item[1][0], item[0]))[1][1]  # the first of equal ones
            shares = {name: min(max(best[name] + dice.gauss(0, self.width), 0.0), 1.0) for name in shares}
        return Proposal(config=config_at(self.space, shares), state=json.dumps(shares).encode())
