"""The keys of hooks: from environment variables and files when the receiver starts, from blocks of Prefect as they are now."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from holdfast.core.errors import SpecError
from holdfast.deployments.webhook.config import Hook, Secret
from holdfast.deployments.webhook.problems import Problem, later
from holdfast.deployments.webhook.signatures import key_of
from holdfast.settings import variable

LARGEST = 4096
"""Bytes of a file with a secret."""

REMEMBERED = 60.0
"""Seconds for which a block's value is taken without asking again."""

FAILED = 5.0
"""Seconds for which a block that could not be read is not asked for again: who is nobody yet must not make us ask."""

ReadBlock = Callable[[str], Awaitable[str]]
"""Returns the value of a Secret block; a Problem when it cannot be had."""


class Keys:
    """The keys of one hook; SpecError, naming the source alone, for a secret that is missing or unfit."""

    def __init__(self, hook: Hook, read_block: ReadBlock, clock: Callable[[], float] = time.monotonic) -> None:
        self._scheme, self._read_block, self._clock = hook.signature, read_block, clock
        self._fixed = [key_of(hook.signature, _read(secret), secret.source) for secret in hook.secrets if secret.block is None]
        self._blocks = [secret for secret in hook.secrets if secret.block is not None]
        self._known: dict[str, tuple[float, bytes]] = {}
        self._failed: dict[str, float] = {}

    async def now(self) -> list[bytes]:
        """Return the keys that count now; a Problem (503) when a block cannot be read."""
        return [*self._fixed, *[await self._of_block(secret) for secret in self._blocks]]

    async def _of_block(self, secret: Secret) -> bytes:
        name = str(secret.block)
        found = self._known.get(name)
        if found is None or self._clock() - found[0] > REMEMBERED:
            if self._clock() - self._failed.get(name, float("-inf")) < FAILED:
                raise later(503, "secret", "the secret of this hook cannot be had; the receiver's log says why", FAILED)
            try:
                key = key_of(self._scheme, await self._read_block(name), secret.source)
            except SpecError as error:
                self._failed[name] = self._clock()
                raise later(
                    503, "secret", "the secret of this hook cannot be used; the receiver's log says why", 60.0
                ) from error
            except Problem:
                self._failed[name] = self._clock()
                raise
            found = self._known[name] = (self._clock(), key)
        return found[1]


def _read(secret: Secret) -> str:
    if secret.env is not None:
        value = variable(secret.env)
        if not value:
            raise SpecError(f"{secret.source} is not set; put the secret into it")
        return value
    file = Path(str(secret.file))
    try:
        with file.open("rb") as stream:
            content = stream.read(LARGEST + 1)
        text = content.decode()
    except OSError as error:
        raise SpecError(f"{secret.source} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SpecError(f"{secret.source} is no text") from None
    if len(content) > LARGEST:
        raise SpecError(f"{secret.source} has more than {LARGEST} bytes: it is no secret")
    return text.removesuffix("\n").removesuffix("\r")
