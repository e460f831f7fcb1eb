"""A headless browser for tests of pages."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = """--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --disable-dev-shm-usage --force-prefers-reduced-motion
--window-size=1200,900""".split()

# One worker starts one browser for all.
in_a_browser = [
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver"),
    pytest.mark.xdist_group("browser"),
]
UNNAMED = """
  return [...document.querySelectorAll('button, select, input, textarea')].filter((e) =>
    !(e.getAttribute('aria-label') || e.textContent.trim() || e.labels?.length)).map((e) => e.outerHTML)
"""

# Texts whose contrast is below that of WCAG AA: contrast, class, text. What is disabled is exempt.
FAINT = """
  const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const over = (top, below) => top.slice(0, 3).map((v, i) => v * (top[3] ?? 1) + below[i] * (1 - (top[3] ?? 1)));
  const linear = (v) => v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), faint = [];
  for (let text; (text = texts.nextNode());) {
    const element = text.parentElement, above = [];
    if (!text.data.trim() || !element.checkVisibility() || element.closest('option, noscript, :disabled')) continue;
    for (let each = element; each; each = each.parentElement) above.unshift(getComputedStyle(each));
    const ground = above.reduce((below, style) => over(parts(style.backgroundColor), below), [255, 255, 255]);
    const opacity = above.reduce((product, style) => product * style.opacity, 1);
    const ink = over([...over(parts(above.at(-1).color), ground), opacity], ground);
    const [low, high] = [luminance(ink), luminance(ground)].sort((a, b) => a - b);
    const contrast = (high + 0.05) / (low + 0.05);
    if (contrast < 4.5) faint.push([contrast.toFixed(2), element.className, text.data.trim()]);
  }
  return faint;
"""


@contextmanager
def opened(profile: Path) -> Iterator[Any]:
    """A browser that keeps its files in `profile`, and logs what it asks for and complains of."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def asked(page: Any) -> set[str]:
    """The addresses that were asked for since the last call."""
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    return {each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"}


def spoken(page: Any) -> list[tuple[str, str, dict[str, Any]]]:
    """What a screen reader is told of the parts of a page: role, name and properties, in order."""
    nodes = page.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    return [
        (
            node["role"]["value"],
            node.get("name", {}).get("value", ""),
            {each["name"]: each["value"].get("value") for each in node.get("properties", [])},
        )
        for node in nodes
        if not node["ignored"]
    ]


@contextmanager
def themed(page: Any, theme: str) -> Iterator[None]:
    """The page in the light or the dark theme."""

    def prefer(value: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": value}]
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    prefer(theme)
    try:
        yield
    finally:
        prefer("")


def width_on_a_phone(page: Any) -> int:
    """Width of the page on a screen of 360 pixels."""
    size = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        return int(page.execute_script("return document.documentElement.scrollWidth"))
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
