"""Chromium as a person's browser, without a window: what it shows, says and fetches."""

import base64
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --disable-dev-shm-usage"
).split()
PHONE, DESKTOP = 390, 1280


class Browser:
    """One window."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def visit(self, address: str, *, width: int = DESKTOP, theme: str = "light") -> None:
        """Open a page as wide as ``width`` px, light or dark."""
        scheme = [{"name": "prefers-color-scheme", "value": theme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        shape = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width == PHONE}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", shape)
        self.driver.get(address)

    def ask(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        return self.driver.execute_script(f"return {script.strip()}")

    def complaints(self) -> list[str]:
        """What came to the console since the last call, the address of an icon that a server lacks left out."""
        return [entry["message"] for entry in self.driver.get_log("browser") if "favicon" not in entry["message"]]

    def requests(self) -> list[str]:
        """Addresses that were fetched since the last call, inline data left out."""
        messages = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        sent = [one["params"]["request"]["url"] for one in messages if one["method"] == "Network.requestWillBeSent"]
        return [address for address in sent if not address.startswith("data:")]

    def wait_for(self, text: str, *, seconds: float = 60) -> None:
        """Until ``text`` can be seen."""
        self.wait_until(f"document.body && document.body.innerText.includes({json.dumps(text)})", seconds=seconds)

    def wait_until(self, script: str, *, seconds: float = 60) -> None:
        """Until a JavaScript expression is true."""
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, seconds).until(lambda _: self.ask(script), f"never true: {script}")

    def shoot(self, file: Path) -> None:
        """The whole page as a picture."""
        shot = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
        file.write_bytes(base64.b64decode(shot["data"]))

    def glance(self, file: Path) -> None:
        """What the window shows of the page as a picture."""
        self.driver.save_screenshot(str(file))

    def press(self, text: str) -> None:
        """Click on the element that says ``text`` and no more, as soon as that can be done."""
        from selenium.common.exceptions import WebDriverException
        from selenium.webdriver.common.by import By
        from selenium.webdriver.support.ui import WebDriverWait

        place = (By.XPATH, f"//*[normalize-space(text())='{text}']")

        def pressed(driver: Any) -> bool:
            driver.find_element(*place).click()
            return True

        WebDriverWait(self.driver, 60, ignored_exceptions=[WebDriverException]).until(pressed)  # drawn, and not moving

    def print(self) -> bytes:
        """The page as PDF."""
        return base64.b64decode(self.driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"])


@contextmanager
def chromium() -> Iterator[Browser]:
    """A fresh browser; skips the test where there is none."""
    from selenium import webdriver

    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("needs chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        window = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        try:
            yield Browser(window)
        finally:
            window.quit()
