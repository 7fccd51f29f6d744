"""Refusals of the receiver: RFC 9457 problems, each with the status that it is sent with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PROBLEM_JSON = "application/problem+json"

STATUSES: dict[int, str] = {
    400: "the body, or a header, cannot be read",
    401: "the signature is missing, wrong, or too old",
    404: "there is no such hook, or no such experiment below its roots",
    405: "only POST is allowed",
    408: "the body came too slowly",
    409: "the experiment is driven already, or a restore of it waits; or the delivery's id or body was used before",
    413: "the body is too large",
    415: "the body is no JSON",
    422: "the body is JSON, but does not say what the hook needs",
    429: "too many deliveries; try again after Retry-After seconds",
    500: "something went wrong here; the receiver's log says what",
    503: "Prefect's API, or the memory of deliveries, is away; try again after Retry-After seconds",
}
"""Every status that is sent with a problem, and what it means."""


class Problem(Exception):
    """A refusal. ``kind`` names it for programs, ``detail`` says it to people; neither holds what was sent, nor a secret."""

    def __init__(
        self,
        status: int,
        kind: str,
        detail: str,
        *,
        headers: Mapping[str, str] | None = None,
        **members: Any,
    ) -> None:
        super().__init__(detail)
        self.status, self.kind, self.detail = status, kind, detail
        self.headers = dict(headers or {})
        self.members = members

    def body(self) -> dict[str, Any]:
        """Return the problem as it is sent."""
        return {
            "type": f"urn:holdfast:webhook:{self.kind}",
            "title": self.kind.replace("-", " "),
            "status": self.status,
            "detail": self.detail,
            **self.members,
        }


def later(status: int, kind: str, detail: str, seconds: float, **members: Any) -> Problem:
    """Return a refusal that may be tried again after so many seconds."""
    return Problem(status, kind, detail, headers={"Retry-After": str(max(int(seconds) + 1, 1))}, **members)
