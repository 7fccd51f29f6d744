"""Supervise one attempt: hand the job over, answer its reports, watch the clock and the process."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass

from holdfast.core.errors import NotStorable, StorageError, TrialCrashed, TrialFailed, TrialFailure, TrialTimedOut
from holdfast.core.trial import Outcome
from holdfast.tasks.workers.logs import LogTail
from holdfast.tasks.workers.messages import (
    OUTCOMES,
    STRENGTH,
    Decision,
    Ended,
    Frame,
    Job,
    Rejected,
    Supervision,
    job_frame,
    report_from,
)
from holdfast.tasks.workers.saving import Publication, Publisher
from holdfast.tasks.workers.worker import Worker, WorkerDied

POLL = 0.2
"""Seconds between two looks at the supervision's wishes."""
CANCEL_GRACE = 3.0
"""Seconds in which a cancelled attempt may come to its next report and tidy up."""
STOP_GRACE = 30.0
"""Seconds in which an attempt that was told to stop may tidy up."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How an attempt ended, and whether its child may run another one."""

    ended: Ended
    reusable: bool


class Attempt:
    """One attempt in one child. Whoever runs it disposes of the child unless the verdict says that it is reusable."""

    def __init__(self, worker: Worker, job: Job, supervision: Supervision) -> None:
        self._worker = worker
        self._job = job
        self._supervision = supervision
        self._tail = LogTail(job.log)
        self._told: Decision | None = None
        self._wish = Decision.CONTINUE
        self._patience = float("inf")  # when a stopping attempt is killed
        self._next_poll = 0.0
        self._deadline = float("inf")
        self._publisher = Publisher()

    def run(self) -> Verdict:
        """Run to the end; TrialFailed, TrialTimedOut, TrialCrashed, StorageError, or what the supervision raised."""
        try:
            verdict = self._end()
        except BaseException:
            with contextlib.suppress(Exception):  # the first error counts
                self._show_log(final=True)
            raise
        finally:
            self._publisher.close()
        self._show_log(final=True)
        return verdict

    def _end(self) -> Verdict:
        """Run to the end, and see to it that what the child had saved by then counts."""
        try:
            try:
                verdict = self._run()
            except WorkerDied:
                verdict = self._dead()
        except TrialFailure:
            with contextlib.suppress(StorageError, TrialFailed):  # how the attempt ended counts
                self._settle()
            raise
        self._settle()
        return verdict

    def _settle(self) -> None:
        """Finish what is being published when the attempt ends otherwise than by itself: then its child waits for nothing."""
        if self._publisher.wake is None:
            return
        self._worker.kill()
        if (refused := self._stored(wait=True)) is not None and refused.error is not None:
            if isinstance(refused.error, NotStorable):
                raise TrialFailed(str(refused.error), kind=NotStorable.__name__)
            raise refused.error

    def _run(self) -> Verdict:
        now = time.monotonic()
        self._next_poll = now + POLL
        if self._job.timeout is not None:
            self._deadline = now + self._job.timeout
        if not self._job.candidates:
            self._supervision.started(self._worker.identity, None, ())
        self._worker.send(job_frame(self._job))
        while True:
            until = min(self._next_poll, self._deadline, self._patience)
            frame = self._worker.receive(until - time.monotonic(), self._publisher.wake)
            verdict = self._answer(frame) if frame is not None else None
            if verdict is not None:
                return verdict
            self._tell()
            verdict = self._look(time.monotonic())
            if verdict is not None:
                return verdict

    def _answer(self, frame: Frame) -> Verdict | None:
        if rows := frame.get("rows"):
            self._supervision.telemetry([(moment, name, value) for moment, name, value in rows])
        match frame["t"]:
            case "report":
                return self._report(frame)
            case "saved":
                self._publish(frame)
            case "started":
                self._started(frame)
            case "ended":
                return self._ended(frame)
            case "failed":
                return self._failed(frame)
        return None

    def _started(self, frame: Frame) -> None:
        candidates = self._job.candidates
        resumed = None if frame["resumed"] is None else candidates[frame["resumed"]]
        rejected = [Rejected(candidate=candidates[place], reason=reason) for place, reason in frame["rejected"]]
        self._supervision.started(self._worker.identity, resumed, rejected)
        self._worker.send({"t": "go"})

    def _report(self, frame: Frame) -> Verdict | None:
        decision = self._supervision.report(report_from(frame))
        if self._told is not None:  # the checkpoint that a preempted attempt saved although it was not due
            decision = self._told
        decision = max(decision, self._wish, key=STRENGTH.__getitem__)
        if decision is Decision.KILL:
            return self._stopped(decision)
        self._worker.send({"t": "decision", "d": decision.value})
        if decision is not Decision.CONTINUE and self._told is None:
            self._told = decision
            if decision is not Decision.PREEMPT:  # which may have a large state to save
                self._patience = time.monotonic() + STOP_GRACE
        return None

    def _publish(self, frame: Frame) -> None:
        """Publish what the child has written, while its reports go on being answered."""
        self._tell(wait=True)  # a child has one under way at most
        report = report_from(frame)
        self._publisher.start(report, self._supervision.publication(report))

    def _tell(self, *, wait: bool = False) -> None:
        """Tell the child what became of its save, once that is known."""
        done = self._stored(wait=wait)
        if done is not None:
            error = None if done.error is None else str(done.error)
            self._worker.send({"t": "stored", "error": error, "storable": not isinstance(done.error, NotStorable)})

    def _stored(self, *, wait: bool) -> Publication | None:
        """Record a checkpoint that was published since the last call, if any; what was not refused is raised."""
        done = self._publisher.take(wait=wait)
        if done is not None and done.published is not None:
            self._supervision.saved(done.report, done.published)
        elif done is not None and isinstance(done.error, StorageError | NotStorable):
            self._supervision.log([f"the checkpoint of step {done.report.step} was not stored: {done.error}"])
        elif done is not None and done.error is not None:
            raise done.error
        return done

    def _ended(self, frame: Frame) -> Verdict:
        clean = bool(frame["clean"])
        if frame["stopped"] is not None:
            return Verdict(ended=Ended(outcome=OUTCOMES[Decision(frame["stopped"])]), reusable=clean)
        return Verdict(ended=Ended(outcome=Outcome.COMPLETED, metrics=frame["metrics"]), reusable=clean)

    def _failed(self, frame: Frame) -> Verdict:
        if frame["infrastructure"]:
            raise StorageError(frame["message"])
        if self._told is not None or self._wish is Decision.CANCEL:
            return self._stopped(self._told or self._wish)
        raise TrialFailed(frame["message"], kind=frame["kind"], traceback=frame["traceback"], names=frame["names"])

    def _look(self, now: float) -> Verdict | None:
        """Poll when it is time to, and end what has to be ended."""
        if now >= self._next_poll:
            self._next_poll = now + POLL
            self._show_log()
            wish = self._supervision.poll()
            if wish is Decision.KILL:
                return self._stopped(self._told or wish)
            if wish is Decision.CANCEL and self._wish is not Decision.CANCEL:
                self._patience = min(self._patience, now + CANCEL_GRACE)
            self._wish = max(self._wish, wish, key=STRENGTH.__getitem__)
        if now >= self._patience:
            return self._stopped(self._told or self._wish)
        if now >= self._deadline:
            if self._told is not None or self._wish is Decision.CANCEL:
                return self._stopped(self._told or self._wish)
            raise TrialTimedOut(
                f"trial {self._job.trial} took longer than its trial_timeout of {self._job.timeout:g} s and was ended"
            )
        return None

    def _stopped(self, decision: Decision) -> Verdict:
        return Verdict(ended=Ended(outcome=OUTCOMES[decision]), reusable=False)

    def _dead(self) -> Verdict:
        with contextlib.suppress(WorkerDied):
            while (frame := self._worker.receive(0)) is not None:  # its last words
                if frame["t"] == "saved":
                    self._publish(frame)
        fate = self._worker.fate()
        if self._told is not None or self._wish is Decision.CANCEL:
            return self._stopped(self._told or self._wish)
        lines = self._tail.last_lines() or self._worker.printed()
        last = "\nIts last output:\n" + "\n".join(lines) if lines else ""
        raise TrialCrashed(f"the process of trial {self._job.trial} ({self._worker.pid}) was lost: {fate}{last}")

    def _show_log(self, *, final: bool = False) -> None:
        if lines := self._tail.read(final=final):
            self._supervision.log(lines)
