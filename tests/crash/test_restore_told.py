"""Restored searches on real processes: what they do is what was said before, and what they say afterwards is what they did."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from support import DIED, Lab, MakeLab, starts, steps_of, tree

import holdfast

YEAR = 365 * 86400


def damage(folder: Path) -> None:
    """Change one byte of a checkpoint's files."""
    file = max(one for one in folder.rglob("*") if one.is_file() and one.name != "manifest.json")
    body = bytearray(file.read_bytes())
    body[len(body) // 2] ^= 1
    file.write_bytes(bytes(body))


def restored(lab: Lab, *flags: object, code: int = 0) -> dict[str, Any]:
    """Restore and return the JSON that is printed, which stands behind what is said on stderr."""
    output = lab.run("restore", lab.path(), *flags, "--json", code=code).output
    found: dict[str, Any] = json.loads(output[output.index("\n{\n") :])
    return found


def test_what_was_said_is_done_and_told_whatever_is_broken(make_lab: MakeLab) -> None:
    """One finished, one failed, running ones with all kinds of damage, one that waits: R2, R25, R27, and the table."""
    lab = make_lab(steps=4)
    lab.order("fail", 1, 2)
    for number, step in ((0, 1), (1, 1), (2, 3), (3, 2), (4, 2), (5, 1), (6, 2)):
        lab.order("hold", number, step)
    run = lab.start("run", lab.spec(search={"num_trials": 9, "max_concurrent": 6}), fault="proposal.committed:8")
    for number, step in ((0, 1), (1, 1), (2, 3), (3, 2), (4, 2), (5, 1)):
        lab.until_logged("hold", number, step, run)
    (lab.folder / "orders/hold-1-1").unlink()  # it fails, and the seventh trial begins
    lab.until_logged("hold", 6, 2, run)
    (lab.folder / "orders/hold-0-1").unlink()  # it completes, and with the eighth one's row the search dies
    assert run.wait().code == DIED
    assert lab.statuses() == ["COMPLETED", "FAILED", *["RUNNING"] * 5, "PENDING"]
    # The driver is gone, and everybody knows at once.
    shown = lab.json("show", lab.path())
    assert (shown["status"], shown["lease"]["driven"], shown["lease"]["held"]) == ("interrupted", False, True)
    assert shown["lease"]["pid"] == run.process.pid
    assert holdfast.can_restore(lab.path())

    damage(lab.path() / lab.checkpoints(2)[-1].path)
    shutil.rmtree(lab.path() / "trials/000003")
    (lab.path() / "trials/000004/result-a1.json").write_text('{"result": "gar')
    shutil.rmtree(lab.path() / "trials/000006/checkpoints")
    (lab.path() / "trials/000006/checkpoints").write_text("a file in the way")
    for order in (lab.folder / "orders").iterdir():
        order.unlink()
    rows, files = lab.dump(), lab.tree()
    plan = lab.json("restore", lab.path(), "--plan", "--policy", "errored=resume")
    assert (lab.dump(), lab.tree()) == (rows, files)
    assert [(line["action"], line["step"]) for line in plan] == [
        *(("keep", None), ("resume", 1), ("resume", 1), ("resume", None)),
        *(("resume", 1), ("resume", 0), ("skip", None), ("run", None)),
    ]

    lab.clear_log()
    found = restored(lab, "--policy", "errored=resume")
    told = found["restored"]
    rows_told = {line["trial"]: line for line in told["trials"]}
    for line in plan:
        number, first = line["trial"], 0 if line["step"] is None else line["step"] + 1
        runs = {"resume": [first], "run": [0]}.get(line["action"], [])
        assert [step for _, step in starts(lab.log(), number)] == runs
        if line["action"] != "keep":
            same = {"trial": number, "before": line["status"], "action": line["action"], "step": line["step"]}
            assert same.items() <= rows_told[number].items()
    assert [rows_told[number]["lost"] for number in (1, 2, 3, 4, 5)] == [0, 1, 2, 0, 0]
    assert told["work_lost"] == 3
    assert told["counts"] == {
        **{"kept": 1, "adopted": 0, "resumed": 5, "restarted": 0, "started": 1, "skipped": 1, "proposed": 1, "queued": 0}
    }
    assert lab.statuses() == [*["COMPLETED"] * 6, "SKIPPED", *["COMPLETED"] * 2]
    assert all(steps_of(lab, number) == [0, 1, 2, 3] for number in (0, 1, 2, 3, 4, 5, 7, 8))

    (lab.path() / "trials/000006/checkpoints").unlink()  # what was in the way
    said = lab.run("restore", lab.path()).output
    assert "restored: 8 kept, 1 resumed; 2 steps lost" in said
    assert [line.split() for line in said.splitlines() if line.startswith("      6  ")] == [
        ["6", "SKIPPED", "resumed", "from", "the", "beginning", "2", "steps", "COMPLETED"]
    ]
    assert lab.statuses() == ["COMPLETED"] * 9
    said = lab.light("restore", lab.path()).output
    assert "nothing is left to do" in said
    assert "restored:" not in said


def test_what_is_left_out_and_what_comes_back(lab: Lab) -> None:
    """R3 and R4; and each attempt's own error can be read after all of it."""
    lab.order("hold", 0, 2)
    lab.order("fail", 1, 1)
    gate = lab.order("hold", 1, 0)
    run = lab.start("run", lab.spec(search={"num_trials": 3, "max_concurrent": 2}), fault="proposal.committed:3")
    lab.until_logged("hold", 0, 2, run)
    gate.unlink()
    assert run.wait().code == DIED
    (lab.folder / "orders/hold-0-2").unlink()
    first = lab.trials()
    lab.clear_log()
    lab.run(*("restore", lab.path(), "--no-resume-unfinished", "--resume-errored", "--set", "search.num_trials=4"), code=1)
    assert lab.statuses() == ["SKIPPED", "FAILED", "SKIPPED", "COMPLETED"]
    assert [starts(lab.log(), number) for number in range(4)] == [[], [(2, 1)], [], [(1, 0)]]
    assert lab.json("show", lab.path())["best"]["number"] == 3
    (lab.folder / "orders/fail-1-1").unlink()
    lab.clear_log()
    lab.run("restore", lab.path(), "--restart-errored")
    assert [starts(lab.log(), number) for number in range(4)] == [[(2, 2)], [(3, 0)], [(1, 0)], []]
    assert lab.statuses() == ["COMPLETED"] * 4
    assert [trial["config"] for trial in lab.trials()[:3]] == [trial["config"] for trial in first]

    attempts = lab.json("trials", lab.path(), "--trial", 1)
    assert [(one["number"], one["reason"], one["outcome"], one["parent"], one["step"]) for one in attempts] == [
        (1, "first", "failed", None, None),
        (2, "resume", "failed", 1, 0),
        (3, "restart", "completed", None, None),
    ]
    for one in attempts[:2]:
        assert (one["error"]["kind"], one["error"]["message"]) == ("RuntimeError", "no luck in step 1")
        assert 'raise RuntimeError(f"no luck in step {step}")' in one["error"]["traceback"]
    assert attempts[2]["error"] is None
    assert all(one["started"] < one["ended"] and one["pid"] and one["host"] for one in attempts)
    text = lab.run("trials", lab.path(), "--trial", 1).output
    assert "attempt 2 (resume): failed, after step 0 of attempt 1" in text
    assert text.count("no luck in step 1") >= 2


ENDLESS = '''
steady = train


def train(trial):
    """The first trial goes on until somebody says that it may end."""
    if trial.number != 0:
        return steady(trial)
    start = trial.checkpoint.step + 1 if trial.checkpoint else 0
    log("start", trial.number, trial.attempt, start, os.getpid())
    step = start
    while not (HERE / "may-end").exists():
        trial.report({"loss": 1.0}, step=step, state={"step": step})
        log("step", trial.number, trial.attempt, step, os.getpid())
        step += 1
        time.sleep(0.01)
    return {"loss": 1.0}
'''


def test_what_the_first_failure_stopped_resumes_with_the_failed_one(lab: Lab) -> None:
    """R11: the trial that ran beside it ends only because it is told to, and goes on from what it saved then."""
    file = lab.folder / "train.py"
    file.write_text(file.read_text() + ENDLESS)
    fail = lab.order("fail", 1, 1)
    lab.run("run", lab.spec(search={"max_concurrent": 2, "num_trials": 3}, failure={"fail_fast": True}), code=1)
    assert lab.statuses() == ["PENDING", "FAILED"]
    newest = lab.checkpoints(0)[-1].step
    assert [one["outcome"] for one in lab.json("trials", lab.path(), "--trial", 0)] == ["preempted", None]
    fail.unlink()
    (lab.folder / "may-end").touch()
    lab.clear_log()
    told = restored(lab, "--resume-errored")["restored"]
    assert [(line["trial"], line["action"], line["step"], line["lost"]) for line in told["trials"]] == [
        (0, "resume", newest, 0),
        (1, "resume", 0, 0),
    ]
    assert [starts(lab.log(), number) for number in range(3)] == [[(2, newest + 1)], [(2, 1)], [(1, 0)]]
    assert lab.statuses() == ["COMPLETED"] * 3


def elsewhere(tmp_path: Path) -> Path:
    """Return a folder on another file system, where there is one."""
    shared = Path("/dev/shm")
    other = shared.is_dir() and os.access(shared, os.W_OK) and shared.stat().st_dev != tmp_path.stat().st_dev
    return (shared if other else tmp_path) / f"holdfast-{os.getpid()}-moved ü"


def test_another_path_another_time_zone_and_a_clock_that_was_set_back(make_lab: MakeLab, tmp_path: Path) -> None:
    """R17 and R21: what was stored seems to be of next year, its files, too; the trainable is elsewhere. The order is seq's."""
    search = {"engine": "tpe", "num_trials": 14, "max_concurrent": 1, "options": {"n_startup_trials": 4}}
    stopping = {"rule": "median", "min_steps": 1, "startup_trials": 3}
    whole, lab = make_lab("whole"), make_lab("moved")
    beside = whole.start("run", whole.spec(search=search, stopping=stopping), TZ="UTC")
    lab.run("run", lab.spec(search=search, stopping=stopping), fault="checkpoint.committed:20", code=DIED, TZ="Asia/Kolkata")

    later(lab)
    place = elsewhere(tmp_path)
    try:
        old = lab.path().parent
        shutil.copytree(old, place)
        shutil.rmtree(old)
        (lab.folder / "code").mkdir()
        (lab.folder / "train.py").rename(lab.folder / "code" / "train.py")
        (lab.folder / "orders").rename(lab.folder / "code" / "orders")
        rows, files = (place / "holdfast.db").read_bytes(), tree(place / "exp")
        refused = lab.run("restore", place / "exp", code=2, TZ="Pacific/Kiritimati")
        assert "train.py" in refused.output
        assert "--trainable" in refused.output
        assert ((place / "holdfast.db").read_bytes(), tree(place / "exp")) == (rows, files)
        lab.run("restore", place / "exp", "--trainable", "code/train.py:train", TZ="Pacific/Kiritimati")
        assert beside.wait().code == 0
        assert not old.exists()
        (lab.folder / "runs").symlink_to(place)  # where the laboratory looks
        assert lab.outcome() == whole.outcome()
        assert {"COMPLETED", "PRUNED"} == set(lab.statuses())
        with holdfast.open(place / "exp") as experiment:
            changed = [row.detail for row in experiment.audit() if row.action == "changed"]
            assert [trial.number for trial in experiment.trials] == list(range(14))
            assert experiment.load_since(0).ids == list(range(14))  # one at a time: they ended in this order
        assert [list(detail) for detail in changed] == [["trainable"]]
    finally:
        shutil.rmtree(place, ignore_errors=True)


def later(lab: Lab) -> None:
    """Let everything that is stored have happened a year later: as if the clock had been set back since."""
    with closing(sqlite3.connect(lab.database)) as connection, connection:
        times = {"trial": ["created"], "attempt": ["created", "started", "ended"], "report": ["reported"]}
        times |= {"checkpoint": ["created"], "audit": ["happened"], "experiment": ["created"]}
        for table, columns in times.items():
            for column in columns:
                connection.execute(f"UPDATE {table} SET {column} = {column} + {YEAR * 10**6}")
        connection.execute(
            f"UPDATE experiment SET lease_expires = lease_expires + {YEAR}, lease_renewed = lease_renewed + {YEAR}"
        )
    lease = lab.path() / "lease.json"
    body = json.loads(lease.read_text())
    lease.write_text(json.dumps({**body, "expires": body["expires"] + YEAR, "renewed": body["renewed"] + YEAR}))
    for file in lab.path().rglob("*"):
        moment = file.stat().st_mtime + YEAR
        os.utime(file, (moment, moment))


def test_each_refusal_of_the_flow_changes_nothing(lab: Lab) -> None:
    """R5 as a deployment meets it: the flow's parameters are checked as the command line's are, and take effect alike."""
    lab.run("run", lab.spec(search={"num_trials": 1}))
    rows, files = lab.dump(), lab.tree()
    ended = lab.python(AS_DEPLOYED, lab.path(), json.dumps([list(pair) for pair in REFUSED]))
    lines = [line for line in ended.output.splitlines() if line.startswith("refused: ")]
    assert len(lines) == len(REFUSED), ended.output
    for line, (_, words) in zip(lines, REFUSED, strict=True):
        for word in words:
            assert word in line
    assert (lab.dump(), lab.tree()) == (rows, files)

    ended = lab.python(AS_DEPLOYED_WELL, lab.path(), f"sqlite:///{lab.database}")
    assert "every trial of the budget was proposed: 2 trials, 0 errored" in ended.output, ended.output
    assert "restored: 1 restarted, 1 newly proposed; 3 steps lost" in ended.output
    assert [trial["attempts"] for trial in lab.trials()] == [2, 1]


REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({"resume_errored": True, "restart_errored": True}, ["resume_errored", "restart_errored"]),
    ({"resume_errored": True, "policy": {"errored": "skip"}}, ["policy", "flag"]),
    ({"policy": {"errored": "maybe"}}, ["maybe", "resume, restart, skip"]),
    ({"policy": {"failed": "skip"}}, ["failed", "unfinished, errored, finished"]),
    ({"trainable": "other.py:fit"}, ["train:train", "other:fit"]),
    ({"changes": {"objectives": {"loss": "max"}}}, ["objectives", "search.num_trials"]),
    ({"changes": {"search.num_trials": "many"}}, ["search.num_trials", "many"]),
    ({"changes": {"space": {}}}, ["space", "search.num_trials"]),
]
AS_DEPLOYED = """
import json, sys
from prefect.flows import load_flow_from_entrypoint
restore = load_flow_from_entrypoint("holdfast.flows.restore.restore")
for arguments, _ in json.loads(sys.argv[2]):
    state = restore(sys.argv[1], **arguments, return_state=True)
    assert state.is_failed(), state
    print("refused:", state.message.replace("\\n", " "), flush=True)
"""
AS_DEPLOYED_WELL = """
import sys
from prefect.flows import load_flow_from_entrypoint
restore = load_flow_from_entrypoint("holdfast.flows.restore.restore")
arguments = {"policy": {"finished": "restart"}, "changes": {"search.num_trials": 2}, "database": sys.argv[2]}
print(restore(sys.argv[1], trainable="train.py:train", **arguments, return_state=True).message)
"""


def test_the_table_names_a_trial_that_was_adopted(lab: Lab) -> None:
    lab.run("run", lab.spec(search={"num_trials": 2}), fault="result.persisted:2", code=DIED)
    told = restored(lab)["restored"]
    assert [(line["trial"], line["action"], line["status"]) for line in told["trials"]] == [(1, "adopt", "COMPLETED")]
    assert told["counts"]["kept"] == 1
    assert told["work_lost"] == 0
