"""The spec's section ``execution``: on which machines user code runs, and what each trial gets there."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from holdfast.core.failure_section import a_list
from holdfast.core.space import Number, Section, Whole

Runner = Literal["threads", "dask", "ray", "workpool"]

_LOOPBACK = ("localhost", "::1")
_SCHEMES = {"dask": ("tcp", "tls", "ws", "wss", "ucx", "inproc"), "ray": ("ray", "")}


class Resources(Section):
    """What each running trial gets for itself."""

    cpu: Whole = Field(default=1, ge=1, description="threads of numerical libraries; with ray, CPUs that it occupies")
    gpu: Whole = Field(default=0, ge=0, description="devices, by CUDA_VISIBLE_DEVICES; with dask, of the worker resource GPU")
    custom: dict[str, Number] = Field(
        default_factory=dict, description="what the workers of dask or ray were started with, by their names for it"
    )

    @field_validator("custom")
    @classmethod
    def _amounts(cls, custom: dict[str, float]) -> dict[str, float]:
        for name, amount in custom.items():
            if name.upper() in ("CPU", "GPU"):
                raise ValueError(f"custom names {name!r}; use resources.{name.lower()}")
            if not name.strip() or amount <= 0:
                raise ValueError(f"custom.{name} is {amount:g}; give an amount above 0, or leave it out")
        return custom


class ExecutionSection(Section):
    """Where user code runs."""

    isolation: Literal["process", "inline"] = Field(default="process", description="inline: for trainables that use Prefect")
    runner: Runner = Field(
        default="threads",
        description="threads: this machine; dask or ray: a cluster; workpool: each trial a flow run of its own",
    )
    address: str | None = Field(
        default=None,
        description="of a running cluster: tcp://host:8786 with dask, ray://host:10001 or auto with ray; null: one for the run",
    )
    deployment: str = Field(default="trial/trial", description="what runs a trial with workpool: FLOW/DEPLOYMENT")
    job_variables: dict[str, Any] = Field(
        default_factory=dict, description="of each trial's flow run with workpool, as its pool has them, such as {image: ...}"
    )
    resources: Resources = Resources()
    ship: tuple[str, ...] = Field(
        default=(),
        description="files and folders below the working directory that travel along; the trainable's own file always does",
    )
    trials_per_run: Whole | None = Field(
        default=10_000,
        ge=1,
        description="a search goes on in a new flow run after so many trials have begun in one; null: never",
    )

    @field_validator("ship", mode="before")
    @classmethod
    def _listed(cls, given: Any) -> Any:
        return a_list(given, "[train.py, models/]")

    @field_validator("ship")
    @classmethod
    def _below(cls, paths: tuple[str, ...]) -> tuple[str, ...]:
        for path in paths:
            if not path.strip() or PurePath(path).is_absolute() or ".." in PurePath(path).parts:
                raise ValueError(f"ship holds {path!r}; name files and folders below the working directory")
        return paths

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.isolation == "inline" and self.is_remote:
            raise ValueError(
                f"execution.isolation is inline, which runs in the search's own process; with runner: {self.runner} use process"
            )
        if self.address is not None:
            self._check_address(self.address)
        if self.resources.custom and self.runner not in ("dask", "ray"):
            raise ValueError("execution.resources.custom is for dask and ray; drop it, or set execution.runner")
        if self.job_variables and self.runner != "workpool":
            raise ValueError("execution.job_variables is for runner: workpool; drop it, or set execution.runner")
        return self

    def _check_address(self, address: str) -> None:
        if self.runner not in ("dask", "ray"):
            raise ValueError(f"execution.address is for dask and ray; drop it with runner: {self.runner}, or name one of them")
        if self.runner == "ray" and address == "auto":
            return
        if not {"@", "?", "#"}.isdisjoint(address):  # it is shown and stored, so what stands there is not repeated here
            raise ValueError(
                "execution.address holds user info or a query; clusters are reached by host and port: write "
                f"{'tcp://host:8786' if self.runner == 'dask' else 'ray://host:10001'}, and leave credentials to the "
                "configuration of the cluster itself"
            )
        scheme = address.partition("://")[0] if "://" in address else ""
        if scheme not in _SCHEMES[self.runner] or not address.partition("://")[2 if scheme else 0]:
            form = "tcp://host:8786 (or tls://)" if self.runner == "dask" else "ray://host:10001, host:6379 or auto"
            raise ValueError(f"execution.address is {address!r}; with {self.runner} write {form}")

    @property
    def is_remote(self) -> bool:
        """Whether trials are supervised by other processes than the search's own."""
        return self.runner != "threads"

    @property
    def spans_hosts(self) -> bool:
        """Whether trials may run on other machines, as far as the section alone can say."""
        if self.address is None:
            return False
        if self.address == "auto":
            return True
        host = urlsplit(self.address if "://" in self.address else f"//{self.address}").hostname or ""
        return host not in _LOOPBACK and not host.startswith("127.")
