"""What people see of a sweep in a real Chromium: MLflow's pages, and the report."""

from __future__ import annotations

import base64
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

from pipelines.loading import load
from pipelines.page import write_report
from pipelines.space import SweepConfig
from pipelines.sweep import sweep
from pipelines.tracking import Tracker, comparison_address
from tests.pipelines.servers import free_port, serving
from tests.pipelines.test_page import RANKING, written

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
RUNS = 14  # three losses at two weights and their control, two seeds each
PATIENCE_S = 60
PHONE, DESK, TALL = (390, 844), (1280, 900), (1400, 1400)
Picture = Callable[[Chrome, str], None]
# no profile, and no line to anybody
FLAGS = (
    *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync"),
    *("disable-background-networking", "disable-component-update"),
)
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs `apt-get install chromium chromium-driver`"
)


@pytest.fixture(scope="module")
def swept(
    tmp_path_factory: pytest.TempPathFactory, local_ray: None, _empty_store: Path
) -> Iterator[Path]:
    """A folder in which a real sweep was made."""
    folder: Path = tmp_path_factory.mktemp("swept")
    shutil.copy(_empty_store, folder / "mlruns.db")
    with chdir(folder):
        path = folder / "toys.yaml"
        toy = Path(__file__).parent / "toy.yaml"
        space = {
            "losses.distill.loss": {"grid": ["kd", "mse", "w2"]},
            "losses.distill.weight": {"grid": [0, 0.5, 2]},
        }
        path.write_text(yaml.safe_dump({"base": str(toy), "space": space, "seeds": 2}))
        config = load(path)
        assert isinstance(config, SweepConfig)
        sweep(
            config,
            watch=lambda *progress: None,
            tracker=Tracker(),
            verbose=False,
        )
        yield folder


