"""What user code raises, and ways in which it is hard to keep. Imports nothing of holdfast but what a user could."""

import threading


class Unspeakable(Exception):
    def __str__(self):
        raise SystemExit("no words")


class Unpicklable(ConnectionError):
    def __init__(self, what):
        super().__init__(what)
        self.lock = threading.Lock()

    def __reduce__(self):
        raise TypeError("never")


class Outer:
    class Strange(BaseException):
        pass


class NoText(Exception):
    def __str__(self):
        return 3  # noqa: PLE0307


def chained(trial):
    try:
        try:
            {}["first"]
        except KeyError as error:
            raise OSError("second") from error
    except OSError:
        raise ValueError("third")  # noqa: B904


def group(trial):
    raise ExceptionGroup("both", [ConnectionResetError("one"), ExceptionGroup("inner", [BrokenPipeError("two")])])


def mixed(trial):
    raise BaseExceptionGroup("mixed", [ValueError("one"), KeyboardInterrupt("two")])


def unspeakable(trial):
    raise Unspeakable


def unspeakable_cause(trial):
    raise ValueError("outside") from Unspeakable()


def no_text(trial):
    raise NoText


def unpicklable(trial):
    raise Unpicklable("kept")


def long(trial):
    raise ValueError("begin" + "x" * 10_000_000 + "end")


def long_name(trial):
    raise type("E" * 100_000, (ValueError,), {})("of a class with a long name")


def system_exit(trial):
    raise SystemExit


def exit_code(trial):
    raise SystemExit(0)


def interrupt(trial):
    raise KeyboardInterrupt


def generator_exit(trial):
    raise GeneratorExit("odd")


def strange(trial):
    raise Outer.Strange("seen")


def recursion(trial):
    recursion(trial)


def memory(trial):
    raise MemoryError


def cannot_allocate(trial):
    return bytearray(1 << 62)


def end_of_file(trial):
    raise EOFError("the input ended")


def reads_input(trial):
    import io
    import pickle

    pickle.load(io.BytesIO(b""))


def noted(trial):
    error = ValueError("seen")
    error.add_note("in the third batch")
    raise error


def cycle(trial):
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    raise first


def stops_itself(trial):
    from holdfast.tasks.workers.messages import Decision
    from holdfast.tasks.workers.trial_api import TrialStopped

    trial.report({"loss": 1.0})
    raise TrialStopped(Decision.PREEMPT)


def null(trial):
    raise ValueError("a\0b\udcffc")
