"""The statements of the loop and of attempts: named, each compiled once per database."""

from __future__ import annotations

from sqlalchemy import text

from holdfast.storage.database.engine import Statement


def _sql(body: str) -> Statement:
    return Statement(text(body))


# The attempt of its own trial that an attempt ``a`` follows. Its parent ``p`` is another trial's where a member of a population
# goes on from another one's checkpoint: its own reports up to there still count.
OWN_PARENT = "CASE WHEN p.trial_id <> a.trial_id THEN a.number - 1 ELSE p.number END"

# Number of that other trial, else null; to be read together with p.number.
DONOR = "CASE WHEN p.trial_id <> a.trial_id THEN (SELECT x.number FROM trial x WHERE x.id = p.trial_id) END"

# Every write of a driver or an attempt begins with this one. No row: a later epoch took over. On PostgreSQL the row lock
# that it takes orders all writers of the experiment.
FENCE = _sql("UPDATE experiment SET seq = seq + 1 WHERE id = :experiment AND epoch = :epoch RETURNING seq")

# A request from somebody who does not hold the lease (queue, stop, cancel) only needs its place in the order.
REQUEST = _sql("UPDATE experiment SET seq = seq + 1 WHERE id = :experiment RETURNING seq, epoch")

# Equal configs share one row, also between experiments and processes.
CONFIG = _sql(
    "INSERT INTO config (digest, body) VALUES (:digest, :body)"
    " ON CONFLICT (digest) DO UPDATE SET digest = excluded.digest RETURNING id"
)

# Numbers are dense: the next one is counted under the lock that FENCE or REQUEST took.
NEXT_NUMBER = _sql("SELECT COALESCE(MAX(number) + 1, 0) FROM trial WHERE experiment_id = :experiment AND number >= 0")

ADD_TRIAL = _sql(
    "INSERT INTO trial (experiment_id, number, config_id, status, seq, current_attempt, seed, group_number, repeat, created,"
    " ts_start, source, metadata, cancel_requested)"
    " VALUES (:experiment, :number, :config, :status, :seq, 1, :seed, :group_number, :repeat, :created,"
    " :ts_start, :source, :metadata, 0) RETURNING id"
)

ADD_ATTEMPT = _sql(
    "INSERT INTO attempt (trial_id, number, config_id, parent_id, parent_step, reason, note, created)"
    " VALUES (:trial, :number, :config, :parent, :parent_step, :reason, :note, :created) RETURNING id"
)

# The first attempt of a trial that runs at once: nobody else can have seen it.
ADD_CLAIMED = _sql(
    "INSERT INTO attempt (trial_id, number, config_id, reason, note, created, claimed_by, epoch, started, flow_run_id,"
    " task_run_id, host, pid, pid_started) VALUES (:trial, 1, :config, 'first', '', :started, :token, :epoch, :started,"
    " :flow_run_id, :task_run_id, :host, :pid, :pid_started) RETURNING id"
)

# Of two claimers one finds the row unclaimed; only a trial's current attempt can be claimed.
CLAIM = _sql(
    "UPDATE attempt SET claimed_by = :token, epoch = :epoch, started = :started, flow_run_id = :flow_run_id,"
    " task_run_id = :task_run_id, host = :host, pid = :pid, pid_started = :pid_started, worker_id = :worker"
    " WHERE id = :attempt AND claimed_by IS NULL AND outcome IS NULL"
    " AND EXISTS (SELECT 1 FROM trial t WHERE t.id = attempt.trial_id AND t.experiment_id = :experiment"
    " AND t.current_attempt = attempt.number) RETURNING trial_id, number"
)

# The attempt must still be the trial's current one; a status is changed from the one it was read with.
MOVE_TRIAL = _sql("UPDATE trial SET status = :new, seq = :seq, ended_seq = :ended_seq WHERE id = :trial AND status = :old")

# A request to cancel stands until the trial has ended; a trial that runs again after its end is not meant by it.
MOVE_TO_ATTEMPT = _sql(
    "UPDATE trial SET status = :new, seq = :seq, ended_seq = NULL, current_attempt = :number,"
    " cancel_requested = CASE WHEN :old IN ('PENDING', 'RUNNING', 'SKIPPED') THEN cancel_requested ELSE 0 END"
    " WHERE id = :trial AND status = :old"
)

# Whether an attempt may still write: it is claimed with this token, and open.
HOLDS = _sql("SELECT trial_id FROM attempt WHERE id = :attempt AND claimed_by = :token AND outcome IS NULL")

TRIAL_OF = _sql(
    "SELECT t.id, t.status, t.current_attempt, a.number, a.config_id, t.cancel_requested, a.parent_id FROM attempt a"
    " JOIN trial t ON t.id = a.trial_id WHERE a.id = :attempt AND t.experiment_id = :experiment"
)

# The first final update stands.
END_ATTEMPT = _sql(
    "UPDATE attempt SET outcome = :outcome, ended = :ended, error_kind = :error_kind, error = :error,"
    " traceback = :traceback, result = :result, note = CASE WHEN :note = '' THEN note ELSE :note END"
    " WHERE id = :attempt AND outcome IS NULL"
)

