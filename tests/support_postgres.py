"""A real PostgreSQL for the tests: started from a package, on a port and a folder of its own, ended with the tests."""

from __future__ import annotations

import importlib.util
import os
import select
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psycopg
from psycopg import sql
from sqlalchemy.engine import URL

from holdfast.storage.database.engine import connect
from holdfast.storage.database.experiments import open_database

TEMPLATE = "holdfast_template"
"""The database that others are copied from: with the schema, and nothing else in it."""
_NOBODY = 65534


def binaries() -> Path | None:
    """Return the folder with initdb and pg_ctl, or None when there is no PostgreSQL."""
    found = importlib.util.find_spec("pgserver")  # only its programs are used: importing it makes folders and users
    for place in found.submodule_search_locations or () if found is not None else ():
        folder = Path(place) / "pginstall" / "bin"
        if (folder / "initdb").exists():
            return folder
    initdb = shutil.which("initdb")
    return Path(initdb).resolve().parent if initdb else None


def with_extensions() -> Path | None:
    """Return the folder of the programs of a PostgreSQL that has pg_trgm, which Prefect's server needs, or None."""
    initdb = shutil.which("initdb")
    places = [binaries(), Path(initdb).resolve().parent if initdb else None, *sorted(Path("/usr/lib/postgresql").glob("*/bin"))]
    for folder in places:
        shares = [] if folder is None else [folder.parent / "share", Path("/usr/share/postgresql") / folder.parent.name]
        if folder is not None and any(list(share.glob("**/extension/pg_trgm.control")) for share in shares if share.is_dir()):
            return folder
    return None


MISSING = "no PostgreSQL: neither the package pgserver (Python 3.12 and older) nor an initdb on the PATH is there"


