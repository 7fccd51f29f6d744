"""Signals that become exceptions, and what they are called."""

import os
import signal
import subprocess
import sys
import threading
from contextlib import closing, nullcontext

import pytest
from sqlalchemy import text

from holdfast.flows.signals import Terminated, deferred, explained, raised, undisturbed, why
from holdfast.storage.database.engine import Statement, sqlite_url
from holdfast.storage.database.experiments import open_database

BOTH = (signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def as_by_default():
    """Under nohup, or in the background of a script, the tests themselves are begun with signals ignored."""
    before = [signal.signal(number, signal.SIG_DFL) for number in BOTH]
    yield
    for number, handler in zip(BOTH, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", BOTH)
def test_a_signal_raises_in_the_body_and_everything_is_as_before_afterwards(number):
    with pytest.raises(Terminated) as caught, raised(*BOTH, pass_on=False):  # noqa: PT012
        os.kill(os.getpid(), number)
        signal.pause()
    assert caught.value.signal == number
    assert why(caught.value) == f"interrupted: {number.name}"
    assert [signal.getsignal(each) for each in BOTH] == [signal.SIG_DFL] * 2


def test_what_somebody_else_has_decided_stays():
    """Under nohup a closed terminal ends nothing; a caller's own handler is a caller's own affair."""
    came = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with raised(*BOTH, pass_on=True):
            for number in BOTH:
                os.kill(os.getpid(), number)
        assert came == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGHUP, ignored)


def test_a_second_hangup_interrupts_nothing():
    ended = []
    with pytest.raises(Terminated), raised(*BOTH, pass_on=False):  # noqa: PT012
        try:
            os.kill(os.getpid(), signal.SIGHUP)
            signal.pause()
        finally:
            os.kill(os.getpid(), signal.SIGHUP)
            ended.append(True)
    assert ended == [True]


def test_other_threads_are_let_alone():
    found = []

    def work():
        with raised(*BOTH, pass_on=True):
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.SIG_DFL]


@pytest.mark.parametrize("number", BOTH)
def test_the_process_ends_by_the_signal_once_everything_is_in_order(number):
    code = f"""
import os, signal
from holdfast.flows.signals import raised
with raised(signal.SIGTERM, signal.SIGHUP, pass_on=True):
    with raised(signal.SIGTERM, signal.SIGHUP, pass_on=True):
        try:
            os.kill(os.getpid(), {int(number)})
            signal.pause()
        finally:
            print("in order", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == -number
    assert done.stdout == "in order\n"
    assert done.stderr == ""


def test_words():
    assert why(KeyboardInterrupt()) == "interrupted: SIGINT"
    assert why(ValueError("no")) == "interrupted: ValueError: no"
    with explained(lambda error: "stopped: by a person" if isinstance(error, ValueError) else None):
        assert why(ValueError("no")) == "stopped: by a person"
        assert why(Terminated(signal.SIGTERM)) == "interrupted: SIGTERM"


def test_what_comes_right_after_a_signal_interrupts_nothing():
    """A lease that is being given back would stay behind."""
    ended = []
    with pytest.raises(Terminated) as caught, raised(*BOTH, pass_on=False):  # noqa: PT012
        try:
            os.kill(os.getpid(), signal.SIGHUP)
            signal.pause()
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            ended.append(True)
    assert ended == [True]
    assert caught.value.signal == signal.SIGHUP


@pytest.mark.parametrize("number", [signal.SIGINT, *BOTH])
def test_nobody_is_disturbed_while_what_was_begun_is_ended(monkeypatch, number):
    before = signal.getsignal(signal.SIGINT)
    with undisturbed():
        os.kill(os.getpid(), number)
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.setattr("holdfast.flows.signals.SAME_SECONDS", 0.0)
    before = signal.signal(number, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), undisturbed():  # it takes too long: the signal does what it is for
            os.kill(os.getpid(), number)
    finally:
        signal.signal(number, before)


def test_undisturbed_lets_other_threads_alone_and_ignored_signals_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    found = []

    def work():
        with undisturbed():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    with undisturbed():
        found.append(signal.getsignal(signal.SIGHUP))
    assert found == [signal.SIG_DFL, signal.SIG_IGN]


def test_a_deferred_signal_is_taken_where_nothing_is_held():
    woken = []
    with pytest.raises(KeyboardInterrupt), deferred() as signals:  # noqa: PT012
        signals.wake = lambda: woken.append(True)
        signals.check()
        os.kill(os.getpid(), signal.SIGINT)
        assert woken == [True]
        os.kill(os.getpid(), signal.SIGINT)  # the same wish once more
        assert woken == [True]
        signals.check()
        pytest.fail("the check raises")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_deferred_signal_ends_other_peoples_code_at_once_and_is_not_lost_at_the_end():
    with pytest.raises(KeyboardInterrupt), deferred() as signals, signals.opened():  # noqa: PT012
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()
    passed = []
    with pytest.raises(KeyboardInterrupt), deferred():  # noqa: PT012
        os.kill(os.getpid(), signal.SIGINT)
        passed.append(True)
    assert passed == [True]


@pytest.mark.parametrize("takes", [True, False], ids=["deferred", "anywhere"])
def test_a_signal_as_a_transaction_begins_keeps_no_other_thread_waiting(tmp_path, takes):
    """While the exception is handled, what it came in stays on the stack: the lock that was taken would stay with it."""

    def interrupt(frame, event, arg):
        entered = event == "c_return" and arg is next and frame.f_code.co_name == "__enter__"
        if entered and frame.f_locals["self"].gen.__name__ == "write":
            sys.setprofile(None)
            os.kill(os.getpid(), signal.SIGINT)

    with closing(open_database(sqlite_url(tmp_path / "holdfast.db"), create_missing=True)) as database:

        def write():
            with database.write() as tx:
                tx.run(Statement(text("DELETE FROM config")))

        other = threading.Thread(target=write, daemon=True)
        try:
            with deferred() if takes else nullcontext() as signals:
                sys.setprofile(interrupt)
                write()
                signals.check()
            pytest.fail("the signal came")
        except KeyboardInterrupt:
            other.start()
            other.join(30 if takes else 0.5)
            assert other.is_alive() is not takes  # where it may raise anywhere, it is the transaction that ends last
        finally:
            sys.setprofile(None)
        other.join(30)
        assert not other.is_alive()
