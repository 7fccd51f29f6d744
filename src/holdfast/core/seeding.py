"""Seeds: one experiment seed gives every other one, so that a restore draws what an uninterrupted run would have."""

from __future__ import annotations

import hashlib


def derive(seed: int, *path: object) -> int:
    """Return a 32-bit seed for ``path`` under ``seed``; a pure function, equal on every machine and Python."""
    text = "/".join(str(part) for part in (seed, *path))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def trial_seed(seed: int, number: int) -> int:
    """Return the seed that every attempt of trial ``number`` gets."""
    return derive(seed, "trial", number)


def proposal_seed(seed: int, number: int, retry: int = 0) -> int:
    """Return the seed of the sampler that proposes trial ``number``; each ``retry`` from 1 on draws anew for the same one."""
    return derive(seed, "proposal", number, "retry", retry) if retry else derive(seed, "proposal", number)
