"""A browser for tests, where one is installed."""

from __future__ import annotations

import json
import os
import shutil
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from selenium.webdriver import Chrome

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")


def missing(told: str) -> None:
    """Skips the test, or fails it where a browser has to be."""
    if os.environ.get("SLM_PL_NEEDS_BROWSER") == "1":
        pytest.fail(f"SLM_PL_NEEDS_BROWSER is 1, but {told}")
    pytest.skip(told)


def browser() -> str:
    """The browser's path; without one the test is skipped, or fails where a browser has to be."""
    if CHROMIUM is None:
        missing("neither chromium, chromium-browser nor google-chrome is installed")
    return CHROMIUM


def driven_browser(directory: Path, width: int = 1400, height: int = 1000) -> Chrome:
    """A browser that a test works with.

    Args:
        directory: Where it keeps what it keeps.
        width: Of its page, in pixels.
        height: Of its page, in pixels.
    """
    binary = browser()
    if DRIVER is None:
        missing("chromedriver is not installed (Debian: chromium-driver)")
    try:
        from selenium import webdriver
    except ImportError:
        missing("selenium is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        f"--window-size={width},{height}",
        f"--user-data-dir={directory}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    # Both paths are given, so selenium looks for nothing on the network.
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    driver.command_executor.client_config.timeout = 15  # of each command, in seconds, where a page hangs
    resize(driver, width, height)
    return driver


def resize(driver: Chrome, width: int, height: int = 1000) -> None:
    """Makes the page this wide, also where a window could not be so narrow."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def asked_of(driver: Chrome) -> set[str]:
    """The hosts and ports that the page has asked for anything since the last call."""
    found = set()
    for entry in driver.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            url = urlsplit(message["params"]["request"]["url"])
        elif message["method"] == "Network.webSocketCreated":
            url = urlsplit(message["params"]["url"])
        else:
            continue
        if url.scheme not in ("chrome", "data", "blob"):  # the browser's own pages, and what is inline
            found.add(url.netloc)
    return found
