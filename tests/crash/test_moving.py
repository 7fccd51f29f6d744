"""Real searches whose paths are moved, copied, and driven with one database after another."""

from __future__ import annotations

import shutil
from pathlib import Path

from support import DIED, Lab, executed, starts, tree

import holdfast

STEPS = 3


def killed(lab: Lab, **search: object) -> None:
    """Leave an experiment that died in the middle of its second trial."""
    ended = lab.run("run", lab.spec(search=search), fault="checkpoint.committed:5", code=DIED)
    assert ended.code == DIED


def steps(path: Path) -> list[list[int]]:
    """Return the canonical steps of each trial."""
    with holdfast.open(path) as experiment:
        found: dict[int, list[int]] = {trial.number: [] for trial in experiment.trials}
        for row in experiment.history():
            if row.canonical:
                found[row.trial].append(row.step)
        return [found[number] for number in sorted(found)]


def test_a_moved_experiment_runs_and_writes_only_in_its_new_place(lab: Lab) -> None:
    killed(lab)
    old = lab.path().parent
    new = lab.folder / "with spaces % ü" / "moved"
    new.parent.mkdir()
    lab.path().rename(new)
    for file in old.glob("holdfast.db*"):
        file.unlink()
    before = tree(old)
    said = lab.run("restore", new).output
    assert "rebuilt from" in said
    assert tree(old) == before
    assert steps(new) == [list(range(STEPS))] * 4
    assert executed(lab.log(), 0) == list(range(STEPS))  # not again
    assert all((new / "trials" / f"{number:06d}" / "checkpoints").is_dir() for number in range(4))
    assert (new.parent / "holdfast.db").exists()


def test_a_copy_beside_a_living_original_goes_its_own_way(lab: Lab) -> None:
    killed(lab)
    copy = shutil.copytree(lab.path(), lab.path().with_name("exp copy"))
    original = tree(lab.path())
    said = lab.run("restore", copy, "--set", "search.num_trials=5").output
    assert "an experiment of its own" in said
    assert tree(lab.path()) == original
    assert len(steps(copy)) == 5
    lab.run("restore", lab.path())
    assert steps(lab.path()) == [list(range(STEPS))] * 4
    shown = {row["name"]: row for row in lab.json("list", lab.path().parent)}
    assert set(shown) == {"exp", "exp copy"}
    assert shown["exp"]["id"] != shown["exp copy"]["id"]
    assert shown["exp copy"]["path"] == str(copy)


def test_one_path_and_two_databases_have_one_driver(lab: Lab) -> None:
    """What R19 asks for with another database: refused while somebody drives, and nobody runs anything twice."""
    hold = lab.order("hold", 1, 1)
    running = lab.start("run", lab.spec())
    lab.until_logged("hold", 1, 1, running)
    other = f"sqlite:///{lab.folder}/other.db"
    refused = lab.run("restore", lab.path(), "--database", other, code=3)
    assert f"process {running.process.pid}" in refused.output
    hold.unlink()
    running.wait()
    lab.run("restore", lab.path(), "--database", other, "--set", "search.num_trials=6")
    lab.run("restore", lab.path(), "--set", "search.num_trials=7")  # the first database learns what the other one did
    assert steps(lab.path()) == [list(range(STEPS))] * 7
    assert [len(starts(lab.log(), number)) for number in range(7)] == [1] * 7


def test_two_restores_with_a_database_each(lab: Lab) -> None:
    killed(lab, num_trials=3)
    for round_ in range(2):
        url = [f"sqlite:///{lab.folder}/{round_}-{name}.db" for name in "ab"]
        number = 4 + round_
        hold = lab.order("hold", number - 1, 1)
        both = [lab.start("restore", lab.path(), "--database", one, "--set", f"search.num_trials={number}") for one in url]
        lab.until(lambda both=both: any(one.process.poll() is not None for one in both))
        hold.unlink()
        codes = sorted(one.wait().code for one in both)
        assert codes == [0, 3], [one.output for one in both]
    log = lab.log()
    assert all(len(starts(log, number)) == 1 for number in range(2, 5))
    assert [executed(log, number) for number in range(2, 5)] == [list(range(STEPS))] * 3


def test_looking_at_a_path_without_its_database(lab: Lab) -> None:
    killed(lab)
    rows = lab.trials()
    for file in lab.path().parent.glob("holdfast.db*"):
        file.unlink()
    before = tree(lab.path().parent)
    assert [trial["number"] for trial in lab.json("trials", lab.path())] == [row["number"] for row in rows]
    plan = lab.json("restore", lab.path(), "--plan")
    assert [(row["trial"], row["action"]) for row in plan][:2] == [(0, "keep"), (1, "resume")]
    assert [row["name"] for row in lab.json("list", lab.path().parent)] == ["exp"]
    assert tree(lab.path().parent) == before


def test_an_export_is_taken_into_another_database(lab: Lab) -> None:
    killed(lab)
    file, url = lab.folder / "exp.holdfast", f"sqlite:///{lab.folder}/other.db"
    assert lab.json("export", lab.path(), "--to", file)["trials"] == 2
    assert lab.json("import", file, "--database", url)["trials"] == 2
    again = lab.light("import", file, "--database", url)
    assert (again.code, "already" in again.output) == (1, True)
    lab.run("restore", lab.path(), "--database", url)
    assert steps(lab.path()) == [list(range(STEPS))] * 4
    assert [len(starts(lab.log(), number)) for number in (0, 2, 3)] == [1, 1, 1]


def test_both_databases_may_be_lost_while_a_search_runs(lab: Lab) -> None:
    """The search ends with an error, since what it writes would be lost; the path is enough to go on."""
    hold = lab.order("hold", 2, 1)
    running = lab.start("run", lab.spec())
    lab.until_logged("hold", 2, 1, running)
    for file in lab.path().parent.glob("holdfast.db*"):
        file.unlink()
    hold.unlink()
    assert running.wait().code == 4
    lab.run("restore", lab.path())
    assert steps(lab.path()) == [list(range(STEPS))] * 4
    assert [len(starts(lab.log(), number)) for number in range(2)] == [1, 1]