SET_PARENT = _sql(
    "UPDATE attempt SET parent_id = :parent, parent_step = :parent_step, reason = COALESCE(:reason, reason),"
    " note = CASE WHEN :note = '' THEN note ELSE :note END WHERE id = :attempt"
)

ADD_REPORT = _sql(
    "INSERT INTO report (attempt_id, step, seq, reported, decision)"
    " VALUES (:attempt, :step, :seq, :reported, :decision) RETURNING id"
)

ADD_NOTE = _sql("UPDATE attempt SET note = CASE WHEN note = '' THEN :note ELSE note || '; ' || :note END WHERE id = :attempt")

TOUCH = _sql("UPDATE trial SET seq = :seq WHERE id = :trial")

ADD_METRIC = _sql("INSERT INTO metric (report_id, name, kind, number, text) VALUES (:report, :name, :kind, :number, :text)")

ADD_CHECKPOINT = _sql(
    "INSERT INTO checkpoint (attempt_id, step, seq, path, digest, bytes, created, status, reason, pinned)"
    " VALUES (:attempt, :step, :seq, :path, :digest, :bytes, :created, 'valid', '', 0)"
)

MARK_CHECKPOINT = _sql("UPDATE checkpoint SET status = :status, reason = :reason, seq = :seq WHERE id = :checkpoint")

# Whoever pins a checkpoint, or finds it bad, takes the experiment's row before: of two wishes the first one counts.
FORGET_CHECKPOINT = _sql(
    "UPDATE checkpoint SET status = 'deleted', reason = :reason, seq = :seq"
    " WHERE id = :checkpoint AND status = :status AND pinned = 0 RETURNING id"
)

HAS_CHECKPOINT = _sql("SELECT id FROM checkpoint WHERE id = :checkpoint")

# pinned: 1 for a person's pin, 2 while it is lent to another member of a population, 3 for both.
PIN_CHECKPOINT = _sql("UPDATE checkpoint SET pinned = (pinned & 2) + :pinned, seq = :seq WHERE id = :checkpoint")

# By what a checkpoint is in every database, not by its row's id.
QUARANTINE = _sql(
    "UPDATE checkpoint SET status = 'corrupt', reason = :reason, seq = :seq WHERE path = :path AND status = 'valid'"
    " AND attempt_id = (SELECT a.id FROM attempt a JOIN trial t ON t.id = a.trial_id"
    " WHERE t.experiment_id = :experiment AND t.number = :number AND a.number = :attempt) RETURNING id"
)

ACQUIT = _sql(
    "UPDATE checkpoint SET status = 'valid', reason = '', seq = :seq WHERE path = :path AND status = 'corrupt'"
    " AND attempt_id = (SELECT a.id FROM attempt a JOIN trial t ON t.id = a.trial_id"
    " WHERE t.experiment_id = :experiment AND t.number = :number AND a.number = :attempt) RETURNING id"
)

TRIAL_ROW = _sql("SELECT id, current_attempt FROM trial WHERE experiment_id = :experiment AND number = :number")

# What changes beside a trial that does not run changes the trial, too: the journal looks at those that changed or run.
TOUCH_TRIAL = _sql(
    "UPDATE trial SET seq = :seq WHERE id ="
    " (SELECT a.trial_id FROM checkpoint c JOIN attempt a ON a.id = c.attempt_id WHERE c.id = :checkpoint)"
)

ADD_TELEMETRY = _sql(
    "INSERT INTO telemetry (attempt_id, ts, name, kind, number, text, seq)"
    " VALUES (:attempt, :ts, :name, :kind, :number, :text, :seq) ON CONFLICT (attempt_id, ts, name) DO NOTHING"
)

ADD_AUDIT = _sql(
    "INSERT INTO audit (experiment_id, seq, epoch, happened, action, detail)"
    " VALUES (:experiment, :seq, :epoch, :happened, :action, :detail)"
)

# The epoch in which the drive began that {epoch} belongs to: one that goes on in a new flow run has an epoch for each.
DRIVE_OF = (
    "COALESCE((SELECT MAX(u.epoch) FROM audit u WHERE u.experiment_id = {experiment} AND u.action IN ('started', 'restored')"
    " AND u.epoch <= {epoch}), {epoch})"
)

# A retry budget is derived: failures of the drive that is under way.
FAILURES = _sql(
    "SELECT COUNT(*) FROM attempt WHERE trial_id = :trial AND outcome IN ('failed', 'timed_out', 'crashed')"
    f" AND epoch <= :epoch AND epoch >= {DRIVE_OF.format(experiment=':experiment', epoch=':epoch')}"
)

ATTEMPTS_OF = _sql(
    f"SELECT a.id, a.number, {OWN_PARENT}, a.parent_step FROM attempt a LEFT JOIN attempt p ON p.id = a.parent_id"
    " WHERE a.trial_id = :trial ORDER BY a.number"
)

CHECKPOINTS_OF = _sql(
    "SELECT c.id, a.number, c.step, c.path, c.digest, c.bytes, c.status, c.reason, c.pinned FROM checkpoint c"
    " JOIN attempt a ON a.id = c.attempt_id WHERE a.trial_id = :trial ORDER BY a.number, c.step"
)

