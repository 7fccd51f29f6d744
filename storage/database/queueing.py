"""Trials that people add to an experiment: anybody may, whoever drives it, and whether somebody does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime

from sqlalchemy import text

from holdfast.core.errors import InvalidConfig, InvalidInput, NotStorable
from holdfast.core.space import Space
from holdfast.core.trial import Trial
from holdfast.core.values import Config, Json, dumps, plain
from holdfast.storage.database.driver import add_audit, add_trial
from holdfast.storage.database.engine import Database, Statement
from holdfast.storage.database.reads import Reader
from holdfast.storage.database.requests import begin_request
from holdfast.storage.database.rows import storable

MOST_REPEATS = 10_000
"""Repeats are added in one transaction, and everybody else's writes wait for it."""

# Where the trials that have not ended lie: among the last ones, so that the ended ones before them are not read.
_ACTIVE_RANGE = Statement(
    text(
        "SELECT MIN(number), MAX(number) FROM trial WHERE experiment_id = :experiment AND number >= 0"
        " AND status IN ('PENDING', 'RUNNING')"
    )
)


def enqueue(
    database: Database,
    experiment: int,
    config: Config,
    *,
    seed: int,
    repeats: int = 1,
    ts_start: datetime | None = None,
    metadata: Mapping[str, Json] | None = None,
) -> list[int]:
    """Add ``repeats`` waiting trials of one checked config, as one group; return their numbers. Needs no lease.

    The trials, and an audit row, are one transaction: numbers stay dense whoever else adds some.
    """
    with database.write() as tx:
        seq, epoch = begin_request(tx, experiment)
        numbers: list[int] = []
        for repeat in range(repeats):
            number = add_trial(
                tx,
                experiment,
                seq,
                config,
                seed=seed,
                source="queued",
                ts_start=ts_start,
                metadata=metadata,
                group=numbers[0] if numbers else None,
                repeat=repeat,
            )
            numbers.append(number)
        detail = {"first": numbers[0], "trials": repeats, "ts_start": None if ts_start is None else ts_start.isoformat()}
        add_audit(tx, experiment, seq, epoch, "queued", detail)
    return numbers


def active(reader: Reader) -> list[Trial]:
    """Return the waiting and running trials in number order, by as many statements however many have ended."""
    first, last = reader.database.run(_ACTIVE_RANGE, experiment=reader.experiment)[0]
    found = [] if first is None else reader.trials(first=first, last=last)
    return [trial for trial in found if trial.status in ("PENDING", "RUNNING")]


def checked_config(space: Space, config: object) -> Config:
    """Return ``config`` in the space's order and types; InvalidConfig for anything that is none of its configs."""
    if not isinstance(config, Mapping):
        raise InvalidConfig(f"config is a {type(config).__name__}; it must map {', '.join(space.parameters) or 'nothing'}")
    try:
        values = {name: plain(value, f"config[{name!r}]") for name, value in config.items()}
    except NotStorable as error:
        raise InvalidConfig(str(error)) from None
    return space.validate_config(values)


def checked_repeats(repeats: object) -> int:
    """Return a number of trials from 1 to what one transaction may add; InvalidInput otherwise."""
    if isinstance(repeats, bool) or not isinstance(repeats, int) or not 1 <= repeats <= MOST_REPEATS:
        raise InvalidInput(f"repeats is {repeats!r:.40}; it must be a whole number from 1 to {MOST_REPEATS}")
    return repeats


def checked_start(ts_start: object) -> datetime | None:
    """Return an aware moment in UTC, or None; InvalidInput for a naive one, and for one that UTC has no date for."""
    if ts_start is None:
        return None
    if not isinstance(ts_start, datetime):
        raise InvalidInput(f"ts_start is a {type(ts_start).__name__}; give a datetime with a time zone")
    if ts_start.utcoffset() is None:
        raise InvalidInput(f"ts_start {ts_start.isoformat()} has no time zone; add one, such as timezone.utc")
    try:
        return ts_start.astimezone(UTC)
    except OverflowError:
        raise InvalidInput(f"ts_start {ts_start.isoformat()} lies beyond the years 1 to 9999 in UTC") from None


def checked_metadata(metadata: Mapping[str, object] | Iterable[tuple[str, object]] | None) -> dict[str, Json]:
    """Return metadata as plain JSON values by name; InvalidInput for keys that are no text, or are given twice."""
    if metadata is None:
        return {}
    pairs: Sequence[object] = list(metadata.items()) if isinstance(metadata, Mapping) else list(metadata)
    found: dict[str, Json] = {}
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise InvalidInput(f"metadata holds {pair!r}; give a mapping, or pairs of a key and a value")
        key, value = pair
        if not isinstance(key, str) or not key or storable(key) != key:
            raise InvalidInput(f"metadata has the key {key!r}; keys must be text")
        if key in found:
            raise InvalidInput(f"metadata names {key!r} twice; name each key once")
        found[key] = plain(value, f"metadata[{key!r}]")
    if storable(text_of := dumps(found)) != text_of:
        raise InvalidInput("metadata holds characters that are no Unicode text; leave them out")
    return found
