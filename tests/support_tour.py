"""The tour of docs/screenshots.py: a real search dies and is restored, and a browser shows what there is to see of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from playwright.sync_api import Error as PlaywrightError
from playwright.sync_api import sync_playwright
from support_deployed import NO_BROWSER, Site, browser_program
from support_pages import Pages

import holdfast
from holdfast.flows.naming import RESTORE, SEARCH, artifact_key, experiment_resource

DIGITS = Path(__file__).resolve().parent.parent / "examples" / "digits"
LARGEST = 150_000
"""bytes of a picture"""
WINDOW = {"width": 1280, "height": 800}
"""smaller than that of the tests: what is read in a page's column is as large, and the files are smaller"""
TRIALS = 8
KILLED_AFTER = 3
"""trials that have ended when the search is killed"""


class Tour:
    """A search of handwritten digits that died once, and what there is to see of it."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.path = site.storage / "digits"

    def run(self) -> None:
        """Deploy, search, kill the search, and wait for the restore of the automation."""
        shutil.copytree(DIGITS, self.site.folder / "digits", ignore=shutil.ignore_patterns("__pycache__", "runs"))
        self.site.deploy("--spec", self.site.folder / "digits" / "digits.yaml")
        worker = self.site.worker()
        overrides = [f"storage={self.site.storage}", f"search.num_trials={TRIALS}"]
        spec = str(self.site.folder / "digits" / "digits.yaml")
        self.died = self.site.start_run(SEARCH, {"spec": spec, "overrides": overrides})
        worker.until(lambda: self.ended() >= KILLED_AFTER, "the search")
        with holdfast.open(self.path) as experiment:
            self.uuid = experiment.id
            holder = experiment.lease.holder
        assert holder is not None
        os.kill(int(holder["pid"]), signal.SIGKILL)
        worker.until(lambda: self.site.state(self.died) == "CRASHED", "its end")
        worker.until(lambda: [run["state_type"] for run in self.site.runs_of(RESTORE)] == ["COMPLETED"], "its restore", 300)
        (restored,) = self.site.runs_of(RESTORE)
        self.restored = str(restored["id"])
        assert self.ended() == TRIALS

    def ended(self) -> int:
        """Return how many trials are completed."""
        with suppress(holdfast.HoldfastError), holdfast.open(self.path) as experiment:
            return sum(trial.status.value == "COMPLETED" for trial in experiment.trials)
        return 0

    def artifact(self, kind: str) -> str:
        return artifact_key(kind, "digits", self.uuid)


def pictures(tour: Tour, pages: Pages) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the name of each picture, and what opens the page and waits for its content."""
    page = pages.page

    def deployments() -> None:
        pages.go("/deployments")
        for name in ("search", "restore", "watch", "collect"):
            page.get_by_role("link", name=name, exact=True).first.wait_for()

    def form_of_restore() -> None:
        pages.custom_run(RESTORE)
        pages.fill("Experiment", str(tour.path))

    def form_of_search() -> None:
        pages.custom_run(SEARCH)

    def fields_of_search() -> None:
        pages.custom_run(SEARCH)
        pages.tab("Field by field")
        pages.field("Trainable").wait_for()

    def run() -> None:
        pages.go(f"/runs/flow-run/{tour.restored}", tab="TaskRuns")
        pages.sees("digits", exact=False)
        page.get_by_role("tab", name="Task Runs").click()
        pages.sees(f"trial-{TRIALS - 1}", exact=False)

    def artifact(kind: str, text: str) -> Callable[[], None]:
        def show() -> None:
            wanted = {"artifacts": {"key": {"any_": [tour.artifact(kind)]}}}
            (found,) = tour.site.ask("POST", "/artifacts/latest/filter", wanted)
            pages.go(f"/artifacts/artifact/{found['latest_id']}")
            pages.sees(text, exact=False)
            page.wait_for_load_state("networkidle")

        return show

    def automations() -> None:
        pages.go("/automations")
        pages.sees("holdfast", exact=False)

    def events() -> None:
        pages.go("/events", resource=json.dumps([experiment_resource(tour.uuid)]))
        pages.sees("holdfast.experiment.restored", exact=False)

    yield "deployments", deployments
    yield "restore-form", form_of_restore
    yield "search-form", form_of_search
    yield "search-form-fields", fields_of_search
    yield "run", run
    yield "progress", artifact("progress", "holdfast-progress")
    yield "leaderboard", artifact("leaderboard", "loss")
    yield "summary", artifact("summary", "How to go on")
    yield "automations", automations
    yield "events", events


def take(pages: Pages, name: str, images: Path) -> None:
    """Write a picture; an error when it is too large."""
    page = pages.page
    page.evaluate("document.fonts.ready")
    page.wait_for_function("document.querySelectorAll('[data-slot=skeleton]').length === 0")
    file = images / f"{name}.png"
    page.screenshot(path=file, animations="disabled", caret="hide")
    size = file.stat().st_size
    print(f"{file}: {size} bytes")
    if size > LARGEST:
        raise SystemExit(f"{file} has {size} bytes, more than {LARGEST}")


def main(images: Path, wanted: list[str]) -> int:
    """Take the pictures into a folder; those of ``wanted`` alone when it names some. Return the exit code."""
    program = browser_program()
    if program is None:
        print(NO_BROWSER, file=sys.stderr)
        return 4
    images.mkdir(exist_ok=True)
    missing: list[str] = []
    folder = Path(tempfile.mkdtemp(prefix="holdfast-")) / "lab"
    site = Site.start(folder)
    try:
        tour = Tour(site)
        tour.run()
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-dev-shm-usage"])
            pages = Pages.open(browser, site)
            pages.page.set_viewport_size(WINDOW)  # type: ignore[arg-type]
            for name, show in pictures(tour, pages):
                if not wanted or name in wanted:
                    try:
                        show()
                    except PlaywrightError as error:
                        missing.append(name)
                        print(f"{name}: {error}", file=sys.stderr)
                        continue  # the picture that is there stays
                    take(pages, name, images)
            browser.close()
    finally:
        site.close()
        shutil.rmtree(folder.parent, ignore_errors=True)
    return int(bool(missing))
