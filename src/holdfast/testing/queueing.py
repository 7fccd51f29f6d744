"""The part of the store's contract that is about trials from outside: queued, repeated, merged from other experiments."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from holdfast.core.errors import AlreadyClaimed, AlreadyFinished, Conflict, ExperimentNotFound, InvalidInput, SpecError
from holdfast.core.spec import ExperimentSpec
from holdfast.core.trial import Outcome, Trial, TrialStatus
from holdfast.core.values import Config
from holdfast.storage.database import experiments, merging, queueing
from holdfast.storage.database.attempts import AttemptWriter
from holdfast.storage.database.driver import Ending
from holdfast.storage.database.engine import Database, Transaction
from holdfast.storage.database.leases import Leases
from holdfast.storage.database.reads import ALL
from holdfast.testing import racing
from holdfast.testing.lab import FAILED, TYPED, Lab, dump, same
from holdfast.testing.racing import Racers, url_of
from holdfast.testing.samples import sample_spec

FLOAT: dict[str, Any] = {"type": "float", "low": 0.0, "high": 1.0}


def lab_of(database: Database, name: str, **changes: Any) -> tuple[Lab, ExperimentSpec]:
    """Return an experiment of a spec of its own, with its lease taken."""
    spec = sample_spec(name=name, **changes)
    uuid = f"uuid-{name.partition('#')[0]}"
    record = experiments.create(database, spec, uuid=uuid, location=f"/nowhere/{name}", seed=7, workdir="/")
    Leases(database, record.id).take(seen=0, epoch=1, holder={"pid": 1}, action="started", detail={})
    return Lab(database, record), spec


def merge(lab: Lab, spec: ExperimentSpec, names: Sequence[str]) -> dict[str, int]:
    return merging.merge(lab.database, lab.id, spec, lab.record.uuid, names)


def merged(lab: Lab) -> list[Trial]:
    """Return the merged trials in the order in which they came."""
    return lab.reader.trials(first=-ALL, last=-1)[::-1]


def ended(lab: Lab, config: Config, outcome: Outcome = Outcome.COMPLETED, **metrics: Any) -> int:
    """Add a trial that has ended; return its number."""
    number = lab.driver.propose(config)
    writer = lab.claim(number)
    if outcome in (Outcome.FAILED, Outcome.TIMED_OUT):
        writer.report(0, metrics or {"loss": 9.0})
        lab.driver.end(writer.attempt, Ending(outcome=outcome, error=FAILED.error))
    else:
        lab.end(writer, outcome, **metrics)
    return number


class QueueContract:
    """What every database keeps of trials from outside; part of ``DatabaseContract``."""

    @pytest.fixture
    def database(self) -> Iterator[Database]:
        raise NotImplementedError("the subclass gives it")

    @pytest.fixture
    def lab(self, database: Database) -> Lab:
        return Lab.new(database, "sample")

    def enqueue(self, lab: Lab, x: float = 0.5, **options: Any) -> list[int]:
        return queueing.enqueue(lab.database, lab.id, {"x": x}, seed=lab.record.seed, **options)

    # The queue

    def test_queued_trials_wait_for_their_time_with_what_they_were_given(self, lab: Lab) -> None:
        start = datetime(2026, 11, 21, 12, tzinfo=UTC)
        assert self.enqueue(lab, ts_start=start, metadata={"who": "me", "n": [1, {"a": None}]}) == [0]
        trial = lab.trial(0)
        assert (trial.status, trial.source, trial.group, trial.repeat) == (TrialStatus.PENDING, "queued", 0, 0)
        assert (trial.ts_start, trial.metadata) == (start, {"who": "me", "n": [1, {"a": None}]})
        assert (trial.attempt.number, trial.attempt.claimed) == (1, False)
        assert lab.reader.audit()[-1].action == "queued"
        assert lab.reader.audit()[-1].detail == {"first": 0, "trials": 1, "ts_start": start.isoformat()}

    def test_repeats_are_trials_of_one_group(self, lab: Lab) -> None:
        lab.driver.propose({"x": 0.1})
        assert self.enqueue(lab, repeats=3) == [1, 2, 3]
        assert self.enqueue(lab, repeats=2) == [4, 5]
        found = [(trial.number, trial.source, trial.group, trial.repeat) for trial in lab.reader.trials()]
        assert found == [
            (0, "proposed", None, 0),
            *[(1, "queued", 1, 0), (2, "queued", 1, 1), (3, "queued", 1, 2)],
            *[(4, "queued", 4, 0), (5, "queued", 4, 1)],
        ]
        trials = lab.reader.trials(first=1)
        assert len({trial.config_id for trial in trials}) == 1
        assert len({trial.seed for trial in trials}) == len(trials)

    def test_queueing_needs_no_lease_and_takes_nothing_from_its_holder(self, lab: Lab) -> None:
        writer = lab.started()
        self.enqueue(lab)
        writer.report(0, {"loss": 1.0})
        assert lab.driver.propose({"x": 0.2}) == 2
        Leases(lab.database, lab.id).release(epoch=1, active=0.0, ended="stopped")
        assert self.enqueue(lab) == [3]

    def test_a_proposal_whose_number_was_queued_meanwhile_is_refused(self, lab: Lab) -> None:
        assert lab.driver.propose({"x": 0.1}, number=0) == 0
        self.enqueue(lab)
        before = dump(lab.database)
        for number in (0, 1, 3, -1):
            with pytest.raises(Conflict):
                lab.driver.propose({"x": 0.9}, number=number, state=b"s")
            assert dump(lab.database) == before
        assert lab.driver.propose({"x": 0.9}, number=2) == 2

    def test_many_queue_at_once_while_somebody_proposes(self, lab: Lab, racers: Racers) -> None:
        count = 8
        job = {"url": url_of(lab.database), "experiment": lab.id, "config": {"x": 0.5}, "repeats": 3, "times": count}
        with ThreadPoolExecutor(1) as pool:
            proposing = pool.submit(lambda: [lab.driver.propose({"x": place / 64}) for place in range(count)])
            answers = racers.race(racing.enqueue, [job] * 6)
            proposed = proposing.result()
        assert all(isinstance(answer, list) for answer in answers), answers
        groups = [group for answer in answers for group in answer]
        assert sorted([*proposed, *(number for group in groups for number in group)]) == list(range(19 * count))
        for group in groups:
            assert group == list(range(group[0], group[0] + 3))
        assert [trial.number for trial in lab.reader.trials()] == list(range(19 * count))
        assert {trial.number for trial in lab.reader.trials() if trial.source == "proposed"} == set(proposed)

    def test_what_waits_and_runs_is_found_without_what_has_ended(self, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
        assert queueing.active(lab.reader) == []
        for place in range(6):
            ended(lab, {"x": place / 8}, loss=1.0)
        assert queueing.active(lab.reader) == []
        start = datetime.now(UTC) + timedelta(hours=1)
        self.enqueue(lab, ts_start=start)
        running = lab.started()
        ended(lab, {"x": 0.9}, loss=1.0)
        self.enqueue(lab)
        executed: list[object] = []
        run = Transaction.run

        def counting(self: Transaction, *arguments: Any, **values: Any) -> Any:
            executed.append(values)
            return run(self, *arguments, **values)

        monkeypatch.setattr(Transaction, "run", counting)
        assert [trial.number for trial in queueing.active(lab.reader)] == [6, 7, 9]
        assert len(executed) <= 4
        monkeypatch.undo()
        lab.end(running, loss=1.0)
        assert [trial.number for trial in queueing.active(lab.reader)] == [6, 9]

    def test_the_queue_of_a_deleted_experiment_is_refused(self, lab: Lab) -> None:
        experiments.delete(lab.database, lab.id)
        before = dump(lab.database)
        with pytest.raises(ExperimentNotFound):
            self.enqueue(lab)
        assert dump(lab.database) == before

    # Merging

    def test_merged_trials_are_copies_and_none_of_its_own(self, database: Database) -> None:
        source, _ = lab_of(database, "source")
        ended(source, {"x": 0.1}, loss=1.0, **TYPED)
        ended(source, {"x": 0.2}, Outcome.FAILED)
        ended(source, {"x": 0.3}, Outcome.TIMED_OUT)
        writer = source.started(0.4)
        source.save(writer, 3, loss=5.0, acc=1)
        source.end(writer, Outcome.PRUNED)
        ended(source, {"x": 0.5}, Outcome.CANCELLED)
        source.driver.skip([source.row(source.driver.propose({"x": 0.6}))])
        source.started(0.7)
        source.driver.propose({"x": 0.8})
        lab, spec = lab_of(database, "target")
        own = ended(lab, {"x": 0.9}, loss=0.5)
        others = repr((source.reader.trials(), source.reader.history(), source.reader.audit()))
        assert merge(lab, spec, ["source"]) == {"source": 4}
        assert repr((source.reader.trials(), source.reader.history(), source.reader.audit())) == others
        copies = merged(lab)
        originals = source.reader.trials()[:4]
        assert [trial.number for trial in copies] == [-1, -2, -3, -4]
        for copy, original in zip(copies, originals, strict=True):
            assert (copy.status, copy.config, copy.config_id) == (original.status, original.config, original.config_id)
            assert same(copy.metrics, original.metrics)
            assert copy.error == original.error
            assert (copy.source, copy.origin) == ("merged", f"source#{original.number}@uuid-source")
            assert copy.attempt.outcome is original.attempt.outcome
        self.holds_only_its_own(lab, own)
        assert lab.reader.audit()[-1].action == "merged"
        assert lab.reader.audit()[-1].detail == {"experiments": [{"name": "source", "uuid": "uuid-source", "trials": 4}]}

    def holds_only_its_own(self, lab: Lab, number: int) -> None:
        """Every read that does not ask for merged trials knows the own one alone."""
        reader = lab.reader
        assert [trial.number for trial in reader.trials()] == [number]
        assert reader.counts() == {TrialStatus.COMPLETED: 1}
        assert list(reader.trial_ids()) == [number]
        assert [trial for trial, _ in reader.ended_since(-1)] == [number]
        assert list(reader.attempts()) == [number]
        assert (reader.checkpoints(), reader.telemetry(), reader.history()) == ([], [], [])
        assert (reader.cancel_requests(), reader.last_decisions()) == (set(), {})
        assert queueing.active(reader) == []
        assert lab.driver.propose({"x": 0.5}) == number + 1

    def test_numbers_begin_at_0_beside_merged_trials(self, database: Database) -> None:
        source, _ = lab_of(database, "source")
        for _ in range(3):
            ended(source, {"x": 0.1}, loss=1.0)
        lab, spec = lab_of(database, "target")
        merge(lab, spec, ["source"])
        assert lab.driver.propose({"x": 0.2}, number=0) == 0
        assert self.enqueue(lab) == [1]

    def test_what_is_merged_again_is_only_what_is_new(self, database: Database) -> None:
        (source, _), (second, _), (lab, spec) = (lab_of(database, name) for name in ("source#1@x", "second", "target"))
        ended(source, {"x": 0.1}, loss=1.0)
        ended(second, {"x": 0.2}, loss=2.0)
        assert merge(lab, spec, ["source#1@x"]) == {"source#1@x": 1}
        assert merge(lab, spec, ["uuid-source", "source#1@x"]) == {"source#1@x": 0}
        ended(source, {"x": 0.3}, loss=3.0)
        assert merge(lab, spec, ["second", "source#1@x"]) == {"second": 1, "source#1@x": 1}
        assert [trial.number for trial in merged(lab)] == [-1, -2, -3]
        origins = [merging.Origin.parse(str(trial.origin)) for trial in merged(lab)]
        assert [(origin.name, origin.number) for origin in origins] == [("source#1@x", 0), ("second", 0), ("source#1@x", 1)]
        assert merge(source, spec, ["target"]) == {"target": 0}  # what was merged into it is none of its own

    def test_merged_trials_never_change(self, database: Database) -> None:
        source, _ = lab_of(database, "source")
        ended(source, {"x": 0.1}, loss=1.0)
        lab, spec = lab_of(database, "target")
        merge(lab, spec, ["source"])
        (copy,) = merged(lab)
        before = dump(database)
        with pytest.raises(AlreadyClaimed):
            AttemptWriter.claim(database, lab.id, 1, copy.attempt.id, token="t")
        with pytest.raises((AlreadyFinished, Conflict)):
            lab.driver.end(copy.attempt.id, Ending(outcome=Outcome.LOST))
        assert dump(database) == before
        experiments.delete(database, source.id)
        assert [trial.metrics for trial in merged(lab)] == [{"loss": 1.0}]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"objectives": {"loss": "max"}}, r"objectives: \{loss: min\} / \{loss: max\}"),
            ({"objectives": {"loss": "min", "size": "min"}}, "size: min"),
            ({"space": {"x": FLOAT, "extra": FLOAT}}, "extra: absent / float"),
            ({"space": {"x": {**FLOAT, "high": 2.0}}}, r"trial 0: x = 1.5 is outside \[0.0, 1.0\]"),
            ({"space": {"x": {"type": "categorical", "choices": [1.5, "one"]}}}, "trial 0: x = 1.5"),
        ],
        ids=["direction", "objective", "parameter", "value", "type"],
    )
    def test_what_does_not_fit_is_refused_with_the_difference(
        self, database: Database, changes: dict[str, Any], message: str
    ) -> None:
        good, _ = lab_of(database, "good")
        ended(good, {"x": 0.5}, loss=1.0)
        bad, _ = lab_of(database, "bad", **changes)
        x = 1.5 if "space" in changes and "extra" not in changes["space"] else 0.5
        ended(bad, {"x": x, **({"extra": 0.5} if "extra" in str(changes) else {})}, loss=1.0, size=1.0)
        lab, spec = lab_of(database, "target")
        before = dump(database)
        with pytest.raises(SpecError, match=message):
            merge(lab, spec, ["good", "bad"])
        assert dump(database) == before

    def test_unknown_experiments_and_itself_are_refused(self, database: Database) -> None:
        source, _ = lab_of(database, "source")
        ended(source, {"x": 0.5}, loss=1.0)
        lab, spec = lab_of(database, "target")
        before = dump(database)
        for names, message in (
            (["source", "other"], "no experiment 'other'.*'source'"),
            (["target"], "itself"),
            (["uuid-target"], "itself"),
            ("source", r"\['source'\]"),
        ):
            with pytest.raises(InvalidInput, match=message):
                merge(lab, spec, names)
        assert dump(database) == before

    def test_a_merge_is_one_transaction(self, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        source, _ = lab_of(database, "source")
        for place in range(3):
            ended(source, {"x": place / 4}, loss=1.0)
        lab, spec = lab_of(database, "target")
        before = dump(database)
        many, count = Transaction.many, 0

        def failing(self: Transaction, *arguments: Any) -> None:
            nonlocal count
            count += 1
            if count == 3:
                raise KeyboardInterrupt
            many(self, *arguments)

        monkeypatch.setattr(Transaction, "many", failing)
        with pytest.raises(KeyboardInterrupt):
            merge(lab, spec, ["source"])
        monkeypatch.undo()
        assert dump(database) == before
        assert merge(lab, spec, ["source"]) == {"source": 3}

    def test_scores_that_are_none_are_kept_as_they_are(self, database: Database) -> None:
        source, _ = lab_of(database, "source")
        ended(source, {"x": 0.1}, loss=math.nan)
        lab, spec = lab_of(database, "target")
        merge(lab, spec, ["source"])
        assert same(merged(lab)[0].metrics, {"loss": math.nan})
