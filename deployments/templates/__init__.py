"""Base job templates of work pools: how a worker starts a process, a container or a Kubernetes job for a search."""

from __future__ import annotations

from pathlib import Path


def template_file(kind: str) -> Path:
    """Return the file of the template for work pools of a type: process, docker or kubernetes."""
    return Path(__file__).parent / f"{kind}.json"
