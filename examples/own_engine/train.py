"""What is minimised: Branin's function, whose least value is 0.397887, with a detour for one of the two kinds."""

import math


def train(trial):
    x, y = trial.config["x"], trial.config["y"]
    value = (y - 5.1 / (4 * math.pi**2) * x**2 + 5 / math.pi * x - 6) ** 2 + 10 * (1 - 1 / (8 * math.pi)) * math.cos(x) + 10
    if trial.config["kind"] == "long":
        value += 1.0
    trial.report({"loss": value}, step=0)
