"""Rows from a journal: an experiment comes into a database that does not have it, or that has an older state of it."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from typing import Any, Literal

from sqlalchemy import text

from holdfast.core.errors import AlreadyClaimed, Corrupt, ExperimentExists
from holdfast.core.values import digest, dumps, dumps_ordered
from holdfast.storage.database import statements as sql
from holdfast.storage.database.engine import Database, Statement, Transaction
from holdfast.storage.database.losses import repeatable
from holdfast.storage.database.rows import now
from holdfast.storage.folder import Identity
from holdfast.storage.journal import Contents, Epoch, lineage

REBUILT = "rebuilt"
"""The audit row of a rebuild: until somebody drives with this database, it is a copy of what the path said then."""


def _sql(body: str) -> Statement:
    return Statement(text(body))


_EXPERIMENT = (
    "name = :name, location = :location, spec = :spec, spec_source = :spec_source, git_commit = :git_commit,"
    " workdir = :workdir, code_digest = :code_digest, copied_from = :copied_from, seed = :seed, created = :created, seq = :seq,"
    " epoch = :epoch, active_seconds = :active_seconds, stop_requested = :stop_requested, ended = :ended"
)
_ADD = _sql(
    "INSERT INTO experiment (uuid, name, location, spec, spec_source, git_commit, workdir, code_digest, copied_from, seed,"
    " created, seq, epoch, active_seconds, stop_requested, ended) VALUES (:uuid, :name, :location, :spec, :spec_source,"
    " :git_commit, :workdir, :code_digest, :copied_from, :seed, :created, :seq, :epoch, :active_seconds, :stop_requested,"
    " :ended) RETURNING id"
)
_REPLACE = _sql(
    f"UPDATE experiment SET {_EXPERIMENT}, holder = NULL, lease_expires = NULL, lease_renewed = NULL,"
    " told = 'continue', journaled = -1 WHERE uuid = :uuid RETURNING id"
)
_FIND = _sql("SELECT seq, epoch FROM experiment WHERE uuid = :uuid")
_TAKEN = _sql("SELECT uuid, location FROM experiment WHERE name = :name AND uuid <> :uuid")
_CLEAR = [
    _sql(f"DELETE FROM {table} WHERE experiment_id = :experiment")
    for table in ("trial", "worker", "objective", "proposer_state", "audit")  # what hangs on trials goes with them
]
_NO_WORKERS = _sql("DELETE FROM worker WHERE experiment_id = :experiment")
_OBJECTIVE = _sql(
    "INSERT INTO objective (experiment_id, position, name, direction) VALUES (:experiment, :position, :name, :direction)"
)
_CONFIG = _sql(
    "INSERT INTO config (digest, body) VALUES (:digest, :body) ON CONFLICT (digest) DO UPDATE SET digest = excluded.digest"
)
_CONFIG_ID = "(SELECT id FROM config WHERE digest = :digest)"
_TRIAL = _sql(
    "INSERT INTO trial (experiment_id, number, config_id, status, seq, ended_seq, current_attempt, seed, group_number, repeat,"
    " created, ts_start, source, origin, metadata, cancel_requested) VALUES (:experiment, :number, "
    f"{_CONFIG_ID}, :status, :seq, :ended_seq, :current_attempt, :seed, :group_number, :repeat, :created, :ts_start, :source,"
    " :origin, :metadata, :cancel_requested)"
)
_TRIAL_IDS = _sql("SELECT number, id FROM trial WHERE experiment_id = :experiment")
_ATTEMPT = _sql(
    "INSERT INTO attempt (trial_id, number, config_id, parent_step, reason, note, created, epoch, claimed_by, started, ended,"
    " outcome, error_kind, error, traceback, result, flow_run_id, task_run_id, host, pid, pid_started) VALUES (:trial_id,"
    f" :number, {_CONFIG_ID}, :parent_step, :reason, :note, :created, :epoch, :claimed_by, :started, :ended, :outcome,"
    " :error_kind, :error, :traceback, :result, :flow_run_id, :task_run_id, :host, :pid, :pid_started)"
)
_ATTEMPT_IDS = _sql(
    "SELECT t.number, a.number, a.id FROM attempt a JOIN trial t ON t.id = a.trial_id WHERE t.experiment_id = :experiment"
)
_PARENT = _sql("UPDATE attempt SET parent_id = :parent_id WHERE id = :id")
_REPORT = _sql(
    "INSERT INTO report (attempt_id, step, seq, reported, decision) VALUES (:attempt_id, :step, :seq, :reported, :decision)"
)
_REPORT_IDS = _sql(
    "SELECT r.attempt_id, r.step, r.id FROM report r JOIN attempt a ON a.id = r.attempt_id JOIN trial t ON t.id = a.trial_id"
    " WHERE t.experiment_id = :experiment"
)
_TELEMETRY = _sql(
    "INSERT INTO telemetry (attempt_id, ts, name, kind, number, text, seq)"
    " VALUES (:attempt_id, :ts, :name, :kind, :number, :text, :seq)"
)
_CHECKPOINT = _sql(
    "INSERT INTO checkpoint (attempt_id, step, seq, path, digest, bytes, created, status, reason, pinned)"
    " VALUES (:attempt_id, :step, :seq, :path, :digest, :bytes, :created, :status, :reason, :pinned)"
)
_STATE = _sql("INSERT INTO proposer_state (experiment_id, number, body, seq) VALUES (:experiment, :number, :body, :seq)")
_LINEAGE = _sql(
    "SELECT epoch, seq, detail FROM audit WHERE id IN"
    " (SELECT MIN(id) FROM audit WHERE experiment_id = :experiment AND epoch > 0 GROUP BY epoch) ORDER BY epoch"
)
_COPY = _sql(
    "SELECT detail FROM audit WHERE experiment_id = :experiment AND action = 'rebuilt' AND id >"
    " COALESCE((SELECT MAX(id) FROM audit WHERE experiment_id = :experiment AND id IN"
    " (SELECT MIN(id) FROM audit WHERE experiment_id = :experiment AND epoch > 0 GROUP BY epoch)"
    " AND action <> 'rebuilt'), 0) ORDER BY id DESC"
)
_TOUCHED = _sql("SELECT COALESCE(MAX(seq), 0) FROM trial WHERE experiment_id = :experiment")
_RENAME = _sql(
    "UPDATE experiment SET uuid = :uuid, name = :name, location = :location, spec = :spec, copied_from = :old, holder = NULL,"
    " lease_expires = NULL WHERE uuid = :old RETURNING id, seq, epoch"
)


def epochs(database: Database, experiment: int) -> list[Epoch]:
    """Return who held the experiment, as the database tells it."""
    return lineage([(row[0], row[1], row[2]) for row in database.run(_LINEAGE, experiment=experiment)])


def copied_at(database: Database, experiment: int) -> int | None:
    """Return the journal's end when this database was rebuilt from it, or None once somebody drove with this database."""
    rows = database.run(_COPY, experiment=experiment)
    return int(json.loads(rows[0][0])["journal"]) if rows else None