@pytest.fixture
def picture(tmp_path: Path) -> Picture:
    """Keeps what the browser shows, in the folder KD_ARTIFACTS if that is named."""
    folder = Path(os.environ.get("KD_ARTIFACTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)

    def keep(browser: Chrome, name: str) -> None:
        browser.save_screenshot(str(folder / f"{name}.png"))

    return keep


@contextmanager
def chromium(profile: Path, size: tuple[int, int]) -> Iterator[Chrome]:
    """A browser with a profile of its own, a screen of that size, and a log of its console."""
    options = ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"user-data-dir={profile}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = Chrome(options=options, service=Service(str(DRIVER)))
    try:
        resize(browser, size)
        yield browser
    finally:
        browser.quit()


def resize(browser: Chrome, size: tuple[int, int]) -> None:
    """A screen of that size; a narrow one is a phone's."""
    width, height = size
    screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)


def wait(browser: Chrome, until: str) -> Any:
    """What a JavaScript expression comes to, once that is true."""
    return WebDriverWait(browser, PATIENCE_S, poll_frequency=0.5).until(
        lambda page: page.execute_script(f"return {until}"), message=until
    )


def complaints(browser: Chrome) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.fixture(scope="module")
def ui(swept: Path) -> Iterator[str]:
    """The address of `kd ui` on the sweep's store."""
    port = free_port()
    command = [sys.executable, "-m", "pipelines", "ui", "--port", str(port)]
    with serving(command, f"http://127.0.0.1:{port}/health", cwd=swept):
        yield f"http://127.0.0.1:{port}"


@pytest.mark.slow
def test_the_runs_of_a_sweep_are_listed_under_it(
    ui: str, swept: Path, tmp_path: Path, picture: Picture
) -> None:
    """The names of MLflow's elements are those of version 3."""
    expander = "document.querySelector('[data-component-id$=\"runnamecellrenderer.tsx_46\"]')"
    names = "[...document.querySelectorAll('a[href*=\"/runs/\"]')].map(link => link.textContent)"
    with chromium(tmp_path / "profile", TALL) as browser:
        browser.get(f"{ui}/#/experiments/1/runs")
        wait(browser, expander)
        assert len(wait(browser, names)) == 2, "the sweep and its teacher, the trials folded"
        browser.execute_script(f"{expander}.click()")
        wait(browser, f"{names}.length > 2")
        listed = browser.execute_script(f"return {names}")
        picture(browser, "runs")
    folders = [path.parent.name for path in swept.glob("runs/*/result.json")]
    (parent,) = (path.name for path in swept.glob("runs/sweeps/*"))
    assert len(folders) == RUNS + 1
    assert sorted(listed) == sorted([parent, *folders])


@pytest.mark.slow
def test_the_runs_are_compared_where_the_command_says(
    ui: str, swept: Path, tmp_path: Path, picture: Picture
) -> None:
    address = comparison_address(Tracker(f"sqlite:///{swept / 'mlruns.db'}"), ui)
    metric = "[...document.links].find(link => link.textContent.trim() == 'val/top1')"
    lines = "[...document.querySelectorAll('.scatterlayer .trace')].length"
    with chromium(tmp_path / "profile", TALL) as browser:
        browser.get(address)
        wait(browser, "document.querySelector('.js-plotly-plot .parcoords')")
        words = browser.execute_script("return document.body.innerText")
        picture(browser, "compared")
        assert f"Comparing {RUNS} Runs from 1 Experiment" in words
        assert "Parallel Coordinates Plot" in words
        assert "losses.distill.loss" in words
        wait(browser, metric)
        browser.execute_script(f"{metric}.click()")
        assert wait(browser, lines) >= RUNS
        assert "val/top1" in browser.execute_script("return document.body.innerText")
        picture(browser, "metric")


@pytest.fixture
def report(tmp_path: Path) -> str:
    """The address of a report's page."""
    long = replace(RANKING.rows[1], label="losses.mid.params.temperature=1.25 " * 4)
    ranking = replace(RANKING, rows=[RANKING.rows[0], long, *RANKING.rows[2:]])
    return write_report(written(tmp_path, ranking))[0].as_uri()


@pytest.mark.parametrize(("name", "size"), [("phone", PHONE), ("desk", DESK)])
def test_the_report_fits_its_screen(
    report: str, tmp_path: Path, picture: Picture, name: str, size: tuple[int, int]
) -> None:
    wide = "[...document.querySelectorAll('.wide')]"
    with chromium(tmp_path / "profile", size) as browser:
        browser.get(report)
        width, shown, height = browser.execute_script(
            "const page = document.documentElement;"
            "return [page.scrollWidth, page.clientWidth, page.scrollHeight]"
        )
        assert width == shown, "the page scrolls sideways"
        assert shown <= size[0]
        # what is wider than the screen scrolls by itself, and its words do not
        assert browser.execute_script(
            f"return {wide}.every(part => part.clientWidth <= {shown} && part.tabIndex == 0)"
        )
        assert browser.execute_script(
            f"return document.querySelector('caption span').clientWidth <= {shown}"
        )
        resize(browser, (size[0], height))
        picture(browser, f"report_{name}")
        assert not complaints(browser)


def test_the_report_has_its_table_and_every_figure(report: str, tmp_path: Path) -> None:
    with chromium(tmp_path / "profile", DESK) as browser:
        browser.get(report)
        table = "document.querySelector('tbody').innerText"
        words = browser.execute_script(f"return {table}")
        assert all(row.label in words for row in (RANKING.rows[0], *RANKING.rows[2:]))
        assert "teacher" in words
        drawn = browser.execute_script(
            "return [...document.images].map(image => [image.naturalWidth, image.clientWidth])"
        )
        assert len(drawn) == 5
        for natural, width in drawn:
            assert 0 < width <= natural, "a figure that is blown up is blurred"


def test_the_report_is_printed_without_loss(report: str, tmp_path: Path) -> None:
    with chromium(tmp_path / "profile", DESK) as browser:
        browser.get(report)
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
        resize(browser, (680, 1000))  # A4 within its margins, at 96 pixels an inch
        cut = browser.execute_script(
            "return [...document.querySelectorAll('table, figure, pre')]"
            ".filter(part => part.getBoundingClientRect().right > 680).length"
        )
        assert cut == 0, "something is wider than the paper"
        printed = browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})
        assert base64.b64decode(printed["data"]).startswith(b"%PDF-")
