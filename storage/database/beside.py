"""A second database on the PostgreSQL server of the first: where Prefect's server may keep what is its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import create_engine, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError, ProgrammingError
from sqlalchemy.pool import NullPool

from holdfast.core.errors import DatabaseError
from holdfast.storage.database.engine import parse_url, shown
from holdfast.storage.database.explain import explained

SUFFIX = "_prefect"
_LONGEST = 63
"""bytes of a name in PostgreSQL"""
_FILES = {
    "sslrootcert": "PGSSLROOTCERT",
    "sslcert": "PGSSLCERT",
    "sslkey": "PGSSLKEY",
    "sslcrl": "PGSSLCRL",
    "passfile": "PGPASSFILE",
}
"""options of a URL that asyncpg takes from the environment alone"""


@dataclass(frozen=True)
class Beside:
    """A database for Prefect's server."""

    url: str
    """for asyncpg; it may hold a password"""
    environment: Mapping[str, str]
    """what asyncpg takes from the environment"""
    label: str
    """the URL without passwords"""
    created: bool


def is_server(url: str) -> bool:
    """Tell whether a database is one of a PostgreSQL server; SpecError for what is no database."""
    return parse_url(url).get_backend_name() == "postgresql"


def database_beside(url: str) -> Beside:
    """Return the database NAME_prefect on the server of database NAME; it is made if it is missing.

    DatabaseError where the server cannot be reached, or does not let us.
    """
    ours = parse_url(url)
    name = f"{ours.database or ours.username or 'holdfast'}{SUFFIX}"
    if len(name.encode()) > _LONGEST:
        raise DatabaseError(
            f"{shown(url)}: its name is too long for one that ends in {SUFFIX}; "
            "name Prefect's database by PREFECT_SERVER_DATABASE_CONNECTION_URL"
        )
    created = _made(ours, name)
    theirs, environment = _for_asyncpg(ours.set(database=name))
    text_of = theirs.render_as_string(hide_password=False)
    return Beside(text_of, environment, shown(ours.set(database=name).render_as_string(hide_password=False)), created)


def _made(url: URL, name: str) -> bool:
    """Create a database unless it is there; return whether it was made."""
    engine = create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool, connect_args={"connect_timeout": 10})
    try:
        with engine.connect() as connection:
            if connection.execute(text("SELECT 1 FROM pg_database WHERE datname = :name"), {"name": name}).first():
                return False
            quoted = engine.dialect.identifier_preparer.quote_identifier(name)
            try:
                connection.exec_driver_sql(f"CREATE DATABASE {quoted}")
            except ProgrammingError as error:
                if getattr(error.orig, "sqlstate", "") == "42P04":  # somebody else made it meanwhile
                    return False
                raise DatabaseError(
                    f"Prefect's server needs a database of its own, and {url.username or 'this role'} may not make it "
                    f"({error.orig}); let an administrator run `CREATE DATABASE {quoted} OWNER {url.username or '...'}`, "
                    "or name another one by PREFECT_SERVER_DATABASE_CONNECTION_URL"
                ) from None
            return True
    except DBAPIError as error:
        raise explained(error, shown(url.render_as_string(hide_password=False))) from None
    finally:
        engine.dispose()


def _for_asyncpg(url: URL) -> tuple[URL, dict[str, str]]:
    """Return the URL as asyncpg takes it, and what it takes from the environment; what it lacks is left out."""
    query: dict[str, str | tuple[str, ...]] = {}
    environment = {}
    for key, value in url.query.items():
        if key in ("host", "port"):
            query[key] = value
        elif key == "sslmode":
            query["ssl"] = value
        elif key in _FILES and isinstance(value, str):
            environment[_FILES[key]] = value
        elif key == "password" and isinstance(value, str):
            url = url.set(password=value)
        elif key == "user" and isinstance(value, str):
            url = url.set(username=value)
    return url.set(drivername="postgresql+asyncpg", query=query), environment