# Checkpoints of other trials that a trial's attempts go on from.
BORROWED_OF = _sql(
    "SELECT a.number, x.number, c.id, p.number, c.step, c.path, c.digest, c.bytes, c.status, c.reason, c.pinned FROM attempt a"
    " JOIN attempt p ON p.id = a.parent_id AND p.trial_id <> a.trial_id JOIN trial x ON x.id = p.trial_id"
    " JOIN checkpoint c ON c.attempt_id = p.id AND c.step = a.parent_step WHERE a.trial_id = :trial ORDER BY a.number"
)

OWNER_OF = _sql("SELECT attempt_id FROM checkpoint WHERE id = :checkpoint")

# A save reads these, so it must not read the thousands that were pruned before.
VALID_CHECKPOINTS_OF = _sql(
    "SELECT c.id, a.number, c.step, c.path, c.digest, c.bytes, c.status, c.reason, c.pinned FROM checkpoint c"
    " JOIN attempt a ON a.id = c.attempt_id WHERE a.trial_id = :trial AND c.status = 'valid' AND c.id > :after"
    " ORDER BY a.number, c.step"
)

PINS_OF = _sql(
    "SELECT c.id, c.pinned FROM checkpoint c JOIN attempt a ON a.id = c.attempt_id"
    " WHERE a.trial_id = :trial AND c.status = 'valid'"
)

REQUESTS = _sql("SELECT seq, stop_requested FROM experiment WHERE id = :experiment")

STATUS_OF = _sql("SELECT status, current_attempt, config_id FROM trial WHERE id = :trial AND experiment_id = :experiment")

UNCLAIMED = _sql("SELECT id FROM attempt WHERE id = :attempt AND claimed_by IS NULL AND outcome IS NULL")

SET_SPEC = _sql("UPDATE experiment SET spec = :spec WHERE id = :experiment")

SET_CODE = _sql("UPDATE experiment SET code_digest = :code, workdir = :workdir, location = :location WHERE id = :experiment")

ADD_STATE = _sql("INSERT INTO proposer_state (experiment_id, number, body, seq) VALUES (:experiment, :number, :body, :seq)")

TELL = _sql("UPDATE experiment SET told = :told WHERE id = :experiment")

# To be asked under the fence: who gives a worker up holds it, too.
# Once the driver lets what runs end, it takes back what nobody has begun, and counts on that.
WORKS = _sql(
    "SELECT w.id FROM worker w JOIN experiment e ON e.id = w.experiment_id"
    " WHERE w.id = :worker AND e.id = :experiment AND w.epoch = :epoch AND w.\"left\" IS NULL AND e.told = 'continue'"
)

# A trial's attempts beside its current one are closed, so these are current ones.
OPEN_OF_WORKER = _sql(
    "SELECT t.number, a.id FROM attempt a JOIN trial t ON t.id = a.trial_id"
    " WHERE a.worker_id = :worker AND a.outcome IS NULL AND t.experiment_id = :experiment ORDER BY t.number"
)

CANCEL_REQUESTS = _sql(
    "SELECT number FROM trial WHERE experiment_id = :experiment AND number >= 0 AND cancel_requested = 1"
    " AND status IN ('PENDING', 'RUNNING')"
)

STOP = _sql("UPDATE experiment SET stop_requested = 1 WHERE id = :experiment")

CANCEL_TRIAL = _sql("UPDATE trial SET cancel_requested = 1, seq = :seq WHERE experiment_id = :experiment AND number = :number")

CHECKPOINT_OF = _sql("SELECT id FROM checkpoint WHERE attempt_id = :attempt AND step = :step")

REPORT_OF = _sql("SELECT id FROM report WHERE attempt_id = :attempt AND step = :step")

# What retention ranks by: finite numbers only.
CHECKPOINT_METRICS = _sql(
    "SELECT c.id, m.name, m.number FROM checkpoint c JOIN attempt a ON a.id = c.attempt_id"
    " JOIN report r ON r.attempt_id = c.attempt_id AND r.step = c.step JOIN metric m ON m.report_id = r.id"
    " WHERE a.trial_id = :trial AND c.status = 'valid' AND c.id > :after"
    " AND m.kind IN ('float', 'int') AND m.number IS NOT NULL"
)

# Where a lease stands, by the database's own clock ({clock} differs between databases: see leases.py).
RELEASE = _sql(
    "UPDATE experiment SET seq = seq + 1, holder = NULL, lease_expires = NULL, ended = :ended,"
    " active_seconds = active_seconds + :active WHERE id = :experiment AND epoch = :epoch RETURNING seq"
)

TRIAL_STATUS = _sql("SELECT status FROM trial WHERE experiment_id = :experiment AND number = :number")

# The same as HOLDS together with the fence, for a look before files are published; the commit that follows is fenced itself.
STILL_HOLDS = _sql(
    "SELECT a.id FROM attempt a JOIN experiment e ON e.id = :experiment AND e.epoch = :epoch"
    " WHERE a.id = :attempt AND a.claimed_by = :token AND a.outcome IS NULL"
)
