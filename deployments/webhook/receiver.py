"""Taking a delivery: from the cheap checks to the dear ones, then one flow run for it, and one answer."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from anyio import CapacityLimiter, to_thread

from holdfast.core.errors import DatabaseError
from holdfast.core.values import Json
from holdfast.deployments.webhook import standing
from holdfast.deployments.webhook.bodies import check_headers, leave_unread, parse, read_body
from holdfast.deployments.webhook.config import Hook, WebhookConfig
from holdfast.deployments.webhook.keys import Keys
from holdfast.deployments.webhook.limiting import RateLimit, client_name
from holdfast.deployments.webhook.problems import Problem, later
from holdfast.deployments.webhook.requests import Form
from holdfast.deployments.webhook.signatures import proof_in, verified
from holdfast.deployments.webhook.starting import Api, Started
from holdfast.deployments.webhook.templates import Template
from holdfast.holding import holder, liveness
from holdfast.settings import settings
from holdfast.storage.database.deliveries import Answered, Busy, Claimed, Deliveries, Delivery, Full, Refused, Verdict

_LOG = logging.getLogger("holdfast.webhook")

WAITING = 10.0
"""Seconds that a repetition waits for the answer of the delivery that it repeats."""

LEAVING = 1.0
"""Seconds in which the body of a delivery for no hook is taken off the line."""

THREADS = 8
"""Deliveries whose files and rows are looked at side by side."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What is sent back when nothing is wrong."""

    body: dict[str, Json]
    status: int = 202
    headers: dict[str, str] = field(default_factory=dict)


class Prepared:
    """One hook with everything that its deliveries need."""

    def __init__(self, name: str, hook: Hook, api: Api) -> None:
        self.name, self.hook = name, hook
        self.keys = Keys(hook, api.secret)
        self.form = Form(hook, {key: Template(text, f"hooks.{name}.{key}") for key, text in hook.templates()})


def _gone(who: Mapping[str, Any]) -> bool:
    return liveness(who) is False


