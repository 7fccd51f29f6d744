"""Who sent a delivery: GitHub's signature and that of Standard Webhooks, compared in constant time.

https://docs.github.com/en/webhooks/using-webhooks/validating-webhook-deliveries,
https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass

from holdfast.core.errors import SpecError
from holdfast.deployments.webhook.problems import Problem
from holdfast.storage.database.deliveries import Delivery

SHORTEST = 16
"""Bytes that a secret needs at least."""

MOST_SIGNATURES = 16
"""A sender that changes its key sends two; more are not looked at."""

_PREFIX = "whsec_"
_ID = re.compile(rb"[A-Za-z0-9_\-.:~+/=@]{1,256}")
_TIMESTAMP = re.compile(rb"[0-9]{1,12}")
_GITHUB = re.compile(rb"sha256=([0-9a-f]{64})")


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What the headers of a delivery say of it; each one that is there exactly once."""

    id: bytes | None
    signature: bytes | None
    timestamp: bytes | None = None
    event: bytes | None = None
    """GitHub's name of what has happened; no part of what is signed"""


HEADERS = {
    "github": ("x-github-delivery", "x-hub-signature-256", None, "x-github-event"),
    "standard": ("webhook-id", "webhook-signature", "webhook-timestamp", None),
}
"""The headers of each way to sign: id, signature, timestamp, event."""


def proof_in(scheme: str, headers: Sequence[tuple[bytes, bytes]]) -> Proof:
    """Return what the headers say; a Problem when one of them stands there twice, with two meanings perhaps."""
    found: list[bytes | None] = []
    for name in HEADERS[scheme]:
        values = [value for key, value in headers if name is not None and key == name.encode()]
        if len(values) > 1:
            raise Problem(400, "repeated-header", f"header {name} is sent {len(values)} times; send it once")
        found.append(values[0].strip() if values else None)
    return Proof(id=found[0], signature=found[1], timestamp=found[2], event=found[3])


def key_of(scheme: str, secret: str, source: str) -> bytes:
    """Return the key that a secret stands for; SpecError, naming its source and not the secret, for one that cannot be used."""
    if scheme == "standard":
        try:
            text = secret.removeprefix(_PREFIX)
            key = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
        except (binascii.Error, ValueError):
            example = f'python -c "import base64, os; print({_PREFIX!r} + base64.b64encode(os.urandom(32)).decode())"'
            raise SpecError(f"{source} holds no Standard Webhooks secret, which is {_PREFIX} and base64: {example}") from None
    else:
        key = secret.encode()
    if len(key) < SHORTEST:
        raise SpecError(f"{source} holds a secret of {len(key)} bytes; it needs {SHORTEST} at least")
    return key


def verified(
    scheme: str, keys: Sequence[bytes], proof: Proof, body: bytes, *, hook: str, now: float, tolerance: float
) -> Delivery:
    """Return the delivery that ``proof`` and ``body`` are; a Problem (401) unless one of the keys signed them, in time.

    Every key is tried with every signature, so how long it takes does not tell which one fits. What is wrong is not told
    apart further than "signature" and "timestamp", and the latter only to who holds a key.
    """
    digest = hashlib.sha256(body).hexdigest()
    if scheme == "github":
        match = _GITHUB.fullmatch(proof.signature or b"")
        given = [match.group(1)] if match else []
        signed = [hmac.new(key, body, hashlib.sha256).hexdigest().encode() for key in keys]
        if not _any_equal(signed, given) or not _ID.fullmatch(proof.id or b""):
            raise _refused()
        return Delivery(hook=hook, id=(proof.id or b"").decode(), digest=digest, signed=digest)
    given = []
    for one in (proof.signature or b"").split(b" ")[:MOST_SIGNATURES]:
        version, _, text = one.partition(b",")
        if version == b"v1":
            given.append(text)
    identity, timestamp = proof.id or b"", proof.timestamp or b""
    signed = [_standard(key, identity, timestamp, body) for key in keys]
    well_formed = bool(_ID.fullmatch(identity) and _TIMESTAMP.fullmatch(timestamp))
    if not _any_equal(signed, given) or not well_formed:
        raise _refused()
    age = now - int(timestamp)
    if abs(age) > tolerance:
        when = "old" if age > 0 else "far in the future"
        raise Problem(
            401, "timestamp", f"the delivery is signed, but its timestamp is too {when}; {tolerance:.0f} s are allowed"
        )
    return Delivery(hook=hook, id=identity.decode(), digest=digest)


def _standard(key: bytes, identity: bytes, timestamp: bytes, body: bytes) -> bytes:
    return base64.b64encode(hmac.new(key, b"%s.%s.%s" % (identity, timestamp, body), hashlib.sha256).digest())


def _any_equal(signed: Sequence[bytes], given: Sequence[bytes]) -> bool:
    """Compare every pair, whatever the ones before said."""
    found = False
    for mine in signed:
        for theirs in given:
            found |= hmac.compare_digest(mine, theirs)
    return found


def _refused() -> Problem:
    return Problem(
        401, "signature", "the delivery is not signed as this hook asks for", headers={"WWW-Authenticate": "Signature"}
    )


def sign(scheme: str, key: bytes, body: bytes, *, id: str, timestamp: int) -> dict[str, str]:
    """Return the headers of a delivery as its sender makes them."""
    if scheme == "github":
        return {"X-GitHub-Delivery": id, "X-Hub-Signature-256": f"sha256={hmac.new(key, body, hashlib.sha256).hexdigest()}"}
    signature = _standard(key, id.encode(), str(timestamp).encode(), body).decode()
    return {"webhook-id": id, "webhook-timestamp": str(timestamp), "webhook-signature": f"v1,{signature}"}
