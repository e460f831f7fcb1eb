"""The documentation site in a browser: its search, and the room of its tables."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import pytest
import yaml

from browser_rig import in_a_browser, opened

pytest.importorskip("material", reason="needs mkdocs-material")
pytestmark = in_a_browser
ROOT = Path(__file__).parents[2]
TABLES = ("coming-from-elsewhere", "compatibility", "performance", "results", "frontier/report")
SITE = (*(f"{page}.md" for page in TABLES), "site.css", "site.js")


class Silent(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A site of a few pages, with the search and the style of the real one."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    for name in SITE:
        (folder / "docs" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "docs" / name, folder / "docs" / name)
    (folder / "hook.py").write_text("from hooks import on_page_markdown\n")
    real = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader=yaml.BaseLoader)
    [search] = [each for each in real["plugins"] if "search" in each]
    own = {name: real[name] for name in ("extra_css", "extra_javascript")}
    own |= {"site_name": "x", "hooks": ["hook.py"], "plugins": [search], "theme": {"name": "material", "font": False}}
    (folder / "mkdocs.yml").write_text(yaml.safe_dump(own | {"use_directory_urls": False}))
    build(load_config(str(folder / "mkdocs.yml"), site_dir=str(folder / "site")))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=folder / "site"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with opened(tmp_path_factory.mktemp("browser")) as driver:
        driver.get(f"http://127.0.0.1:{server.server_port}/performance.html")
        yield driver
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("query", ["use_cache", "--use_cache", "--mc_num", 'remasking="random"', "use_cache=True"])
def test_options_of_other_projects_are_found_as_they_are_typed(page: Any, query: str) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    field = page.find_element("css selector", ".md-search__input")
    page.execute_script("arguments[0].closest('form').reset(); arguments[0].focus()", field)
    field.send_keys(query)
    found = WebDriverWait(page, 20).until(
        lambda _: page.execute_script("return document.querySelector('.md-search-result__link')?.href")
    )
    assert "/coming-from-elsewhere.html" in found


@pytest.mark.parametrize("name", TABLES)
def test_tables_fit_in_a_window_of_1400_pixels(page: Any, name: str) -> None:
    size = {"width": 1400, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    page.get(urljoin(page.current_url, f"/{name}.html"))
    boxes = page.execute_script(
        "return [...document.querySelectorAll('.md-typeset__scrollwrap')].map((e) => [e.scrollWidth, e.clientWidth])"
    )
    assert boxes
    assert all(needed <= given + 1 for needed, given in boxes)
