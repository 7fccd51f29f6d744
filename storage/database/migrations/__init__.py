"""Alembic migrations of the experiment store."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Connection, Engine


def upgrade(engine: Engine, revision: str = "head") -> None:
    """Bring the database of ``engine`` to ``revision`` (creates the schema in an empty one)."""
    with engine.connect() as connection:
        upgrade_on(connection, revision)
        connection.commit()


def upgrade_on(connection: Connection, revision: str = "head") -> None:
    """Bring the database of ``connection`` to ``revision``; a transaction that is open stays open, for the caller to end."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    command.upgrade(config, revision)
