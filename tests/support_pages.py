"""The pages of Prefect's server, as a person uses them in a browser."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import urlencode

from playwright.sync_api import Browser, Locator, Page
from support_deployed import WINDOW, Site

PATIENCE = 90_000
"""milliseconds"""


@dataclass
class Pages:
    """A window on the server of a site."""

    site: Site
    page: Page

    @classmethod
    def open(cls, browser: Browser, site: Site) -> Pages:
        context = browser.new_context(viewport=WINDOW, color_scheme="light", reduced_motion="reduce")  # type: ignore[arg-type]
        context.set_default_timeout(PATIENCE)
        # Nothing but the server is there: what the pages ask of others would keep them waiting.
        context.route(lambda url: not url.startswith(site.url), lambda route: route.abort())
        return cls(site, context.new_page())

    def go(self, path: str, **query: str) -> None:
        """Open a page by its path."""
        self.page.goto(f"{self.site.url}/v2{path}{'?' if query else ''}{urlencode(query)}")

    def sees(self, text: str, *, exact: bool = True) -> Locator:
        """Wait until a text is there to be seen."""
        found = self.page.get_by_text(text, exact=exact).filter(visible=True).first
        found.wait_for()
        return found

    # The form that starts a run

    def custom_run(self, deployment: str) -> None:
        """Open the form, from the list of deployments on, as a person finds it."""
        name = deployment.partition("/")[2]
        self.go("/deployments")
        self.page.get_by_role("link", name=name, exact=True).first.click()
        self.page.get_by_role("button", name="Run", exact=True).click()
        self.page.get_by_role("menuitem", name="Custom run").click()
        self.page.get_by_role("heading", name="Parameters").wait_for()

    def field(self, label: str, *, within: Locator | None = None) -> Locator:
        """Return a field by its label, which says (Optional) when it is."""
        return (within or self.page).get_by_label(re.compile(rf"^{re.escape(label)}( \(Optional\))?$", re.IGNORECASE)).first

    def fill(self, label: str, value: str) -> None:
        self.field(label).fill(value)

    def fill_first(self, value: str) -> None:
        """Fill in the form's first text: within tabs it has no label of its own."""
        self.page.locator("fieldset textarea").first.fill(value)

    def add(self, value: str) -> None:
        """Add an item to the form's list."""
        self.page.get_by_role("button", name="Add item").first.click()
        self.page.locator("fieldset textarea").last.fill(value)

    def tab(self, name: str) -> None:
        """Choose one of several forms of a parameter."""
        self.page.get_by_role("tab", name=name, exact=True).first.click()

    def submit(self) -> None:
        """Send the form, once more whenever the server's database is busy, and wait until the run is there."""
        for _ in range(10):
            with self.page.expect_response(lambda answer: answer.url.endswith("/create_flow_run")) as answered:
                self.page.get_by_role("button", name="Submit").click()
            if answered.value.status != 503:
                break
        assert answered.value.ok, answered.value.text()
        self.page.get_by_text("scheduled to start").first.wait_for()

    def refused(self) -> str:
        """Send the form, and return what is said against it; the form stays."""
        self.page.get_by_role("button", name="Submit").click()
        marks = "[role=alert], [data-sonner-toast], .text-destructive, .text-red-500"
        said = self.page.locator(marks).filter(visible=True)
        said.first.wait_for()
        return "\n".join(said.all_inner_texts())
