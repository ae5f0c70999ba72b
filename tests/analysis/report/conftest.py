"""Databases with a known content, and a real browser where there is one."""

import importlib.util
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict

import numpy as np
import pytest
from sqlalchemy import insert

from analysis.report.page import page, report_data
from qbench.store import queries, schema
from qbench.store.records import Failure, LayerMetric, Outcome
from tests.analysis.conftest import HERE, database, losses, measured, sha, store

__all__ = ["HERE", "database", "store"]  # fixtures of the folder above

STORE = "sqlite:///results.db"
HOSTILE = "</script><script>window.pwned=1</script><img src=x onerror=window.pwned=2>%%PROGRAM%%"
PPL = {"gptq": 31.0, "awq": 32.0, "rtn": 36.0, HOSTILE: 34.0}
SPREAD = {2: 60.0, 3: 9.0, 4: 2.0}
LAYERS = [
    LayerMetric(block=block, module=module, name=name, value=0.01 * (block + 1))
    for block in range(3)
    for module in ("self_attn.q_proj", "mlp.down_proj")
    for name in ("output_error", "weight_error")
]


@pytest.fixture
def filled(database, store):
    """A baseline, twelve quantized points (one method has a name to beware of) and a failed one."""
    store("none", None, measured(losses(np.log(28.0))))
    for algo, value in PPL.items():
        for bits, worse in SPREAD.items():
            nlls = losses(np.log(value + worse))
            store(algo, bits, measured(nlls), measured(nlls + 1, task=HOSTILE), outcome=outcome(bits))
    store("rtn", 8, error=("NumericsError", f"{HOSTILE} is singular"))
    with_layers = database.find([sha_of(database, "gptq", 4)])
    for row in with_layers.values():
        add_layers(database, row.id)
        failure = Failure(
            evaluator="zeroshot",
            protocol="p",
            task="arc",
            spec_key=sha("arc"),
            error_type="EvaluationError",
            message=HOSTILE,
            trace="line 1\nline 2",
        )
        database.append(row.id, [], failures=[failure])
    return database


def outcome(bits: int) -> Outcome:
    return Outcome(
        bits_per_weight=bits + 0.3125, quantize_s=100.0 - bits, peak_host_bytes=10**9, model_bytes=bits * 10**7
    )


def sha_of(database, algo: str, bits: int) -> str:
    return next(row.key for row in queries.runs(database, algo=algo) if row.bits == bits)


def add_layers(database, run_id: int) -> None:
    with database.write() as connection:
        connection.execute(insert(schema.layer_metric), [asdict(each) | {"run_id": run_id} for each in LAYERS])


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--window-size=1280,1000"),
)


@pytest.fixture(scope="module")
def browser() -> Iterator:
    """A headless Chromium with an empty profile; skips where none, or its driver, is installed."""
    if importlib.util.find_spec("selenium") is None:
        pytest.skip("selenium is not installed")
    if CHROMIUM is None or shutil.which("chromedriver") is None:
        pytest.skip("chromium and chromedriver are not installed")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        driver.implicitly_wait(5)  # a page that a click leads to takes a moment
        yield driver
        driver.quit()


@pytest.fixture
def visit(browser, tmp_path) -> Iterator[Callable]:
    """Opens a page's text from disk; at the end the console has to be empty and nothing may have got through."""

    from selenium.webdriver.support.ui import WebDriverWait

    def open_page(text: str, fragment: str = ""):
        path = tmp_path / "report.html"
        path.write_text(text, encoding="utf-8")
        browser.get("about:blank")
        browser.get(f"file://{path}{fragment}")
        ready = "return document.documentElement.dataset.ready === 'yes'"
        WebDriverWait(browser, 30).until(lambda browser: browser.execute_script(ready))
        return browser

    yield open_page
    assert browser.get_log("browser") == []
    assert browser.execute_script("return window.pwned") is None
    browser.set_window_size(1280, 1000)


@pytest.fixture
def opened(filled, visit):
    return visit(page(report_data(filled, STORE)))
