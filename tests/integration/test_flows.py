"""The flows as a deployment calls them, and trainables that are Python objects, on a real server."""

from __future__ import annotations

import sys
import textwrap

from support import Lab, begin
from support_prefect import View, make_endless

import holdfast

AS_DEPLOYED = """
import sys
from prefect.flows import load_flow_from_entrypoint
search = load_flow_from_entrypoint("holdfast.flows.search.search")
restore = load_flow_from_entrypoint("holdfast.flows.restore.restore")
print("search:", search(sys.argv[1], ["search.num_trials=2"], return_state=True).message)
print("again:", restore(sys.argv[2], return_state=True).message)
print("errored:", restore(sys.argv[2], resume_errored=True, restart_errored=True, return_state=True).message)
"""

WITHIN = """
import sys
from prefect import flow
from holdfast.flows.search import search


@flow(name="of-mine", retries=0)
def mine(spec):
    return search(spec, return_state=True)


print("ended:", mine(sys.argv[1], return_state=True).message)
"""

OBJECTS = """
import holdfast

SCALE = 3.0


def train(trial):
    for step in range(3):
        trial.report({"loss": SCALE * trial.config["x"] + step}, step=step, state={"step": step})


class Counter:
    def __init__(self, config):
        self.config, self.count = config, 0

    def step(self):
        self.count += 1
        return {"loss": self.config["x"] * self.count}

    def save(self):
        return {"count": self.count}

    def load(self, state):
        self.count = state["count"]


base = dict(
    storage="runs",
    objectives={"loss": "min"},
    space={"x": {"type": "float", "low": 0, "high": 1}},
    search={"engine": "random", "num_trials": 2, "seed": 1},
)
if __name__ == "__main__":
    holdfast.search(holdfast.ExperimentSpec(name="function", trainable=train, **base))
    holdfast.search({**base, "name": "class", "trainable": Counter, "stopping": {"max_steps": 4}})
    holdfast.search({**base, "name": "inline", "trainable": train, "execution": {"isolation": "inline"}})
    try:
        holdfast.search({**base, "name": "stuck", "trainable": lambda trial: lock.acquire()})
    except holdfast.TrainableError as error:
        print(error)
"""


def test_the_flows_work_without_a_caller_that_prepares_for_them(lab: Lab) -> None:
    ended = lab.python(AS_DEPLOYED, lab.spec(), lab.path())
    assert "search: every trial of the budget was proposed: 2 trials, 0 errored" in ended.output, ended.output
    assert "again: nothing is left to do" in ended.output
    assert "resume_errored and restart_errored are both set" in ended.output
    assert f"after a crash: holdfast restore {lab.path()}" in ended.output
    assert "trial 1 COMPLETED" in ended.output
    with holdfast.open(lab.path()) as experiment:
        assert experiment.spec_source == lab.spec().read_text()
        assert experiment.status == "completed"


def test_who_cancels_a_flow_that_a_search_is_a_part_of_cancels_the_search(lab: Lab) -> None:
    make_endless(lab)
    slow, view = lab.order("slow", 0, 0), View(lab, "exp")
    running = begin(lab, sys.executable, "-c", WITHIN, str(lab.spec()))
    lab.until_logged("step", 0, 2, running)
    [run] = view.ask("POST", "/flow_runs/filter", {"flows": {"name": {"any_": ["of-mine"]}}})
    view.ask("POST", f"/flow_runs/{run['id']}/set_state", {"state": {"type": "CANCELLING"}, "force": False})
    ended = running.wait()  # nobody sends it a signal
    assert slow.exists()
    assert "cancelled in Prefect" in ended.output, ended.output
    with holdfast.open(lab.path()) as experiment:
        assert experiment.ended == "stopped: cancelled in Prefect"
        assert [trial.status for trial in experiment.trials] == ["PENDING"]


def test_trainables_may_be_functions_and_classes_of_the_caller(lab: Lab) -> None:
    code = textwrap.dedent(OBJECTS).replace(
        'if __name__ == "__main__":', 'import threading\nlock = threading.Lock()\nif __name__ == "__main__":'
    )
    (lab.folder / "script.py").write_text(code)
    ended = lab.python("import runpy; runpy.run_path('script.py', run_name='__main__')")
    assert ended.code == 0, ended.output
    assert "pickle:trainable.pkl:trainable cannot be pickled" in ended.output
    assert not lab.path("stuck").exists()
    for name, last in (("function", 2), ("class", 3), ("inline", 2)):
        trials = lab.trials(name)
        assert [(trial["status"], trial["step"]) for trial in trials] == [("COMPLETED", last)] * 2
        factor = {"class": lambda x: x * 4}.get(name, lambda x: 3.0 * x + 2)
        assert [trial["metrics"]["loss"] for trial in trials] == [factor(trial["config"]["x"]) for trial in trials]
    lab.run("restore", lab.path("function"), "--set", "search.num_trials=3")
    assert lab.statuses("function") == ["COMPLETED"] * 3
