"""The built site: that its links and their anchors lead somewhere, and that viewing it contacts no other host."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

_REMOTE = re.compile(r"(?:https?:)?//", re.IGNORECASE)
# A script that fetches another one.
_FETCHED = r"""["'](?:https?:)?//[^"']+\.m?js["']"""
_SCRIPT = re.compile(rf"<script\b[^>]*>(?:(?!</script>).)*?{_FETCHED}.*?</script>", re.DOTALL | re.IGNORECASE)
_STYLE = re.compile(r"""(?:url\(|@import)\s*["']?((?:https?:)?//[^"')\s]+)""", re.IGNORECASE)


def without_remote_scripts(html: str) -> str:
    """HTML without the scripts that fetch others from another host, as nbconvert adds for diagrams and widgets."""
    return _SCRIPT.sub("", html)


class _Page(HTMLParser):
    """What a page links to, what it loads, and its anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = {"", "__top"}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect from one element."""
        found = {name: value or "" for name, value in attrs}
        self.anchors |= {found[name] for name in ("id", "name") if name in found}
        if tag in ("a", "area") and "href" in found:
            self.links.append(found["href"])
        elif tag == "link" and "href" in found:
            self.loads.append(found["href"])
        self.loads += [found[name] for name in ("src", "poster", "data") if name in found and tag != "a"]
        self.loads += _STYLE.findall(found.get("style", ""))


def problems(site: Path) -> Iterator[str]:
    """What is wrong with a built site, a line each."""
    texts = {file: file.read_text(encoding="utf-8") for file in sorted(site.rglob("*.html"))}
    pages = {file: _Page(text) for file, text in texts.items()}
    for file, page in pages.items():
        name = file.relative_to(site)
        if _SCRIPT.search(texts[file]):
            yield f"{name} has a script that loads another one from another host; leave it out"
        for target in dict.fromkeys(page.loads + page.links):
            if _REMOTE.match(target):
                if target in page.loads:
                    yield f"{name} loads {target} from another host; take a copy of it, or leave it out"
            elif not re.match(r"[a-z][a-z0-9+.-]*:", target) and (wrong := _missing(site, file, target, pages)):
                yield f"{name} links to {target}, {wrong}"
    for file in sorted(site.rglob("*.css")):
        for target in _STYLE.findall(file.read_text(encoding="utf-8")):
            yield f"{file.relative_to(site)} loads {target} from another host; take a copy of it, or leave it out"


def _missing(site: Path, file: Path, target: str, pages: dict[Path, _Page]) -> str | None:
    path, _, anchor = target.partition("#")
    path = unquote(path.partition("?")[0])
    start = site if path.startswith("/") else file.parent
    found = (start / path.lstrip("/")).resolve() if path else file
    found = found / "index.html" if found.is_dir() else found
    if not found.exists():
        return "which is not there"
    if found in pages and unquote(anchor) not in pages[found].anchors:
        return "where there is no such heading"
    return None
