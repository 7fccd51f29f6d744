"""A Prefect API for one run, where Prefect's own settings name none.

It runs on a database of its own (embedded servers that share one SQLite file lock each other out), in a process that ends
when ours does: its standard input closes. Importing this module imports no Prefect, so that the server can start while the
rest of the program still does.
"""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from holdfast.core.errors import EngineError
from holdfast.settings import environment, settings

START_SECONDS = 90.0
"""How long the server may take; a cold disk and a busy machine included."""


class EmbeddedServer:
    """A Prefect server of our own; :meth:`begin` returns at once, :meth:`url` waits until it answers."""

    def __init__(self) -> None:
        self._folder = Path()
        self._process: subprocess.Popen[bytes] | None = None
        self._url: str | None = None

    def begin(self) -> None:
        """Start the process, unless it runs."""
        if self._process is not None:
            return
        self._folder = Path(tempfile.mkdtemp(prefix="holdfast-prefect-"))
        template = template_file()
        database = self._folder / "prefect.db"
        if template.exists():
            shutil.copyfile(template, database)
        log = (self._folder / "server.log").open("wb")
        with log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "holdfast.flows.server", str(self._folder), str(template)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the search; the server ends after it
                env=environment(
                    PREFECT_SERVER_DATABASE_CONNECTION_URL=f"sqlite+aiosqlite:///{database}",
                    PREFECT_API_URL="",
                    # What :func:`make_template` did: half of a start, and Prefect does it for every new address.
                    PREFECT_SERVER_DATABASE_MIGRATE_ON_START="false",
                    PREFECT_SERVER_REGISTER_BLOCKS_ON_START="false",
                    PREFECT_SERVER_MEMOIZE_BLOCK_AUTO_REGISTRATION="false",
                    PREFECT_UI_ENABLED="false",
                    PREFECT_SERVER_ANALYTICS_ENABLED="false",
                    DO_NOT_TRACK="1",
                    PREFECT_LOGGING_LEVEL="ERROR",
                    PREFECT_SERVER_LOGGING_LEVEL="ERROR",
                    PREFECT__SERVER_EPHEMERAL="1",
                    PREFECT__SERVER_FINAL="1",
                ),
            )

    def url(self) -> str:
        """Return the API's URL once it answers; EngineError with the server's last words when it does not."""
        if self._url is not None:
            return self._url
        process = self._process
        if process is None or process.stdout is None:
            raise EngineError("the embedded Prefect server was not started")
        port = process.stdout.readline().strip().decode()
        deadline = time.monotonic() + START_SECONDS
        while port and time.monotonic() < deadline and process.poll() is None:
            url = f"http://127.0.0.1:{port}/api"
            with contextlib.suppress(OSError, urllib.error.URLError), urllib.request.urlopen(f"{url}/health", timeout=5):
                self._url = url
                return url
            time.sleep(0.05)
        words = (self._folder / "server.log").read_text(errors="replace").strip()[-1500:]
        self.stop()
        raise EngineError(
            f"the embedded Prefect server did not start; its last words:\n{words}\n"
            "start one with `prefect server start`, set PREFECT_API_URL, and try again"
        )

    def stop(self) -> None:
        """End the server and remove its database."""
        process, self._process = self._process, None
        if process is not None:
            if process.stdin is not None:
                process.stdin.close()
            with contextlib.suppress(ProcessLookupError):
                process.kill()  # nothing in its database is wanted
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
            shutil.rmtree(self._folder, ignore_errors=True)


def template_file() -> Path:
    """Where a Prefect database is kept in which nothing ran yet: making one costs more than the rest of the start."""
    version = metadata.version("prefect")
    return settings().cache_folder / f"prefect-{version}-blocks.db"


def guard(last: Callable[[], object]) -> None:
    """End this process, after a call of ``last``, as soon as our starter is gone: the pipe that is standard input closes.

    What this process starts gets an empty standard input.
    """
    pipe = os.dup(0)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)

    def watch() -> None:
        with contextlib.suppress(OSError):
            os.read(pipe, 1)
        with contextlib.suppress(Exception):
            last()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def make_template(database: Path, template: Path) -> None:
    """Make a database with the tables and the block types of this Prefect, and keep a copy for the next start."""
    import asyncio
    import sqlite3

    import prefect.plugins
    from prefect.server.database import provide_database_interface
    from prefect.server.models.block_registration import run_block_auto_registration

    async def made() -> None:
        interface = provide_database_interface()
        await interface.create_db()
        prefect.plugins.load_prefect_collections()  # which may bring block types
        async with await interface.session() as session:
            await run_block_auto_registration(session=session)

    asyncio.run(made())
    with contextlib.suppress(OSError, sqlite3.Error):
        template.parent.mkdir(parents=True, exist_ok=True)
        draft = template.with_suffix(f".{os.getpid()}")
        source, target = sqlite3.connect(database), sqlite3.connect(draft)
        with contextlib.closing(source), contextlib.closing(target):
            source.backup(target)
        os.replace(draft, template)


def _is_ready(database: Path) -> bool:
    """Tell whether a database has what :func:`make_template` makes."""
    import sqlite3

    try:
        with contextlib.closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as connection:
            rows = connection.execute("SELECT EXISTS (SELECT 1 FROM alembic_version) AND EXISTS (SELECT 1 FROM block_type)")
            return bool(rows.fetchone()[0])
    except sqlite3.Error:
        return False


def main() -> None:
    """Serve Prefect's API on a free port of the loopback interface, named on standard output."""
    folder, template = Path(sys.argv[1]), Path(sys.argv[2])
    guard(lambda: shutil.rmtree(folder, ignore_errors=True))
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    sys.stdout.write(f"{listener.getsockname()[1]}\n")
    sys.stdout.flush()

    gc.disable()  # until everything is imported, which stays: to look through it for garbage takes a quarter of the start
    import uvicorn
    from prefect.server.api.server import create_app

    database = folder / "prefect.db"
    if not _is_ready(database):  # there was no template to copy when we were started, or it was spoilt
        for file in folder.glob("prefect.db*"):
            file.unlink()
        make_template(database, template)
    app = create_app()
    gc.freeze()
    gc.enable()
    config = uvicorn.Config(app, log_level="error", lifespan="on", access_log=False)
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