def touched(database: Database, experiment: int) -> int:
    """Return the seq of the newest change of a trial."""
    return int(database.run(_TOUCHED, experiment=experiment)[0][0])


def name_taken(database: Database, name: str, uuid: str) -> str | None:
    """Return the location of another experiment of that name in the database, or None."""
    rows = database.run(_TAKEN, name=name, uuid=uuid)
    return str(rows[0][1]) if rows else None


@repeatable
def rename(database: Database, identity: Identity, old: str) -> None:
    """Let the rows of ``old`` be those of its copy."""
    with database.write() as tx:
        rows = tx.run(
            _RENAME,
            uuid=identity.uuid,
            name=identity.name,
            location=identity.location,
            spec=_spec_text(identity),
            old=old,
        )
        if rows:
            tx.run(_NO_WORKERS, experiment=rows[0][0])
            tx.run(
                sql.ADD_AUDIT,
                experiment=rows[0][0],
                seq=rows[0][1],
                epoch=rows[0][2],
                happened=now(),
                action="copied",
                detail=dumps({"from": old}),
            )


@repeatable
def rebuild(
    database: Database,
    identity: Identity,
    contents: Contents,
    *,
    epoch: int,
    detail: dict[str, Any],
    judged: tuple[int, int] | Literal["whatever"] | None = "whatever",
) -> None:
    """Write an experiment's rows, in place of those that the database has of it, in one transaction.

    ``epoch`` is the path's. ``judged`` is (seq, epoch) of the row that was found to be out of date, None where there was none:
    AlreadyClaimed when there is another by now, which somebody may drive. ExperimentExists when the name belongs to another
    experiment of the database.
    """
    with database.write() as tx:
        found = [(int(row[0]), int(row[1])) for row in tx.run(_FIND, uuid=identity.uuid)]
        if judged != "whatever" and found != ([] if judged is None else [judged]):
            raise AlreadyClaimed(
                f"another process wrote experiment {identity.name!r} into {database.label} at this moment; nothing was "
                "changed; try again"
            )
        experiment = _head(tx, identity, contents, epoch, is_there=bool(found))
        for position, (name, direction) in enumerate(json.loads(contents.experiment["spec"])["objectives"].items()):
            tx.run(_OBJECTIVE, experiment=experiment, position=position, name=name, direction=direction)
        try:
            _Tables(tx, experiment, contents).write()
        except KeyError as error:
            raise Corrupt(f"the journal of {identity.location} names {error}, which it does not hold") from error
        tx.run(
            sql.ADD_AUDIT,
            experiment=experiment,
            seq=contents.end,
            epoch=max(epoch, contents.epoch),
            happened=now(),
            action=REBUILT,
            detail=dumps(detail),
        )


def _spec_text(identity: Identity) -> str:
    return dumps_ordered({**identity.spec, "name": identity.name})


