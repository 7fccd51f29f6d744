"""The body of a delivery: read up to a limit and within a time, and parsed as strict JSON."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any

from holdfast.deployments.webhook.problems import Problem

_JSON_TYPE = re.compile(rb"application/(?:json|[a-z0-9.+-]{1,100}\+json)", re.IGNORECASE)
_LONGEST_NUMBER = 400
_CLOSE = {"Connection": "close"}


def check_headers(headers: Sequence[tuple[bytes, bytes]], limit: int) -> None:
    """Raise a Problem for a body that is no JSON or too large, as far as its headers tell; nothing of it is read."""
    types = [value for key, value in headers if key == b"content-type"]
    media, _, parameters = (types[0] if len(types) == 1 else b"").partition(b";")
    charset = parameters.strip().lower()
    if not _JSON_TYPE.fullmatch(media.strip()) or charset not in (b"", b"charset=utf-8", b'charset="utf-8"'):
        raise Problem(415, "content-type", "send the body as application/json, in UTF-8", headers=_CLOSE)
    if any(key == b"content-encoding" and value.strip().lower() != b"identity" for key, value in headers):
        raise Problem(415, "content-encoding", "send the body as it is, not compressed", headers=_CLOSE)
    lengths = [value for key, value in headers if key == b"content-length"]
    if any(not value.isdigit() or len(value) > 18 or int(value) > limit for value in lengths):
        raise _too_large(limit)


def _too_large(limit: int) -> Problem:
    return Problem(413, "body-too-large", f"a body has at most {limit} bytes", headers=_CLOSE, limit=limit)


async def read_body(stream: AsyncIterator[bytes], limit: int, seconds: float) -> bytes:
    """Return the body; a Problem once it is longer than ``limit``, or has not come within ``seconds``."""
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for part in stream:
                if len(body) + len(part) > limit:
                    raise _too_large(limit)
                body += part
    except TimeoutError:
        raise Problem(408, "too-slow", f"the body did not come within {seconds:g} s", headers=_CLOSE) from None
    return bytes(body)


async def leave_unread(stream: AsyncIterator[bytes], limit: int, seconds: float) -> None:
    """Take a body that nobody wants off the line, up to ``limit`` and within ``seconds``; keep nothing of it."""
    taken = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            async for part in stream:
                taken += len(part)
                if taken > limit:
                    return


class _Refusal(ValueError):
    """Why JSON is not taken."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _Refusal("an object has the same key twice")
    return found


def _whole(text: str) -> int:
    if len(text) > 19 or not -(2**63) <= (number := int(text)) < 2**63:
        raise _Refusal("a whole number has more than 64 bits")
    return number


def _number(text: str) -> float:
    if len(text) > _LONGEST_NUMBER or not math.isfinite(number := float(text)):
        raise _Refusal("a number is out of range")
    return number


def _constant(text: str) -> float:
    raise _Refusal(f"{text} is no JSON")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_once, parse_int=_whole, parse_float=_number, parse_constant=_constant, strict=True
)


def parse(body: bytes, depth: int) -> Any:
    """Return what a body of strict JSON says; a Problem (400) for anything else, or for more than ``depth`` levels."""
    try:
        text = body.decode("utf-8")
        found = _DECODER.decode(text)
        _check_depth(found, depth)
        if "\\u" in text:
            json.dumps(found, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except _Refusal as error:
        raise Problem(400, "not-json", f"the body is refused: {error}") from None
    except RecursionError:
        raise Problem(400, "not-json", f"the body is refused: more than {depth} levels") from None
    except ValueError:  # JSONDecodeError, UnicodeError: what they say quotes the body
        raise Problem(400, "not-json", "the body is no JSON in UTF-8") from None
    return found


def _check_depth(found: Any, depth: int) -> None:
    level = [found]
    for _ in range(depth):
        level = [
            inner for one in level if isinstance(one, dict | list) for inner in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return
    if any(isinstance(one, dict | list) for one in level):
        raise _Refusal(f"more than {depth} levels")
