"""Real forks: killed at their crash points, of a search that is running, and what becomes of them when they are restored."""

from __future__ import annotations

import os

from support import DIED, Lab, executed, starts, tree


def test_a_fork_killed_anywhere_is_none_or_whole(lab: Lab) -> None:
    lab.run("run", lab.spec(), fault="checkpoint.committed:5", code=DIED)
    before = tree(lab.path())
    words = ("fork", lab.path(), "--name", "cut off ü")
    lab.run(*words, fault="fork.linked", code=DIED)
    assert [row["name"] for row in lab.json("list", lab.path().parent)] == ["exp"]
    assert (lab.path("cut off ü") / "trials").is_dir()
    lab.run("show", lab.path("cut off ü"), code=2)
    lab.run(*words, fault="fork.identified", code=DIED)
    assert "holdfast restore" in lab.run(*words, code=2).output
    assert [trial["status"] for trial in lab.json("trials", lab.path("cut off ü"))] == ["COMPLETED", "PENDING"]
    assert tree(lab.path()) == before
    log = lab.log()
    lab.run("restore", lab.path("cut off ü"))
    assert tree(lab.path()) == before
    assert not [entry for entry in lab.log()[len(log) :] if entry.trial == 0], "what had finished does not run again"
    lab.run("restore", lab.path())
    assert lab.outcome("cut off ü") == lab.outcome()


def test_a_fork_of_a_search_that_runs_and_goes_on(lab: Lab) -> None:
    hold = lab.order("hold", 1, 1)
    running = lab.start("run", lab.spec())
    lab.until_logged("hold", 1, 1, running)
    worker = next(entry.pid for entry in lab.log() if entry.event == "hold")
    shown = lab.json("fork", lab.path(), "--name", "fork")
    assert shown["trials"] == {"COMPLETED": 1, "PENDING": 1}
    forked = lab.start("restore", lab.path("fork"))
    lab.until(lambda: sum(entry.event == "hold" for entry in lab.log()) == 2, forked)
    os.kill(worker, 0)
    assert running.process.poll() is None
    hold.unlink()
    assert running.wait().code == 0
    assert forked.wait().code == 0
    assert lab.outcome("fork") == lab.outcome()
    log = lab.log()
    assert executed(log, 0) == [0, 1, 2]
    assert [step for _, step in starts(log, 1)] == [0, 1]
    assert [len(starts(log, number)) for number in (2, 3)] == [2, 2]
