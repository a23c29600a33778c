"""A real headless Chromium for tests of web pages: their content, their console and their network requests.

    @pytest.fixture(scope="module")
    def browser() -> Iterator[Browser]:
        with open_browser() as opened:
            yield opened

Without Chromium such tests are skipped; with UDM_GRPO_REQUIRE_BROWSER=1 they fail.
"""

import base64
import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver

DESKTOP, PHONE = (1280, 900), (390, 844)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


class Browser:
    """A Chromium with one page. `driver` is Selenium's, for everything else."""

    def __init__(self, driver: webdriver.Chrome):
        self.driver = driver

    def open(self, address: str, size: tuple[int, int] = DESKTOP, *, dark: bool = False) -> None:
        """Load a page afresh in a window of `size` CSS pixels; a window as narrow as a phone has touch and no mouse."""
        phone = size[0] < 600
        self.command(
            "Emulation.setDeviceMetricsOverride",
            width=size[0],
            height=size[1],
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )
        self.command("Emulation.setTouchEmulationEnabled", enabled=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.command("Emulation.setEmulatedMedia", features=[scheme])
        self.console()
        self.requests()
        self.driver.get(address)

    def command(self, name: str, **values: Any) -> dict[str, Any]:
        """Run a command of the DevTools protocol."""
        return self.driver.execute_cdp_cmd(name, values)

    def run(self, script: str, *values: Any) -> Any:
        """Run a function body in the page; the values are its `arguments`."""
        return self.driver.execute_script(script, *values)

    def console(self) -> list[str]:
        """Return errors and warnings since the last call: from scripts, refused loads, the content security policy."""
        return [f"{line['level']}: {line['message']}" for line in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Return the addresses that were requested since the last call, except data: addresses."""
        messages = [json.loads(line["message"])["message"] for line in self.driver.get_log("performance")]
        sent = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
        return [one["request"]["url"] for one in sent if not one["request"]["url"].startswith("data:")]

    def place(self, selector: str) -> dict[str, float]:
        """Scroll to the first matching element; return its left, top, width and height in the window."""
        return self.run(
            """const element = document.querySelector(arguments[0]);
            element.scrollIntoView({block: "center", behavior: "instant"});
            const {left, top, width, height} = element.getBoundingClientRect();
            return {left, top, width, height};""",
            selector,
        )

    def hover(self, selector: str, across: float = 0.5, down: float = 0.5) -> None:
        """Move the mouse over an element, to a fraction of its width and height."""
        self.command("Input.dispatchMouseEvent", type="mouseMoved", **self._point(selector, across, down))

    def tap(self, selector: str, across: float = 0.5, down: float = 0.5) -> None:
        """Touch an element with a finger, at a fraction of its width and height."""
        point = self._point(selector, across, down)
        self.command("Input.dispatchTouchEvent", type="touchStart", touchPoints=[point])
        self.command("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """Write a PNG of the whole page or of its visible part."""
        taken = self.command("Page.captureScreenshot", format="png", captureBeyondViewport=whole, **self._clip(whole))
        path.write_bytes(base64.b64decode(taken["data"]))

    def _point(self, selector: str, across: float, down: float) -> dict[str, float]:
        place = self.place(selector)
        return {"x": place["left"] + across * place["width"], "y": place["top"] + down * place["height"]}

    def _clip(self, whole: bool) -> dict[str, Any]:
        if not whole:
            return {}
        size = self.command("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}


@contextlib.contextmanager
def open_browser() -> Iterator[Browser]:
    """Start Chromium for the duration of the block; skip the test if it is missing, or fail if it is required."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        missing = "no chromium and chromedriver on PATH; on Debian: apt-get install chromium chromium-driver"
        if os.environ.get("UDM_GRPO_REQUIRE_BROWSER") == "1":
            pytest.fail(f"UDM_GRPO_REQUIRE_BROWSER is 1, but there are {missing}")
        pytest.skip(missing)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "WARNING", "performance": "ALL"})
        started = webdriver.Chrome(options, webdriver.ChromeService(driver))
        try:
            yield Browser(started)
        finally:
            started.quit()