class Receiver:
    """Every hook of a configuration. SpecError or DatabaseError when it cannot be used: nothing is served then."""

    def __init__(self, config: WebhookConfig) -> None:
        self.config = config
        self.api = Api(config.prefect_seconds)
        self.hooks = {name: Prepared(name, hook, self.api) for name, hook in config.hooks.items()}
        limits, memory = config.limits, config.memory
        self._clients = RateLimit(limits.per_client.times, limits.per_client.seconds)
        self._deliveries = RateLimit(limits.per_hook.times, limits.per_hook.seconds)
        place: str | Path = memory.database or settings().data_folder / "webhook.db"
        self.store = Deliveries(
            place,
            retention=memory.retention,
            most=memory.most,
            seconds=30.0 + 8 * config.prefect_seconds,  # more than carrying one out can take
            gone=_gone,
        )
        self._threads = CapacityLimiter(THREADS)
        self._health: tuple[float, bool] = (float("-inf"), False)
        self._asking = asyncio.Lock()

    def close(self) -> None:
        """Close the store."""
        self.store.close()

    async def health(self) -> dict[str, Any]:
        """Say whether Prefect answers; it is asked every few seconds at most."""
        async with self._asking:
            if time.monotonic() - self._health[0] > 5.0:
                self._health = (time.monotonic(), await self.api.answers())
        return {"status": "ok", "prefect": self._health[1]}

    async def take(
        self, name: str, headers: Sequence[tuple[bytes, bytes]], stream: AsyncIterator[bytes], host: str | None
    ) -> Answer:
        """Return the answer to a delivery; a Problem when it is refused. One line of the log says which."""
        client, began = client_name(host), time.monotonic()
        seen: dict[str, str] = {"hook": name if name in self.hooks else "-", "client": client, "delivery": "-"}
        status, kind = 500, "failed"
        try:
            answer = await self._take(name, headers, stream, client, seen)
            status, kind = answer.status, str(answer.body["status"])
            return answer
        except Problem as problem:
            status, kind = problem.status, problem.kind
            if problem.__cause__ is not None:
                _LOG.warning("hook=%s %s: %s", seen["hook"], kind, safe(f"{problem.__cause__}"))
            raise
        finally:
            words = " ".join(f"{key}={value}" for key, value in seen.items())
            _LOG.info("%s status=%d %s ms=%d", words, status, kind, 1000 * (time.monotonic() - began))

    async def _take(
        self,
        name: str,
        headers: Sequence[tuple[bytes, bytes]],
        stream: AsyncIterator[bytes],
        client: str,
        seen: dict[str, str],
    ) -> Answer:
        limits = self.config.limits
        wait = self._clients.take(client)
        if wait:
            raise _rate("client", wait)
        prepared = self.hooks.get(name)
        if prepared is None:
            # A connection that is closed with something unread in it is reset, and the answer may be lost on its way.
            await leave_unread(stream, limits.body, LEAVING)
            raise Problem(404, "no-such-hook", "there is no such hook", headers={"Connection": "close"})
        check_headers(headers, limits.body)
        proof = proof_in(prepared.hook.signature, headers)
        body = await read_body(stream, limits.body, limits.body_seconds)
        keys = await prepared.keys.now()
        tolerance = prepared.hook.tolerance
        delivery = verified(prepared.hook.signature, keys, proof, body, hook=name, now=time.time(), tolerance=tolerance)
        seen["delivery"] = delivery.id
        wait = self._deliveries.take(name)
        if wait:
            raise _rate("hook", wait)
        if prepared.hook.signature == "github" and proof.event == b"ping":
            return Answer(body={"status": "pong"})
        event = safe((proof.event or b"").decode("latin-1"))
        said = await self._thread(parse, body, limits.depth)
        return await self._once(prepared, delivery, {"body": said, "event": event, "hook": name})

    async def _thread(self, call: Callable[..., T], *arguments: Any, **named: Any) -> T:
        return await to_thread.run_sync(partial(call, *arguments, **named), limiter=self._threads)

    async def _stored(self, call: Callable[..., T], *arguments: Any, **named: Any) -> T:
        try:
            return await self._thread(call, *arguments, **named)
        except DatabaseError as error:
            raise later(503, "memory", "deliveries cannot be remembered now, so none is taken; try again", 10.0) from error

    async def _once(self, prepared: Prepared, delivery: Delivery, values: dict[str, Any]) -> Answer:
        """Carry a delivery out, unless it was or is: whoever repeats one gets the same answer."""
        worker: dict[str, Json] = {**holder(), "token": uuid.uuid4().hex}

        async def claimed() -> Answered | Claimed | None:
            verdict: Verdict = await self._stored(self.store.claim, delivery, worker)
            if isinstance(verdict, Refused):
                if verdict.why == "replayed":
                    raise Problem(409, "replayed", "the same signed body was delivered before, under another id")
                raise Problem(409, "other-body", "another body was delivered before under the same id")
            if isinstance(verdict, Full):
                raise later(503, "memory-full", "no more deliveries can be remembered, so none is taken", verdict.seconds)
            return None if isinstance(verdict, Busy) else verdict

        verdict: Answered | Claimed = await _patiently(claimed, "the same delivery is being worked on; try again")
        if isinstance(verdict, Answered):
            return _answer(verdict.answer)
        try:
            answer = await self._carry_out(prepared, delivery, values, worker, again=verdict.tries > 1)
        except BaseException as error:
            # What Prefect has not been asked for leaves no trace; of anything else a repetition asks Prefect first.
            forget = isinstance(error, Problem) and error.status != 503 and verdict.tries == 1
            with_shield = asyncio.shield(self._stored(self.store.release, delivery, worker, forget=forget))
            await asyncio.gather(with_shield, return_exceptions=True)
            raise
        kept = await self._stored(self.store.answer, delivery, worker, {"status": answer.status, "body": answer.body})
        return _answer(kept)

    async def _carry_out(
        self, prepared: Prepared, delivery: Delivery, values: dict[str, Any], worker: dict[str, Json], *, again: bool
    ) -> Answer:
        if await self._thread(prepared.form.ignores, values):
            return Answer(body={"status": "ignored"})
        wanted = await self._thread(prepared.form.wanted, values)
        # What the signature covers: whoever gives the same again, however much later, gets the same flow run.
        signed = f"{delivery.hook}\0{delivery.signed or delivery.id}"
        key = f"webhook:{hashlib.sha256(signed.encode()).hexdigest()}"
        if again and (run := await self.api.run_of(key)):
            return _started(run)
        find = standing.restore_of if prepared.hook.runs == "restore" else standing.search_of
        target = await self._thread(find, wanted, self.config)

        async def handing() -> bool | None:
            return await self._stored(self.store.hand, target.place, worker) or None

        await _patiently(handing, "another delivery for the same experiment is being worked on; try again")
        try:
            target = await self._thread(find, wanted, self.config)  # somebody may have begun while we waited
            deployment = await self.api.deployment(prepared.hook.target)
            names = "path" if prepared.hook.runs == "restore" else "spec"
            waiting = None if wanted.forces else await self.api.waiting(deployment, target.parameters, names)
            if waiting is not None:
                words = f"flow run {waiting.id} was started for it and waits for a worker"
                raise later(409, "waiting", words, 30.0, flow_run_id=waiting.id, url=waiting.url)
            return _started(await self.api.start(deployment, target.parameters, key=key, name=target.name))
        finally:
            await asyncio.shield(self._stored(self.store.handed, target.place, worker))


async def _patiently(ask: Callable[[], Awaitable[T | None]], words: str) -> T:
    """Ask until there is an answer; a Problem (503) when that takes too long."""
    deadline, pause = time.monotonic() + WAITING, 0.02
    while (found := await ask()) is None:
        if time.monotonic() > deadline:
            raise later(503, "busy", words, 5.0)
        await asyncio.sleep(pause)
        pause = min(2 * pause, 0.5)
    return found


def _started(run: Started) -> Answer:
    return Answer(body={"status": "started", "flow_run_id": run.id, "url": run.url})


def _answer(kept: Mapping[str, Any]) -> Answer:
    return Answer(status=int(kept["status"]), body=dict(kept["body"]))


def _rate(whose: str, wait: float) -> Problem:
    problem = later(429, "too-many", f"too many calls of this {whose}", wait)
    problem.headers["Connection"] = "close"
    return problem


def safe(text: str) -> str:
    """Return a text as one line of the log may hold it: printable ASCII, and not too long."""
    return "".join(letter if " " <= letter <= "~" else "?" for letter in text[:500])
