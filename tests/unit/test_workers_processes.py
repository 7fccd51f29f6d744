"""Telling processes apart, and ending what a dead supervisor left."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from workers_kit import runs

from holdfast.tasks.workers import processes
from holdfast.tasks.workers.messages import MAGIC, Inbox, encode

SLEEPER = """
import subprocess, sys
print(subprocess.Popen(["sleep", "1000"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL).pid, flush=True)
sys.stdin.read()
"""


class Session:
    def __init__(self, *, marked: bool) -> None:
        environment = {**os.environ, **({processes.MARKER: "x"} if marked else {})}
        self.leader = subprocess.Popen(
            [sys.executable, "-c", SLEEPER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=environment,
        )
        assert self.leader.stdout is not None
        self.member = int(self.leader.stdout.readline())
        self.started = processes.identity(self.leader.pid) or ""

    def end_leader(self) -> None:
        self.leader.communicate("")

    def close(self) -> None:
        for pid in (self.leader.pid, self.member):
            if runs(pid):
                os.kill(pid, 9)
        self.leader.communicate()


@pytest.fixture
def session(request: pytest.FixtureRequest) -> Iterator[Session]:
    made = Session(marked=getattr(request, "param", True))
    yield made
    made.close()


def test_a_recorded_worker_is_ended_with_its_children(session: Session) -> None:
    pid = session.leader.pid
    assert processes.is_alive(processes.same_host(), pid, session.started) is True
    assert processes.is_alive("elsewhere", pid, session.started) is None
    assert processes.kill_group(pid, session.started)
    assert not runs(pid)
    assert not runs(session.member)
    assert processes.is_alive(processes.same_host(), pid, session.started) is False


def test_a_recycled_number_is_let_be(session: Session) -> None:
    assert not processes.kill_group(session.leader.pid, session.started + "1")
    assert not processes.kill_group(session.leader.pid, "another-boot/4026531836/77")
    assert runs(session.leader.pid)
    assert processes.is_alive(processes.same_host(), session.leader.pid, session.started + "1") is False


def test_what_a_dead_worker_left_is_ended(session: Session) -> None:
    session.end_leader()
    assert runs(session.member)
    assert not processes.kill_group(session.leader.pid, "another-boot/4026531836/77")
    assert runs(session.member)
    assert processes.kill_group(session.leader.pid, session.started)
    assert not runs(session.member)
    assert not processes.kill_group(session.leader.pid, session.started)


@pytest.mark.parametrize("session", [False], indirect=True)
def test_a_strangers_session_is_let_be(session: Session) -> None:
    session.end_leader()
    assert not processes.kill_group(session.leader.pid, session.started)
    assert runs(session.member)


def test_this_process_is_never_ended() -> None:
    pid = os.getpid()
    assert not processes.kill_group(pid, processes.identity(pid) or "")


def test_frames_come_whole_from_any_pieces() -> None:
    messages: list[dict[str, Any]] = [{"t": "a", "v": float("inf")}, {"t": "b", "v": "ü" * 300}, {"t": "c", "v": "\udcff"}]
    stream = b"".join(encode(message) for message in messages)
    for size in (1, 3, 7, len(stream)):
        inbox, found = Inbox(), []
        for start in range(0, len(stream), size):
            inbox.feed(stream[start : start + size])
            while (frame := inbox.next()) is not None:
                found.append(frame)
        assert found == messages
    inbox = Inbox()
    inbox.feed(MAGIC + b"\0\0\0\3[1]")
    with pytest.raises(ValueError, match="list"):
        inbox.next()


@pytest.mark.parametrize("junk", [b"j", b"junk", b"\0\0\0\3[1]", MAGIC[:2] + b"x"])
def test_junk_is_noticed_by_its_first_bytes(junk: bytes) -> None:
    inbox = Inbox()
    inbox.feed(encode({"t": "a"}) + junk)
    assert inbox.next() == {"t": "a"}
    with pytest.raises(ValueError, match="no frame"):
        inbox.next()
