"""Finding the server that ``holdfast up`` left running, and refusing what cannot be started."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from holdfast.cli import main
from holdfast.core.errors import Contention, InvalidInput, StorageError
from holdfast.deployments import machine
from holdfast.deployments.machine import Addresses, PrefectSettings, Up
from holdfast.deployments.processes import Died, Events, Part
from holdfast.flows import serving
from holdfast.flows.serving import Serving, adopt, left_running, state_file
from holdfast.settings import settings

NOTHING = PrefectSettings(None, None, None, None, None, frozenset())


@pytest.fixture(autouse=True)
def _data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("PREFECT_API_URL", "HOLDFAST_DATABASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    settings.cache_clear()
    yield
    settings.cache_clear()


@contextmanager
def health(status: int = 200) -> Iterator[tuple[str, list[str]]]:
    """Have an API that says how it is; yield its URL and the paths that were asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/api", asked
    server.shutdown()
    server.server_close()


def say(url: str, **process: object) -> Serving:
    found = Serving.here(url, url, is_protected=False, logs=Path("logs"))
    found = Serving(found.url, found.ui, found.is_protected, found.logs, {**found.process, **process})
    found.write()
    return found


def test_a_server_that_answers_is_found_and_adopted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert left_running() is None
    with health() as (url, asked):
        written = say(url)
        assert left_running() == written
        assert asked == ["/api/health"]
        monkeypatch.setenv("PREFECT_API_URL", "http://elsewhere/api")
        assert adopt() is None
        monkeypatch.setenv("PREFECT_API_URL", "")
        assert adopt() == url == os.environ["PREFECT_API_URL"]
        written.withdraw()
        assert not state_file().exists()


@pytest.mark.parametrize("process", [{"started": "earlier"}, {"pid": 2**22 + 1}, {"host": "another"}, {"pid": None}])
def test_what_a_dead_one_left_is_ignored_without_a_request(process: dict[str, object]) -> None:
    with health() as (url, asked):
        say(url, **process)
        assert left_running() is None
        assert asked == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"url": 1}', b"\xff", b'{"pid": "x"}'])
def test_a_damaged_file_says_nothing(content: bytes) -> None:
    state_file().parent.mkdir(parents=True)
    state_file().write_bytes(content)
    assert left_running() is None


def test_a_process_that_lives_but_does_not_serve_is_none() -> None:
    with health(503) as (url, asked):
        say(url)
        assert left_running() is None
        assert asked == ["/api/health"]
    assert left_running() is None


def test_only_its_writer_withdraws_what_it_said() -> None:
    first = say("http://127.0.0.1:1/api")
    second = say("http://127.0.0.1:2/api")
    first.withdraw()
    assert serving.read() == second


def test_looking_imports_no_prefect() -> None:
    code = "import sys, holdfast.flows.serving as s; s.left_running(); print('prefect' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_a_second_one_is_told_where_the_first_is() -> None:
    with machine.alone():
        say("http://127.0.0.1:4207/api")
        with pytest.raises(Contention, match=f"process {os.getpid()} of .*http://127.0.0.1:4207"), machine.alone():
            pass
    with machine.alone():  # the file is still there, and nobody behind it
        pass


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (Up(host="0.0.0.0"), "PREFECT_SERVER_API_AUTH_STRING"),
        (Up(host="192.168.0.1"), "127.0.0.1 behind a proxy"),
        (Up(webhook=Path("missing.yaml")), "no such file"),
        (Up(webhook=Path(__file__), webhook_port=4200), "two ports"),
        (Up(storages=("",)), "name at least one folder"),
        (Up(storages=(__file__,)), "is a file"),
        (Up(storages=("s3://bucket/runs", f"{__file__}/below")), "below cannot be made: .*is a file"),
    ],
)
def test_what_cannot_be_started_is_refused(wanted: Up, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        machine.check(wanted, NOTHING)


def test_a_password_lets_others_in() -> None:
    protected = PrefectSettings(None, "user:word", None, None, None, frozenset())
    machine.check(Up(host="0.0.0.0"), protected)
    at = Addresses("0.0.0.0", 4200)
    assert at.origin == "http://127.0.0.1:4200"
    assert Addresses("::1", 1).origin == "http://[::1]:1"
    made = machine.Environments.make(Up(host="0.0.0.0"), at, protected, machine.ServerDatabase("file", {}))
    assert made.others["PREFECT_API_AUTH_STRING"] == "user:word"
    assert "127.0.0.1" not in made.server["PREFECT_SERVER_UI_API_URL"]  # a browser elsewhere asks there


def test_a_port_in_use_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with machine.listening("127.0.0.1", 0, "--port") as taken:
        port = taken.getsockname()[1]
        assert main(["up", "--port", str(port)]) == 2
    assert f"--port {port} of 127.0.0.1 cannot be used (Address already in use)" in capsys.readouterr().err
    assert main(["up", "--host", "no.such.host.invalid", "--port", "1"]) == 2
    assert not (tmp_path / "data" / "holdfast" / "up" / "prefect.db").exists()
    assert not state_file().exists()


def test_a_data_folder_that_cannot_be_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOLDFAST_DATA_FOLDER", str(tmp_path / "file"))
    settings.cache_clear()
    with pytest.raises(StorageError, match=r"file cannot be written.*HOLDFAST_DATA_FOLDER"), machine.alone():
        pass


def test_a_part_begins_when_it_is_told(tmp_path: Path) -> None:
    """One that died while it waited is started anew, and one whose machine is gone never begins."""
    (tmp_path / "module_of_a_part.py").write_text("import sys\nprint(sys.argv[1:], 'json' in sys.modules, flush=True)\n")
    events: Events = queue.SimpleQueue()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    part = Part(
        "part", ["module_of_a_part", "--word"], tmp_path / "part.log", environment, events, prepares=["json", "no.such"]
    )

    def ends() -> int:
        event = events.get(timeout=60)
        part.close()
        assert isinstance(event, Died)
        return event.process.returncode

    part.prepare()
    assert part.process is not None
    waiting = part.process.pid
    part.start()
    assert part.process.pid == waiting
    assert ends() == 0
    assert part.log.read_text() == "['--word'] True\n"
    part.prepare()
    part.kill()
    assert ends() == -signal.SIGKILL
    part.start()
    assert ends() == 0
    part.prepare()
    part.close()  # as the system does with what belonged to `up`
    assert ends() == 0
    assert len(part.log.read_text().splitlines()) == 2


def test_the_default_database_is_a_file_of_the_data_folder() -> None:
    chosen = machine.ServerDatabase.choose(Up(database="sqlite:////tmp/experiments.db"), NOTHING)
    assert chosen.label == str(state_file().parent / "up" / "prefect.db")
    named = PrefectSettings("postgresql+asyncpg://me:***@host/db", None, None, None, None, frozenset())
    assert machine.ServerDatabase.choose(Up(), named).environment == {}


def test_a_damaged_state_does_not_hide_the_lock(tmp_path: Path) -> None:
    with machine.alone():
        state_file().write_text(json.dumps({"url": "nonsense"}))
        with pytest.raises(Contention, match="just starting"), machine.alone():
            pass
