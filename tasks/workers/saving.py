"""Saves in the background: the thread that writes them on the trial's side, and the one that publishes them on the other."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from holdfast.core.errors import NotStorable
from holdfast.storage.checkpoints.background import Background
from holdfast.storage.checkpoints.local import Published
from holdfast.tasks.workers.messages import Report, Staged


class Saver:
    """Writes one checkpoint at a time, and hands it over for publishing.

    ``hand_over`` is called in the thread that writes; ``settle`` waits, where :meth:`finish` is called, until the
    checkpoint that was handed over counts, and raises when it does not. One thread at a time may call the methods.
    """

    def __init__(self, hand_over: Callable[[Report], None], settle: Callable[[], None]) -> None:
        self._hand_over = hand_over
        self._settle = settle
        self._background = Background("holdfast-saver")

    def start(self, report: Report, write: Callable[[], Staged]) -> None:
        """Let ``write`` run in the background; its files are the checkpoint of ``report``, which is durable."""
        assert not self._background.busy
        self._background.start(partial(self._run, report, write))

    def finish(self) -> None:
        """Wait until what is under way, if anything, counts as a checkpoint; raise the error that it met, once."""
        if self._background.busy:
            self._background.wait()
            self._settle()

    def _run(self, report: Report, write: Callable[[], Staged]) -> None:
        try:
            self._hand_over(replace(report, staged=write()))
        except BaseException as error:
            error.add_note(f"while the checkpoint of step {report.step} was written in the background")
            raise


@dataclass(frozen=True, kw_only=True)
class Publication:
    """What became of a checkpoint that was to be published: one of the two is given."""

    report: Report
    published: Published | None
    error: BaseException | None


def blamed(error: BaseException, report: Report) -> BaseException:
    """Return what an error of publishing counts as: NotStorable when files vanished from a folder of the trial's own."""
    if report.staged is None or report.staged.serializer != "directory" or not isinstance(error, OSError):
        return error
    if error.errno not in (errno.ENOENT, errno.ENOTDIR) or not Path(report.staged.path).parent.is_dir():
        return error
    words = f"{error.strerror or error}; leave the folder alone once its step is reported"
    refused = NotStorable(words)
    refused.__cause__ = error
    return refused


class Publisher:
    """Publishes one checkpoint at a time in a thread of its own; :attr:`wake` can be polled for its end."""

    def __init__(self) -> None:
        self._pipe: tuple[int, int] | None = None
        self._thread: threading.Thread | None = None
        self._done: Publication | None = None

    @property
    def wake(self) -> int | None:
        """A descriptor that has something to read once what is under way has ended; None when nothing is."""
        return self._pipe[0] if self._pipe is not None and self._thread is not None else None

    def start(self, report: Report, publish: Callable[[], Published]) -> None:
        """Call ``publish`` in the background."""
        assert self._thread is None
        if self._pipe is None:
            self._pipe = os.pipe()
        thread = threading.Thread(target=self._run, args=(report, publish), name="holdfast-publisher", daemon=True)
        thread.start()
        self._thread = thread

    def take(self, *, wait: bool = False) -> Publication | None:
        """Return what has ended since the last call; None when nothing has, or with ``wait`` when nothing was under way."""
        if self._thread is None or self._pipe is None or (self._done is None and not wait):
            return None
        self._thread.join()
        os.read(self._pipe[0], 1)
        done, self._thread, self._done = self._done, None, None
        return done

    def close(self) -> None:
        """Wait until nothing is under way; its result is lost unless it was taken."""
        self.take(wait=True)
        if self._pipe is not None:
            for descriptor in self._pipe:
                os.close(descriptor)
            self._pipe = None

    def _run(self, report: Report, publish: Callable[[], Published]) -> None:
        assert self._pipe is not None
        try:
            self._done = Publication(report=report, published=publish(), error=None)
        except BaseException as error:  # noqa: BLE001  # raised where it is taken
            self._done = Publication(report=report, published=None, error=blamed(error, report))
        os.write(self._pipe[1], b"\0")