class Postgres:
    """One server. Roles: ``postgres`` needs no password by the socket; by TCP every role needs its own."""

    def __init__(self, source: Path | None = None) -> None:
        """Start one with the programs of ``source``, or of :func:`binaries`."""
        source = source or binaries()
        assert source is not None, MISSING
        self._user = _NOBODY if os.geteuid() == 0 else None  # it refuses to run as root
        self.folder = Path(tempfile.mkdtemp(prefix="holdfast-pg-", dir="/tmp"))  # a socket's path must be short
        self._data = self.folder / "data"
        self._log = self.folder / "log"
        self._given = 0
        self._lock = threading.Lock()
        self._guard: subprocess.Popen[bytes] | None = None
        try:
            if self._user is not None:
                os.chown(self.folder, self._user, self._user)
                if not self._reachable(source):
                    shutil.copytree(source.parent, self.folder / "install")
                    source = self.folder / "install" / "bin"
            self._bin = source
            self.port = _free_port()
            words = ["--auth-local=trust", "--auth-host=scram-sha-256", "--encoding=UTF8", "--locale=C", "-U", "postgres"]
            self._guard = self._guarded()
            self._command("initdb", "-D", self._data, "--no-sync", *words)
            settings = f"port = {self.port}\nlisten_addresses = '127.0.0.1'\nunix_socket_directories = '{self.folder}'\n"
            with (self._data / "postgresql.conf").open("a") as file:
                file.write(
                    settings + "max_connections = 200\nshared_buffers = 32MB\nautovacuum = off\nwal_writer_delay = 10s\n"
                    # no test takes the machine's power away; what a killed server has written is in the kernel all the same
                    "fsync = off\nfull_page_writes = off\n"
                )
            self.start()
            self._make_template()
        except BaseException:
            self.close()
            raise

    def _reachable(self, folder: Path) -> bool:
        done = subprocess.run(["test", "-x", folder / "initdb"], user=self._user, group=self._user, extra_groups=[])
        return done.returncode == 0

    def _command(self, name: str, *arguments: object) -> None:
        done = subprocess.run(
            [str(self._bin / name), *map(str, arguments)],
            cwd=self.folder,
            user=self._user,
            group=self._user,
            extra_groups=None if self._user is None else [],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        log = self._log.read_text() if self._log.exists() else ""
        assert done.returncode == 0, f"{name}: {done.stdout}\n{log}"

    def _control(self, *arguments: object) -> None:
        self._command("pg_ctl", "-D", self._data, "-l", self._log, "-w", *arguments)

    def start(self) -> None:
        self._control("start")

    def stop(self, mode: str = "fast") -> None:
        """Stop the server: ``fast`` ends every connection, ``immediate`` is as good as a crash."""
        self._control("stop", "-m", mode)

    def restart(self, mode: str = "fast") -> None:
        self.stop(mode)
        self.start()

    def _guarded(self) -> subprocess.Popen[bytes]:
        """Start what stops the server and deletes its folder when we are done, or gone."""
        words = 'read -r _; [ ! -e "$1/postmaster.pid" ] || "$0" -D "$1" -m immediate stop; cd /; rm -rf "$2"'
        return subprocess.Popen(
            ["/bin/sh", "-c", words, str(self._bin / "pg_ctl"), str(self._data), str(self.folder)],
            user=self._user,
            group=self._user,
            extra_groups=None if self._user is None else [],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def close(self) -> None:
        """Stop the server and delete what it was."""
        if self._guard is not None:
            self._guard.communicate(timeout=60)
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # Databases

    def url(self, database: str) -> URL:
        """Return the URL of a database, by the server's socket."""
        query = {"host": str(self.folder), "port": str(self.port)}
        return URL.create("postgresql+psycopg", username="postgres", database=database, query=query)

    def text(self, database: str) -> str:
        return self.url(database).render_as_string(hide_password=False)

    def tcp(self, database: str, *, user: str, password: str) -> str:
        """Return the URL of a database by TCP, where the password is asked for."""
        url = URL.create("postgresql+psycopg", user, password, "127.0.0.1", self.port, database)
        return url.render_as_string(hide_password=False)

    @contextmanager
    def admin(self, database: str = "postgres") -> Iterator[psycopg.Connection[Any]]:
        """Open a connection of the superuser, beside the program under test."""
        options = "-c default_transaction_read_only=off"
        with psycopg.connect(
            host=str(self.folder), port=self.port, user="postgres", dbname=database, autocommit=True, options=options
        ) as connection:
            yield connection

    def create(self, *, empty: bool = False) -> str:
        """Create a database, with the schema unless it is to be ``empty``; return its name."""
        with self._lock:
            self._given += 1
            name = f"test_{self._given}"
            template = "template1" if empty else TEMPLATE
            with self.admin() as connection:
                words = sql.SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY file_copy")
                connection.execute(words.format(sql.Identifier(name), sql.Identifier(template)))
        return name

    def drop(self, name: str) -> None:
        with self.admin() as connection:
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))

    def _make_template(self) -> None:
        with self.admin() as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(TEMPLATE)))
        open_database(self.url(TEMPLATE), create_missing=True).close()

    def terminate(self, database: str) -> int:
        """End every connection to a database; return how many there were."""
        with self.admin() as connection:
            words = "SELECT count(pg_terminate_backend(pid, 10000)) FROM pg_stat_activity WHERE datname = %s"
            row = connection.execute(words, [database]).fetchone()
            assert row is not None
            return int(row[0])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Proxy:
    """Stands between a program and the server, by sockets of their own, and cuts one connection at a chosen moment."""

    def __init__(self, server: Postgres) -> None:
        self._server = server
        self.folder = Path(tempfile.mkdtemp(prefix="holdfast-px-", dir="/tmp"))
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.folder / f".s.PGSQL.{server.port}"))
        self._listener.listen()
        self._marker: bytes | None = None
        self._pass_on = False
        self._meanwhile: Callable[[], object] = lambda: None
        self.cuts = 0
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def url(self, database: str) -> URL:
        return self._server.url(database).update_query_dict({"host": str(self.folder)})

    def cut(self, marker: str, *, pass_on: bool = False, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Cut the next connection that sends ``marker``, once, after ``meanwhile``.

        With ``pass_on`` the server gets the message and its answer is lost; otherwise the message is lost, and the server does
        not learn that its client is gone.
        """
        self._pass_on, self._meanwhile, self._marker = pass_on, meanwhile, marker.encode()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            try:
                server.connect(str(self._server.folder / f".s.PGSQL.{self._server.port}"))
            except OSError:
                client.close()
                continue
            self._open += [client, server]
            gone = threading.Event()
            threading.Thread(target=self._up, args=(client, server, gone), daemon=True).start()
            threading.Thread(target=self._down, args=(client, server, gone), daemon=True).start()

    def _up(self, client: socket.socket, server: socket.socket, gone: threading.Event) -> None:
        try:
            while data := client.recv(1 << 16):
                marker = self._marker
                if marker is not None and marker in data:
                    self._marker = None
                    gone.set()
                    if self._pass_on:
                        server.sendall(data)
                        self._answered(server)
                    self._meanwhile()
                    self.cuts += 1
                    client.shutdown(socket.SHUT_RDWR)
                    return
                server.sendall(data)
            server.shutdown(socket.SHUT_RDWR)
        except OSError:
            _shut(client)

    @staticmethod
    def _answered(server: socket.socket) -> None:
        """Wait until the server has answered, without taking the answer."""
        server.recv(1, socket.MSG_PEEK)

    @staticmethod
    def _down(client: socket.socket, server: socket.socket, gone: threading.Event) -> None:
        try:
            while True:
                ready = select.select([server], [], [], 0.01)[0]
                if gone.is_set():
                    return
                if not ready:
                    continue
                data = server.recv(1 << 16)
                if not data:
                    break
                client.sendall(data)
        except (OSError, ValueError):  # ValueError: closed by the test while it was looked at
            pass
        _shut(client)

    def close(self) -> None:
        for each in [self._listener, *self._open]:
            _shut(each)
            each.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _shut(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def making(url: str) -> Callable[[], str]:
    """Open an empty database and make its schema, for a race."""
    database = connect(url)
    database.close()

    def run() -> str:
        opened = open_database(url, create_missing=True)
        opened.close()
        return "made"

    return run
