"""Searches that are told to stop, lose what they stand on, or run user code that misbehaves, with real processes."""

from __future__ import annotations

from support import DIED, Lab, MakeLab, executed, starts, steps_of
from support_prefect import make_endless

from holdfast.flows.server import EmbeddedServer


class TestStopping:
    def test_cancelled_and_stopped_on_request(self, make_lab: MakeLab) -> None:
        lab = make_lab()
        make_endless(lab)
        lab.order("slow", 0, 0)
        slow = lab.order("slow", 1, 0)
        run = lab.start("run", lab.spec(search={"num_trials": 3}))
        lab.until_logged("step", 0, 5, run)
        lab.run("cancel", lab.path(), "--trial", 0)
        lab.until_logged("step", 1, 5, run)
        lab.run("stop", lab.path())
        assert run.wait().code == 0
        assert lab.statuses() == ["CANCELLED", "PENDING"]
        assert lab.json("show", lab.path())["status"] == "stopped"
        last = executed(lab.log(), 1)[-1]
        slow.unlink()
        lab.clear_log()
        lab.run("restore", lab.path())
        assert lab.statuses() == ["CANCELLED", "COMPLETED", "COMPLETED"]
        assert starts(lab.log(), 0) == []
        assert starts(lab.log(), 1) == [(2, last + 1)]

    def test_cancelled_while_nobody_drives(self, lab: Lab) -> None:
        lab.run("run", lab.spec(search={"num_trials": 3}), fault="proposal.committed:2", code=DIED)
        lab.light("cancel", lab.path(), "--trial", 1)
        plan = lab.json("restore", lab.path(), "--plan")
        assert [line["action"] for line in plan] == ["keep", "adopt"]
        lab.run("restore", lab.path())
        assert lab.statuses() == ["COMPLETED", "CANCELLED", "COMPLETED"]
        assert starts(lab.log(), 1) == []


class TestSurroundings:
    def test_a_storage_that_breaks_interrupts_the_search_and_a_restore_goes_on(self, make_lab: MakeLab) -> None:
        lab = make_lab(steps=4)
        hold = lab.order("hold", 1, 2)
        run = lab.start("run", lab.spec(search={"num_trials": 3}))
        lab.until_logged("hold", 1, 2, run)
        folder, aside = lab.path() / "trials/000001/checkpoints", lab.path() / "aside"
        folder.rename(aside)
        folder.write_text("in the way")
        hold.unlink()
        ended = run.wait()
        assert ended.code == 4, ended.output
        assert "000001/checkpoints" in ended.output
        assert "Traceback" not in ended.output
        assert lab.statuses() == ["COMPLETED", "RUNNING"]
        folder.unlink()
        aside.rename(folder)
        lab.clear_log()
        lab.run("restore", lab.path())
        assert lab.statuses() == ["COMPLETED"] * 3
        assert starts(lab.log(), 1) == [(2, 2)]

    def test_prefect_that_dies_meanwhile_loses_nothing(self, make_lab: MakeLab) -> None:
        lab = make_lab()
        hold = lab.order("hold", 0, 1)
        server = EmbeddedServer()
        server.begin()
        try:
            patience = {"PREFECT_API_URL": server.url(), "PREFECT_CLIENT_MAX_RETRIES": "0"}
            run = lab.start("run", lab.spec(search={"num_trials": 2}), **patience)
            lab.until_logged("hold", 0, 1, run)
        finally:
            server.stop()
        hold.unlink()
        ended = run.wait()
        assert ended.code == 0, ended.output
        assert "Traceback" not in ended.output
        assert "Prefect could not record that" in ended.output
        assert lab.statuses() == ["COMPLETED"] * 2
        assert steps_of(lab, 0) == steps_of(lab, 1) == [0, 1, 2]


class TestUserCode:
    def test_nothing_that_user_code_does_takes_the_search_down(self, lab: Lab) -> None:
        for order in (("segv", 0, 1), ("exit", 1, 1), ("noise", 2, 1), ("hang", 3, 1), ("nan", 4, 2), ("mute", 5, 0)):
            lab.order(*order)
        spec = lab.spec(search={"num_trials": 7, "max_concurrent": 2}, failure={"trial_timeout": 15})
        lab.run("run", spec, code=1)
        trials = lab.trials()
        assert [trial["status"] for trial in trials] == [
            *("FAILED", "FAILED", "COMPLETED", "TIMED_OUT", "COMPLETED", "FAILED", "COMPLETED")
        ]
        for number, word in ((0, "SIGSEGV"), (1, "3"), (3, "trial_timeout of 15 s"), (5, "'loss'")):
            assert word in trials[number]["error"], trials[number]
        assert trials[4]["metrics"]["loss"] == "NaN"
        assert lab.json("show", lab.path())["best"]["number"] in (2, 6)
        assert lab.checkpoints(0)
        assert lab.checkpoints(3)
        log = lab.path() / "trials/000002/log-a1.txt"
        assert "noise 99999" in log.read_text()

    def test_failures_are_retried_and_a_restore_gives_a_fresh_budget(self, lab: Lab) -> None:
        fail = lab.order("fail", 0, 1)
        lab.run("run", lab.spec(search={"num_trials": 2}, failure={"max_failures": 2}), code=1)
        assert lab.statuses() == ["FAILED", "COMPLETED"]
        assert starts(lab.log(), 0) == [(1, 0), (2, 1), (3, 1)]
        lab.run("restore", lab.path(), "--resume-errored", code=1)
        assert starts(lab.log(), 0)[3:] == [(4, 1), (5, 1), (6, 1)]
        fail.unlink()
        lab.run("restore", lab.path(), "--resume-errored")
        assert lab.statuses() == ["COMPLETED"] * 2
        assert steps_of(lab, 0) == [0, 1, 2]

    def test_the_first_failure_can_end_the_search(self, lab: Lab) -> None:
        """And once its cause is removed, the failed trial and the ones that were stopped with it go on."""
        lab.order("hold", 0, 1)
        gate = lab.order("hold", 1, 0)
        fail = lab.order("fail", 1, 1)
        run = lab.start("run", lab.spec(search={"max_concurrent": 2}, failure={"fail_fast": True}))
        lab.until_logged("hold", 0, 1, run)
        gate.unlink()
        lab.until(lambda: "FAILED" in lab.statuses(), run)
        (lab.folder / "orders/hold-0-1").unlink()
        assert run.wait().code == 1
        assert lab.statuses()[1:] == ["FAILED"]
        fail.unlink()
        lab.run("restore", lab.path(), "--resume-errored")
        assert lab.statuses() == ["COMPLETED"] * 4
        assert starts(lab.log(), 1) == [(1, 0), (2, 1)]
