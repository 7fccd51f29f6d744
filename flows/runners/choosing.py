"""Which engine a spec names, and what its workers are told of the experiment."""

from __future__ import annotations

from holdfast.core.errors import SpecError
from holdfast.core.spec import ExperimentSpec
from holdfast.flows.hosts import check_installed
from holdfast.flows.runners.port import Runner
from holdfast.flows.runners.threads import ThreadRunner
from holdfast.flows.session import Session
from holdfast.flows.shipping import shipped
from holdfast.settings import settings
from holdfast.storage.root import is_url
from holdfast.tasks.place import Place, own_references
from holdfast.tasks.probing import versions
from holdfast.tasks.workers.processes import same_host


def runner_of(spec: ExperimentSpec, place: Place | None) -> Runner:
    """Return the engine that runs the trials of a spec; SpecError when it is not installed. Threads need no ``place``."""
    execution, most = spec.execution, spec.search.max_concurrent
    check_installed(execution.runner)
    try:
        match execution.runner:
            case "threads":
                return ThreadRunner(most)
            case "dask":
                from holdfast.flows.runners.dask import DaskRunner

                return DaskRunner(execution.address, execution.resources, most)
            case "ray":
                from holdfast.flows.runners.ray import RayRunner

                return RayRunner(execution.address, execution.resources, most)
            case "workpool":
                from holdfast.flows.runners.workpool import WorkPoolRunner

                assert place is not None
                return WorkPoolRunner(spec, place)
    except ImportError as error:
        extra = execution.runner
        raise SpecError(
            f"execution.runner is {extra}, which cannot be imported ({error}); `pip install 'holdfast[{extra}]'`"
        ) from error


def place_of(session: Session) -> Place:
    """Return what workers need to find the experiment that ``session`` drives."""
    opened, spec = session.opened, session.spec
    location = opened.folder.location
    options = spec.storage_options or (settings().storage_options if is_url(location) else None) or {}
    runner = spec.execution.runner
    return Place(
        uuid=session.runtime.uuid,
        name=spec.name,
        experiment=session.runtime.experiment,
        epoch=session.runtime.epoch,
        location=location,
        options=options,
        database=opened.database.address,
        host=same_host(),
        versions=versions(),
        references=own_references(spec.references, opened.record.spec.get("references", {})),
        slots=spec.search.max_concurrent if runner == "dask" else 1,
        **shipped(session),
    )
