"""The report in a real browser. Needs Chromium (`apt-get install chromium`) and the package playwright.

Without them the tests are skipped, unless FEDMITR_REQUIRE_BROWSER=1 says that they must run.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from fedmitr_flwr.cli import app
from tests.unit.results.finished import make_run

if TYPE_CHECKING:
    from playwright.sync_api import Browser

REQUIRED = os.environ.get("FEDMITR_REQUIRE_BROWSER") == "1"
if not REQUIRED:
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None and not REQUIRED, reason="there is no chromium on this machine")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    assert CHROMIUM is not None, "FEDMITR_REQUIRE_BROWSER=1, but there is no chromium on this machine"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=[*QUIET, "--disable-sync", "--no-first-run"]
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run's own report, and one that compares two runs."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [make_run(folder, "first"), make_run(folder, "a-second-run-with-a-long-name", **{"distill.steps": 25})]
    both = folder / "both.html"
    result = CliRunner().invoke(app, ["report", *map(str, runs), "-o", str(both)])
    assert result.exit_code == 0, result.output
    return {"run": runs[0] / "report.html", "comparison": both}


@pytest.mark.parametrize("kind", ["run", "comparison"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_the_page_fits_the_screen_and_asks_for_nothing(
    browser: Browser, pages: dict[str, Path], tmp_path: Path, kind: str, scheme: str, width: int
) -> None:
    said: list[str] = []
    asked: list[str] = []
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(pages[kind].as_uri())
    for details in page.query_selector_all("details"):
        details.evaluate("element => element.open = true")
    shot = page.screenshot(full_page=True, path=tmp_path / f"{kind}-{width}-{scheme}.png")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.close()
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [pages[kind].as_uri()]
    assert (sum(int(part) for part in ground.strip("rgb()").split(",")) < 384) == (scheme == "dark")
    assert len(shot) > 20_000


def test_the_overlays_can_be_switched(browser: Browser, pages: dict[str, Path]) -> None:
    page = browser.new_page()
    page.goto(pages["run"].as_uri())
    stopped = page.locator(".gallery .stopped").first
    assert not stopped.is_visible()
    page.get_by_text("Stopped patches", exact=True).click()
    assert stopped.is_visible()
    assert not page.locator(".gallery .density").first.is_visible()
    page.close()