def _head(tx: Transaction, identity: Identity, contents: Contents, epoch: int, *, is_there: bool) -> int:
    taken = tx.run(_TAKEN, name=identity.name, uuid=identity.uuid)
    if taken:
        raise ExperimentExists(
            f"the name {identity.name!r} belongs to {taken[0][1]} in this database, and {identity.location} is another "
            "experiment; name another database by --database"
        )
    said = contents.experiment
    spec = said.get("spec")
    if spec is None or json.loads(spec).get("name") != identity.name:
        spec = _spec_text(identity) if spec is None else _named(spec, identity.name)
    values = {
        "uuid": identity.uuid,
        "name": identity.name,
        "location": identity.location,
        "spec": spec,
        "spec_source": identity.spec_source,
        "git_commit": identity.git_commit,
        "workdir": said.get("workdir", identity.workdir),
        "code_digest": said.get("code_digest"),
        "copied_from": identity.ancestors[0] if identity.ancestors else said.get("copied_from"),
        "seed": identity.seed,
        "created": said.get("created", now()),
        "seq": contents.end,
        "epoch": max(epoch, contents.epoch),
        "active_seconds": said.get("active_seconds", 0.0),
        "stop_requested": said.get("stop_requested", 0),
        "ended": said.get("ended"),
    }
    contents.experiment["spec"] = spec
    if is_there:
        experiment = int(tx.run(_REPLACE, **values)[0][0])
        for clear in _CLEAR:
            tx.run(clear, experiment=experiment)
        return experiment
    return int(tx.run(_ADD, **values)[0][0])


def _named(spec: str, name: str) -> str:
    """Return a stored spec under another name."""
    return dumps_ordered({**json.loads(spec), "name": name})


class _Tables:
    """The rows of one experiment on their way into a database, natural keys becoming row ids.

    A statement takes of a row what it names: nothing is left out of the rows first, which costs as much as writing them.
    """

    def __init__(self, tx: Transaction, experiment: int, contents: Contents) -> None:
        self._tx = tx
        self._experiment = experiment
        self._tables = {name: [rows[key] for key in _sorted(rows)] for name, rows in contents.tables.items()}

    def write(self) -> None:
        tables, digests = self._tables, self._configs()
        self._tx.many(
            _TRIAL,
            [{**row, "digest": digests[row["config"]], "experiment": self._experiment} for row in tables["trial"]],
        )
        trials = dict(self._run(_TRIAL_IDS))
        self._tx.many(
            _ATTEMPT,
            [{**row, "digest": digests[row["config"]], "trial_id": trials[row["trial"]]} for row in tables["attempt"]],
        )
        attempts = {(trial, number): identity for trial, number, identity in self._run(_ATTEMPT_IDS)}
        self._tx.many(
            _PARENT,
            [
                {"parent_id": attempts[parent_of(row)], "id": attempts[row["trial"], row["number"]]}
                for row in tables["attempt"]
                if row["parent"] is not None
            ],
        )
        self._beside(attempts)

    def _beside(self, attempts: dict[tuple[int, int], int]) -> None:
        def owned(name: str) -> list[dict[str, object]]:
            return [{**row, "attempt_id": attempts[row["trial"], row["attempt"]]} for row in tables[name]]

        tables = self._tables
        tables["report"].sort(key=lambda row: row["seq"])  # as they came
        self._tx.many(_REPORT, owned("report"))
        reports = {(attempt, step): identity for attempt, step, identity in self._run(_REPORT_IDS)}
        metrics: list[dict[str, object]] = []
        for row in tables["report"]:
            report = reports[attempts[row["trial"], row["attempt"]], row["step"]]
            for name, kind, number, value in row["metrics"]:
                metrics.append({"report": report, "name": name, "kind": kind, "number": number, "text": value})
        self._tx.many(sql.ADD_METRIC, metrics)
        self._tx.many(_TELEMETRY, owned("telemetry"))
        self._tx.many(_CHECKPOINT, owned("checkpoint"))
        self._tx.many(
            _STATE,
            [
                {**row, "body": base64.b64decode(row["body"]), "experiment": self._experiment}
                for row in tables["proposer_state"]
            ],
        )
        tables["audit"].sort(key=lambda row: row["seq"])
        self._tx.many(sql.ADD_AUDIT, [{**row, "experiment": self._experiment} for row in tables["audit"]])

    def _run(self, statement: Statement) -> list[tuple[Any, ...]]:
        return self._tx.run(statement, experiment=self._experiment)

    def _configs(self) -> dict[str, str]:
        """Write the configs, sharing equal ones with what the database holds; return the digest of each by its text."""
        bodies = {row["config"] for name in ("trial", "attempt") for row in self._tables[name]}
        digests = {body: digest(body) for body in sorted(bodies)}
        self._tx.many(_CONFIG, [{"digest": identity, "body": body} for body, identity in digests.items()])
        return digests


def parent_of(row: dict[str, Any]) -> tuple[int, int]:
    """Return (trial, attempt) of what an attempt's row continues: another trial's is a pair there."""
    parent = row["parent"]
    return (parent[0], parent[1]) if isinstance(parent, list) else (row["trial"], parent)


def _sorted(keys: Iterable[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    try:
        return sorted(keys)
    except TypeError:  # None comes last
        return sorted(keys, key=lambda key: tuple((value is None, value) for value in key))
