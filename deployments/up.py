"""``holdfast up``: one machine as one program: Prefect's server, the deployments, a worker, the webhook receiver."""

from __future__ import annotations

import base64
import contextlib
import json
import queue
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import psutil

from holdfast.core.errors import EngineError
from holdfast.deployments import machine
from holdfast.deployments.machine import Addresses, Environments, PrefectSettings, ServerDatabase, Up
from holdfast.deployments.processes import (
    Events,
    Part,
    Signalled,
    children_of,
    end_descendants,
    keep_orphans,
    reap_orphans,
    signals_to,
)
from holdfast.flows.naming import POOL, TAG, WATCH
from holdfast.flows.serving import Serving, is_healthy
from holdfast.settings import settings

READY_SECONDS = 180.0
"""what a part gets until it is ready: a first start with migrations on a busy machine included"""
ENDING_SECONDS = 10.0
"""what a part gets to end by itself, and a search after its trials have saved"""
ASKED = 10
"""times that a busy server is asked again"""

Say = Callable[[str], None]


class _Ended(Exception):
    """A signal came: everything is to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def up(wanted: Up, say: Say) -> int:
    """Run everything until a signal comes, then end it in order; return the exit code.

    InvalidInput, Contention and DatabaseError before anything is started; EngineError when a part cannot be kept running.
    Everything has ended then.
    """
    prefect = PrefectSettings.read()
    machine.check(wanted, prefect)
    with machine.alone(), contextlib.ExitStack() as stack:
        listener = stack.enter_context(machine.listening(wanted.host, wanted.port, "--port"))
        if wanted.webhook is not None:  # it binds the port itself; that it can is better known now
            machine.listening(wanted.host, wanted.webhook_port, "--webhook-port").close()
        database = ServerDatabase.choose(wanted, prefect)
        running = _Running(wanted, prefect, machine.at_port(wanted, listener), listener, database, say)
        return running.run()


class _Running:
    """The parts, from their start to their end."""

    def __init__(
        self,
        wanted: Up,
        prefect: PrefectSettings,
        addresses: Addresses,
        listener: socket.socket,
        database: ServerDatabase,
        say: Say,
    ) -> None:
        self.wanted, self.prefect, self.at, self.database, self.say = wanted, prefect, addresses, database, say
        self.url = f"{addresses.origin}/api"
        self.events: Events = queue.SimpleQueue()
        self.parts: list[Part] = []
        """those that run, in the order of their start"""
        self._starting: Part | None = None
        self.logs = machine.folder()
        self._environments = Environments.make(wanted, addresses, prefect, database)
        descriptor = listener.fileno()
        self._server = self._part(
            "server",
            ["holdfast.deployments.prefect_server", str(descriptor)],
            lambda: is_healthy(self.url),
            environment=self._environments.server,
            passed=(descriptor,),
        )
        self._state = Serving.here(self.url, addresses.shown, is_protected=prefect.password is not None, logs=self.logs)

    def run(self) -> int:
        """Start everything, keep it running, end it; return the exit code."""
        keep_orphans()
        signals_to(self.events)
        try:
            self._start()
            self._keep()
        except _Ended as ended:
            self._end(ended)
            return 128 + ended.number
        except BaseException:
            self._kill()
            raise
        finally:
            self._state.withdraw()
        raise AssertionError("it is kept running until a signal comes, or raises")

    # Starting

    def _start(self) -> None:
        wanted = self.wanted
        self.say(f"starting Prefect's server on {self.database.label}")
        if wanted.webhook is not None:
            self._finish(self._part("webhook", ["holdfast.cli", "webhook", str(wanted.webhook), "--check"], lambda: False))
        deploy, worker = self._deploy(), self._worker()
        self._server.start()
        deploy.prepare()  # what each program imports takes seconds: while the server starts, there is time for that
        self._await_ready(self._server)
        self._state.write()
        self.say("setting up blocks, the work pool, deployments" + (" and automations" if wanted.automations else ""))
        if wanted.worker:
            worker.prepare()
        self._finish(deploy)
        if wanted.worker:
            self._begin(worker)
        if wanted.webhook is not None:
            words = ["webhook", str(wanted.webhook), "--host", wanted.host, "--port", str(wanted.webhook_port)]
            self._begin(self._part("webhook", ["holdfast.cli", *words], self._receives))
        if wanted.worker:
            self._look_for_interrupted()
        for line in self._where():
            self.say(line)

    def _deploy(self) -> Part:
        storages = [word for storage in self.wanted.storages for word in ("--storage", storage)]
        words = ["deploy", *storages, "--pool", POOL, *([] if self.wanted.automations else ["--no-automations"])]
        # As the command says to Prefect, which is imported before it begins.
        environment = {"PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL", **self._environments.others}
        prepares = ["holdfast.deployments.deploy"]
        return self._part("deploy", ["holdfast.cli", *words], lambda: False, environment=environment, prepares=prepares)

    def _worker(self) -> Part:
        name = f"up-{socket.gethostname()}"
        words = ["worker", "start", "--pool", POOL, "--type", "process", "--name", name, "--install-policy", "never"]
        prepares = ["prefect.cli.worker", "prefect.workers.process"]
        return self._part("worker", ["prefect", *words], lambda: self._is_online(name), prepares=prepares)

    def _part(self, name: str, words: Sequence[str], is_ready: Callable[[], bool], **more: Any) -> Part:
        given = {"environment": self._environments.others, **more}
        return Part(name, words, self.logs / f"{name}.log", events=self.events, is_ready=is_ready, **given)

    def _begin(self, part: Part) -> None:
        """Start a part and wait until it is ready; EngineError with its last words when it is not."""
        part.start()
        self._await_ready(part)

    def _await_ready(self, part: Part) -> None:
        self.parts.append(part)
        self._starting = part
        deadline = time.monotonic() + READY_SECONDS
        while not part.is_ready():
            self._next(0.1, starting=part)
            if time.monotonic() > deadline:
                raise self._failed(part, f"is not ready after {READY_SECONDS:.0f} s")
        self._starting = None

    def _finish(self, command: Part) -> None:
        """Run a command of ours to its end; EngineError with its last words when it fails."""
        command.start()
        self.parts.append(command)
        try:
            while command.is_running:
                self._next(None, starting=command, may_end=True)
            if command.process is not None and command.process.returncode != 0:
                raise self._failed(command, f"failed: `holdfast {command.words[1]}` ended with {command.process.returncode}")
        finally:
            command.kill()
            command.close()
            self.parts.remove(command)

    def _failed(self, part: Part, what: str) -> EngineError:
        return EngineError(f"{part.name} {what}; its last words, of {part.log}:\n{part.last_words()}")

    def _where(self) -> list[str]:
        """Return what a person wants to know."""
        at, shell = self.at, self.prefect.api in (None, self.url)
        lines = [
            "ready",
            f"  UI        {at.shown}",
            f"  API       {at.shown}/api",
            f"  database  {self.database.label}",
            f"  logs      {self.logs}/*.log",
        ]
        if self.wanted.webhook is not None:
            lines.append(f"  webhooks  http://{self.wanted.host}:{self.wanted.webhook_port}/hooks/NAME")
        lines += [
            "to search, in another terminal:",
            "  holdfast run SPEC.yaml",
            "or by the worker: Deployments, search, Run in the UI, or",
            f"  PREFECT_API_URL={self.url} \\",
            "    prefect deployment run search/search -p spec=/PATH/SPEC.yaml",
        ]
        if not shell:
            lines.append(f"Prefect's settings name {self.prefect.api}: `holdfast run` in such a shell goes there")
        if self.prefect.password is not None:
            lines.append("the server asks for a password: PREFECT_API_AUTH_STRING has to be set in that terminal")
        lines.append("Ctrl-C ends everything; what was running is saved, and `holdfast restore` goes on with it")
        return lines

    # While it runs

    def _keep(self) -> None:
        """Start parts that died again, until a signal comes; EngineError when one dies again and again."""
        while True:
            due = [part.due for part in self.parts if part.due is not None]
            self._next(max(0.0, min(due) - time.monotonic()) if due else None)
            for part in self.parts:
                if part.due is not None and part.due <= time.monotonic():
                    part.start()
                    self.say(f"{part.name} was started again")

    def _next(self, seconds: float | None, *, starting: Part | None = None, may_end: bool = False) -> None:
        """Wait for an event, for so long at most, and deal with it."""
        try:
            event = self.events.get(timeout=seconds)
        except queue.Empty:
            return
        if isinstance(event, Signalled):
            raise _Ended(event.number)
        reap_orphans(self.parts)
        part = event.part
        if part not in self.parts or event.process is not part.process:
            return
        part.close()
        if part is starting:
            if not may_end:
                raise self._failed(part, f"ended with {event.process.returncode} before it was ready")
            return
        pause = part.pause_after_death()
        if pause is None:
            raise self._failed(part, f"died {part.deaths} times in a row; everything was ended")
        self.say(f"{part.name} died ({_how(event.process.returncode)}; see {part.log}); it starts again in {pause:.0f} s")
        part.due = time.monotonic() + pause

    def _ask(self, path: str, body: object | None = None) -> Any:
        """Return what the server's API answers."""
        headers = {"Content-Type": "application/json"}
        password = self.prefect.client_password or self.prefect.password
        if password is not None:
            headers["Authorization"] = f"Basic {base64.b64encode(password.encode()).decode()}"
        data = None if body is None else json.dumps(body).encode()
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(urllib.request.Request(f"{self.url}{path}", data, headers), timeout=10) as answer:
            return json.loads(answer.read())

    def _is_online(self, name: str) -> bool:
        """Tell whether our worker has reported to the server since it was started."""
        with contextlib.suppress(OSError, ValueError):
            part = self.parts[-1]
            since = time.time() - (time.monotonic() - part.started)
            for worker in self._ask(f"/work_pools/{POOL}/workers/filter", {}):
                last = worker["name"] == name and worker.get("last_heartbeat_time")
                if last and datetime.fromisoformat(last.replace("Z", "+00:00")).astimezone(UTC).timestamp() >= since:
                    return True
        return False

    def _receives(self) -> bool:
        host = Addresses(self.wanted.host, self.wanted.webhook_port)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with contextlib.suppress(OSError, urllib.error.URLError), opener.open(f"{host.origin}/healthz", timeout=2) as answer:
            return bool(answer.status == 200)
        return False

    def _look_for_interrupted(self) -> None:
        """Let the worker look at once for searches that were cut off, by the last end of this machine, say."""
        for left in range(ASKED, -1, -1):
            try:
                deployment = self._ask(f"/deployments/name/{WATCH}")["id"]
                self._ask(f"/deployments/{deployment}/create_flow_run", {"name": "after-the-start", "tags": [TAG]})
            except (OSError, ValueError, KeyError) as error:
                if not left or not isinstance(error, OSError):
                    self.say(f"searches that were cut off are not looked for now ({error}): `holdfast watch` does it")
                    return
                self._next(1.0)  # its database is busy in its first seconds
            else:
                return

    # Ending

    def _end(self, ended: _Ended) -> None:
        """End one part after the other: the worker first, so that its searches save, and tell the server so."""
        self.say(
            f"{ended}: ending; running searches save, for {settings().grace_seconds:.0f} s at most (Ctrl-C again: at once)"
        )
        try:
            self._end_searches()
            for part in reversed([part for part in self.parts if part is not self._server]):
                self._end_part(part)
            if self._server in self.parts:
                self._end_part(self._server)
        except _Ended:
            self.say("at once")
        self._kill()
        self.say("everything has ended")

    def _end_part(self, part: Part) -> None:
        part.due = None
        deadline = time.monotonic() + ENDING_SECONDS
        if part is self._starting:  # nothing runs on it yet
            part.kill()
        part.tell()
        while part.is_running and (left := deadline - time.monotonic()) > 0:
            self._next_of_end(left)
        if part.is_running:
            self.say(f"{part.name} did not end in time, and was killed")
            part.kill()

    def _next_of_end(self, seconds: float) -> None:
        with contextlib.suppress(queue.Empty):
            event = self.events.get(timeout=seconds)
            if isinstance(event, Signalled):
                raise _Ended(event.number)

    def _end_searches(self) -> None:
        """Let runs save and end while their worker looks on, which would kill them: it ends when they have.

        Those of a worker that died are ours by now.
        """
        deadline = time.monotonic() + settings().grace_seconds + ENDING_SECONDS
        told: set[int] = set()
        while left := children_of(None, *(part.process.pid for part in self.parts if part.name == "worker" and part.process)):
            left = [process for process in left if process.pid not in self._own()]
            if not left or time.monotonic() > deadline:
                return
            for process in left:
                if process.pid not in told:
                    told.add(process.pid)
                    with contextlib.suppress(psutil.Error):
                        process.terminate()
            self._next_of_end(0.1)
            reap_orphans(self.parts)

    def _own(self) -> set[int]:
        return {part.process.pid for part in self.parts if part.process is not None}

    def _kill(self) -> None:
        """End everything at once."""
        end_descendants()
        for part in self.parts:
            part.kill()
            part.close()


def _how(code: int) -> str:
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name
